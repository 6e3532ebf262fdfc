"""How far may legitimate rounding carry a model? The QDQ model with noise of its backend's own size before every quantiser.

A backend needn't round as onnxruntime does, and the HTP multiplies 16-bit activations with about nine significant bits: what
comes of it at the outputs depends on the model alone, so it can be had from the reference: run with such noise, its outputs
spread as those of a healthy backend may. The noise is a fixed function of the element's place and of the number of the draw, so
that the same draw always gives the same outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn.layers.cut import QUIET, WEIGHTED, Layer, find_layers, is_too_large, load_whole
from pytest_qnn.model.saved_model import save_model

DRAW = "pytest_qnn_draw"  # the graph input that tells draws apart: float32[1]
DRAWS = tuple(np.array([np.sqrt(k)], np.float32) for k in (2, 3, 5, 7))  # its values: no two have a rational ratio
MOST_SAMPLES = 8
HALF_STEP = 0.5  # steps: rounding another way
# Steps of 8 bits: products and sums of 16-bit activations on HTP, whose error grows with the range and not with the step.
# Measured on seven real nets (`python -m benchmarks.defects layers`): rms 0.02 to 0.5 of it over all weighted layers.
WEIGHTED_HALF_STEP_OF_8_BITS = 0.5
# Steps of 16 bits, for operators that HTP computes less exactly than to a step
INEXACT = {"Softmax": 128.0, "LogSoftmax": 128.0, "Sqrt": 32.0, "Div": 16.0, "BatchNormalization": 128.0}
STEPS_OF_16_BITS = 4.0  # for others, as long as nobody has measured them
MEASURED = {
    "Add": 3.0,
    "Sub": 3.0,
    "Sum": 3.0,
    "LeakyRelu": 2.0,
    "HardSigmoid": 2.0,
} | dict.fromkeys(  # sums are off by 2 throughout
    ("Mul", "AveragePool", "GlobalAveragePool", "ReduceMean", "Pow", "LayerNormalization"), 1.0
)
COPIES = (
    "MaxPool",
    "Pad",
    "Slice",
    "Concat",
    "Split",
    "Resize",
    "Gather",
    "DepthToSpace",
    "SpaceToDepth",
    "Max",
    "Min",
    "Relu",
    "Clip",
)


def spread(samples: int) -> list[int]:
    """The samples for which the envelope is computed: at most 8, spread over all."""
    count = min(samples, MOST_SAMPLES)
    return sorted({round(k * (samples - 1) / max(count - 1, 1)) for k in range(count)})


def draws_each(samples: int) -> int:
    """How many draws each of those samples gets, so that there are 4 in all."""
    return max(1, -(-len(DRAWS) // samples))


def amplitude(layer: Layer) -> float:
    """Largest legitimate error of a layer computed alone, in its own steps; 0 where elements are only moved."""
    kinds = set(layer.operators)
    if not kinds or kinds <= set(COPIES):
        return 0.0
    if layer.encoding.bits <= 8:
        return HALF_STEP
    if kinds & {*WEIGHTED}:
        return WEIGHTED_HALF_STEP_OF_8_BITS * 2.0 ** (layer.encoding.bits - 8)
    steps = INEXACT | MEASURED | dict.fromkeys(COPIES, 1.0)
    return max(steps.get(kind, STEPS_OF_16_BITS) for kind in kinds)


def write_envelope(file: Path, output: Path, dimensions: Mapping[str, int] | None = None) -> bool:
    """Write the QDQ model ``file`` with noise before its quantisers to ``output``; it has one more input, :data:`DRAW`.

    Args:
        dimensions: sizes for named dynamic dimensions.

    Returns:
        Whether there is an envelope. There is none, and nothing is written, where part of the model computes in float, or a shape isn't
        known: noise would be missing there, and the limits that follow from it be too tight. Nor for models over 1 GiB.

    Raises:
        ModelError: the model can't be read.
        OptionError: the file can't be written.
    """
    if is_too_large(file):
        return False
    proto = load_whole(file)
    for dim in (d for v in (*proto.graph.input, *proto.graph.output) for d in v.type.tensor_type.shape.dim):
        if dim.dim_param in (dimensions or {}):
            dim.dim_value = (dimensions or {})[dim.dim_param]
    layers = {layer.tensor: layer for layer in find_layers(proto, file.parent)}
    if not _quantized_throughout(proto, layers.values()):
        return False
    sizes = {tensor: size for tensor, layer in layers.items() if (size := amplitude(layer))}
    shapes = _shapes(proto)
    rng = np.random.default_rng(len(layers))
    nodes: list[Any] = []
    for node in proto.graph.node:
        size = sizes.get(node.output[0], 0.0)
        if not size:
            nodes.append(node)
            continue
        encoding, shape = layers[node.output[0]].encoding, shapes.get(node.input[0])
        if shape is None or encoding.axis is not None:
            return False
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[0] = f"{node.output[0]}__noisy"
        nodes += [*_noise(proto.graph, node, shape, size * encoding.step, rng), copy]
    if not sizes:
        return False
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.input.append(helper.make_tensor_value_info(DRAW, TensorProto.FLOAT, [1]))
    save_model(proto, output, external=False)
    return True


def _quantized_throughout(proto: Any, layers: Iterable[Layer]) -> bool:
    """Whether every operator ends at a quantiser, with at most one more before it (a Conv and its Relu)."""
    listed = list(layers)
    computing = [node for node in proto.graph.node if node.op_type not in QUIET]
    within = sum(len(layer.operators) for layer in listed)
    return within >= len(computing) and all(len(layer.operators) <= 2 for layer in listed)


def _noise(graph: Any, quantizer: Any, shape: tuple[int, ...], size: float, rng: np.random.Generator) -> list[Any]:
    """Nodes that add ``size * (2 frac(draw * (a + b)) - 1)``: a by the elements' row, b by their place in it."""
    name = f"{quantizer.output[0]}__"
    split = _split(shape)
    rows = [d if i < split else 1 for i, d in enumerate(shape)]
    places = [1 if i < split else d for i, d in enumerate(shape)]
    constants = {
        "a": rng.uniform(0, 1000, rows),
        "b": rng.uniform(0, 1000, places),
        "size": np.array(2 * size),
        "half": np.array(size),
    }
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value, np.float32), name + key) for key, value in constants.items()
    )
    steps = [
        ("Mul", [DRAW, name + "a"], "row"),
        ("Mul", [DRAW, name + "b"], "place"),
        ("Add", [name + "row", name + "place"], "sum"),
        ("Floor", [name + "sum"], "floor"),
        ("Sub", [name + "sum", name + "floor"], "part"),
        ("Mul", [name + "part", name + "size"], "scaled"),
        ("Sub", [name + "scaled", name + "half"], "noise"),
        ("Add", [quantizer.input[0], name + "noise"], "noisy"),
    ]
    return [helper.make_node(operator, inputs, [name + out], name=name + out) for operator, inputs, out in steps]


def _split(shape: tuple[int, ...]) -> int:
    """The axis that parts rows from places, so that neither has many more elements than the other."""
    sizes = [np.prod(shape[:k]) + np.prod(shape[k:]) for k in range(len(shape) + 1)]
    return int(np.argmin(sizes))


def _shapes(proto: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that quantisers read, where they are known."""
    inferred = onnx.shape_inference.infer_shapes(proto)
    found = {}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            found[value.name] = tuple(int(d.dim_value) for d in dims)
    return found
