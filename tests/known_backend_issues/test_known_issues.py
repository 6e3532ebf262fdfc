"""Each known fault of the backend still has the status that it had: a fixed one shows, and so does one that got worse."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from pytest_qnn.assertions import judge_run
from pytest_qnn.bench import Bench
from pytest_qnn.errors import RuntimeCrashError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.verdict.tolerance import Tolerance
from tests.known_backend_issues.issues import ISSUES, SEEN_WITH, Issue


def status_of(bench: Bench, issue: Issue, file: Path, soc: str) -> tuple[str, str]:
    """What the backend makes of a model now: "right", "wrong", "crash" or "unstable"; and a line about it."""
    inputs = issue.build(file)
    try:
        session = bench.backend(BackendRequest("htp", soc=soc)).load(file)
        assert not session.placement.misplaced, f"the backend doesn't take it any more: {session.placement.describe()}"
        run, again = (session.run(inputs, allow_non_finite=True) for _ in range(2))
    except RuntimeCrashError as error:
        return "crash", str(error).partition("\n")[0]
    for name, output in run.results[0].items():
        if not np.array_equal(output, again.results[0][name], equal_nan=True):
            return "unstable", f"{name} differs from run to run"
    verdict = judge_run(run, Tolerance(steps=issue.steps) if issue.steps else None)
    return ("right", "") if verdict.ok else ("wrong", f"{verdict.blame}: {verdict.failed[0].failures[0]}")


@pytest.mark.parametrize(
    ("issue", "soc"), [(issue, soc) for issue in ISSUES for soc in issue.socs], ids=lambda v: getattr(v, "name", v)
)
def test_a_known_issue_is_as_it_was(bench: Bench, tmp_path: Path, issue: Issue, soc: str) -> None:
    release = metadata.version("onnxruntime-qnn")
    status, detail = status_of(bench, issue, tmp_path / "issue.onnx", soc)
    bench.pool.faults.clear()
    assert status in (issue.status, *issue.also), (
        f"{issue.name} on {soc}: {status} with onnxruntime-qnn {release}, {issue.status} when it was seen with {SEEN_WITH} ({detail}). "
        "If it is fixed, take it out; if it is another release, note its status"
    )
