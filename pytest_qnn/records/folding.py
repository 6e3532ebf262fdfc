"""The records of a test that Hypothesis runs hundreds of times: one for each thing that was judged, not one for each example."""

from __future__ import annotations

import math
import sys
from typing import Any

Record = dict[str, Any]


def keep_record(records: list[Record], new: Record) -> None:
    """Add a record; within a property-based test fold it into the one that is there of the same thing.

    Kept is the latest failure, which is the example that Hypothesis reports, since it runs that last; without any, the passing
    record with the lowest SQNR. ``examples`` says how many there were.
    """
    if not _in_property_based_test():
        records.append(new)
        return
    for i, old in enumerate(records):
        if "examples" in old and _subject(old) == _subject(new):
            counts = old["examples"]
            kept = new if _matters_more(new, old) else old
            kept["examples"] = {
                "judged": counts["judged"] + 1,
                "failed": counts["failed"] + (new["verdict"] == "fail"),
            }
            records[i] = kept
            return
    new["examples"] = {"judged": 1, "failed": int(new["verdict"] == "fail")}
    records.append(new)


def _in_property_based_test() -> bool:
    hypothesis = sys.modules.get("hypothesis")  # where nobody imported it, nobody uses it
    return hypothesis is not None and bool(hypothesis.currently_in_test_context())


def _subject(record: Record) -> tuple[Any, ...]:
    names = tuple(invariant["name"] for invariant in record.get("invariants", ()))
    provenance = record["provenance"]
    return record["kind"], record["subject"], provenance["model"]["sha256"], tuple(provenance["options"].items()), names


def _matters_more(new: Record, old: Record) -> bool:
    """Whether ``new``, which came later, is to be kept."""
    if new["verdict"] != "fail" and old["verdict"] != "fail":
        return _lowest_sqnr(new) < _lowest_sqnr(old)
    return bool(new["verdict"] == "fail")


def _lowest_sqnr(record: Record) -> float:
    found = [output["metrics"].get("sqnr_db") for output in record.get("outputs", ())]
    return min((value for value in found if value is not None), default=math.inf)
