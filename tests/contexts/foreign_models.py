"""Models whose context binaries look as if the SDK's own tools had made them: integers and channels last at the edge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests import small_models


def with_integer_edges(source: Path, path: Path, names: dict[str, str], channels_last: bool = True) -> Path:
    """The QDQ model ``source`` without its graph-edge quantisers: its inputs and outputs are the integers behind them.

    Args:
        names: name of an input or output -> what it is called here.
        channels_last: whether tensors of rank 4 have their channels last.
    """
    model = onnx.load(str(source))
    graph = model.graph
    for value in graph.input:
        quantize = next(n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == value.name)
        _replace(graph, value, quantize, quantize.output[0], names[value.name], channels_last, True)
    for value in graph.output:
        dequantize = next(n for n in graph.node if value.name in n.output)
        _replace(graph, value, dequantize, dequantize.input[0], names[value.name], channels_last, False)
    onnx.save(model, str(path))
    return path


def _replace(
    graph: onnx.GraphProto,
    value: onnx.ValueInfoProto,
    node: onnx.NodeProto,
    inner: str,
    name: str,
    channels_last: bool,
    entering: bool,
) -> None:
    zero_point = next(i for i in graph.initializer if i.name == node.input[2])
    shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
    graph.node.remove(node)
    move = channels_last and len(shape) == 4
    ends = [name, inner] if entering else [inner, name]
    if move:
        step = helper.make_node("Transpose", ends[:1], ends[1:], perm=[0, 3, 1, 2] if entering else [0, 2, 3, 1])
        shape = [shape[0], *shape[2:], shape[1]]
    else:
        step = helper.make_node("Identity", ends[:1], ends[1:])
    graph.node.insert(0, step) if entering else graph.node.append(step)
    value.CopyFrom(helper.make_tensor_value_info(name, zero_point.data_type, shape))


def two_inputs(path: Path, first: str = "a", second: str = "b", out: str = "y") -> Path:
    """``y = a - b``, all of one shape: exchanged inputs give another result."""
    node = helper.make_node("Sub", [first, second], [out], name="sub")
    return small_models.save(path, [node], {first: [1, 16], second: [1, 16]}, {out: [1, 16]})


def lookup(path: Path) -> Path:
    """A table looked up with 64-bit indices: ids[1, 4] -> y[1, 4, 8]."""
    table = np.arange(80, dtype=np.float32).reshape(10, 8)
    return small_models.save(
        path,
        [helper.make_node("Gather", ["table", "ids"], ["y"], name="gather")],
        {"ids": [1, 4]},
        {"y": [1, 4, 8]},
        {"table": table},
        types={"ids": TensorProto.INT64},
    )


def cube(path: Path, name: str = "x", out: str = "y") -> Path:
    """A depthwise convolution of [1, 8, 8, 8]: the shape doesn't tell the order of its axes."""
    rng = np.random.default_rng(3)
    return small_models.save(
        path,
        [helper.make_node("Conv", [name, "w"], [out], name="conv", pads=[1] * 4)],
        {name: [1, 8, 8, 8]},
        {out: [1, 8, 8, 8]},
        {"w": rng.normal(size=(8, 8, 3, 3)).astype(np.float32)},
    )
