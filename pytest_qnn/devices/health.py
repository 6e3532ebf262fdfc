"""Temperatures, clocks, cooling and battery of a device: whatever it shows, in one round trip.

Read are Linux's own files (Documentation/ABI/testing/sysfs-class-thermal, sysfs-class-power, sysfs-class-devfreq,
cpufreq's), those of Qualcomm's GPU driver (kgsl) and, on Android, ``dumpsys thermalservice``. Each of them may be missing or
closed to us without root: then it is unknown, and that is never an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_qnn.devices.transport import Transport
from pytest_qnn.errors import DeviceError, DeviceTimeoutError

HEALTH_SECONDS = 6.0
OUTPUT_BYTES = 1 << 20
MOST_ENTRIES = 512  # of a kind; a device that shows more is making them up
TEXT = 80  # characters of a name or word that are kept
PATIENCE = 2  # deadlines missed in a row, after which a device isn't asked again

_FILES = (
    "/sys/class/thermal/thermal_zone*/type",
    "/sys/class/thermal/thermal_zone*/temp",
    "/sys/class/thermal/cooling_device*/type",
    "/sys/class/thermal/cooling_device*/cur_state",
    "/sys/class/thermal/cooling_device*/max_state",
    "$cpus/scaling_cur_freq",
    "$cpus/scaling_max_freq",
    "$cpus/scaling_governor",
    "/sys/class/kgsl/kgsl-3d0/gpuclk",
    "/sys/class/kgsl/kgsl-3d0/max_gpuclk",
    "/sys/class/kgsl/kgsl-3d0/thermal_pwrlevel",
    "/sys/class/devfreq/*/cur_freq",
    "/sys/class/devfreq/*/governor",
    "/sys/class/power_supply/*/type",
    "/sys/class/power_supply/*/status",
    "/sys/class/power_supply/*/online",
    "/sys/class/power_supply/*/current_now",
    "/sys/class/power_supply/*/voltage_now",
)
_MARK = "==thermalservice=="
# Only what shells have built in: a process for each of several hundred files would itself warm the device.
_SCRIPT = f"""exec 2>/dev/null
cpus='/sys/devices/system/cpu/cpufreq/policy*'
[ -d /sys/devices/system/cpu/cpufreq/policy0 ] || cpus='/sys/devices/system/cpu/cpu[0-9]*/cpufreq'
for f in {" ".join(_FILES)}; do
  if [ -r "$f" ]; then v=; read -r v < "$f"; printf '%s\\t%s\\n' "$f" "$v"; fi
