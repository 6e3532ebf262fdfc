"""From a float ONNX model and calibration data to the QDQ model that QNN's HTP backend takes.

Built on onnxruntime.quantization: its preparation for QNN, its configuration for QNN, its quantiser. What is added is what
users stumble over: checked data in bounded memory, models with metadata, batch sizes, folded normalisations, a result that
appears in one piece, and a report.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn.errors import InputError, ModelError, OptionError
from pytest_qnn.model.calibration import Sample, open_calibration_data
from pytest_qnn.model.calibration_report import CalibrationReport, InputWatch, build_report
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.onnx_file import Model, dtype_name, load_proto, read_model
from pytest_qnn.model.replaced_file import replaced_file
from pytest_qnn.settings import unknown_name

METHODS = ("minmax", "entropy", "percentile")
ACTIVATIONS = {"8": "uint8", "16": "uint16", "uint8": "uint8", "uint16": "uint16", "int8": "int8"}
WEIGHTS = (4, 8, 16)
# onnxruntime's own defaults, but for entropy: with its 128 bins its search has one candidate, the whole range
BINS = {"minmax": 0, "entropy": 512, "percentile": 2048}
# Protobuf's limit for one message, less room for what quantising adds
LARGEST_MODEL = (1 << 31) - (64 << 20)
METADATA_KEY = "pytest_qnn.quantization"
_STANDARD = ("", "ai.onnx")
_RUNNABLE = (*_STANDARD, "ai.onnx.ml", "com.microsoft")


@dataclass(frozen=True)
class QuantizationOptions:
    """How to quantise.

    Attributes:
        activations: 8 or 16 bits, or "uint8", "uint16", "int8".
        weights: 4, 8 or 16 bits.
        per_channel: a scale for each output channel of convolutions' weights, which are symmetric then. Their 4-bit weights
            always are: QNN's HTP refuses others.
        method: "minmax", "entropy" or "percentile".
        percentile: share of values, in percent, that a range must cover.
        bins: of the histogram for "entropy" and "percentile"; None: 512 and 2048.
        symmetric_activations: ranges of activations are symmetric around zero.
        symmetric_weights: the same for weights; None: where they are signed.
        overrides: bit widths of single tensors, activations (8, 16) or weights (4, 8, 16), by name.
        ranges: (low, high) of single activations, by name, in place of what calibration finds.
        dimensions: sizes for named dynamic dimensions.
        samples: use the first so many samples only; None: all.
        raw_type: what .raw files hold: "float32" or "native".
        external_data: weights in a file beside the model; None: as the float model has it.
    """

    activations: int | str = 8
    weights: int = 8
    per_channel: bool = False
    method: str = "minmax"
    percentile: float = 99.999
    bins: int | None = None
    symmetric_activations: bool = False
    symmetric_weights: bool | None = None
    overrides: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    dimensions: Mapping[str, int] = field(default_factory=dict)
    samples: int | None = None
    raw_type: str = "float32"
    external_data: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.activations, bool) or str(self.activations) not in (*ACTIVATIONS, "int16"):
            raise OptionError(f"activations: must be 8, 16, uint8, uint16 or int8, got {self.activations!r}")
        if self.activations == "int16":
            raise OptionError(
                "activations: signed 16-bit activations don't compile on QNN's HTP backend: use 16 (uint16), if need be "
                "with symmetric_activations (zero point 32768)"
            )
        if isinstance(self.weights, bool) or self.weights not in WEIGHTS:
            raise OptionError(f"weights: must be 4, 8 or 16 bits, got {self.weights!r}")
        if self.method not in METHODS:
            raise OptionError(f"method: {unknown_name('method', str(self.method), METHODS)}")
        if (
            isinstance(self.percentile, bool)
            or not isinstance(self.percentile, int | float)
            or not 50 < self.percentile <= 100
        ):
            raise OptionError(f"percentile: must be over 50 and at most 100, got {self.percentile!r}")
        if self.bins is not None and (
            isinstance(self.bins, bool)
            or not isinstance(self.bins, int)
            or not 128 <= self.bins <= 4096
            or self.bins % 2
        ):
            raise OptionError(f"bins: must be an even number of 128 to 4096, got {self.bins!r}")
        for name in ("overrides", "ranges", "dimensions"):
            if not isinstance(getattr(self, name), Mapping):
                raise OptionError(f"{name}: must be a dict by name, got {getattr(self, name)!r}")
        for tensor, bits in self.overrides.items():
            if isinstance(bits, bool) or bits not in WEIGHTS:
                raise OptionError(f"overrides: {tensor!r}: must be 4, 8 or 16 bits, got {bits!r}")
        for tensor, bounds in self.ranges.items():
            try:
                low, high = (float(b) for b in bounds)
            except (TypeError, ValueError):
                raise OptionError(f"ranges: {tensor!r}: must be a pair (low, high), got {bounds!r}") from None
            if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high and low < high):
                raise OptionError(
                    f"ranges: {tensor!r}: {low:g} .. {high:g} must be finite and contain zero, which every encoding can write"
                )

    @property
    def name(self) -> str:
        """Short name, e.g. ``A16W8``."""
        return f"A{16 if '16' in str(self.activations) else 8}W{self.weights}"


@dataclass(frozen=True)
class QuantizationResult:
    """A quantised model.

    Attributes:
        path: the QDQ model.
        float_model: the model it was made from, with the same inputs and outputs: what to pass as ``float_model`` to ``load``.
        options: how it was quantised.
        report: what calibration found.
        notes: what was done to the model on the way, and what onnxruntime warned of.
    """

    path: Path
    float_model: Path
    options: QuantizationOptions
    report: CalibrationReport
    notes: tuple[str, ...]


def quantize(
    model: str | os.PathLike[str],
    data: object,
    output: str | os.PathLike[str],
    *,
    progress: Callable[[int, int | None], None] | None = None,
    **options: Any,
) -> QuantizationResult:
    """Quantise a float model for QNN; ``output`` appears when it is complete.

    onnxruntime's CPU runs the float model in this process, on one sample after the other: memory does not grow with their
    number.

    Args:
        model: float ONNX file, below 2 GiB with its external data.
        data: calibration samples: see :func:`~pytest_qnn.model.calibration.open_calibration_data`.
        output: ONNX file to write.
        progress: called after each sample with the number of samples done, and their total where it is known.
        **options: fields of :class:`QuantizationOptions`, e.g. ``activations=16, per_channel=True``.

    Raises:
        ModelError: the model can't be read or can't be quantised.
        InputError: the data doesn't fit.
        OptionError: a bad option, or ``output`` can't be written.
    """
    known = set(QuantizationOptions.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise OptionError(unknown_name("option", name, known))
    chosen = QuantizationOptions(**options)
    source, target = Path(model).expanduser().absolute(), Path(output).expanduser().absolute()
    proto = load_proto(source)
    _check_size(source, proto)  # before the model's files are read from end to end
    given = read_model(source, chosen.dimensions)
    _check_model(source, proto, given)
    _check_output(target, source)
    origin = _Origin.of(proto)
    samples = open_calibration_data(data, given.inputs, chosen.samples, chosen.raw_type)
    watch = InputWatch()
    notes: list[str] = []
    with _collected_warnings(notes), tempfile.TemporaryDirectory(prefix="pytest-qnn-quantize-") as name:
        work = Path(name)
        prepared = _prepare(source, proto, chosen, work, notes)
        del proto  # it may be large
        counted = _report_progress(samples, samples.count if chosen.samples is None else chosen.samples, progress)
        draft, ranges = _quantize(prepared, watch.watch(counted), chosen, work)
        encodings = _write(draft, origin, target, chosen)
    asked = 1 - chosen.percentile / 100 if chosen.method == "percentile" else 0.0
    report = build_report(ranges, encodings, watch, chosen.method, asked)
    if not encodings:
        notes.append("nothing in the model could be quantised")
    return QuantizationResult(target, source, chosen, report, tuple(dict.fromkeys(notes)))


def _report_progress(
    samples: Iterable[Sample], total: int | None, progress: Callable[[int, int | None], None] | None
) -> Iterator[Sample]:
    for done, sample in enumerate(samples, 1):
        yield sample
        if progress is not None:
            progress(done, total if total is None or done <= total else None)


@dataclass(frozen=True)
class _Origin:
    """What of the float model is needed once it was prepared: it may be large, and isn't kept."""

    metadata: tuple[tuple[str, str], ...]
    external: bool

    @classmethod
    def of(cls, proto: Any) -> _Origin:
        """Take it from the model."""
        external = any(t.data_location == TensorProto.EXTERNAL for t in proto.graph.initializer)
        return cls(tuple((p.key, p.value) for p in proto.metadata_props), external)


