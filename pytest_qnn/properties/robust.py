"""A search for the inputs on which a model does worst on a backend, and on which it breaks an invariant, within a budget.

Hypothesis draws batches and steers towards those with the highest noise ratio. Nothing stops at the first failure: that is only
noted, and the search goes on. Then each broken invariant's case is simplified by drawing the same examples once more, which
costs nothing since their results are known, and shrinking from there. Every inference counts, those of shrinking too.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from pytest_qnn.assertions import require_placement
from pytest_qnn.errors import OptionError, RobustnessError, UsageError
from pytest_qnn.model.tensors import digest_of_arrays
from pytest_qnn.properties.differences import Violation
from pytest_qnn.properties.invariants import (
    SHOWN_CASE,
    Found,
    Invariant,
    Trial,
    as_list,
    find_invariants,
    in_range,
    keep_case,
)
from pytest_qnn.properties.quantizer import Quantizer
from pytest_qnn.properties.samples import Sample
from pytest_qnn.properties.strategies import ALL_KINDS, batches_of
from pytest_qnn.records.record import Record, make_record
from pytest_qnn.session import Inputs, Run, Session
from pytest_qnn.three_ways import reference_values
from pytest_qnn.verdict.metrics import decibels
from pytest_qnn.verdict.rule import DEFAULT

DEFAULT_INVARIANTS = ("matches_reference", "saturates", "finite", "deterministic")
SEARCHING = 0.7  # part of the budget after which a search that found something goes on to simplify it
MOST_EXAMPLES = 10_000
Samples = Sequence[Inputs]
T = TypeVar("T")


@dataclass(frozen=True)
class WorstCase:
    """The sample with the highest noise ratio.

    Attributes:
        ratio: |y-q|^2 / (|q-f|^2 + n (0.6 step)^2) of the sample's worst output: the backend's noise over the quantisation's and
            rounding's; y the backend's output, q the QDQ model's, f the float reference.
        output: name of that output.
        max_steps: largest |y-q|, in steps; None where the output isn't quantised.
        sqnr_db: of y against f.
        sample: as it was drawn.
    """

    ratio: float
    output: str
    max_steps: float | None
    sqnr_db: float
    sample: Inputs

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "noise_ratio": self.ratio,
            "output": self.output,
            "max_steps": self.max_steps,
            "sqnr_db": self.sqnr_db,
            "case": repr(self.sample),
        }


@dataclass(frozen=True)
class Outcome:
    """One invariant after the search.

    Attributes:
        name: of the invariant.
        judged: samples that it was held against; 0: none of those drawn could have broken it.
        undecided: samples that the reference can't decide.
        broken: trials that broke it.
        case: the simplest batch that breaks it; None if it holds.
        violation: what is wrong there.
        run: of that batch.
    """

    name: str
    judged: int = 0
    undecided: int = 0
    broken: int = 0
    case: tuple[Inputs, ...] | None = None
    violation: Violation | None = None
    run: Run | None = field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        """Whether it held throughout."""
        return self.case is None

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "name": self.name,
            "ok": self.ok,
            "judged": self.judged,
            "broken": self.broken,
            "undecided": self.undecided,
            "reason": self.violation.text if self.violation else "",
            "case": repr(list(self.case)) if self.case else "",
        }


@dataclass(frozen=True)
class RobustnessReport:
    """What a search found.

    Attributes:
        subject: model, backend and place.
        inferences: spent, of ``budget``.
        examples: different batches that ran.
        seed: that the search started from: the same one finds the same on a backend that repeats itself.
        outcomes: one for each invariant.
        worst: the sample with the highest noise ratio; None if no output could be compared.
    """

    subject: str
    inferences: int
    budget: int
    examples: int
    seed: int
    outcomes: tuple[Outcome, ...]
    worst: WorstCase | None

    @property
    def ok(self) -> bool:
        """Whether every invariant held."""
        return all(outcome.ok for outcome in self.outcomes)

    def __repr__(self) -> str:
        state = ", ".join(f"{o.name} {'holds' if o.ok else 'BROKEN'} ({o.judged})" for o in self.outcomes)
        worst = f", worst noise ratio {self.worst.ratio:.3g}" if self.worst else ""
        return f"<RobustnessReport of {self.subject}: {state}{worst}; {self.inferences} of {self.budget} inferences>"


def assert_robust(
    session: Session,
    strategy: st.SearchStrategy[Any] | None = None,
    *,
    invariants: Collection[str] = DEFAULT_INVARIANTS,
    inferences: int = 300,
    batch: int = 8,
    seed: int | None = None,
) -> RobustnessReport:
    """Search for inputs that break an invariant, and for those with the highest noise ratio.

    Args:
        strategy: draws input sets, or lists of them. Default: batches of every kind of input, ``ALL_KINDS``.
        invariants: names out of :data:`~pytest_qnn.properties.invariants.INVARIANTS`.
        inferences: of the session that may be spent at most, those of shrinking included.
        batch: samples drawn at a time, for the default strategy.
        seed: where the search starts. Default: made from the test's id, so that a test does the same each time.

    Returns:
        The report, which has the worst case also where all is well.

    Raises:
        RobustnessError: an invariant is broken. Its ``verdict`` is the report.
        UsageError: nothing that was drawn could have broken any invariant, or the budget is below one batch.
        PlacementError: nodes ran elsewhere. TargetError: the runtime failed.
    """
    __tracebackhide__ = True
    if not isinstance(session, Session):
        raise UsageError(f"assert_robust takes a session, got {type(session).__name__}")
    if isinstance(inferences, bool) or not isinstance(inferences, int) or inferences < batch:
        raise OptionError(f"inferences must be a whole number of at least one batch ({batch}), got {inferences!r}")
    require_placement(session)
    chosen = seed if seed is not None else zlib.crc32(session.bench.test.nodeid.encode())
    drawn = strategy if strategy is not None else batches_of(session, batch, ALL_KINDS)
    search = _Search(session, find_invariants(invariants), inferences)
    search.look_for_failures(drawn, chosen, batch)
    for name in list(search.failing):
        search.simplify(drawn, name)
    report = search.report(chosen)
    if not any(outcome.judged for outcome in report.outcomes):
        raise UsageError(
            f"{session.subject}: nothing that was drawn could have broken {', '.join(invariants)}: draw other kinds of input, "
            "or allow more inferences"
        )
    record = _record(session, report)
    if not report.ok:
        kept = [keep_case(o.run, f"{o.name}: {o.violation.text}") for o in report.outcomes if o.run and o.violation]
        raise RobustnessError(_message(report, record, [str(path) for path in kept if path]), report)
    return report


# --- the search -------------------------------------------------------------------------------------------------------


class _BudgetSpent(BaseException):
    """Ends a run of Hypothesis at once; not an Exception, which it would take for a failing example."""


class _Stopped(BaseException):
    """Carries an error that is no example's fault out of a run of Hypothesis: the bench, a wrong argument."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _BrokenError(Exception):
    """An example breaks the invariant that is being simplified."""


