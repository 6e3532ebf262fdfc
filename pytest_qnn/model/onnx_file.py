"""Reading an ONNX file without running it: what it contains, and a digest of everything that decides its results."""

from __future__ import annotations

import errno
import hashlib
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from pytest_qnn.errors import ModelError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.graph_encodings import MOVES_ONLY, QUANTIZERS, GraphEncodings
from pytest_qnn.model.tensors import TensorSpec


@dataclass(frozen=True)
class Model:
    """An ONNX file.

    Attributes:
        path: where it lies.
        digest: SHA-256 of the file and of its external data files.
        inputs, outputs: the graph's, with ``dimensions`` applied.
        dimensions: sizes given to named dynamic dimensions.
        quantized: whether it has QuantizeLinear or DequantizeLinear nodes.
        activation_bits, weight_bits: bit widths found at those nodes, ascending.
        context: whether it is a wrapper around a QNN context binary (EPContext nodes).
        bounded_outputs: outputs that come from a sigmoid, softmax or tanh.
        files: path and SHA-256 of the file and of each external data file.
        nodes: (name, operator) of each node of the main graph.
        edges: those of them that quantise at the graph's inputs and outputs (see :func:`edge_quantizers`).
    """

    path: Path
    digest: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimensions: tuple[tuple[str, int], ...]
    quantized: bool
    activation_bits: tuple[int, ...]
    weight_bits: tuple[int, ...]
    context: bool
    bounded_outputs: frozenset[str] = frozenset()
    files: tuple[tuple[str, str], ...] = ()
    nodes: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    edges: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def precision(self) -> str:
        """Short name of how it is quantised, e.g. ``A8W8``, ``A16W8``, ``f32``."""
        if not self.quantized:
            return "f32"
        a = "/".join(map(str, self.activation_bits)) or "f"
        w = "/".join(map(str, self.weight_bits)) or "f"
        return f"A{a}W{w}"


def read_model(path: str | os.PathLike[str], dimensions: Mapping[str, int] | None = None) -> Model:
    """Read what the file says of itself.

    Args:
        path: the ONNX file.
        dimensions: sizes for named dynamic dimensions, e.g. ``{"batch": 1}``.

    Raises:
        ModelError: the file is missing, empty, truncated, not ONNX, or its external data is missing; or ``dimensions``
            has a name that the model doesn't.
    """
    file = Path(path).expanduser().absolute()
    key = (str(file), repr(dict(dimensions)) if isinstance(dimensions, Mapping) else repr(dimensions))
    known = _models.get(key)
    if known is not None and all(is_unchanged(name, digest) for name, digest in known.files):
        return known
    _models[key] = model = _read(file, dimensions)
    while len(_models) > _KEPT_MODELS:
        _models.pop(next(iter(_models)))
    return model


_models: dict[tuple[str, str], Model] = {}
_KEPT_MODELS = 64


