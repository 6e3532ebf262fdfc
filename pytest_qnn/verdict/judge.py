"""From evidence to verdict: explicit limits where there are some, the derived rule elsewhere; and who is to blame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pytest_qnn.verdict.envelope_rule import resolution
from pytest_qnn.verdict.metrics import STEP_SLACK, Array, Evidence, Worst
from pytest_qnn.verdict.rule import Finding, apply_rule, attribute
from pytest_qnn.verdict.tolerance import Tolerance

BLAME_ORDER = ("backend", "graph-edge quantizer", "quantization", "reference", "limit", "none")
BLOCK = 1 << 16  # elements that are compared at a time in float64


@dataclass(frozen=True)
class OutputVerdict:
    """One output, judged.

    Attributes:
        limits_from: "argument", "marker", "project configuration" or "derived".
        failures: a line for each limit that isn't kept, with limit and found value; empty if the output passes.
        warnings: what a reader should know although nothing failed.
        figures: metrics by name (see ``Evidence.figures``).
    """

    name: str
    limits_from: str
    tolerance: Tolerance | None
    failures: tuple[str, ...]
    warnings: tuple[str, ...]
    blame: str
    step: float | None
    figures: Mapping[str, float | int | None]
    worst: Worst | None

    @property
    def ok(self) -> bool:
        """Whether it passes."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        worst = self.worst and {
            "sample": self.worst.sample,
            "index": list(self.worst.index),
            "float": self.worst.f,
            "quantized": self.worst.q,
            "backend": self.worst.y,
        }
        return {
            "name": self.name,
            "ok": self.ok,
            "limits_from": self.limits_from,
            "tolerance": None if self.tolerance is None else str(self.tolerance),
            "step": self.step,
            "metrics": dict(self.figures),
            "failures": list(self.failures),
            "warnings": list(self.warnings),
            "blame": self.blame,
            "worst": worst,
        }


@dataclass(frozen=True)
class AccuracyVerdict:
    """All outputs of a run, judged."""

    outputs: tuple[OutputVerdict, ...]
    samples: int

    def __repr__(self) -> str:
        result = "pass" if self.ok else f"fail, blame: {self.blame}"
        return f"<AccuracyVerdict of {len(self.outputs)} outputs over {self.samples} samples: {result}>"

    @property
    def ok(self) -> bool:
        """Whether there are outputs and every one passes."""
        return bool(self.outputs) and all(o.ok for o in self.outputs)

    @property
    def blame(self) -> str:
        """Whose fault the failures are; "none" without any."""
        found = {o.blame for o in self.outputs if not o.ok}
        return next((b for b in BLAME_ORDER if b in found), "none")

    @property
    def failed(self) -> tuple[OutputVerdict, ...]:
        """The outputs that don't pass."""
        return tuple(o for o in self.outputs if not o.ok)


