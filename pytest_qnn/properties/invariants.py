"""What must hold of a backend for every input. Each invariant is a function from a trial to what it found, has a name for
``assert_robust``, and an assertion of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pytest_qnn.assertions import judge_run, require_placement
from pytest_qnn.errors import InvariantError, OptionError, UsageError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.properties.differences import Violation, unit_of, violations
from pytest_qnn.properties.quantizer import MAX_VALUES, Quantizer, ladder
from pytest_qnn.records.record import make_record
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.session import Inputs, Run, Session
from pytest_qnn.settings import unknown_name
from pytest_qnn.three_ways import envelope_of, reference_values
from pytest_qnn.verdict.judge import OutputVerdict

SHOWN = 3
SHOWN_CASE = 400  # characters


@dataclass(frozen=True)
class Found:
    """What an invariant found in one trial.

    Attributes:
        judged: samples that it was held against.
        violations: those that break it.
        undecided: samples that nothing can be said of, because the reference contradicts itself.
    """

    judged: int
    violations: tuple[Violation, ...] = ()
    undecided: int = 0


@dataclass
class Trial:
    """A batch that ran on a backend, and the way to run more.

    Attributes:
        session: the model on the backend.
        samples: inputs, as they were drawn.
        run: what running them gave.
        again: runs further samples of the same model.
        quantizers: of the model's inputs, where they were asked for already.
    """

    session: Session
    samples: Sequence[Inputs]
    run: Run
    again: Callable[[Sequence[Inputs]], Run]
    spent: Callable[[int], None] = lambda inferences: None
    quantizers: dict[str, Quantizer] = field(default_factory=dict)


@dataclass(frozen=True)
class InvariantVerdict:
    """One invariant, judged on some samples.

    Attributes:
        name: of the invariant.
        judged: samples that it was held against: 0 if none of them could have broken it.
        violations: what breaks it.
        undecided: samples that the reference can't decide.
    """

    name: str
    judged: int
    violations: tuple[Violation, ...] = ()
    undecided: int = 0

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return not self.violations

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "name": self.name,
            "ok": self.ok,
            "judged": self.judged,
            "broken": len(self.violations),
            "undecided": self.undecided,
            "reason": self.violations[0].text if self.violations else "",
        }


Invariant = Callable[[Trial], Found]


# --- the invariants ---------------------------------------------------------------------------------------------------


def matches_reference(trial: Trial) -> Found:
    """The backend follows the QDQ model: the derived rule (or the limits that were set), all samples of the batch together.

    What is judged is the backend alone: an output that the quantisation leaves nothing of is nobody's fault here. What lies beyond
    an input's range counts as the end of the range, also for the float reference, whose noise would hide everything else. A 16-bit
    output that fails is judged once more with the rounding envelope, which has the last word as it has in
    ``assert_matches_reference``: quantising makes next to no noise there, and HTP's own arithmetic is what counts.
    """
    run = in_range(trial.run)
    outputs = judge_run(run).outputs
    wide = {s.name for s in trial.session.outputs if s.encoding is not None and s.encoding.bits > 8}
    if any(o.name in wide and _own_failures(o) for o in outputs) and envelope_of(trial.session):
        drawn = judge_run(run, envelope=True).outputs
        outputs = tuple(d if d.name in wide else o for o, d in zip(outputs, drawn, strict=True))
        unsure: tuple[str, ...] = UNSURE
    else:
        unsure = ("bias:", *UNSURE)
    found, undecided = [], 0
    for output in outputs:
        own = _own_failures(output, unsure if output.name in wide else ())
        if len(own) < len(output.failures) and any(text.startswith("reference:") for text in output.failures):
            undecided = len(trial.samples)
            continue
        if own:
            sample = output.worst.sample if output.worst else 0
            steps = output.figures.get("max_steps")
            found.append(
                Violation(sample, f"output {output.name!r}: {own[0]}", float("inf") if steps is None else float(steps))
            )
    return Found(len(trial.samples), tuple(found), undecided)


# Tests of the rule that don't count for a 16-bit output, because they ask whether errors look random. HTP's 16-bit operators are off
# by more than rounding, up to hundreds of 65,535 steps and not at random, which shows where inputs don't vary: constants,
# subnormal numbers, sparse ones. Measured with QAIRT 2.51 on a Conv: 13 of 15 batches of subnormal numbers failed "bias", by 0.8
# of a step; that one is the envelope's to decide, where there is one.
UNSURE = ("spikes:", "saturation:")


def _own_failures(output: OutputVerdict, unsure: tuple[str, ...] = ()) -> list[str]:
    """Failures of an output that are the backend's."""
    return [text for text in output.failures if not text.startswith(("quantization:", "reference:", *unsure))]


