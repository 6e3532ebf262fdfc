"""``pytest-qnn devices`` and ``pytest-qnn device``, and the discovery behind them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_qnn.adb.server import AdbServer, start_server
from pytest_qnn.cli import main
from pytest_qnn.devices.discovery import DeviceEntry, discover
from pytest_qnn.devices.facts import probe
from pytest_qnn.devices.lease import DeviceLease
from pytest_qnn.devices.store import DeviceStore
from pytest_qnn.devices.transport import Transport
from pytest_qnn.devices.workspace import Workspace
from pytest_qnn.errors import AdbServerError, DeviceLostError, DeviceRefusedError, OptionError
from pytest_qnn.settings import Settings
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.testing.device_runtime import make_device_runtime
from tests.devices.as_before import as_before, on_host

Open = Callable[[LoopbackDevice], Transport]
Command = Callable[..., tuple[int, str, str]]


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


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, adb_server: AdbServer
) -> Command:
    """Run a command of the CLI: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("ADB_SERVER_SOCKET", f"tcp:{adb_server.address}")
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        return code, *capsys.readouterr()

    return run


def free_port() -> int:
    with socket.socket() as probe_:
        probe_.bind(("127.0.0.1", 0))
        return int(probe_.getsockname()[1])


# --- devices ----------------------------------------------------------------------------------------------------------


def test_the_table(command: Command, android: LoopbackDevice, linux: LoopbackDevice) -> None:
    code, out, _ = command("devices")
    assert code == 0
    phone = next(line for line in out.splitlines() if line.startswith(android.address))
    board = next(line for line in out.splitlines() if line.startswith(linux.address))
    for word in ("device", "SM8650 (stand-in)", "v75", "Android 15", "none", "GiB", " 42 "):
        assert word in phone
    for word in ("SM8650 (stand-in)", "(qnn 2", "pytest-qnn loopback board"):
        assert word in board
    assert f"device {android.address}: nothing there runs models yet" in out
    assert f"device {linux.address} is a stand-in" in out


def test_json(command: Command, android: LoopbackDevice) -> None:
    lease = DeviceLease(android.address, os.environ["ADB_SERVER_SOCKET"].removeprefix("tcp:"), "somebody")
    lease.acquire(0)
    code, out, _ = command("devices", "--json", "--device", android.address)
    lease.release()
    assert code == 0
    (device,) = json.loads(out)["devices"]
    assert device["state"] == "device"
    assert device["facts"]["soc"]["name"] == "SM8650"
    assert device["facts"]["temperature_c"] == 42.5
    assert device["lease"]["pid"] == os.getpid()
    assert device["lease"]["what"] == "somebody"


