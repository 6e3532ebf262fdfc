"""The profiling log of the stand-in of qnn-net-run, and what the stand-in of qnn-profile-viewer makes of it.

The real log is binary and undocumented; this one names itself in its first line. The CSV has the columns, messages and
identifiers of real ones: one ``EXECUTE`` row of ``NETRUN`` for each inference, rows of ``BACKEND`` below it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence

from pytest_qnn.testing.sdk_stand_in import MARK

HEAD = f"{MARK} profiling log\n".encode()
COLUMNS = (
    "Msg Timestamp",
    "Message",
    "Time",
    "Unit of Measurement",
    "Timing Source",
    "Event Level",
    "Event Identifier",
)
Row = tuple[int, str, int, str, str, str, str]


def inference_rows(at: int, graph: str, microseconds: int, nodes: Iterable[tuple[str, int]] = ()) -> list[Row]:
    """The rows of one inference: at (microseconds), its time, cycles of nodes."""
    rows: list[Row] = [
        (at, "EXECUTE", cycles, "CYCLES", "BACKEND", "SUB-EVENT", f"{node} (cycles)") for node, cycles in nodes
    ]
    return [
        (at, "EXECUTE", microseconds, "US", "NETRUN", "ROOT", f"Graph 0: {graph}"),
        (at, "EXECUTE", microseconds, "US", "BACKEND", "ROOT", "QNN (execute) time"),
        *rows,
    ]


def to_log(rows: Sequence[Row]) -> bytes:
    """The log of these rows."""
    return HEAD + "".join(json.dumps(row) + "\n" for row in rows).encode()


def to_csv(log: bytes) -> str:
    """The CSV of a log.

    Raises:
        ValueError: it isn't a log of the stand-in.
    """
    if not log.startswith(HEAD):
        raise ValueError("not a profiling log of the stand-in")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in log.removeprefix(HEAD).splitlines():
        row = json.loads(line)
        if len(row) != len(COLUMNS):
            raise ValueError(f"a row of {len(row)} columns")
        writer.writerow(row)
    return text.getvalue()
