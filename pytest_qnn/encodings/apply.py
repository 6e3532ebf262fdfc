"""A float model and encodings, made into a QDQ model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn.encodings.checks import require_sound
from pytest_qnn.encodings.encoding_set import EncodingSet, Precision
from pytest_qnn.encodings.files import read_encodings
from pytest_qnn.encodings.grids import from_range
from pytest_qnn.encodings.qdq import AFTER, BEFORE, QUANTIZED, RESTORED
from pytest_qnn.errors import EncodingError, ModelError, OptionError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.graph_encodings import MOVES_ONLY, constants_of
from pytest_qnn.model.graph_tensors import GraphTensors, graph_tensors, subgraphs
from pytest_qnn.model.onnx_file import load_proto
from pytest_qnn.model.saved_model import LIMIT, save_model

# Operators whose results are elements of their first input: the encoding of one is right for the other.
_KEEPS_VALUES = MOVES_ONLY | {
    "DepthToSpace", "Dropout", "Expand", "Gather", "GatherElements", "GatherND", "MaxPool", "ReduceMax", "ReduceMin", "Slice",
    "SpaceToDepth", "Split", "Tile",
}  # fmt: skip
_HAS_BIAS = {"Conv", "ConvTranspose", "Gemm"}
_FUSES_RELU = {"Conv", "ConvTranspose"}  # QNN's execution provider makes one operation of these and a Relu
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Min", "Max", "PRelu"}


@dataclass(frozen=True)
class AppliedEncodings:
    """What :func:`apply_encodings` did.

    Attributes:
        output: the QDQ model.
        given: tensors quantised by an encoding of the set.
        derived: tensors that the set doesn't have and that are quantised all the same: name -> where the encoding comes from.
        unquantized: float tensors that stay so, in the graph's order: nodes that touch them compute in float.
    """

    output: Path
    given: tuple[str, ...]
    derived: Mapping[str, str]
    unquantized: tuple[str, ...]


def apply_encodings(
    float_model: str | os.PathLike[str],
    encodings: EncodingSet | str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> AppliedEncodings:
    """Write the QDQ model of a float model with given encodings.

    Weights and biases are stored as integers with a DequantizeLinear, activations get a pair of QuantizeLinear and DequantizeLinear;
    graph inputs and outputs keep their names. What such sets leave out is derived: int32 biases at scale ``s_input * s_weight``, results of
    operators that only move elements, what goes into a Relu alone (but for a convolution, which QNN fuses with it), constants of elementwise operators by their own range.

    16-bit and 4-bit types, which ONNX has from opset 21 on, are written with onnxruntime's operators of the same name (domain
    com.microsoft) in models of a lower opset, so that no operator of the model has to change; so are per-channel encodings below opset
    13. Only blocks, which those don't have, raise the opset to 21.

    Args:
        float_model: an ONNX file; it is not changed.
        encodings: a set, or a file of one.
        output: the file to write. If the model is near 2 GiB or has external data, so has the output.

    Raises:
        EncodingError: the set is broken or doesn't fit the model: every problem, by tensor and field.
        ModelError: the model can't be read, or is quantised already.
        OptionError: the output can't be written.
    """
    path, target = Path(float_model).expanduser().absolute(), Path(output).expanduser().absolute()
    proto = load_proto(path)
    tensors = graph_tensors(proto, path)
    given = encodings if isinstance(encodings, EncodingSet) else read_encodings(encodings)
    given = given.bound_to(tensors)
    require_sound(given, tensors)
    values = _values(given)
    _check_output(target, path)
    external = any(t.data_location == TensorProto.EXTERNAL for t in proto.graph.initializer)
    try:
        onnx.load_external_data_for_model(proto, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{path}: its external data can't be read: {error}") from None
    if any(e.block_size is not None for e in values.values()) and opset_of(proto) < 21:
        proto = _upgraded(proto, path)
    kept = {t.name for t in given.tensors if isinstance(t.value, Precision)}
    derived = _derive(proto.graph, tensors, values, kept)
    _Rewriter(proto, values).rewrite()
    size = sum(len(t.raw_data) for t in proto.graph.initializer)
    save_model(proto, target, external or size > LIMIT)
    makers = {o: node.op_type for node in proto.graph.node for o in node.output}
    floats = [
        name
        for node in proto.graph.node
        for name in node.input
        if tensors.types.get(name) == "float32"
        and name in tensors.names
        and name not in values
        and not (node.op_type == "Relu" and makers.get(name) in _FUSES_RELU)
    ]
    return AppliedEncodings(target, tuple(n for n in values if n not in derived), derived, tuple(dict.fromkeys(floats)))


def _values(encodings: EncodingSet) -> dict[str, Encoding]:
    for tensor in encodings.tensors:
        if isinstance(tensor.value, Precision) and tensor.value.number == "int":
            raise EncodingError(
                f"{encodings.source}: {tensor.kind} {tensor.name!r}: {tensor.value} without a scale: only a calibration can find one. "
                "Quantise with data, or give its scale"
            )
    return {t.name: t.encoding for t in encodings.tensors if t.encoding is not None}


def opset_of(proto: Any) -> int:
    """The model's opset of ONNX's own operators."""
    return max((int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=1)


def _upgraded(proto: Any, path: Path) -> Any:
    """The model at opset 21, the first that has quantisers with blocks; onnxruntime's own have none."""
    try:
        return onnx.version_converter.convert_version(proto, 21)
    except Exception as error:  # of many types, from the converter's C++
        raise ModelError(
            f"{path}: block_size needs opset 21, and the model, of opset {opset_of(proto)}, can't be converted: "
            f"{str(error).splitlines()[0]}. Export it at opset 21"
        ) from None


