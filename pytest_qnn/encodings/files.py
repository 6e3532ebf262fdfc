"""Encodings files: AIMET's three versions and QNN's ``--quantization_overrides``, read and written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pytest_qnn.encodings.encoding_set import EncodingSet, Kind, Precision, Stated, TensorEncoding, refuse
from pytest_qnn.encodings.fields import Fields
from pytest_qnn.encodings.grids import OPPOSITE, USUAL, Range, encoding_of, from_range, offsets_of, reading_of
from pytest_qnn.errors import EncodingError, OptionError
from pytest_qnn.model.encoding import INTEGER_BITS, Encoding
from pytest_qnn.model.graph_tensors import GraphTensors, read_graph
from pytest_qnn.model.replaced_file import replaced_file
from pytest_qnn.settings import unknown_name

AIMET_0, AIMET_1, AIMET_2, QNN = "aimet-0.6.1", "aimet-1.0.0", "aimet-2.0.0", "qnn"
FORMATS = (AIMET_0, AIMET_1, AIMET_2, QNN)
VERSIONS = {"0.6.1": AIMET_0, "1.0.0": AIMET_1, "2.0.0": AIMET_2, "2.1.0": AIMET_2}
SECTIONS: dict[str, Kind] = {"activation_encodings": "activation", "param_encodings": "param"}


def read_encodings(
    file: str | os.PathLike[str], model: str | os.PathLike[str] | GraphTensors | None = None
) -> EncodingSet:
    """Encodings of a file of any known format, or of a quantised ONNX model.

    Args:
        file: AIMET 0.6.1, 1.0.0 or 2.0.0, QNN quantization_overrides, or a QDQ model (``.onnx``).
        model: the float model, if what the file leaves to it is wanted: see :meth:`EncodingSet.bound_to`.

    Raises:
        EncodingError: broken JSON, an unknown version, or fields that are missing or of the wrong type: all of them, each with
            its tensor.
        ModelError: a model can't be read.
    """
    path = Path(file).expanduser().absolute()
    if path.suffix == ".onnx":
        from pytest_qnn.encodings.qdq import read_qdq

        found: EncodingSet = read_qdq(path)
    else:
        found = _parse(_load(path), path)
    return found if model is None else found.bound_to(model)


def write_encodings(
    encodings: EncodingSet,
    file: str | os.PathLike[str],
    format: str | None = None,
    model: str | os.PathLike[str] | GraphTensors | None = None,
) -> None:
    """Write a file that reads back as the same set; the file appears in one piece.

    Args:
        format: one of :data:`FORMATS`; default: the one that the set was read from.
        model: the float model. Needed where the set says what the format leaves to the model (axes, except in AIMET 2.0.0),
            or the other way round.

    Raises:
        EncodingError: the format can't say something of the set: all such things, each with its tensor.
        OptionError: an unknown format, or a file that can't be written.
    """
    path = Path(file).expanduser().absolute()
    document = encodings_document(encodings, encodings.format if format is None else format, model)
    try:
        with replaced_file(path) as draft:
            draft.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{path}: can't be written: {error.strerror or error}. Name another folder") from None


def encodings_document(
    encodings: EncodingSet, format: str, model: str | os.PathLike[str] | GraphTensors | None = None
) -> dict[str, Any]:
    """What :func:`write_encodings` writes, as a JSON object.

    Raises:
        EncodingError, OptionError: as :func:`write_encodings`.
    """
    if format not in FORMATS:
        raise OptionError(unknown_name("encodings format", format, FORMATS))
    graph = read_graph(model) if isinstance(model, str | os.PathLike) else model
    if graph is not None:
        encodings = encodings.bound_to(graph)
    problems: list[str] = []
    if format != AIMET_2 and (unknown := [t.name for t in encodings.tensors if t.kind is None]):
        shown = ", ".join(map(repr, unknown[:5])) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        missing = "name the float model" if graph is None else f"{graph.path.name} doesn't have them"
        problems.append(f"tensors {shown}: the format must say whether they are activations or parameters: {missing}")
    entries: list[tuple[TensorEncoding, Any]] = []
    seen: set[str] = set()
    for tensor in encodings.tensors:
        where = _where(tensor.kind, tensor.name)
        try:
            if tensor.name in seen:
                raise EncodingError("is defined twice")
            seen.add(tensor.name)
            entries.append((tensor, _WRITERS[format](tensor, graph)))
        except EncodingError as error:
            problems.append(f"{where}: {error}")
    refuse(problems, f"{encodings.source or 'the set'} can't be written as {format}")
    document: dict[str, Any] = {
        k: v for k, v in encodings.about.items() if k not in (*SECTIONS, "encodings", "version")
    }
    if format != QNN:
        document["version"] = format.removeprefix("aimet-")
    if format == AIMET_2:
        document["encodings"] = [entry for _, entry in entries]
    for section, kind in SECTIONS.items():
        if format in (AIMET_0, QNN):
            document[section] = {t.name: entry for t, entry in entries if t.kind == kind}
        elif format == AIMET_1:
            document[section] = [entry for t, entry in entries if t.kind == kind]
    return document


# --- reading ------------------------------------------------------------------------------------------------------------


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise EncodingError(f"{path}: the encodings can't be read: {error.strerror}. Check the path") from None
    except UnicodeDecodeError:
        raise EncodingError(
            f"{path}: not an encodings file: it is no text. Formats: {', '.join(FORMATS)}, .onnx"
        ) from None

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(k for k, _ in pairs if sum(k == other for other, _ in pairs) > 1)
            raise EncodingError(f"{path}: {twice!r} is defined twice: JSON readers keep only the last. Remove one")
        return found

    try:
        document = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        line = (text.split("\n")[error.lineno - 1 :] or [""])[0].strip()
        hint = ". JSON has no comments: remove it" if line.startswith(("//", "#", "/*")) else ""
        raise EncodingError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}{hint}"
        ) from None
    except RecursionError:
        raise EncodingError(f"{path}: not an encodings file: it is nested too deeply") from None
    if not isinstance(document, dict):
        raise EncodingError(f"{path}: not an encodings file: expected an object, got {type(document).__name__}")
    return document


def _format_of(document: dict[str, Any], path: Path) -> tuple[str, tuple[str, ...]]:
    """The file's format, and what is to be said of how it was found."""
    version = document.get("version")
    if version is not None:
        if not isinstance(version, str) or version not in VERSIONS:
            raise EncodingError(f"{path}: field 'version': {unknown_name('encodings version', version, VERSIONS)}")
        note = (f"version {version} is read as 2.0.0",) if version == "2.1.0" else ()
        return VERSIONS[version], note
    if "encodings" in document:
        return AIMET_2, ("there is no 'version': read as AIMET 2.0.0, since it has 'encodings'",)
    sections = [document[s] for s in SECTIONS if s in document]
    if not sections:
        raise EncodingError(
            f"{path}: not an encodings file: it has neither {' nor '.join(map(repr, SECTIONS))} nor 'encodings', but "
            f"{', '.join(map(repr, list(document)[:5])) or 'nothing'}"
        )
    if any(isinstance(s, list) for s in sections):
        return AIMET_1, ("there is no 'version': read as AIMET 1.0.0, since its sections are lists",)
    return QNN, ()