def saturates(trial: Trial, steps: float = 0.0) -> Found:
    """What lies beyond an input's range gives what the end of the range gives: it saturates, and doesn't wrap."""
    clipped = [_clipped(trial.session, sample) for sample in trial.run.samples]
    beyond = [i for i, sample in enumerate(clipped) if sample is not None]
    if not beyond:
        return Found(0)
    inside = trial.again([sample for sample in clipped if sample is not None])
    expected = list(inside.results)
    got = [trial.run.results[i] for i in beyond]
    found = violations(trial.session, expected, got, steps, ("at the end of the range", "beyond it"))
    return Found(len(beyond), tuple(replace(v, sample=beyond[v.sample]) for v in found))


def finite(trial: Trial) -> Found:
    """Finite inputs give finite outputs, except where the reference has none."""
    found = []
    references: list[Any] | None = None
    for number, result in enumerate(trial.run.results):
        for spec in trial.session.outputs:
            y = result[spec.name]
            if y.dtype.kind != "f" or np.isfinite(y).all():
                continue
            references = references or list(reference_values(trial.run))
            bad = ~np.isfinite(y) & np.isfinite(references[number][0][spec.name])
            if bad.any():
                where = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
                text = f"output {spec.name!r}: {int(bad.sum())} of {y.size} elements are NaN or infinite, the first at {list(where)}"
                found.append(Violation(number, text, float("inf")))
                break
    return Found(len(trial.samples), tuple(found))


def deterministic(trial: Trial, repeats: int = 1, samples: int | None = 1) -> Found:
    """The same input gives the same bits again. Of a batch the last ``samples`` are repeated (None: all)."""
    count = len(trial.samples) if samples is None else min(samples, len(trial.samples))
    chosen = range(len(trial.samples) - count, len(trial.samples))
    found: dict[int, Violation] = {}
    for _ in range(repeats):
        again = trial.again([trial.samples[i] for i in chosen])
        expected = [trial.run.results[i] for i in chosen]
        for v in violations(trial.session, expected, again.results, 0.0, ("at first", "again")):
            found.setdefault(v.sample, replace(v, sample=chosen[v.sample]))
    return Found(count, tuple(found.values()))


def order_invariant(trial: Trial) -> Found:
    """A result doesn't depend on what ran before it: the batch gives the same bits from back to front."""
    if len(trial.samples) < 2:
        return Found(0)
    again = trial.again(list(reversed(trial.samples)))
    backwards = list(reversed(again.results))
    found = violations(trial.session, trial.run.results, backwards, 0.0, ("in order", "from back to front"))
    return Found(len(trial.samples), tuple(found))


def argmax_stable(trial: Trial, steps: float = 2.0) -> Found:
    """The best class (last axis) stays when the input moves by at most a quarter of a step, unless it had to move.

    It had to where its lead is no more than twice what the reference moves by, the backend was off before, and ``steps``.
    """
    session = trial.session
    moved = [_moved(session, sample, seed) for seed, sample in enumerate(trial.run.samples)]
    if not any(spec.dtype.startswith("float") for spec in session.inputs):
        return Found(0)
    again = trial.again(moved)
    before, after = list(reference_values(trial.run)), list(reference_values(replace(again, passing=True)))
    found, judged = [], 0
    for number, (y, z) in enumerate(zip(trial.run.results, again.results, strict=True)):
        for spec in session.outputs:
            if y[spec.name].ndim == 0 or y[spec.name].shape[-1] < 2 or y[spec.name].dtype.kind != "f":
                continue
            judged += 1
            q, q2 = before[number][0][spec.name], after[number][0][spec.name]
            unit = unit_of(spec, session, q)
            classes = y[spec.name].shape[-1]
            a, b, q, q2 = (np.asarray(v, np.float64).reshape(-1, classes) for v in (y[spec.name], z[spec.name], q, q2))
            ordered = np.sort(a, -1)
            lead = ordered[:, -1] - ordered[:, -2]
            may = 2 * (np.abs(q2 - q).max(-1) + np.abs(a - q).max(-1) + steps * unit)
            lost = (a.argmax(-1) != b.argmax(-1)) & (lead > may)
            if lost.any():
                row = int(lost.argmax())
                text = (
                    f"output {spec.name!r}, row {row}: the best class went from {int(a[row].argmax())} to "
                    f"{int(b[row].argmax())} although it led by {lead[row] / unit:.3g} steps and could lose {may[row] / unit:.3g}"
                )
                found.append(Violation(number, text, float(lead[row] / unit)))
                break
    return Found(min(judged, len(trial.samples)), tuple(found))


