"""Metrics of the task: no worse than the reference, worse, or not shown; whose fault; and what no metric may do."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from pytest_qnn import (
    InputError,
    OptionError,
    PlacementError,
    TaskMetricError,
    UsageError,
    assert_task_metric,
    per_sample,
    top_k,
    word_error_rate,
)
from pytest_qnn.backend import Backend
from pytest_qnn.records.record import schema
from pytest_qnn.session import Run
from pytest_qnn.task_metrics import edit_distance
from tests import small_models

Project = Callable[..., pytest.RunResult]
Outputs = Mapping[str, np.ndarray]
SAMPLES, CLASSES = 60, 10


@pytest.fixture(scope="module")
def run(htp: Backend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A classifier of 10 classes, quantised well, on 60 samples."""
    folder = tmp_path_factory.mktemp("classifier")
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(32, CLASSES)).astype(np.float32)
    node = small_models.helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")
    model = small_models.save(folder / "net.onnx", [node], {"x": [1, 32]}, {"y": [1, CLASSES]}, {"w": weights})
    session = htp.load(small_models.quantized(model, folder / "net.qdq.onnx"), float_model=model)
    yield session.run([{"x": rng.normal(size=(1, 32)).astype(np.float32)} for _ in range(SAMPLES)])
    session.close()


def with_outputs(run: Run, change: Callable[[int, np.ndarray], np.ndarray]) -> Run:
    """The run as if the backend had given other outputs."""
    return replace(run, results=tuple({"y": change(i, r["y"])} for i, r in enumerate(run.results)))


def wrong_in(run: Run, samples: int) -> Run:
    """The best class becomes the worst in the first so many samples."""
    return with_outputs(run, lambda i, y: -y if i < samples else y)


# --- the verdict ------------------------------------------------------------------------------------------------------


def test_a_good_model_agrees_with_its_reference_as_far_as_its_samples_can_show(run: Run) -> None:
    verdict = assert_task_metric(run, top_k(5), margin=12)
    assert verdict.ok
    assert verdict.value == verdict.reference == 1.0
    assert -12 < verdict.difference.low < -3.7 / SAMPLES * 100 * 0.9  # the exact bound of 60 equal samples


def test_too_few_samples_are_no_pass_and_it_is_said_how_many_would_do(run: Run) -> None:
    with pytest.raises(TaskMetricError) as failure:
        assert_task_metric(run, top_k(5))
    text = str(failure.value)
    assert text.startswith("too few samples: net.qdq.onnx on htp (SM8650, simulator): top_5 is undecided, 60 samples")
    assert "about 7" in text
    assert "samples like these would decide it" in text
    assert failure.value.verdict.blame == "too few samples"
    verdict = assert_task_metric(run, top_k(5), strict=False)
    assert (verdict.outcome, verdict.ok) == ("undecided", False)


def test_a_backend_that_loses_decisions_fails_and_is_blamed(run: Run) -> None:
    with pytest.raises(TaskMetricError, match="backend to blame: .*top_1 is worse by more than 5 points") as failure:
        assert_task_metric(wrong_in(run, 20), top_k(), margin=5)
    verdict = failure.value.verdict
    assert verdict.difference.value == pytest.approx(-100 * 20 / SAMPLES, abs=4)
    assert verdict.difference.high < -5
    assert verdict.blame == "backend"


def test_quantisation_that_loses_decisions_is_blamed_in_the_backends_place(htp: Backend, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(32, CLASSES)).astype(np.float32)
    node = small_models.helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")
    model = small_models.save(tmp_path / "net.onnx", [node], {"x": [1, 32]}, {"y": [1, CLASSES]}, {"w": weights})
    narrow = small_models.quantized(model, tmp_path / "narrow.onnx", scale_of_data=0.05)
    clipped = htp.load(narrow, float_model=model).run(
        [{"x": rng.normal(size=(1, 32)).astype(np.float32)} for _ in range(SAMPLES)]
    )
    with pytest.raises(TaskMetricError, match="quantization to blame"):
        assert_task_metric(clipped, top_k(), margin=5)
    # the backend does what the QDQ model does
    assert assert_task_metric(clipped, top_k(), margin=15, against="quantized").ok


def test_labels_make_an_accuracy_of_an_agreement(run: Run) -> None:
    """Half of the labels are wrong for both, so both are right in half of the samples, and lose nothing."""
    reference = assert_task_metric(run, top_k(), margin=15, against="quantized")
    assert reference.reference == 1.0
    best = [int(r["y"].argmax()) for r in run.results]
    labels = [c if i % 2 else (c + 1) % CLASSES for i, c in enumerate(best)]
    verdict = assert_task_metric(run, top_k(), labels=labels, margin=15)
    assert verdict.value == 0.5
    assert abs(verdict.difference.value) < 4


