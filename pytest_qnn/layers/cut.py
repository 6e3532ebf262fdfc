"""Cutting a QDQ model at every quantised activation.

Each activation's DequantizeLinear then reads a graph input, and each QuantizeLinear output becomes a graph output. Fed with the
reference's own quantised tensors, every segment between two cuts computes one layer from exact inputs: what differs at
its end is that layer's own error, in whole steps, and nothing is inherited from the layers before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from pytest_qnn.errors import ModelError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.graph_encodings import MOVES_ONLY, GraphEncodings
from pytest_qnn.model.onnx_file import load_proto, read_model

WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN")
QUIET = (*MOVES_ONLY, "DequantizeLinear", "QuantizeLinear", "Constant", "Cast")  # never what a layer is called after


LARGEST = 1 << 30  # bytes; protobuf's own limit is 2 GiB, and several copies are in memory at a time


def is_too_large(file: Path) -> bool:
    """Whether a model with its external data is larger than what is rewritten here."""
    return sum(Path(name).stat().st_size for name, _ in read_model(file).files) > LARGEST


@dataclass(frozen=True)
class Layer:
    """What lies between quantised tensors: one operator, or several that no quantiser parts.

    Attributes:
        tensor: the quantised tensor at its end.
        name: of the node that it is called after: the one with weights, else the last that computes something.
        operators: of its nodes, in the graph's order, without quantisers and without those that only move elements; none at
            the graph's inputs, where only a quantiser stands.
        encoding: of ``tensor``.
        sources: the quantised tensors and graph inputs that it is computed from.
        nodes: names of the nodes that compute it.
    """

    tensor: str
    name: str
    operators: tuple[str, ...]
    encoding: Encoding
    sources: tuple[str, ...]
    nodes: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Its operators in one word, e.g. "Conv+Relu"; "input" at the graph's inputs."""
        return "+".join(self.operators) or "input"


@dataclass(frozen=True)
class CutModel:
    """A model cut at its quantised activations.

    Attributes:
        proto: the cut ModelProto; its outputs are the layers' tensors.
        layers: in the graph's order.
        fed: quantised tensor -> the name of the graph input that stands for it.
    """

    proto: Any
    layers: tuple[Layer, ...]
    fed: Mapping[str, str]


def load_whole(file: Path) -> Any:
    """The file's ModelProto with its weights in memory.

    Raises:
        ModelError: it can't be read, or is too large to be written again in one piece with what a cut or noise adds.
    """
    proto = load_proto(file)
    if is_too_large(file):
        raise ModelError(
            f"{file}: with its weights it has more than {LARGEST >> 20} MiB: too large to be cut into layers. Judge its parts "
            "(onnx.utils.extract_model)"
        )
    onnx.load_external_data_for_model(proto, str(file.parent))
    return proto


# HTP computes these in an encoding of its own and has the next operator know it. At a graph's output that shows: the integers are
# the wrong ones there (a known fault of the backend), and right in the whole graph. So they are judged with what follows.
NEVER_LAST = frozenset({("HardSigmoid", 16), ("Tanh", 16), ("Sigmoid", 16)})


def can_end(layer: Layer) -> bool:
    """Whether a layer's own result can be seen at a graph's output."""
    encoding = layer.encoding
    if not layer.operators or (layer.operators[-1], encoding.bits) not in NEVER_LAST:
        return True
    own = layer.operators[-1] != "Tanh" and encoding.zero_point == (
        0,
    )  # 0..1 over the whole range: what HTP takes anyway
    return own and abs(encoding.scale[0] * 2**encoding.bits - 1) < 1e-3


def find_layers(proto: Any, folder: Path, ends_at: Callable[[Layer], bool] = lambda layer: True) -> tuple[Layer, ...]:
    """The layers of a QDQ model: one for each QuantizeLinear of an activation whose encoding is known.

    Args:
        ends_at: whether a layer may end there; where it may not, it is part of those that follow.
    """
    found = _find(proto, folder, frozenset())
    continued = {source for layer in found for source in layer.sources}
    refused = frozenset(layer.tensor for layer in found if layer.tensor in continued and not ends_at(layer))
    return _find(proto, folder, refused) if refused else found


