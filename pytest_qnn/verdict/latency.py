"""Latency: percentiles with confidence intervals, and three outcomes against a budget.

Confidence intervals of percentiles are distribution-free: order statistics whose ranks come from the binomial
distribution of "how many of n samples lie below the percentile" (e.g. Conover, Practical Nonparametric Statistics, 3.2).
They hold for independent samples; :attr:`LatencyStats.drift` shows when the samples were not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pytest_qnn.errors import OptionError
from pytest_qnn.verdict.tolerance import _number, check_fields

if TYPE_CHECKING:
    from pytest_qnn.verdict.stability import Assessment

CONFIDENCE = 0.95
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class LatencyBudget:
    """Limits for a measurement; a limit of None isn't applied.

    Attributes:
        p50_ms, p95_ms, p99_ms: percentiles of the time of one inference, in ms, at most.
        throughput_ips: inferences per second, at least.
        peak_memory_mb: peak resident memory of the runtime's process while measuring, in MiB, at most.
        energy_mj: energy of one inference above the idle device's, in mJ, at most; undecided where no battery tells.
    """

    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    throughput_ips: float | None = None
    peak_memory_mb: float | None = None
    energy_mj: float | None = None

    def __post_init__(self) -> None:
        check_fields(LatencyBudget, "latency_budget", vars(self))
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                if value == 0:
                    raise OptionError(f"latency_budget: {f.name} must be greater than 0")
                _number("latency_budget", f.name, value, 0, math.inf)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> LatencyBudget:
        """Build from a marker's or a table's values; errors name ``where``.

        Raises:
            OptionError: unknown argument, bad value, or nothing given.
        """
        check_fields(cls, where, values)
        try:
            return cls(**values)
        except OptionError as error:
            raise OptionError(f"{where}: {str(error).removeprefix('latency_budget: ')}") from None


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval. ``high`` is infinite while there are too few samples to bound it."""

    value: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        """Width of the interval over the value."""
        return (self.high - self.low) / self.value if self.value > 0 else math.inf

    def to_json(self) -> dict[str, float | None]:
        """As JSON; an infinite bound becomes null."""
        return {k: (v if math.isfinite(v) else None) for k, v in asdict(self).items()}


def _binomial_cdf(n: int, p: float) -> list[float]:
    """P(X <= k) for k = 0..n, X ~ Binomial(n, p), by summing exact terms in log space."""
    log_p, log_q = math.log(p), math.log1p(-p)
    total, cdf = 0.0, []
    for k in range(n + 1):
        log_term = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_p + (n - k) * log_q
        total += math.exp(log_term)
        cdf.append(min(total, 1.0))
    return cdf


def percentile_interval(ordered: Sequence[float], percent: float, confidence: float = CONFIDENCE) -> Interval:
    """Percentile of ``ordered`` (ascending, at least one sample) with a distribution-free interval.

    Each side is missed with probability at most ``(1 - confidence) / 2``. A side that the samples can't bound at that
    confidence is 0 or infinite.
    """
    n, p = len(ordered), percent / 100
    tail = (1 - confidence) / 2
    cdf = _binomial_cdf(n, p)
    # x_(r) (1-based) lies below the percentile unless fewer than r samples do: P(X < r) = cdf[r - 1] <= tail
    lower_rank = 0
    while lower_rank < n and cdf[lower_rank] <= tail:
        lower_rank += 1
    # x_(r) lies at or above it unless r or more samples lie below: P(X >= r) = 1 - cdf[r - 1] <= tail
    upper_rank = next((r for r in range(1, n + 1) if 1 - cdf[r - 1] <= tail), None)
    value = ordered[max(0, math.ceil(p * n) - 1)]
    low = ordered[lower_rank - 1] if lower_rank >= 1 else 0.0
    high = ordered[upper_rank - 1] if upper_rank is not None else math.inf
    return Interval(value, min(low, value), max(high, value))


@dataclass(frozen=True)
class LatencyStats:
    """What a series of inferences showed.

    Attributes:
        samples: how many were timed, after ``warmup`` untimed ones.
        p50_ms, p95_ms, p99_ms: percentiles in ms with 95% confidence intervals.
        mean_ms: mean in ms.
        throughput_ips: inferences per second: samples over their summed time.
        peak_memory_mb: peak resident memory of the runtime's process, in MiB; None where it can't be read.
        drift: median of the second half over median of the first half; far from 1 the intervals are too narrow.
        cpu_share: processor time of the runtime's process over elapsed time, 1.0 for one core; None where it can't be read.
        energy_mj: energy of one inference above the idle device's, in mJ; None where no battery tells.
    """

    samples: int
    warmup: int
    p50_ms: Interval
    p95_ms: Interval
    p99_ms: Interval
    mean_ms: float
    min_ms: float
    max_ms: float
    throughput_ips: Interval
    peak_memory_mb: float | None
    drift: float
    cpu_share: float | None = None
    energy_mj: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            f.name: value.to_json() if isinstance(value := getattr(self, f.name), Interval) else value
            for f in fields(self)
        }


