"""Measuring on a device: what it does meanwhile decides whether its latencies may be judged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pytest_qnn.bench import Bench
from pytest_qnn.errors import ExecutionError
from pytest_qnn.measuring import ATTEMPTS, Conditions, Effort, Measured, measure
from pytest_qnn.runners.loaded import Timing
from pytest_qnn.verdict.latency import LatencyBudget, Outcome, judge_latency
from pytest_qnn.verdict.stability import Stability
from tests.devices.virtual_phone import VirtualPhone

LONG = Effort(min_samples=2000, max_seconds=10)
PLAINLY_KEPT, PLAINLY_BROKEN = LatencyBudget(p50_ms=1000), LatencyBudget(p50_ms=0.1)


def measured(phone: VirtualPhone, effort: Effort = LONG, budget: LatencyBudget | None = None, **more: Any) -> Measured:
    return measure(phone, {}, effort, budget, phone.sampler(), **more)


def conditions(found: Measured) -> Conditions:
    assert found.conditions is not None
    return found.conditions


def outcome(found: Measured, budget: LatencyBudget) -> Outcome:
    return judge_latency(found.stats, budget, conditions(found).assessment).outcome


def test_a_steady_device_is_measured_once_and_judged() -> None:
    found = measured(VirtualPhone())
    assert conditions(found).assessment.stability is Stability.STEADY
    assert len(conditions(found).attempts) == 1
    assert outcome(found, PLAINLY_KEPT) is Outcome.WITHIN
    assert outcome(found, PLAINLY_BROKEN) is Outcome.OVER


def test_a_device_that_throttles_each_time_is_given_up_after_three_attempts_and_nothing_is_decided() -> None:
    phone = VirtualPhone(heating=15)
    found = measured(phone, cool_down=600)
    assert [a.assessment.stability for a in conditions(found).attempts] == [Stability.THROTTLED] * ATTEMPTS
    assert outcome(found, PLAINLY_KEPT) is Outcome.UNDECIDED
    assert outcome(found, PLAINLY_BROKEN) is Outcome.UNDECIDED
    reasons = conditions(found).assessment.reasons
    assert reasons[0] == "cooling device 'cdsp' rose from 0 to 3 of 6"
    assert reasons[1] == "the clock limit of policy0 kHz fell by 50% (3000000 to 1500000)"
    assert reasons[2].startswith("latency rose by")
    assert reasons[3].startswith("thermal zone 'nsp' rose from 3")


def test_each_attempt_starts_from_about_the_temperature_of_the_first() -> None:
    phone = VirtualPhone(heating=15)
    attempts = conditions(measured(phone, cool_down=600)).attempts
    assert all(a.before.temperatures["nsp"] <= attempts[0].before.temperatures["nsp"] + 5 for a in attempts)
    assert all(a.cooled_seconds > 30 for a in attempts[1:])


def test_cooling_down_takes_no_longer_than_the_setting_allows_over_all_attempts() -> None:
    phone = VirtualPhone(heating=15)
    found = measured(phone, cool_down=20)
    assert sum(a.cooled_seconds for a in conditions(found).attempts) <= 21
    assert outcome(found, PLAINLY_KEPT) is Outcome.UNDECIDED


def test_a_device_that_was_hot_from_before_cools_down_first_and_then_counts() -> None:
    phone = VirtualPhone(degrees=80, throttled=True)
    found = measured(phone, cool_down=600)
    assert conditions(found).assessment.stability is Stability.STEADY
    assert len(conditions(found).attempts) == 1
    assert conditions(found).attempts[0].cooled_seconds > 10
    assert found.stats.p50_ms.value == pytest.approx(4.0, rel=0.02)


def test_a_device_that_stays_hot_from_before_is_undecided_though_its_latencies_are_steady() -> None:
    phone = VirtualPhone(degrees=80, throttled=True, heating=30)
    found = measured(phone, cool_down=1)
    assert conditions(found).assessment.stability is Stability.THROTTLED
    assert found.stats.p50_ms.value == pytest.approx(6.4, rel=0.02)
    assert outcome(found, LatencyBudget(p50_ms=5)) is Outcome.UNDECIDED


def test_a_disturbance_that_ends_costs_one_attempt() -> None:
    phone = VirtualPhone(disturb=lambda seconds: 1.5 if seconds < 3 else 1.0)
    found = measured(phone)
    assert [a.assessment.stability for a in conditions(found).attempts] == [Stability.DRIFTED, Stability.STEADY]
    assert found.stats.max_ms < 4.4
    assert outcome(found, LatencyBudget(p50_ms=4.2)) is Outcome.WITHIN


def test_figures_of_an_attempt_that_drifted_are_not_among_the_judged_ones() -> None:
    phone = VirtualPhone(disturb=lambda seconds: 2.0 if 4 < seconds < 6 else 1.0)
    found = measured(phone)
    assert conditions(found).attempts[0].assessment.stability is Stability.DRIFTED
    assert conditions(found).assessment.stability is Stability.STEADY
    assert found.stats.max_ms < 4.4


def test_of_a_device_that_shows_nothing_the_latencies_alone_decide_and_that_is_said() -> None:
    steady = measured(VirtualPhone(shows=frozenset()))
    assert conditions(steady).assessment.stability is Stability.UNKNOWN
    assert "only its latencies can tell" in conditions(steady).assessment.reasons[0]
    assert outcome(steady, PLAINLY_KEPT) is Outcome.WITHIN


def test_steady_latencies_of_a_device_that_was_faster_before_are_those_of_one_that_throttles_unseen() -> None:
    found = measured(VirtualPhone(shows=frozenset(), heating=15), cool_down=60)
    assert conditions(found).assessment.stability is Stability.DRIFTED
    assert "but an earlier attempt had a stretch of 4.0" in conditions(found).assessment.reasons[0]
    assert outcome(found, LatencyBudget(p50_ms=5)) is Outcome.UNDECIDED
    assert found.stats.p50_ms.value == pytest.approx(6.4, rel=0.02)


def test_temperatures_alone_tell_nothing_of_throttling() -> None:
    found = measured(VirtualPhone(shows=frozenset({"zones"})))
    assert conditions(found).assessment.stability is Stability.UNKNOWN


def test_where_no_temperature_can_be_read_the_device_rests_for_a_while() -> None:
    phone = VirtualPhone(shows=frozenset(), heating=15)
    found = measured(phone, cool_down=60)
    assert [round(a.cooled_seconds) for a in conditions(found).attempts] == [0, 20, 20]


def test_a_line_that_breaks_while_health_is_asked_for_is_nothing_known() -> None:
    found = measured(VirtualPhone(shows=frozenset({"lost"})))
    assert conditions(found).assessment.stability is Stability.UNKNOWN
    assert "it is gone" in conditions(found).attempts[0].after.notes[0]


def test_a_series_in_which_the_model_was_loaded_anew_doesnt_count() -> None:
    phone = VirtualPhone(lost_at=3)
    attempts = conditions(measured(phone)).attempts
    assert [a.assessment.stability for a in attempts] == [Stability.DRIFTED, Stability.STEADY]
    assert "loaded anew" in attempts[0].assessment.reasons[0]


def test_no_time_for_cooling_means_one_attempt() -> None:
    phone = VirtualPhone(heating=15)
    found = measured(phone, cool_down=0.0)
    assert len(conditions(found).attempts) == 1
    assert sum(phone.waits) == 0
    assert outcome(found, PLAINLY_KEPT) is Outcome.UNDECIDED


def test_health_is_sampled_before_between_slices_and_after() -> None:
    phone = VirtualPhone()
    measured(phone)
    assert phone.asked == len(phone.series) + 1
    assert len(phone.series) > 10


def test_the_first_inference_after_a_pause_is_ours_and_not_the_models() -> None:
    class Sleepy(VirtualPhone):
        def time(self, *arguments: Any, **more: Any) -> Timing:
            timing = super().time(*arguments, **more)
            timing.times_ms[0] *= 20
            return timing

    phone = Sleepy()
    found = measured(phone)
    assert found.stats.samples == sum(phone.series) - (len(phone.series) - 1)
    assert found.stats.p99_ms.high < 5


def test_slow_inferences_are_all_counted() -> None:
    phone = VirtualPhone(latency_ms=400)
    found = measured(phone, Effort(min_samples=10, max_seconds=30, relative_width=0.01))
    assert found.stats.samples == sum(phone.series)


def test_a_runner_that_takes_long_to_start_gets_longer_slices() -> None:
    phone = VirtualPhone(start_seconds=2)
    measured(phone, Effort(min_samples=10_000, max_seconds=60))
    assert phone.series[0] < 130 < 900 < phone.series[2]


def test_time_on_the_device_is_judged_and_the_way_there_is_told_beside_it() -> None:
    found = measured(VirtualPhone())
    assert found.round_trip is not None
    assert found.round_trip.p50_ms.value == pytest.approx(found.stats.p50_ms.value + 7, abs=0.01)
    assert outcome(found, LatencyBudget(p95_ms=5)) is Outcome.WITHIN
    assert measured(VirtualPhone(round_trips=False)).round_trip is None


def test_memory_and_processor_time_of_the_runner_are_told() -> None:
    stats = measured(VirtualPhone()).stats
    assert stats.peak_memory_mb == 80
    assert stats.cpu_share == pytest.approx(0.25)


@pytest.mark.parametrize("bad", [[], [math.nan], [-1.0], [math.inf]])
def test_times_that_are_none_are_the_runners_fault(bad: list[float]) -> None:
    class Broken(VirtualPhone):
        def time(self, *arguments: Any, **more: Any) -> Timing:
            return Timing(bad)

    with pytest.raises(ExecutionError, match="virtual phone"):
        measured(Broken())


def test_round_trips_that_are_no_times_are_refused() -> None:
    class Broken(VirtualPhone):
        def time(self, *arguments: Any, **more: Any) -> Timing:
            return Timing([1.0, 2.0], round_trip_ms=[math.nan])

    with pytest.raises(ExecutionError, match="times that are none"):
        measured(Broken())


# --- energy -----------------------------------------------------------------------------------------------------------

BATTERY = {"idle_ma": 150.0, "busy_ma": 650.0, "status": "Discharging"}


def test_energy_is_what_the_device_draws_above_idle_for_one_inference() -> None:
    found = measured(VirtualPhone(battery=BATTERY))
    energy = found.stats.energy_mj
    assert energy is not None
    assert energy.value == pytest.approx(4.0 * 500 / 250, rel=0.05)  # 4 V, 0.5 A, 4 ms: 8 mJ
    assert energy.relative_width < 0.05
    assert outcome(found, LatencyBudget(energy_mj=9)) is Outcome.WITHIN
    assert outcome(found, LatencyBudget(energy_mj=7)) is Outcome.OVER


@pytest.mark.parametrize(
    ("battery", "why"),
    [
        (None, "no battery"),
        ({**BATTERY, "status": "Charging"}, "isn't discharging (Charging)"),
        ({**BATTERY, "usb": True}, "powered from outside"),
    ],
)
def test_energy_is_measured_on_a_discharging_battery_only(battery: dict[str, Any] | None, why: str) -> None:
    phone = VirtualPhone(battery=battery)
    found = measured(phone)
    assert found.stats.energy_mj is None
    assert why in conditions(found).energy.note
    assert phone.waits == []
    assert outcome(found, LatencyBudget(energy_mj=9)) is Outcome.UNDECIDED


def test_a_budget_for_energy_measures_as_long_as_it_may_where_the_battery_tells() -> None:
    quick = VirtualPhone(battery=BATTERY)
    measured(quick, Effort(max_seconds=10))
    thorough = VirtualPhone(battery=BATTERY)
    measured(thorough, Effort(max_seconds=10), LatencyBudget(energy_mj=9))
    assert len(quick.series) < 3
    assert len(thorough.series) > 15


# --- without a device -------------------------------------------------------------------------------------------------


def test_a_model_on_this_host_is_measured_as_ever(bench: Bench, models: Path) -> None:
    from pytest_qnn.markers import BackendRequest
    from pytest_qnn.model.inputs import seeded_inputs

    session = bench.backend(BackendRequest("htp")).load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    found = session.measure(seeded_inputs(session, 1)[0], max_seconds=0.3)
    assert found.conditions is None
    assert found.round_trip is None
    assert found.stats.samples >= 1