def _check_output(target: Path, source: Path) -> None:
    if target.is_dir() or not target.parent.is_dir():
        what = "is a folder: name a file in it" if target.is_dir() else f"its folder {target.parent} doesn't exist"
        raise OptionError(f"output {target}: {what}")
    if target.exists() and target.samefile(source):
        raise OptionError(f"output {target}: is the float model itself. Name another file")


# --- encodings that a set leaves out ------------------------------------------------------------------------------------


def _derive(graph: Any, tensors: GraphTensors, values: dict[str, Encoding], kept: set[str]) -> dict[str, str]:
    """Add to ``values`` what follows from it; returns what was added and why."""
    consumers: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            consumers[name] = consumers.get(name, 0) + 1
        for name in _outer_names(node):
            consumers[name] = consumers.get(name, 0) + 2  # a subgraph takes it: never the only one
    outputs = {v.name for v in graph.output}
    makers = {o: node.op_type for node in graph.node for o in node.output}
    derived: dict[str, str] = {}

    def add(name: str, encoding: Encoding, why: str) -> None:
        free = name not in values and name not in kept and tensors.types.get(name, "float32") == "float32"
        if name and free and name in tensors.activations and encoding.axis is None:
            values[name] = encoding
            derived[name] = why

    for node in graph.node:
        if node.op_type in _KEEPS_VALUES and node.input and node.input[0] in values:
            for result in node.output if node.op_type == "Split" else node.output[:1]:
                add(result, values[node.input[0]], f"{node.op_type} of {node.input[0]!r}")
    for node in reversed(graph.node):
        if not node.input or not node.output or node.output[0] not in values:
            continue
        source = node.input[0]
        if (
            consumers.get(source) == 1
            and source not in outputs
            and (node.op_type in MOVES_ONLY or _only_clips(node, values[node.output[0]], graph))
            and not (
                node.op_type == "Relu" and makers.get(source) in _FUSES_RELU
            )  # no quantiser between: one operation
        ):
            add(source, values[node.output[0]], f"goes into {node.op_type} {node.output[0]!r} alone")
    for node in graph.node:
        _derive_bias(node, tensors, values, kept, derived, consumers)
    return derived | _derive_constants(graph, tensors, values, kept)