def _parse(document: dict[str, Any], path: Path) -> EncodingSet:
    format, notes = _format_of(document, path)
    problems: list[str] = []
    tensors: list[TensorEncoding] = []
    readings: dict[str, list[str]] = {}
    for kind, name, entry in _entries(document, format, path, problems):
        where = _where(kind, name)
        try:
            if format == AIMET_2:
                tensors.append(TensorEncoding(name, None, _read_2(Fields(entry, where))))
            elif format == AIMET_1:
                tensors.append(_read_1(kind, name, Fields(entry, where)))
            else:
                tensor, reading = _read_dicts(kind, name, entry, where, format)
                tensors.append(tensor)
                if reading != USUAL:
                    readings.setdefault(reading, []).append(_deviation(tensor))
        except EncodingError as error:
            text = str(error)
            problems.append(text if text.startswith(where) else f"{where}: {text}")
    refuse(problems, path)
    for reading, names in readings.items():
        sign = "is above 0" if reading == OPPOSITE else "counts from the middle"
        notes += tuple(
            f"{name}: the offset {sign}, unlike QNN's and AIMET's: read as real = {reading}" for name in names[:5]
        )
        if len(names) > 5:
            notes += (f"{len(names) - 5} more tensors are read the same way",)
    about = {k: v for k, v in document.items() if k not in (*SECTIONS, "encodings", "version")}
    if format in (AIMET_0, AIMET_1):
        notes += tuple(
            f"there is no {s!r}, which AIMET writes even if it is empty" for s in SECTIONS if s not in document
        )
    return EncodingSet(tuple(tensors), about, str(path), format, notes)