@dataclass(frozen=True)
class _Evaluation:
    ratio: float | None
    found: dict[str, Found]


@dataclass(frozen=True)
class _Failure:
    """A batch that breaks an invariant; ``seed`` and ``examples``: of the run of Hypothesis that drew it."""

    size: tuple[Any, ...]
    case: tuple[Inputs, ...]
    violation: Violation
    run: Run
    seed: int
    examples: int


class _Search:
    def __init__(self, session: Session, invariants: dict[str, Invariant], budget: int) -> None:
        self.session, self.invariants, self.budget = session, invariants, budget
        self.limit = budget
        self.used = 0
        self.searching = True
        self.known: dict[str, _Evaluation] = {}
        self.known_alone: dict[tuple[str, str], bool] = {}
        self.failing: dict[str, _Failure] = {}
        self.judged = dict.fromkeys(invariants, 0)
        self.undecided = dict.fromkeys(invariants, 0)
        self.broken = dict.fromkeys(invariants, 0)
        self.worst: WorstCase | None = None
        self.quantizers: dict[str, Quantizer] = {}
        self._seed, self._examples = 0, 0

    # --- running, counted -------------------------------------------------------------------------------------------

    def spend(self, inferences: int) -> None:
        if self.used + inferences > self.limit:
            raise _BudgetSpent
        self.used += inferences

    def run(self, samples: Samples) -> Run:
        self.spend(len(samples))
        return replace(self.session.run_many(samples), passing=True)

    def evaluate(self, samples: Samples) -> _Evaluation:
        """What the invariants and the references say of a batch; of one that is known, what they said."""
        key = _key(samples)
        if key not in self.known:
            self.known[key] = self._guarded(samples, lambda: self._evaluate(samples))
        return self.known[key]

    def broken_by(self, name: str, samples: Samples) -> bool:
        """Whether a batch breaks one invariant; nothing else is asked about it."""
        key = _key(samples)
        if key in self.known:
            return bool(self.known[key].found[name].violations)
        if (name, key) not in self.known_alone:
            self.known_alone[name, key] = self._guarded(samples, lambda: self._judge_alone(name, samples))
        return self.known_alone[name, key]

    def _judge_alone(self, name: str, samples: Samples) -> bool:
        run = self.run(samples)
        self._note_worst(run, samples)
        found = self.invariants[name](Trial(self.session, samples, run, self.run, self.spend, self.quantizers))
        if found.violations:
            self._fail(name, samples, found, run)
        return bool(found.violations)

    def _guarded(self, samples: Samples, act: Callable[[], T]) -> T:
        try:
            return act()
        except Exception as error:
            error.add_note(f"with the inputs {_shown(samples)}")
            raise _Stopped(error) from error

    def _evaluate(self, samples: Samples) -> _Evaluation:
        run = self.run(samples)
        trial = Trial(self.session, samples, run, self.run, self.spend, self.quantizers)
        worst = self._note_worst(run, samples)
        found = {}
        for name, check in self.invariants.items():
            one = found[name] = check(trial)
            self.judged[name] += one.judged
            self.undecided[name] += one.undecided
            if one.violations:
                self.broken[name] += 1
                self._fail(name, samples, one, run)
        return _Evaluation(worst.ratio if worst else None, found)

    def _note_worst(self, run: Run, samples: Samples) -> WorstCase | None:
        worst = worst_case(run, samples)
        if worst is not None and (self.worst is None or worst.ratio > self.worst.ratio):
            self.worst = worst
        return worst

    def _fail(self, name: str, samples: Samples, found: Found, run: Run) -> None:
        violation = max(found.violations, key=lambda v: v.steps if v.steps == v.steps else 0.0)
        size = (len(samples), *(_complexity(sample) for sample in samples))
        if name not in self.failing or size < self.failing[name].size:
            before = self.failing.get(name)
            seed, examples = (before.seed, before.examples) if before else (self._seed, self._examples)
            self.failing[name] = _Failure(size, tuple(samples), violation, run, seed, examples)
        if self.searching:
            self.limit = max(min(self.limit, int(SEARCHING * self.budget)), self.used)

    # --- Hypothesis ---------------------------------------------------------------------------------------------------

    def look_for_failures(self, strategy: st.SearchStrategy[Any], seed: int, batch: int) -> None:
        """Draw until the budget is spent, or nothing new comes."""

        def look(drawn: Any) -> None:
            self._steer(self.evaluate(as_list(drawn)))

        while self.used < self.limit:
            before, known = self.used, len(self.known)
            cost = max(self.used / len(self.known), 1) if self.known else batch + 2
            # half of the examples are steered: Hypothesis begins with that when half of them are done
            examples = min(max(int((self.limit - self.used) / cost), 12), MOST_EXAMPLES)
            self._seed, self._examples = seed + known, examples
            spent = self._draw(strategy, self._seed, examples, [Phase.generate, Phase.target], look)
            if spent or self.used == before:
                break
        self.searching = False

    def simplify(self, strategy: st.SearchStrategy[Any], name: str) -> None:
        """Draw what the search drew, up to what broke an invariant, and shrink that with what is left of the budget.

        Where a sample alone breaks it, samples are tried one by one: those that shrinking left as they were cost nothing.
        """
        self.limit = self.budget
        failure = self.failing[name]
        try:
            alone = len(failure.case) == 1 or any(self.broken_by(name, [sample]) for sample in _from_worst(failure))
        except _BudgetSpent:
            return
        except _Stopped as stopped:
            raise stopped.error from None

        def check(drawn: Any) -> None:
            samples = as_list(drawn)
            known = self.known.get(_key(samples))
            if known is not None:
                self._steer(known)  # as the search did, or something else would be drawn
                if not known.found[name].violations:
                    return
            parts: list[Samples] = [[sample] for sample in samples] if alone else [samples]
            if any(self.broken_by(name, part) for part in parts):
                raise _BrokenError

        self._draw(strategy, failure.seed, failure.examples, [Phase.generate, Phase.target, Phase.shrink], check)

    @staticmethod
    def _steer(evaluation: _Evaluation) -> None:
        if evaluation.ratio is not None:
            hypothesis.target(math.log10(evaluation.ratio + 1e-9), label="noise ratio")

    def _draw(
        self,
        strategy: st.SearchStrategy[Any],
        seed: int,
        examples: int,
        phases: list[Phase],
        body: Callable[[Any], None],
    ) -> bool:
        """One run of Hypothesis; whether the budget ended it."""
        settings = hypothesis.settings(
            max_examples=examples,
            phases=phases,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
            derandomize=False,
            verbosity=hypothesis.Verbosity.quiet,
        )
        run = hypothesis.seed(seed)(settings(hypothesis.given(strategy)(body)))
        try:
            run()
        except _BudgetSpent:
            return True
        except _Stopped as stopped:
            raise stopped.error from None
        except _BrokenError:
            return False
        return False

    def report(self, seed: int) -> RobustnessReport:
        outcomes = []
        for name in self.invariants:
            failure = self.failing.get(name)
            outcome = Outcome(name, self.judged[name], self.undecided[name], self.broken[name])
            if failure is not None:
                outcome = replace(outcome, case=failure.case, violation=failure.violation, run=failure.run)
            outcomes.append(outcome)
        return RobustnessReport(
            self.session.subject, self.used, self.budget, len(self.known), seed, tuple(outcomes), self.worst
        )


