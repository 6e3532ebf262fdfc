"""A model's graph as lint looks at it: who makes a tensor, who reads it, and how it is quantised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.graph_encodings import QUANTIZERS, GraphEncodings
from pytest_qnn.model.graph_tensors import subgraphs, tensor_shapes
from pytest_qnn.model.onnx_file import Model, load_proto

# between quantised tensors these stay quantised without quantisers of their own: onnxruntime exchanges their order
TRANSPARENT = ("Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# axis of a weight's output channels
_CHANNEL_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": -1}


class Graph:
    """The main graph of a model; subgraphs are not looked into.

    Attributes:
        model: what the file says of itself.
        nodes: in the order of the file.
        made_by: tensor -> the node that makes it.
        read_by: tensor -> the nodes that read it.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.proto = load_proto(model.path)
        self.nodes = list(self.proto.graph.node)
        self.made_by = {o: n for n in self.nodes for o in n.output if o}
        self.read_by: dict[str, list[Any]] = {}
        for node in self.nodes:
            for tensor in dict.fromkeys(node.input):
                self.read_by.setdefault(tensor, []).append(node)
        self.outputs = {v.name for v in self.proto.graph.output}
        self._encodings = GraphEncodings(self.proto, model.path.parent)

    @property
    def has_subgraphs(self) -> bool:
        """Whether there are nodes with graphs of their own (If, Loop, Scan)."""
        return any(subgraphs(node) for node in self.nodes)

    def computing(self) -> Iterator[Any]:
        """All nodes but quantisers and constants."""
        return (n for n in self.nodes if n.op_type not in (*QUANTIZERS, "Constant"))

    # --- constants ------------------------------------------------------------------------------------------------------

    def is_constant(self, tensor: str) -> bool:
        """Whether a tensor is stored in the file."""
        return tensor in self._encodings.constants

    def value(self, tensor: str) -> npt.NDArray[Any]:
        """A constant's value."""
        return np.asarray(numpy_helper.to_array(self._encodings.constants[tensor], str(self.model.path.parent)))

    def scalar(self, tensor: str) -> float | None:
        """A constant's value as one number; None if it is no constant or has several."""
        if not self.is_constant(tensor):
            return None
        value = self.value(tensor)
        return float(value.reshape(-1)[0]) if value.size == 1 else None

    # --- quantisation ---------------------------------------------------------------------------------------------------

    def encoding(self, quantizer: Any) -> Encoding | None:
        """The encoding of a QuantizeLinear or DequantizeLinear node."""
        return self._encodings.read(quantizer)

    def dequantizer(self, tensor: str) -> Any | None:
        """The DequantizeLinear node that makes a tensor."""
        node = self.made_by.get(tensor)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def is_weight(self, tensor: str) -> bool:
        """Whether a tensor is dequantised from integers that are stored in the file."""
        node = self.dequantizer(tensor)
        return node is not None and self.is_constant(node.input[0])

    def activation(self, tensor: str) -> Encoding | None:
        """The encoding of a dequantised activation; None for anything else."""
        node = self.dequantizer(tensor)
        return None if node is None or self.is_constant(node.input[0]) else self.encoding(node)

    def behind(self, tensor: str) -> str:
        """The tensor on the other side of a Quantize/Dequantize pair; ``tensor`` itself where there is none."""
        node = self.dequantizer(tensor)
        quantizer = self.made_by.get(node.input[0]) if node is not None else None
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            return tensor
        return str(quantizer.input[0])

    def quantizer(self, tensor: str) -> Any | None:
        """The QuantizeLinear node that alone reads a tensor; None if anything else does, or if it is a graph output."""
        readers = self.read_by.get(tensor, [])
        if tensor in self.outputs or not readers or any(n.op_type != "QuantizeLinear" for n in readers):
            return None
        return readers[0]

    def stored_as(self, tensor: str) -> Encoding | None:
        """The encoding that a computed tensor is quantised to; None if something reads it in float."""
        node = self.quantizer(tensor)
        return None if node is None else self.encoding(node)

    def reads_only(self, tensor: str) -> Any | None:
        """The one node that reads a tensor; None if there are several, or if it is a graph output."""
        readers = self.read_by.get(tensor, [])
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None

    # --- shapes ---------------------------------------------------------------------------------------------------------

    def ranks(self) -> dict[str, int]:
        """Tensor -> number of dimensions, where ONNX's shape inference finds it."""
        return {tensor: len(shape) for tensor, shape in self.shapes().items()}

    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Tensor -> shape, where ONNX's shape inference finds it; None for a size that it doesn't."""
        return tensor_shapes(self.proto)


def label(node: Any) -> str:
    """What a finding calls a node: its name, or its first output."""
    return str(node.name or node.output[0])


def attribute(node: Any, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def channel_axis(node: Any, rank: int) -> int:
    """The axis of the output channels of the weight (input 1) of a Conv, ConvTranspose, Gemm or MatMul."""
    axis = _CHANNEL_AXIS[node.op_type]
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        axis = 0
    return axis % rank


def bounds(graph: Graph, node: Any) -> tuple[float, float] | None:
    """What values a node's output can have, from the operator alone; None if any."""
    infinite = float("inf")
    if node.op_type in ("Sigmoid", "HardSigmoid", "Softmax"):
        return 0.0, 1.0
    if node.op_type == "Tanh":
        return -1.0, 1.0
    if node.op_type == "Relu":
        return 0.0, infinite
    if node.op_type == "Clip":
        given = [graph.scalar(i) if i else None for i in (*node.input[1:3], "", "")[:2]]
        named = attribute(node, "min", None), attribute(node, "max", None)  # until opset 10 they are attributes
        limits = [g if g is not None else n for g, n in zip(given, named, strict=True)]
        if any(i and not graph.is_constant(i) for i in node.input[1:3]):
            return None
        return (-infinite if limits[0] is None else limits[0], infinite if limits[1] is None else limits[1])
    return None
