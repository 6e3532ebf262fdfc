"""Encodings as a quantised ONNX graph has them: at its QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import TensorProto, numpy_helper

from pytest_qnn.errors import EncodingError
from pytest_qnn.model.encoding import INTEGER_BITS, Encoding

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
# Operators that move elements about without changing their values: an output's encoding is that of their input.
MOVES_ONLY = {"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose"}


class GraphEncodings:
    """A graph's encodings, read off its QuantizeLinear and DequantizeLinear nodes.

    Attributes:
        constants: name -> TensorProto of the initializers and of the outputs of Constant nodes.
        producer: tensor -> the node that computes it.
    """

    def __init__(self, proto: Any, folder: Path) -> None:
        self.folder = folder
        self.graph = proto.graph
        self.constants = constants_of(proto.graph)
        self.producer = {o: n for n in proto.graph.node for o in n.output if o}

    def of_input(self, name: str) -> Encoding | None:
        """The encoding of a graph input."""
        for node in self.graph.node:
            if name in node.input[:1]:
                if node.op_type in QUANTIZERS:
                    return self.read(node)
                if node.op_type in MOVES_ONLY:
                    return self.of_input(node.output[0])
        return None

    def of_output(self, name: str) -> Encoding | None:
        """The encoding of a graph output."""
        node, moved = self.producer.get(name), False
        while node is not None:
            if node.op_type in QUANTIZERS:
                encoding = self.read(node)
                return None if moved and encoding is not None and encoding.axis is not None else encoding
            if node.op_type not in MOVES_ONLY:
                return None
            node, moved = self.producer.get(node.input[0]), True
        return None

    def is_bounded(self, name: str) -> bool:
        """Whether a tensor is the (quantised) result of a sigmoid, softmax or tanh."""
        node = self.producer.get(name)
        while node is not None and node.op_type in (*MOVES_ONLY, *QUANTIZERS):
            node = self.producer.get(node.input[0])
        return node is not None and node.op_type in ("Sigmoid", "HardSigmoid", "Softmax", "Tanh")

    def activation_bits(self) -> tuple[int, ...]:
        """Bit widths of activations, ascending."""
        return self._bits(weights=False)

    def weight_bits(self) -> tuple[int, ...]:
        """Bit widths of constants, ascending, without the biases' 32."""
        return self._bits(weights=True)

    def _bits(self, weights: bool) -> tuple[int, ...]:
        found = set()
        for node in self.graph.node:
            if node.op_type == "DequantizeLinear" and (node.input[0] in self.constants) == weights:
                encoding = self.read(node)
                if encoding and encoding.dtype != "int32":  # biases are accumulators, not weights
                    found.add(encoding.bits)
        return tuple(sorted(found))

    def read(self, node: Any) -> Encoding | None:
        """The encoding of a QuantizeLinear or DequantizeLinear node; None where its scale is computed or its type has no steps.

        Raises:
            EncodingError: scales and zero points that don't belong together.
        """
        scale_tensor = self.constants.get(node.input[1])
        if scale_tensor is None:
            return None
        scale = numpy_helper.to_array(scale_tensor, str(self.folder))
        attributes = {a.name: a.i for a in node.attribute}
        zero = self.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is not None:
            dtype = integer_name(zero.data_type)
            zero_point = tuple(int(z) for z in numpy_helper.to_array(zero, str(self.folder)).reshape(-1))
        else:
            given = attributes.get("output_dtype") or TensorProto.UINT8
            source = self.constants.get(node.input[0])
            if node.op_type == "DequantizeLinear" and source is not None:
                given = source.data_type
            dtype, zero_point = integer_name(given), (0,) * scale.size
        if dtype not in INTEGER_BITS:
            return None  # float8 and the like: no steps
        scales = tuple(float(s) for s in scale.reshape(-1))
        block_size = attributes.get("block_size") or None
        axis = attributes.get("axis", 1) if scale.size > 1 or block_size else None
        try:
            return Encoding(scales, zero_point, dtype, axis, block_size, scale.shape if block_size else None)
        except EncodingError as error:
            raise EncodingError(f"{node.op_type} {node.name or node.output[0]!r}: {error}") from None


def constants_of(graph: Any) -> dict[str, Any]:
    """Name -> TensorProto of a graph's initializers and of the outputs of its Constant nodes."""
    found = {i.name: i for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def integer_name(elem_type: int) -> str:
    """ONNX's name of an element type in lower case, e.g. 2 -> "uint8"."""
    return str(TensorProto.DataType.Name(elem_type)).lower()


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Shape of a TensorProto."""
    return tuple(int(size) for size in tensor.dims)