def _key(samples: Samples) -> str:
    return " ".join(digest_of_arrays(dict(s) if isinstance(s, Mapping) else {"": np.asarray(s)}) for s in samples)


def _from_worst(failure: _Failure) -> list[Inputs]:
    """The samples of a case, the one with the violation first."""
    at = failure.violation.sample
    return [failure.case[at], *failure.case[:at], *failure.case[at + 1 :]] if len(failure.case) > 1 else []


def worst_case(run: Run, samples: Samples) -> WorstCase | None:
    """The sample of a run with the highest noise ratio; None where no output is of floats."""
    worst: WorstCase | None = None
    session = run.session
    relative = DEFAULT.float16 if session.unquantized_precision == "float16" else DEFAULT.float32
    for sample, result, (quantized, real) in zip(samples, run.results, reference_values(in_range(run)), strict=True):
        for spec in session.outputs:
            if spec.encoding is None and not spec.dtype.startswith("float"):
                continue
            y = result[spec.name]
            if spec.encoding is not None and y.dtype.kind in "iu":
                y = spec.encoding.dequantize(y)
            q, y = quantized[spec.name].astype(np.float64), y.astype(np.float64)
            f = q if real is None else real[spec.name].astype(np.float64)
            if not y.size or not (np.isfinite(q).all() and np.isfinite(y).all() and np.isfinite(f).all()):
                continue  # what isn't finite has an invariant of its own
            signal, noise = float((f * f).sum()), float(((y - q) ** 2).sum())
            grain = (
                DEFAULT.rounding_steps * spec.encoding.step if spec.encoding else relative * math.sqrt(signal / y.size)
            )
            ratio = noise / (float(((q - f) ** 2).sum()) + y.size * grain**2 + 1e-300) if noise else 0.0
            if worst is None or ratio > worst.ratio:
                steps = float(np.abs(y - q).max()) / spec.encoding.step if spec.encoding else None
                worst = WorstCase(ratio, spec.name, steps, decibels(signal, float(((y - f) ** 2).sum())), sample)
    return worst


