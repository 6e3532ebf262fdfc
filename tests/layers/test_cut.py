"""Cutting a model at its quantised activations: on the CPU, every piece gives what the whole gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from pytest_qnn.errors import ModelError
from pytest_qnn.layers.cut import can_end, cut, find_layers, load_whole, tapped
from tests.qdq_graph import QdqGraph

X = np.random.default_rng(3).normal(size=(1, 4, 8, 8)).astype(np.float32)


def branching(folder: Path, dtype: type = np.uint8) -> Path:
    """Conv, then its HardSigmoid times itself, then an addition of the input: two branches, one tensor read twice."""
    g = QdqGraph()
    x = g.quantize("x", -4, 4, dtype)
    w = g.weight(np.random.default_rng(0).normal(size=(4, 4, 3, 3)))
    c = g.quantize(g.node("Conv", [x, w], name="conv", pads=[1] * 4), -20, 20, dtype)
    h = g.quantize(g.node("HardSigmoid", [c], name="gate"), 0, 0.8, dtype)
    m = g.quantize(g.node("Mul", [c, h], name="mul"), -5, 20, dtype)
    s = g.quantize(g.node("Relu", [g.node("Add", [m, x], name="add")], name="relu"), 0, 20, dtype)
    return g.save(folder / "branching.onnx", {"x": [1, 4, 8, 8]}, s, [1, 4, 8, 8])


def run(proto: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))


def test_layers_are_named_after_what_they_compute_and_know_what_they_read(tmp_path: Path) -> None:
    layers = find_layers(load_whole(branching(tmp_path)), tmp_path)
    assert [(layer.kind, layer.name) for layer in layers] == [
        ("input", "x"),
        ("Conv", "conv"),
        ("HardSigmoid", "gate"),
        ("Mul", "mul"),
        ("Add+Relu", "relu"),
    ]
    tensors = [layer.tensor for layer in layers]
    assert layers[0].sources == ("x",)
    assert set(layers[3].sources) == {tensors[1], tensors[2]}
    assert set(layers[4].sources) == {tensors[3], tensors[0]}


def test_every_piece_gives_what_the_whole_model_gives(tmp_path: Path) -> None:
    proto = load_whole(branching(tmp_path))
    layers = find_layers(proto, tmp_path)
    whole = run(tapped(proto, layers), {"x": X})
    pieces = cut(proto, layers, {layer.tensor: whole[layer.tensor].shape for layer in layers})
    onnx.checker.check_model(pieces.proto)
    fed = {"x": X} | {name: whole[tensor] for tensor, name in pieces.fed.items()}
    got = run(pieces.proto, fed)
    assert set(got) == {layer.tensor for layer in layers}
    for tensor, array in got.items():
        np.testing.assert_array_equal(array, whole[tensor])


def test_a_layer_inherits_nothing_from_those_before_it(tmp_path: Path) -> None:
    proto = load_whole(branching(tmp_path))
    layers = find_layers(proto, tmp_path)
    whole = run(tapped(proto, layers), {"x": X})
    pieces = cut(proto, layers, {layer.tensor: whole[layer.tensor].shape for layer in layers})
    fed = {"x": 0 * X} | {name: whole[tensor] for tensor, name in pieces.fed.items()}
    got = run(pieces.proto, fed)
    assert (got[layers[0].tensor] != whole[layers[0].tensor]).any()
    for layer in layers[1:]:
        np.testing.assert_array_equal(got[layer.tensor], whole[layer.tensor])


def test_a_layer_that_can_not_end_there_is_judged_with_the_next(tmp_path: Path) -> None:
    eight = find_layers(load_whole(branching(tmp_path)), tmp_path, can_end)
    assert "HardSigmoid" in [layer.kind for layer in eight]
    sixteen = find_layers(load_whole(branching(tmp_path, np.uint16)), tmp_path, can_end)
    assert [layer.kind for layer in sixteen] == ["input", "Conv", "HardSigmoid+Mul", "Add+Relu"]


def test_names_that_are_taken_stay_their_owners(tmp_path: Path) -> None:
    g = QdqGraph()
    first = g.quantize("x", -4, 4)
    taken = g.node("Relu", [first], name="relu")
    second = g.quantize(taken, 0, 4)
    file = g.save(tmp_path / "taken.onnx", {"x": [1, 4]}, second, [1, 4])
    proto = load_whole(file)
    layers = find_layers(proto, tmp_path)
    for node in proto.graph.node:  # a tensor that has the name which the cut would give
        node.input[:] = [f"{layers[0].tensor}__cut" if name == taken else name for name in node.input]
        node.output[:] = [f"{layers[0].tensor}__cut" if name == taken else name for name in node.output]
    pieces = cut(proto, layers, {layer.tensor: (1, 4) for layer in layers})
    onnx.checker.check_model(pieces.proto)
    assert len({v.name for v in pieces.proto.graph.input}) == 2


def test_a_model_without_quantised_activations_has_no_layers(tmp_path: Path) -> None:
    g = QdqGraph()
    file = g.save(tmp_path / "float.onnx", {"x": [1, 4]}, g.node("Relu", ["x"]), [1, 4])
    proto = load_whole(file)
    assert find_layers(proto, tmp_path) == ()
    with pytest.raises(ModelError, match="no quantised activation"):
        cut(proto, (), {})
