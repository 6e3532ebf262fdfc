"""Defects put into the model that the backend runs, while the reference keeps the intact one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from benchmarks.defects.nets import Pair
from pytest_qnn.layers.cut import Layer, find_layers, load_whole

Proto = Any
Change = Callable[["Site"], bool]  # whether it could be made


@dataclass
class Site:
    """A place in a model where a defect goes: a weighted layer in the middle.

    Attributes:
        graph: of the model, to be changed.
        node: the operator with weights.
        layer: what it is part of.
    """

    graph: Proto
    node: Proto
    layer: Layer
    opset: int

    def constant(self, name: str) -> npt.NDArray[Any]:
        """An initializer's values."""
        return numpy_helper.to_array(next(i for i in self.graph.initializer if i.name == name))

    def producer(self, tensor: str) -> Proto | None:
        """The node that computes a tensor."""
        return next((n for n in self.graph.node if tensor in n.output), None)

    def replace_input(self, node: Proto, index: int, value: npt.NDArray[Any]) -> None:
        """Give a node an initializer of its own: others that share the old one keep it."""
        name = f"{node.input[index]}__defect"
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        node.input[index] = name

    def weights(self) -> Proto | None:
        """The DequantizeLinear of the node's weights."""
        found = self.producer(self.node.input[1])
        return found if found is not None and found.op_type == "DequantizeLinear" else None

    def quantizer(self) -> Proto:
        """The QuantizeLinear at the layer's end."""
        found = self.producer(self.layer.tensor)
        assert found is not None
        return found

    def dequantizers(self) -> list[Proto]:
        """The DequantizeLinear nodes that read the layer's tensor."""
        return [n for n in self.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == self.layer.tensor]


def _zero_point(site: Site) -> bool:
    """The reader of an inner tensor takes its zero point one too high."""
    readers = site.dequantizers()
    for node in readers:
        zero = site.constant(node.input[2])
        site.replace_input(node, 2, np.asarray(zero + (1 if int(zero) < np.iinfo(zero.dtype).max else -1), zero.dtype))
    return bool(readers)


def _weight_scale(factor: float) -> Change:
    def change(site: Site) -> bool:
        node = site.weights()
        if node is None:
            return False
        site.replace_input(node, 1, np.asarray(site.constant(node.input[1]) * np.float32(factor), np.float32))
        return True

    return change


def _swapped(site: Site) -> bool:
    """The weights of two output channels exchanged."""
    node = site.weights()
    if node is None:
        return False
    stored = site.constant(node.input[0]).copy()
    axis = 0 if site.node.op_type == "Conv" else stored.ndim - 1
    if stored.shape[axis] < 2:
        return False
    rows = np.moveaxis(stored, axis, 0)
    first, second = 0, len(rows) // 2
    rows[[first, second]] = rows[[second, first]]
    site.replace_input(node, 0, np.ascontiguousarray(np.moveaxis(rows, 0, axis)))
    return True