def test_a_metric_that_runs_down_fails_when_it_rises(run: Run) -> None:
    """Word errors: more of them are worse, though the number is larger."""

    def decode(outputs: Outputs) -> str:
        return " ".join(str(c) for c in np.argsort(outputs["y"][0])[-4:])

    spoken = [decode(r) for r in run.results]
    metric = word_error_rate(decode)
    same = assert_task_metric(run, metric, labels=spoken, margin=25)
    assert same.value == 0
    assert not same.asked.higher_is_better
    with pytest.raises(TaskMetricError, match="lower is better") as failure:
        assert_task_metric(wrong_in(run, 40), metric, labels=spoken, margin=5)
    assert failure.value.verdict.difference.high < -5
    with pytest.raises(OptionError, match="contradicts word_error_rate"):
        assert_task_metric(run, metric, labels=spoken, higher_is_better=True)

    def errors(outputs: list[Outputs], labels: list[Any]) -> float:
        return float(np.mean([decode(o) != label for o, label in zip(outputs, labels, strict=True)]))

    with pytest.raises(TaskMetricError):
        assert_task_metric(wrong_in(run, 40), errors, labels=spoken, margin=5, higher_is_better=False, resamples=800)
    # the other way round it would have passed: the number is larger
    assert assert_task_metric(wrong_in(run, 40), errors, labels=spoken, margin=5, resamples=800).ok


def test_a_function_of_all_outputs_is_resampled_as_a_whole(run: Run) -> None:
    calls = []

    def macro_recall(outputs: list[Outputs], labels: list[Any]) -> float:
        calls.append(len(outputs))
        guesses = np.array([o["y"].argmax() for o in outputs])
        truth = np.array([label["y"].argmax() for label in labels])
        return float(np.mean([(guesses[truth == c] == c).mean() for c in np.unique(truth)]))

    assert assert_task_metric(run, macro_recall, margin=15, resamples=800).ok
    assert len(calls) > 2 * 800
    with pytest.raises(TaskMetricError, match="backend to blame: .*macro_recall"):
        assert_task_metric(wrong_in(run, 30), macro_recall, margin=15, resamples=800)


def test_what_the_order_changes_little_is_let_be(run: Run) -> None:
    """Rankings of quantised scores take equals as they come."""

    def ranked(outputs: list[Outputs], labels: list[Any]) -> float:
        return 0.9 + (1e-3 if outputs[0]["y"][0, 0] > run.results[-1]["y"][0, 0] else 0.0)

    assert assert_task_metric(run, ranked, margin=15, resamples=800).ok
    with pytest.raises(UsageError, match="order or chance"):
        assert_task_metric(run, ranked, margin=0.5, resamples=800)


def test_a_score_of_its_own_range_is_told_by_points_and_worst_loss(run: Run) -> None:
    def distance(outputs: Outputs, label: Outputs) -> float:
        return float(np.abs(outputs["y"] - label["y"]).mean())

    score = per_sample(distance, higher_is_better=False)
    verdict = assert_task_metric(run, score, margin=0.5, points=1, worst_loss=1.0)
    assert verdict.metric == "distance"
    assert verdict.value == pytest.approx(-verdict.difference.value)
    with pytest.raises(OptionError, match="more than worst_loss=1 says is possible"):
        assert_task_metric(wrong_in(run, 1), score, margin=0.5, points=1, worst_loss=1.0)


def test_a_test_set_is_not_made_longer_by_repeating_it(run: Run) -> None:
    long = replace(run, samples=run.samples * 2, results=run.results * 2)
    with pytest.raises(InputError, match="only 60 of 120 samples are different"):
        assert_task_metric(long, top_k(5), margin=5)


def test_nothing_is_vouched_for_where_part_of_the_model_ran_elsewhere(htp: Backend, tmp_path: Path) -> None:
    partly = small_models.unary(tmp_path / "partly.onnx", "Relu", "Erf", "Relu")
    run = htp.load(partly).run([{"x": np.full((1, 16), x, np.float32)} for x in (1, 2)])
    with pytest.raises(PlacementError, match="Erf"):
        assert_task_metric(run, top_k(), margin=100)


def test_the_verdict_is_the_same_each_time(run: Run) -> None:
    first, again = (assert_task_metric(wrong_in(run, 2), top_k(), margin=30) for _ in range(2))
    assert first == again


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("a b c", "a b c", 0), ("a b c", "a c", 1), ("a", "b a c", 2), ("a b", "b a", 2), ("", "x y", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a.split(), b.split()) == distance


def test_top_k_counts_ties_as_argmax_does_and_misses_nan() -> None:
    parts = top_k(1).parts
    y = {"y": np.array([[3.0, 3.0, 1.0], [0.0, 2.0, 1.0]], np.float32)}
    assert parts(y, [0, 1]) == (2.0, 2.0)
    assert parts(y, [1, 1]) == (1.0, 2.0)  # the first of equals is the best
    assert top_k(2).parts(y, [1, 2]) == (2.0, 2.0)
    assert parts({"y": np.array([[np.nan, 1.0]])}, 1) == (0.0, 1.0)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def nan_metric(outputs: list[Outputs], labels: list[Any]) -> float:
    return float("nan")


