"""From a float ONNX model and calibration data to the QDQ model that QNN's HTP backend takes.

Built on onnxruntime.quantization: its preparation for QNN, its configuration for QNN, its quantiser. What is added is what
users stumble over: checked data in bounded memory, models with metadata, batch sizes, folded normalisations, a result that
appears in one piece, and a report.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn.errors import InputError, ModelError, OptionError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.onnx_file import dtype_name, load_proto, read_model
from pytest_qnn.model.saved_model import save_model
from pytest_qnn.quantization.calibration import Sample, open_calibration_data
from pytest_qnn.quantization.options import ACTIVATIONS, BINS, QuantizationOptions
from pytest_qnn.quantization.preparation import (
    STANDARD,
    check_model,
    check_output,
    check_size,
    every_node,
    first_line,
    prepare,
)
from pytest_qnn.quantization.report import CalibrationReport, InputWatch, build_report
from pytest_qnn.settings import unknown_name
from pytest_qnn.work_folder import work_folder

METADATA_KEY = "pytest_qnn.quantization"


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
        data: calibration samples: see :func:`~pytest_qnn.quantization.calibration.open_calibration_data`.
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
    check_size(source, proto)  # before the model's files are read from end to end
    given = read_model(source, chosen.dimensions)
    check_model(source, proto, given)
    check_output(target, source)
    origin = _Origin.of(proto)
    samples = open_calibration_data(data, given.inputs, chosen.samples, chosen.raw_type)
    watch = InputWatch()
    notes: list[str] = []
    with _collected_warnings(notes), work_folder() as work:
        prepared = prepare(source, proto, chosen, work, notes)
        del proto  # it may be large
        counted = _report_progress(samples, samples.count if chosen.samples is None else chosen.samples, progress)
        draft, ranges = _quantize(source, prepared, watch.watch(counted), chosen, work)
        encodings = _write(draft, origin, target, chosen)
    asked = 1 - chosen.covered / 100 if chosen.method == "percentile" else 0.0
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


# --- quantising ---------------------------------------------------------------------------------------------------------


def _quantize(
    source: Path, prepared: Path, samples: Iterable[Sample], options: QuantizationOptions, work: Path
) -> tuple[Path, Any]:
    """The quantised model, not yet where it belongs, and the ranges."""
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    from pytest_qnn.quantization.ranges import calibrate

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
            percentile=options.covered,
            bins=options.bins or BINS[options.method],
            folder=work,
            fixed={name: (float(low), float(high)) for name, (low, high) in options.ranges.items()},
        )
    except (RuntimeError, ValueError) as error:  # onnxruntime's own errors derive from RuntimeError
        if isinstance(error, InputError | ModelError | OptionError):
            raise
        raise ModelError(
            f"{source}: onnxruntime failed while it ran the float model on calibration data: {first_line(error)}"
        ) from error
    cache, draft = work / "ranges.json", work / "quantized.onnx"
    save_tensors_data(ranges.tensors, cache)
    try:
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
    except Exception as error:  # whatever onnxruntime's quantiser raises for a model that it can't take
        raise ModelError(
            f"{source}: onnxruntime's quantiser can't take the model: {first_line(error)}. Try other options "
            "(without per_channel, another bit width), or quantise a part of it (onnx.utils.extract_model)"
        ) from error
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
    """Put the quantised model in its place; returns the encodings of its activations, by their name in the float model."""
    model = onnx.load(str(draft))
    chosen = {k: v for k, v in asdict(options).items() if v != getattr(QuantizationOptions(), k)}
    properties = dict(origin.metadata) | {METADATA_KEY: json.dumps(chosen, sort_keys=True)}
    helper.set_model_props(model, properties)
    used = {node.domain for node in every_node(model.graph)}
    for opset in [o for o in model.opset_import if o.domain not in STANDARD and o.domain not in used]:
        model.opset_import.remove(opset)  # onnxruntime adds all that it knows
    encodings = _activation_encodings(model)
    save_model(model, target, origin.external if options.external_data is None else options.external_data)
    return encodings


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
