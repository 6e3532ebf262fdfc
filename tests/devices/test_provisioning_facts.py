"""What a device tells about itself: each piece may be missing, and nothing in it is more than text."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qnn.devices.device_log import log_tail
from pytest_qnn.devices.facts import DeviceFacts, probe, read_facts, read_free_bytes, split_sections
from pytest_qnn.devices.soc import SOCS
from pytest_qnn.devices.transport import Transport
from pytest_qnn.errors import DeviceFileError, DeviceTimeoutError
from pytest_qnn.testing import LoopbackDevice
from tests.devices.as_before import as_before

Open = Callable[[LoopbackDevice], Transport]
PROPERTIES = "/system/build.prop"
HOSTILE = (
    "$(touch /data/local/tmp/pwned)",
    "`touch /data/local/tmp/pwned`",
    "'; touch /data/local/tmp/pwned; '",
    '"; touch /data/local/tmp/pwned; "',
    "\x1b[2J\x1b]0;title\x07",
    "@@0000000000000000 end",
    "%s%n\\n\\0",
    "../../../etc",
    "\u202eDerdro\u200b",
    "x" * 5000,
)


@pytest.fixture
def android(kept_device: Callable[[str], LoopbackDevice]) -> Iterator[LoopbackDevice]:
    """A phone, the same for all tests here."""
    with as_before(kept_device("android")) as device:
        yield device


@pytest.fixture
def linux(kept_device: Callable[[str], LoopbackDevice]) -> Iterator[LoopbackDevice]:
    """A board, the same for all tests here."""
    with as_before(kept_device("linux")) as device:
        yield device


def set_property(device: LoopbackDevice, name: str, value: str | None) -> None:
    """Change or remove a property of an Android device."""
    file = device.path(PROPERTIES)
    lines = [line for line in file.read_text().splitlines() if not line.startswith(f"{name}=")]
    file.write_text("\n".join([*lines, *([f"{name}={value}"] if value is not None else [])]) + "\n")


def test_an_android_device(android: LoopbackDevice, open_transport: Open) -> None:
    transport = open_transport(android)
    facts = probe(transport)
    assert (facts.serial, facts.address) == (transport.serial, transport.address)
    assert facts.os == "android"
    assert facts.soc is SOCS["SM8650"]
    assert facts.htp_arch == 75
    assert facts.soc_text == ""
    assert facts.abi == "arm64-v8a"
    assert facts.release == "15"
    assert not facts.root
    assert facts.folder.endswith("/data/local/tmp/pytest-qnn")
    assert facts.folder_text == ""
    assert facts.free_bytes
    assert facts.free_bytes > 0
    assert facts.python is None
    assert "nsphvx-0" in facts.zones
    assert facts.temperature_c == 42.5
    assert facts.boot_id
    assert "loopback" in facts.stand_in
    assert json.loads(json.dumps(facts.to_json()))["htp_arch"] == 75


def test_a_linux_board(linux: LoopbackDevice, open_transport: Open) -> None:
    facts = probe(open_transport(linux))
    assert facts.os == "linux"
    assert facts.soc is SOCS["SM8650"]
    assert facts.abi == "aarch64"
    assert facts.folder.endswith("/var/tmp/pytest-qnn")
    assert facts.stand_in
    assert facts.python
    assert facts.python.path.startswith("/")
    assert facts.python.packages.keys() == {"onnxruntime", "onnxruntime-qnn", "numpy"}


def test_a_board_whose_python_lacks_something(make_device: Callable[..., LoopbackDevice], open_transport: Open) -> None:
    facts = probe(open_transport(make_device("linux", without=["onnxruntime-qnn"])))
    assert facts.python
    assert "onnxruntime-qnn" not in facts.python.packages
    assert "onnxruntime" in facts.python.packages
    assert probe(open_transport(make_device("linux", python=False))).python is None


def test_it_costs_one_command_and_leaves_nothing(android: LoopbackDevice, open_transport: Open) -> None:
    transport = open_transport(android)
    transport.shell(["true"])  # the transport's own first question
    android.requests()
    facts = probe(transport)
    assert len([request for request in android.requests() if request.startswith("shell")]) == 1
    assert list(android.path("/data/local/tmp/pytest-qnn").iterdir()) == []
    assert facts.boot_id == probe(transport).boot_id


def test_a_reboot_shows(android: LoopbackDevice, open_transport: Open) -> None:
    transport = open_transport(android)
    before = probe(transport)
    android.reboot(down=0)
    transport.reconnect(20)
    assert probe(transport).boot_id != before.boot_id


@pytest.mark.parametrize(
    ("flavor", "missing", "expected"),
    [
        ("android", ["/system/bin/getprop"], {"release": "unknown", "model": "unknown", "os": "android"}),
        ("android", [PROPERTIES], {"release": "unknown"}),
        ("android", ["/sys/devices/soc0"], {"soc": SOCS["SM8650"]}),
        ("android", ["/sys/devices/soc0", PROPERTIES], {"soc": None, "soc_text": "it tells nothing about it"}),
        ("android", ["/sys/class/thermal"], {"zones": (), "temperature_c": None}),
        ("android", ["/run/pytest-qnn-stand-in"], {"stand_in": ""}),
        ("android", ["/system/bin/df"], {"free_bytes": None}),
        ("android", ["/system/bin/date"], {"clock": None}),
        ("android", ["/system/bin/id"], {"root": False}),
        ("android", ["/system/bin/timeout"], {"soc": SOCS["SM8650"], "release": "15"}),
        ("android", ["/vendor/lib64"], {}),
        ("linux", ["/etc/os-release"], {"release": "unknown"}),
        ("linux", ["/bin/uname"], {"kernel": "unknown", "abi": "unknown"}),
        ("linux", ["/sys/devices/soc0"], {"soc": None}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_is_missing_is_unknown(
    flavor: str,
    missing: list[str],
    expected: dict[str, object],
    request: pytest.FixtureRequest,
    open_transport: Open,
) -> None:
    device: LoopbackDevice = request.getfixturevalue(flavor)
    for path in missing:
        there = device.path(path)
        shutil.rmtree(there) if there.is_dir() and not there.is_symlink() else there.unlink()
    facts = probe(open_transport(device))
    assert {name: getattr(facts, name) for name in expected} == expected
    assert facts.folder


def test_an_unknown_soc_is_none(android: LoopbackDevice, open_transport: Open) -> None:
    shutil.rmtree(android.path("/sys/devices/soc0"))
    set_property(android, "ro.soc.model", "SM8735")
    set_property(android, "ro.board.platform", "sun")
    facts = probe(open_transport(android))
    assert facts.soc is None
    assert facts.htp_arch is None
    assert "SM8735" in facts.soc_text


def test_a_device_that_contradicts_itself_has_no_soc(android: LoopbackDevice, open_transport: Open) -> None:
    set_property(android, "ro.soc.model", "SM8550")
    facts = probe(open_transport(android))
    assert facts.soc is None
    assert "contradicts itself" in facts.soc_text


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: value[:8].encode().hex())
def test_hostile_values_are_text(android: LoopbackDevice, open_transport: Open, value: str) -> None:
    for name in ("ro.product.model", "ro.soc.model", "ro.board.platform", "ro.build.version.release"):
        set_property(android, name, value)
    android.path("/sys/class/thermal/thermal_zone0/type").write_text(value + "\n")
    android.path("/sys/devices/soc0/soc_id").write_text(value + "\n")
    android.path("/run/pytest-qnn-stand-in").write_text(value + "\n")
    facts = probe(open_transport(android))
    assert not list(android.path("/data/local/tmp").glob("pwned"))
    assert facts.soc is None or facts.soc is SOCS["SM8650"]
    assert facts.stand_in, "whatever stands in that file, the device is none"
    for text in (facts.model, facts.release, facts.soc_text, facts.stand_in, *facts.zones):
        assert text.isprintable()
        assert len(text) < 1000
    assert facts.folder.endswith("/data/local/tmp/pytest-qnn")


# --- the folder -------------------------------------------------------------------------------------------------------


def test_a_configured_folder_is_made(android: LoopbackDevice, open_transport: Open) -> None:
    facts = probe(open_transport(android), "/data/local/tmp/a b/c'd")
    assert facts.folder.endswith("/data/local/tmp/a b/c'd")
    assert android.path("/data/local/tmp/a b/c'd").is_dir()


@pytest.mark.parametrize("folder", ["/proc/nothing", "/data/nowhere/$(id)"])
def test_no_other_folder_is_taken_than_the_configured_one(
    android: LoopbackDevice, open_transport: Open, folder: str
) -> None:
    android.path("/data/nowhere").write_text("a file\n")
    facts = probe(open_transport(android), folder)
    android.path("/data/nowhere").unlink()
    assert facts.folder == ""
    assert folder.rpartition("/")[2] in facts.folder_text
    assert facts.free_bytes is None


def test_a_folder_that_somebody_else_prepared_is_not_used(linux: LoopbackDevice, open_transport: Open) -> None:
    linux.path("/var/tmp/elsewhere").mkdir()
    linux.path("/var/tmp/pytest-qnn").symlink_to("elsewhere")
    facts = probe(open_transport(linux))
    assert facts.folder.endswith("/tmp/pytest-qnn")
    assert not facts.folder.endswith("/var/tmp/pytest-qnn")
    assert "belongs to another user" in facts.folder_text


def test_a_folder_from_which_nothing_runs_is_not_used(linux: LoopbackDevice, open_transport: Open) -> None:
    linux.path("/bin/chmod").unlink()  # as on a file system that is mounted noexec: what is written there can't be run
    facts = probe(open_transport(linux))
    assert facts.folder == ""
    assert facts.folder_text.count("noexec") == 2


# --- devices that don't answer ----------------------------------------------------------------------------------------


def test_a_mute_device_ends_by_the_deadline(android: LoopbackDevice, open_transport: Open) -> None:
    transport = open_transport(android)
    android.faults(mute=True)
    start = time.monotonic()
    with pytest.raises(DeviceTimeoutError):
        probe(transport, timeout=1)
    assert time.monotonic() - start < 10


def test_a_shell_that_is_none_is_an_error(android: LoopbackDevice, open_transport: Open) -> None:
    transport = open_transport(android)
    transport.shell(["true"])
    shell = android.path("/system/bin/sh")
    shell.unlink()
    shell.write_text(
        '#!/usr/bin/dash\ncase $2 in *thermal*) echo "can not do this" >&2; exit 3;; esac\nexec dash "$@"\n'
    )
    shell.chmod(0o755)
    with pytest.raises(DeviceFileError, match=r"exit code 3: can not do this"):
        probe(transport)


# --- the log ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavor", ["android", "linux"])
def test_the_end_of_the_log(flavor: str, request: pytest.FixtureRequest, open_transport: Open) -> None:
    device: LoopbackDevice = request.getfixturevalue(flavor)
    transport = open_transport(device)
    facts = probe(transport)
    lines = [f"line {number} \x1b[31mred\x1b[0m" for number in range(300)]
    device.path("/run/log/logcat" if flavor == "android" else "/run/log/kernel").write_text("\n".join(lines) + "\n")
    text = log_tail(transport, facts, lines=20)
    if flavor == "linux" and not facts.root:
        assert text == "", "dmesg is refused there"
        return
    assert text.splitlines()[-1].startswith("line 299")
    assert len(text.splitlines()) == 20
    assert "\x1b" not in text


def test_a_log_that_can_not_be_had_is_empty(android: LoopbackDevice, open_transport: Open) -> None:
    transport = open_transport(android)
    facts = probe(transport)
    android.faults(mute=True)
    start = time.monotonic()
    assert log_tail(transport, facts, timeout=1) == ""
    assert time.monotonic() - start < 10


# --- the reading of it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/x 1000 400 600 40% /data\n", 600 << 10),
        ("Filesystem 1K-blocks\n/a b 1000 1000 0 100% /data\n", 0),
        ("x 1 2 -5 101% /\n", 0),
        ("df: nothing", None),
        ("", None),
    ],
)
def test_free_space(text: str, free: int | None) -> None:
    assert read_free_bytes(text) == free


@given(st.dictionaries(st.sampled_from(["python", "runtime", "zones", "df", "folder", "clock", "uname"]), st.text()))
def test_no_answer_makes_the_reading_fail(told: dict[str, str]) -> None:
    facts = read_facts(told, "serial", "adb://serial@server:1")
    assert isinstance(facts, DeviceFacts)
    json.dumps(facts.to_json())
    assert facts.folder == "" or facts.folder.startswith("/")


@given(st.binary())
def test_output_without_the_mark_has_no_sections(output: bytes) -> None:
    assert split_sections(output, "f00dfeedf00dfeed") == {}


def test_temperatures_in_either_unit_without_currents_and_levels() -> None:
    told = "41000\tcpu-0\n39\tpmic\n99000\tpm8550-ibat-lvl0\n-273000\tbroken\nEAGAIN\tgpu\n-1000\toff\n"
    facts = read_facts({"zones": told}, "s", "a")
    assert facts.temperature_c == 41.0
    assert facts.zones == ("cpu-0", "pmic", "pm8550-ibat-lvl0", "broken", "gpu", "off")


def test_facts_can_be_compared(tmp_path: Path) -> None:
    facts = DeviceFacts("s", "a", "linux", folder=str(tmp_path))
    assert facts == replace(facts)
    assert hash(facts) == hash(replace(facts))