def _complexity(sample: Inputs) -> tuple[Any, ...]:
    if isinstance(sample, Sample):
        return (0, *sample.complexity)
    arrays = sample.values() if isinstance(sample, dict) else [np.asarray(sample)]
    return (1, sum(int(np.count_nonzero(array)) for array in arrays), repr(sample)[:200])


# --- what is said of it -----------------------------------------------------------------------------------------------


def _record(session: Session, report: RobustnessReport) -> Record:
    broken = [o for o in report.outcomes if not o.ok]
    reason = f"{broken[0].name}: {broken[0].violation.text}" if broken and broken[0].violation else ""
    return make_record(
        session.bench,
        session,
        "robustness",
        "pass" if report.ok else "fail",
        "none" if report.ok else "backend",
        reason,
        samples=max(outcome.judged for outcome in report.outcomes),
        invariants=[outcome.to_json() for outcome in report.outcomes],
        search={
            "inferences": report.inferences,
            "budget": report.budget,
            "examples": report.examples,
            "seed": report.seed,
        },
        worst=report.worst and report.worst.to_json(),
    )


def _message(report: RobustnessReport, record: Record, bundles: Sequence[str]) -> str:
    broken = [outcome for outcome in report.outcomes if not outcome.ok]
    lines = [
        f"robustness: {report.subject}: {len(broken)} of {len(report.outcomes)} invariants broken, "
        f"{report.inferences} of {report.budget} inferences, {report.examples} batches, seed {report.seed}"
    ]
    for outcome in broken:
        assert outcome.violation is not None
        lines.append(f"  {outcome.name}: broken by {outcome.broken} batches")
        lines.append(f"    sample {outcome.violation.sample}: {outcome.violation.text}")
        lines.append(f"    case: session.run({_shown(outcome.case or ())})")
    if (worst := report.worst) is not None:
        steps = "" if worst.max_steps is None else f", {worst.max_steps:.3g} steps at most"
        lines.append(
            f"  worst case: noise ratio {worst.ratio:.3g} in output {worst.output!r}{steps}, SQNR {worst.sqnr_db:.1f} dB"
        )
        lines.append(f"    {repr(worst.sample)[:SHOWN_CASE]}")
    held = [outcome.name for outcome in report.outcomes if outcome.ok and outcome.judged]
    unjudged = [outcome.name for outcome in report.outcomes if not outcome.judged]
    lines += [f"  held: {', '.join(held)}"] if held else []
    lines += [f"  never put to the test by what was drawn: {', '.join(unjudged)}"] if unjudged else []
    lines += [f"  kept: {bundle}" for bundle in bundles]
    if record["repeat"]:
        lines.append(f"  again: {record['repeat']}")
    lines.append("  or the case alone, with the names of pytest_qnn.properties")
    return "\n".join(lines)


def _shown(samples: Samples) -> str:
    text = repr(list(samples))
    return text if len(text) <= SHOWN_CASE else f"{text[:SHOWN_CASE]}... ({len(samples)} samples)"
