"""A phone in virtual time that warms up while it computes and throttles when it is hot: a model on it, and the line to it.

No time passes while it is measured, so that its whole afternoon fits into a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pytest_qnn.devices.health import HealthSampler
from pytest_qnn.devices.transport import Completed
from pytest_qnn.errors import DeviceLostError
from pytest_qnn.runners.loaded import Inference, Timing

AMBIENT = 30.0
THERMAL, SUPPLY = "/sys/class/thermal", "/sys/class/power_supply"


@dataclass
class VirtualPhone:
    """Attributes:
    latency_ms: of an inference while it is cool.
    heating: degrees per second of computing; what it cools down in a second is 2% of its distance to the ambient.
    hot: degrees above which it throttles, until it is 10 degrees cooler: inferences take 1.6 times as long.
    shows: kinds of files that can be read without root.
    disturb: factor on the latency, by seconds since the start.
    """

    latency_ms: float = 4.0
    heating: float = 0.0
    hot: float = 70.0
    shows: frozenset[str] = frozenset({"zones", "cooling", "limits"})
    disturb: Callable[[float], float] = lambda seconds: 1.0
    noise: float = 0.01
    start_seconds: float = 0.0  # of a runner that starts anew for each series
    battery: Mapping[str, Any] | None = None
    now: float = 0.0
    degrees: float = AMBIENT
    throttled: bool = False
    busy_until: float = -1.0
    loads: int = 1
    subject: str = "model.onnx on htp (virtual phone)"
    round_trips: bool = True
    lost_at: int = 0  # number of the series in the middle of which it is lost, and got back
    waits: list[float] = field(default_factory=list)
    series: list[int] = field(default_factory=list)
    asked: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(0)

    def sampler(self) -> HealthSampler:
        return HealthSampler(self)  # type: ignore[arg-type]

    # --- the device ---------------------------------------------------------------------------------------------------

    def pass_time(self, seconds: float, computing: bool = False) -> None:
        self.now += seconds
        self.degrees += (self.heating * seconds if computing else 0.0) - 0.02 * seconds * (self.degrees - AMBIENT)
        self.throttled = self.degrees > (self.hot - 10 if self.throttled else self.hot)
        if computing:
            self.busy_until = self.now

    def infer(self) -> float:
        slow = 1.6 if self.throttled else 1.0
        ms = self.latency_ms * slow * self.disturb(self.now) * (1 + self.random.normal(0, self.noise))
        self.pass_time(ms / 1e3, computing=True)
        return ms

    # --- the model on it ----------------------------------------------------------------------------------------------

    def run_many(self, samples: Sequence[Mapping[str, Any]]) -> list[Inference]:
        return [Inference({}, self.infer() / 1e3) for _ in samples]

    def time(self, inputs: Mapping[str, Any], count: int, seconds: float, reset_peak: bool = False) -> Timing:
        self.pass_time(self.start_seconds)
        end, times = self.now + seconds, []
        while len(times) < count and (not times or self.now < end):
            times.append(self.infer())
        self.series.append(len(times))
        if len(self.series) == self.lost_at:
            self.loads += 1
        trips = None
        if self.round_trips:
            trips = [self.infer() + 7 for _ in range(3)]
            self.pass_time(0.021)
        return Timing(times, 80.0, 0.25, trips)

    def clock(self) -> float:
        return self.now

    # --- the line to it -----------------------------------------------------------------------------------------------

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.pass_time(seconds)

    def shell(self, words: Sequence[str], *, timeout: float, limit: int) -> Completed:
        self.asked += 1
        self.pass_time(0.02)
        if "lost" in self.shows:
            raise DeviceLostError("it is gone")
        lines: list[tuple[str, object]] = []
        if "zones" in self.shows:
            lines += [
                (f"{THERMAL}/thermal_zone0/type", "nsp"),
                (f"{THERMAL}/thermal_zone0/temp", round(self.degrees * 1000)),
            ]
        if "cooling" in self.shows:
            lines += [
                (f"{THERMAL}/cooling_device0/type", "cdsp"),
                (f"{THERMAL}/cooling_device0/cur_state", 3 if self.throttled else 0),
                (f"{THERMAL}/cooling_device0/max_state", 6),
            ]
        if "limits" in self.shows:
            folder = "/sys/devices/system/cpu/cpufreq/policy0"
            lines += [
                (f"{folder}/scaling_max_freq", 1500000 if self.throttled else 3000000),
                (f"{folder}/scaling_governor", "schedutil"),
            ]
        if self.battery is not None:
            idle, busy = self.battery["idle_ma"], self.battery["busy_ma"]
            current = busy if self.now - self.busy_until < 0.1 else idle
            lines += [
                (f"{SUPPLY}/battery/type", "Battery"),
                (f"{SUPPLY}/battery/status", self.battery["status"]),
                (f"{SUPPLY}/battery/current_now", -round(1000 * (current + self.random.normal(0, 2)))),
                (f"{SUPPLY}/battery/voltage_now", 4000000),
                (f"{SUPPLY}/usb/type", "USB"),
                (f"{SUPPLY}/usb/online", int(self.battery.get("usb", False))),
            ]
        return Completed(0, "".join(f"{path}\t{value}\n" for path, value in lines).encode())
