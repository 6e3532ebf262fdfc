"""Rules on encodings and weights: what HTP doesn't take or ignores, and where steps are too coarse or wasted."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pytest_qnn.lint.findings import Finding
from pytest_qnn.lint.graph import WEIGHTED, Graph, bounds, channel_axis, label

FIXED_RANGES = {"Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
FIXED_SLACK = 0.01  # of the range: 1% off leaves 44 dB, which is what eight bits give
RUINED_CHANNEL_DB = 6.0  # the rms of its weights is half a step
WASTED = 0.55  # share of the range that can be used, from which on half of it, a bit, is wasted
FEWEST_STEPS = 8  # of an input that a Concat's output must still tell apart


def signed_16bit(graph: Graph) -> Iterator[Finding]:
    """Signed 16-bit activations: refused beside weights of other than signed 8 or 4 bits, and by some more operators."""
    for node in graph.computing():
        encodings = [graph.activation(i) for i in node.input[:2]]
        signed = [e for e in encodings if e is not None and e.dtype == "int16"]
        if not signed:
            continue
        if node.op_type in WEIGHTED and graph.is_weight(node.input[1]):
            weight = graph.encoding(graph.dequantizer(node.input[1]))
            if weight is None or weight.dtype in ("int8", "int4"):
                continue
            why = f"HTP takes signed 16-bit activations with int8 or int4 weights only, these are {weight.dtype}"
        elif node.op_type == "GlobalAveragePool" or (
            node.op_type == "MatMul" and any(any(e.zero_point) for e in signed)
        ):
            why = f"HTP takes no signed 16-bit activations at a {node.op_type}"
        else:
            continue
        yield Finding(
            "signed-16bit", label(node), node.op_type, why, "quantise activations to unsigned 16 bits (QUInt16)"
        )


def weight_type(graph: Graph) -> Iterator[Finding]:
    """Weights wider than the activations, and 4-bit Conv weights with one scale: refused, or computed in float."""
    for node in graph.computing():
        if node.op_type not in WEIGHTED or not graph.is_weight(node.input[1]):
            continue
        activation = graph.activation(node.input[0])
        weight = graph.encoding(graph.dequantizer(node.input[1]))
        if activation is None or weight is None:
            continue
        if weight.bits > activation.bits:
            yield Finding(
                "weight-type",
                label(node),
                node.op_type,
                f"{weight.bits}-bit weights with {activation.bits}-bit activations: HTP refuses them or computes in float",
                "quantise the activations to 16 bits, or the weights to 8",
            )
        elif weight.bits == 4 and weight.axis is None and node.op_type in ("Conv", "ConvTranspose"):
            yield Finding(
                "weight-type",
                label(node),
                node.op_type,
                "4-bit weights with one scale for all channels: HTP refuses them at a Conv",
                "quantise the weights per channel",
            )


def fixed_encoding(graph: Graph) -> Iterator[Finding]:
    """At 16 bits HTP writes Sigmoid's and Tanh's results for the range 0..1 or -1..1, whatever the encoding says."""
    for node in graph.computing():
        encoding = graph.stored_as(node.output[0]) if node.op_type in FIXED_RANGES else None
        if encoding is None or encoding.bits != 16:
            continue
        low, high = FIXED_RANGES[node.op_type]
        slack = FIXED_SLACK * (high - low)
        if abs(encoding.range[0] - low) > slack or abs(encoding.range[1] - high) > slack:
            yield Finding(
                "fixed-encoding",
                label(node),
                node.op_type,
                f"its 16-bit output is encoded for {encoding.range[0]:.4g}..{encoding.range[1]:.4g}, but HTP writes it for "
                f"{low:g}..{high:g}: wrong results",
                f"give its output the encoding of {low:g}..{high:g} (scale {(high - low) / 65536:.6g}); "
                "onnxruntime's get_qnn_qdq_config sets it",
            )


def weight_range(graph: Graph) -> Iterator[Finding]:
    """Weights with one scale, which is too coarse for channels with small weights.

    A channel's signal-to-noise ratio is that of its integers, 12 * mean(q^2), a step's rounding noise being 1/12.
    """
    for node in graph.computing():
        if node.op_type not in WEIGHTED or not graph.is_weight(node.input[1]):
            continue
        dequantizer = graph.dequantizer(node.input[1])
        assert dequantizer is not None
        encoding = graph.encoding(dequantizer)
        if encoding is None or len(encoding.scale) > 1:
            continue
        integers = graph.value(dequantizer.input[0]).astype(np.float64) - encoding.zero_point[0]
        if integers.ndim < 2:
            continue
        axis = channel_axis(node, integers.ndim)
        channels = np.moveaxis(integers, axis, 0).reshape(integers.shape[axis], -1)
        power = 12 * (channels**2).mean(1)
        used = power > 0  # nothing can be said of a channel of zeros: it may have been pruned
        ruined = used & (power < 10 ** (RUINED_CHANNEL_DB / 10))
        if ruined.any():
            worst = int(np.argmin(np.where(used, power, np.inf)))
            largest = np.abs(channels).max(1)
            yield Finding(
                "weight-range",
                label(node),
                node.op_type,
                f"one scale for all channels of its weights leaves {int(ruined.sum())} of {used.size} channels less than "
                f"{RUINED_CHANNEL_DB:g} dB, channel {worst} {10 * math.log10(power[worst]):.1f} dB: its largest weight is "
                f"{largest.max() / largest[worst]:.0f} times smaller than the largest of all",
                "quantise the weights per channel (pytest-qnn quantize --per-channel)",
            )


def unused_range(graph: Graph) -> Iterator[Finding]:
    """An 8-bit encoding of which half or more stands for values that the operator can't have."""
    for node in graph.computing():
        limits = bounds(graph, node)
        encoding = graph.stored_as(node.output[0]) if limits is not None else None
        if limits is None or encoding is None or encoding.bits > 8:
            continue
        low, high = encoding.range
        usable = (min(high, limits[1]) - max(low, limits[0])) / (high - low) if high > low else 1.0
        if usable <= WASTED:
            yield Finding(
                "unused-range",
                label(node),
                node.op_type,
                f"its output is encoded for {low:.4g}..{high:.4g}, of which {1 - usable:.0%} can't occur: "
                f"{-math.log2(max(usable, 2.0**-encoding.bits)):.1f} of {encoding.bits} bits are wasted",
                "quantise its output over the range that it has (asymmetric)",
            )


def concat_range(graph: Graph) -> Iterator[Finding]:
    """A Concat whose output has one encoding for inputs of very different ranges."""
    for node in graph.computing():
        output = graph.stored_as(node.output[0]) if node.op_type == "Concat" else None
        if output is None:
            continue
        for tensor in dict.fromkeys(node.input):
            encoding = graph.activation(tensor)
            if encoding is None:
                continue
            steps = (encoding.range[1] - encoding.range[0]) / output.step
            if steps < FEWEST_STEPS:
                yield Finding(
                    "concat-range",
                    label(node),
                    node.op_type,
                    f"input {tensor!r} reaches over {encoding.range[0]:.4g}..{encoding.range[1]:.4g}, which is {steps:.1f} "
                    f"steps of the output's encoding {output.range[0]:.4g}..{output.range[1]:.4g}",
                    "scale the inputs to like ranges before the Concat, or quantise it to 16 bits",
                )