@dataclass
class OutputCase:
    """One output of a run while its samples come in.

    Attributes:
        exact: whether the output is of integers or booleans without an encoding (indices, classes, masks).
        nominal_step: for an explicit limit in steps: the step of the QDQ model where the float model runs in its place.
        structure: failures that make the numbers incomparable: shape or type.
        envelope: what legitimate rounding makes of q, where that was computed; no float reference, no check.
    """

    name: str
    evidence: Evidence
    precision: str
    bounded: bool = False
    exact: bool = False
    tolerance: Tolerance | None = None
    limits_from: str = "derived"
    samples: int = 0
    differing: int = 0
    reference_differing: int = 0
    check_differing: int = 0
    violations: int = 0  # elements beyond absolute + relative * |q|
    largest_excess: float = 0.0
    top_k_misses: int = 0
    top_k_rows: int = 0
    nominal_step: float | None = None
    envelope: Evidence | None = None
    structure: list[tuple[str, str]] = field(default_factory=list)  # blame and text

    def add(self, q: Array, y: Array, f: Array | None, r: Array | None) -> None:
        """Add one sample of real values (see :meth:`Evidence.add`)."""
        self.samples += 1
        mismatch = _mismatch(q, y, f, r)
        if mismatch:
            self.structure.append(mismatch)
            return
        self.evidence.add(q, y, f, r)
        if self.exact:
            self.differing += int(np.count_nonzero(q != y))
            by_float, by_check = (0 if other is None else int(np.count_nonzero(q != other)) for other in (f, r))
            self.reference_differing += max(by_float, by_check)
            self.check_differing += by_check
        t = self.tolerance
        if t is not None and (t.absolute is not None or t.relative is not None):
            self._bounds(q.reshape(-1), y.reshape(-1), t)
        if t is not None and t.top_k is not None:
            self._top_k(q if f is None else f, q, y, int(t.top_k))

    def add_envelope(self, q: Array, draw: Array) -> None:
        """Add a draw of the rounding envelope for a sample: what q could have become, of the same shape."""
        if self.envelope is None:
            self.envelope = Evidence(step=self.evidence.step, has_float=False, has_check=False)
        self.envelope.add(q, draw)

    def _bounds(self, q: Array, y: Array, t: Tolerance) -> None:
        for start in range(0, q.size, BLOCK):
            a, b = (x[start : start + BLOCK].astype(np.float64) for x in (q, y))
            with np.errstate(invalid="ignore"):  # non-finite elements are judged by themselves
                excess = np.abs(b - a) - ((t.absolute or 0.0) + (t.relative or 0.0) * np.abs(a))
            bad = excess > 0
            if bad.any():
                self.violations += int(np.count_nonzero(bad))
                self.largest_excess = max(self.largest_excess, float(excess[bad].max()))

    def _top_k(self, expected: Array, q: Array, y: Array, k: int) -> None:
        """Count rows in which k classes beat the expected one; a tie counts as beaten unless q has it too."""
        if y.ndim == 0 or y.shape[-1] <= k:
            self.structure.append(("reference", f"top_k: shape {list(y.shape)} doesn't have more than {k} classes"))
            return
        classes = y.shape[-1]
        expected, q, y = (a.reshape(-1, classes) for a in (expected, q, y))
        best = expected.argmax(-1)[:, None]
        own_q, own_y = np.take_along_axis(q, best, 1), np.take_along_axis(y, best, 1)
        beaten = ((y > own_y) | ((y == own_y) & (q != own_q))).sum(1)
        self.top_k_misses += int((beaten >= k).sum())
        self.top_k_rows += beaten.size

    def judge(self) -> OutputVerdict:
        """The verdict on this output."""
        findings, warnings = list(dict.fromkeys(self.structure)), list[str]()
        findings += self._non_finite()
        if not self.structure and not self.evidence.sums.n:
            findings.append(("reference", self._nothing()))
        elif self.tolerance is not None:
            findings += self._explicit(self.tolerance)
        elif self.exact:
            findings += self._exact()
        elif not self.structure:
            finding = self._derived()
            findings += [(finding.blame, failure) for failure in finding.failures]
            warnings += finding.warnings
        bad = self.evidence.non_finite
        if bad.reference:
            warnings.append(
                f"{bad.reference} elements of the reference are NaN or infinite: only their place was compared"
            )
        figures = dict(self.evidence.figures())
        if self.envelope is not None and self.evidence.step and self.evidence.sums.n:
            resolved = resolution(self.evidence, self.envelope)
            figures |= {"smallest_gain": resolved.gain, "samples_for_5_percent_gain": resolved.samples}
        if self.exact:
            figures |= {"differing": self.differing, "reference_differing": self.reference_differing}
        return OutputVerdict(
            name=self.name,
            limits_from=self.limits_from,
            tolerance=self.tolerance,
            failures=tuple(text for _, text in findings),
            warnings=tuple(warnings),
            blame=findings[0][0] if findings else "none",
            step=self.evidence.step,
            figures=figures,
            worst=self.evidence.worst,
        )

    def _derived(self) -> Finding:
        return apply_rule(self.evidence, precision=self.precision, bounded=self.bounded, envelope=self.envelope)

    def _nothing(self) -> str:
        bad = self.evidence.non_finite
        why = f"{bad.reference} are NaN or infinite in the reference, {bad.nan + bad.inf} in the backend's output"
        text = why if bad.reference or bad.nan or bad.inf else "the output is empty"
        return f"nothing: there is no finite element to judge: {text}"

    def _non_finite(self) -> list[tuple[str, str]]:
        bad = self.evidence.non_finite
        if bad.first is None:
            return []
        sample, index = bad.first
        text = (
            f"non-finite: {bad.nan} NaN and {bad.inf} infinite elements, {bad.reference} in the reference; "
            f"{bad.mismatched} don't match, the first in sample {sample} at {list(index)}"
        )
        if bad.by_reference:
            text += f"; in {bad.by_reference} of them the reference itself is NaN or infinite, so it can't decide"
        return [(attribute(self.evidence), text)]

    def _exact(self) -> list[tuple[str, str]]:
        """Integers: the backend may change as many as quantising or optimising does, and 1% where there are 100."""
        n = self.evidence.sums.n
        if 2 * self.reference_differing > n:
            text = f"values: the references themselves differ in {self.reference_differing} of {n} elements"
            blame = "reference" if 2 * self.check_differing > n or not self.evidence.has_float else "quantization"
            return [(blame, f"{text}: they leave nothing to compare")]
        limit = self.reference_differing + n // 100
        if self.differing <= limit:
            return []
        return [
            ("backend", f"values: {self.differing} of {n} integer elements differ from the reference (limit {limit})")
        ]

    def _explicit(self, t: Tolerance) -> list[tuple[str, str]]:
        figures, bad = self.evidence.figures(), self.evidence.non_finite
        against_q, against_f = [], []
        if t.steps is not None:
            step = self.evidence.step or self.nominal_step
            steps = self.evidence.sums.max_e / step if step else None
            if steps is None:
                against_q.append(
                    "steps: the output isn't quantised, so it has no steps: give absolute or sqnr_db instead"
                )
            elif not steps <= t.steps + STEP_SLACK:
                against_q.append(f"steps: the largest |y-q| is {steps:.3g} steps (limit {t.steps:g})")
        if self.violations:
            against_q.append(
                f"absolute/relative: {self.violations} of {self.evidence.sums.n} elements have |y-q| beyond "
                f"{t.absolute or 0:g} + {t.relative or 0:g}*|q|, by up to {self.largest_excess:.3g}"
            )
        for name, limit, unit in (("sqnr_db", t.sqnr_db, " dB"), ("cosine", t.cosine, "")):
            value = figures[name]
            if limit is not None and not (value is not None and value >= limit):
                against_f.append(f"{name}: {value:.5g}{unit} against float (limit {limit:g}{unit})")
        if self.top_k_misses:
            against_f.append(
                f"top_k: in {self.top_k_misses} of {self.top_k_rows} rows the reference's best class is not among the best {t.top_k:g}"
            )
        found = [(self._blame(against_float=False), text) for text in against_q]
        found += [(self._blame(against_float=True), text) for text in against_f]
        uses_float = t.sqnr_db is not None or t.cosine is not None or t.top_k is not None
        if uses_float and bad.float_mismatched:
            text = (
                f"reference: {bad.float_mismatched} elements are finite in only one of the float and the QDQ reference"
            )
            found.insert(0, ("reference", text))
        return found

    def _blame(self, against_float: bool) -> str:
        """ "limit" where the derived rule has no objection; else, against float, the larger of the two noises is to blame."""
        if not self.exact and not self._derived().failures:
            return "limit"
        s = self.evidence.sums
        if against_float and self.evidence.has_float and s.g2 > s.e2:
            return "quantization"
        return attribute(self.evidence, against_float=against_float)