def _read(file: Path, dimensions: Mapping[str, int] | None) -> Model:
    with ThreadPoolExecutor(1) as beside:  # hashing, which file_digest remembers, takes about as long as parsing
        if file.is_file():
            beside.submit(file_digest, file)
        proto = load_proto(file)
    graph = proto.graph
    if not graph.output:
        raise ModelError(f"{file}: the graph has no outputs: the file is truncated or not a model. Export it again")
    if dimensions is not None and not isinstance(dimensions, Mapping):
        raise ModelError(f"{file}: dimensions must be a dict such as {{'batch': 1}}, got {dimensions!r}")
    dims = {
        name: size if isinstance(size, bool) or not hasattr(size, "__index__") else operator.index(size)
        for name, size in (dimensions or {}).items()
    }
    constants = {i.name for i in graph.initializer} | {i.values.name for i in graph.sparse_initializer}
    graph_inputs = [v for v in graph.input if v.name not in constants]
    encodings = GraphEncodings(proto, file.parent)
    named = {d.dim_param for v in (*graph_inputs, *graph.output) for d in v.type.tensor_type.shape.dim if d.dim_param}
    for name, size in dims.items():
        if name not in named:
            raise ModelError(
                f"{file}: dimensions: the model has no dynamic dimension {name!r}; it has {sorted(named) or 'none'}"
            )
        if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
            raise ModelError(f"{file}: dimensions: {name!r} must be a whole number of at least 1, got {size!r}")
    files = tuple((str(f), file_digest(f)) for f in (file, *_external_files(proto, file)))
    return Model(
        path=file,
        digest=_digest(files),
        files=files,
        inputs=tuple(_spec(v, dims, encodings.of_input(v.name), file) for v in graph_inputs),
        outputs=tuple(_spec(v, dims, encodings.of_output(v.name), file) for v in graph.output),
        dimensions=tuple(sorted(dims.items())),
        quantized=any(n.op_type in QUANTIZERS for n in graph.node),
        activation_bits=encodings.activation_bits(),
        weight_bits=encodings.weight_bits(),
        context=any(n.op_type == "EPContext" for n in graph.node),
        bounded_outputs=frozenset(v.name for v in graph.output if encodings.is_bounded(v.name)),
        nodes=tuple((n.name, n.op_type) for n in graph.node),
        edges=tuple(edge_quantizers(graph)),
    )


def load_proto(file: Path) -> Any:
    """The file's ModelProto, without its external data.

    Raises:
        ModelError: missing, empty, truncated or not ONNX, or external data missing.
    """
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ModelError(f"{file}: the model can't be read: {error.strerror}. Check the path") from None
    if file.is_dir():
        raise ModelError(f"{file}: this is a folder; name the .onnx file in it")
    if not file.is_file():
        raise ModelError(f"{file}: this is no regular file but a pipe or a device; name an .onnx file")
    if size == 0:
        raise ModelError(f"{file}: the model is empty (0 bytes). Export it again")
    try:
        proto = onnx.load(str(file), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ModelError(
            f"{file}: not an ONNX model, or truncated ({size} bytes, {str(error).splitlines()[0]}). Export it again"
        ) from error
    except OSError as error:
        raise ModelError(f"{file}: the model can't be read: {error.strerror}") from error
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{file}: not an ONNX model, or truncated: it has no graph ({size} bytes). Export it again")
    _external_files(proto, file)
    return proto


def _tensors(proto: Any) -> Iterator[Any]:
    """Every constant tensor of a model: of its graph, subgraphs and functions, sparse ones too."""
    yield from _of_graph(proto.graph)
    for function in proto.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)


def _external_files(proto: Any, file: Path) -> list[Path]:
    """External data files of a model, each checked to be there and long enough."""
    files: dict[Path, None] = {}
    for tensor in _tensors(proto):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        info = {e.key: e.value for e in tensor.external_data}
        # by its name, not where links lead: stores of models keep them as links, and links may be changed
        data = Path(os.path.normpath(file.parent / info.get("location", "")))
        if not data.is_relative_to(os.path.normpath(file.parent)):
            raise ModelError(f"{file}: external data of {tensor.name!r} lies outside of the model's folder: {data}")
        if not data.is_file():
            raise ModelError(
                f"{file}: external data file {info.get('location')!r} of tensor {tensor.name!r} is missing: copy it "
                "beside the model"
            )
        end = int(info.get("offset", 0)) + int(info.get("length", 0))
        if data.stat().st_size < end:
            raise ModelError(
                f"{file}: external data file {info.get('location')!r} is truncated: tensor {tensor.name!r} ends at "
                f"byte {end}, the file at {data.stat().st_size}. Copy it again"
            )
        files[data] = None
    for node in proto.graph.node:  # the binary of a context wrapper belongs to the model just as much
        if node.op_type == "EPContext":
            attributes = {a.name: a for a in node.attribute}
            if "embed_mode" in attributes and attributes["embed_mode"].i == 0 and "ep_cache_context" in attributes:
                name = attributes["ep_cache_context"].s.decode(errors="replace")
                binary = Path(os.path.normpath(file.parent / name))
                if not binary.is_file():
                    raise ModelError(f"{file}: its context binary {name!r} is missing: copy it beside the model")
                files[binary] = None
    return list(files)