# --- what is refused ----------------------------------------------------------------------------------------------------


def _check_size(file: Path, proto: Any) -> None:
    size = sum(_bytes(tensor) for tensor in proto.graph.initializer)
    if size > LARGEST_MODEL:
        raise ModelError(
            f"{file}: {size / 2**30:.1f} GiB of weights: onnxruntime's quantiser takes models below 2 GiB. Split the model "
            "(onnx.utils.extract_model) and quantise its parts; nothing was written"
        )


def _check_model(file: Path, proto: Any, given: Model) -> None:
    if given.context:
        raise ModelError(f"{file}: a wrapper around a context binary can't be quantised: pass the float model")
    if given.quantized:
        raise ModelError(
            f"{file}: already quantised ({given.precision}): pass the float model it was made from, or use this one as it is"
        )
    functions = {(f.domain, f.name) for f in proto.functions}
    for node in _nodes(proto.graph):
        if node.domain not in _RUNNABLE and (node.domain, node.op_type) not in functions:
            raise ModelError(
                f"{file}: node {node.name!r} is {node.domain}::{node.op_type}, of a custom domain: onnxruntime has no kernel to "
                "calibrate it with and QNN none to run it. Replace it by ONNX operators, or quantise the parts around it"
            )
    for spec in given.inputs:
        if spec.unbound:
            named = [d for d in spec.unbound if not d.startswith("?")]
            hint = (
                f"pass dimensions={{{named[0]!r}: 1}} (--dimensions {named[0]}=1)"
                if named
                else "export it with fixed shapes"
            )
            raise ModelError(
                f"{file}: input {spec.describe()} has dynamic dimensions, and QNN runs fixed shapes only: {hint}"
            )
    if not any(n.op_type for n in proto.graph.node):
        raise ModelError(f"{file}: the model has no nodes: there is nothing to quantise")


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _bytes(tensor: Any) -> int:
    """Size of a constant, from its shape."""
    try:
        width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        width = 1
    return int(math.prod(tensor.dims) * width)


