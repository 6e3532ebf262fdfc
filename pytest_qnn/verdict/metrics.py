"""All metrics of an output in one pass over blocks, in float32 arithmetic with float64 totals.

Notation: f the float32 reference, q the QDQ reference, r the same at another optimisation level (the reference's
self-check), y the backend's output, s the output's quantisation step; e = y - q, g = q - f, h = r - q. Sums of squares are
taken of differences, never as differences of sums, so small errors on large values keep their digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_qnn.verdict.channels import Channels, Layout, channel_axes
from pytest_qnn.verdict.sketches import RangeEnd, Rows

BLOCK = 1 << 16  # elements; measured fastest: few calls, and the blocks at hand stay in the processor's caches
STEP_SLACK = 2.0**-7  # steps; float32's own rounding of two values of 65,535 steps is up to half of it
MODERATE = (1e-3, 1e6)  # largest magnitude of a block whose fourth powers float32 can hold
Array = npt.NDArray[Any]


@dataclass
class Sums:
    """Totals over all finite elements; see the module's notation. ``q2e2`` is the sum of q^2 e^2, and so on."""

    n: int = 0
    q1: float = 0.0
    q2: float = 0.0
    q4: float = 0.0
    y2: float = 0.0
    f2: float = 0.0
    e1: float = 0.0
    e2: float = 0.0
    e4: float = 0.0
    eq: float = 0.0
    q2e2: float = 0.0
    q3e: float = 0.0
    g1: float = 0.0
    g2: float = 0.0
    g4: float = 0.0
    gf: float = 0.0
    yf2: float = 0.0
    h2: float = 0.0
    spread: float = 0.0  # sum of (q - mean q)^2
    max_q: float = 0.0
    max_e: float = 0.0
    max_f: float = 0.0
    max_g: float = 0.0
    max_h: float = 0.0
    far: float = 0.0  # largest min(|y - q|, |y - f|)
    beyond: int = 0  # elements with |e| > s

    @property
    def variance(self) -> float:
        """Variance of q."""
        return self.spread / self.n if self.n else 0.0

    @property
    def fy(self) -> float:
        """Sum of f y, from y - f."""
        return (self.f2 + self.y2 - self.yf2) / 2