def _entries(
    document: dict[str, Any], format: str, path: Path, problems: list[str]
) -> Iterator[tuple[Kind | None, str, Any]]:
    """Every entry with its section and tensor."""
    sections: dict[str, Kind | None] = {"encodings": None} if format == AIMET_2 else {**SECTIONS}
    wanted: type = dict if format in (AIMET_0, QNN) else list
    for section, kind in sections.items():
        if section not in document:
            if format == AIMET_2:
                problems.append(f"field {section!r} is missing")
            continue
        value = document[section]
        if not isinstance(value, wanted):
            problems.append(
                f"field {section!r} must be {'an object' if wanted is dict else 'a list'} in {format}, got "
                f"{type(value).__name__}: does the version fit the content?"
            )
        elif isinstance(value, dict):
            for name, entry in value.items():
                yield kind, name, entry
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                try:
                    name = Fields(entry, f"entry {index} of {section!r}").text("name")
                except EncodingError as error:
                    problems.append(str(error))
                else:
                    yield kind, name, entry


def _read_dicts(kind: Kind | None, name: str, entry: Any, where: str, format: str) -> tuple[TensorEncoding, str]:
    """An entry of AIMET 0.6.1 or QNN: a list with one object per channel, or one object; and how its offsets were read."""
    channels = [Fields(e, where) for e in (entry if isinstance(entry, list) else [entry])]
    if not channels:
        raise EncodingError("has no encodings: its list is empty")
    first = channels[0]
    bits = first.whole("bitwidth")
    number = first.text("dtype", ("int", "float")) if first.has("dtype") else "int"
    symmetric = first.flag("is_symmetric")
    for other in channels[1:]:
        for field in ("bitwidth", "dtype", "is_symmetric"):
            if other.values.get(field) != first.values.get(field):
                raise other.bad(field, "differs between channels")
    if number == "float":
        return TensorEncoding(name, kind, Precision("float", bits), Stated(None, symmetric)), USUAL
    ranges = _stated_ranges(channels)
    if not any(c.has("scale") for c in channels):
        if any(c.has("offset") for c in channels):
            raise first.bad("scale", "is missing, though there is an offset")
        if ranges is None:
            if format == AIMET_0:
                raise first.bad("scale", "is missing")
            return TensorEncoding(name, kind, Precision("int", bits), Stated(None, symmetric)), USUAL
        scales, offsets = map(list, zip(*(from_range(a, b, bits, symmetric) for a, b in ranges), strict=True))
        value = encoding_of(scales, offsets, bits, symmetric)
        return TensorEncoding(name, kind, value, Stated(ranges, symmetric)), USUAL
    scales = [s for c in channels for s in c.numbers("scale")]
    offsets = [o for c in channels for o in c.wholes("offset")]
    _same_length(first, scales, offsets)
    if ranges is not None and len(ranges) != len(scales):
        raise first.bad("min", f"has {len(ranges)} values for {len(scales)} scales")
    reading = USUAL
    if format == QNN and all(math.isfinite(s) and s > 0 for s in scales) and bits in INTEGER_BITS.values():
        reading = reading_of(scales, offsets, bits, symmetric, ranges)
    value = encoding_of(scales, offsets, bits, symmetric, reading)
    return TensorEncoding(name, kind, value, Stated(ranges, symmetric)), reading


