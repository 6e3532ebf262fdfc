"""All metrics of an output in one pass over blocks, in float32 arithmetic with float64 totals.

Notation: f the float32 reference, q the QDQ reference, r the same at another optimisation level (the reference's
self-check), y the backend's output, s the output's quantisation step; e = y - q, g = q - f, h = r - q. Sums of squares are
taken of differences, never as differences of sums, so small errors on large values keep their digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 15  # elements; half a dozen float32 blocks of this size fit into a second-level cache
PIECE = 1 << 17  # elements of a piece of the per-channel pass
MAX_CHANNELS = 4096
SKETCH = 2048  # elements of a row that are kept to compare rows with each other
MAX_ROWS = 256
EDGE = 4  # reference elements that must lie beyond the backend's extreme value to call it saturated
Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


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
    eg: float = 0.0
    h2: float = 0.0
    max_e: float = 0.0
    max_f: float = 0.0
    max_g: float = 0.0
    max_h: float = 0.0
    far: float = 0.0  # largest min(|y - q|, |y - f|)
    beyond: int = 0  # elements with |e| > s

    @property
    def yf2(self) -> float:
        """Sum of (y - f)^2, from (y - f) = e + g."""
        return max(self.e2 + 2 * self.eg + self.g2, 0.0)

    @property
    def fy(self) -> float:
        """Sum of f y, from y - f."""
        return (self.f2 + self.y2 - self.yf2) / 2


@dataclass
class Channels:
    """Per-channel totals along one axis."""

    axis: int
    elements: int  # elements of a channel, over all samples
    e2: F64
    g2: F64
    h2: F64
    f2: F64
    q1: F64
    q2: F64
    y1: F64
    y2: F64


@dataclass
class NonFinite:
    """Non-finite values: how many, and how many of them the reference doesn't have in the same place."""

    nan: int = 0
    inf: int = 0
    reference: int = 0
    mismatched: int = 0
    first: tuple[int, int] | None = None


class _Workspace:
    """Scratch blocks, about 1 MiB, reused."""

    def __init__(self) -> None:
        self.floats = [np.empty(BLOCK, np.float32) for _ in range(6)]
        self.ones = np.ones(BLOCK, np.float32)
        self.mask = np.empty(BLOCK, np.bool_)


