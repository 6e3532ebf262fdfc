"""Every kind of quantised model runs on the simulated HTP, wholly and as well as its quantisation allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from pytest_qnn import Backend, assert_fully_offloaded, assert_matches_reference
from pytest_qnn.model.onnx_file import read_model
from tests.quantizing.conftest import net, samples

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
