"""Every rule on every run: how often healthy ones are called red, and which defects are caught."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.defects import model_defects, output_defects
from benchmarks.defects.nets import Pair
from benchmarks.defects.rules import RULES, own_failures
from benchmarks.defects.runs import Outcome, Runs
from pytest_qnn.errors import QnnError
from pytest_qnn.layers.judge import judge_layer_runs
from pytest_qnn.layers.run import LayeredModel, LayerRun
from pytest_qnn.model.onnx_file import Model, read_model
from pytest_qnn.targets.target import Plan

LAYER_SAMPLES = 2


@dataclass
class Tally:
    """Outcomes of one kind of defect, or of healthy runs.

    Attributes:
        cases: how many there were; ``visible``: of these, how many are there to be seen.
        caught: by rule, of the visible ones; ``caught_all``: of all.
        missed: visible ones that pytest-qnn's rule passed: run and ratio of power to noise.
    """

    cases: int = 0
    visible: int = 0
    caught: dict[str, int] = field(default_factory=dict)
    caught_all: dict[str, int] = field(default_factory=dict)
    missed: list[tuple[str, float]] = field(default_factory=list)

    def add(self, visible: bool, rejected: dict[str, bool]) -> None:
        """Count one case; ``rejected``: by rule."""
        self.cases += 1
        self.visible += visible
        for rule, red in rejected.items():
            self.caught_all[rule] = self.caught_all.get(rule, 0) + red
            self.caught[rule] = self.caught.get(rule, 0) + (red and visible)


def judge_outputs(outcomes: Iterable[Outcome], healthy: Tally, defects: dict[str, Tally], quick: bool = False) -> None:
    """Healthy runs and output defects, by every rule; ``quick``: by pytest-qnn's own alone."""
    rules = {"pytest-qnn": RULES["pytest-qnn"]} if quick else RULES
    for o in outcomes:
        rejected = {name: not accepts(o, o.y) for name, accepts in rules.items()}
        healthy.add(True, rejected)
        if rejected["pytest-qnn"]:
            healthy.missed.append((f"{o.name}: {'; '.join(own_failures(o, o.y))}", 0.0))
        rng = np.random.default_rng(5)
        for name, inject in output_defects.DEFECTS.items():
            broken = inject(o, rng)
            if broken is None:
                continue
            visible = output_defects.visible(o, broken)
            with np.errstate(invalid="ignore"):
                rejected = {rule: not accepts(o, broken) for rule, accepts in rules.items()}
            tally = defects.setdefault(name, Tally())
            tally.add(visible, rejected)
            if visible and not rejected["pytest-qnn"]:
                tally.missed.append((o.name, output_defects.noise_ratio(o, broken)))


@dataclass(frozen=True)
class ModelDefect:
    """One defect in the model that the backend ran.

    Attributes:
        effect: rms by which it moves its own layer on onnxruntime, over the layer's healthy error there (and 0.3 steps of rounding);
            NaN where that isn't known.
        outputs, layers: whether the rule for outputs, and the one for layers, called it red.
        right: whether the first layer that was red is the one that has the defect, or reads what has it.
        accepted: by rule, whether its verdict on the outputs is a pass; empty where the backend refused the model.
        trouble: why it, or its layers, could not be run.
    """

    pair: str
    defect: str
    effect: float
    outputs: bool
    layers: bool
    right: bool
    accepted: dict[str, bool]
    trouble: str = ""

    @property
    def visible(self) -> bool:
        """Whether it moves its own layer by more than half of what healthy arithmetic does there."""
        return not self.effect <= 0.5


def judge_model_defects(runs: Runs, pair: Pair, soc: str, seed: int, advance: Callable[[], None]) -> list[ModelDefect]:
    """Every model defect of a pair, end to end and layer by layer.

    Outputs and the layers' evidence are kept, not verdicts: a changed rule judges them anew.
    """
    found = []
    for name in model_defects.DEFECTS:
        injected = model_defects.inject(pair, name, runs.folder / "models")
        if injected is not None:
            found.append(_judge_model_defect(runs, pair, soc, seed, name, *injected))
        advance()
    return found