def nan_on_resamples(outputs: list[Outputs], labels: list[Any]) -> float:
    return 1.0 if len({id(o) for o in outputs}) == SAMPLES else float("nan")


def raising(outputs: list[Outputs], labels: list[Any]) -> float:
    return float(outputs[0]["logits"].max())


def by_order(outputs: list[Outputs], labels: list[Any]) -> float:
    return float(outputs[0]["y"].max())


def changing(outputs: list[Outputs], labels: list[Any]) -> float:
    labels[0]["y"][...] = 0  # the reference that is compared with next
    return 1.0


def nothing(outputs: list[Outputs], labels: list[Any]) -> None:
    return None


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (nan_metric, "nan_metric on the backend's outputs: it returned nan"),
        (nan_on_resamples, "nan_on_resamples on a resample of .* it returned nan"),
        (raising, "raising on the backend's outputs: it raised KeyError: 'logits'"),
        (by_order, "depends on order or chance can't be resampled"),
        (changing, "it raised ValueError: assignment destination is read-only"),
        (nothing, "it returned NoneType, not a number"),
        (per_sample(lambda o, label: float("nan")), "sample 0: it gave nan"),
        (per_sample(lambda o, label: o["z"]), "sample 0: it raised KeyError"),
        (word_error_rate(lambda o: ""), "nothing to divide by: all labels are empty"),
        ("top_1", "a metric must be top_k"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or getattr(value, "name", ""),
)
def test_a_metric_that_is_none_is_the_tests_mistake(run: Run, metric: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        assert_task_metric(run, metric, resamples=800)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"labels": [1, 2]}, InputError, "2 labels for 60 samples"),
        ({"labels": dict.fromkeys(range(SAMPLES))}, InputError, "labels must be a list"),
        ({"labels": [0.5] * SAMPLES}, InputError, "a label must be a class"),
        ({"labels": [CLASSES] * SAMPLES}, InputError, "there are 10 classes"),
        ({"margin": -1}, OptionError, "margin must be a number from 0"),
        ({"margin": float("nan")}, OptionError, "margin"),
        ({"confidence": 95}, OptionError, "confidence must be a number from 0.8 to 0.9999"),
        ({"against": "qdq"}, OptionError, "unknown reference 'qdq'"),
        ({"resamples": 100}, OptionError, "resamples must be a whole number of at least 800"),
        ({"points": 0}, OptionError, "points"),
        ({"worst_loss": 0}, OptionError, "worst_loss"),
    ],
)
def test_bad_arguments_are_named(run: Run, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        assert_task_metric(run, top_k(), **arguments)


# --- through pytest ---------------------------------------------------------------------------------------------------

TESTS = """
import numpy as np

@pytest.fixture(scope="module")
def run(qnn_backend, qnn_inputs):
    session = qnn_backend.load("conv.qdq.onnx", float_model="conv.onnx")
    return session.run(qnn_inputs(session, 12))

def test_agreement(run):
    assert_task_metric(run, top_k(5), margin=40)

def test_few(run):
    assert not assert_task_metric(run, top_k(5), strict=False).ok

def test_worse(run):
    import dataclasses
    zeros = tuple({"y": -r["y"]} for r in run.results)
    assert_task_metric(dataclasses.replace(run, results=zeros), top_k(), margin=5)
"""


def test_records_table_junit_and_bundle_tell_of_it(pytester: pytest.Pytester, project: Project) -> None:
    result = project(TESTS, "--qnn-json=out.json", "--junitxml=out.xml", "--qnn-artifacts=kept")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*backend to blame: *: top_1 is worse by more than 5 points, 12 samples",
            "*again: python -m pytest *test_it.py::test_worse*",
            "*bundle: */kept/test-worse-htp-*",
            "model *task metric *blame *verdict *test",
            "conv.qdq.onnx *top_1 -*backend *fail *::test_worse*",
            "conv.qdq.onnx *top_5 * undecided *::test_few*",
        ],
        consecutive=False,
    )
    content = json.loads((pytester.path / "out.json").read_text())
    jsonschema.validate(content, schema())
    records = {r["test"].partition("::")[2].partition("[")[0]: r for r in content["records"]}
    assert {name: (r["kind"], r["verdict"], r["blame"]) for name, r in records.items()} == {
        "test_agreement": ("task metric", "pass", "none"),
        "test_few": ("task metric", "undecided", "too few samples"),
        "test_worse": ("task metric", "fail", "backend"),
    }
    task = records["test_few"]["task_metric"]
    assert task["difference_points"]["low"] < -0.5
    assert task["samples_needed"] > 100
    properties = {p.get("name"): p.get("value") for p in ET.parse(pytester.path / "out.xml").iter("property")}
    assert properties["qnn.metric"] == "top_1"
    assert float(properties["qnn.difference_high_points"] or 0) < -5