def _quantizer(check: Callable[[Quantizer, Array, Array, Callable[[Array], Array]], str | None]) -> Invariant:
    """An invariant of the quantisers of the model's inputs, on the values that the batch has and on a ladder of steps and ties."""

    def invariant(trial: Trial) -> Found:
        found, judged = [], 0
        for spec in trial.session.inputs if trial.session.executed.quantized else ():
            if spec.encoding is None or not spec.dtype.startswith("float") or len(spec.encoding.scale) != 1:
                continue
            if spec.name not in trial.quantizers:
                trial.quantizers[spec.name] = Quantizer.of(trial.session, spec.encoding)
            quantizer = trial.quantizers[spec.name]
            values = _values(spec.encoding, [sample[spec.name] for sample in trial.run.samples])

            def run(array: Array, quantizer: Quantizer = quantizer) -> Array:
                if not quantizer.knows(array):
                    trial.spent(1)
                return quantizer.run(array)

            judged += 1
            if text := check(quantizer, values, run(values), run):
                found.append(Violation(0, f"input {spec.name!r}: {text}", float("nan")))
        return Found(judged and len(trial.samples), tuple(found))

    return invariant


def _monotone(quantizer: Quantizer, x: Array, y: Array, run: Callable[[Array], Array]) -> str | None:
    falls = np.flatnonzero(np.diff(y) < 0)
    if not falls.size:
        return None
    i = int(falls[0])
    return f"not monotone: {x[i]:.9g} becomes {y[i]:.9g}, and the larger {x[i + 1]:.9g} becomes {y[i + 1]:.9g}"


def _idempotent(quantizer: Quantizer, x: Array, y: Array, run: Callable[[Array], Array]) -> str | None:
    again = run(y)
    if np.array_equal(again, y):
        return None
    i = int(np.abs(again - y).argmax())
    return f"not idempotent: {x[i]:.9g} becomes {y[i]:.9g}, and that becomes {again[i]:.9g}"


def _error(quantizer: Quantizer, x: Array, y: Array, run: Callable[[Array], Array]) -> str | None:
    low, high = quantizer.encoding.range
    step = quantizer.encoding.step
    inside = np.clip(x.astype(np.float64), low, high)
    excess = np.abs(y - inside) - quantizer.allowed(inside)
    i = int(excess.argmax())
    if excess[i] <= 0:
        return None
    return (
        f"error: {x[i]:.9g} becomes {y[i]:.9g}, off by {abs(y[i] - inside[i]) / step:.4g} steps (limit "
        f"{quantizer.allowed(inside)[i] / step:.4g})"
    )


INVARIANTS: Mapping[str, Invariant] = {
    "matches_reference": matches_reference,
    "saturates": saturates,
    "finite": finite,
    "deterministic": deterministic,
    "order_invariant": order_invariant,
    "argmax_stable": argmax_stable,
    "quantizer_monotone": _quantizer(_monotone),
    "quantizer_idempotent": _quantizer(_idempotent),
    "quantizer_error": _quantizer(_error),
}
QUANTIZER = ("quantizer_monotone", "quantizer_idempotent", "quantizer_error")


def find_invariants(names: Collection[str]) -> dict[str, Invariant]:
    """Invariants by name.

    Raises:
        OptionError: no name, or an unknown one.
    """
    if isinstance(names, str) or not names:
        raise OptionError(f"invariants takes a list of at least one name, got {names!r}: put names in a list")
    for name in names:
        if name not in INVARIANTS:
            raise OptionError(f"invariants: {unknown_name('invariant', name, INVARIANTS)}")
    return {name: INVARIANTS[name] for name in names}


# --- assertions -------------------------------------------------------------------------------------------------------

Samples = Inputs | Sequence[Inputs]


