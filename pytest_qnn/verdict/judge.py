"""From evidence to verdict: explicit limits where there are some, the derived rule elsewhere; and who is to blame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pytest_qnn.verdict.metrics import Array, Evidence
from pytest_qnn.verdict.rule import apply_rule, attribute
from pytest_qnn.verdict.tolerance import Tolerance

BLAME_ORDER = ("backend", "graph-edge quantizer", "quantization", "reference", "none")


@dataclass(frozen=True)
class Worst:
    """The element with the largest |y - q|: sample, index, and its three values (f is None without float reference)."""

    sample: int
    index: tuple[int, ...]
    f: float | None
    q: float
    y: float


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

    @property
    def ok(self) -> bool:
        """Whether every output passes."""
        return all(o.ok for o in self.outputs)

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
        structure: failures that make the numbers incomparable: shape or dtype.
    """

    name: str
    evidence: Evidence
    precision: str
    bounded: bool = False
    exact: bool = False
    tolerance: Tolerance | None = None
    limits_from: str = "derived"
    differing: int = 0
    reference_differing: int = 0
    violations: int = 0  # elements beyond absolute + relative * |q|
    largest_excess: float = 0.0
    structure: list[str] = field(default_factory=list)

    def add(self, q: Array, y: Array, f: Array | None, r: Array | None) -> None:
        """Add one sample of real values (see :meth:`Evidence.add`)."""
        if y.shape != q.shape:
            self.structure.append(f"shape: the backend's is {list(y.shape)}, the reference's {list(q.shape)}")
            return
        if f is not None and f.shape != q.shape:
            self.structure.append(
                f"shape: the float reference's is {list(f.shape)}, the QDQ reference's {list(q.shape)}"
            )
            return
        self.evidence.add(q, y, f, r)
        if self.exact:
            self.differing += int(np.count_nonzero(q != y))
            others = [other for other in (f, r) if other is not None]
            self.reference_differing += max((int(np.count_nonzero(q != other)) for other in others), default=0)
        t = self.tolerance
        if t is not None and (t.absolute is not None or t.relative is not None):
            self._bounds(np.asarray(q, np.float64).reshape(-1), np.asarray(y, np.float64).reshape(-1), t)
        if t is not None and t.top_k is not None:
            self._top_k(q if f is None else f, y, int(t.top_k))

    def _bounds(self, q: Array, y: Array, t: Tolerance) -> None:
        for start in range(0, q.size, 1 << 16):
            a, b = q[start : start + (1 << 16)], y[start : start + (1 << 16)]
            with np.errstate(invalid="ignore"):
                excess = np.abs(b - a) - ((t.absolute or 0.0) + (t.relative or 0.0) * np.abs(a))
            bad = excess > 0
            self.violations += int(np.count_nonzero(bad))
            if bad.any():
                self.largest_excess = max(self.largest_excess, float(excess[bad].max()))

    def _top_k(self, expected: Array, y: Array, k: int) -> None:
        if y.ndim == 0 or y.shape[-1] < k:
            self.structure.append(f"top_k: the last axis of shape {list(y.shape)} has fewer than {k} classes")
            return
        best = expected.reshape(-1, y.shape[-1]).argmax(-1)
        flat = y.reshape(-1, y.shape[-1])
        better = (flat > np.take_along_axis(flat, best[:, None], 1)).sum(1)
        misses = self.evidence.top_k_misses
        misses[k] = misses.get(k, 0) + int((better >= k).sum())

    def judge(self) -> OutputVerdict:
        """The verdict on this output."""
        evidence = self.evidence
        figures = dict(evidence.figures())
        failures, warnings, blame = list(dict.fromkeys(self.structure)), [], "none"
        if failures:
            blame = "backend" if any("backend" in f for f in failures) else "reference"
        bad = evidence.non_finite
        if bad.mismatched and bad.first is not None:
            index = _index(bad.first[1], evidence.shape)
            failures.append(
                f"non-finite: {bad.nan} NaN and {bad.inf} infinite elements, {bad.reference} in the reference; "
                f"{bad.mismatched} don't match, the first in sample {bad.first[0]} at {list(index)}"
            )
            blame = "backend"
        if self.tolerance is not None:
            found = self._explicit(figures)
            failures += found
            if found and blame == "none":
                blame = self._explicit_blame(figures)
        elif self.exact:
            limit = self.reference_differing + max(1, evidence.sums.n // 100) * (evidence.sums.n >= 100)
            figures |= {"differing": self.differing, "reference_differing": self.reference_differing}
            if self.differing > limit:
                failures.append(
                    f"values: {self.differing} of {evidence.sums.n} integer elements differ from the reference (limit {limit})"
                )
                blame = "backend" if blame == "none" else blame
        elif not self.structure:
            finding = apply_rule(evidence, precision=self.precision, bounded=self.bounded)
            failures += finding.failures
            warnings += finding.warnings
            blame = finding.blame if blame == "none" else blame
        return OutputVerdict(
            name=self.name,
            limits_from=self.limits_from,
            tolerance=self.tolerance,
            failures=tuple(failures),
            warnings=tuple(warnings),
            blame=blame if failures else "none",
            step=evidence.step,
            figures=figures,
            worst=_worst(evidence),
        )

    def _explicit(self, figures: Mapping[str, float | int | None]) -> list[str]:
        t, failures = self.tolerance, []
        assert t is not None
        if t.steps is not None:
            steps = figures["max_steps"]
            if steps is None:
                failures.append(
                    "steps: the output isn't quantised, so it has no steps: give absolute or sqnr_db instead"
                )
            elif steps > t.steps * (1 + 1e-3) + 1e-3:
                failures.append(f"steps: the largest |y-q| is {steps:.3g} steps (limit {t.steps:g})")
        if self.violations:
            failures.append(
                f"absolute/relative: {self.violations} of {self.evidence.sums.n} elements have |y-q| beyond "
                f"{t.absolute or 0:g} + {t.relative or 0:g}*|q|, by up to {self.largest_excess:.3g}"
            )
        sqnr, cosine = figures["sqnr_db"], figures["cosine"]
        if t.sqnr_db is not None and not (sqnr is not None and sqnr >= t.sqnr_db):
            failures.append(f"sqnr_db: {sqnr:.1f} dB against float (limit {t.sqnr_db:g} dB)")
        if t.cosine is not None and not (cosine is not None and cosine >= t.cosine):
            failures.append(f"cosine: {cosine:.5f} against float (limit {t.cosine:g})")
        if t.top_k is not None and (misses := self.evidence.top_k_misses.get(int(t.top_k), 0)):
            failures.append(f"top_k: in {misses} rows the reference's best class is not among the best {t.top_k:g}")
        return failures

    def _explicit_blame(self, figures: Mapping[str, float | int | None]) -> str:
        """Against float, the larger of the two noises is to blame; against q, it can't be the quantisation."""
        s, t = self.evidence.sums, self.tolerance
        assert t is not None
        against_float = t.steps is None and t.absolute is None and t.relative is None
        if against_float and self.evidence.has_float and s.g2 > s.e2:
            return "quantization"
        return attribute(self.evidence, ruined=None if against_float else False)


def _index(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, tuple(shape))) if shape else ()


def _worst(evidence: Evidence) -> Worst | None:
    if not evidence.sums.n:
        return None
    sample, flat = evidence.worst
    f, q, y = evidence.worst_values
    return Worst(sample, _index(flat, evidence.shape), f, q, y)


def judge(cases: Sequence[OutputCase], samples: int) -> AccuracyVerdict:
    """The verdict on all outputs of a run."""
    return AccuracyVerdict(tuple(case.judge() for case in cases), samples)
