"""Energy per inference out of a battery's readings."""

from __future__ import annotations

import numpy as np
import pytest

from pytest_qnn.verdict.energy import Power, energy_per_inference
from pytest_qnn.verdict.latency import LatencyBudget, Outcome, judge_latency, summarize


def readings(milliamperes: list[float], unit: float = 1000.0) -> list[Power]:
    return [Power(4.0, round(ma * unit)) for ma in milliamperes]


IDLE, BUSY = [100.0, 102.0, 98.0, 101.0, 99.0], [600.0, 610.0, 590.0, 605.0, 595.0]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("unit", [1000.0, 1.0])
def test_it_is_the_power_above_idle_over_the_rate_whatever_unit_and_sign_the_driver_uses(
    unit: float, sign: int
) -> None:
    found = energy_per_inference(readings(IDLE, sign * unit), readings(BUSY, sign * unit), 100)
    assert found.per_inference_mj is not None
    assert found.per_inference_mj.value == pytest.approx(4.0 * 500 / 100)  # 4 V, 500 mA, 10 ms: 20 mJ
    assert found.idle_mw == pytest.approx(400)
    assert found.busy_mw == pytest.approx(2400)


def test_the_interval_holds_the_true_energy_in_95_of_100_cases() -> None:
    rng, rounds, covered = np.random.default_rng(4), 1500, 0
    for _ in range(rounds):
        idle, busy = readings(rng.normal(100, 5, 5).tolist()), readings(rng.normal(600, 40, 12).tolist())
        interval = energy_per_inference(idle, busy, 100).per_inference_mj
        assert interval is not None
        covered += interval.low <= 20 <= interval.high
    assert 0.93 < covered / rounds < 0.98


@pytest.mark.parametrize(
    ("idle", "busy", "why"),
    [
        (IDLE[:2], BUSY, "too few readings"),
        (IDLE, BUSY[:2], "too few readings"),
        ([0.0] * 5, [0.0] * 5, "always 0"),
        ([100.0] * 5, [100.0] * 5, "never changed"),
    ],
)
def test_readings_that_say_nothing_give_no_energy_and_a_reason(idle: list[float], busy: list[float], why: str) -> None:
    found = energy_per_inference(readings(idle), readings(busy), 100)
    assert found.per_inference_mj is None
    assert why in found.note


def test_a_budget_for_energy_is_undecided_where_no_battery_tells() -> None:
    assert judge_latency(summarize([1.0] * 50), LatencyBudget(energy_mj=5)).outcome is Outcome.UNDECIDED
