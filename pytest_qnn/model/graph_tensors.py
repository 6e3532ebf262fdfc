"""The tensors of a float graph that encodings may name: which there are, which are constant, along which axis their channels lie."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

from pytest_qnn.errors import ModelError
from pytest_qnn.model.encoding import Encoding, blocks_of
from pytest_qnn.model.graph_encodings import QUANTIZERS, constants_of, shape_of
from pytest_qnn.model.onnx_file import dtype_name, load_proto


@dataclass(frozen=True)
class GraphTensors:
    """What a float model says of its tensors.

    Attributes:
        path: the model.
        constants: shapes of the initializers and Constant nodes, by name.
        activations: graph inputs and results of nodes.
        inner: names that lie inside of subgraphs (If, Loop, Scan).
        types: numpy names of the types that are known.
        channel_axes: constant -> axis of the output channels, where the operator that takes it has one.
    """

    path: Path
    constants: dict[str, tuple[int, ...]]
    activations: frozenset[str]
    inner: frozenset[str]
    types: dict[str, str]
    channel_axes: dict[str, int]

    @cached_property
    def names(self) -> frozenset[str]:
        """Every tensor that an encoding can be applied to."""
        return self.activations | self.constants.keys()

    def channel_axis(self, name: str, channels: int) -> int | None:
        """The axis of a constant's output channels; where its operator has none, the only one of that length."""
        shape = self.constants.get(name, ())
        if name in self.channel_axes:
            axis = self.channel_axes[name]
            return axis if shape[axis] == channels else None
        fitting = [i for i, size in enumerate(shape) if size == channels]
        return fitting[0] if len(fitting) == 1 else None

    def bind(self, name: str, encoding: Encoding) -> Encoding | None:
        """The encoding with the axis that its file left to the model; None where the model can't tell it either.

        AIMET and QNN count channels along the output channels' axis, and blocks along the input channels', in the order
        [output channels, blocks].
        """
        if not encoding.unbound:
            return encoding
        shape = self.constants.get(name)
        if shape is None:
            return None
        if encoding.block_size is None:
            axis = self.channel_axis(name, len(encoding.scale))
            return None if axis is None else replace(encoding, axis=axis)
        channel = self.channel_axes.get(name, 2)
        block = 1 - channel
        if channel > 1 or len(shape) < 2 or any(size != 1 for size in shape[2:]):
            return None  # ONNX has no blocks of more than one axis
        shape_of_scales = blocks_of(shape, block, encoding.block_size)
        if len(encoding.scale) != math.prod(shape_of_scales):
            return None
        return replace(
            encoding,
            scale=_rows_first(encoding.scale, shape_of_scales, channel),
            zero_point=_rows_first(encoding.zero_point, shape_of_scales, channel),
            axis=block,
            scale_shape=shape_of_scales,
        )

    def unbind(self, name: str, encoding: Encoding) -> Encoding | None:
        """The opposite of :meth:`bind`: the encoding without what the model says; None where the model says something else."""
        if encoding.unbound or encoding.axis is None:
            return encoding
        free = replace(encoding, axis=None, scale_shape=None)
        if encoding.block_size is not None and encoding.scale_shape is not None and self.channel_axes.get(name) == 1:
            turned = encoding.scale_shape[1::-1]
            free = replace(
                free, scale=_rows_first(free.scale, turned, 1), zero_point=_rows_first(free.zero_point, turned, 1)
            )
        bound = self.bind(name, free)
        rank = len(self.constants.get(name, ()))
        if bound is None or rank == 0 or replace(encoding, axis=encoding.axis % rank) != bound:
            return None
        return free


def _rows_first(values: tuple[Any, ...], shape: tuple[int, ...], channel: int) -> tuple[Any, ...]:
    """Values in the order [output channels, blocks], put into the order of an array of ``shape``."""
    if channel == 0:
        return values
    rows, columns = shape[:2]
    return tuple(values[column * rows + row] for row in range(rows) for column in range(columns))


def read_graph(model: str | os.PathLike[str]) -> GraphTensors:
    """The tensors of a float model.

    Raises:
        ModelError: the file can't be read, or is quantised already.
    """
    path = Path(model).expanduser().absolute()
    return graph_tensors(load_proto(path), path)


