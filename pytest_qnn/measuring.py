"""Timing a loaded model: samples until they say enough, whatever runs it; and on a device, whether it was itself meanwhile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pytest_qnn.devices.health import Battery, Health, HealthSampler, is_cool, throttling, warming
from pytest_qnn.errors import ExecutionError
from pytest_qnn.runners.loaded import Loaded, Timing
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.verdict.energy import Energy, Power, energy_per_inference
from pytest_qnn.verdict.latency import LatencyBudget, LatencyStats, Outcome, is_precise, judge_latency, summarize
from pytest_qnn.verdict.stability import Assessment, Stability, assess, find_drift

SLICE_SECONDS = 0.5
OVERHEAD = 0.5  # of a slice, at most: a runner that takes long to start gets longer slices
ATTEMPTS = 3
COOL_MARGIN = 5.0  # degrees Celsius above the temperature before the first attempt
COOL_POLL_SECONDS = 5.0
REST_SECONDS = 20.0  # where a device shows no temperature
IDLE_READINGS = 4  # of the battery
IDLE_PAUSE_SECONDS = 1.0  # before each: gauges renew their figure about once a second
RESUMED = 10  # samples of a slice from which on its first one, after the pause, is left out


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        warmup: untimed inferences at the start.
        min_samples, max_samples: timed ones.
        max_seconds: after which no more are taken.
        relative_width: of the median's 95% confidence interval, over the median, that is narrow enough (p95: twice that);
            also what medians of a device may differ by within the series, before it counts as drifting.
    """

    warmup: int = 3
    min_samples: int = 30
    max_samples: int = 20_000
    max_seconds: float = 10.0
    relative_width: float = 0.05


@dataclass(frozen=True)
class Attempt:
    """One series of samples on a device.

    Attributes:
        samples: how many, with a median of ``p50_ms``.
        cooled_seconds: how long the device was left alone before.
        before, after: its health.
        warmed: zone that rose most, its degrees Celsius before, and at most; None if no temperature is known.
    """

    assessment: Assessment
    samples: int
    p50_ms: float
    cooled_seconds: float
    before: Health
    after: Health
    warmed: tuple[str, float, float] | None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        warmed = self.warmed and dict(zip(("zone", "before_c", "highest_c"), self.warmed, strict=True))
        return {
            **self.assessment.to_json(),
            "samples": self.samples,
            "p50_ms": self.p50_ms,
            "cooled_seconds": self.cooled_seconds,
            "warmed": warmed,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
        }


@dataclass(frozen=True)
class Conditions:
    """How a device was while it was measured.

    Attributes:
        assessment: whether the figures may be judged; that of the last attempt.
        attempts: at most :data:`ATTEMPTS`; the figures are those of the last.
        energy: per inference, or why it is unknown.
    """

    assessment: Assessment
    attempts: tuple[Attempt, ...]
    energy: Energy

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        energy = self.energy
        return {
            **self.assessment.to_json(),
            "attempts": [attempt.to_json() for attempt in self.attempts],
            "energy": {
                "per_inference_mj": energy.per_inference_mj and energy.per_inference_mj.to_json(),
                "idle_mw": energy.idle_mw,
                "busy_mw": energy.busy_mw,
                "note": energy.note,
            },
        }


@dataclass(frozen=True)
class Measured:
    """What measuring gave.

    Attributes:
        stats: of the times in the runtime: what budgets are held against.
        round_trip: of the times from this host to the device and back, where the runner measures them.
        conditions: of the device; None where nobody watched it.
    """

    stats: LatencyStats
    round_trip: LatencyStats | None = None
    conditions: Conditions | None = None


@dataclass
class _Series:
    """The samples of one attempt, as they come in, and what the device showed between them."""

    times_ms: list[float] = field(default_factory=list)
    round_trip_ms: list[float] = field(default_factory=list)
    peak_memory_mib: float = 0.0
    cpu_seconds: float = 0.0
    cpu_known: float = 0.0  # seconds of samples whose processor time is known
    inferences: int = 0
    seconds: float = 0.0  # in slices, without the pauses between them
    health: list[Health] = field(default_factory=list)

    def add(self, timing: Timing, resumed: bool, seconds: float) -> None:
        times = timing.times_ms
        busy = math.fsum(times) / 1e3
        self.inferences += len(times)
        self.seconds += seconds
        # after a pause clocks are low and caches cold: that first inference belongs to our pause and not to the model
        first = 1 if resumed and len(times) >= RESUMED else 0
        self.times_ms += times[first:]
        round_trips = timing.round_trip_ms or []
        self.round_trip_ms += round_trips
        self.inferences += len(round_trips)
        self.peak_memory_mib = max(self.peak_memory_mib, timing.peak_memory_mib)
        if timing.cpu_share is not None:
            self.cpu_seconds += timing.cpu_share * busy
            self.cpu_known += busy

    def stats(self, warmup: int) -> LatencyStats:
        return summarize(
            self.times_ms,
            warmup=warmup,
            peak_memory_mb=self.peak_memory_mib or None,
            cpu_share=self.cpu_seconds / self.cpu_known if self.cpu_known > 0 else None,
        )


