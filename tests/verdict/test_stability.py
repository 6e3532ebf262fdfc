"""Drift: how often a steady series is called drifting, and what is found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pytest_qnn.verdict.latency import LatencyBudget, Outcome, judge_latency, summarize
from pytest_qnn.verdict.stability import FALSE_ALARMS, STRETCH_SAMPLES, Assessment, Stability, assess, find_drift

ROUNDS = 600
Series = Callable[[np.random.Generator, int], np.ndarray]


def drifted(times: np.ndarray, tolerance: float) -> bool:
    found = find_drift(times.tolist(), tolerance)
    return found is not None and found.drifted


STEADY: dict[str, Series] = {
    "normal": lambda rng, n: rng.normal(4.0, 0.2, n),
    "skewed": lambda rng, n: 4 + rng.exponential(1.0, n),
    "heavy tail": lambda rng, n: 4 + rng.pareto(1.5, n),
    "two modes": lambda rng, n: np.where(rng.random(n) < 0.3, 6.0, 4.0) + rng.normal(0, 0.05, n),
    "coarse clock": lambda rng, n: np.round(rng.normal(4.0, 0.3, n)),
}


@pytest.mark.parametrize("samples", [30, 180, 1000])
@pytest.mark.parametrize("name", STEADY)
def test_a_steady_series_is_called_drifting_in_at_most_its_share_even_without_any_tolerance(
    name: str, samples: int
) -> None:
    rng = np.random.default_rng([samples, len(name)])
    alarms = sum(drifted(STEADY[name](rng, samples), 0.0) for _ in range(ROUNDS))
    assert alarms / ROUNDS <= FALSE_ALARMS + 3 * (FALSE_ALARMS * (1 - FALSE_ALARMS) / ROUNDS) ** 0.5


@pytest.mark.parametrize("name", STEADY)
def test_with_the_tolerance_in_use_it_is_never_called_drifting(name: str) -> None:
    rng = np.random.default_rng(len(name))
    assert not any(drifted(STEADY[name](rng, 400), 0.05) for _ in range(ROUNDS))


def test_neighbouring_samples_that_resemble_each_other_are_no_drift() -> None:
    # autocorrelation 0.5 from one inference to the next, 3% noise: the intervals are too narrow then, but the tolerance helps
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(200):
        noise = rng.normal(0, 0.12 * (1 - 0.5**2) ** 0.5, 600)
        for i in range(1, 600):
            noise[i] += 0.5 * noise[i - 1]
        alarms += drifted(4 + noise, 0.05)
    assert alarms == 0


def _shape(kind: str, n: int) -> np.ndarray:
    x = np.linspace(0, 1, n)
    return {
        "a step": np.where(x > 0.7, 1.0, 0.0),
        "a slope": x,
        "a hump": np.where((x > 0.4) & (x < 0.6), 1.0, 0.0),
        "a slow start": np.where(x < 0.1, 1.0, 0.0),
    }[kind]


@pytest.mark.parametrize("kind", ["a step", "a slope", "a hump", "a slow start"])
def test_a_change_of_a_fifth_is_found_whatever_its_shape(kind: str) -> None:
    rng = np.random.default_rng(7)
    found = sum(drifted(4 * (1 + 0.2 * _shape(kind, 600)) + rng.normal(0, 0.12, 600), 0.05) for _ in range(100))
    assert found >= 99


def test_the_least_samples_that_are_measured_show_a_step_of_a_half() -> None:
    rng = np.random.default_rng(3)
    times = np.concatenate([rng.normal(4, 0.1, 15), rng.normal(6, 0.1, 15)])
    assert drifted(times, 0.05)


def test_a_change_below_the_tolerance_is_none_and_a_smaller_tolerance_makes_it_one() -> None:
    times = np.concatenate([np.full(300, 4.0), np.full(300, 4.15)]) + np.random.default_rng(2).normal(0, 0.01, 600)
    assert not drifted(times, 0.05)
    assert drifted(times, 0.01)


def test_too_few_samples_tell_nothing() -> None:
    assert find_drift([1.0] * (2 * STRETCH_SAMPLES - 1), 0.05) is None
    assert assess([], None).reasons == ("too few samples to see a drift",)


def test_a_drift_says_in_which_direction_and_from_what_to_what() -> None:
    rising = find_drift([1.0] * 100 + [1.5] * 100, 0.05)
    falling = find_drift([1.5] * 100 + [1.0] * 100, 0.05)
    assert rising is not None
    assert falling is not None
    assert "rose by 50% within the series, from a median of 1.000 ms" in str(rising)
    assert "fell by 33% within the series, from a median of 1.500 ms" in str(falling)


DRIFT = find_drift([1.0] * 100 + [1.5] * 100, 0.05)
STILL = find_drift([1.0] * 200, 0.05)


def test_what_a_device_did_follows_from_its_signs_and_its_latencies() -> None:
    assert assess(["hot"], STILL).stability is Stability.THROTTLED
    assert assess(["hot"], DRIFT).reasons == ("hot", str(DRIFT))
    assert assess([], DRIFT).stability is Stability.DRIFTED
    assert assess(None, DRIFT).stability is Stability.DRIFTED
    assert assess([], STILL) == Assessment(Stability.STEADY)
    unknown = assess(None, STILL)
    assert unknown.stability is Stability.UNKNOWN
    assert "only its latencies can tell" in unknown.reasons[0]


@pytest.mark.parametrize("limit", [1000.0, 0.001])
@pytest.mark.parametrize("stability", [Stability.THROTTLED, Stability.DRIFTED])
def test_of_an_unsteady_device_nothing_is_decided_however_plain_it_looks(stability: Stability, limit: float) -> None:
    stats = summarize(np.linspace(9, 11, 400).tolist(), peak_memory_mb=10)
    budget = LatencyBudget(p50_ms=limit, p95_ms=limit, peak_memory_mb=limit)
    verdict = judge_latency(stats, budget, Assessment(stability, ("it was hot",)))
    assert verdict.outcome is Outcome.UNDECIDED
    assert {limit.outcome for limit in verdict.limits} == {Outcome.UNDECIDED}
    assert not verdict.ok
    assert verdict.reason == f"the device {stability}: it was hot"


@pytest.mark.parametrize("stability", [Stability.STEADY, Stability.UNKNOWN])
def test_of_a_steady_device_or_one_that_shows_nothing_the_figures_decide(stability: Stability) -> None:
    stats = summarize(np.linspace(9, 11, 400).tolist())
    assert judge_latency(stats, LatencyBudget(p50_ms=12), Assessment(stability)).outcome is Outcome.WITHIN
    assert judge_latency(stats, LatencyBudget(p50_ms=8), Assessment(stability)).outcome is Outcome.OVER