def _judge_model_defect(
    runs: Runs, pair: Pair, soc: str, seed: int, name: str, model: Path, tensor: str
) -> ModelDefect:
    try:
        outputs = runs.defective(pair, soc, seed, name.replace(" ", "-"), model)
    except QnnError as error:  # the backend refuses the broken model: no run, no pass
        return ModelDefect(pair.name, name, np.nan, True, True, True, {}, str(error).partition("\n")[0][:200])
    outcomes = runs.outcomes(pair, soc, seed)
    accepted = {
        rule: all(accepts(o, y) for o, y in zip(outcomes, outputs, strict=True)) for rule, accepts in RULES.items()
    }
    red = not accepted["pytest-qnn"]
    samples = pair.net.samples(LAYER_SAMPLES, seed)
    plan = runs.bench.target.plan("htp", soc, {})
    try:
        layered = LayeredModel(runs.bench, plan, read_model(model), runs.bench.limits, read_model(pair.quantized))
        broken = _kept_layers(runs, f"{soc}-{pair.name}-{seed}-{name}", layered, samples)
        healthy = _healthy_layers(runs, plan, read_model(pair.quantized), samples, f"{soc}-{pair.name}-{seed}-healthy")
    except QnnError as error:
        return ModelDefect(pair.name, name, np.nan, red, False, False, accepted, str(error)[:200])
    verdict = judge_layer_runs(layered, broken)
    there = {tensor} | {layer.tensor for layer in layered.layers if tensor in layer.sources}
    right = bool(verdict.failed) and verdict.failed[0].tensor in there
    return ModelDefect(pair.name, name, _effect(layered, broken, healthy), red, not verdict.ok, right, accepted)


def _kept_layers(runs: Runs, name: str, layered: LayeredModel, samples: list[dict[str, np.ndarray]]) -> list[LayerRun]:
    """The layers' tensors of each sample, from the folder or put there."""
    order = [layer.tensor for layer in layered.layers]

    def make() -> dict[str, np.ndarray]:
        return {
            f"{k}{letter}{index}": getattr(run, letter)[tensor]
            for k, run in enumerate(layered.run(samples))
            for letter in "qyrm"
            for index, tensor in enumerate(order)
        } | {"elsewhere": np.array([layered.ran_elsewhere(layer) for layer in layered.layers])}

    kept = runs.kept(f"layers-{name.replace(' ', '-')}-{len(samples)}", make)
    layered.elsewhere = frozenset(t for t, gone in zip(order, kept["elsewhere"], strict=True) if gone)
    return [
        LayerRun(*({t: kept[f"{k}{letter}{index}"] for index, t in enumerate(order)} for letter in "qyrm"))
        for k in range(len(samples))
    ]


_healthy: dict[str, list[LayerRun]] = {}


def _healthy_layers(
    runs: Runs, plan: Plan, intact: Model, samples: list[dict[str, np.ndarray]], name: str
) -> list[LayerRun]:
    """The intact model's layers; those of the latest pair are remembered."""
    if name not in _healthy:
        _healthy.clear()
        layered = LayeredModel(runs.bench, plan, intact, runs.bench.limits)
        _healthy[name] = _kept_layers(runs, name, layered, samples)
    return _healthy[name]


def _effect(layered: LayeredModel, broken: list[LayerRun], healthy: list[LayerRun]) -> float:
    """The largest ratio over layers of what the defect does on onnxruntime to what healthy arithmetic does on the backend.

    On onnxruntime the broken model's layers differ from the intact one's, each from exact inputs, by the defect alone.
    """
    worst = 0.0
    common = [layer.tensor for layer in layered.layers if layer.tensor in healthy[0].q]
    for t in common:
        noise = moved = 0.0
        for good, bad in zip(healthy, broken, strict=True):
            q = good.q[t].astype(np.float64)
            noise += float(np.square(good.y[t] - q).sum()) + q.size * 0.3**2
            moved += float(np.square(bad.m[t] - good.m[t].astype(np.float64)).sum())
        worst = max(worst, float(np.sqrt(moved / noise)))
    return worst