def graph_tensors(proto: Any, path: Path) -> GraphTensors:
    """The tensors of a float model that was loaded from ``path``.

    Raises:
        ModelError: it is quantised already, or a context binary's wrapper.
    """
    graph = proto.graph
    for node in graph.node:
        if node.op_type in QUANTIZERS or node.op_type.startswith("QLinear"):
            raise ModelError(
                f"{path}: already quantised (node {node.name or node.output[0]!r} is a {node.op_type}): name the float model "
                "that it was made from"
            )
        if node.op_type == "EPContext":
            raise ModelError(f"{path}: wraps a compiled context binary: name the float model that it was made from")
    constants = constants_of(graph)
    names = {o for n in graph.node for o in n.output if o} | {v.name for v in graph.input}
    return GraphTensors(
        path=path,
        constants={name: shape_of(tensor) for name, tensor in constants.items()},
        activations=frozenset(names - constants.keys()),
        inner=frozenset(_inner(graph)),
        types={name: dtype_name(t.data_type) for name, t in constants.items()} | _types(proto),
        channel_axes=_channel_axes(graph, constants),
    )


def subgraphs(node: Any) -> list[Any]:
    """Graphs that a node carries as attributes."""
    found = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    return found + [g for a in node.attribute if a.type == AttributeProto.GRAPHS for g in a.graphs]


def _inner(graph: Any) -> set[str]:
    found: set[str] = set()
    for node in graph.node:
        for sub in subgraphs(node):
            found |= {o for n in sub.node for o in n.output if o} | {i.name for i in sub.initializer} | _inner(sub)
    return found


def _types(proto: Any) -> dict[str, str]:
    """Types of activations, as far as the model says them or ONNX's own inference finds them."""
    graph = proto.graph
    # a copy without weights: inference needs none to find types, and protobuf can't serialise more than 2 GiB
    bare = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    bare.graph.CopyFrom(
        onnx.GraphProto(
            name="types",
            node=[n for n in graph.node if n.op_type != "Constant" or _is_small(n)],
            input=[
                *graph.input,
                *(onnx.helper.make_tensor_value_info(i.name, i.data_type, shape_of(i)) for i in graph.initializer),
            ],
            output=graph.output,
            value_info=graph.value_info,
        )
    )
    try:
        inferred = onnx.shape_inference.infer_shapes(bare).graph
    except Exception:  # what inference can't do is no fault of the model: its own value_info is left
        inferred = bare.graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return {
        v.name: dtype_name(v.type.tensor_type.elem_type)
        for v in values
        if v.type.HasField("tensor_type") and v.type.tensor_type.elem_type != TensorProto.UNDEFINED
    }


def _is_small(node: Any) -> bool:
    return bool(node.ByteSize() < 65536)


def _channel_axes(graph: Any, constants: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in graph.node:
        attributes = {a.name: a for a in node.attribute}
        for position, name in enumerate(node.input):
            if name not in constants:
                continue
            rank = len(constants[name].dims)
            axis = None
            if rank == 1 or (node.op_type == "Conv" and position == 1):
                axis = 0
            elif node.op_type == "ConvTranspose" and position == 1:
                axis = 1
            elif node.op_type == "Gemm" and position == 1:
                axis = 0 if "transB" in attributes and attributes["transB"].i else 1
            elif node.op_type == "MatMul" and position == 1:
                axis = rank - 1
            elif node.op_type == "Gather" and position == 0:
                axis = 0
            if axis is not None:
                found.setdefault(name, axis)
    return found


def tensor_shapes(proto: Any) -> dict[str, tuple[int | None, ...]]:
    """Tensor -> shape, where ONNX's shape inference finds it; None for a size that it doesn't."""
    if any(node.op_type in QUANTIZERS and node.domain for node in proto.graph.node):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        for node in copy.graph.node:
            if node.op_type in QUANTIZERS:
                node.domain = ""  # com.microsoft's keep shapes just as well, but inference doesn't know them
        proto = copy
    try:
        inferred = onnx.shape_inference.infer_shapes(proto)
    except Exception:  # an inconsistent graph: onnxruntime names what is wrong with it
        inferred = proto
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    types = {v.name: v.type.tensor_type for v in values if v.type.tensor_type.HasField("shape")}
    return {
        name: tuple(int(d.dim_value) if d.HasField("dim_value") else None for d in t.shape.dim)
        for name, t in types.items()
    }
