"""The encodings of a QDQ model, under the names that its tensors had in the float model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pytest_qnn.encodings.encoding_set import EncodingSet, Kind, TensorEncoding
from pytest_qnn.errors import ModelError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.graph_encodings import GraphEncodings
from pytest_qnn.model.onnx_file import load_proto

# What onnxruntime.quantization appends to a float tensor's name; models written by apply_encodings use the same.
QUANTIZED = "_quantized"
BEFORE = "_QuantizeLinear_Input"
AFTER = "_QuantizeLinear_Output"
RESTORED = "_DequantizeLinear_Output"


def read_qdq(file: str | os.PathLike[str]) -> EncodingSet:
    """Encodings of a quantised ONNX model's activations, weights and biases.

    Raises:
        ModelError: the file can't be read, or has no QuantizeLinear and DequantizeLinear nodes.
    """
    path = Path(file).expanduser().absolute()
    proto = load_proto(path)
    found: dict[str, TensorEncoding] = {}
    notes: list[str] = []
    unread = 0
    for name, kind, encoding in _tensors(GraphEncodings(proto, path.parent)):
        if encoding is None:
            unread += 1
        elif name not in found:
            found[name] = TensorEncoding(name, kind, encoding)
        elif found[name].value != encoding:
            notes.append(f"{kind} {name!r} is quantised again for some of its consumers: its first encoding was read")
    if not found:
        raise ModelError(
            f"{path}: has no encodings: it is no QDQ model. Name the quantised model, or an encodings file"
        )
    if unread:
        notes.append(f"{unread} quantisers were left out: their scales are computed, or their type is no integer")
    return EncodingSet(tuple(found.values()), {}, str(path), "qdq", tuple(dict.fromkeys(notes)))


def _tensors(graph: GraphEncodings) -> Iterator[tuple[str, Kind, Encoding | None]]:
    outputs = {v.name for v in graph.graph.output}
    restoring = {n.input[0]: n for n in graph.graph.node if n.op_type == "DequantizeLinear"}
    for node in graph.graph.node:
        source = node.input[0] if node.input else ""
        if node.op_type == "QuantizeLinear":
            restored = restoring.get(node.output[0])
            name = _original(source, restored.output[0] if restored is not None else "", outputs)
            yield name, "param" if source in graph.constants else "activation", graph.read(node)
        elif node.op_type == "DequantizeLinear" and source in graph.constants:
            yield _of_constant(source, node.output[0]), "param", graph.read(node)
        elif node.op_type == "DequantizeLinear" and source not in graph.producer:
            yield source, "activation", graph.read(node)  # an input that is integers itself


def _original(source: str, restored: str, outputs: set[str]) -> str:
    """Name of an activation in the float model: of the tensor before its Quantize or after its Dequantize."""
    if restored in outputs or source == f"{restored}{BEFORE}":
        return restored
    return source.removesuffix(RESTORED)


def _of_constant(quantized: str, restored: str) -> str:
    if restored.endswith(RESTORED):
        return restored.removesuffix(RESTORED)
    return restored if quantized == f"{restored}{QUANTIZED}" else quantized.removesuffix(QUANTIZED)