def assert_backend_matches(session: Session, samples: Samples) -> InvariantVerdict:
    """The backend follows the QDQ model on these inputs, whatever quantising lost: see :func:`matches_reference`.

    Raises:
        InvariantError: it doesn't. PlacementError: nodes ran elsewhere. TargetError: the runtime failed.
    """
    __tracebackhide__ = True
    require_placement(session)
    return _assert(session, samples, {"matches_reference": matches_reference})


def assert_saturates(session: Session, samples: Samples, steps: float = 0.0) -> InvariantVerdict:
    """Inputs beyond the range of their encodings give what the ends of the range give, within ``steps`` of the outputs.

    Raises:
        InvariantError: they don't. UsageError: none of the inputs is beyond its range. TargetError: the runtime failed.
    """
    __tracebackhide__ = True
    return _assert(session, samples, {"saturates": lambda trial: saturates(trial, steps)})


def assert_finite(session: Session, samples: Samples) -> InvariantVerdict:
    """Finite inputs give finite outputs, except where the reference has none.

    Raises:
        InvariantError: they don't. TargetError: the runtime failed.
    """
    __tracebackhide__ = True
    return _assert(session, samples, {"finite": finite})


def assert_deterministic(session: Session, samples: Samples, repeats: int = 3, reload: bool = True) -> InvariantVerdict:
    """The same inputs give the same bits, ``repeats`` more times; with ``reload`` once more in a fresh process.

    On a device, the model is loaded again in place of a fresh process.

    Raises:
        InvariantError: they don't. TargetError: the runtime failed.
    """
    __tracebackhide__ = True
    if repeats < 1:
        raise OptionError(f"repeats must be at least 1, got {repeats}")

    def check(trial: Trial) -> Found:
        found = deterministic(trial, repeats, None)
        if not reload or found.violations:
            return found
        session.restart()
        again = trial.again(trial.samples)
        after = violations(session, trial.run.results, again.results, 0.0, ("at first", "after loading anew"))
        return replace(found, violations=tuple(after))

    return _assert(session, samples, {"deterministic": check})


def assert_order_invariant(session: Session, samples: Sequence[Inputs]) -> InvariantVerdict:
    """Results don't depend on what ran before: the samples give the same bits from back to front.

    Raises:
        InvariantError: they don't. TargetError: the runtime failed.
    """
    __tracebackhide__ = True
    return _assert(session, samples, {"order_invariant": order_invariant})


def assert_argmax_stable(session: Session, samples: Samples, steps: float = 2.0) -> InvariantVerdict:
    """The best class survives perturbations below its margin: see :func:`argmax_stable`.

    Raises:
        InvariantError: it doesn't. TargetError: the runtime failed.
    """
    __tracebackhide__ = True
    return _assert(session, samples, {"argmax_stable": lambda trial: argmax_stable(trial, steps)})


def assert_quantizer(session: Session, samples: Samples) -> InvariantVerdict:
    """The backend's own quantiser, at each input of the model: monotone, idempotent, off by at most half a step in range.

    It is tried on a small model that the backend gets whole (on htp with ``offload_graph_io_quantization=0``; otherwise
    onnxruntime quantises at the graph's edges), on the values of ``samples`` and on steps and ties of the encoding.

    Raises:
        InvariantError: it isn't. TargetError: the runtime failed.
    """
    __tracebackhide__ = True
    return _assert(session, samples, {name: INVARIANTS[name] for name in QUANTIZER})


def _assert(session: Session, samples: Samples, invariants: Mapping[str, Invariant]) -> InvariantVerdict:
    __tracebackhide__ = True
    if not isinstance(session, Session):
        raise UsageError(f"the first argument must be a session, got {type(session).__name__}")
    listed = as_list(samples)
    trial = Trial(session, listed, session.run_many(listed), session.run_many)
    name = "quantizer" if set(invariants) == set(QUANTIZER) else next(iter(invariants))
    judged, undecided = 0, 0
    found: list[Violation] = []
    for check in invariants.values():
        one = check(trial)
        judged, undecided = max(judged, one.judged), max(undecided, one.undecided)
        found += one.violations
    if not judged:
        raise UsageError(
            f"{session.subject}: {name}: none of the {len(listed)} samples could break it: "
            + _NEEDED.get(name, "give others")
        )
    return conclude(trial.run, InvariantVerdict(name, judged, tuple(found), undecided), listed)