def test_a_mute_device_does_not_hold_up_the_others(
    command: Command, android: LoopbackDevice, linux: LoopbackDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_qnn.cli.devices.PROBE_SECONDS", 2.0)
    android.faults(mute=True)
    start = time.monotonic()
    code, out, _ = command("devices", "--device", f"{android.address},{linux.address}")
    assert time.monotonic() - start < 12
    assert code == 0
    assert "SM8650" in next(line for line in out.splitlines() if line.startswith(linux.address))
    assert "2 s" in out.partition("\n\n")[2]
    android.faults()


def test_missing_ones_are_rows_too(command: Command, android: LoopbackDevice) -> None:
    near = android.address[:-1] + ("1" if android.address[-1] != "1" else "2")
    code, out, _ = command("devices", "--device", f"nosuch,{near}")
    assert code == 1
    assert "nosuch" in out
    assert "missing" in out
    assert "Connection refused" in out


def test_no_server_is_an_error_that_says_what_to_do(command: Command) -> None:
    code, out, error = command("devices", "--adb-server", f"127.0.0.1:{free_port()}")
    assert (code, out) == (1, "")
    assert "start-server" in error


def test_no_device_is_exit_code_1(command: Command, tmp_path: Path, adb_binary: Path) -> None:
    with start_server(adb=adb_binary) as server:
        code, out, _ = command("devices", "--adb-server", server.address)
    assert code == 1
    assert "plug one in" in out


@pytest.mark.parametrize(
    "words",
    [["devices", "--device", "a;b"], ["devices", "--adb-server", "nonsense"], ["device", "$(id)", "diagnose"]],
    ids=" ".join,
)
def test_what_is_no_serial_is_wrong_usage(command: Command, words: list[str]) -> None:
    code, _, error = command(*words)
    assert code == 2
    assert error.startswith("pytest-qnn: ")


# --- device diagnose --------------------------------------------------------------------------------------------------


def test_diagnose_a_board_that_is_ready(command: Command, linux: LoopbackDevice) -> None:
    code, out, _ = command("device", linux.address, "diagnose")
    assert code == 0, out
    assert "Models can run on this device." in out
    assert "problem" not in out
    for step in ("ADB server", "state", "shell", "folder", "space", "SoC", "Python", "temperature", "lease"):
        assert any(line.startswith(f"{step} ") for line in out.splitlines()), step


def test_diagnose_a_phone_that_is_ready(command: Command, android: LoopbackDevice, tmp_path: Path) -> None:
    runtime = str(make_device_runtime(tmp_path / "runtime"))
    code, out, _ = command("device", android.address, "diagnose", "--device-runtime", runtime)
    assert code == 0, out
    assert "libQnnHtpV75Skel.so: " in out
    code, out, _ = command("devices", "--device", android.address, "--device-runtime", runtime)
    assert code == 0
    assert "device_runtime" in out
    assert "nothing there runs models" not in out


def test_a_runtime_folder_that_is_not_there_is_said(command: Command, android: LoopbackDevice, tmp_path: Path) -> None:
    _, out, _ = command("devices", "--device", android.address, "--device-runtime", str(tmp_path / "nowhere"))
    assert f"{tmp_path / 'nowhere'} is no folder" in out


def test_diagnose_a_phone_without_a_runtime(command: Command, android: LoopbackDevice) -> None:
    code, out, _ = command("device", android.address, "diagnose", "--json")
    assert code == 1
    steps = {step["name"]: step for step in json.loads(out)["steps"]}
    assert [name for name, step in steps.items() if step["ok"] is False] == ["qnn-net-run"]
    assert "QNN_SDK_ROOT" in steps["qnn-net-run"]["text"]


@pytest.mark.parametrize(
    ("harm", "words", "step", "says"),
    [
        (lambda device: None, ["--device-folder", "/proc/nothing"], "folder", "can't be made"),
        (lambda device: device.path("/sys/devices/soc0/soc_id").write_text("519\n"), [], "SoC", "contradicts itself"),
        (lambda device: device.faults(shell_hang=True), [], "shell", "was not done within 2 s"),
    ],
    ids=["folder", "soc", "shell"],
)
def test_diagnose_finds_the_step(
    command: Command,
    android: LoopbackDevice,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[LoopbackDevice], object],
    words: list[str],
    step: str,
    says: str,
) -> None:
    monkeypatch.setattr("pytest_qnn.cli.device.PROBE_SECONDS", 2.0)
    harm(android)
    code, out, _ = command("device", android.address, "diagnose", "--json", *words)
    android.faults()
    assert code == 1
    found = next(s for s in json.loads(out)["steps"] if s["name"] == step)
    assert found["ok"] is False
    assert says in found["text"]


def test_diagnose_ends_at_a_dead_server(command: Command) -> None:
    code, out, _ = command("device", "phone", "diagnose", "--adb-server", f"127.0.0.1:{free_port()}")
    assert code == 1
    assert "no ADB server" in out


# --- device clean -----------------------------------------------------------------------------------------------------


def test_clean_removes_what_nobody_uses(
    command: Command, android: LoopbackDevice, open_transport: Open, tmp_path: Path
) -> None:
    transport = open_transport(android)
    folder = probe(transport).folder
    for name in ("used", "unused"):
        (tmp_path / name).write_bytes(name.encode() * 200_000)
    paths = DeviceStore(transport, folder, 100).put({name: tmp_path / name for name in ("used", "unused")})
    own = Workspace.make(transport, folder)
    own.link({"used": paths["used"]})
    dead = Workspace.make(transport, folder)
    note = on_host(android, dead.path) / "owner.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "started": 1.0}))
    code, out, _ = command("device", android.address, "clean")
    assert code == 0
    assert "1 workspace and 1 file removed" in out
    assert "1 workspace in use, with 1 file" in out
    code, out, _ = command("device", android.address, "clean", "--all")
    assert code == 0
    assert "1 workspace and 1 file removed" in out
    assert "in use" not in out


def test_clean_keeps_off_a_device_that_is_leased(
    command: Command, android: LoopbackDevice, adb_server: AdbServer
) -> None:
    lease = DeviceLease(android.address, adb_server.address)
    lease.acquire(0)
    code, _, error = command("device", android.address, "clean", "--all")
    lease.release()
    assert code == 1
    assert f"process {os.getpid()}" in error


# --- device logs ------------------------------------------------------------------------------------------------------


def test_logs(command: Command, android: LoopbackDevice) -> None:
    android.path("/run/log/logcat").write_text("".join(f"E line {n} \x1b[2J\n" for n in range(9)))
    code, out, _ = command("device", android.address, "logs", "--lines", "3")
    assert code == 0
    assert [line[:8] for line in out.splitlines()] == ["E line 6", "E line 7", "E line 8"]
    assert "\x1b" not in out
    assert command("device", android.address, "logs", "--lines", "0")[0] == 2


