"""A float model as onnxruntime quantises it best, and the models that it can't quantise, refused."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from pytest_qnn.errors import ModelError, OptionError
from pytest_qnn.model.onnx_file import Model
from pytest_qnn.quantization.options import QuantizationOptions

# Protobuf's limit for one message, less room for what quantising adds
LARGEST_MODEL = (1 << 31) - (64 << 20)
STANDARD = ("", "ai.onnx")
_RUNNABLE = (*STANDARD, "ai.onnx.ml", "com.microsoft")


# --- what is refused ----------------------------------------------------------------------------------------------------


def check_size(file: Path, proto: Any) -> None:
    size = sum(_bytes(tensor) for tensor in proto.graph.initializer)
    if size > LARGEST_MODEL:
        raise ModelError(
            f"{file}: {size / 2**30:.1f} GiB of weights: onnxruntime's quantiser takes models below 2 GiB. Split the model "
            "(onnx.utils.extract_model) and quantise its parts; nothing was written"
        )


def check_model(file: Path, proto: Any, given: Model) -> None:
    if given.context:
        raise ModelError(f"{file}: a wrapper around a context binary can't be quantised: pass the float model")
    if given.quantized:
        raise ModelError(
            f"{file}: already quantised ({given.precision}): pass the float model it was made from, or use this one as it is"
        )
    functions = {(f.domain, f.name) for f in proto.functions}
    for node in every_node(proto.graph):
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


def every_node(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from every_node(attribute.g)


def _bytes(tensor: Any) -> int:
    """Size of a constant, from its shape."""
    try:
        width = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        width = 1
    return int(math.prod(tensor.dims) * width)


def check_output(target: Path, source: Path) -> None:
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


def prepare(source: Path, model: Any, options: QuantizationOptions, work: Path, notes: list[str]) -> Path:
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
            f"{source}: onnxruntime can't prepare the model: {first_line(error)}. It must run on onnxruntime's CPU first"
        ) from error
    prepared = onnx.load(str(folded), load_external_data=False)
    if joined := _join_biases(prepared, folded.parent, grouped=not options.per_channel):
        onnx.save(prepared, str(folded))
        notes.append(f"made the constants that are added after {', '.join(joined)} biases: HTP would round them")
    for node in prepared.graph.node:  # looked for only now: folding may have removed those whose condition is constant
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            # onnxruntime takes Relu and Clip away where a quantiser clips: subgraphs would read values that nobody clipped
            raise ModelError(
                f"{source}: node {node.name!r} ({node.op_type}) has a subgraph: QNN runs no control flow, and quantising around "
                "it makes it read wrong values. Export the model with its condition or loop fixed, or quantise the parts"
            )
    return folded


def _join_biases(model: Any, folder: Path, grouped: bool) -> list[str]:
    """Make a constant that is added after a ConvTranspose its bias; HTP does that too, and rounds it to whole numbers.

    Args:
        grouped: also where the ConvTranspose has groups: onnxruntime can't quantise their bias per channel.

    Returns:
        Names of the ConvTransposes.
    """
    graph = model.graph
    constants = {i.name: i for i in graph.initializer}
    makers = {o: n for n in graph.node for o in n.output}
    read = Counter(i for n in graph.node for i in n.input) + Counter(v.name for v in graph.output)
    joined = []
    for add in [n for n in graph.node if n.op_type == "Add"]:
        for tensor, other in (add.input, reversed(add.input)):
            up, constant = makers.get(tensor), constants.get(other)
            if up is None or up.op_type != "ConvTranspose" or constant is None or read[tensor] != 1:
                continue
            if any(up.input[2:]) or not _is_per_channel(constant.dims):
                continue
            weights = constants.get(up.input[1])
            channels = weights.dims[1] if weights is not None and len(weights.dims) == 4 else 0
            group = next((a.i for a in up.attribute if a.name == "group"), 1)
            value = numpy_helper.to_array(constant, str(folder)).reshape(-1)
            if (group > 1 and not grouped) or not channels or value.size not in (1, channels * group):
                continue
            bias = f"{add.output[0]}__bias"
            graph.initializer.append(numpy_helper.from_array(np.resize(value, channels * group), bias))
            del up.input[2:]
            up.input.append(bias)
            up.output[0] = add.output[0]
            graph.node.remove(add)
            if read[other] == 1:
                graph.initializer.remove(constant)
            joined.append(up.name)
            break
    return joined


def _is_per_channel(shape: Sequence[int]) -> bool:
    """Whether a constant that is added to [N, C, ...] is one number, or one for each channel: [1, C, 1, 1], [C, 1, 1]."""
    return math.prod(shape) == 1 or (len(shape) >= 3 and math.prod(shape) == shape[-3] and len(shape) <= 4)


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

    opset = next((o.version for o in model.opset_import if o.domain in STANDARD), 0)
    widths = {16 if "16" in str(options.activations) else 8, options.weights, *options.overrides.values()}
    wanted, reason = (21, "16- and 4-bit types need") if widths - {8} else (13, "QuantizeLinear with an axis needs")
    if opset >= wanted:
        return model
    try:
        upgraded = version_converter.convert_version(model, wanted)
    except Exception as error:  # the converter lacks some operators' steps
        raise ModelError(
            f"{source}: opset {opset} can't be upgraded to {wanted}, which {reason}: {first_line(error)}. Export "
            f"the model with opset {wanted}"
        ) from error
    notes.append(f"upgraded from opset {opset} to {wanted}, which {reason}")
    return upgraded


def first_line(error: BaseException) -> str:
    """Of an error's text; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
