"""Which tensor of a context binary is which input or output of an ONNX model, and what lies between the two.

A binary that somebody else made may spell names as the SDK's converter does (``/model.22/Concat`` becomes
``_model_22_Concat``), have its channels last where ONNX has them second, and take integers where the model takes floats.
The runtime checks the number of bytes and nothing else, so whatever isn't matched here for sure is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_qnn.artifacts.binary import ContextInfo, GraphInfo, TensorInfo
from pytest_qnn.errors import ArtifactError, OptionError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.onnx_file import Model
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.settings import unknown_name

FLOATS = ("float32", "float16", "float64")
LAYOUTS = ("same", "channels_last", "channels_first")
# what a converter stores other integers as, because the hardware has no 64-bit ones
_NARROWED = {("int64", "int32"), ("uint64", "uint32")}


@dataclass(frozen=True)
class Edge:
    """One input or output: the model's tensor, the binary's, and how one becomes the other.

    Attributes:
        spec: the model's, with every size bound.
        tensor: the binary's.
        layout: "same", "channels_last" or "channels_first": the binary's order of axes, seen from the model's; "reshaped"
            where the two differ in axes of size 1 only.
        permutation: axis ``i`` of the binary's tensor is axis ``permutation[i]`` of the model's; None: the same order.
        by: how it was found: "name", "converted name", "given name" or "shape and type".
    """

    spec: TensorSpec
    tensor: TensorInfo
    layout: str = "same"
    permutation: tuple[int, ...] | None = None
    by: str = "name"

    @property
    def quantized(self) -> bool:
        """Whether the model has floats where the binary has integers with an encoding."""
        return self.spec.dtype in FLOATS and self.tensor.encoding is not None

    def describe(self) -> str:
        """``x: float32[1, 3, 16, 16] -> in: UFIXED_POINT_8[1, 16, 16, 3], channels last``"""
        text = f"{self.spec.describe()} -> {self.tensor.describe()}"
        return text if self.layout == "same" else f"{text}, {self.layout.replace('_', ' ')}"


@dataclass(frozen=True)
class Match:
    """A graph of a context binary matched with a model.

    Attributes:
        graph: the binary's.
        inputs, outputs: in the model's order; each of the binary's tensors occurs once.
        notes: what was taken for granted, for the record.
    """

    graph: GraphInfo
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    notes: tuple[str, ...] = ()


def match_tensors(
    info: ContextInfo,
    model: Model,
    *,
    graph: str | None = None,
    names: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
) -> Match:
    """Match a context binary's inputs and outputs with a model's, by name, type and shape.

    Args:
        model: the ONNX model that the binary was made from; dynamic sizes left open in its outputs are taken from the
            binary.
        graph: name of the binary's graph, if it has several.
        names: the model's name -> the binary's, for tensors whose names say nothing.
        layouts: the model's name -> "same", "channels_last" or "channels_first", where sizes can't tell.

    Raises:
        ArtifactError: a tensor of one has no counterpart in the other, or a different type, shape or encoding, or more
            than one tensor could be meant.
        OptionError: ``names`` or ``layouts`` has a name that isn't there, or an unknown layout.
    """
    chosen = info.graph(graph)
    _check_given(model, chosen, names or {}, layouts or {})
    inputs = _pair("input", info.path, model, model.inputs, chosen.inputs, names or {})
    outputs = _pair("output", info.path, model, model.outputs, chosen.outputs, names or {})
    edges, notes = _laid_out(info.path, [*inputs, *outputs], layouts or {})
    for edge in edges:
        if why := _differs(edge.spec, edge.tensor):
            raise _refusal(info.path, model, edge, why)
    count = len(inputs)
    notes += [
        f"{e.spec.name!r} is taken to be the binary's {e.tensor.name!r}: the only one left of its shape and type"
        for e in edges
        if e.by == "shape and type"
    ]
    return Match(chosen, tuple(edges[:count]), tuple(edges[count:]), tuple(notes))


def converted_name(name: str) -> str:
    """A tensor's name as the QNN SDK's converters write it: an identifier of C, for the C++ code that they make."""
    text = re.sub(r"[^0-9A-Za-z_]", "_", name)
    return f"_{text}" if text[:1].isdigit() else text


def _check_given(model: Model, graph: GraphInfo, names: Mapping[str, str], layouts: Mapping[str, str]) -> None:
    for option, given in (("names", names), ("layouts", layouts)):
        if not isinstance(given, Mapping):
            raise OptionError(f"{option}: must be a dict by the model's tensor names, got {given!r}")
    known = [s.name for s in (*model.inputs, *model.outputs)]
    there = [t.name for t in (*graph.inputs, *graph.outputs)]
    for option, given in (("names", names), ("layouts", layouts)):
        for name in given:
            if name not in known:
                raise OptionError(f"{option}: {unknown_name('tensor of the model', name, known)}")
    for name in names.values():
        if name not in there:
            raise OptionError(f"names: {unknown_name('tensor of the context binary', name, there)}")
    if repeated := [name for name in names.values() if list(names.values()).count(name) > 1]:
        raise OptionError(f"names: {repeated[0]!r} of the context binary is named for two tensors of the model")
    inputs = {s.name for s in model.inputs}
    for name, other in names.items():
        if (name in inputs) != (other in {t.name for t in graph.inputs}):
            raise OptionError(
                f"names: {name!r} and {other!r} are an input and an output: they can't be the same tensor"
            )
    for layout in layouts.values():
        if layout not in LAYOUTS:
            raise OptionError(f"layouts: {unknown_name('layout', layout, LAYOUTS)}")


# --- which is which ----------------------------------------------------------------------------------------------------


def _pair(
    kind: str,
    path: Path,
    model: Model,
    specs: Sequence[TensorSpec],
    tensors: Sequence[TensorInfo],
    names: Mapping[str, str],
) -> list[Edge]:
    """Each of the model's tensors with the binary's that it is; layouts are left for later."""
    left = {t.name: t for t in tensors}
    found: dict[str, Edge] = {}

    def take(wanted: Callable[[TensorSpec], list[str]], by: str) -> None:
        candidates = {s.name: wanted(s) for s in specs if s.name not in found}
        claims = list(itertools.chain.from_iterable(candidates.values()))
        for spec in specs:
            names_ = candidates.get(spec.name, [])
            if len(names_) == 1 and claims.count(names_[0]) == 1:
                found[spec.name] = Edge(spec, left.pop(names_[0]), by=by)

    take(lambda s: [n for n in [names.get(s.name)] if n in left], "given name")
    take(lambda s: [n for n in left if n == s.name], "name")
    take(lambda s: [n for n in left if converted_name(n) == converted_name(s.name)], "converted name")
    take(lambda s: [n for n, t in left.items() if _fits(s, t)], "shape and type")
    missing = [s for s in specs if s.name not in found]
    if not missing and not left:
        return [found[s.name] for s in specs]
    theirs = ", ".join(t.describe() for t in tensors) or "none"
    if not missing:
        extra = ", ".join(t.describe() for t in left.values())
        raise ArtifactError(
            f"{path}: the binary's {kind} {extra} has no counterpart in {model.path.name}, whose {kind}s are "
            f"{', '.join(s.describe() for s in specs)}. Load it with the model that it was made from"
        )
    spec = missing[0]
    fitting = [t.name for t in left.values() if _fits(spec, t)]
    if fitting:
        others = [s.name for s in missing if any(_fits(s, left[n]) for n in fitting)]
        raise ArtifactError(
            f"{path}: which {kind} of the binary is {model.path.name}'s {' and '.join(map(repr, others))}? By shape and type "
            f"any of {', '.join(map(repr, fitting))} could be. Say so with names={{{spec.name!r}: {fitting[0]!r}, ...}}"
        )
    raise ArtifactError(
        f"{path}: {model.path.name} has the {kind} {spec.describe()}, the binary has nothing that fits: its {kind}s are "
        f"{theirs}. Load it with the model that it was made from"
    )


def _fits(spec: TensorSpec, tensor: TensorInfo) -> bool:
    return not _type_differs(spec, tensor) and bool(_layouts(spec.shape, tensor.shape))


# --- types and encodings ----------------------------------------------------------------------------------------------


def _differs(spec: TensorSpec, tensor: TensorInfo) -> str:
    """Why the two can't be the same tensor; empty if they can."""
    return tensor.note or _type_differs(spec, tensor) or _encoding_differs(spec.encoding, tensor.encoding)


