"""Health of loopback devices through a real ADB server, and what it does to verdicts and records of a real model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pytest_qnn import assert_latency
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.bench import Bench, CurrentTest
from pytest_qnn.devices import health as health_module
from pytest_qnn.devices.health import Cooling, Health, HealthSampler
from pytest_qnn.errors import DeviceUnstableError, LatencyError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.records.collector import Collector
from pytest_qnn.records.record import schema
from pytest_qnn.records.terminal import summary_notes
from pytest_qnn.session import Measurement, Session
from pytest_qnn.settings import Settings
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.verdict.latency import LatencyBudget, Outcome
from pytest_qnn.verdict.stability import Stability
from tests.conftest import needs_simulator

Open = Callable[[LoopbackDevice], AdbTransport]
Make = Callable[..., LoopbackDevice]


@pytest.mark.parametrize("flavor", ["android", "linux"])
def test_a_device_shows_its_health_in_one_round_trip(make_device: Make, open_transport: Open, flavor: str) -> None:
    device = make_device(flavor)
    line = open_transport(device)
    line.shell(["true"])
    device.requests()  # those until here
    health = HealthSampler(line).sample()
    assert len(device.requests()) == 1
    assert health.temperatures["cpu-0-0-0"] == 41.0
    assert health.cooling["cdsp"] == Cooling(0, 5)
    assert health.limits["cpu0 kHz"] == 2265600
    assert health.governors["cpu0 kHz"] == "walt"
    assert health.clocks["gpu Hz"] == 680000000
    assert health.shows_throttling


def test_what_changes_on_the_device_is_seen_and_what_cant_be_read_is_unknown(
    android: LoopbackDevice, open_transport: Open
) -> None:
    sampler = HealthSampler(open_transport(android))
    sampler.sample()
    android.set_temperature(71.5, "nsp")
    android.set_cooling(2, "cdsp")
    android.write("/sys/devices/system/cpu/cpu4/cpufreq/scaling_max_freq", "1132800")
    android.write("/sys/class/thermal/thermal_zone0/temp", "-273000")
    android.path("/sys/class/thermal/thermal_zone1/temp").unlink()
    health = sampler.sample()
    assert health.hottest == ("nsphvx-0", 71.5)
    assert not {"cpu-0-0-0", "cpu-1-0-0"} & set(health.temperatures)
    assert health.notes == ("thermal zones that give no temperature: cpu-0-0-0 (-273000)",)
    assert health_module.throttling([health], health, sampler.full_limits) == [
        "cooling device 'cdsp' was at 2 of 5",
        "the clock limit of cpu4 kHz fell by 50% (2265600 to 1132800)",
    ]


def test_a_device_without_any_of_it_shows_nothing(android: LoopbackDevice, open_transport: Open) -> None:
    for entry in ("thermal_zone", "cooling_device"):
        for folder in android.path("/sys/class/thermal").glob(f"{entry}*"):
            for file in folder.iterdir():
                file.unlink()
    for name in ("cpu", "kgsl", "devfreq", "power_supply"):
        place = android.path(f"/sys/{'devices/system' if name == 'cpu' else 'class'}/{name}")
        place.rename(place.with_name(f"no-{name}"))
    assert HealthSampler(open_transport(android)).sample() == Health()


def test_hostile_names_are_text(android: LoopbackDevice, open_transport: Open) -> None:
    android.write("/sys/class/thermal/thermal_zone0/type", "$(touch /data/local/tmp/pwned)`id`\x1b[31m\\n;")
    android.write("/sys/class/thermal/thermal_zone1/temp", "$(touch /data/local/tmp/pwned)")
    health = HealthSampler(open_transport(android)).sample()
    assert health.temperatures["$(touch /data/local/tmp/pwned)`id`?[31m\\n;"] == 41.0
    assert not android.path("/data/local/tmp/pwned").exists()


def test_a_driver_that_hangs_costs_two_deadlines_and_is_not_asked_again(
    android: LoopbackDevice, open_transport: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "HEALTH_SECONDS", 0.5)
    line = open_transport(android)
    line.shell(["true"])
    android.faults(shell_hang=True, only="thermal_zone")
    sampler = HealthSampler(line)
    notes = [sampler.sample().notes for _ in range(4)]
    assert "unknown" in notes[0][0]
    assert "not asked again" in notes[2][0]
    asked = [request for request in android.requests() if "thermal_zone" in request]
    assert len(asked) == 2


def test_a_device_that_goes_away_is_no_error_of_its_health(android: LoopbackDevice, open_transport: Open) -> None:
    line = open_transport(android)
    line.shell(["true"])
    android.faults(shell_drop=0, only="thermal_zone", times=1)
    sampler = HealthSampler(line)
    assert "unknown" in sampler.sample().notes[0]
    line.reconnect(20)
    assert sampler.sample().temperatures


# --- verdicts and records ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Watched:
    """A real model on the simulator, measured while a loopback device is watched in its place."""

    session: Session
    device: LoopbackDevice

    def measure(self, **more: Any) -> Measurement:
        return self.session.measure(
            seeded_inputs(self.session, 1)[0], relative_width=1.0, **{"max_seconds": 0.3, **more}
        )

    @property
    def records(self) -> list[dict[str, Any]]:
        return self.session.bench.test.records


@pytest.fixture(scope="module")
def loaded(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A real model on the simulator, on a bench of its own."""
    needs_simulator()
    bench = Bench(Settings(cache_dir=tmp_path_factory.mktemp("cache")))
    yield bench.backend(BackendRequest("htp")).load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    bench.close()


