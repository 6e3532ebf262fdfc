"""Percentile intervals, and what a budget says of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pytest_qnn.errors import OptionError
from pytest_qnn.verdict.latency import (
    Interval,
    LatencyBudget,
    Outcome,
    is_precise,
    judge_latency,
    percentile_interval,
    summarize,
)


@pytest.mark.parametrize(("percent", "samples"), [(50, 7), (50, 30), (50, 200), (95, 100), (95, 400), (99, 600)])
def test_the_interval_misses_the_true_percentile_on_each_side_in_at_most_its_share(percent, samples):
    rng = np.random.default_rng(percent * 1000 + samples)
    rounds, true = 1500, -math.log(1 - percent / 100)  # of the exponential distribution
    drawn = np.sort(rng.exponential(size=(rounds, samples)), axis=1).tolist()
    found = [percentile_interval(times, percent) for times in drawn]
    allowed = 0.025 + 3 * math.sqrt(0.025 * 0.975 / rounds)
    assert sum(i.low > true for i in found) / rounds <= allowed
    assert sum(i.high < true for i in found) / rounds <= allowed


@pytest.mark.parametrize(("percent", "samples"), [(50, 200), (95, 400)])
def test_the_interval_isnt_much_wider_than_it_must_be(percent, samples):
    rng = np.random.default_rng(5)
    true = -math.log(1 - percent / 100)
    drawn = np.sort(rng.exponential(size=(1500, samples)), axis=1).tolist()
    found = [percentile_interval(times, percent) for times in drawn]
    assert 0.94 < sum(i.low <= true <= i.high for i in found) / 1500 < 0.985


def test_the_intervals_ranks_are_the_binomial_ones():
    ordered = [float(i) for i in range(1, 101)]
    assert percentile_interval(ordered, 50) == Interval(50.0, 40.0, 61.0)  # Conover, table A3: n = 100, p = 0.5


@pytest.mark.parametrize(("percent", "enough"), [(50, 6), (95, 72), (99, 368)])
def test_the_upper_bound_is_infinite_until_there_are_enough_samples(percent, enough):
    assert math.isinf(percentile_interval([1.0] * (enough - 1), percent).high) or percent == 50
    assert percentile_interval([1.0] * enough, percent).high == 1.0


def test_the_lower_bound_of_a_median_of_few_samples_is_zero():
    assert percentile_interval([1.0, 2.0, 3.0], 50) == Interval(2.0, 0.0, math.inf)


def test_infinite_bounds_become_null_in_json():
    assert Interval(1.0, 0.0, math.inf).to_json() == {"value": 1.0, "low": 0.0, "high": None}


def test_throughput_is_samples_over_their_summed_time():
    stats = summarize([1.0, 3.0] * 50)
    assert stats.throughput_ips.value == pytest.approx(500)
    assert stats.throughput_ips.low < 500 < stats.throughput_ips.high


def test_one_sample_bounds_nothing():
    stats = summarize([2.0])
    assert (stats.p50_ms.low, stats.p50_ms.high) == (0.0, math.inf)
    assert (stats.throughput_ips.low, stats.throughput_ips.high) == (0.0, math.inf)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="no latency samples"):
        summarize([])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_time_that_is_no_time_is_refused(bad):
    with pytest.raises(ValueError, match="latency"):
        summarize([1.0, bad, 2.0])


def test_drift_is_the_second_halfs_median_over_the_firsts():
    assert summarize([1.0] * 50 + [1.5] * 50).drift == pytest.approx(1.5)


def test_order_matters_to_drift_alone():
    times = [float(i) for i in range(1, 101)]
    forward, backward = summarize(times), summarize(times[::-1])
    assert forward.p95_ms == backward.p95_ms
    assert forward.drift > 1 > backward.drift


def stats(low=9.0, high=11.0, samples=400, memory=None):
    return summarize(np.linspace(low, high, samples).tolist(), peak_memory_mb=memory)


@pytest.mark.parametrize(("limit", "outcome"), [(11.0, Outcome.WITHIN), (9.0, Outcome.OVER), (10.0, Outcome.UNDECIDED)])
def test_a_percentile_is_within_over_or_undecided_by_its_interval(limit, outcome):
    assert judge_latency(stats(), LatencyBudget(p50_ms=limit)).outcome is outcome


@pytest.mark.parametrize(
    ("limit", "outcome"), [(90.0, Outcome.WITHIN), (110.0, Outcome.OVER), (100.3, Outcome.UNDECIDED)]
)
def test_throughput_must_be_at_least_its_limit(limit, outcome):
    assert judge_latency(stats(), LatencyBudget(throughput_ips=limit)).outcome is outcome


def test_too_few_samples_leave_a_high_percentile_undecided_however_fast_they_were():
    assert judge_latency(stats(samples=50), LatencyBudget(p99_ms=1000)).outcome is Outcome.UNDECIDED


def test_too_few_samples_can_still_show_that_a_budget_is_broken():
    assert judge_latency(stats(samples=50), LatencyBudget(p99_ms=1)).outcome is Outcome.OVER


@pytest.mark.parametrize(
    ("memory", "outcome"),
    [(100.0, Outcome.WITHIN), (101.0, Outcome.OVER), (None, Outcome.UNDECIDED), (math.nan, Outcome.UNDECIDED)],
)
def test_memory_that_wasnt_measured_is_undecided(memory, outcome):
    assert judge_latency(stats(memory=memory), LatencyBudget(peak_memory_mb=100)).outcome is outcome


def test_the_worst_limit_decides():
    budget = LatencyBudget(p50_ms=11, p95_ms=1, p99_ms=10.99)
    assert judge_latency(stats(), budget).outcome is Outcome.OVER
    assert not judge_latency(stats(), budget).ok


def test_every_limit_is_listed_with_what_was_measured():
    verdict = judge_latency(stats(), LatencyBudget(p50_ms=11, throughput_ips=50))
    assert [(limit.name, limit.limit) for limit in verdict.limits] == [("p50_ms", 11), ("throughput_ips", 50)]
    assert "budget <= 11: within" in str(verdict.limits[0])
    assert "budget >= 50: within" in str(verdict.limits[1])


def test_a_measurement_is_precise_once_its_intervals_are_narrow():
    assert is_precise(stats(9.99, 10.01), 0.05)
    assert not is_precise(stats(1, 19), 0.05)
    assert not is_precise(stats(9.99, 10.01, samples=20), 0.05)


@pytest.mark.parametrize(
    "values",
    [{}, {"p95_ms": 0}, {"p95_ms": -1}, {"p95_ms": math.inf}, {"p95_ms": math.nan}, {"p42_ms": 1}, {"p50_ms": True}],
)
def test_a_budget_that_makes_no_sense_is_refused_and_names_where_it_was_written(values):
    with pytest.raises(OptionError, match="test_x"):
        LatencyBudget.from_values(values, "test_x")
