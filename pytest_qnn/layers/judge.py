"""Judging every layer of a model alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pytest_qnn.layers.cut import WEIGHTED, Layer
from pytest_qnn.layers.envelope import amplitude
from pytest_qnn.layers.run import LayeredModel, LayerRun
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.verdict.layer_rule import LayerCase, LayersVerdict

EXPONENTIAL = frozenset(("Softmax", "LogSoftmax", "Exp"))
EXPONENTIAL_ERROR = 0.02  # relative; measured: a probability near 1 comes out up to 2.5% off
SPREADING = frozenset(WEIGHTED) | EXPONENTIAL


def judge_layers(layered: LayeredModel, samples: Sequence[Mapping[str, Array]]) -> LayersVerdict:
    """The verdict on each layer, over all samples together.

    Raises:
        CompileError: the backend refused the cut model.
        TargetError: a runtime died, hung or ran out of memory.
    """
    return judge_layer_runs(layered, layered.run(samples))


def judge_layer_runs(layered: LayeredModel, runs: Iterable[LayerRun]) -> LayersVerdict:
    """The verdict on layers that were run."""
    cases = {layer.tensor: _case(layer) for layer in layered.layers}
    count = 0
    for run in runs:
        count += 1
        for layer in layered.layers:
            tensor = layer.tensor
            cases[tensor].add(run.q[tensor], run.y[tensor], run.r[tensor], layer.encoding.zero_point[0])
            if tensor in layered.rounded_again:
                cases[tensor].grant(layered.rounded_again[tensor] * layered.rms_of_sources(layer, run))
    elsewhere = {layer.tensor: layer.name for layer in layered.layers if layered.ran_elsewhere(layer)}
    judged = tuple(case.judge() for tensor, case in cases.items() if tensor not in elsewhere)
    return LayersVerdict(judged, count, tuple(elsewhere.values()))


def _case(layer: Layer) -> LayerCase:
    return LayerCase(
        tensor=layer.tensor,
        name=layer.name,
        kind=layer.kind,
        amplitude=amplitude(layer),
        spread=bool(SPREADING & set(layer.operators)),
        relative=EXPONENTIAL_ERROR if EXPONENTIAL & set(layer.operators) else 0.0,
        bits=layer.encoding.bits,
    )