def _stated_ranges(channels: list[Fields]) -> tuple[Range, ...] | None:
    if not any(c.has("min") or c.has("max") for c in channels):
        return None
    low = [v for c in channels for v in c.numbers("min")]
    high = [v for c in channels for v in c.numbers("max")]
    if len(low) != len(high):
        raise channels[0].bad("min", f"has {len(low)} values, 'max' {len(high)}")
    return tuple(zip(low, high, strict=True))


def _read_1(kind: Kind | None, name: str, fields: Fields) -> TensorEncoding:
    """An entry of AIMET 1.0.0."""
    bits = fields.whole("bw")
    kinds = ("PER_TENSOR", "PER_CHANNEL", "PER_BLOCK", "LPBQ")
    granularity = fields.text("enc_type", kinds)
    if fields.text("dtype", ("INT", "FLOAT")) == "FLOAT":
        return TensorEncoding(name, kind, Precision("float", bits))
    if granularity == "LPBQ":
        raise fields.bad("enc_type", "is LPBQ, scales of two levels, which ONNX's quantisers don't have")
    symmetric = fields.flag("is_sym")
    if symmetric is None:
        raise fields.bad("is_sym", "is missing")
    scales, offsets = fields.numbers("scale"), fields.wholes("offset")
    _same_length(fields, scales, offsets)
    if fields.has("zero_point_shift") and any(fields.numbers("zero_point_shift")):
        raise fields.bad("zero_point_shift", "moves zero between two integers, which ONNX's quantisers can't")
    if granularity == "PER_TENSOR" and len(scales) != 1:
        raise fields.bad("scale", f"has {len(scales)} values in a PER_TENSOR encoding")
    block = fields.whole("block_size") if granularity == "PER_BLOCK" else None
    return TensorEncoding(
        name, kind, encoding_of(scales, offsets, bits, symmetric, USUAL, block), Stated(None, symmetric)
    )


def _read_2(fields: Fields) -> Encoding:
    """An entry of AIMET 2.0.0."""
    if "per_block_int_scale" in fields.values or isinstance(fields.values.get("y_scale"), dict):
        field = "per_block_int_scale" if "per_block_int_scale" in fields.values else "y_scale"
        raise fields.bad(field, "makes this LPBQ, scales of two levels, which ONNX's quantisers don't have")
    dtype = fields.text("output_dtype")
    if dtype not in INTEGER_BITS:
        raise fields.bad("output_dtype", f"is {dtype!r}; only {', '.join(INTEGER_BITS)} can be applied")
    scales, shape = fields.array("y_scale")
    zero, zero_shape = ([0] * len(scales), shape)
    if fields.has("y_zero_point"):
        zero, zero_shape = fields.array("y_zero_point", whole=True)
    if zero_shape != shape:
        raise fields.bad("y_zero_point", f"has shape {list(zero_shape)}, 'y_scale' {list(shape)}")
    axis = fields.whole("axis") if fields.has("axis") else None
    block = fields.whole("block_size") if fields.has("block_size") else None
    if axis is None and (block is not None or len(scales) > 1):
        raise fields.bad("axis", "is missing, though there is more than one scale")
    if block is None and len(shape) > 1:
        raise fields.bad("y_scale", f"has {len(shape)} dimensions, but there is no 'block_size'")
    if block is not None and not shape:
        raise fields.bad("y_scale", "is one number, but there is a 'block_size'")
    return Encoding(tuple(scales), tuple(zero), dtype, axis, block, shape if block is not None else None)


def _same_length(fields: Fields, scales: list[float], offsets: list[int]) -> None:
    if len(scales) != len(offsets) or not scales:
        raise fields.bad("offset", f"has {len(offsets)} values, 'scale' {len(scales)}")


def _where(kind: Kind | None, name: str) -> str:
    return f"{kind or 'tensor'} {name!r}"


def _deviation(tensor: TensorEncoding) -> str:
    """A tensor with the range that was stated and the one that its scale and offset really give."""
    where = _where(tensor.kind, tensor.name)
    if tensor.encoding is None or tensor.stated.ranges is None:
        return where
    (low, high), (a, b) = tensor.encoding.ranges[0], tensor.stated.ranges[0]
    real = "" if (low, high) == (a, b) else f", really {low:.6g} .. {high:.6g}"
    return f"{where} (min and max {a:g} .. {b:g}{real})"


