"""Energy per inference, out of what a battery said while nothing ran and while inferences ran.

``(mean power while measuring - mean power before) / inferences per second``, in mJ. Its interval is Welch's for the
difference of two means at 95% (Welch 1947; Satterthwaite's degrees of freedom), over the same rate. It covers what the readings
scatter by, and not a gauge that is wrong or slow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from pytest_qnn.verdict.latency import Interval

LEAST_READINGS = 3
# Student's t, two-sided 95%, by degrees of freedom from 1 up; beyond the table its last entry, which is on the safe side
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)


@dataclass(frozen=True)
class Power:
    """Readings of a battery: volts, and what it says of its current, in whatever unit and sign its driver uses."""

    volts: float
    current: int


@dataclass(frozen=True)
class Energy:
    """What energy was measured.

    Attributes:
        per_inference_mj: in mJ; None where it could not be measured.
        idle_mw, busy_mw: mean power before and while measuring, in mW.
        note: why it could not be measured, or what one must know about the figure.
    """

    per_inference_mj: Interval | None = None
    idle_mw: float | None = None
    busy_mw: float | None = None
    note: str = ""


def energy_per_inference(idle: Sequence[Power], busy: Sequence[Power], inferences_per_second: float) -> Energy:
    """Energy per inference of a discharging battery.

    The kernel documents microamperes; some phones give milliamperes. A device that is awake draws more than 10 mA, and less
    than 10 A: so if no reading reaches 10,000, they are milliamperes.
    """
    if min(len(idle), len(busy)) < LEAST_READINGS:
        return Energy(
            note=f"too few readings of the battery: {len(idle)} before, {len(busy)} while measuring; measure longer"
        )
    largest = max(abs(p.current) for p in (*idle, *busy))
    if largest == 0 or inferences_per_second <= 0:
        return Energy(note="the battery's current is always 0")
    unit = 1e-6 if largest >= 10_000 else 1e-3
    before, during = ([1e3 * p.volts * abs(p.current) * unit for p in readings] for readings in (idle, busy))
    if len({p.current for p in (*idle, *busy)}) == 1:
        return Energy(None, fmean(before), fmean(during), "the battery's current never changed: its gauge is too slow")
    parts = [variance(before) / len(before), variance(during) / len(during)]
    spread = math.fsum(parts)
    sizes = [len(before) - 1, len(during) - 1]
    degrees = spread**2 / math.fsum(p**2 / n for p, n in zip(parts, sizes, strict=True)) if spread > 0 else len(_T)
    margin = _T[min(max(int(degrees), 1), len(_T)) - 1] * math.sqrt(spread)
    difference = fmean(during) - fmean(before)
    rate = inferences_per_second
    interval = Interval(difference / rate, (difference - margin) / rate, (difference + margin) / rate)
    return Energy(interval, fmean(before), fmean(during))
