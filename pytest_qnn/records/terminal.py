"""The table at the end of a run."""

from __future__ import annotations

import io
import os
import shlex
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pytest_qnn.records.collector import worst_output
from pytest_qnn.records.failure import conditions_line

if TYPE_CHECKING:
    import pytest

    from pytest_qnn.records.collector import Collector
    from pytest_qnn.records.record import Record

COLUMNS = (
    "model", "backend", "SoC", "in", "worst output", "SQNR dB", "steps", "task metric", "blame", "p95 ms", "verdict", "test"
)  # fmt: skip
FOLDED = ("model", "worst output", "task metric", "test")  # too long ones continue on the next line
LEAST_FOLDED = 16  # columns that these get in any case
DISPENSABLE = (
    "in",
    "worst output",
    "steps",
    "p95 ms",
    "SoC",
)  # left out, in this order, where the terminal is too narrow
WIDTH_OF_A_FILE = 200  # columns, where no terminal says how many there are
_SEVERITY = ("fail", "undecided", "pass", "not judged")  # a pass says more than a latency that wasn't judged
_STYLES = {"fail": "red", "undecided": "yellow", "pass": "green", "not judged": "yellow"}


def write_summary(reporter: pytest.TerminalReporter, collector: Collector) -> None:
    """Write the table and what must be said beside it, as wide and as colourful as the terminal allows."""
    notes = summary_notes(collector)
    rows = summary_rows(collector.records)
    if not rows and not notes:
        return
    reporter.ensure_newline()
    reporter.section("QNN")
    if rows:
        known = reporter.isatty or "COLUMNS" in os.environ
        width = reporter._tw.fullwidth if known else WIDTH_OF_A_FILE
        for line in table_lines(rows, width, color=reporter.hasmarkup):
            reporter.write_line(line)
    for note in notes:
        reporter.write_line(note)


def table_lines(rows: list[dict[str, str]], width: int, color: bool = False) -> list[str]:
    """The table, at most ``width`` columns wide; columns without any entry are left out."""
    used = [column for column in COLUMNS if any(row[column] for row in rows)]
    least = {column: _least_width(column, rows) for column in used}
    for column in DISPENSABLE:
        if sum(least[c] + 2 for c in used) > width and column in used:
            used.remove(column)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold" if color else "")
    for column in used:
        table.add_column(column, overflow="fold", no_wrap=column not in FOLDED, min_width=least[column])
    for row in rows:
        verdict = Text(row["verdict"], style=next(_STYLES[s] for s in _SEVERITY if row["verdict"].startswith(s)))
        table.add_row(*(verdict if column == "verdict" else Text(row[column]) for column in used))
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=color, color_system="standard" if color else None)
    console.print(table)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def _least_width(column: str, rows: list[dict[str, str]]) -> int:
    natural = max(len(column), *(len(row[column]) for row in rows))
    return min(natural, LEAST_FOLDED) if column in FOLDED else natural