def _type_differs(spec: TensorSpec, tensor: TensorInfo) -> str:
    if spec.dtype == tensor.dtype or (spec.dtype, tensor.dtype) in _NARROWED:
        return ""
    if spec.dtype in FLOATS:
        if tensor.dtype in FLOATS:
            return ""
        if tensor.encoding is not None:
            return "" if tensor.encoding.bits <= 16 else "32-bit integers can't be quantised or dequantised exactly"
        return f"floats can't become {tensor.data_type} without an encoding, and it has none"
    return "the types differ"


def _encoding_differs(ours: Encoding | None, theirs: Encoding | None) -> str:
    """Whether two encodings of one tensor are of different grids: another width, or a range that ends half a step away.

    Signed and unsigned types with the same range are the same grid. Per-channel ones are not compared: a change of layout
    changes their axis.
    """
    if ours is None or theirs is None or ours.axis is not None or theirs.axis is not None:
        return ""
    half = min(ours.step, theirs.step) / 2
    if ours.bits == theirs.bits and all(abs(a - b) <= half for a, b in zip(ours.range, theirs.range, strict=True)):
        return ""
    return (
        f"it was quantised differently: {_grid(theirs)} in the binary, {_grid(ours)} in the model, so they don't belong "
        "together"
    )


def _grid(encoding: Encoding) -> str:
    low, high = encoding.range
    return f"{encoding.dtype} from {low:.6g} to {high:.6g}"


