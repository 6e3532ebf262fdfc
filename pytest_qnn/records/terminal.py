"""The table at the end of a run."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from pytest_qnn.records.collector import worst_output

if TYPE_CHECKING:
    from pytest_qnn.records.collector import Collector
    from pytest_qnn.records.record import Record

COLUMNS = ("model", "backend", "SoC", "in", "worst output", "SQNR dB", "steps", "blame", "p95 ms", "verdict", "test")
_SEVERITY = ("fail", "undecided", "pass", "not judged")  # a pass says more than a latency that wasn't judged


def summary_lines(collector: Collector) -> list[str]:
    """The table and what must be said beside it."""
    lines: list[str] = []
    rows = _merge(collector.records)
    if rows:
        lines += tabulate(rows, headers=COLUMNS, tablefmt="simple", disable_numparse=True).splitlines()
    if any(r["provenance"]["simulated"] for r in collector.records):
        lines.append("* computed by Qualcomm's HTP simulator; its times say nothing about a device")
    notes = {note for r in collector.records for note in r["provenance"]["notes"]}
    lines += [f"note: {note}" for note in sorted(notes)]
    if collector.errors:
        lines.append(f"{_count(len(collector.errors), 'infrastructure error')}: nothing was judged there")
    lines += [f"never judged by pytest-qnn: {subject}" for subject in collector.unjudged]
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _merge(records: list[Record]) -> list[list[str]]:
    """One row per test and session: an accuracy, a placement and a latency record share it."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for record in records:
        p = record["provenance"]
        key = (record["test"], p["model"]["file"], p["backend"], str(p["soc"]))
        new = _row(record)
        row = rows.setdefault(key, new)
        for column, value in new.items():
            if row[column] in ("", "-"):
                row[column] = value
        if _rank(new["verdict"]) < _rank(row["verdict"]):
            row["verdict"], row["blame"] = new["verdict"], new["blame"]
    return [[row[column] for column in COLUMNS] for row in rows.values()]


def _row(record: Record) -> dict[str, str]:
    p: dict[str, Any] = record["provenance"]
    worst = worst_output(record)
    metrics = worst["metrics"] if worst else {}
    latency = record.get("latency")
    return {
        "model": PurePath(p["model"]["file"]).name,
        "backend": p["backend"] + ("*" if p["simulated"] else ""),
        "SoC": p["soc"] or "-",
        "in": p["computed_in"],
        "worst output": worst["name"] if worst else "-",
        "SQNR dB": _number(metrics.get("sqnr_db"), ".1f") if worst else "-",
        "steps": _number(metrics.get("max_steps"), ".1f") if worst else "-",
        "blame": record["blame"] if record["blame"] != "none" else "-",
        "p95 ms": _number(latency["p95_ms"]["value"], ".2f") if latency else "-",
        "verdict": _verdict(record),
        "test": record["test"].rpartition("::")[2],
    }


def _rank(verdict: str) -> int:
    return next(i for i, name in enumerate(_SEVERITY) if verdict.startswith(name))


def _verdict(record: Record) -> str:
    """The verdict, and whether a failed one is what the test wanted."""
    wanted = {"xfailed": " (xfail)", "passed": " (expected)"}.get(record["test_outcome"], "")
    return str(record["verdict"]) + (wanted if record["verdict"] == "fail" else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