done
if command -v dumpsys >/dev/null; then printf '{_MARK}\\n'; dumpsys -t 2 thermalservice; fi
exit 0
"""

# --- one sample -------------------------------------------------------------------------------------------------------

# Cooling devices by their type: what they cool down takes compute power away, or has nothing to do with it.
_COMPUTE = re.compile(
    r"cpu|cluster|pause|hotplug|isolat|gpu|kgsl|cdsp|nsp|npu|hvx|hmx|ddr|llcc|bus|devfreq", re.IGNORECASE
)
_OTHER = re.compile(
    r"fan|modem|mmw|_pa\b|\bpa_|wlan|wifi|batt|charg|usb|backlight|panel|display|hbm|lcd|camera|flash|\bled|audio|speaker",
    re.IGNORECASE,
)
NO_TEMPERATURE = re.compile(
    r"bcl|ibat|vbat|lvl|socd|step|trip", re.IGNORECASE
)  # zones of currents, volts, charge, levels
_THERMAL_STATUS = (
    "none",
    "light",
    "moderate",
    "severe",
    "critical",
    "emergency",
    "shutdown",
)  # android.os.PowerManager


@dataclass(frozen=True)
class Cooling:
    """A cooling device: its state, from 0 (idle) to ``maximum``."""

    state: int
    maximum: int | None


@dataclass(frozen=True)
class Battery:
    """What the battery says.

    Attributes:
        status: "Charging", "Discharging", "Full", "Not charging", ...; empty if unknown.
        current: as the kernel gives it: microamperes by its documentation, milliamperes on some phones, its sign either way.
        voltage: in volts.
        external: whether a charger or USB gives power; None if unknown.
    """

    status: str = ""
    current: int | None = None
    voltage: float | None = None
    external: bool | None = None


@dataclass(frozen=True)
class Health:
    """One look at a device. What could not be read is missing.

    Attributes:
        temperatures: degrees Celsius by zone.
        clocks: current clocks by name; the name says the unit, where there is one.
        limits: upper limits of clocks, by the same names.
        governors: of the clocks.
        cooling: cooling devices by name.
        gpu_level: power level that the GPU's thermal management allows at most: 0 is full speed.
        thermal_status: Android's, 0 (none) to 6 (shutdown).
        battery: None if there is none.
        notes: what was dropped, and why.
    """

    temperatures: Mapping[str, float] = field(default_factory=dict)
    clocks: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    governors: Mapping[str, str] = field(default_factory=dict)
    cooling: Mapping[str, Cooling] = field(default_factory=dict)
    gpu_level: int | None = None
    thermal_status: int | None = None
    battery: Battery | None = None
    notes: tuple[str, ...] = ()

    @property
    def hottest(self) -> tuple[str, float] | None:
        """The hottest zone and its degrees Celsius."""
        return max(self.temperatures.items(), key=lambda item: item[1], default=None)

    @property
    def shows_throttling(self) -> bool:
        """Whether anything was read that would tell of throttling."""
        compute = any(not _OTHER.search(name) for name in self.cooling)
        return compute or bool(self.limits) or self.gpu_level is not None or self.thermal_status is not None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "temperatures_c": dict(self.temperatures),
            "clocks": dict(self.clocks),
            "clock_limits": dict(self.limits),
            "governors": dict(self.governors),
            "cooling": {name: {"state": c.state, "of": c.maximum} for name, c in self.cooling.items()},
            "gpu_thermal_level": self.gpu_level,
            "android_thermal_status": self.thermal_status,
            "battery": self.battery and dict(vars(self.battery)),
            "notes": list(self.notes),
        }


def temperature(raw: str) -> float | None:
    """Degrees Celsius out of a thermal zone's ``temp``; None where the number can't be the temperature of a running device.

    The kernel's documentation says millidegrees; drivers also give tenths and whole degrees. By size: from 1000 up
    millidegrees, from 150 tenths, below whole degrees. Unused sensors give 0, -40 or -273 degrees, or 125 and more, the ends
    of their tables.
    """
    value = _integer(raw)
    if value is None or -1000 < value <= 0:
        return None
    degrees = value / 1000 if abs(value) >= 1000 else value / 10 if value >= 150 else float(value)
    return degrees if -40 < degrees < 125 else None


def voltage(raw: str) -> float | None:
    """Volts out of a battery's ``voltage_now``: microvolts by the kernel's documentation, millivolts on some phones."""
    value = _integer(raw)
    if value is None:
        return None
    volts = value / 1e6 if value >= 100_000 else value / 1e3
    return volts if 2 <= volts <= 60 else None


def parse_health(output: str) -> Health:
    """What the device wrote about itself, as data: anything odd in it is left out and noted."""
    files, _, service = output.partition(_MARK)
    found: dict[str, dict[str, dict[str, str]]] = {}  # kind -> entry -> file -> first line
    for line in files.splitlines():
        path, tab, value = line.partition("\t")
        folder, _, file = path.rpartition("/")
        parent, _, entry = folder.rpartition("/")
        kind = parent.rpartition("/")[2]
        if kind == "thermal":
            kind = "zone" if entry.startswith("thermal_zone") else "cooling"
        elif entry == "cpufreq":
            kind, entry = entry, kind
        entries = found.setdefault(kind, {})
        if tab and (entry in entries or len(entries) < MOST_ENTRIES):
            entries.setdefault(entry, {})[file] = _clean(value)
    notes: list[str] = []
    temperatures = _temperatures(found.get("zone", {}), notes)
    clocks, limits, governors = _clocks(found)
    status, from_service = _thermal_service(service)
    return Health(
        temperatures or from_service,
        clocks,
        limits,
        governors,
        _cooling(found.get("cooling", {})),
        _integer(found.get("kgsl", {}).get("kgsl-3d0", {}).get("thermal_pwrlevel", "")),
        status,
        _battery(found.get("power_supply", {})),
        tuple(notes),
    )


def _temperatures(zones: Mapping[str, Mapping[str, str]], notes: list[str]) -> dict[str, float]:
    temperatures: dict[str, float] = {}
    dropped = []
    for zone, files in zones.items():
        if "temp" not in files:
            continue
        name = _free_name(files.get("type") or zone, zone, temperatures)
        if NO_TEMPERATURE.search(name):
            continue
        degrees = temperature(files["temp"])
        if degrees is None:
            dropped.append(f"{name} ({files['temp'] or 'nothing'})")
        else:
            temperatures[name] = degrees
    if dropped:
        more = f" and {len(dropped) - 5} more" if len(dropped) > 5 else ""
        notes.append(f"thermal zones that give no temperature: {', '.join(dropped[:5])}{more}")
    return temperatures


def _cooling(devices: Mapping[str, Mapping[str, str]]) -> dict[str, Cooling]:
    cooling: dict[str, Cooling] = {}
    for entry, files in devices.items():
        state = _integer(files.get("cur_state", ""))
        if state is not None and state >= 0:
            name = _free_name(files.get("type") or entry, entry, cooling)
            cooling[name] = Cooling(state, _integer(files.get("max_state", "")))
    return cooling


def _clocks(
    found: Mapping[str, Mapping[str, Mapping[str, str]]],
) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    clocks: dict[str, int] = {}
    limits: dict[str, int] = {}
    governors: dict[str, str] = {}

    def note(name: str, files: Mapping[str, str], now: str, limit: str, governor: str) -> None:
        if (value := _integer(files.get(now, ""))) is not None and value >= 0:
            clocks[name] = value
        if (value := _integer(files.get(limit, ""))) is not None and value > 0:
            limits[name] = value
        if files.get(governor):
            governors[name] = files[governor]

    for entry, files in found.get("cpufreq", {}).items():
        note(f"{entry} kHz", files, "scaling_cur_freq", "scaling_max_freq", "scaling_governor")
    for files in found.get("kgsl", {}).values():
        note("gpu Hz", files, "gpuclk", "max_gpuclk", "")
    for entry, files in found.get("devfreq", {}).items():
        note(entry, files, "cur_freq", "", "governor")
    return clocks, limits, governors


def _thermal_service(text: str) -> tuple[int | None, dict[str, float]]:
    """Status and current temperatures of ``dumpsys thermalservice`` (Android 10 and later)."""
    found = re.search(r"^\s*Thermal Status: ([0-6])\s*$", text, re.MULTILINE)
    temperatures: dict[str, float] = {}
    current = text.partition("Current temperatures from HAL")[2].partition("Current cooling")[0]
    for value, name in re.findall(
        r"Temperature\{mValue=(-?\d{1,4}(?:\.\d{1,6})?), mType=-?\d+, mName=([^,}]+)", current
    ):
        if 0 < (degrees := float(value)) < 125 and len(temperatures) < MOST_ENTRIES:  # 0: a sensor that isn't there
            temperatures[_clean(name)] = degrees
    return (int(found[1]) if found else None), temperatures


def _battery(supplies: Mapping[str, Mapping[str, str]]) -> Battery | None:
    batteries = {
        name: files
        for name, files in supplies.items()
        if files.get("type", "").lower() == "battery" or (name == "battery" and "type" not in files)
    }
    if not batteries:
        return None
    online = [files["online"] for name, files in supplies.items() if name not in batteries and "online" in files]
    external = any(value not in ("0", "") for value in online) if online else None
    if len(batteries) > 1 and "battery" not in batteries:  # which of them feeds the SoC isn't known
        return Battery(external=external)
    files = batteries.get("battery") or next(iter(batteries.values()))
    return Battery(
        files.get("status", ""), _integer(files.get("current_now", "")), voltage(files.get("voltage_now", "")), external
    )


def _free_name(wanted: str, entry: str, taken: Mapping[str, object]) -> str:
    return wanted if wanted not in taken else f"{wanted} ({entry})"


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text.strip())[:TEXT]


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,15}", text) else None


# --- throttling -------------------------------------------------------------------------------------------------------


def throttling(samples: Sequence[Health], first: Health, full_limits: Mapping[str, int]) -> list[str]:
    """Signs that the device was throttled, in plain words; of each thing the worst that was seen.

    Args:
        samples: in the order in which they were taken.
        first: before anything was measured. A cooling device that we can't tell the purpose of counts if it rose above that;
            one of a processor counts whenever it is at work.
        full_limits: the highest limit that each clock ever showed.
    """
    signs = []
    worst: dict[str, Cooling] = {}
    lowest: dict[str, int] = {}
    for health in samples:
        for name, cooling in health.cooling.items():
            if name not in worst or cooling.state > worst[name].state:
                worst[name] = cooling
        for name, limit in health.limits.items():
            lowest[name] = min(limit, lowest.get(name, limit))
    for name, cooling in worst.items():
        known, start = first.cooling.get(name), samples[0].cooling.get(name, cooling)
        rest = 0 if _COMPUTE.search(name) or known is None else known.state
        if cooling.state > rest and not _OTHER.search(name):
            of = f" of {cooling.maximum}" if cooling.maximum is not None else ""
            how = f"rose from {start.state} to" if start.state < cooling.state else "was at"
            signs.append(f"cooling device {name!r} {how} {cooling.state}{of}")
    fell: dict[tuple[int, int], list[str]] = {}
    for name, limit in lowest.items():
        if limit < (full := full_limits.get(name, limit)):
            fell.setdefault((full, limit), []).append(name)
    for (full, limit), names in fell.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        signs.append(f"the clock limit of {names[0]}{more} fell by {1 - limit / full:.0%} ({full} to {limit})")
    if level := max((health.gpu_level or 0 for health in samples), default=0):
        signs.append(f"the GPU's thermal power level was {level} instead of 0")
    if status := max((health.thermal_status or 0 for health in samples), default=0):
        signs.append(f"Android's thermal status was {status} ({_THERMAL_STATUS[status]})")
    return signs


def is_cool(health: Health, first: Health, margin: float) -> bool:
    """Whether no zone is more than ``margin`` degrees above its temperature in ``first``."""
    return all(
        degrees <= first.temperatures[zone] + margin
        for zone, degrees in health.temperatures.items()
        if zone in first.temperatures
    )


def warming(before: Health, samples: Iterable[Health]) -> tuple[str, float, float] | None:
    """The zone that rose most over ``before``: its name, degrees Celsius before, and at most."""
    best: tuple[str, float, float] | None = None
    for health in samples:
        for zone, degrees in health.temperatures.items():
            start = before.temperatures.get(zone)
            if start is not None and (best is None or degrees - start > best[2] - best[1]):
                best = (zone, start, degrees)
    return best


# --- asking -----------------------------------------------------------------------------------------------------------


class HealthSampler:
    """Asks one device for its health.

    Attributes:
        full_limits: the highest limit that each clock showed so far.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.full_limits: dict[str, int] = {}
        self._missed = 0

    def sample(self) -> Health:
        """How the device is now, in one round trip. What it doesn't tell is missing.

        A device that is gone or mute shows nothing, and that is no error here: whoever uses it next will find out, and may
        know how to get it back.
        """
        if self._missed >= PATIENCE:
            return Health(notes=(f"the device did not show its health within {HEALTH_SECONDS:g} s: not asked again",))
        try:
            answer = self.transport.shell(["sh", "-c", _SCRIPT], timeout=HEALTH_SECONDS, limit=OUTPUT_BYTES)
        except DeviceTimeoutError as error:
            self._missed += 1
            return Health(notes=(f"the device's health is unknown: {error}",))
        except DeviceError as error:
            return Health(notes=(f"the device's health is unknown: {error}",))
        self._missed = 0
        health = parse_health(answer.stdout.decode("utf-8", "replace"))
        for name, limit in health.limits.items():
            self.full_limits[name] = max(limit, self.full_limits.get(name, 0))
        return health