def check_unchanged(model: Model) -> None:
    """Make sure that the model's files still have the content that they had when it was read.

    Raises:
        ModelError: one changed.
    """
    for path, digest in model.files:
        if not is_unchanged(path, digest):
            raise ModelError(
                f"{path} changed on disk since the model was first read: load it again, and don't rewrite models while they "
                "are tested"
            )


def _digest(files: Sequence[tuple[str, str]]) -> str:
    """One digest of all files: the model's own where there is no other."""
    if len(files) == 1:
        return files[0][1]
    parts = [files[0][1], *(f"{Path(name).name}:{digest}" for name, digest in files[1:])]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def edge_quantizers(graph: Any) -> list[tuple[str, str]]:
    """(name, operator) of the QuantizeLinear nodes at a graph's inputs and of the DequantizeLinear nodes at its outputs.

    Nodes that only move elements may lie between: onnxruntime exchanges their order with the quantiser's.
    """
    constants = {i.name for i in graph.initializer}
    at_input = {v.name for v in graph.input if v.name not in constants}
    at_output = {v.name for v in graph.output}
    for node in graph.node:
        if node.op_type in MOVES_ONLY and node.input[0] in at_input:
            at_input.add(node.output[0])
    for node in reversed(graph.node):
        if node.op_type in MOVES_ONLY and node.output[0] in at_output:
            at_output.add(node.input[0])
    return [
        (n.name, n.op_type)
        for n in graph.node
        if (n.op_type == "QuantizeLinear" and n.input[0] in at_input)
        or (n.op_type == "DequantizeLinear" and n.output[0] in at_output)
    ]


_digests: dict[tuple[str | int, ...], str] = {}


def file_digest(file: Path) -> str:
    """SHA-256 of a file; remembered while its size, times and inode stay the same.

    Raises:
        OSError: it can't be read, or is no regular file.
    """
    stat = file.stat()
    if not S_ISREG(stat.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    # st_ctime tells what copies that keep st_mtime don't
    key = (str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)
    if key not in _digests:
        with file.open("rb") as f:
            _digests[key] = hashlib.file_digest(f, "sha256").hexdigest()
    return _digests[key]


def is_unchanged(path: str, digest: str) -> bool:
    """Whether a file still has the SHA-256 that it had."""
    try:
        return file_digest(Path(path)) == digest
    except OSError:
        return False


def _spec(value: Any, dimensions: Mapping[str, int], encoding: Encoding | None, file: Path) -> TensorSpec:
    if not value.type.HasField("tensor_type"):
        raise ModelError(f"{file}: {value.name!r} is not a tensor (sequence, map or optional): QNN can't run it")
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        shape: tuple[int | str, ...] = ("?",)
    else:
        shape = tuple(_size(d, i, dimensions) for i, d in enumerate(tensor.shape.dim))
    return TensorSpec(value.name, dtype_name(tensor.elem_type), shape, encoding)


def _size(dim: Any, index: int, dimensions: Mapping[str, int]) -> int | str:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    if dim.dim_param in dimensions:
        return dimensions[dim.dim_param]
    return dim.dim_param or f"?{index}"


def dtype_name(elem_type: int) -> str:
    """numpy's name of an ONNX element type, e.g. 1 -> "float32"."""
    try:
        return str(helper.tensor_dtype_to_np_dtype(elem_type)) if elem_type != TensorProto.STRING else "string"
    except (KeyError, TypeError):
        return f"onnx type {elem_type}"