@dataclass
class NonFinite:
    """Non-finite values, by where they are.

    Attributes:
        nan, inf: how many y has.
        reference: how many q has.
        mismatched: elements in which y and q aren't both finite, both NaN or the same infinity.
        by_reference: those of them in which q itself isn't finite.
        float_mismatched: elements in which only one of f and q is finite.
        check_mismatched: elements in which only one of r and q is finite.
        first: sample and index of the first mismatch.
    """

    nan: int = 0
    inf: int = 0
    reference: int = 0
    mismatched: int = 0
    by_reference: int = 0
    float_mismatched: int = 0
    check_mismatched: int = 0
    first: tuple[int, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Worst:
    """The element with the largest |y - q|: sample, index, and its three values (f is None without float reference)."""

    sample: int
    index: tuple[int, ...]
    f: float | None
    q: float
    y: float


class _Workspace:
    """Scratch blocks of one dtype, reused."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self.a, self.b, self.c, self.d = (np.empty(BLOCK, dtype) for _ in range(4))
        self.ones = np.ones(BLOCK, dtype)
        self.mask = np.empty(BLOCK, np.bool_)


@dataclass(frozen=True)
class _Block:
    """A block of one sample: equally long flat arrays of one dtype, all finite; ``n`` of the elements count.

    ``q_range`` and so on are smallest and largest value.
    """

    sample: int
    layout: Layout
    start: int
    n: int
    q: Array
    y: Array
    f: Array | None
    r: Array | None
    q_range: tuple[float, float]
    y_range: tuple[float, float]
    f_range: tuple[float, float]


@dataclass
class Evidence:
    """Everything that is known of one output of a run, sample by sample.

    Attributes:
        step: one quantisation step; None where the output isn't quantised.
        has_float, has_check: whether f and r are given, for every sample.
        channels: totals by axis and number of channels.
        worst: None until an element was added.
    """

    step: float | None = None
    has_float: bool = True
    has_check: bool = True
    sums: Sums = field(default_factory=Sums)
    non_finite: NonFinite = field(default_factory=NonFinite)
    samples: int = 0
    worst: Worst | None = None
    channels: dict[tuple[int, int], Channels] = field(default_factory=dict)
    rows: Rows = field(default_factory=Rows)
    ends: tuple[RangeEnd, RangeEnd] = field(default_factory=lambda: (RangeEnd(1), RangeEnd(-1)))
    _work: dict[npt.DTypeLike, _Workspace] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"a quantisation step must be positive and finite, got {self.step!r}")

    def add(self, q: Array, y: Array, f: Array | None = None, r: Array | None = None) -> None:
        """Add one sample.

        Args:
            q, y, f, r: arrays of one shape, real values of any float, integer or boolean type. They are compared as
                float32, and aren't copied if they are contiguous float32.

        Raises:
            ValueError: shapes differ, or f or r is missing where the evidence has one, or the other way round.
        """
        if (f is not None, r is not None) != (self.has_float, self.has_check):
            raise ValueError("float reference and self-check must be given for all samples or for none")
        shapes = [a.shape for a in (q, y, f, r) if a is not None]
        if any(shape != q.shape for shape in shapes):
            raise ValueError(f"shapes differ: {shapes}")
        flat_q, flat_y, flat_f, flat_r = (
            None if a is None else np.ascontiguousarray(a).reshape(-1) for a in (q, y, f, r)
        )
        assert flat_q is not None
        assert flat_y is not None
        totals, layout = self._totals(q.shape), Layout(q.shape, BLOCK)
        for part in layout.blocks():
            values = [None if a is None else _float32(a[part]) for a in (flat_q, flat_y, flat_f, flat_r)]
            self._block(self._prepare(layout, part.start, values), totals)
        if q.size:
            self.rows.add(q.shape, flat_q, flat_y)
        self.samples += 1

    def _totals(self, shape: tuple[int, ...]) -> list[Channels]:
        found = []
        for axis in channel_axes(shape):
            count = shape[axis]
            totals = self.channels.setdefault((axis, count), Channels(axis, count))
            totals.elements += math.prod(shape) // count
            found.append(totals)
        return found

    def _prepare(self, layout: Layout, start: int, values: list[Array | None]) -> _Block:
        """A block without non-finite values, in float64 if float32 can't hold its fourth powers."""
        q, y, f, r = values
        assert q is not None
        assert y is not None
        n, ranges = q.size, [_range(a) for a in (q, y, f, r) if a is not None]
        if not all(math.isfinite(low) and math.isfinite(high) for low, high in ranges):
            n, q, y, f, r = self._without_non_finite(layout.shape, start, q, y, f, r)
            ranges = [_range(a) for a in (q, y, f, r) if a is not None]
        largest = max(max(high, -low) for low, high in ranges)
        if largest and not MODERATE[0] < largest < MODERATE[1]:
            q, y = q.astype(np.float64), y.astype(np.float64)
            f, r = (None if a is None else a.astype(np.float64) for a in (f, r))
        f_range = ranges[2] if f is not None else ranges[0]
        return _Block(self.samples, layout, start, n, q, y, f, r, ranges[0], ranges[1], f_range)

    def _without_non_finite(
        self, shape: tuple[int, ...], start: int, q: Array, y: Array, f: Array | None, r: Array | None
    ) -> tuple[int, Array, Array, Array | None, Array | None]:
        """Count the non-finite elements and make them zero everywhere; those of f and r alone become q."""
        bad, expected, got = self.non_finite, ~np.isfinite(q), ~np.isfinite(y)
        same = np.where(expected & got, (np.isnan(q) & np.isnan(y)) | (q == y), expected == got)
        bad.nan += int(np.isnan(y).sum())
        bad.inf += int(np.isinf(y).sum())
        bad.reference += int(expected.sum())
        bad.mismatched += int((~same).sum())
        bad.by_reference += int((expected & ~same).sum())
        if bad.first is None and not same.all():
            bad.first = (self.samples, _index(start + int(np.argmin(same)), shape))
        skip = expected | got
        if f is not None:
            bad.float_mismatched += int((np.isfinite(f) == expected).sum())
            f = np.where(skip, 0, np.where(np.isfinite(f), f, q)).astype(q.dtype)
        if r is not None:
            bad.check_mismatched += int((np.isfinite(r) == expected).sum())
            r = np.where(skip, 0, np.where(np.isfinite(r), r, q)).astype(q.dtype)
        zero = q.dtype.type(0)
        return int((~skip).sum()), np.where(skip, zero, q), np.where(skip, zero, y), f, r

    def _block(self, block: _Block, channels: list[Channels]) -> None:
        if not block.n:
            return
        q, y, n = block.q, block.y, block.q.size
        work = self._workspace(q.dtype)
        s, dot, ones = self.sums, np.dot, work.ones[:n]
        e = np.subtract(y, q, out=work.a[:n])
        q1, q2 = float(dot(q, ones)), float(dot(q, q))
        e1, e2, eq = float(dot(e, ones)), float(dot(e, e)), float(dot(e, q))
        self._spread(block, q1, q2, work)
        s.n += block.n
        s.q1 += q1
        s.q2 += q2
        s.y2 += float(dot(y, y))
        s.e1 += e1
        s.e2 += e2
        s.eq += eq
        qq = np.multiply(q, q, out=work.b[:n])
        ee = np.multiply(e, e, out=work.c[:n])
        qe = np.multiply(q, e, out=work.d[:n])
        s.q4 += float(dot(qq, qq))
        s.e4 += float(dot(ee, ee))
        s.q3e += float(dot(qq, qe))
        s.q2e2 += float(dot(qe, qe))
        for totals in channels:
            totals.add(block.layout, block.start, ones, e1=(e, e1), e2=(ee, e2), q1=(q, q1), q2=(qq, q2), eq=(qe, eq))
        self._extremes(block, e, ee, work)
        self._float(block, ee, channels, work)
        self._check(block, channels, work)

    def _workspace(self, dtype: npt.DTypeLike) -> _Workspace:
        if dtype not in self._work:
            self._work[dtype] = _Workspace(dtype)
        return self._work[dtype]

    def _spread(self, block: _Block, q1: float, q2: float, work: _Workspace) -> None:
        """Merge the block's sum of squares about its mean (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        s, mean = self.sums, q1 / block.n
        about_mean = q2 - q1 * mean
        if about_mean < 1e-3 * q2 and block.n == block.q.size:
            centered = np.subtract(block.q, block.q.dtype.type(mean), out=work.b[: block.q.size])
            about_mean = float(np.dot(centered, centered))
        between = (mean - s.q1 / s.n) ** 2 * s.n * block.n / (s.n + block.n) if s.n else 0.0
        s.spread += max(about_mean, 0.0) + between

    def _extremes(self, block: _Block, e: Array, ee: Array, work: _Workspace) -> None:
        """Largest |e|, elements beyond a step, and the ends of the range; from e and e^2."""
        s, (low, high) = self.sums, block.q_range
        s.max_q = max(s.max_q, high, -low)
        top, bottom = self.ends
        top.add(block.q, block.y, high, block.y_range[1])
        bottom.add(block.q, block.y, low, block.y_range[0])
        largest = math.sqrt(float(ee.max()))
        limit = math.inf if self.step is None else self.step * (1 + STEP_SLACK)
        if largest > limit:
            s.beyond += int(np.count_nonzero(np.greater(ee, ee.dtype.type(limit**2), out=work.mask[: e.size])))
        if largest > s.max_e or self.worst is None:
            at = int(ee.argmax())
            s.max_e = max(s.max_e, abs(float(e[at])))
            f = None if block.f is None else float(block.f[at])
            index = _index(block.start + at, block.layout.shape)
            self.worst = Worst(block.sample, index, f, float(block.q[at]), float(block.y[at]))

    def _float(self, block: _Block, ee: Array, channels: list[Channels], work: _Workspace) -> None:
        """Totals of f, g = q - f and y - f; all of the workspace but e^2 is free."""
        s, f, n, dot = self.sums, block.f, ee.size, np.dot
        if f is None:
            s.far = s.max_e
            return
        total = np.subtract(block.y, f, out=work.a[:n])
        s.yf2 += float(dot(total, total))
        nearer = np.minimum(np.multiply(total, total, out=work.a[:n]), ee, out=work.a[:n])
        s.far = max(s.far, math.sqrt(float(nearer.max())))
        g = np.subtract(block.q, f, out=work.a[:n])
        f2, g2 = float(dot(f, f)), float(dot(g, g))
        s.f2 += f2
        s.g1 += float(dot(g, work.ones[:n]))
        s.g2 += g2
        s.gf += float(dot(g, f))
        s.max_f = max(s.max_f, block.f_range[1], -block.f_range[0])
        gg = np.multiply(g, g, out=work.b[:n])
        s.max_g = max(s.max_g, _magnitude(g))
        s.g4 += float(dot(gg, gg))
        ff = np.multiply(f, f, out=work.d[:n]) if block.layout.needs_blocks else f
        for totals in channels:
            totals.add(block.layout, block.start, work.ones, g2=(gg, g2), f2=(ff, f2))

    def _check(self, block: _Block, channels: list[Channels], work: _Workspace) -> None:
        """Totals of h = r - q; all of the workspace is free."""
        if block.r is None:
            return
        s, n = self.sums, block.r.size
        h = np.subtract(block.r, block.q, out=work.a[:n])
        h2 = float(np.dot(h, h))
        if not h2:
            return
        s.h2 += h2
        s.max_h = max(s.max_h, _magnitude(h))
        hh = np.multiply(h, h, out=work.b[:n]) if block.layout.needs_blocks else h
        for totals in channels:
            totals.add(block.layout, block.start, work.ones, h2=(hh, h2))

    # --- derived figures ----------------------------------------------------------------------------------------------

    @property
    def gain(self) -> float:
        """Least-squares slope of y on q through the origin."""
        return 1 + self.sums.eq / self.sums.q2 if self.sums.q2 > 0 else 1.0

    @property
    def bias(self) -> float:
        """Mean of y - q."""
        return self.sums.e1 / self.sums.n if self.sums.n else 0.0

    def figures(self) -> dict[str, float | int | None]:
        """The figures of a report, by name: dB, steps (where there is a step) and shares."""
        s, n = self.sums, max(self.sums.n, 1)
        signal, noise = (s.f2, s.yf2) if self.has_float else (s.q2, s.e2)
        step = self.step
        steps: Callable[[float], float | None] = (lambda v: v / step) if step else (lambda v: None)
        cosine = math.nan
        dot, left = (s.fy, s.f2) if self.has_float else (s.q2 + s.eq, s.q2)
        if left > 0 and s.y2 > 0:
            cosine = max(-1.0, min(1.0, dot / math.sqrt(left) / math.sqrt(s.y2)))
        return {
            "elements": s.n,
            "max_error": s.max_e,
            "max_steps": steps(s.max_e),
            "mean_steps": steps(self.bias),
            "rms_steps": steps(math.sqrt(s.e2 / n)),
            "beyond_one_step": s.beyond / n if self.step else None,
            "sqnr_db": decibels(signal, noise),
            "sqnr_quantized_db": decibels(s.f2, s.g2) if self.has_float else None,
            "sqnr_against_quantized_db": decibels(s.q2, s.e2),
            "noise_quantization": s.g2 / n if self.has_float else None,
            "noise_total": s.yf2 / n if self.has_float else None,
            "noise_backend": s.e2 / n,
            "cosine": cosine,
            "gain": self.gain,
            "bias": self.bias,
            "nan": self.non_finite.nan,
            "inf": self.non_finite.inf,
            "non_finite_mismatched": self.non_finite.mismatched,
            "reference_self_difference": s.max_h if self.has_check else None,
            "reference_self_difference_steps": steps(s.max_h) if self.has_check else None,
        }


def _float32(a: Array) -> Array:
    if a.dtype == np.float32:
        return a
    with np.errstate(over="ignore"):  # beyond float32's range is infinite, and counted as such
        return a.astype(np.float32, copy=False)


def _range(a: Array) -> tuple[float, float]:
    """Smallest and largest value; not finite if any element isn't."""
    return float(a.min()), float(a.max())


def _magnitude(a: Array) -> float:
    """Largest absolute value of finite elements."""
    low, high = _range(a)
    return max(high, -low)


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape)) if shape else ()


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; infinite without noise, minus infinite without signal, NaN if either is NaN."""
    if noise <= 0:
        return math.inf
    if signal <= 0 or noise == math.inf:
        return -math.inf
    return 10 * (math.log10(signal) - math.log10(noise))