def _mismatch(q: Array, y: Array, f: Array | None, r: Array | None) -> tuple[str, str] | None:
    """Blame and text, if the arrays of a sample can't be compared."""
    if y.shape != q.shape:
        return "backend", f"shape: the backend's is {list(y.shape)}, the reference's {list(q.shape)}"
    if (q.dtype.kind in "iu") != (y.dtype.kind in "iu") or (q.dtype.kind == "b") != (y.dtype.kind == "b"):
        return "backend", f"type: the backend's is {y.dtype}, the reference's {q.dtype}"
    for name, other in (("float reference", f), ("QDQ reference at another optimisation level", r)):
        if other is not None and other.shape != q.shape:
            return "reference", f"shape: the {name}'s is {list(other.shape)}, the QDQ reference's {list(q.shape)}"
    return None


def judge(cases: Sequence[OutputCase], samples: int) -> AccuracyVerdict:
    """The verdict on all outputs of a run.

    Raises:
        ValueError: there is no output or no sample, or an output wasn't given every sample.
    """
    if not cases or samples < 1:
        raise ValueError(f"nothing to judge: {len(cases)} outputs, {samples} samples")
    for case in cases:
        if case.samples != samples:
            raise ValueError(f"output {case.name!r} was given {case.samples} of {samples} samples")
    return AccuracyVerdict(tuple(case.judge() for case in cases), samples)