def measure(
    loaded: Loaded,
    sample: Mapping[str, Array],
    effort: Effort,
    budget: LatencyBudget | None = None,
    sampler: HealthSampler | None = None,
    cool_down: float = 120.0,
    energy: bool = True,
) -> Measured:
    """Time single inferences until they say enough about ``budget`` or the effort is spent.

    Args:
        sampler: watches the device: a series in which it throttled or drifted is thrown away and taken anew once the device
            has cooled down, :data:`ATTEMPTS` in all. Without one there is one series, whatever happens.
        cool_down: seconds that the device may be left alone, over all attempts. With 0 there is one attempt, and nothing is
            waited for.
        energy: whether energy is measured, too, where a battery tells: that takes some seconds before each attempt.

    Raises:
        TargetError: the runtime died, hung, ran out of memory or reported an error, or the device is gone.
    """
    if sampler is None:
        series = _Series()
        _take(loaded, sample, effort, budget, series)
        return _measured(series, effort)
    return _measure_watched(loaded, sample, effort, budget, sampler, cool_down, energy)


def _measured(series: _Series, effort: Effort) -> Measured:
    round_trip = summarize(series.round_trip_ms) if series.round_trip_ms else None
    return Measured(series.stats(effort.warmup), round_trip)


def _take(
    loaded: Loaded,
    sample: Mapping[str, Array],
    effort: Effort,
    budget: LatencyBudget | None,
    series: _Series,
    sampler: HealthSampler | None = None,
) -> None:
    """Fill ``series``."""
    start = loaded.clock()
    slice_seconds = SLICE_SECONDS
    while True:
        begun = loaded.clock()
        left = effort.max_seconds - (begun - start)
        timing = loaded.time(
            sample,
            effort.max_samples - len(series.times_ms),
            min(max(left, 1e-3), slice_seconds),
            reset_peak=not series.times_ms,
        )
        ended = loaded.clock()
        _check(loaded, timing)
        series.add(timing, resumed=sampler is not None and bool(series.times_ms), seconds=ended - begun)
        overhead = ended - begun - math.fsum(timing.times_ms) / 1e3
        slice_seconds = max(SLICE_SECONDS, overhead / OVERHEAD)
        if sampler is not None:
            series.health.append(sampler.sample())
        if len(series.times_ms) >= effort.max_samples or loaded.clock() - start >= effort.max_seconds:
            return
        if len(series.times_ms) >= effort.min_samples:
            stats = series.stats(effort.warmup)
            if is_precise(stats, effort.relative_width) and _decided(stats, budget):
                return


def _check(loaded: Loaded, timing: Timing) -> None:
    """What a runner hands over is data: refuse what can't be times."""
    times = timing.times_ms
    if not times:
        raise ExecutionError(f"{loaded.subject}: the runtime timed no inference")
    if not all(0 <= t < math.inf for t in (*times, *(timing.round_trip_ms or ()))):
        raise ExecutionError(
            f"{loaded.subject}: the runtime gave times that are none: it can't be measured with this runner"
        )


def _decided(stats: LatencyStats, budget: LatencyBudget | None) -> bool:
    if budget is None:
        return True
    verdict = judge_latency(stats, budget)
    # energy is known at the end only
    open_ = [limit for limit in verdict.limits if limit.outcome is Outcome.UNDECIDED and limit.name != "energy_mj"]
    return verdict.outcome is Outcome.OVER or not open_


# --- on a device ------------------------------------------------------------------------------------------------------