def _only_clips(node: Any, encoding: Encoding, graph: Any) -> bool:
    """Whether to quantise a node's input by its output's encoding changes nothing: clipping and rounding may change places."""
    if node.op_type == "Relu":
        return True
    if (
        node.op_type != "Clip"
        or len(node.input) != 3
        or any(n and n not in constants_of(graph) for n in node.input[1:])
    ):
        return False
    constants = constants_of(graph)
    low, high = (float(numpy_helper.to_array(constants[n])) if n else None for n in node.input[1:])
    half = encoding.step / 2
    return (low is None or encoding.range[0] >= low - half) and (high is None or encoding.range[1] <= high + half)


def _derive_bias(
    node: Any,
    tensors: GraphTensors,
    values: dict[str, Encoding],
    kept: set[str],
    derived: dict[str, str],
    consumers: Mapping[str, int],
) -> None:
    """int32 at ``s_input * s_weight``, the scale of what a convolution accumulates."""
    if node.op_type not in _HAS_BIAS or len(node.input) < 3:
        return
    x, w, bias = node.input[:3]
    shape = tensors.constants.get(bias)
    if bias in values or bias in kept or shape is None or x not in values or w not in values or consumers[bias] != 1:
        return
    weight = values[w]
    if weight.block_size is not None or (weight.axis is not None and shape[-1:] != (len(weight.scale),)):
        return
    scale = np.float32(values[x].scale[0]) * np.asarray(weight.scale, np.float32)
    axis = None if len(scale) == 1 else len(shape) - 1
    values[bias] = Encoding(tuple(float(s) for s in scale), (0,) * len(scale), "int32", axis)
    derived[bias] = f"bias: scale of {x!r} times scale of {w!r}"


def _derive_constants(graph: Any, tensors: GraphTensors, values: dict[str, Encoding], kept: set[str]) -> dict[str, str]:
    """Constants of elementwise operators whose other tensors are quantised: their own range, in the activations' type."""
    constants = constants_of(graph)
    derived = {}
    for node in graph.node:
        if node.op_type not in _ELEMENTWISE or node.output[0] not in values:
            continue
        activations = [n for n in node.input if n in tensors.activations]
        if len(activations) != 1 or activations[0] not in values:
            continue
        for name in node.input:
            if name in values or name in kept or name not in constants or tensors.types[name] != "float32":
                continue
            array = numpy_helper.to_array(constants[name])
            like = values[activations[0]]
            low, high = min(0.0, float(array.min(initial=0))), max(0.0, float(array.max(initial=0)))
            if not np.isfinite(array).all():
                continue
            scale, offset = from_range(low, high if low or high else 1.0, like.bits, None)
            values[name] = Encoding((scale,), (-offset,), f"uint{like.bits}")
            derived[name] = f"its own range {low:g} .. {high:g}"
    return derived


# --- the graph ----------------------------------------------------------------------------------------------------------