def _relu(site: Site) -> bool:
    """The lower end of the range, which stands for a Relu, is gone: negative values come through, as far as a range of
    the same width around zero lets them."""
    quantizer = site.quantizer()
    zero = site.constant(quantizer.input[2])
    limits = np.iinfo(zero.dtype)
    if int(zero) != limits.min:  # no Relu is folded into this layer
        return False
    middle = np.asarray((int(limits.max) + int(limits.min) + 1) // 2, zero.dtype)
    scale = np.asarray(site.constant(quantizer.input[1]) * 2, np.float32)
    for node in (quantizer, *site.dequantizers()):
        site.replace_input(node, 1, scale)
        site.replace_input(node, 2, middle)
    return True


def _halved_range(site: Site) -> bool:
    """The tensor is written with half its range: what is beyond saturates."""
    quantizer = site.quantizer()
    scale = np.asarray(site.constant(quantizer.input[1]) / 2, np.float32)
    for node in (quantizer, *site.dequantizers()):
        site.replace_input(node, 1, scale)
    return True


def _padding(site: Site) -> bool:
    """The window is shifted: rows that were padded behind are padded before."""
    pads = next((a for a in site.node.attribute if a.name == "pads"), None)
    if site.node.op_type != "Conv" or pads is None or not any(pads.ints) or len(pads.ints) != 4:
        return False
    top, left, bottom, right = pads.ints
    pads.ints[:] = [top + bottom, left + right, 0, 0]
    return True


def _bias(site: Site) -> bool:
    if len(site.node.input) < 3 or not site.node.input[2]:
        return False
    del site.node.input[2]
    return True


def _narrow(site: Site) -> bool:
    """The tensor passes through 8 bits where 16 were meant."""
    quantizer = site.quantizer()
    zero = site.constant(quantizer.input[2])
    if zero.dtype.itemsize != 2:
        return False
    scale = np.asarray(site.constant(quantizer.input[1]) * np.float32(256), np.float32)
    coarse = np.asarray(int(zero) // 256, np.uint8)
    _quantize_twice(site, quantizer, scale, coarse)
    return True


def _quantize_twice(site: Site, quantizer: Proto, scale: npt.NDArray[Any], zero: npt.NDArray[Any]) -> None:
    name = f"{quantizer.output[0]}__narrow"
    parameters = [f"{name}_scale", f"{name}_zero"]
    site.graph.initializer.extend(
        numpy_helper.from_array(value, key) for value, key in zip((scale, zero), parameters, strict=True)
    )
    made = [
        helper.make_node("QuantizeLinear", [quantizer.input[0], *parameters], [f"{name}_q"], name=f"{name}_q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", *parameters], [f"{name}_d"], name=f"{name}_d"),
    ]
    _insert(site, quantizer, made, f"{name}_d")


def _insert(site: Site, quantizer: Proto, made: list[Proto], result: str) -> None:
    """Put nodes before a QuantizeLinear, which reads their result then."""
    place = next(i for i, n in enumerate(site.graph.node) if n.output[0] == quantizer.output[0])
    quantizer.input[0] = result
    nodes = [*site.graph.node[:place], *made, *site.graph.node[place:]]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del site.graph.node[:]
    site.graph.node.extend(copies)


def _overflow(site: Site) -> bool:
    """What is beyond 60% of the range stays there, as where an operator computes in a float16 that can't hold it."""
    quantizer = site.quantizer()
    scale, zero = site.constant(quantizer.input[1]), site.constant(quantizer.input[2])
    top = int(zero) + round(0.6 * (int(np.iinfo(zero.dtype).max) - int(zero)))
    name = f"{quantizer.output[0]}__overflow"
    parameters = [quantizer.input[1], quantizer.input[2]]
    site.graph.initializer.append(numpy_helper.from_array(np.asarray(top, zero.dtype), f"{name}_limit"))
    made = [
        helper.make_node("QuantizeLinear", [quantizer.input[0], *parameters], [f"{name}_q"], name=f"{name}_q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", *parameters], [f"{name}_d"], name=f"{name}_d"),
        helper.make_node("DequantizeLinear", [f"{name}_limit", *parameters], [f"{name}_top"], name=f"{name}_top"),
        helper.make_node("Min", [f"{name}_d", f"{name}_top"], [f"{name}_m"], name=f"{name}_m"),
    ]
    _insert(site, quantizer, made, f"{name}_m")
    return scale.size == 1


DEFECTS: dict[str, Change] = {
    "zero point off by one": _zero_point,
    "weight scale +2%": _weight_scale(1.02),
    "weight scale +10%": _weight_scale(1.10),
    "two weight channels swapped": _swapped,
    "Relu dropped": _relu,
    "activation range halved": _halved_range,
    "padding on the wrong side": _padding,
    "bias dropped": _bias,
    "8 bits where 16 were meant": _narrow,
    "float16 overflow": _overflow,
}


def inject(pair: Pair, name: str, folder: Path) -> tuple[Path, str] | None:
    """The quantised model with a defect in the middle-most weighted layer that can have it, and that layer's tensor.

    None where no layer can.
    """
    output = folder / f"{pair.name}.{name.replace(' ', '-').replace('%', 'pct').replace('+', 'plus-')}.onnx"
    proto = load_whole(pair.quantized)
    layers = [layer for layer in find_layers(proto, pair.quantized.parent) if layer.operators]
    weighted = [layer for layer in layers if set(layer.operators) & {"Conv", "Gemm", "MatMul"}]
    middle = len(weighted) // 2
    for layer in sorted(weighted, key=lambda candidate: abs(weighted.index(candidate) - middle)):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        node = next((n for n in copy.graph.node if layer.name in (n.name, *n.output)), None)
        if node is None or node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        site = Site(copy.graph, node, layer, copy.opset_import[0].version)
        if site.dequantizers() and DEFECTS[name](site):
            if not output.exists():
                onnx.save(copy, str(output))
            return output, layer.tensor
    return None