def _check_output(target: Path, source: Path) -> None:
    """Find out before the work whether the result can be written.

    Raises:
        OptionError: it can't.
    """
    if target.is_dir():
        raise OptionError(f"output {target}: this is a folder, name a file")
    if target == source or (target.exists() and target.samefile(source)):
        raise OptionError(
            f"output {target}: this is the float model, which the tests need as their reference: name another file"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OptionError(
            f"output {target}: can't be written: {error.strerror or error}. Name another folder"
        ) from None


# --- preparing the float model ------------------------------------------------------------------------------------------


def _prepare(source: Path, model: Any, options: QuantizationOptions, work: Path, notes: list[str]) -> Path:
    """The float model as onnxruntime quantises it best: fixed shapes, constants and normalisations folded, all nodes named."""
    from onnxruntime.quantization.execution_providers.qnn import qnn_preprocess_model
    from onnxruntime.tools.onnx_model_utils import optimize_model

    onnx.load_external_data_for_model(model, str(source.parent))
    del model.metadata_props[:]  # onnxruntime's qnn_preprocess_model raises TypeError on them; _write puts them back
    if model.functions:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
        notes.append("inlined the model's own functions")
    _fix_shapes(model, options.dimensions)
    model = _upgrade(source, model, options, notes)
    fixed, folded = work / "fixed.onnx", work / "prepared.onnx"
    outside: dict[str, Any] = {"save_as_external_data": True, "all_tensors_to_one_file": True}
    try:
        # with its weights in a file of their own a model is small, and it is read and written often from here on
        onnx.save(model, str(fixed), location="fixed.data", **outside)
        del model
        if not qnn_preprocess_model(
            fixed, folded, exclude_initializer_from_input=True, external_data_location="prepared.data", **outside
        ):
            # nothing was fused, so what it folded wasn't written
            optimize_model(fixed, work / "inline.onnx")
            onnx.save(onnx.load(str(work / "inline.onnx")), str(folded), location="prepared.data", **outside)
    except Exception as error:  # whatever onnx and onnxruntime raise for a model that they can't take
        raise ModelError(
            f"{source}: onnxruntime can't prepare the model: {_first_line(error)}. It must run on onnxruntime's CPU first"
        ) from error
    nodes = onnx.load(str(folded), load_external_data=False).graph.node
    for node in nodes:  # looked for only now: folding may have removed those whose condition is constant
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            # onnxruntime takes Relu and Clip away where a quantiser clips: subgraphs would read values that nobody clipped
            raise ModelError(
                f"{source}: node {node.name!r} ({node.op_type}) has a subgraph: QNN runs no control flow, and quantising around "
                "it makes it read wrong values. Export the model with its condition or loop fixed, or quantise the parts"
            )
    return folded


def _fix_shapes(model: Any, dimensions: Mapping[str, int]) -> None:
    constants = {i.name for i in model.graph.initializer}
    for value in [v for v in model.graph.input if v.name in constants]:
        model.graph.input.remove(value)  # old exporters list weights as inputs: they wouldn't count as constants
    model.ir_version = max(model.ir_version, 4)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in dimensions:
                dim.dim_value = int(dimensions[dim.dim_param])
    if dimensions:
        del model.graph.value_info[:]  # they still speak of the dynamic sizes


def _upgrade(source: Path, model: Any, options: QuantizationOptions, notes: list[str]) -> Any:
    """The model in an opset whose QuantizeLinear has the types that are asked for: 21 for 16 and 4 bits, else 13."""
    from onnx import version_converter

    opset = next((o.version for o in model.opset_import if o.domain in _STANDARD), 0)
    widths = {16 if "16" in str(options.activations) else 8, options.weights, *options.overrides.values()}
    wanted, reason = (21, "16- and 4-bit types need") if widths - {8} else (13, "QuantizeLinear with an axis needs")
    if opset >= wanted:
        return model
    try:
        upgraded = version_converter.convert_version(model, wanted)
    except Exception as error:  # the converter lacks some operators' steps
        raise ModelError(
            f"{source}: opset {opset} can't be upgraded to {wanted}, which {reason}: {_first_line(error)}. Export "
            f"the model with opset {wanted}"
        ) from error
    notes.append(f"upgraded from opset {opset} to {wanted}, which {reason}")
    return upgraded


# --- quantising ---------------------------------------------------------------------------------------------------------


def _quantize(prepared: Path, samples: Iterable[Sample], options: QuantizationOptions, work: Path) -> tuple[Path, Any]:
    """The quantised model, not yet where it belongs, and the ranges."""
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    from pytest_qnn.model.calibration_ranges import calibrate

    try:
        from onnxruntime.quantization import save_tensors_data
    except ImportError:
        raise OptionError("quantising needs a newer onnxruntime (1.27 or later): pip install -U onnxruntime") from None
    symmetric = options.per_channel or options.weights != 8 or options.symmetric_weights is True
    weight_types = {4: QuantType.QInt4, 8: QuantType.QInt8 if symmetric else QuantType.QUInt8, 16: QuantType.QInt16}
    kinds = {"uint8": QuantType.QUInt8, "uint16": QuantType.QUInt16, "int8": QuantType.QInt8}
    activation_type = kinds[ACTIVATIONS[str(options.activations)]]
    if activation_type == QuantType.QInt8 and weight_types[options.weights] == QuantType.QUInt8:
        weight_types[8] = QuantType.QInt8  # the only pair that onnxruntime takes
    config = get_qnn_qdq_config(
        prepared,
        None,
        activation_type=activation_type,
        weight_type=weight_types[options.weights],
        per_channel=options.per_channel,
        init_overrides=_overrides(prepared, options, weight_types, kinds),
        activation_symmetric=options.symmetric_activations,
        weight_symmetric=options.symmetric_weights if options.symmetric_weights is not None else symmetric,
    )
    try:
        ranges = calibrate(
            prepared,
            samples,
            operators=config.op_types_to_quantize,
            method=options.method,
            percentile=float(options.percentile),
            bins=options.bins or BINS[options.method],
            folder=work,
            fixed={name: (float(low), float(high)) for name, (low, high) in options.ranges.items()},
        )
    except (RuntimeError, ValueError) as error:  # onnxruntime's own errors derive from RuntimeError
        if isinstance(error, InputError | ModelError | OptionError):
            raise
        raise ModelError(
            f"{prepared.name}: onnxruntime failed while it ran the float model on calibration data: {_first_line(error)}"
        ) from error
    cache, draft = work / "ranges.json", work / "quantized.onnx"
    save_tensors_data(ranges.tensors, cache)
    quantize_static(
        prepared,
        draft,
        quant_format=config.quant_format,
        op_types_to_quantize=config.op_types_to_quantize,
        per_channel=config.per_channel,
        reduce_range=config.reduce_range,
        activation_type=config.activation_type,
        weight_type=config.weight_type,
        nodes_to_quantize=config.nodes_to_quantize,
        nodes_to_exclude=config.nodes_to_exclude,
        extra_options=config.extra_options,
        calibration_cache_path=cache,
    )
    return draft, ranges


def _overrides(
    prepared: Path, options: QuantizationOptions, weight_types: Mapping[int, Any], kinds: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Overrides of single tensors as onnxruntime writes them."""
    graph = onnx.load(str(prepared), load_external_data=False).graph
    constants = {i.name for i in graph.initializer}
    floats = {v.name for v in (*graph.input, *graph.output)} | {o for n in graph.node for o in n.output if o}
    channel_axis = {
        n.input[1]: 1 if n.op_type == "ConvTranspose" else 0
        for n in graph.node
        if n.op_type in ("Conv", "ConvTranspose")
    }
    made: dict[str, list[dict[str, Any]]] = {}
    for option, names in (("overrides", options.overrides), ("ranges", options.ranges)):
        for name in names:
            if name not in floats and (option == "ranges" or name not in constants):
                known = floats | (constants if option == "overrides" else set())
                import difflib

                near = (
                    difflib.get_close_matches(name, known, n=8, cutoff=0.3) or sorted(known)[:8]
                )  # there may be thousands
                raise OptionError(f"{option}: {unknown_name('tensor', name, near)}, ... ({len(known)} in all)")
    widths = {name: 4 for name in channel_axis if options.weights == 4 and name in constants} | dict(options.overrides)
    for name, bits in widths.items():
        if name in constants:
            override: dict[str, Any] = {"quant_type": weight_types[bits], "symmetric": True}
            if bits == 8:
                override["symmetric"] = options.per_channel or bool(options.symmetric_weights)
            if name in channel_axis and (
                options.per_channel or bits == 4
            ):  # the HTP takes 4-bit convolutions in no other way
                override["axis"] = channel_axis[name]
        elif bits == 4:
            raise OptionError(f"overrides: {name!r} is an activation: 8 or 16 bits, got 4")
        else:
            override = {"quant_type": kinds[f"uint{bits}"]}
        made[name] = [override]
    for name, (low, high) in options.ranges.items():
        bounds = {"rmin": np.array(low, np.float32), "rmax": np.array(high, np.float32)}
        made.setdefault(name, [{}])[0].update(bounds)
    return made


# --- writing the result -------------------------------------------------------------------------------------------------


def _write(draft: Path, origin: _Origin, target: Path, options: QuantizationOptions) -> dict[str, Encoding]:
    """Put the quantised model in its place; returns the encodings of its activations, by their name in the float model.

    With external data the weights lie in ``<output>.<digest>.data``: named by content, so that at no moment a model and
    weights of different runs stand together.
    """
    model = onnx.load(str(draft))
    chosen = {k: v for k, v in asdict(options).items() if v != getattr(QuantizationOptions(), k)}
    properties = dict(origin.metadata) | {METADATA_KEY: json.dumps(chosen, sort_keys=True)}
    helper.set_model_props(model, properties)
    used = {node.domain for node in _nodes(model.graph)}
    for opset in [o for o in model.opset_import if o.domain not in _STANDARD and o.domain not in used]:
        model.opset_import.remove(opset)  # onnxruntime adds all that it knows
    encodings = _activation_encodings(model)
    external = origin.external if options.external_data is None else options.external_data
    data = None
    try:
        if external:
            data = _write_weights(model, target)
        with replaced_file(target) as file:
            onnx.save(model, str(file))
    except OSError as error:
        if data is not None:
            data.unlink(missing_ok=True)
        raise OptionError(
            f"output {target}: can't be written: {error.strerror or error}. Free some space or name another folder"
        ) from None
    for old in target.parent.glob(f"{target.name}.*.data"):
        if old != data and len(old.name) == len(target.name) + len(".0123456789abcdef.data"):
            with suppress(OSError):
                old.unlink()
    return encodings


def _write_weights(model: Any, target: Path) -> Path | None:
    """Move the weights of ``model`` to a file of their own beside ``target``; None if there are no large ones."""
    digest = sha256()
    large = [t for t in model.graph.initializer if t.HasField("raw_data") and len(t.raw_data) >= 128]
    for tensor in large:
        digest.update(tensor.raw_data)
    if not large:
        return None
    data = target.with_name(f"{target.name}.{digest.hexdigest()[:16]}.data")
    with replaced_file(data) as file, file.open("wb") as f:
        for tensor in large:
            f.write(b"\0" * (-f.tell() % 4096))  # page-aligned, so that runtimes can map it
            offset, length = f.tell(), len(tensor.raw_data)
            f.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    return data


def _activation_encodings(model: Any) -> dict[str, Encoding]:
    """Encoding of each tensor that a QuantizeLinear node quantises; of several, the finest.

    Left out is what only a Relu or Clip reads: its encoding is that operator's range, and what it clips is meant to be.
    """
    constants = {i.name: i for i in model.graph.initializer}
    readers: dict[str, list[Any]] = {v.name: [None] for v in model.graph.output}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def operators(name: str) -> set[str]:
        """Types of those that read a tensor, past quantisers."""
        found: set[str] = set()
        for node in readers.get(name, []):
            quantizer = node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear")
            found |= operators(node.output[0]) if quantizer else {node.op_type if node is not None else "output"}
        return found

    found: dict[str, Encoding] = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or not set(node.input[1:]) <= constants.keys() or len(node.input) < 3:
            continue
        if operators(node.output[0]) <= {"Relu", "Clip"}:
            continue
        scale, zero = (numpy_helper.to_array(constants[name]).reshape(-1) for name in node.input[1:3])
        dtype = dtype_name(constants[node.input[2]].data_type)
        encoding = Encoding(tuple(float(s) for s in scale), tuple(int(z) for z in zero), dtype)
        name = node.input[0]
        if name not in found or encoding.bits > found[name].bits:
            found[name] = encoding
    producer = {output: node for node in model.graph.node for output in node.output}
    for value in model.graph.output:  # their tensors have other names before the quantiser
        node = producer.get(value.name)
        while node is not None and node.op_type == "DequantizeLinear":
            node = producer.get(node.input[0])
        if node is not None and node.op_type == "QuantizeLinear" and node.input[0] in found:
            found[value.name] = found.pop(node.input[0])
    return found


# --- messages -----------------------------------------------------------------------------------------------------------


@contextmanager
def _collected_warnings(notes: list[str]) -> Iterator[None]:
    """Take what onnxruntime logs on the root logger as notes, in place of lines between the program's own output."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            # what it says of nodes that it gave names, and its advice to do what was just done, help nobody
            if record.levelno >= logging.WARNING and "preproc_node" not in text and "pre-processing" not in text:
                notes.append(text)

    root, handler = logging.getLogger(), Handler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