class _Rewriter:
    """Puts quantisers into a graph."""

    def __init__(self, proto: Any, values: Mapping[str, Encoding]) -> None:
        self.proto, self.graph, self.values = proto, proto.graph, values
        self.names = {
            n for node in self.graph.node for n in (*node.input, *node.output, *_outer_names(node), node.name)
        }
        self.names |= {i.name for i in self.graph.initializer} | {v.name for v in self.graph.input}
        self.domain = self._domain()

    def rewrite(self) -> None:
        constants = constants_of(self.graph)
        quantized = [name for name in constants if name in self.values]
        nodes: list[Any] = []
        for name in quantized:
            nodes += self._constant(name, constants[name])
        renamed = {}
        for value in self.graph.input:
            if value.name in self.values and value.name not in constants:
                renamed[value.name] = self._fresh(f"{value.name}{RESTORED}")
                nodes += self._pair(value.name, value.name, renamed[value.name])
        gone = set(quantized)
        for node in self.graph.node:
            if node.op_type == "Constant" and node.output[0] in gone:
                continue
            _rename(node, renamed)
            nodes.append(node)
            for index, name in enumerate(node.output):
                if name in self.values:
                    node.output[index] = self._fresh(f"{name}{BEFORE}")
                    nodes += self._pair(name, node.output[index], name)
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        for field in (self.graph.initializer, self.graph.input):
            for index in reversed(range(len(field))):
                if field[index].name in gone:
                    del field[index]
        types = {e.dtype for e in self.values.values()}
        if self.domain and not any(o.domain == self.domain for o in self.proto.opset_import):
            self.proto.opset_import.append(helper.make_opsetid(self.domain, 1))
        if types & {"int4", "uint4"}:  # types of IR version 10
            self.proto.ir_version = max(self.proto.ir_version, 10)

    def _domain(self) -> str:
        """ONNX's own quantisers if the model's opset has them for these encodings, else onnxruntime's."""
        needed = 10
        for encoding in self.values.values():
            if encoding.axis is not None:
                needed = max(needed, 13)
            if encoding.bits in (4, 16) or encoding.block_size is not None:
                needed = 21
        return "" if opset_of(self.proto) >= needed else "com.microsoft"

    def _constant(self, name: str, tensor: Any) -> list[Any]:
        encoding = self.values[name]
        integers = encoding.quantize(numpy_helper.to_array(tensor))
        stored = self._store(self._fresh(f"{name}{QUANTIZED}"), integers, encoding.dtype)
        return [self._node("DequantizeLinear", name, stored, name)]

    def _pair(self, name: str, source: str, restored: str) -> list[Any]:
        middle = self._fresh(f"{name}{AFTER}")
        quantize = self._node("QuantizeLinear", name, source, middle)
        return [quantize, self._node("DequantizeLinear", name, middle, restored, list(quantize.input[1:]))]

    def _node(self, operator: str, name: str, source: str, result: str, parameters: list[str] | None = None) -> Any:
        encoding = self.values[name]
        attributes: dict[str, Any] = {}
        if encoding.axis is not None:
            attributes["axis"] = encoding.axis
        if encoding.block_size is not None:
            attributes["block_size"] = encoding.block_size
        parameters = parameters or self._parameters(name, encoding)
        node_name = self._fresh(f"{name}_{operator}")
        return helper.make_node(
            operator, [source, *parameters], [result], name=node_name, domain=self.domain or None, **attributes
        )

    def _parameters(self, name: str, encoding: Encoding) -> list[str]:
        shape = encoding.scale_shape or (() if encoding.axis is None else (len(encoding.scale),))
        scale = self._fresh(f"{name}_scale")
        self.graph.initializer.append(
            numpy_helper.from_array(np.asarray(encoding.scale, np.float32).reshape(shape), scale)
        )
        zero = np.asarray(encoding.zero_point, np.int64).reshape(shape)
        return [scale, self._store(self._fresh(f"{name}_zero_point"), zero, encoding.dtype)]

    def _store(self, name: str, integers: Any, dtype: str) -> str:
        """Add integers as an initializer; 4-bit ones two to a byte, the first in the low half, as ONNX lays them out."""
        tensor = TensorProto(name=name, dims=integers.shape, data_type=TensorProto.DataType.Value(dtype.upper()))
        flat = integers.reshape(-1)
        if dtype.endswith("int4"):
            nibbles = np.append(flat, [0] * (flat.size % 2)).astype(np.int64).astype(np.uint8) & 15
            tensor.raw_data = (nibbles[::2] | nibbles[1::2] << 4).tobytes()
        else:
            tensor.raw_data = flat.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
        self.graph.initializer.append(tensor)
        return name

    def _fresh(self, name: str) -> str:
        free, number = name, 0
        while free in self.names:
            number += 1
            free = f"{name}_{number}"
        self.names.add(free)
        return free


def _rename(node: Any, renamed: Mapping[str, str]) -> None:
    """Let a node and its subgraphs take other tensors."""
    for index, name in enumerate(node.input):
        if name in renamed:
            node.input[index] = renamed[name]
    for sub in subgraphs(node):
        for value in sub.output:
            value.name = renamed.get(value.name, value.name)
        for inner in sub.node:
            _rename(inner, renamed)


def _outer_names(node: Any) -> Iterable[str]:
    """Every name that a node's subgraphs take."""
    for sub in subgraphs(node):
        yield from (v.name for v in sub.output)
        for inner in sub.node:
            yield from inner.input
            yield from _outer_names(inner)
