"""assert_layers_match_reference on the simulated HTP, and where a failed verdict says that it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pytest_qnn import InputError, LayerError, ModelError, UsageError, assert_layers_match_reference
from pytest_qnn.backend import Backend
from pytest_qnn.layers.envelope import write_envelope
from pytest_qnn.layers.judge import judge_layers
from pytest_qnn.layers.run import LayeredModel
from pytest_qnn.model.onnx_file import read_model
from tests.qdq_graph import QdqGraph

SAMPLES = [{"x": np.random.default_rng(k).normal(size=(1, 3, 16, 16)).astype(np.float32)} for k in range(2)]


def with_weight_scale(htp: Backend, source: Path, output: Path, factor: float) -> LayeredModel:
    """The backend gets the model with another scale of its weights, the reference the intact one."""
    model = onnx.load(str(source))
    (scale,) = (i for i in model.graph.initializer if i.name.startswith("w") and "scale" in i.name)
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(factor), scale.name))
    onnx.save(model, str(output))
    session = htp.load(source)
    return LayeredModel(session.bench, session.plan, read_model(output), session.bench.limits, read_model(source))


def test_each_layer_of_a_healthy_model_passes(htp: Backend, models: Path) -> None:
    session = htp.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    verdict = assert_layers_match_reference(session, SAMPLES)
    assert [layer.kind for layer in verdict.layers] == ["input", "Conv+Relu"] or len(verdict.layers) == 2
    assert all(layer.max_steps <= 2 for layer in verdict.layers)
    assert verdict.elsewhere == ()
    assert session.bench.test.records[-1]["kind"] == "layers"


def test_a_layer_that_the_backend_computes_otherwise_is_found_and_named(
    htp: Backend, models: Path, tmp_path: Path
) -> None:
    """The backend runs a model whose weights have a scale 2% off; the reference has the right one."""
    layered = with_weight_scale(htp, models / "conv.qdq.onnx", tmp_path / "broken.onnx", 1.02)
    verdict = judge_layers(layered, SAMPLES)
    assert [layer.name for layer in verdict.failed] == ["conv"]
    assert any(failure.startswith("gain") for failure in verdict.failed[0].failures)


def test_known_wrong_operators_are_found(htp: Backend, tmp_path: Path) -> None:
    """A 16-bit HardSigmoid at the end of a graph ignores its encoding on HTP."""
    g = QdqGraph()
    x = g.quantize("x", -4, 4, np.uint16)
    y = g.quantize(g.node("HardSigmoid", [x], name="gate"), 0, 0.7, np.uint16)
    session = htp.load(g.save(tmp_path / "gate.onnx", {"x": [1, 64]}, y, [1, 64]))
    with pytest.raises(LayerError, match="1 of 2 layers fail") as failure:
        assert_layers_match_reference(session, {"x": np.linspace(-3, 3, 64, dtype=np.float32)[np.newaxis]})
    assert "HardSigmoid 'gate'" in str(failure.value)
    assert failure.value.verdict.failed[0].name == "gate"


@pytest.mark.parametrize(
    ("inputs", "error", "text"),
    [
        ([], InputError, "no samples"),
        ({"x": np.zeros((1, 3, 16, 15), np.float32)}, InputError, "shape"),
        ([SAMPLES[0], {"z": SAMPLES[0]["x"]}], InputError, "sample 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(htp: Backend, models: Path, inputs: object, error: type, text: str) -> None:
    session = htp.load(models / "conv.qdq.onnx")
    with pytest.raises(error, match=text):
        assert_layers_match_reference(session, inputs)  # type: ignore[arg-type]


def test_what_has_no_layers_is_refused(htp: Backend, models: Path) -> None:
    session = htp.load(models / "conv.onnx")
    with pytest.raises(UsageError, match="isn't quantised"):
        assert_layers_match_reference(session, SAMPLES)
    with pytest.raises(UsageError, match="takes a session"):
        assert_layers_match_reference("conv.qdq.onnx", SAMPLES)  # type: ignore[arg-type]


GATE = """
import numpy as np
import pytest


@pytest.mark.backend("htp")
def test_gate(qnn_backend):
    session = qnn_backend.load("gate.onnx")
    run = session.run({"x": np.linspace(-3, 3, 64, dtype=np.float32)[np.newaxis]})
    assert_matches_reference(run)
"""


def test_a_failed_verdict_says_where_it_starts(
    project: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    g = QdqGraph()
    x = g.quantize("x", -4, 4, np.uint16)
    r = g.quantize(g.node("Mul", [x, x], name="square"), 0, 16, np.uint16)
    y = g.quantize(g.node("HardSigmoid", [r], name="gate"), 0, 0.7, np.uint16)
    g.save(pytester.path / "gate.onnx", {"x": [1, 64]}, y, [1, 64])
    result = project(GATE, f"--qnn-json={pytester.path / 'report.json'}")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*backend to blame: gate.onnx on htp*", "*layers: 1 of 3 depart*it starts at", "*HardSigmoid 'gate'*"]
    )
    quiet = project("", "--qnn-no-layers")
    quiet.assert_outcomes(failed=1)
    quiet.stdout.no_fnmatch_line("*layers: *")


def test_what_is_wrong_with_the_model_is_not_taken_for_the_references_own_doubt(
    htp: Backend, models: Path, tmp_path: Path
) -> None:
    """A model ten times off is red: the reference is checked against itself, not against the broken one."""
    layered = with_weight_scale(htp, models / "conv.qdq.onnx", tmp_path / "broken.onnx", 0.1)
    (run,) = layered.run(SAMPLES[:1])
    last = layered.layers[-1].tensor
    assert (run.m[last] != run.q[last]).mean() > 0.5
    assert np.abs(run.r[last].astype(int) - run.q[last]).max() <= 1
    assert [layer.name for layer in judge_layers(layered, SAMPLES).failed] == ["conv"]


def test_a_model_that_is_too_large_is_judged_without_layers_and_envelope(
    htp: Backend, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_qnn.layers.cut.LARGEST", 100)
    with pytest.raises(ModelError, match="too large to be cut into layers"):
        htp.load(models / "conv.qdq.onnx").layered  # noqa: B018
    assert not write_envelope(models / "conv.qdq.onnx", tmp_path / "envelope.onnx")