def summary_notes(collector: Collector) -> list[str]:
    """What must be said beside the table."""
    records = collector.records
    notes: list[str] = []
    if any(r["provenance"]["simulated"] and not r["provenance"]["device"] for r in records):
        notes.append("* computed by Qualcomm's HTP simulator; its times say nothing about a device")
    devices = {d["serial"]: d["stand_in"] for r in records if (d := r["provenance"]["device"]) and d["stand_in"]}
    notes += [f"* {serial} is a stand-in for a device: {text}" for serial, text in devices.items()]
    replayed = {d["serial"]: text for r in records if (d := r["provenance"]["device"]) and (text := d.get("replayed"))}
    notes += [f"* {serial} was not asked: this is a replay of a {text}" for serial, text in replayed.items()]
    if any(r.get("synthetic_inputs") for r in records):
        notes.append("~ on made-up inputs, which can't show a wrong calibration")
    notes += sorted({f"note: {note}" for r in records for note in r["provenance"]["notes"]})
    for record in records:
        if (conditions := record.get("conditions")) and record["verdict"] != "not judged":
            line = conditions_line(conditions)
            notes += [f"! {record['subject']}: {line}"] if line else []
        for output in record.get("outputs", []):
            notes += [f"! {record['subject']}, output {output['name']!r}: {text}" for text in output["warnings"]]
    notes += [
        f"infrastructure error that its test kept to itself: {e['test']}: {e['message'].splitlines()[0]}"
        for e in collector.errors
        if e["swallowed"]
    ]
    notes += [f"device lost, done once more: {r['test']}: {r['what']}" for r in collector.retries]
    if bundles := {r["bundle"] for r in records if r.get("bundle")}:
        folder = shlex.quote(str(PurePath(min(bundles)).parent))
        notes.append(f"bundles of failing cases: {len(bundles)}; pytest-qnn bundle show {folder}")
    if collector.artifacts["rebuilt"]:
        count = collector.artifacts["rebuilt"]
        notes.append(
            f"cache: {count} damaged {'entry was' if count == 1 else 'entries were'} thrown away and compiled again"
        )
    if collector.artifacts["compiled"] or collector.artifacts["reused"]:
        notes.append(
            f"models: {collector.artifacts['compiled']} compiled, {collector.artifacts['reused']} from the cache"
        )
    if number := sum(not e["swallowed"] for e in collector.errors):
        notes.append(f"{number} infrastructure error{'' if number == 1 else 's'}: nothing was judged there")
    notes += [f"never judged by pytest-qnn: {subject}" for subject in collector.unjudged]
    return list(dict.fromkeys(notes))


def summary_rows(records: list[Record]) -> list[dict[str, str]]:
    """One row per test and session, failures first: an accuracy, a placement and a latency record share a row."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for record in records:
        new = _row(record)
        row = rows.setdefault((record["test"], record["subject"]), new)
        for column, value in new.items():
            row[column] = row[column] or value
        if _rank(new["verdict"]) < _rank(row["verdict"]):
            row["verdict"], row["blame"] = new["verdict"], new["blame"]
            row["task metric"] = new["task metric"] or row["task metric"]
    return sorted(rows.values(), key=lambda row: not row["verdict"].startswith("fail"))


def _row(record: Record) -> dict[str, str]:
    p: dict[str, Any] = record["provenance"]
    worst = worst_output(record)
    metrics = worst["metrics"] if worst else {}
    if found := record.get("worst"):  # of a search
        worst, metrics = {"name": found["output"]}, found
    latency = record.get("latency")
    file, _, test = record["test"].partition("::")
    return {
        "model": PurePath(p["model"]["file"]).name,
        "backend": p["backend"] + ("*" if p["simulated"] else "") + ("~" if record.get("synthetic_inputs") else ""),
        "SoC": p["soc"] or "",
        "in": p["computed_in"],
        "worst output": worst["name"] if worst else "",
        "SQNR dB": _number(metrics.get("sqnr_db"), ".1f"),
        "steps": _number(metrics.get("max_steps"), ".3g"),
        "task metric": _task_metric(record.get("task_metric")),
        "blame": record["blame"] if record["blame"] != "none" else "",
        "p95 ms": _number(latency["p95_ms"]["value"], ".2f") if latency else "",
        "verdict": _verdict(record),
        "test": f"{PurePath(file).name}::{test}" if test else file,
    }


def _task_metric(task: dict[str, Any] | None) -> str:
    """A metric of the task: how much better, in points, with its interval."""
    if task is None:
        return ""
    d = task["difference_points"]
    return f"{task['metric']} {d['value']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"


def _rank(verdict: str) -> int:
    return next(i for i, name in enumerate(_SEVERITY) if verdict.startswith(name))


def _verdict(record: Record) -> str:
    """The verdict, and whether a failed one is what the test wanted or a passed one has warnings."""
    if record["verdict"] == "fail":
        return "fail" + {"xfailed": " (xfail)", "passed": " (expected)"}.get(record["test_outcome"], "")
    warned = any(output["warnings"] for output in record.get("outputs", []))
    return str(record["verdict"]) + (" (!)" if warned else "")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
