"""What is known of HTP's arithmetic: from the graph alone, and against what the simulator does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from pytest_qnn.backend import Backend
from pytest_qnn.devices.soc import find_soc
from pytest_qnn.layers.arithmetic import UNKNOWN_PRODUCT, Exactness, exactness_of, is_coarse
from pytest_qnn.layers.cut import can_end, find_layers
from pytest_qnn.layers.judge import judge_layers
from pytest_qnn.markers import BackendRequest
from tests.qdq_graph import QdqGraph

RNG = np.random.default_rng(5)


def known(file: Path, coarse: bool = False) -> dict[str, Exactness]:
    """By the layer's name."""
    proto = onnx.load(str(file))
    layers = find_layers(proto, file.parent, can_end)
    found = exactness_of(proto, file.parent, layers, coarse)
    return {layer.name: found[layer.tensor] for layer in layers}


def conv(folder: Path, dtype: type = np.uint16, zero: int = 128, far: bool = False, group: int = 1) -> Path:
    g = QdqGraph()
    stored = RNG.integers(zero - 60, zero + 60, (8, 8 // group, 1, 1)).astype(np.uint8)
    if far:
        stored[2, 0] = 255
    w = g.node("DequantizeLinear", [g.constant(stored), g.constant(np.float32(0.01)), g.constant(np.uint8(zero))])
    x = g.quantize("x", -4, 4, dtype)
    y = g.quantize(g.node("Conv", [x, w], name="conv", group=group), -8, 8, dtype)
    return g.save(folder / "conv.onnx", {"x": [1, 8, 12, 12]}, y, [1, 8, 12, 12])


def attention(folder: Path) -> Path:
    g = QdqGraph()
    a, b = (g.quantize(name, -4, 4, np.uint16) for name in ("a", "b"))
    turned = g.node("Transpose", [b], perm=[0, 1, 3, 2])
    s = g.quantize(g.node("MatMul", [a, turned], name="scores"), -60, 60, np.uint16)
    shape = [1, 2, 24, 32]
    return g.save(folder / "attention.onnx", {"a": shape, "b": shape}, s, [1, 2, 24, 24])


def test_what_an_accumulator_loses_follows_from_the_three_scales(tmp_path: Path) -> None:
    units = (8 / 65535) * 0.01 / (16 / 65535)
    assert known(conv(tmp_path))["conv"].amplitude == pytest.approx(2 + 1024 * units)
    assert known(conv(tmp_path, group=8))["conv"].amplitude == pytest.approx(2 + 2048 * units)
    assert known(conv(tmp_path), coarse=True)["conv"].amplitude == pytest.approx(34 + 1024 * units)
    assert known(conv(tmp_path))["conv"].offset == pytest.approx(-0.4 * (2 + 1024 * units))
    eight = known(conv(tmp_path, np.uint8))["conv"]
    assert (eight.amplitude, eight.offset, eight.per_input) == (0.5, 0.0, None)


def test_channels_that_are_rounded_again_are_told_from_others(tmp_path: Path) -> None:
    found = known(conv(tmp_path, zero=100, far=True))["conv"]
    assert found.per_input is not None
    assert np.flatnonzero(found.per_input).tolist() == [2]
    expected = 155 / 127 / np.sqrt(12) * np.sqrt(8) * 0.01 / (16 / 65535)
    assert found.per_input[2] == pytest.approx(expected)
    assert found.axis == 1


def test_the_second_factor_of_two_activations_is_rounded_to_eight_bits(tmp_path: Path) -> None:
    found = known(attention(tmp_path))["scores"]
    assert found.per_input is not None
    assert found.per_input[0] == pytest.approx(np.sqrt(32) * 256 / np.sqrt(12) * (8 / 65535) / (120 / 65535))
    assert found.operand.startswith("dequantizelinear")


def test_of_what_nothing_is_known_much_is_granted(tmp_path: Path) -> None:
    g = QdqGraph()
    w = g.weight(RNG.normal(size=(4, 4, 2, 2)))
    x = g.quantize("x", -4, 4, np.uint16)
    y = g.quantize(g.node("ConvTranspose", [x, w], name="up", strides=[2, 2]), -8, 8, np.uint16)
    file = g.save(tmp_path / "up.onnx", {"x": [1, 4, 4, 4]}, y, [1, 4, 8, 8])
    assert known(file)["up"].amplitude == UNKNOWN_PRODUCT


@pytest.mark.parametrize("soc", ["SM8350", "SM8650", "SM8850"])
def test_the_simulator_errs_by_as_much_as_is_said(htp: Backend, tmp_path: Path, soc: str) -> None:
    """Neither more, which would be a fault, nor so much less that the limits say nothing."""
    backend = htp.bench.backend(BackendRequest("htp", soc=soc))
    files = {
        "conv": (conv(tmp_path, group=8), {"x": [1, 8, 12, 12]}),
        "scores": (attention(tmp_path), {"a": [1, 2, 24, 32], "b": [1, 2, 24, 32]}),
    }
    for name, (file, inputs) in files.items():
        sample = {n: RNG.normal(size=shape).clip(-4, 4).astype(np.float32) for n, shape in inputs.items()}
        verdict = judge_layers(backend.load(file).layered, [sample])
        assert verdict.ok, verdict.failed
        (layer,) = (found for found in verdict.layers if found.name == name)
        said = known(file, is_coarse(find_soc(soc)))[name]
        predicted = 0.0 if said.per_input is None else float(said.per_input[0]) * np.sqrt(np.square(sample["a"]).mean())
        if predicted:
            assert layer.rms_steps == pytest.approx(predicted, rel=0.1)
        else:
            assert 0 < layer.rms_steps < said.amplitude


def ratio(folder: Path, moved: bool = False) -> Path:
    g = QdqGraph()
    a, b = g.quantize("a", -4, 4), g.quantize("b", 0, 4)
    y = g.node("Div", [a, b], name="ratio")
    y = g.quantize(g.node("Transpose", [y], perm=[0, 2, 1]) if moved else y, -8, 8)
    return g.save(folder / "ratio.onnx", {"a": [1, 4, 16], "b": [1, 4, 1]}, y, [1, 16, 4] if moved else [1, 4, 16])


def test_quotients_that_are_moved_are_all_judged(tmp_path: Path) -> None:
    assert known(ratio(tmp_path))["ratio"].divisor
    assert not known(ratio(tmp_path, moved=True))["ratio"].divisor


def test_what_is_divided_by_zero_is_not_the_backends_fault(htp: Backend, tmp_path: Path) -> None:
    sample = {
        "a": np.linspace(-4, 4, 64, dtype=np.float32).reshape(1, 4, 16)
        * np.array([1, 1, 0, 1], np.float32).reshape(1, 4, 1),
        "b": np.array([1, 2, 0, 3], np.float32).reshape(1, 4, 1),
    }
    session = htp.load(ratio(tmp_path))
    assert judge_layers(session.layered, [sample]).ok
    (run,) = session.layered.run([sample])
    layer = session.layered.layers[-1].tensor
    assert (run.q[layer] != run.y[layer])[0, 2].any(), "where the divisor is 0 they may differ"
