"""Whether a series of latencies may be judged: was the device steady while it was measured?

A series drifts if its medians differ between stretches of it by more than chance and more than matters. The series is cut
into at most :data:`STRETCHES` stretches of consecutive samples, at least :data:`STRETCH_SAMPLES` each. Each stretch's median
gets a distribution-free interval (:func:`~pytest_qnn.verdict.latency.percentile_interval`) at confidence
``1 - FALSE_ALARMS / stretches``. The series drifts if the highest of the lower bounds lies above the lowest of the upper bounds
times ``1 + tolerance``.

Of a steady series (independent samples of one distribution, whatever it is) all intervals cover its one median at once with
probability ``1 - FALSE_ALARMS`` at least (Boole's inequality), and then no lower bound lies above an upper one: so a steady
series is called drifting in at most 1 of 100 cases with tolerance 0, and far fewer with the one in use. Steps, slopes and
humps are found alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

from pytest_qnn.verdict.latency import Interval, percentile_interval

STRETCHES = 12
STRETCH_SAMPLES = 15
FALSE_ALARMS = 0.01


class Stability(StrEnum):
    """What a device did while it was measured."""

    STEADY = "steady"
    THROTTLED = "throttled"
    DRIFTED = "drifted"
    UNKNOWN = (
        "unknown"  # nothing of its clocks and cooling could be read; its latencies did not drift, as far as can be seen
    )


@dataclass(frozen=True)
class Drift:
    """The fastest and the slowest stretch of a series.

    Attributes:
        slow, fast: medians in ms, with intervals that hold for all stretches at once.
        slow_at, fast_at: where the middle of each lies in the series, from 0 to 1.
        drifted: whether they differ by more than chance and more than the tolerance.
    """

    slow: Interval
    fast: Interval
    slow_at: float
    fast_at: float
    drifted: bool

    def __str__(self) -> str:
        first, then = (self.fast, self.slow) if self.fast_at < self.slow_at else (self.slow, self.fast)
        change = f"{abs(then.value / first.value - 1):.0%}" if first.value > 0 else "infinitely"
        return (
            f"latency {'rose' if then is self.slow else 'fell'} by {change} within the series, from a median of "
            f"{first.value:.3f} ms [{first.low:.3f}, {first.high:.3f}] to {then.value:.3f} ms "
            f"[{then.low:.3f}, {then.high:.3f}]"
        )


def find_drift(times_ms: Sequence[float], tolerance: float) -> Drift | None:
    """Compare the stretches of a series of latencies, in the order in which they were taken.

    Args:
        tolerance: by how much medians may differ, as a share: 0.05 for 5%.

    Returns:
        None if there are too few samples (below ``2 * STRETCH_SAMPLES``) to compare anything.
    """
    count = min(STRETCHES, len(times_ms) // STRETCH_SAMPLES)
    if count < 2:
        return None
    edges = [round(i * len(times_ms) / count) for i in range(count + 1)]
    confidence = 1 - FALSE_ALARMS / count
    medians = [percentile_interval(sorted(times_ms[start:end]), 50, confidence) for start, end in pairwise(edges)]
    slow = max(range(count), key=lambda i: medians[i].low)
    fast = min(range(count), key=lambda i: medians[i].high)
    drifted = medians[slow].low > medians[fast].high * (1 + tolerance)
    return Drift(medians[slow], medians[fast], (slow + 0.5) / count, (fast + 0.5) / count, drifted)


@dataclass(frozen=True)
class Assessment:
    """How steady a measurement was.

    Attributes:
        reasons: what was seen, or why nothing could be; one line each.
    """

    stability: Stability
    reasons: tuple[str, ...] = ()

    @property
    def judgeable(self) -> bool:
        """Whether a budget may be held against the figures."""
        return self.stability in (Stability.STEADY, Stability.UNKNOWN)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {"stability": str(self.stability), "reasons": list(self.reasons)}


def assess(throttling: Sequence[str] | None, drift: Drift | None) -> Assessment:
    """How steady a measurement was.

    Args:
        throttling: signs of throttling that were seen; None if nothing that would show it could be read.
        drift: of the latencies; None if they were too few.
    """
    drifted = (str(drift),) if drift and drift.drifted else ()
    if throttling:
        return Assessment(Stability.THROTTLED, (*throttling, *drifted))
    if drifted:
        return Assessment(Stability.DRIFTED, drifted)
    few = () if drift else ("too few samples to see a drift",)
    if throttling is None:
        return Assessment(
            Stability.UNKNOWN,
            ("the device shows neither clock limits nor cooling: only its latencies can tell of throttling", *few),
        )
    return Assessment(Stability.STEADY, few)
