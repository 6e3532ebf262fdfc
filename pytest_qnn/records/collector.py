"""From the test that made a record to the controller's reports: through pytest's own report objects, so also under xdist."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pytest_qnn.bench import Bench, CurrentTest
from pytest_qnn.errors import bench_fault
from pytest_qnn.fixtures import bench_key
from pytest_qnn.markers import backend_requests
from pytest_qnn.records.record import Record

# of the command line: they decide results
REPEATED_OPTIONS = (
    "soc",
    "target",
    "device",
    "adb_server",
    "runner",
    "device_runtime",
    "backend_config",
    "cpu_library",
    "strict_latency",
    "simulated_latency",
)


def begin_test(item: pytest.Item, bench: Bench) -> None:
    """Tell the bench which test is running, and what its marks say."""
    follows = "qnn_backend" in getattr(item, "fixturenames", ())
    marked = any(mark.name in ("backend", "device") for mark in item.iter_markers())
    expected = tuple(backend_requests(item, bench.settings.backends)) if marked and not follows else None
    worker = getattr(item.config, "workerinput", {}).get("workerid", "")
    given = {name: item.config.getoption(f"qnn_{name}") for name in REPEATED_OPTIONS}
    paths = {name: path for name in given if isinstance(path := getattr(bench.settings, name), Path)}
    given |= {name: str(path) for name, path in paths.items() if given[name]}  # absolute: the command may run elsewhere
    test = CurrentTest(
        nodeid=item.nodeid,
        expected=expected,
        worker=worker,
        tolerance_marks=tuple(mark.kwargs for mark in item.iter_markers("tolerance")),
        budget_marks=tuple(mark.kwargs for mark in item.iter_markers("latency_budget")),
        options=tuple(
            f"--qnn-{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in given.items()
            if value
        ),
    )
    bench.enter(test)


def attach_records(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Put what the bench noted since the last phase onto the report."""
    bench = item.config.stash[bench_key]
    test = bench.test
    if test.nodeid != item.nodeid:
        return
    fresh, test.records = test.records, []
    properties: list[tuple[str, object]] = []
    for record in fresh:
        test.published += 1
        prefix = "qnn" if test.published == 1 else f"qnn.{test.published}"
        properties += [(f"{prefix}.{name}", value) for name, value in junit_properties(record).items()]
    item.user_properties.extend(properties)
    report.user_properties.extend(properties)  # made before we came
    report.qnn_records = fresh  # type: ignore[attr-defined]
    fault = bench_fault(call.excinfo.value) if call.excinfo is not None else None
    happened = [*bench.pool.faults]
    bench.pool.faults.clear()
    if fault is not None and fault not in happened:
        happened.append(fault)
    report.qnn_errors = [  # type: ignore[attr-defined]
        {
            "test": item.nodeid,
            "worker": test.worker or None,
            "phase": call.when,
            "type": type(error).__name__,
            "message": str(error),
            "swallowed": fault is None,
            "device_log": error.log,
        }
        for error in happened
    ]
    if fault is not None and fault.log:
        report.sections.append(("Captured device log", fault.log))
    if test.retries and call.when == "teardown":
        report.qnn_retries = [  # type: ignore[attr-defined]
            {"test": item.nodeid, "worker": test.worker or None, "what": what} for what in test.retries
        ]
    test.outcome = max(test.outcome, report.outcome, key=("passed", "skipped", "failed").index)
    if call.when == "teardown":
        bench.target.end_test(test.outcome)
    report.qnn_ran, test.ran = sorted(set(test.ran)), []  # type: ignore[attr-defined]
    report.qnn_artifacts = dict(bench.artifacts)  # type: ignore[attr-defined]
    bench.artifacts.clear()


def junit_properties(record: Record) -> dict[str, object]:
    """The few values of a record that go into JUnit's ``<properties>``."""
    provenance = record["provenance"]
    values: dict[str, object] = {
        "kind": record["kind"],
        "model": provenance["model"]["file"],
        "backend": provenance["backend"],
        "soc": provenance["soc"],
        "simulated": provenance["simulated"],
        "verdict": record["verdict"],
        "blame": record["blame"],
    }
    if device := provenance["device"]:
        values["device"] = device["serial"]
        values["stand_in"] = device["stand_in"] or None
        values["replayed"] = device["replayed"] or None
        values["retries"] = "; ".join(record["retries"]) or None
    worst = worst_output(record)
    if worst is not None:
        values["worst_output"] = worst["name"]
        values["sqnr_db"] = worst["metrics"].get("sqnr_db")
        values["max_steps"] = worst["metrics"].get("max_steps")
    values["bundle"] = record.get("bundle")
    if task := record.get("task_metric"):
        values["metric"] = task["metric"]
        values["metric_value"] = task["value"]
        values |= {f"difference_{name}_points": task["difference_points"][name] for name in ("value", "low", "high")}
    if "latency" in record:
        values["p95_ms"] = record["latency"]["p95_ms"]["value"]
    return {name: value for name, value in values.items() if value is not None}


def worst_output(record: Record) -> dict[str, Any] | None:
    """The output of an accuracy record that looks worst: failed ones first, then the lowest SQNR."""
    outputs = record.get("outputs")
    if not outputs:
        return None

    def badness(output: dict[str, Any]) -> tuple[bool, float]:
        sqnr = output["metrics"].get("sqnr_db")
        return (output["ok"], float("inf") if sqnr is None else sqnr)

    return min(outputs, key=badness)  # type: ignore[no-any-return]


@dataclass
class Collector:
    """What the controller (or a run without xdist) has heard."""

    records: list[Record] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)
    artifacts: Counter[str] = field(default_factory=Counter)
    retries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, report: pytest.TestReport) -> list[Record]:
        """Take what a report carries; returns its records."""
        fresh: list[Record] = getattr(report, "qnn_records", [])
        self.records += fresh
        self.errors += getattr(report, "qnn_errors", [])
        self.ran.update(getattr(report, "qnn_ran", []))
        self.artifacts.update(getattr(report, "qnn_artifacts", {}))
        self.retries += getattr(report, "qnn_retries", [])
        for record in fresh:
            record["test_outcome"] = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        return fresh

    @property
    def unjudged(self) -> list[str]:
        """What ran on a backend but was never judged, in any test: ``model on backend (...)``."""
        return sorted(self.ran - {record["subject"] for record in self.records})