# --- layouts ----------------------------------------------------------------------------------------------------------


def axes_of(layout: str, rank: int) -> tuple[int, ...] | None:
    """Which axis of the model's tensor is each axis of the binary's; None: the same order.

    Raises:
        OptionError: an unknown layout, or one that a tensor of that rank doesn't have.
    """
    if layout == "same":
        return None
    if layout not in LAYOUTS or rank < 3:
        raise OptionError(f"layouts: {unknown_name('layout', layout, LAYOUTS if rank >= 3 else LAYOUTS[:1])}")
    return (0, *range(2, rank), 1) if layout == "channels_last" else (0, rank - 1, *range(1, rank - 1))


def _layouts(model: Sequence[int | str], binary: Sequence[int]) -> dict[str, tuple[int, ...] | None]:
    """Layouts in which a tensor of the model's shape has the binary's shape, with what each does to the axes.

    Two that leave the same bytes (axes of size 1 may go anywhere) count as one.
    """
    rank = len(model)
    if tuple(model) == ("?",) and len(binary) != 1:
        return {"same": None}  # the model doesn't even tell its rank
    if rank != len(binary):
        plain = [size for size in model if size != 1]
        return {"reshaped": None} if plain == [size for size in binary if size != 1] else {}
    orders = {name: axes_of(name, rank) or tuple(range(rank)) for name in (LAYOUTS if rank >= 3 else LAYOUTS[:1])}
    found: dict[str, tuple[int, ...] | None] = {}
    seen = set()
    for name, order in orders.items():
        if all(isinstance(model[a], str) or model[a] == size for a, size in zip(order, binary, strict=True)):
            moved = tuple(a for a, size in zip(order, binary, strict=True) if size != 1)
            if moved not in seen:
                seen.add(moved)
                found[name] = None if name == "same" else order
    return found


def _laid_out(path: Path, edges: list[Edge], given: Mapping[str, str]) -> tuple[list[Edge], list[str]]:
    """The edges with their layouts; sizes decide, else ``given``, else what the other tensors show."""
    options = [_layouts(e.spec.shape, e.tensor.shape) for e in edges]
    for edge, possible in zip(edges, options, strict=True):
        if not possible:
            raise ArtifactError(
                f"{path}: {edge.spec.name!r} has another shape in the binary: {list(edge.tensor.shape)}, the model has "
                f"{list(edge.spec.shape)}. Load it with the model that it was made from"
            )
    reordered = next((e for e, p in zip(edges, options, strict=True) if "same" not in p and "reshaped" not in p), None)
    notes, done = [], []
    for edge, possible in zip(edges, options, strict=True):
        layout = given.get(edge.spec.name)
        if layout is None:
            layout = next(iter(possible))
            if len(possible) > 1:
                if reordered is not None:
                    raise ArtifactError(
                        f"{path}: the order of the axes of {edge.spec.name!r} can't be told from its shape "
                        f"{list(edge.tensor.shape)}, and {reordered.spec.name!r} isn't in the model's order. Say so with "
                        f"layouts={{{edge.spec.name!r}: 'channels_last'}} or 'same'"
                    )
                notes.append(
                    f"the axes of {edge.spec.name!r} are taken to be in the model's order: its shape can't tell"
                )
        elif layout not in possible:
            raise ArtifactError(
                f"{path}: layouts: {edge.spec.name!r} of shape {list(edge.spec.shape)} doesn't become the binary's "
                f"{list(edge.tensor.shape)} with {layout!r}; possible: {', '.join(possible)}"
            )
        order = possible[layout]
        done.append(replace(edge, spec=_bound(edge, order), layout=layout, permutation=order))
    return done, notes


def _bound(edge: Edge, order: tuple[int, ...] | None) -> TensorSpec:
    """The model's tensor with the binary's sizes where it leaves them open."""
    spec, sizes = edge.spec, edge.tensor.shape
    if not spec.unbound:
        return spec
    if len(spec.shape) == len(sizes) and order is not None:
        sizes = tuple(sizes[order.index(axis)] for axis in range(len(order)))
    return replace(spec, shape=sizes)


def _refusal(path: Path, model: Model, edge: Edge, why: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: {edge.spec.name!r} is {edge.tensor.describe()} in the binary and {edge.spec.describe()} in "
        f"{model.path.name}: {why}. Load it with the model that it was made from"
    )