_NEEDED = {
    "saturates": "give some beyond the range of a quantised float input, e.g. of kind saturating",
    "order_invariant": "give at least two",
    "quantizer": "the model has no float input with an encoding of one scale",
    "argmax_stable": "the model has no float input and output with classes on its last axis",
}


def keep_case(run: Run, reason: str) -> Path | None:
    """Where a failing case was kept as a bundle; None where none was asked for."""
    from pytest_qnn.records.bundle import keep_bundle

    return keep_bundle(run, None, reason)


def conclude(run: Run, verdict: InvariantVerdict, samples: Sequence[Inputs]) -> InvariantVerdict:
    """Leave the record of an invariant that was judged.

    Args:
        run: of the samples, on the session whose invariant it is.

    Raises:
        InvariantError: it doesn't hold.
    """
    __tracebackhide__ = True
    session = run.session
    reason = "" if verdict.ok else f"{verdict.name}: {verdict.violations[0].text}"
    case = "" if verdict.ok else repr(samples[verdict.violations[0].sample])
    record = make_record(
        session.bench,
        session,
        "robustness",
        "pass" if verdict.ok else "fail",
        "none" if verdict.ok else "backend",
        reason,
        samples=len(samples),
        invariants=[verdict.to_json() | {"case": case}],
        search=None,
        worst=None,
    )
    if verdict.ok:
        return verdict
    bundle = keep_case(run, reason)
    lines = [
        f"{verdict.name} doesn't hold: {session.subject}: {len(verdict.violations)} of {len(samples)} samples break it"
    ]
    for violation in verdict.violations[:SHOWN]:
        lines.append(f"  sample {violation.sample}: {violation.text}")
    lines.append(f"  case: {case[:SHOWN_CASE]}")
    if bundle:
        lines.append(f"  kept: {bundle}")
    if record["repeat"]:
        lines.append(f"  again: {record['repeat']}")
    raise InvariantError("\n".join(lines), verdict)


# --- parts ------------------------------------------------------------------------------------------------------------


def as_list(samples: Samples) -> list[Inputs]:
    """Samples as a list, also of one."""
    return [samples] if isinstance(samples, Mapping | np.ndarray) else list(samples)


def in_range(run: Run) -> Run:
    """The run as if its inputs had been clipped to their ranges, which is what a quantised input means."""
    clipped = [_clipped(run.session, sample) or sample for sample in run.samples]
    return replace(run, samples=tuple(clipped))


def _clipped(session: Session, sample: Mapping[str, Array]) -> dict[str, Array] | None:
    """The sample with what lies beyond its inputs' ranges at their ends; None if nothing does."""
    if not session.executed.quantized:  # a float model ran in its place, and that has no ranges
        return None
    clipped = dict(sample)
    changed = False
    for spec in session.inputs:
        if spec.encoding is None or not spec.dtype.startswith("float"):
            continue
        low, high = (
            spec.encoding.dequantize(np.broadcast_to(np.int64(limit), sample[spec.name].shape))
            for limit in spec.encoding.limits
        )
        inside = np.clip(sample[spec.name], low.astype(spec.dtype), high.astype(spec.dtype))
        if not np.array_equal(inside, sample[spec.name]):
            clipped[spec.name], changed = inside, True
    return clipped if changed else None


def _moved(session: Session, sample: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """The sample with noise of at most a quarter of a step on its float inputs, kept in range."""
    rng = np.random.default_rng(seed)
    moved = dict(sample)
    for spec in session.inputs:
        if not spec.dtype.startswith("float"):
            continue
        x = sample[spec.name].astype(np.float64)
        low, high = spec.encoding.range if spec.encoding else (x.min(), x.max())
        size = 0.25 * (spec.encoding.step if spec.encoding else (high - low) / 256)
        moved[spec.name] = np.clip(x + rng.uniform(-size, size, x.shape), low, high).astype(spec.dtype)
    return moved


def _values(encoding: Encoding, arrays: Sequence[Array]) -> Array:
    """Values to try a quantiser on, ascending: a ladder, and those of the samples."""
    drawn = np.unique(np.concatenate([array.reshape(-1).astype(np.float32) for array in arrays]))
    room = MAX_VALUES // 4
    if drawn.size > room:
        drawn = drawn[np.linspace(0, drawn.size - 1, room).astype(int)]
    values = np.sort(np.concatenate([ladder(encoding, MAX_VALUES - room), drawn]))
    return np.concatenate([values, np.full(MAX_VALUES - values.size, values[-1], np.float32)])
