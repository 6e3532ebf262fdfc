"""What is wrong with a set of encodings: each finding names tensor and field, and all are found at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator

from pytest_qnn.encodings.encoding_set import EncodingSet, Precision, TensorEncoding, refuse
from pytest_qnn.encodings.grids import fits
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.graph_tensors import GraphTensors


def check_encodings(encodings: EncodingSet, graph: GraphTensors | None = None) -> tuple[str, ...]:
    """Everything that is wrong with a set; empty if nothing is.

    Without a model: scales (0, negative, NaN, infinite), zero points outside of their type, ranges without zero, min and max that
    contradict scale and offset, symmetric flags that contradict the offset, tensors defined twice. With one: unknown tensors, tensors
    that are no floats, activations among the parameters and the other way round, channels and blocks that don't fit the shape.
    """
    if graph is not None:
        encodings = encodings.bound_to(graph)
    problems: list[str] = []
    kinds: dict[str, str | None] = {}
    for tensor in encodings.tensors:
        where = f"{tensor.kind or 'tensor'} {tensor.name!r}"
        if tensor.name in kinds:
            other = kinds[tensor.name]
            both = f"both among the {other}s and the {tensor.kind}s" if other != tensor.kind else "twice"
            problems.append(f"{where}: is defined {both}: remove one")
        kinds.setdefault(tensor.name, tensor.kind)
        found = _of_value(tensor.value) if isinstance(tensor.value, Precision) else _of_encoding(tensor, tensor.value)
        problems += [f"{where}: {problem}" for problem in found]
        if graph is not None:
            problems += [f"{where}: {problem}" for problem in _of_model(tensor, graph, hint=len(problems) < 30)]
    return tuple(problems)


def require_sound(encodings: EncodingSet, graph: GraphTensors | None = None) -> None:
    """Refuse a set in which something is wrong.

    Raises:
        EncodingError: with every problem.
    """
    refuse(list(check_encodings(encodings, graph)), encodings.source or "encodings")


def _of_value(precision: Precision) -> Iterator[str]:
    known = (16, 32) if precision.number == "float" else (4, 8, 16, 32)
    if precision.bits not in known:
        yield f"bit width {precision.bits}: {precision.number}s have {' or '.join(map(str, known))} bits"


def _of_encoding(tensor: TensorEncoding, encoding: Encoding) -> Iterator[str]:
    low, high = encoding.limits
    channels = len(encoding.scale) > 1
    values = zip(encoding.scale, encoding.zero_point, encoding.ranges, strict=True)
    for i, (scale, zero, (bottom, top)) in enumerate(values):
        at = f" of channel {i}" if channels else ""
        if not math.isfinite(scale) or scale <= 0:
            yield f"scale{at} is {scale:g}: it must be above 0 and finite"
            continue
        if scale > 3.4e38 or scale < 1.2e-38:
            yield f"scale{at} is {scale:g}: float32, in which it is applied, can't hold it"
        if not low <= zero <= high:
            as_offset = "" if encoding.signed else f" (offset {-zero})"
            yield (
                f"zero point{at} is {zero}{as_offset}, outside of {encoding.dtype}'s {low} .. {high}: the range {bottom:g} .. {top:g} "
                "doesn't contain zero"
            )
        elif encoding.bits == 32 and zero:
            yield f"zero point{at} is {zero}: an int32's must be 0"
        if tensor.stated.ranges is not None:
            stated = tensor.stated.ranges[i]
            if not all(map(math.isfinite, stated)):
                yield f"min{at} {stated[0]:g} and max {stated[1]:g} must be finite"
            elif not stated[0] <= 0 <= stated[1]:
                yield f"min{at} {stated[0]:g} and max {stated[1]:g} don't contain zero"
            elif not fits((bottom, top), stated, scale):
                turned = ""
                if fits((scale * (low + zero), scale * (high + zero)), stated, scale):
                    turned = ": the offset has the wrong sign"
                yield (
                    f"min{at} {stated[0]:g} and max {stated[1]:g} contradict scale {scale:g} and offset at {encoding.bits} bits, which "
                    f"give {bottom:g} .. {top:g}{turned}"
                )
    if tensor.stated.symmetric and not encoding.symmetric and any(encoding.zero_point):
        middle = 2 ** (encoding.bits - 1)
        offset = next(-z for z in encoding.zero_point if z) - (middle if encoding.signed else 0)
        yield (
            f"is_symmetric is true, but the offset is {offset}: it must be {-middle}, or 0 for a range without negative numbers"
        )


def _of_model(tensor: TensorEncoding, graph: GraphTensors, hint: bool) -> Iterator[str]:
    name, encoding = tensor.name, tensor.encoding
    if name not in graph.names:
        if name in graph.inner:
            yield f"lies in a subgraph (If, Loop or Scan) of {graph.path.name}: those can't be quantised"
        else:
            yield f"{graph.path.name} has no such tensor{_like(graph, name) if hint else ''}"
        return
    dtype = graph.types.get(name, "float32")
    if dtype != "float32":
        yield f"is {dtype} in {graph.path.name}: only float32 tensors can be quantised"
    constant = name in graph.constants
    if constant != (tensor.kind == "param"):
        yield f"is {'constant' if constant else 'computed'} in {graph.path.name}, so it belongs among the {'params' if constant else 'activations'}"
        return
    if encoding is None:
        return
    if not constant:
        if encoding.unbound or encoding.axis is not None:
            yield f"has {len(encoding.scale)} scales: activations have one"
        return
    shape = graph.constants[name]
    if encoding.block_size is not None and any(size != 1 for size in shape[2:]):
        yield f"has blocks of {encoding.block_size} input channels, but its shape is {list(shape)}: ONNX's blocks cover one axis only"
    elif encoding.unbound:
        what = "scales" if encoding.block_size is None else f"scales in blocks of {encoding.block_size}"
        yield f"has {len(encoding.scale)} {what}, which don't fit the channels of its shape {list(shape)}"
    elif encoding.axis is not None:
        problem = encoding.misfit(shape)
        if problem:
            yield problem


def _like(graph: GraphTensors, name: str) -> str:
    """A hint at the name that was meant; a model has thousands, so not all of them are listed."""
    close = difflib.get_close_matches(name, graph.names, n=1)
    return f". Did you mean {close[0]!r}?" if close else f"; it has {', '.join(map(repr, sorted(graph.names)[:3]))}, …"