@pytest.fixture
def watched(
    android: LoopbackDevice, open_transport: Open, loaded: Session, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Watched]:
    def start(**settings: Any) -> Watched:
        values = {"simulated_latency": True, "cool_down": 0.3, **settings}
        monkeypatch.setattr(loaded.bench, "settings", dataclasses.replace(loaded.bench.settings, **values))
        monkeypatch.setattr(loaded.bench, "test", CurrentTest())
        monkeypatch.setattr(loaded, "sampler", HealthSampler(open_transport(android)))
        return Watched(loaded, android)

    return start


def check_records(watched: Watched) -> list[str]:
    """The records fit their schema; returns the notes that a run would end with."""
    records = [{**r, "test_outcome": "passed"} for r in watched.records]
    run = {"exit_status": 0, "interrupted": False, "outcomes": {}}
    artifacts = {"compiled": 0, "reused": 0, "rebuilt": 0, "in_memory": 0}
    report = {"schema": 1, "run": {**run, "artifacts": artifacts}, "records": records, "errors": [], "retries": []}
    jsonschema.validate(json.loads(json.dumps(report, allow_nan=False)), schema())
    return summary_notes(Collector(records=records))


@pytest.mark.parametrize("limit", [1e6, 1e-6])
def test_a_device_that_throttles_all_along_passes_and_fails_nothing(
    watched: Callable[..., Watched], limit: float
) -> None:
    it = watched()
    it.device.set_cooling(3, "cdsp")
    verdict = assert_latency(it.measure(), LatencyBudget(p50_ms=limit))
    assert verdict.outcome is Outcome.UNDECIDED
    record = it.records[-1]
    assert (record["verdict"], record["blame"]) == ("undecided", "none")
    assert record["reason"] == "undecided: the device throttled: cooling device 'cdsp' was at 3 of 5"
    assert record["conditions"]["attempts"][0]["before"]["cooling"]["cdsp"] == {"state": 3, "of": 5}
    assert record["conditions"]["attempts"][0]["before"]["governors"]["cpu0 kHz"] == "walt"
    assert record["performance_mode"] == "default"
    notes = check_records(it)
    assert any("latency undecided, the device throttled: cooling device 'cdsp' was at 3 of 5" in note for note in notes)


@pytest.mark.parametrize("limit", [1e6, 1e-6])
def test_a_gate_that_takes_nothing_undecided_gets_an_infrastructure_error_for_it(
    watched: Callable[..., Watched], limit: float
) -> None:
    it = watched(strict_latency=True)
    it.device.set_cooling(3, "cdsp")
    measurement = it.measure()
    with pytest.raises(DeviceUnstableError, match="cooling device 'cdsp' was at 3 of 5") as caught:
        assert_latency(measurement, LatencyBudget(p50_ms=limit))
    assert "raise the setting cool_down" in str(caught.value)
    assert not isinstance(caught.value, AssertionError)
    assert it.records[-1]["verdict"] == "undecided"
    check_records(it)


def test_a_device_that_cools_down_in_time_is_measured_anew_and_judged(watched: Callable[..., Watched]) -> None:
    it = watched(cool_down=30.0)
    sampler = it.session.sampler
    assert sampler is not None
    line = sampler.transport
    it.device.set_cooling(1, "cdsp")

    class Cools:  # as the device does when it is left alone: the line itself is the real one
        def __getattr__(self, name: str) -> Any:
            return getattr(line, name)

        def wait(self, seconds: float) -> None:
            it.device.set_cooling(0)

    sampler.transport = Cools()  # type: ignore[assignment]
    measurement = it.measure()
    assert measurement.conditions is not None
    assert measurement.conditions.assessment.stability is not Stability.THROTTLED
    assert "throttled" not in repr(measurement)
    check_records(it)


def test_a_device_that_shows_no_clocks_and_no_cooling_is_judged_by_its_latencies_and_that_is_said(
    watched: Callable[..., Watched],
) -> None:
    it = watched()
    for place in (it.device.path("/sys/class/thermal"), it.device.path("/sys/devices/system/cpu")):
        place.rename(place.with_name("hidden"))
    measurement = it.measure()
    with pytest.raises(LatencyError):
        assert_latency(measurement, LatencyBudget(p50_ms=1e-6))
    assert measurement.conditions is not None
    assert measurement.conditions.assessment.stability is Stability.UNKNOWN
    assert any("latency judged by its steadiness alone" in note for note in check_records(it))


def test_what_isnt_judged_is_measured_once_and_without_waiting(watched: Callable[..., Watched]) -> None:
    it = watched(simulated_latency=False, cool_down=3600.0)
    it.device.set_cooling(3)
    measurement = it.measure()
    assert measurement.conditions is not None
    assert len(measurement.conditions.attempts) == 1
    verdict = assert_latency(measurement, LatencyBudget(p50_ms=1e6))
    assert verdict.outcome is Outcome.NOT_JUDGED
    assert it.records[-1]["reason"].startswith("not judged: ")
    assert not any("latency" in note and note.startswith("!") for note in check_records(it))


def test_a_model_on_this_host_leaves_a_record_without_conditions(watched: Callable[..., Watched]) -> None:
    it = watched()
    it.session.sampler = None
    assert_latency(it.measure(), LatencyBudget(p50_ms=1e6))
    record = it.records[-1]
    assert (record["conditions"], record["round_trip"]) == (None, None)
    check_records(it)
