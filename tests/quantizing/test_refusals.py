"""What can't be quantised is refused with its reason, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn.errors import InputError, ModelError, OptionError
from pytest_qnn.model import quantize
from tests import small_models
from tests.quantizing.conftest import floats, samples


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int16"}, "signed 16-bit activations don't compile on QNN's HTP backend: use 16"),
        ({"activations": 4}, "activations: must be 8, 16, uint8, uint16 or int8, got 4"),
        ({"weights": 2}, "weights: must be 4, 8 or 16 bits, got 2"),
        ({"method": "entrpy"}, "unknown method 'entrpy'. Did you mean 'entropy'"),
        ({"percentile": 0.999}, "percentile: must be over 50"),
        ({"method": "entropy", "bins": 100}, "bins: must be"),
        ({"bins": 512}, "bins: has no meaning for the method 'minmax'"),
        ({"method": "entropy", "percentile": 99}, "percentile: has no meaning for the method 'entropy'"),
        ({"overrides": {"nosuch": 16}}, "overrides: unknown tensor 'nosuch'"),
        ({"overrides": {"r": 4}}, "overrides: 'r' is an activation: 8 or 16 bits, got 4"),
        ({"overrides": {"r": 3}}, "overrides: 'r': must be 4, 8 or 16 bits"),
        ({"overrides": ["r"]}, "overrides: must be a dict by name"),
        ({"ranges": {"r": (1, 2)}}, "must be finite and contain zero"),
        ({"ranges": {"r": 3}}, r"ranges: 'r': must be a pair \(low, high\)"),
        ({"ranges": {"fw": (-1, 1)}}, "ranges: unknown tensor 'fw'"),
        ({"wieghts": 8}, "unknown option 'wieghts'. Did you mean 'weights'"),
    ],
)
def test_bad_options(quantize_net: Callable[..., Any], tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        quantize_net(**options)
    assert list(tmp_path.iterdir()) == []


def test_dynamic_dimensions_that_nobody_fixed(quantize_net: Callable[..., Any]) -> None:
    with pytest.raises(
        ModelError, match=r"has dynamic dimensions, .*: pass dimensions=\{'batch': 1\} \(--dimensions batch=1\)"
    ):
        quantize_net(dimensions={})
    with pytest.raises(ModelError, match="no dynamic dimension 'bach'"):
        quantize_net(dimensions={"bach": 1})


def test_a_model_that_is_quantised_already(quantize_net: Callable[..., Any], tmp_path: Path) -> None:
    result = quantize_net()
    with pytest.raises(ModelError, match=r"already quantised \(A8W8\): pass the float model"):
        quantize(result.path, samples(), tmp_path / "again.onnx")


def test_the_float_model_is_not_overwritten(float_net: Path) -> None:
    with pytest.raises(OptionError, match="this is the float model"):
        quantize(float_net, samples(), float_net, dimensions={"batch": 1})


def test_a_custom_domain(tmp_path: Path) -> None:
    node = helper.make_node("Magic", ["x"], ["y"], name="magic", domain="my.ops")
    graph = helper.make_graph(
        [node], "g", *[[helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4])] for n in ("x", "y")]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.ops", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match="node 'magic' is my.ops::Magic, of a custom domain"):
        quantize(tmp_path / "m.onnx", [floats(1, 4)], tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def with_if(path: Path, constant: bool) -> Path:
    """Relu, then an If that reads its output."""
    info = helper.make_tensor_value_info

    def branch(name: str, operator: str) -> Any:
        node = helper.make_node(operator, ["r"], [name])
        return helper.make_graph([node], name, [], [info(name, TensorProto.FLOAT, [1, 4])])

    condition = helper.make_node("Greater", ["zero" if constant else "m", "one"], ["cond"], name="gt")
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("ReduceMean", ["r"], ["m"], name="mean", keepdims=0),
        condition,
        helper.make_node(
            "If", ["cond"], ["y"], name="if", then_branch=branch("a", "Neg"), else_branch=branch("b", "Sigmoid")
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", TensorProto.FLOAT, [1, 4])],
        [info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.float32(v), n) for n, v in (("zero", 0), ("one", 1))],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_control_flow(tmp_path: Path) -> None:
    data = [floats(1, 4, seed=i) for i in range(9)]
    with pytest.raises(ModelError, match=r"node 'if' \(If\) has a subgraph: QNN runs no control flow"):
        quantize(with_if(tmp_path / "if.onnx", constant=False), data, tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()
    folded = quantize(with_if(tmp_path / "folded.onnx", constant=True), data, tmp_path / "q.onnx")
    assert "If" not in {n.op_type for n in onnx.load(str(folded.path)).graph.node}


def test_more_than_two_gib_of_weights(tmp_path: Path) -> None:
    size = 3 << 30
    with (tmp_path / "big.data").open("wb") as f:
        f.truncate(size)  # a sparse file: no disk and no memory is used
    w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1, size // 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "big.data"), ("offset", "0"), ("length", str(size))):
        w.external_data.add(key=key, value=value)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [info("x", TensorProto.FLOAT, [1, 1])],
        [info("y", TensorProto.FLOAT, [1, size // 4])],
        [w],
    )
    onnx.save(helper.make_model(graph, ir_version=8), str(tmp_path / "big.onnx"))
    with pytest.raises(ModelError, match=r"3\.0 GiB of weights: onnxruntime's quantiser takes models below 2 GiB"):
        quantize(tmp_path / "big.onnx", [floats(1, 1)], tmp_path / "out" / "q.onnx")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_activations_are_infinite(tmp_path: Path) -> None:
    model = small_models.unary(tmp_path / "exp.onnx", "Exp", "Exp", shape=(1, 4))
    with pytest.raises(InputError, match=r"tensor '\w+' has NaN or infinite elements for sample 1"):
        quantize(model, [floats(1, 4), 50 + floats(1, 4)], tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("name", ["truncated.onnx", "missing.onnx"])
def test_a_model_that_cannot_be_read(float_net: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "truncated.onnx").write_bytes(float_net.read_bytes()[:100])
    with pytest.raises(ModelError, match=name):
        quantize(tmp_path / name, samples(), tmp_path / "q.onnx")


def test_an_output_that_cannot_be_written(float_net: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output, message in ((tmp_path / "file" / "q.onnx", "can't be written"), (tmp_path, "this is a folder")):
        with pytest.raises(OptionError, match=message):
            quantize(float_net, samples(), output, dimensions={"batch": 1})
    full = Path("/dev/full")
    if full.exists():
        with pytest.raises(OptionError, match="can't be written"):
            quantize(float_net, samples(), "/proc/q.onnx", dimensions={"batch": 1})