# --- writing ------------------------------------------------------------------------------------------------------------


def _write_dicts(tensor: TensorEncoding, graph: GraphTensors | None, format: str) -> list[dict[str, Any]]:
    """An entry of AIMET 0.6.1 or QNN."""
    value = tensor.value
    if isinstance(value, Precision):
        if value.number == "int" and format == AIMET_0:
            raise EncodingError(f"{value} without a scale can't be said")
        return [{"bitwidth": value.bits, "dtype": value.number}]
    if value.block_size is not None:
        raise EncodingError(f"block_size {value.block_size} can't be said")
    value = _finite(_without_axis(tensor.name, value, graph))
    symmetric = value.symmetric or bool(tensor.stated.symmetric)
    return [
        {
            "bitwidth": value.bits,
            "dtype": "int",
            "is_symmetric": str(symmetric),
            "max": high,
            "min": low,
            "offset": offset,
            "scale": scale,
        }
        for scale, offset, (low, high) in zip(value.scale, offsets_of(value), value.ranges, strict=True)
    ]


def _write_1(tensor: TensorEncoding, graph: GraphTensors | None) -> dict[str, Any]:
    """An entry of AIMET 1.0.0."""
    value = tensor.value
    if isinstance(value, Precision):
        if value.number == "int":
            raise EncodingError(f"{value} without a scale can't be said")
        return {"name": tensor.name, "enc_type": "PER_TENSOR", "dtype": "FLOAT", "bw": value.bits}
    value = _finite(_without_axis(tensor.name, value, graph))
    granularity = (
        "PER_BLOCK" if value.block_size is not None else "PER_CHANNEL" if len(value.scale) > 1 else "PER_TENSOR"
    )
    return {
        "name": tensor.name,
        "enc_type": granularity,
        "dtype": "INT",
        "bw": value.bits,
        "is_sym": value.symmetric or bool(tensor.stated.symmetric),
        "scale": list(value.scale),
        "offset": list(offsets_of(value)),
        **({} if value.block_size is None else {"block_size": value.block_size}),
    }


def _write_2(tensor: TensorEncoding, graph: GraphTensors | None) -> dict[str, Any]:
    """An entry of AIMET 2.0.0."""
    value = tensor.value
    if isinstance(value, Precision):
        raise EncodingError(f"{value} without a scale can't be said")
    if value.unbound:
        raise EncodingError(
            f"has {len(value.scale)} scales, and this format must say along which axis: "
            + ("the model can't tell either" if graph else "name the float model")
        )
    _finite(value)
    shape = value.scale_shape or ((len(value.scale),) if len(value.scale) > 1 else ())
    entry: dict[str, Any] = {
        "name": tensor.name,
        "output_dtype": value.dtype,
        "y_scale": np.reshape(value.scale, shape).tolist(),
    }
    if any(value.zero_point):
        entry["y_zero_point"] = np.reshape(value.zero_point, shape).tolist()
    if value.axis is not None:
        entry["axis"] = value.axis
    if value.block_size is not None:
        entry["block_size"] = value.block_size
    return entry


def _without_axis(name: str, encoding: Encoding, graph: GraphTensors | None) -> Encoding:
    """The encoding without its axis, which the format leaves to the model."""
    if encoding.axis is None:
        return encoding
    if graph is None:
        raise EncodingError(
            f"axis {encoding.axis} can't be said: this format means the output channels' axis. Name the float model, so that "
            "it can be checked"
        )
    free = graph.unbind(name, encoding)
    if free is None:
        raise EncodingError(f"axis {encoding.axis} can't be said: this format means the output channels' axis")
    return free


def _finite(encoding: Encoding) -> Encoding:
    for scale in encoding.scale:
        if not math.isfinite(scale):
            raise EncodingError(f"scale {scale} can't be said")
    return encoding


_WRITERS: dict[str, Callable[[TensorEncoding, GraphTensors | None], Any]] = {
    AIMET_0: lambda tensor, graph: _write_dicts(tensor, graph, AIMET_0),
    AIMET_1: _write_1,
    AIMET_2: _write_2,
    QNN: lambda tensor, graph: _write_dicts(tensor, graph, QNN),
}