def _measure_watched(
    loaded: Loaded,
    sample: Mapping[str, Array],
    effort: Effort,
    budget: LatencyBudget | None,
    sampler: HealthSampler,
    cool_down: float,
    energy: bool,
) -> Measured:
    _warm_up(loaded, sample, effort)
    first = before = sampler.sample()
    attempts: list[Attempt] = []
    fastest = math.inf  # upper bound of the median of the fastest stretch of any attempt, in ms
    left = cool_down
    while True:
        cooled = 0.0
        if attempts or throttling([before], first, sampler.full_limits):
            cooled, before = _cool(sampler, first, left)
            left -= cooled
            _warm_up(loaded, sample, effort)
        idle = _idle_power(sampler, before) if energy and cool_down > 0 else []
        if idle and budget is not None and budget.energy_mj is not None:  # a battery tells something new once a second
            effort = replace(effort, min_samples=effort.max_samples)
        loads = loaded.loads
        series = _Series(health=[before])
        _take(loaded, sample, effort, budget, series, sampler)
        measured = _measured(series, effort)
        stats = measured.stats
        drift = find_drift(series.times_ms, effort.relative_width)
        fastest = min(fastest, drift.fast.high if drift else math.inf)
        assessment = assess(_signs(series, first, sampler), drift)
        if assessment.judgeable and loaded.loads != loads:
            assessment = Assessment(Stability.DRIFTED, ("the model was loaded anew in the middle of the series",))
        elif assessment.judgeable and stats.p50_ms.low > fastest * (1 + effort.relative_width):
            # steady, but as a device is that has throttled and doesn't show it
            slower = (
                f"a median of {stats.p50_ms.value:.3f} ms, but an earlier attempt had a stretch of {fastest:.3f} ms"
            )
            assessment = Assessment(Stability.DRIFTED, (slower,))
        assessment = _with_warming(assessment, series)
        attempts.append(
            Attempt(
                assessment,
                stats.samples,
                stats.p50_ms.value,
                cooled,
                before,
                series.health[-1],
                warming(before, series.health),
            )
        )
        if assessment.judgeable or len(attempts) == ATTEMPTS or left <= 0:
            spent = _energy(series, idle)
            return replace(
                measured,
                stats=replace(stats, energy_mj=spent.per_inference_mj),
                conditions=Conditions(assessment, tuple(attempts), spent),
            )


def _warm_up(loaded: Loaded, sample: Mapping[str, Array], effort: Effort) -> None:
    if effort.warmup:
        loaded.run_many([sample] * effort.warmup)


def _signs(series: _Series, first: Health, sampler: HealthSampler) -> list[str] | None:
    """Signs of throttling; None if the device shows nothing that would tell."""
    if not any(health.shows_throttling for health in series.health):
        return None
    return throttling(series.health, first, sampler.full_limits)


def _with_warming(assessment: Assessment, series: _Series) -> Assessment:
    warmed = warming(series.health[0], series.health)
    if assessment.judgeable or warmed is None or warmed[2] - warmed[1] < 1:
        return assessment
    warm = f"thermal zone {warmed[0]!r} rose from {warmed[1]:.0f} to {warmed[2]:.0f} °C"
    return replace(assessment, reasons=(*assessment.reasons, warm))


def _cool(sampler: HealthSampler, first: Health, seconds: float) -> tuple[float, Health]:
    """Leave the device alone until it is as it was, for at most ``seconds``: how long that took, and how it is then."""
    clock, wait = sampler.transport.clock, sampler.transport.wait
    start = clock()
    while True:
        health = sampler.sample()
        spent = clock() - start
        known = bool(first.temperatures) and bool(health.temperatures)
        rested = is_cool(health, first, COOL_MARGIN) if known else spent >= REST_SECONDS
        if rested and not throttling([health], first, sampler.full_limits):
            return spent, health
        if spent >= seconds:
            return spent, health
        wait(min(COOL_POLL_SECONDS, max(seconds - spent, 0.1)))


# --- energy -----------------------------------------------------------------------------------------------------------


def _power(battery: Battery | None) -> Power | None:
    if battery is None or battery.current is None or battery.voltage is None or _unmeasurable(battery):
        return None
    return Power(battery.voltage, battery.current)


def _unmeasurable(battery: Battery | None) -> str:
    if battery is None:
        return "the device shows no battery"
    if battery.external:
        return "the device is powered from outside (charger or USB), so its battery doesn't feed it alone"
    if battery.status.lower() != "discharging":
        return f"the battery isn't discharging ({battery.status or 'its status is unknown'})"
    if battery.current is None or battery.voltage is None:
        return "the battery's current or voltage can't be read"
    return ""


def _idle_power(sampler: HealthSampler, before: Health) -> list[Power]:
    """Readings of the battery while nothing runs; none, and no time spent, where they would say nothing."""
    if _power(before.battery) is None:
        return []
    readings = []
    for _ in range(IDLE_READINGS):
        sampler.transport.wait(IDLE_PAUSE_SECONDS)
        if (power := _power(sampler.sample().battery)) is not None:
            readings.append(power)
    return readings


def _energy(series: _Series, idle: list[Power]) -> Energy:
    for health in series.health:
        if why := _unmeasurable(health.battery):
            return Energy(note=why)
    busy = [power for health in series.health[1:] if (power := _power(health.battery)) is not None]
    if not idle:
        return Energy(note="what the idle device draws was not measured")
    return energy_per_inference(idle, busy, series.inferences / series.seconds if series.seconds > 0 else 0.0)
