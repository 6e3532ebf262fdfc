"""Property-based tests as users write them: fixtures, replay, xdist, records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from pytest_qnn.records.record import schema

pytestmark = pytest.mark.slow

Project = Callable[..., pytest.RunResult]

FIXTURE = """
from hypothesis import HealthCheck, given, settings, strategies as st
from pytest_qnn.properties import *

@pytest.fixture(scope="module")
def net(qnn_backend):
    return qnn_backend.load("model.qdq.onnx", float_model="model.onnx")
"""
FAULTY = (
    FIXTURE
    + """
from tests.properties.tampered import tampered

@pytest.fixture(scope="module")
def faulty(net):
    return tampered(net, lambda n, x, y: {"y": -y["y"]} if x["x"].max() > 0.9 else y)
"""
)


@pytest.fixture
def net_project(project: Project, pytester: pytest.Pytester, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project that has the classifier; its tests may plant faults."""
    for name in ("model.onnx", "model.qdq.onnx"):
        shutil.copy(folder / name, pytester.path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return project


def records(result: pytest.RunResult, file: Path) -> list[dict[str, object]]:
    report = json.loads(file.read_text())
    jsonschema.validate(report, schema())
    found: list[dict[str, object]] = report["records"]
    return found


def test_module_fixtures_work_without_health_checks_and_examples_leave_one_record(
    net_project: Project, pytester: pytest.Pytester
) -> None:
    result = net_project(
        FIXTURE
        + """
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_one(net, data):
    assert_matches_reference(net.run(data.draw(inputs_of(net))))

@settings(deadline=None, max_examples=10)
@given(batch=batches_of("model.qdq.onnx", 4))
def test_batches(net, batch):
    assert_matches_reference(net.run(batch))
    assert_fully_offloaded(net)

@pytest.mark.backend("htp", soc="SM8550")
@pytest.mark.backend("htp", soc="SM8350")
class TestInAClass:
    @settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.differing_executors])
    @given(x=inputs_of("model.qdq.onnx"))
    def test_socs(self, net, x):
        assert_finite(net, x)
""",
        "-W",
        "error::hypothesis.errors.HypothesisWarning",
        "--qnn-json=report.json",
        "--junitxml=junit.xml",
        "-n2",
    )
    result.assert_outcomes(passed=4)
    found = records(result, pytester.path / "report.json")
    assert sorted(
        (str(r["test"]).split("::", 1)[1], r["kind"], r["examples"]) for r in found if r["kind"] != "placement"
    ) == [
        ("TestInAClass::test_socs[htp-SM8350]", "robustness", {"judged": 5, "failed": 0}),
        ("TestInAClass::test_socs[htp-SM8550]", "robustness", {"judged": 5, "failed": 0}),
        ("test_batches[htp]", "accuracy", {"judged": 10, "failed": 0}),
        ("test_one[htp]", "accuracy", {"judged": 30, "failed": 0}),
    ]
    rows = [line for line in result.outlines if line.startswith("model.qdq.onnx")]
    assert len(rows) == 4
    junit = (pytester.path / "junit.xml").read_text()
    assert junit.count('name="qnn.verdict"') == 4
    assert 'name="qnn.3.' not in junit


def test_a_planted_fault_shrinks_to_a_readable_case_and_is_replayed_first(
    net_project: Project, pytester: pytest.Pytester
) -> None:
    text = (
        FAULTY
        + """
from hypothesis.database import DirectoryBasedExampleDatabase

seen = []

@settings(deadline=None, max_examples=200, print_blob=False, database=DirectoryBasedExampleDatabase("examples"))
@given(x=inputs_of("model.qdq.onnx"))
def test_bright(faulty, x):
    if not seen:
        print("FIRST", repr(x))
    seen.append(x)
    assert_backend_matches(faulty, x)
"""
    )
    first = net_project(text, "--qnn-json=report.json", "-s")
    first.assert_outcomes(failed=1)
    shrunk = "x=Sample(x=constant(0."
    (case,) = {line.split("x=", 1)[1].rstrip(",") for line in first.outlines if line.strip("E ").startswith(shrunk)}
    assert case.startswith("Sample(x=constant(0.9")
    assert case.endswith(", [1, 3, 16, 16]))")
    (record,) = records(first, pytester.path / "report.json")
    assert record["verdict"] == "fail"
    assert record["examples"]["failed"] > 1  # type: ignore[index]
    (invariant,) = record["invariants"]  # type: ignore[misc]
    assert invariant["case"] == case, "the record is that of the shrunk example"
    second = net_project(text, "-s")
    second.assert_outcomes(failed=1)
    second.stdout.fnmatch_lines([f"*FIRST {case}".replace("[", "[[]")])


def test_a_search_is_reported(net_project: Project, pytester: pytest.Pytester) -> None:
    result = net_project(
        FAULTY
        + """
def test_healthy(net):
    report = assert_robust(net, inferences=60)
    print(report)

def test_faulty(faulty):
    assert_robust(faulty, inferences=120)
""",
        "--qnn-json=report.json",
        "-s",
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*<RobustnessReport of model.qdq.onnx on htp (SM8650, simulator): matches_reference holds (*",
            "E *RobustnessError: robustness: model.qdq.onnx on htp (SM8650, simulator): 1 of 4 invariants broken, * of 120 inferences*",
            "E *matches_reference: broken by * batches",
            "E *case: session.run([[]Sample(x=*",
            "E *worst case: noise ratio * in output 'y'*",
            "E *again: python -m pytest 'test_it.py::test_faulty[[]htp]'",
            "model.qdq.onnx  htp*  SM8650  A8W8  y  *  backend  fail     test_it.py::test_faulty[[]htp]",
            "model.qdq.onnx  htp*  SM8650  A8W8  y  *           pass     test_it.py::test_healthy[[]htp]",
        ]
    )
    found = {str(r["test"]).split("::")[1]: r for r in records(result, pytester.path / "report.json")}
    assert found["test_healthy[htp]"]["search"]["budget"] == 60  # type: ignore[index]
    assert found["test_faulty[htp]"]["worst"]["noise_ratio"] > 3  # type: ignore[index]
    assert not any("never judged" in line for line in result.outlines)


def test_what_property_based_tests_leave_and_what_others_do(net_project: Project, pytester: pytest.Pytester) -> None:
    result = net_project(
        FIXTURE
        + """
@settings(deadline=None, max_examples=20)
@given(x=inputs_of("model.qdq.onnx"))
def test_drawn(net, x):
    assert_matches_reference(net.run(x))

def test_given(net, qnn_inputs):
    for x in qnn_inputs(net, 3):
        assert_matches_reference(net.run(x))

@settings(deadline=None, max_examples=5)
@given(x=inputs_of("model.qdq.onnx"))
def test_dies(net, x):
    net.run(x)
    if x["x"].any():
        raise TargetError("the bench is on fire")
""",
        "--qnn-json=report.json",
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*TargetError: the bench is on fire*"])
    found = [str(record["test"]).split("::")[1] for record in records(result, pytester.path / "report.json")]
    assert sorted(found) == ["test_drawn[htp]", *["test_given[htp]"] * 3], "outside of Hypothesis every record stays"
    files = list((pytester.path / "cache").rglob("*.npz"))
    assert len(files) == 3 * (3 + 4), "of qnn_inputs alone: float, QDQ, its check, draws of the rounding envelope"