@dataclass
class Evidence:
    """Everything that is known of one output of a run, sample by sample.

    Attributes:
        step: one quantisation step; None where the output isn't quantised.
        has_float, has_check: whether f and r are given (they must be for all samples or for none).
    """

    step: float | None = None
    has_float: bool = True
    has_check: bool = True
    sums: Sums = field(default_factory=Sums)
    channels: list[Channels] = field(default_factory=list)
    non_finite: NonFinite = field(default_factory=NonFinite)
    samples: int = 0
    shape: tuple[int, ...] = ()
    worst: tuple[int, int] = (0, 0)  # sample and flat index of the largest |e|
    worst_values: tuple[float | None, float, float] = (None, 0.0, 0.0)  # f, q, y there
    saturated: int = 0
    rows_y: list[F32] = field(default_factory=list)
    rows_q: list[F32] = field(default_factory=list)
    row_share: float = 1.0  # share of a row's elements that the sketch keeps
    top_k_misses: dict[int, int] = field(default_factory=dict)
    _work: _Workspace = field(default_factory=_Workspace, repr=False)

    def add(self, q: Array, y: Array, f: Array | None = None, r: Array | None = None) -> None:
        """Add one sample.

        Args:
            q, y, f, r: arrays of one shape, real values of any float or integer type.

        Raises:
            ValueError: shapes differ.
        """
        given = [a for a in (q, y, f, r) if a is not None]
        if any(a.shape != q.shape for a in given):
            raise ValueError(f"shapes differ: {[a.shape for a in given]}")
        q, y = _f32(q), _f32(y)
        f, r = None if f is None else _f32(f), None if r is None else _f32(r)
        sample = self.samples
        self.samples += 1
        self.shape = q.shape
        clean = self._flat(sample, q.reshape(-1), y.reshape(-1), _flat(f), _flat(r))
        if q.size and clean:
            self._rows(q, y)
            self._saturation(q.reshape(-1), y.reshape(-1))
            for position, axis in enumerate(_channel_axes(q.shape)):
                self._channels(position, axis, q, y, f, r)

    def _flat(self, sample: int, q: F32, y: F32, f: F32 | None, r: F32 | None) -> bool:
        scale = _power_of_two(q)
        before = self.non_finite.nan + self.non_finite.inf + self.non_finite.reference
        for start in range(0, q.size, BLOCK):
            stop = min(start + BLOCK, q.size)
            part = slice(start, stop)
            self._block(
                sample,
                start,
                scale,
                q[part],
                y[part],
                None if f is None else f[part],
                None if r is None else r[part],
            )
        return before == self.non_finite.nan + self.non_finite.inf + self.non_finite.reference

    def _block(self, sample: int, start: int, scale: float, q: F32, y: F32, f: F32 | None, r: F32 | None) -> None:
        n, s, dot = q.size, self.sums, np.dot
        a, b, c, d, g, t = (w[:n] for w in self._work.floats)
        ones = self._work.ones[:n]
        if scale != 1.0:  # keeps fourth powers within float32; sums are scaled back below
            q, y = np.multiply(q, np.float32(scale), out=a), np.multiply(y, np.float32(scale), out=b)
        e = np.subtract(y, q, out=c)
        with np.errstate(over="ignore", invalid="ignore"):
            ee, qq = np.multiply(e, e, out=d), np.multiply(q, q, out=t)
            e2, q2, y2, eq = dot(e, e), dot(q, q), dot(y, y), dot(e, q)
            e4, q4, q2e2 = dot(ee, ee), dot(qq, qq), dot(qq, ee)
            q3e = dot(qq, np.multiply(q, e, out=t))
        if not math.isfinite(float(e2) + float(q2) + float(y2) + float(e4) + float(q4) + float(q2e2)):
            return self._careful(sample, start, q, y, f, r, scale)
        u, u2 = 1 / scale, 1 / scale**2
        s.n += n
        s.e2 += float(e2) * u2
        s.q2 += float(q2) * u2
        s.y2 += float(y2) * u2
        s.eq += float(eq) * u2
        s.e4 += float(e4) * u2 * u2
        s.q4 += float(q4) * u2 * u2
        s.q2e2 += float(q2e2) * u2 * u2
        s.q3e += float(q3e) * u2 * u2
        s.e1 += float(dot(e, ones)) * u
        s.q1 += float(dot(q, ones)) * u
        magnitude = np.abs(e, out=d)
        far = magnitude
        if f is not None:
            f = np.multiply(f, np.float32(scale), out=t) if scale != 1.0 else f
            gap = np.subtract(q, f, out=g)
            with np.errstate(over="ignore", invalid="ignore"):
                f2, g2 = float(dot(f, f)), float(dot(gap, gap))
            if not math.isfinite(f2 + g2):
                raise _NonFiniteFloatReference
            s.f2 += f2 * u2
            s.g2 += g2 * u2
            s.gf += float(dot(gap, f)) * u2
            s.eg += float(dot(e, gap)) * u2
            s.g1 += float(dot(gap, ones)) * u
            s.max_f = max(s.max_f, float(f.max()) * u, -float(f.min()) * u)
            s.max_g = max(s.max_g, float(gap.max()) * u, -float(gap.min()) * u)
            total = np.add(e, gap, out=e)  # y - f
            far = np.minimum(np.abs(total, out=e), magnitude, out=e)
            square = np.multiply(gap, gap, out=g)
            s.g4 += float(dot(square, square)) * u2 * u2
        largest = float(magnitude.max()) * u
        s.far = max(s.far, float(far.max()) * u)
        if largest > s.max_e or (sample == 0 and start == 0):
            where = int(magnitude.argmax())
            s.max_e, self.worst = largest, (sample, start + where)
            self.worst_values = (
                None if f is None else float(f[where]) * u,
                float(q[where]) * u,
                float(y[where]) * u,
            )
        if self.step and largest > self.step * (1 + 1e-3):  # a thousandth for float32's own rounding of the steps
            limit = np.float32(self.step * (1 + 1e-3) * scale)
            s.beyond += int(np.count_nonzero(np.greater(magnitude, limit, out=self._work.mask[:n])))
        if r is not None:
            r = np.multiply(r, np.float32(scale), out=t) if scale != 1.0 else r
            h = np.subtract(r, q, out=g)
            h2 = float(dot(h, h))
            if math.isfinite(h2):
                s.h2 += h2 * u2
                s.max_h = max(s.max_h, float(h.max()) * u, -float(h.min()) * u)
        return None

    def _careful(self, sample: int, start: int, q: F32, y: F32, f: F32 | None, r: F32 | None, scale: float) -> None:
        """A block with non-finite or huge values: count those, and add up the rest in float64."""
        expected, got = ~np.isfinite(q), ~np.isfinite(y)
        same = np.where(expected & got, (np.isnan(q) & np.isnan(y)) | (q == y), expected == got)
        bad = self.non_finite
        bad.nan += int(np.isnan(y).sum())
        bad.inf += int(np.isinf(y).sum())
        bad.reference += int(expected.sum())
        if not same.all():
            bad.mismatched += int((~same).sum())
            bad.first = bad.first or (sample, start + int(np.argmin(same)))
        keep = ~(expected | got)
        if f is not None:
            keep &= np.isfinite(f)
        if r is not None:
            keep &= np.isfinite(r)
        if not keep.any():
            return
        u = 1 / scale
        Q, Y = q[keep].astype(np.float64) * u, y[keep].astype(np.float64) * u
        e, s = Y - Q, self.sums
        F = Q if f is None else f[keep].astype(np.float64)
        h = np.zeros(1) if r is None else r[keep].astype(np.float64) - Q
        g = Q - F
        s.n += Q.size
        for name, value in {
            "q1": Q.sum(),
            "q2": Q @ Q,
            "q4": (Q * Q) @ (Q * Q),
            "y2": Y @ Y,
            "e1": e.sum(),
            "e2": e @ e,
            "e4": (e * e) @ (e * e),
            "eq": e @ Q,
            "q2e2": (Q * Q) @ (e * e),
            "q3e": (Q * Q) @ (Q * e),
            "f2": F @ F if f is not None else 0.0,
            "g1": g.sum(),
            "g2": g @ g,
            "g4": (g * g) @ (g * g),
            "gf": g @ F,
            "eg": e @ g,
            "h2": h @ h,
        }.items():
            setattr(s, name, getattr(s, name) + float(value))
        s.max_f = max(s.max_f, float(np.abs(F).max())) if f is not None else s.max_f
        s.max_g = max(s.max_g, float(np.abs(g).max()))
        s.max_h = max(s.max_h, float(np.abs(h).max()))
        s.far = max(s.far, float(np.minimum(np.abs(e), np.abs(Y - F) if f is not None else np.abs(e)).max()))
        where = int(np.abs(e).argmax())
        if abs(e[where]) > s.max_e:
            s.max_e = float(abs(e[where]))
            self.worst = (sample, start + int(np.flatnonzero(keep)[where]))
            self.worst_values = (None if f is None else float(F[where]), float(Q[where]), float(Y[where]))
        if self.step:
            s.beyond += int((np.abs(e) > self.step * (1 + 1e-3)).sum())

    # --- what needs more than sums ------------------------------------------------------------------------------------

    def _rows(self, q: F32, y: F32) -> None:
        """Keep a sketch of each row (of the batch axis; else of each sample) to compare rows with each other."""
        rows = q.shape[0] if q.ndim > 1 and 1 < q.shape[0] <= 64 else 1
        length = q.size // rows
        stride = max(1, -(-length // SKETCH))
        self.row_share = len(range(0, length, stride)) / length
        for one_q, one_y in zip(q.reshape(rows, -1), y.reshape(rows, -1), strict=True):
            if len(self.rows_q) < MAX_ROWS:
                self.rows_q.append(one_q[::stride].copy())
                self.rows_y.append(one_y[::stride].copy())

    def _saturation(self, q: F32, y: F32) -> None:
        """Count reference elements beyond the backend's extreme values, where those are one and the same value."""
        for sign in (1, -1):
            edge, top = (float(y.max()), float(q.max())) if sign > 0 else (-float(y.min()), -float(q.min()))
            margin = 2 * self.step if self.step else 0.05 * abs(edge)
            if top > edge + margin:
                over = (q if sign > 0 else -q) > edge + margin
                count = int(np.count_nonzero(over))
                at_edge = (y[over] if sign > 0 else -y[over]) >= edge - 1e-3 * margin
                if count >= EDGE and bool(at_edge.all()):
                    self.saturated += count

    def _channels(self, position: int, axis: int, q: F32, y: F32, f: F32 | None, r: F32 | None) -> None:
        count = q.shape[axis]
        if position == len(self.channels):
            self.channels.append(Channels(axis, 0, *(np.zeros(count) for _ in range(8))))
        sums = self.channels[position]
        if sums.e2.size != count:
            return
        sums.elements += q.size // count
        inner = math.prod(q.shape[axis + 1 :])
        view = (-1, count, inner)
        Q, Y = q.reshape(view), y.reshape(view)
        F, R = (None if x is None else x.reshape(view) for x in (f, r))
        lines = max(1, PIECE // (count * inner)) if count * inner <= PIECE else 1
        wide = count if count * inner <= PIECE else max(1, PIECE // inner)
        for i in range(0, Q.shape[0], lines):
            for k in range(0, count, wide):
                part = (slice(i, i + lines), slice(k, k + wide))
                qp, yp = Q[part], Y[part]
                e, to = yp - qp, slice(k, k + wide)
                sums.e2[to] += _per_channel(e, e)
                sums.q2[to] += _per_channel(qp, qp)
                sums.y2[to] += _per_channel(yp, yp)
                sums.q1[to] += qp.sum((0, 2), dtype=np.float64)
                sums.y1[to] += yp.sum((0, 2), dtype=np.float64)
                if F is not None:
                    g = qp - F[part]
                    sums.g2[to] += _per_channel(g, g)
                    sums.f2[to] += _per_channel(F[part], F[part])
                if R is not None:
                    h = R[part] - qp
                    sums.h2[to] += _per_channel(h, h)

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
        steps = (lambda v: v / self.step) if self.step else (lambda v: None)
        cosine = math.nan
        dot, left = (s.fy, s.f2) if self.has_float else (s.q2 + s.eq, s.q2)
        if left > 0 and s.y2 > 0:
            cosine = max(-1.0, min(1.0, dot / math.sqrt(left * s.y2)))
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


class _NonFiniteFloatReference(ValueError):
    """The float reference has non-finite values where the quantised one has none."""


def _f32(a: Array) -> F32:
    return np.ascontiguousarray(a, dtype=np.float32)


def _flat(a: F32 | None) -> F32 | None:
    return None if a is None else a.reshape(-1)


def _per_channel(a: F32, b: F32) -> F64:
    return np.einsum("acb,acb->c", a, b, dtype=np.float64, casting="same_kind") if a.size < 4096 else _fast(a, b)


def _fast(a: F32, b: F32) -> F64:
    return (a * b).sum((0, 2), dtype=np.float64)  # type: ignore[no-any-return]


def _power_of_two(q: F32) -> float:
    """A power of two that brings values whose fourth powers would leave float32's range near 1; else 1."""
    largest = float(np.abs(q[:BLOCK]).max(initial=0.0))
    if not math.isfinite(largest) or largest == 0 or 1e-3 < largest < 1e6:
        return 1.0
    return 2.0 ** max(-100, min(100, -round(math.log2(largest))))


def _channel_axes(shape: tuple[int, ...]) -> list[int]:
    axes = sorted({1, len(shape) - 1}) if len(shape) > 1 else []
    return [axis for axis in axes if 2 <= shape[axis] <= MAX_CHANNELS]


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; infinite without noise, minus infinite without signal."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
