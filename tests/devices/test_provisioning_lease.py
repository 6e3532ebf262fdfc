"""One process at a time has a device, and a dead one has none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qnn.devices.lease import DeviceLease, lease_folder, process_start, same_process
from pytest_qnn.errors import DeviceBusyError, DeviceError

SERVER = "127.0.0.1:5037"
HOLDER = f"""
import sys, time
from pytest_qnn.devices.lease import DeviceLease
lease = DeviceLease("phone", "{SERVER}", "pytest of somebody")
lease.acquire(5)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def test_another_process_has_to_wait_and_is_told_for_whom() -> None:
    lease = DeviceLease("phone", f"adb://phone@{SERVER}")
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(DeviceBusyError, match=rf"pytest of somebody \(process {holder.pid} on .*device_wait"):
                lease.acquire(0.2)
            told = lease.holder()
            assert told
            assert told.pid == holder.pid
            DeviceLease("another phone", SERVER).acquire(0)
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert lease.holder() is None
            lease.acquire(0)
        finally:
            holder.kill()
    told = lease.holder()
    assert told
    assert told.pid == os.getpid()
    lease.release()
    assert lease.holder() is None


def test_two_of_one_process_keep_each_other_out() -> None:
    first, second = DeviceLease("phone", SERVER), DeviceLease("phone", SERVER)
    first.acquire(0)
    first.acquire(0)  # it has it
    with pytest.raises(DeviceBusyError):
        second.acquire(0)
    first.release()
    first.release()
    second.acquire(0)
    assert second.held
    second.release()


@pytest.mark.parametrize(
    ("serial", "server", "same"),
    [
        ("phone", "localhost:5037", True),
        ("phone", "[::1]:5037", True),
        ("phone", "127.0.0.1:5038", False),  # a tunnel to somewhere else, perhaps
        ("phone", "farm:5037", False),
        ("192.168.1.9:5555", "localhost:5038", True),
        ("192.168.1.9:5555", "farm:5037", False),
    ],
)
def test_a_device_has_one_lease_whatever_its_server_is_called(serial: str, server: str, same: bool) -> None:
    with DeviceLease(serial, f"adb://{serial}@{SERVER}") as first:
        first.acquire(0)
        other = DeviceLease(serial, f"adb://{serial}@{server}")
        if same:
            with pytest.raises(DeviceBusyError):
                other.acquire(0)
        else:
            other.acquire(0)
            other.release()


@pytest.mark.parametrize("note", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}', "[" * 10_000])
def test_a_damaged_note_is_none(note: str) -> None:
    lease = DeviceLease("phone", SERVER)
    lease.acquire(0)
    file = next(lease_folder().glob("*.json"))
    assert json.loads(file.read_text())["pid"] == os.getpid()
    file.write_text(note)
    assert lease.holder() is None
    with pytest.raises(DeviceBusyError, match="another process of this user"):
        DeviceLease("phone", SERVER).acquire(0)
    lease.release()


def test_a_folder_that_can_not_be_made_is_said(state: Path) -> None:
    state.write_text("a file")
    with pytest.raises(DeviceError, match="XDG_STATE_HOME"):
        DeviceLease("phone", SERVER).acquire(0)


def test_hostile_serials_stay_in_the_folder(state: Path) -> None:
    for serial in ("../../x", "a/b", "$(id)", "x" * 500):
        with DeviceLease(serial, SERVER) as lease:
            lease.acquire(0)
    assert {path.parent for path in state.rglob("*") if path.is_file()} == {lease_folder()}


def test_a_process_is_known_by_its_start() -> None:
    started = process_start(os.getpid())
    assert same_process(os.getpid(), started)
    assert not same_process(os.getpid(), started - 60)
    assert not same_process(0, started)
    assert not same_process(2**22 + 1, -1.0)