def summarize(
    times_ms: Sequence[float],
    *,
    warmup: int = 0,
    peak_memory_mb: float | None = None,
    cpu_share: float | None = None,
) -> LatencyStats:
    """Statistics of the times (ms) of single inferences, in the order in which they were taken.

    Raises:
        ValueError: no times, or one that is negative or not finite.
    """
    if not times_ms:
        raise ValueError("no latency samples")
    if not all(0 <= t < math.inf for t in times_ms):
        raise ValueError("latency samples must be finite and not negative")
    ordered = sorted(times_ms)
    n = len(ordered)
    mean = math.fsum(ordered) / n
    deviation = math.sqrt(math.fsum((t - mean) ** 2 for t in ordered) / (n - 1)) if n > 1 else math.inf
    margin = 1.96 * deviation / math.sqrt(n)
    half = n // 2
    drift = _median(times_ms[half:]) / _median(times_ms[:half]) if half and _median(times_ms[:half]) > 0 else 1.0
    p50, p95, p99 = (percentile_interval(ordered, p) for p in PERCENTILES)
    fast, slow = mean - margin, mean + margin
    return LatencyStats(
        samples=n,
        warmup=warmup,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        mean_ms=mean,
        min_ms=ordered[0],
        max_ms=ordered[-1],
        throughput_ips=Interval(_rate(mean), _rate(slow), _rate(fast)),
        peak_memory_mb=peak_memory_mb,
        drift=drift,
        cpu_share=cpu_share,
    )


def _rate(time_ms: float) -> float:
    return 1e3 / time_ms if time_ms > 0 else math.inf


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def is_precise(stats: LatencyStats, relative_width: float) -> bool:
    """Whether the intervals of the median and of p95 are narrower than ``relative_width`` of their values."""
    return stats.p50_ms.relative_width <= relative_width and stats.p95_ms.relative_width <= 2 * relative_width


class Outcome(StrEnum):
    """What a budget says of a measurement."""

    WITHIN = "within"
    OVER = "over"
    UNDECIDED = "undecided"
    NOT_JUDGED = "not judged"


@dataclass(frozen=True)
class LimitOutcome:
    """One limit of a budget against the interval that was measured."""

    name: str
    limit: float
    measured: Interval
    outcome: Outcome

    def __str__(self) -> str:
        def bound(value: float) -> str:
            return f"{value:.3f}" if math.isfinite(value) else "inf"

        sign = ">=" if self.name == "throughput_ips" else "<="
        m = self.measured
        return (
            f"{self.name} {m.value:.3f} [{bound(m.low)}, {bound(m.high)}], budget {sign} {self.limit:g}: {self.outcome}"
        )


@dataclass(frozen=True)
class LatencyVerdict:
    """The outcome of a budget: the worst of its limits.

    Attributes:
        reason: why nothing was judged, or nothing could be decided, where that is so.
    """

    outcome: Outcome
    limits: tuple[LimitOutcome, ...]
    stats: LatencyStats
    budget: LatencyBudget | None
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether every limit is known to be kept."""
        return self.outcome is Outcome.WITHIN


def judge_latency(stats: LatencyStats, budget: LatencyBudget, assessment: Assessment | None = None) -> LatencyVerdict:
    """Compare a measurement with a budget: a limit inside the confidence interval is undecided.

    Args:
        assessment: how steady the device was: if it throttled or drifted everything is undecided, however plain the figures.
    """
    verdict = _judge(stats, budget)
    if assessment is None or assessment.judgeable:
        return verdict
    undecided = tuple(replace(limit, outcome=Outcome.UNDECIDED) for limit in verdict.limits)
    reason = f"the device {assessment.stability}: {'; '.join(assessment.reasons)}"
    return replace(verdict, outcome=Outcome.UNDECIDED, limits=undecided, reason=reason)


def _judge(stats: LatencyStats, budget: LatencyBudget) -> LatencyVerdict:
    limits = []
    for f in fields(budget):
        limit = getattr(budget, f.name)
        if limit is None:
            continue
        measured = getattr(stats, f.name)
        if measured is None:
            limits.append(LimitOutcome(f.name, limit, Interval(math.nan, 0.0, math.inf), Outcome.UNDECIDED))
            continue
        if not isinstance(measured, Interval):
            measured = Interval(measured, measured, measured)
        if f.name == "throughput_ips":
            within, over = measured.low >= limit, measured.high < limit
        else:
            within, over = measured.high <= limit, measured.low > limit
        outcome = Outcome.WITHIN if within else Outcome.OVER if over else Outcome.UNDECIDED
        limits.append(LimitOutcome(f.name, limit, measured, outcome))
    outcomes = {limit.outcome for limit in limits}
    worst = next(o for o in (Outcome.OVER, Outcome.UNDECIDED, Outcome.WITHIN) if o in outcomes)
    return LatencyVerdict(worst, tuple(limits), stats, budget)
