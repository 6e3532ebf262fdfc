"""Judging every layer of a model alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pytest_qnn.layers.arithmetic import Exactness
from pytest_qnn.layers.cut import Layer
from pytest_qnn.layers.run import LayeredModel, LayerRun
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.verdict.layer_rule import LayerCase, LayersVerdict


def judge_layers(layered: LayeredModel, samples: Sequence[Mapping[str, Array]]) -> LayersVerdict:
    """The verdict on each layer, over all samples together.

    Raises:
        CompileError: the backend refused the cut model.
        TargetError: a runtime died, hung or ran out of memory.
    """
    return judge_layer_runs(layered, layered.run(samples))


def judge_layer_runs(layered: LayeredModel, runs: Iterable[LayerRun]) -> LayersVerdict:
    """The verdict on layers that were run."""
    known = layered.exactness
    cases = {layer.tensor: _case(layer, known[layer.tensor]) for layer in layered.layers}
    count = 0
    for run in runs:
        count += 1
        for layer in layered.layers:
            tensor = layer.tensor
            q, y, r = run.q[tensor], run.y[tensor], run.r[tensor]
            unsaid = _divided_by_zero(layered.layers, known[tensor].divisor, run, q.shape)
            if unsaid is not None:
                y, r = np.where(unsaid, q, y), np.where(unsaid, q, r)
            cases[tensor].add(q, y, r, layer.encoding.zero_point[0])
            if (per_input := known[tensor].per_input) is not None:
                cases[tensor].grant(per_input * layered.rms_of_input(known[tensor], run))
    elsewhere = {layer.tensor: layer.name for layer in layered.layers if layered.ran_elsewhere(layer)}
    judged = tuple(case.judge() for tensor, case in cases.items() if tensor not in elsewhere)
    return LayersVerdict(judged, count, tuple(elsewhere.values()))


def _divided_by_zero(layers: Sequence[Layer], divisor: str, run: LayerRun, shape: tuple[int, ...]) -> Array | None:
    """Where a layer divides by what was quantised to 0; None: nowhere."""
    found = [layer.encoding.zero_point[0] for layer in layers if layer.tensor == divisor]
    if not found or divisor not in run.q or not (zero := run.q[divisor] == found[0]).any():
        return None
    return np.broadcast_to(zero, shape)


def _case(layer: Layer, exactness: Exactness) -> LayerCase:
    return LayerCase(
        tensor=layer.tensor,
        name=layer.name,
        kind=layer.kind,
        amplitude=exactness.amplitude,
        spread=exactness.spread,
        relative=exactness.relative,
        bits=layer.encoding.bits,
        axis=exactness.axis,
    )
