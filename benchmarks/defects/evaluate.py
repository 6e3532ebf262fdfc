"""Every rule on every run: how often healthy ones are called red, and which defects are caught."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import numpy as np

from benchmarks.defects import model_defects, output_defects
from benchmarks.defects.nets import Pair
from benchmarks.defects.rules import RULES, own_failures
from benchmarks.defects.runs import Outcome, Runs
from pytest_qnn.errors import QnnError
from pytest_qnn.layers.judge import judge_layers
from pytest_qnn.layers.run import LayeredModel, LayerRun
from pytest_qnn.model.onnx_file import Model, read_model
from pytest_qnn.model.replaced_file import replaced_file
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
        first: the first layer that was red; ``where``: the tensor at which the defect shows first.
        accepted: by rule, whether its verdict on the outputs is a pass.
    """

    pair: str
    defect: str
    effect: float
    outputs: bool
    layers: bool
    first: str
    where: str
    accepted: dict[str, bool]
    trouble: str = ""

    @property
    def visible(self) -> bool:
        """Whether it moves its own layer by more than half of what healthy arithmetic does there."""
        return not self.effect <= 0.5


def judge_model_defects(runs: Runs, pair: Pair, soc: str, seed: int, advance: Callable[[], None]) -> list[ModelDefect]:
    """Every model defect of a pair, end to end and layer by layer; what an earlier call has done is taken from the folder."""
    file = runs.folder / f"model-defects-{soc}-{pair.name}-{seed}-{runs.count}.json"
    known = {d["defect"]: d for d in json.loads(file.read_text())} if file.exists() else {}
    found = []
    for name in model_defects.DEFECTS:
        if name not in known:
            made = _judge_model_defect(runs, pair, soc, seed, name)
            known[name] = asdict(made) if made is not None else {"defect": name, "absent": True}
            with replaced_file(file) as draft:
                draft.write_text(json.dumps(list(known.values())))
        if "absent" not in known[name]:
            found.append(ModelDefect(**known[name]))
        advance()
    return found


def _judge_model_defect(runs: Runs, pair: Pair, soc: str, seed: int, name: str) -> ModelDefect | None:
    injected = model_defects.inject(pair, name, runs.folder / "models")
    if injected is None:
        return None
    model, tensor = injected
    try:
        outputs = runs.defective(pair, soc, seed, name.replace(" ", "-"), model)
    except QnnError as error:  # the backend refuses the broken model: no run, no pass
        return ModelDefect(pair.name, name, np.nan, True, True, "", tensor, {}, str(error).partition("\n")[0][:200])
    outcomes = runs.outcomes(pair, soc, seed)
    accepted = {
        rule: all(accepts(o, y) for o, y in zip(outcomes, outputs, strict=True)) for rule, accepts in RULES.items()
    }
    plan = runs.bench.target.plan("htp", soc, {})
    samples = pair.net.samples(LAYER_SAMPLES, seed)
    intact, broken = read_model(pair.quantized), read_model(model)
    try:
        layered = LayeredModel(runs.bench, plan, broken, runs.bench.limits, intact)
        verdict = judge_layers(layered, samples)
    except QnnError as error:
        return ModelDefect(
            pair.name, name, np.nan, not accepted["pytest-qnn"], True, "", tensor, accepted, str(error)[:200]
        )
    effect = _effect(layered, samples, _healthy_layers(runs, plan, intact, samples))
    first = verdict.failed[0].tensor if verdict.failed else ""
    return ModelDefect(pair.name, name, effect, not accepted["pytest-qnn"], not verdict.ok, first, tensor, accepted)


_healthy: dict[str, list[LayerRun]] = {}


def _healthy_layers(runs: Runs, plan: Plan, intact: Model, samples: list[dict[str, np.ndarray]]) -> list[LayerRun]:
    """The intact model's layers, run once for all defects of a pair; those of the latest pair are remembered."""
    key = f"{intact.digest} {plan.place}"
    if key not in _healthy:
        _healthy.clear()
        _healthy[key] = list(LayeredModel(runs.bench, plan, intact, runs.bench.limits).run(samples))
    return _healthy[key]


def _effect(layered: LayeredModel, samples: list[dict[str, np.ndarray]], healthy: list[LayerRun]) -> float:
    """The largest ratio over layers of what the defect does on onnxruntime to what healthy arithmetic does on the backend.

    On onnxruntime the broken model's layers differ from the intact one's, each from exact inputs, by the defect alone.
    """
    worst = 0.0
    noise = {layer.tensor: 0.0 for layer in layered.layers}
    moved = dict(noise)
    for good, bad in zip(healthy, layered.run(samples), strict=True):
        for t in noise:
            q = good.q[t].astype(np.float64)
            noise[t] += float(np.square(good.y[t] - q).sum()) + q.size * 0.3**2
            moved[t] += float(np.square(bad.r[t] - good.r[t].astype(np.float64)).sum())
    for t, power in moved.items():
        worst = max(worst, np.sqrt(power / noise[t]))
    return float(worst)