def _find(proto: Any, folder: Path, passed: frozenset[str]) -> tuple[Layer, ...]:
    encodings = GraphEncodings(proto, folder)
    ends = {}
    for node in proto.graph.node:
        if (
            node.op_type == "QuantizeLinear"
            and node.input[0] not in encodings.constants
            and node.output[0] not in passed
        ):
            encoding = encodings.read(node)
            if encoding is not None:
                ends[node.output[0]] = (node, encoding)
    graph_inputs = {v.name for v in proto.graph.input} - set(encodings.constants)
    order = {id(node): place for place, node in enumerate(proto.graph.node)}
    return tuple(_layer(node, encoding, ends, encodings, graph_inputs, order) for node, encoding in ends.values())


def _layer(
    end: Any,
    encoding: Encoding,
    ends: Mapping[str, Any],
    encodings: GraphEncodings,
    graph_inputs: set[str],
    order: Mapping[int, int],
) -> Layer:
    found: dict[int, Any] = {}
    sources: dict[str, None] = {}
    waiting = [end.input[0]]
    while waiting:
        tensor = waiting.pop()
        if tensor in ends or tensor in graph_inputs:
            sources[tensor] = None
            continue
        node = encodings.producer.get(tensor)
        if node is None or order[id(node)] in found:
            continue
        found[order[id(node)]] = node
        waiting += [name for name in node.input if name and name not in encodings.constants]
    nodes = [found[place] for place in sorted(found)]
    loud = [node for node in nodes if node.op_type not in QUIET]
    weighted = [node for node in loud if node.op_type in WEIGHTED]
    named = (weighted or loud[-1:] or nodes[-1:] or [end])[0]
    name = end.input[0] if named is end else named.name or named.output[0]
    operators, names = (tuple(values) for values in ([n.op_type for n in loud], [n.name for n in loud if n.name]))
    return Layer(end.output[0], name, operators, encoding, tuple(sources), names)


def tapped(proto: Any, layers: tuple[Layer, ...]) -> Any:
    """A copy of the model that gives the layers' quantised tensors beside its own outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    there = {v.name for v in copy.graph.output}
    copy.graph.output.extend(
        helper.make_tensor_value_info(layer.tensor, _element_type(layer), None)
        for layer in layers
        if layer.tensor not in there
    )
    return copy


def cut(proto: Any, layers: tuple[Layer, ...], shapes: Mapping[str, tuple[int, ...]]) -> CutModel:
    """The model cut at every layer's end.

    Args:
        shapes: of the layers' tensors.

    Raises:
        ModelError: there is no layer: the model isn't quantised.
    """
    if not layers:
        raise ModelError(
            "the model has no quantised activation with a constant encoding: there are no layers to judge alone"
        )
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | {v.name for v in graph.input}
    fed = {layer.tensor: _free_name(f"{layer.tensor}__cut", taken) for layer in layers}
    for node in graph.node:
        node.input[:] = [fed.get(name, name) for name in node.input]
    del graph.output[:]
    graph.output.extend(
        helper.make_tensor_value_info(layer.tensor, _element_type(layer), shapes[layer.tensor]) for layer in layers
    )
    _drop_unused(graph)
    used = {name for node in graph.node for name in node.input}
    fed = {tensor: name for tensor, name in fed.items() if name in used}
    kept = [v for v in graph.input if v.name in used]
    del graph.input[:]
    graph.input.extend(kept)
    graph.input.extend(
        helper.make_tensor_value_info(fed[layer.tensor], _element_type(layer), shapes[layer.tensor])
        for layer in layers
        if layer.tensor in fed
    )
    del graph.value_info[:]
    return CutModel(copy, layers, fed)


def _drop_unused(graph: Any) -> None:
    """Remove what no output needs: the last DequantizeLinears, and whatever was only there for a float output."""
    needed, kept = {v.name for v in graph.output}, []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed |= {name for name in node.input if name} | _captured(node)
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    del graph.node[:]
    graph.node.extend(ordered)
    constants = [i for i in graph.initializer if i.name in needed]
    if len(constants) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(constants)


def _captured(node: Any) -> set[str]:
    """Names that subgraphs of a node may take from outside."""
    return {
        name
        for attribute in node.attribute
        for graph in (attribute.g, *attribute.graphs)
        for inner in graph.node
        for name in (*inner.input, *_captured(inner))
    }


def _free_name(wanted: str, taken: set[str]) -> str:
    name = wanted
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _element_type(layer: Layer) -> int:
    return int(getattr(onnx.TensorProto, layer.encoding.dtype.upper()))
