"""What a device shows of its health is read as data, and whatever is missing or odd is unknown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qnn.devices.health import Cooling, Health, is_cool, parse_health, temperature, throttling, voltage, warming

THERMAL, CPU, SUPPLY = "/sys/class/thermal", "/sys/devices/system/cpu/cpufreq", "/sys/class/power_supply"


def shown(*files: tuple[str, object], service: str = "") -> str:
    lines = "".join(f"{path}\t{value}\n" for path, value in files)
    return lines + (f"==thermalservice==\n{service}" if service else "")


def zone(number: int, kind: str, temp: object) -> tuple[tuple[str, object], tuple[str, object]]:
    folder = f"{THERMAL}/thermal_zone{number}"
    return (f"{folder}/type", kind), (f"{folder}/temp", temp)


@pytest.mark.parametrize(
    ("raw", "degrees"),
    [
        ("42000", 42.0),
        ("42500", 42.5),
        ("31", 31.0),
        ("309", 30.9),
        ("1000", 1.0),
        ("-10000", -10.0),
        ("0", None),
        ("-40", None),
        ("-40000", None),
        ("-273000", None),
        ("-273", None),
        ("125000", None),
        ("127000", None),
        ("127", None),
        ("2147483647", None),
        ("", None),
        ("nan", None),
        ("4 2", None),
        ("٤٢", None),
        ("9" * 400, None),
    ],
)
def test_a_temperature_is_in_thousandths_tenths_or_degrees_and_nonsense_is_none(
    raw: str, degrees: float | None
) -> None:
    assert temperature(raw) == degrees


@pytest.mark.parametrize(
    ("raw", "volts"), [("4164000", 4.164), ("3800", 3.8), ("8600000", 8.6), ("0", None), ("x", None), ("12", None)]
)
def test_a_voltage_is_in_microvolts_or_millivolts(raw: str, volts: float | None) -> None:
    assert voltage(raw) == (None if volts is None else pytest.approx(volts))


def test_nothing_shown_is_nothing_known_and_no_error() -> None:
    health = parse_health("")
    assert health == Health()
    assert not health.shows_throttling
    assert health.hottest is None


def test_zones_that_give_no_temperature_are_dropped_with_a_note_and_zones_of_currents_and_levels_are_no_zones() -> None:
    health = parse_health(
        shown(
            *zone(0, "cpu-0-0", 41000),
            *zone(1, "unused", -273000),
            *zone(2, "pm8550-ibat-lvl0", 5000),
            *zone(3, "nsp", ""),
        )
    )
    assert health.temperatures == {"cpu-0-0": 41.0}
    assert health.notes == ("thermal zones that give no temperature: unused (-273000), nsp (nothing)",)


def test_zones_of_one_name_are_kept_apart() -> None:
    health = parse_health(shown(*zone(0, "tsens", 41000), *zone(1, "tsens", 52000)))
    assert health.temperatures == {"tsens": 41.0, "tsens (thermal_zone1)": 52.0}
    assert health.hottest == ("tsens (thermal_zone1)", 52.0)


def test_clocks_limits_and_governors_are_read_with_their_names() -> None:
    health = parse_health(
        shown(
            (f"{CPU}/policy0/scaling_cur_freq", 1804800),
            (f"{CPU}/policy0/scaling_max_freq", 2841600),
            (f"{CPU}/policy0/scaling_governor", "schedutil"),
            ("/sys/class/kgsl/kgsl-3d0/gpuclk", 220000000),
            ("/sys/class/kgsl/kgsl-3d0/max_gpuclk", 770000000),
            ("/sys/class/kgsl/kgsl-3d0/thermal_pwrlevel", 0),
            ("/sys/class/devfreq/soc:qcom,cdsp-l3/cur_freq", 1500000000),
            ("/sys/class/devfreq/soc:qcom,cdsp-l3/governor", "performance"),
        )
    )
    assert health.clocks == {"policy0 kHz": 1804800, "gpu Hz": 220000000, "soc:qcom,cdsp-l3": 1500000000}
    assert health.limits == {"policy0 kHz": 2841600, "gpu Hz": 770000000}
    assert health.governors == {"policy0 kHz": "schedutil", "soc:qcom,cdsp-l3": "performance"}
    assert health.gpu_level == 0
    assert health.shows_throttling


SERVICE = """IsStatusOverride: false
Thermal Status: 2
Cached temperatures:
	Temperature{mValue=99.0, mType=0, mName=OLD, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
	Temperature{mValue=25.6, mType=0, mName=AP, mStatus=0}
	Temperature{mValue=0.0, mType=4, mName=USB, mStatus=0}
Current cooling devices from HAL:
	CoolingDevice{mValue=1, mType=2, mName=cpu}
"""


def test_where_no_zone_can_be_read_androids_thermal_service_tells_temperatures_and_status() -> None:
    health = parse_health(shown(service=SERVICE))
    assert health.thermal_status == 2
    assert health.temperatures == {"AP": 25.6}
    assert throttling([health], health, {}) == ["Android's thermal status was 2 (moderate)"]


def test_a_battery_is_powered_from_outside_if_any_other_supply_is_online() -> None:
    battery = (
        (f"{SUPPLY}/battery/type", "Battery"),
        (f"{SUPPLY}/battery/status", "Discharging"),
        (f"{SUPPLY}/battery/current_now", -412000),
        (f"{SUPPLY}/battery/voltage_now", 4164000),
    )
    usb = (f"{SUPPLY}/usb/type", "USB")
    alone = parse_health(shown(*battery, usb, (f"{SUPPLY}/usb/online", 0))).battery
    plugged = parse_health(shown(*battery, usb, (f"{SUPPLY}/usb/online", 1))).battery
    assert alone is not None
    assert (alone.status, alone.current, alone.voltage, alone.external) == ("Discharging", -412000, 4.164, False)
    assert plugged is not None
    assert plugged.external


def test_of_two_batteries_nobody_knows_which_one_feeds_the_soc() -> None:
    two = [
        (f"{SUPPLY}/{name}/{file}", value)
        for name in ("main", "slave")
        for file, value in (("type", "Battery"), ("current_now", 1))
    ]
    battery = parse_health(shown(*two)).battery
    assert battery is not None
    assert battery.current is None


def test_a_cooling_device_of_a_processor_counts_when_at_work_one_of_the_screen_never_any_other_if_it_rose() -> None:
    first = Health(
        cooling={"thermal-cpufreq-0": Cooling(2, 10), "panel0-backlight": Cooling(3, 9), "odd": Cooling(1, 3)}
    )
    assert throttling([first], first, {}) == ["cooling device 'thermal-cpufreq-0' was at 2 of 10"]
    later = Health(
        cooling={"thermal-cpufreq-0": Cooling(0, 10), "panel0-backlight": Cooling(9, 9), "odd": Cooling(2, 3)}
    )
    assert throttling([later], first, {}) == ["cooling device 'odd' was at 2 of 3"]
    assert throttling([first, later], later, {}) == ["cooling device 'thermal-cpufreq-0' was at 2 of 10"]


def test_the_worst_of_each_sign_is_told_once_with_what_it_came_from() -> None:
    def at(state: int, limit: int) -> Health:
        return Health(cooling={"gpu": Cooling(state, 5)}, limits={"policy7 kHz": limit})

    samples = [at(0, 3000), at(1, 2400), at(3, 1500), at(2, 2700)]
    assert throttling(samples, samples[0], {"policy7 kHz": 3000}) == [
        "cooling device 'gpu' rose from 0 to 3 of 5",
        "the clock limit of policy7 kHz fell by 50% (3000 to 1500)",
    ]


def test_a_clock_that_is_low_because_nothing_runs_is_no_throttling() -> None:
    idle = Health(clocks={"policy0 kHz": 300000}, limits={"policy0 kHz": 3000000})
    busy = Health(clocks={"policy0 kHz": 3000000}, limits={"policy0 kHz": 3000000})
    assert throttling([busy, idle], busy, idle.limits) == []


def test_a_device_is_cool_when_no_zone_is_more_than_the_margin_above_its_start() -> None:
    first = Health({"cpu": 40.0, "nsp": 38.0})
    assert is_cool(Health({"cpu": 45.0, "nsp": 30.0, "new": 90.0}), first, 5)
    assert not is_cool(Health({"cpu": 41.0, "nsp": 43.5}), first, 5)
    assert warming(first, [Health({"cpu": 50.0, "nsp": 44.0}), Health({"cpu": 44.0, "nsp": 60.0})]) == (
        "nsp",
        38.0,
        60.0,
    )


PATHS = st.sampled_from(
    [
        f"{THERMAL}/thermal_zone0/temp", f"{THERMAL}/thermal_zone0/type", f"{THERMAL}/cooling_device1/cur_state",
        f"{THERMAL}/cooling_device1/type", f"{CPU}/policy0/scaling_max_freq", f"{SUPPLY}/battery/type",
        f"{SUPPLY}/battery/current_now", "/sys/class/kgsl/kgsl-3d0/thermal_pwrlevel", "", "/", "==thermalservice==",
    ]
)  # fmt: skip


@given(st.lists(st.tuples(PATHS | st.text(max_size=40), st.text(max_size=40) | st.integers().map(str)), max_size=20))
def test_whatever_a_device_writes_is_data(lines: list[tuple[str, str]]) -> None:
    health = parse_health("\n".join(f"{path}\t{value}" for path, value in lines))
    throttling([health], health, {})
    health.to_json()
    assert all(-40 < degrees < 125 for degrees in health.temperatures.values())
    assert all(name.isprintable() for name in (*health.temperatures, *health.cooling))


def test_a_device_that_makes_up_a_million_zones_fills_no_record() -> None:
    health = parse_health(shown(*(line for n in range(20_000) for line in zone(n, "x" * 1000, 40000))))
    assert len(health.temperatures) == 512
    assert max(map(len, health.temperatures)) < 110
