"""How far may legitimate rounding carry a model? The QDQ model with noise of its backend's own size before every quantiser.

A backend needn't round as onnxruntime does, and HTP's arithmetic is inexact in ways that are known (:mod:`.arithmetic`): what comes of
it at the outputs depends on the model alone, so it can be had from the reference: run with such noise, its outputs spread as
those of a healthy backend may. The noise is a fixed function of the element's place and of the number of the draw, so
that the same draw always gives the same outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn.layers.arithmetic import F64, Exactness, exactness_of
from pytest_qnn.layers.cut import QUIET, Layer, find_layers, is_too_large, load_whole
from pytest_qnn.model.graph_tensors import tensor_shapes
from pytest_qnn.model.saved_model import save_model

DRAW = "pytest_qnn_draw"  # the graph input that tells draws apart: float32[1]
DRAWS = tuple(np.array([np.sqrt(k)], np.float32) for k in (2, 3, 5, 7))  # its values: no two have a rational ratio
MOST_SAMPLES = 8


def spread(samples: int) -> list[int]:
    """The samples for which the envelope is computed: at most 8, spread over all."""
    count = min(samples, MOST_SAMPLES)
    return sorted({round(k * (samples - 1) / max(count - 1, 1)) for k in range(count)})


def draws_each(samples: int) -> int:
    """How many draws each of those samples gets, so that there are 4 in all."""
    return max(1, -(-len(DRAWS) // samples))


def write_envelope(file: Path, output: Path, dimensions: Mapping[str, int] | None = None, coarse: bool = False) -> bool:
    """Write the QDQ model ``file`` with noise before its quantisers to ``output``; it has one more input, :data:`DRAW`.

    Args:
        dimensions: sizes for named dynamic dimensions.
        coarse: as for :func:`~pytest_qnn.layers.arithmetic.exactness_of`.

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
    shapes = tensor_shapes(proto)
    exactness = exactness_of(proto, file.parent, tuple(layers.values()), coarse, shapes)
    inexact = {t: e for t, e in exactness.items() if e.amplitude or e.relative or e.per_input is not None}
    rng = np.random.default_rng(len(layers))
    nodes: list[Any] = []
    for node in proto.graph.node:
        known = inexact.get(node.output[0])
        if known is None:
            nodes.append(node)
            continue
        encoding, inferred = layers[node.output[0]].encoding, shapes.get(node.input[0], (None,))
        shape = tuple(size for size in inferred if size is not None)
        if len(shape) < len(inferred) or encoding.axis is not None:
            return False
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[0] = f"{node.output[0]}__noisy"
        nodes += [*_noise(proto.graph, node, shape, known, encoding.step, rng), copy]
    if not inexact:
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


def _noise(
    graph: Any, quantizer: Any, shape: tuple[int, ...], known: Exactness, step: float, rng: np.random.Generator
) -> list[Any]:
    """Nodes that add ``size * (2 frac(draw * (a + b)) - 1)`` and an offset: a by the elements' row, b by their place in it.

    ``size`` is the amplitude, and what the layer's input and the element itself add to it. The offset is what a mean over many elements
    doesn't take away.
    """
    name, x = f"{quantizer.output[0]}__", quantizer.input[0]
    split = _split(shape)
    rows = [d if i < split else 1 for i, d in enumerate(shape)]
    places = [1 if i < split else d for i, d in enumerate(shape)]
    constants = {
        "a": rng.uniform(0, 1000, rows),
        "b": rng.uniform(0, 1000, places),
        "two": np.array(2.0),
        "one": np.array(1.0),
        "amplitude": np.array(known.amplitude * step),
    }
    steps = [
        ("Mul", [DRAW, name + "a"], "row"),
        ("Mul", [DRAW, name + "b"], "place"),
        ("Add", [name + "row", name + "place"], "sum"),
        ("Floor", [name + "sum"], "floor"),
        ("Sub", [name + "sum", name + "floor"], "part"),
        ("Mul", [name + "part", name + "two"], "doubled"),
        ("Sub", [name + "doubled", name + "one"], "unit"),
    ]
    size = name + "amplitude"
    if known.per_input is not None:
        constants["per_input"] = math.sqrt(3) * step * _along(known.per_input, known.axis, shape)
        steps += [
            ("Mul", [known.operand, known.operand], "square"),
            ("ReduceMean", [name + "square"], "mean"),
            ("Sqrt", [name + "mean"], "rms"),
            ("Mul", [name + "rms", name + "per_input"], "added"),
            ("Add", [size, name + "added"], "with_input"),
        ]
        size = name + "with_input"
    if known.relative:
        constants["relative"] = np.array(known.relative)
        steps += [
            ("Abs", [x], "absolute"),
            ("Mul", [name + "absolute", name + "relative"], "own"),
            ("Add", [size, name + "own"], "with_own"),
        ]
        size = name + "with_own"
    steps.append(("Mul", [name + "unit", size], "noise"))
    noise = name + "noise"
    if known.offset:
        constants["offset"] = np.array(known.offset * step)
        steps.append(("Add", [noise, name + "offset"], "shifted"))
        noise = name + "shifted"
    steps.append(("Add", [x, noise], "noisy"))
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value, np.float32), name + key) for key, value in constants.items()
    )
    made = [helper.make_node(operator, inputs, [name + out], name=name + out) for operator, inputs, out in steps]
    for node in made:
        if node.op_type == "ReduceMean":
            node.attribute.append(helper.make_attribute("keepdims", 0))
    return made


def _along(values: F64, axis: int, shape: tuple[int, ...]) -> F64:
    """One value for each channel, laid along an axis of ``shape``; their root mean square where they don't fit there."""
    if values.size == 1:
        return values.reshape(())
    if not shape or shape[axis % len(shape)] != values.size:
        return np.asarray(np.sqrt(np.square(values).mean()), np.float64)
    return values.reshape([values.size if i == axis % len(shape) else 1 for i in range(len(shape))])


def _split(shape: tuple[int, ...]) -> int:
    """The axis that parts rows from places, so that neither has many more elements than the other."""
    sizes = [np.prod(shape[:k]) + np.prod(shape[k:]) for k in range(len(shape) + 1)]
    return int(np.argmin(sizes))
