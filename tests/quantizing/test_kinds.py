"""Every kind of quantised model runs on the simulated HTP, wholly and as well as its quantisation allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from pytest_qnn import Backend, assert_fully_offloaded, assert_matches_reference
from pytest_qnn.assertions import judge_run
from pytest_qnn.model import quantize
from pytest_qnn.model.onnx_file import read_model
from tests import small_models
from tests.quantizing.conftest import floats, net, samples

KINDS: dict[str, dict[str, Any]] = {
    "A8W8": {},
    "A16W8": {"activations": 16},
    "A16W16": {"activations": 16, "weights": 16},
    "A8W4": {"weights": 4},
    "A16W4": {"activations": 16, "weights": 4, "per_channel": True},
    "per channel": {"per_channel": True},
    "symmetric": {"symmetric_activations": True, "symmetric_weights": True},
    "int8": {"activations": "int8"},
    "entropy": {"method": "entropy"},
    "percentile": {"method": "percentile", "percentile": 99.9},
    "mixed": {"overrides": {"r": 16}},
    "external data": {"external_data": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_on_the_htp(kind: str, htp: Backend, quantize_net: Callable[..., Any]) -> None:
    result = quantize_net(**KINDS[kind])
    session = htp.load(result.path, float_model=result.float_model, dimensions={"batch": 1})
    assert_fully_offloaded(session)
    assert_matches_reference(session.run(samples(4, seed=100)))


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, "A8W8"),
        ({"activations": 16}, "A16W8"),
        ({"activations": "16", "weights": 16}, "A16W16"),
        ({"weights": 4}, "A8W4"),
        ({"overrides": {"r": 16}}, "A8/16W8"),
    ],
)
def test_the_bit_widths_are_those_that_were_asked_for(
    quantize_net: Callable[..., Any], options: dict[str, Any], precision: str
) -> None:
    assert read_model(quantize_net(**options).path).precision == precision


def test_a_weight_can_have_its_own_precision(quantize_net: Callable[..., Any]) -> None:
    assert read_model(quantize_net(overrides={"fw": 4}).path).weight_bits == (4, 8)


def test_per_channel_gives_each_output_channel_its_scale(quantize_net: Callable[..., Any]) -> None:
    model = onnx.load(str(quantize_net(per_channel=True).path))
    lengths = {
        tuple(i.dims)
        for i in model.graph.initializer
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and i.name == n.input[1]
    }
    assert (8,) in lengths


def test_normalisation_is_folded_and_metadata_kept(quantize_net: Callable[..., Any]) -> None:
    result = quantize_net()
    model = onnx.load(str(result.path))
    properties = {p.key: p.value for p in model.metadata_props}
    assert "BatchNormalization" not in {n.op_type for n in model.graph.node}
    assert properties["author"] == "somebody"
    assert '"batch": 1' in properties["pytest_qnn.quantization"]
    assert {o.domain for o in model.opset_import} == {""}


@pytest.mark.parametrize("opset", [11, 12])
def test_an_old_opset_is_upgraded(tmp_path: Path, opset: int) -> None:
    from pytest_qnn.model import quantize

    result = quantize(
        net(tmp_path / "old.onnx", opset), samples(), tmp_path / "q.onnx", activations=16, dimensions={"batch": 1}
    )
    assert f"upgraded from opset {opset} to 21, which 16- and 4-bit types need" in result.notes
    model = onnx.load(str(result.path))
    assert {n.domain for n in model.graph.node} == {""}


def test_external_data_stays_external_and_is_replaced_with_the_model(float_net: Path, tmp_path: Path) -> None:
    from pytest_qnn.model import quantize

    model = onnx.load(str(float_net))
    given, target = tmp_path / "given.onnx", tmp_path / "q.onnx"
    onnx.save(model, str(given), save_as_external_data=True, location="given.data", size_threshold=0)
    for seed in (0, 50):
        quantize(given, samples(seed=seed), target, dimensions={"batch": 1}, weights=16)
        quantize(given, samples(seed=seed), target, dimensions={"batch": 1})
    assert len(list(tmp_path.glob("q.onnx.*.data"))) == 1
    assert read_model(target).quantized
    quantize(given, samples(), target, dimensions={"batch": 1}, external_data=False)
    assert not list(tmp_path.glob("q.onnx.*.data"))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4, 1, 1), (1,)])
@pytest.mark.parametrize("activations", [8, 16])
def test_a_bias_added_after_a_transposed_convolution_becomes_its_own(
    htp: Backend, tmp_path: Path, capfd: pytest.CaptureFixture[str], shape: tuple[int, ...], activations: int
) -> None:
    """HTP rounds it to whole numbers otherwise (tests/known_backend_issues)."""
    bias = np.resize(np.array([0.6, -0.2, 3, 1.4], np.float32), shape)
    up = helper.make_node("ConvTranspose", ["x", "w"], ["u"], name="up", strides=[2, 2])
    add = helper.make_node("Add", ["u", "b"], ["y"], name="bias")
    source = small_models.save(
        tmp_path / "up.onnx",
        [up, add],
        {"x": [1, 4, 6, 6]},
        {"y": [1, 4, 12, 12]},
        {"w": floats(4, 4, 2, 2), "b": bias},
    )
    data = [{"x": floats(1, 4, 6, 6, seed=seed)} for seed in range(8)]
    report = quantize(source, data, tmp_path / "up.qdq.onnx", activations=activations)
    assert capfd.readouterr().err == ""
    assert any("up" in note and "HTP would round them" in note for note in report.notes)
    assert "Add" not in {node.op_type for node in onnx.load(tmp_path / "up.qdq.onnx").graph.node}
    session = htp.load(tmp_path / "up.qdq.onnx", float_model=source)
    verdict = judge_run(session.run(data))
    assert verdict.ok
    assert verdict.outputs[0].figures["sqnr_db"] > 35


@pytest.mark.parametrize("flaw", ["read twice", "along rows"])
def test_what_is_no_bias_stays(tmp_path: Path, flaw: str) -> None:
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w"], ["u"], name="up", strides=[2, 2]),
        helper.make_node("Add", ["u", "b"], ["a"], name="bias"),
        helper.make_node("Mul", ["a", "u" if flaw == "read twice" else "a"], ["y"], name="mul"),
    ]
    shape = (1, 1, 12, 1) if flaw == "along rows" else (1, 4, 1, 1)
    constants = {"w": floats(4, 4, 2, 2), "b": floats(*shape)}
    source = small_models.save(tmp_path / "up.onnx", nodes, {"x": [1, 4, 6, 6]}, {"y": [1, 4, 12, 12]}, constants)
    quantize(source, [{"x": floats(1, 4, 6, 6)}], tmp_path / "up.qdq.onnx")
    assert "Add" in {node.op_type for node in onnx.load(tmp_path / "up.qdq.onnx").graph.node}


@pytest.mark.parametrize(("per_channel", "kept"), [(False, []), (True, ["Add"])])
def test_a_bias_that_onnxruntime_could_not_quantise_stays_apart(
    tmp_path: Path, per_channel: bool, kept: list[str]
) -> None:
    up = helper.make_node("ConvTranspose", ["x", "w"], ["u"], name="up", strides=[2, 2], group=2)
    nodes = [up, helper.make_node("Add", ["u", "b"], ["y"], name="bias")]
    constants = {"w": floats(4, 2, 2, 2), "b": floats(1, 4, 1, 1)}
    source = small_models.save(tmp_path / "up.onnx", nodes, {"x": [1, 4, 6, 6]}, {"y": [1, 4, 12, 12]}, constants)
    quantize(source, [{"x": floats(1, 4, 6, 6)}], tmp_path / "up.qdq.onnx", per_channel=per_channel)
    assert [n.op_type for n in onnx.load(tmp_path / "up.qdq.onnx").graph.node if n.op_type == "Add"] == kept
