"""ONNX models around bare QNN context binaries, so that onnxruntime's QNN execution provider can run them.

The wrapper has exactly the inputs and outputs of the ONNX model that the binary was made from. Where the binary has other
types or another order of axes, QuantizeLinear, DequantizeLinear, Cast, Transpose and Reshape nodes stand around the one
EPContext node; they run on onnxruntime's CPU provider and are the known edge of the graph: nothing else is in there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from pytest_qnn.artifacts.binary import ContextInfo, GraphInfo, TensorInfo
from pytest_qnn.artifacts.matching import Edge, Match, match_tensors
from pytest_qnn.errors import ArtifactError
from pytest_qnn.model.onnx_file import Model, file_digest
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.work_folder import work_folder

OPSET, IR_VERSION = 21, 10  # the first opset whose QuantizeLinear writes 16-bit integers
EDGE_OPERATORS = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "Transpose", "Reshape"})


@dataclass(frozen=True)
class Wrapped:
    """A wrapper around a context binary.

    Attributes:
        path: the ONNX file.
        binary: what lies beside it: a link to the binary that was wrapped, or a copy.
        match: the binary's graph and the model's inputs and outputs.
        edges: (name, operator) of the nodes around the EPContext node. onnxruntime's optimiser may rename and move them,
            whatever its level, but there are none but these operators.
    """

    path: Path
    binary: Path
    match: Match
    edges: tuple[tuple[str, str], ...]

    @property
    def files(self) -> tuple[tuple[str, str], ...]:
        """Path and SHA-256 of the wrapper and of the binary."""
        return tuple((str(f), file_digest(f)) for f in (self.path, self.binary))


def wrap(
    info: ContextInfo,
    folder: Path,
    model: Model | None = None,
    *,
    graph: str | None = None,
    names: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
) -> Wrapped:
    """Write a wrapper around a context binary into ``folder``, with a link to the binary (a copy, if links can't be).

    Args:
        info: the binary, from :func:`~pytest_qnn.artifacts.binary.read_context_binary`.
        folder: made if it is missing.
        model: the ONNX model that the binary was made from: the wrapper gets its inputs and outputs. Without one it gets the
            binary's own.
        graph, names, layouts: as for :func:`~pytest_qnn.artifacts.matching.match_tensors`.

    Raises:
        ArtifactError: the binary doesn't fit the model, has tensors that onnxruntime can't hand over, changed since it was
            read, or the folder can't be written.
        OptionError: ``names`` or ``layouts`` makes no sense.
    """
    if model is None:
        match = _own_tensors(info, info.graph(graph))
    else:
        match = match_tensors(info, model, graph=graph, names=names, layouts=layouts)
    stem = info.path.name.removesuffix(".bin")
    path, binary = folder / f"{stem}.wrapper.onnx", folder / f"{stem}.bin"
    proto = build_wrapper(match, binary.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.unlink()  # while it is missing, nothing here can be taken for finished
        with work_folder(folder) as work:
            _link(info.path, work / "binary", binary)
            if file_digest(binary) != info.sha256:
                raise ArtifactError(f"{info.path} changed on disk since it was read: load it again")
            onnx.save(proto, str(work / "wrapper"))
            os.replace(work / "wrapper", path)
    except OSError as error:
        raise ArtifactError(f"{folder}: the wrapper can't be written: {error.strerror or error}") from error
    edges = tuple((n.name, n.op_type) for n in proto.graph.node if n.op_type != "EPContext")
    return Wrapped(path, binary, match, edges)


def build_wrapper(match: Match, binary: str) -> Any:
    """The wrapper as a ModelProto; ``binary`` is the file name of the context binary, which must lie beside it."""
    builder = _Builder(match)
    # in the binary's own order: releases of the execution provider that don't know io_name_overrides go by that
    inputs, outputs = {e.tensor.name: e for e in match.inputs}, {e.tensor.name: e for e in match.outputs}
    entries = [(t.name, builder.enter(inputs[t.name])) for t in match.graph.inputs]
    exits = [(t.name, builder.leave(outputs[t.name])) for t in match.graph.outputs]
    renamed = [(inner, name) for name, inner in (*entries, *exits) if inner != name]
    attributes: dict[str, Any] = {
        "main_context": 1,
        "embed_mode": 0,
        "ep_cache_context": binary,
        "source": "QNNExecutionProvider",
        "partition_name": match.graph.name,
    }
    if renamed and not any(mark in text for pair in renamed for text in pair for mark in ";="):  # no escapes for these
        attributes["io_name_overrides"] = "".join(f"{inner}={name};" for inner, name in renamed)
    context = helper.make_node(
        "EPContext",
        [inner for _, inner in entries],
        [inner for _, inner in exits],
        name=match.graph.name,  # the execution provider picks one of several graphs by the node's name
        domain="com.microsoft",
        **attributes,
    )
    graph = helper.make_graph(
        [*builder.before, context, *builder.after],
        "wrapper",
        [_value(e.spec.name, e.spec.dtype, e.spec.shape) for e in match.inputs],
        [_value(e.spec.name, e.spec.dtype, e.spec.shape) for e in match.outputs],
        builder.constants,
        value_info=builder.values,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="pytest-qnn")


class _Builder:
    """Collects the nodes and constants around the EPContext node.

    Scales and axes of per-channel encodings are the binary's, so Transpose and Reshape stand at the model's side.
    """

    def __init__(self, match: Match) -> None:
        self.before: list[Any] = []
        self.after: list[Any] = []
        self.constants: list[Any] = []
        self.values: list[Any] = []
        edges = (*match.inputs, *match.outputs)
        self.taken = {e.spec.name for e in edges} | {e.tensor.name for e in edges}
        self.outer, self.inner = {e.spec.name for e in edges}, {e.tensor.name for e in edges}

    def enter(self, edge: Edge) -> str:
        """Lead a graph input to the binary's; returns the latter's name in the wrapper."""
        steps = [
            *self._layout(edge, edge.permutation, edge.tensor.shape),
            *self._types(edge, "QuantizeLinear", edge.spec.dtype, edge.tensor.dtype),
        ]
        return self._chain(self.before, edge, steps, edge.spec.name, None)

    def leave(self, edge: Edge) -> str:
        """Lead the binary's output to the graph's; returns the former's name in the wrapper."""
        back = None if edge.permutation is None else tuple(int(i) for i in np.argsort(edge.permutation))
        steps = [
            *self._types(edge, "DequantizeLinear", edge.tensor.dtype, edge.spec.dtype),
            *self._layout(edge, back, tuple(int(size) for size in edge.spec.shape)),
        ]
        return self._chain(self.after, edge, steps, None, edge.spec.name)

    def _layout(self, edge: Edge, permutation: tuple[int, ...] | None, shape: tuple[int, ...]) -> list[_Step]:
        if permutation is not None:
            return [_Step("Transpose", (), (("perm", permutation),))]
        if edge.layout == "reshaped":
            return [_Step("Reshape", (self._constant(edge, "shape", np.array(shape, np.int64)),))]
        return []

    def _types(self, edge: Edge, operator: str, before: str, after: str) -> list[_Step]:
        if not edge.quantized:
            return [_cast(after)] if before != after else []
        encoding = edge.tensor.encoding
        assert encoding is not None
        scale, zero = np.array(encoding.scale, np.float32), np.array(encoding.zero_point, encoding.dtype)
        if encoding.axis is None:
            scale, zero = scale.reshape(()), zero.reshape(())
        extra = (self._constant(edge, "scale", scale), self._constant(edge, "zero_point", zero))
        attributes = () if encoding.axis is None else (("axis", encoding.axis),)
        step = _Step(operator, extra, attributes)
        if edge.spec.dtype == "float32":
            return [step]
        return [_cast("float32"), step] if operator == "QuantizeLinear" else [step, _cast(edge.spec.dtype)]

    def _chain(self, nodes: list[Any], edge: Edge, steps: list[_Step], first: str | None, last: str | None) -> str:
        """Add ``steps`` as nodes from ``first`` to ``last``; the end that is None is the binary's, whose name it returns."""
        if not steps:
            if edge.spec.name == edge.tensor.name or edge.spec.name not in self.inner:
                return edge.spec.name
            # another of the binary's tensors has this name, and the execution provider would go by that; it is
            # onnxruntime that must see a new one, so no Identity, which its optimiser takes out again
            shape = np.array(edge.tensor.shape, np.int64)
            steps = [_Step("Reshape", (self._constant(edge, "shape", shape),))]
        inner = edge.tensor.name if edge.tensor.name not in self.outer else self._fresh(f"{edge.tensor.name}/binary")
        self.values.append(_value(inner, edge.tensor.dtype, edge.tensor.shape))
        source = first or inner
        for number, step in enumerate(steps, 1):
            is_last = number == len(steps)
            target = (last or inner) if is_last else self._fresh(f"{edge.spec.name}/{step.operator}")
            nodes.append(
                helper.make_node(
                    step.operator,
                    [source, *step.constants],
                    [target],
                    name=f"{edge.spec.name}/{step.operator}",
                    **dict(step.attributes),
                )
            )
            source = target
        return inner

    def _constant(self, edge: Edge, what: str, value: Any) -> str:
        name = self._fresh(f"{edge.spec.name}/{what}")
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def _fresh(self, wanted: str) -> str:
        name = wanted
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


@dataclass(frozen=True)
class _Step:
    operator: str
    constants: tuple[str, ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()


def _cast(dtype: str) -> _Step:
    return _Step("Cast", (), (("to", _element_type(dtype)),))


def _element_type(dtype: str) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _value(name: str, dtype: str, shape: tuple[int | str, ...]) -> Any:
    return helper.make_tensor_value_info(name, _element_type(dtype), list(shape))


def _own_tensors(info: ContextInfo, graph: GraphInfo) -> Match:
    """A binary's tensors as they are, where there is no model."""
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor.note:
            raise ArtifactError(f"{info.path}: {tensor.describe()} can't be handed over: {tensor.note}")
    return Match(graph, tuple(map(_plain, graph.inputs)), tuple(map(_plain, graph.outputs)))


def _plain(tensor: TensorInfo) -> Edge:
    return Edge(TensorSpec(tensor.name, tensor.dtype, tensor.shape, tensor.encoding), tensor)


def _link(source: Path, draft: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``: a hard link, else a symbolic one, else a copy."""
    if target.exists() and target.samefile(source):
        return
    for make in (os.link, os.symlink, shutil.copyfile):
        with suppress(OSError):
            make(source, draft)
            os.replace(draft, target)
            return
    shutil.copyfile(source, draft)  # once more, for the reason why not
    os.replace(draft, target)