def test_it_runs_as_a_program(android: LoopbackDevice, adb_server: AdbServer, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pytest_qnn.cli", "devices", "--json", "--adb-server", adb_server.address]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert android.address in {device["serial"] for device in json.loads(done.stdout)["devices"]}


# --- discovery --------------------------------------------------------------------------------------------------------


def find(adb_server: AdbServer, *device: str) -> list[DeviceEntry]:
    return discover(Settings(adb_server=adb_server.address, device=device))


def test_named_devices_come_in_their_order(
    adb_server: AdbServer, android: LoopbackDevice, linux: LoopbackDevice
) -> None:
    names = [linux.address, f"adb://{android.address}@{adb_server.address}", linux.address]
    found = find(adb_server, *names)
    assert [entry.serial for entry in found] == [linux.address, android.address]
    assert [entry.state for entry in found] == ["device", "device"]
    assert found[0].address == f"adb://{linux.address}@{adb_server.address}"
    transport = found[0].open()
    assert transport.shell(["echo", "works"]).text == "works"
    transport.close()


def test_both_releases_of_adb_know_a_device(
    each_adb: Path, make_device: Callable[..., LoopbackDevice], tmp_path: Path
) -> None:
    device = make_device("android")
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    with start_server(adb=each_adb) as server:
        (entry,) = find(server, device.address)
        transport = entry.open()
        facts = probe(transport)
        path = DeviceStore(transport, facts.folder, 1).put({"file": tmp_path / "file"})["file"]
        Workspace.make(transport, facts.folder).link({"file": path})
        transport.close()
    assert (entry.state, facts.os) == ("device", "android")
    assert on_host(device, path).stat().st_size == 100_000


def test_a_device_on_the_network_is_connected(adb_server: AdbServer, android: LoopbackDevice) -> None:
    android.disconnect(adb_server)
    assert android.address not in {entry.serial for entry in find(adb_server)}
    (entry,) = find(adb_server, android.address)
    assert entry.state == "device"
    assert entry.trouble == ""


def test_a_device_on_the_network_that_was_away_is_connected_again(
    adb_server: AdbServer, android: LoopbackDevice
) -> None:
    android.faults(offline=True)
    android.drop()
    end = time.monotonic() + 20
    while "offline" not in {entry.state for entry in find(adb_server) if entry.serial == android.address}:
        assert time.monotonic() < end
    android.faults()
    (entry,) = find(adb_server, android.address)  # its server would have gone on waiting for an answer
    assert (entry.state, entry.trouble) == ("device", "")


def test_a_device_on_the_network_that_stays_away_is_to_blame_and_not_its_server(
    adb_server: AdbServer, android: LoopbackDevice
) -> None:
    android.faults(mute=True)
    android.disconnect(adb_server)
    (entry,) = discover(Settings(adb_server=adb_server.address, device=(android.address,)), timeout=1)
    android.faults()
    assert entry.state in ("missing", "offline")
    assert "Restart it" not in entry.trouble  # the server
    assert "answer" in entry.trouble


def test_a_missing_device_has_a_hint(adb_server: AdbServer, android: LoopbackDevice) -> None:
    (entry,) = find(adb_server, android.address.replace(":", "-"))
    assert entry.state == "missing"
    assert f"Did you mean {android.address!r}?" in entry.trouble
    with pytest.raises(DeviceLostError, match="Did you mean"):
        entry.open()


def test_a_dead_server_hides_no_other(adb_server: AdbServer, android: LoopbackDevice) -> None:
    dead = free_port()
    first, second = find(adb_server, f"adb://phone@127.0.0.1:{dead}", android.address)
    assert (first.state, second.state) == ("no server", "device")
    with pytest.raises(AdbServerError, match=str(dead)):
        first.open()


def test_no_server_at_all_is_an_error() -> None:
    with pytest.raises(AdbServerError):
        discover(Settings(adb_server=f"127.0.0.1:{free_port()}"))


@pytest.mark.parametrize("fault", ["unauthorized", "offline"])
def test_devices_that_can_not_be_used_say_why(
    make_device: Callable[..., LoopbackDevice], adb_server: AdbServer, fault: str
) -> None:
    device = make_device("android")
    device.faults(**{fault: True})
    device.disconnect(adb_server)
    (entry,) = discover(Settings(adb_server=adb_server.address, device=(device.address,)), timeout=3)
    error = DeviceRefusedError if fault == "unauthorized" else DeviceLostError
    with pytest.raises(error, match=r"allow USB debugging|plug it in again|can't connect|did not answer"):
        entry.open()
    device.faults()


@pytest.mark.parametrize("address", ["adb://a b@h:1", "adb://x@h:99999", "http://x@h:1", "-rf", "adb://@h:1"])
def test_what_is_no_address_is_refused(adb_server: AdbServer, address: str) -> None:
    with pytest.raises(OptionError):
        find(adb_server, address)


def test_doctor_lists_the_devices_of_the_server_that_is_named(command: Command, android: LoopbackDevice) -> None:
    _, out, _ = command("doctor", "--json")
    (found,) = [check["detail"] for check in json.loads(out)["checks"] if check["name"] == "devices"]
    assert f"{android.address} device" in found
