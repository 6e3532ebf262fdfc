"""Everything that goes wrong between host and device ends by its deadline, as what it is, and leaves nothing half done."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from pytest_qnn.adb.server import AdbServer, start_server
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.errors import (
    DeviceError,
    DeviceFileError,
    DeviceLostError,
    DeviceRefusedError,
    DeviceSpaceError,
    DeviceTimeoutError,
)
from pytest_qnn.testing import LoopbackDevice
from tests.devices.as_before import as_before
from tests.devices.test_transport_server import pid_of
from tests.devices.traces import gone, marked_sleep, tree

TMP = "/data/local/tmp"
SOON = 0.3  # a deadline that is to pass
LATE = 60.0  # one that must not be needed
FAR_LESS = 15.0


@contextmanager
def ends_soon() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < FAR_LESS


@pytest.fixture
def android(kept_device: Callable[[str], LoopbackDevice], adb_server: AdbServer) -> Iterator[LoopbackDevice]:
    with as_before(kept_device("android")) as device:
        device.struck()
        yield device
        device.faults()
        device.disconnect(adb_server)
        AdbTransport(adb_server, device.address).reconnect(LATE)


@pytest.fixture
def reconnect(adb_server: AdbServer) -> Callable[[LoopbackDevice], None]:
    """A device that behaves again, on a new connection."""

    def renew(device: LoopbackDevice) -> None:
        device.faults()
        device.disconnect(adb_server)
        AdbTransport(adb_server, device.address).reconnect(LATE)

    return renew


@pytest.fixture
def line(android: LoopbackDevice, open_transport: Callable[[LoopbackDevice], AdbTransport]) -> AdbTransport:
    line = open_transport(android)
    line.kills()  # what is asked once per device was asked before anything goes wrong
    line.stat("/")
    return line


@pytest.fixture
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big") / "big"
    path.write_bytes(bytes(4 << 20))
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def private_server(each_adb: Path) -> Iterator[AdbServer]:
    """A server of the test's own, to be stopped and killed."""
    with start_server(adb=each_adb) as server:
        yield server


@pytest.fixture
def private_device(private_server: AdbServer, tmp_path: Path) -> Iterator[LoopbackDevice]:
    with LoopbackDevice(tmp_path / "private", isolate=False) as device:
        device.connect(private_server)
        yield device


@pytest.fixture
def private_line(private_server: AdbServer, private_device: LoopbackDevice) -> Iterator[AdbTransport]:
    line = AdbTransport(private_server, private_device.address)
    line.kills()
    line.stat("/")
    yield line
    line.close()


def operations(line: AdbTransport, big: Path, here: Path) -> dict[str, Callable[[float], object]]:
    return {
        "shell": lambda timeout: line.shell(["sh", "-c", "echo x; sleep 0.2; echo y"], timeout=timeout),
        "push": lambda timeout: line.push({f"{TMP}/x": big}, timeout=timeout),
        "pull": lambda timeout: line.pull({f"{TMP}/there": here / "x"}, timeout=timeout),
        "read": lambda timeout: line.read(f"{TMP}/there", timeout=timeout),
        "stat": lambda timeout: line.stat(f"{TMP}/there", timeout=timeout),
        "start": lambda timeout: line.start(["cat"], timeout=timeout).close(),
    }


OPERATIONS = ("shell", "push", "pull", "read", "stat", "start")


# --- in mid push ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "message", "timeout"),
    [
        ("push_drop", DeviceLostError, "lost device .* while it took /data/local/tmp/x", LATE),
        (
            "push_no_space",
            DeviceSpaceError,
            r"no space left on device .* for /data/local/tmp/x \(.*No space left",
            LATE,
        ),
        ("push_mute", DeviceTimeoutError, r"not done within 0.3 s while it took /data/local/tmp/x", SOON),
        ("push_corrupt", DeviceFileError, "the digest of /data/local/tmp/x differs", LATE),
    ],
)
@pytest.mark.parametrize("at", [0, 1_000_000])
def test_fault_in_mid_push_leaves_the_old_file(
    line: AdbTransport,
    android: LoopbackDevice,
    reconnect: Callable[[LoopbackDevice], None],
    big: Path,
    fault: str,
    error: type[DeviceError],
    message: str,
    timeout: float,
    at: int,
) -> None:
    line.push({f"{TMP}/x": b"old"}, timeout=LATE)
    android.faults(**{fault: at}, times=1)
    with ends_soon(), pytest.raises(error, match=message):
        line.push({f"{TMP}/x": big}, timeout=timeout)
    assert android.struck() == [fault]
    assert android.path(f"{TMP}/x").read_bytes() == b"old"
    reconnect(android)
    line.push({f"{TMP}/x": b"new"}, timeout=LATE)
    assert tree(android.path(TMP)) == {"x"}  # what the failed push left is gone as well
    assert android.path(f"{TMP}/x").read_bytes() == b"new"


def test_full_device_is_noticed_before_all_was_sent(line: AdbTransport, android: LoopbackDevice, here: Path) -> None:
    large = here / "large"
    with open(large, "wb") as file:
        file.truncate(64 << 30)  # sparse; to send it all would take minutes
    android.faults(push_no_space=100_000)
    with ends_soon(), pytest.raises(DeviceSpaceError, match=r"for /data/local/tmp/b \("):
        line.push({f"{TMP}/a": b"small", f"{TMP}/b": large, f"{TMP}/c": b"small"}, timeout=LATE)
    assert tree(android.path(TMP)) == set()


def test_device_that_is_really_full(
    here: Path, open_transport: Callable[[LoopbackDevice], AdbTransport], adb_server: AdbServer
) -> None:
    with LoopbackDevice(here / "device", space=8 << 20) as device:
        if not device.isolated:
            device.faults(push_no_space=8 << 20)
        device.connect(adb_server)
        line = open_transport(device)
        with pytest.raises(DeviceSpaceError, match=r"No space left"):
            line.push({f"{TMP}/x": bytes(9 << 20)}, timeout=LATE)
        line.push({f"{TMP}/y": bytes(100_000)}, timeout=LATE)
        assert line.shell(["ls", "-A", TMP]).text == "y"


def test_several_files_and_one_fault(line: AdbTransport, android: LoopbackDevice) -> None:
    android.faults(push_corrupt=0, only=f"{'b'}")
    files: dict[str, Path | bytes] = {f"{TMP}/{folder}/{name}": b"content" for folder in "12" for name in "acde"}
    with pytest.raises(DeviceFileError, match="refused|differs"):
        line.push(files | {f"{TMP}/2/b\n\\": b"content"}, timeout=LATE)
    android.faults()
    # each is whole or not there
    assert {android.path(f"{TMP}/{p}").read_bytes() for p in tree(android.path(TMP)) if "/" in p} <= {b"content"}
    assert "2/b\n\\" not in tree(android.path(TMP))


# --- in mid pull ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "message", "timeout"),
    [
        ("pull_drop", DeviceLostError, "lost device", LATE),
        ("pull_cut", DeviceLostError, "lost device", LATE),
        ("pull_done", DeviceFileError, "/data/local/tmp/x on device .* was cut short", LATE),
        ("pull_corrupt", DeviceFileError, "/data/local/tmp/x on device .* its digest differs", LATE),
        ("pull_mute", DeviceTimeoutError, "not done within 0.3 s while it sent /data/local/tmp/x", SOON),
    ],
)
@pytest.mark.parametrize("at", [0, 1_000_000])
def test_fault_in_mid_pull_leaves_the_old_file(
    line: AdbTransport,
    android: LoopbackDevice,
    reconnect: Callable[[LoopbackDevice], None],
    here: Path,
    fault: str,
    error: type[DeviceError],
    message: str,
    timeout: float,
    at: int,
) -> None:
    android.path(f"{TMP}/x").write_bytes(os.urandom(2 << 20))
    local = here / "x"
    local.write_bytes(b"old")
    android.faults(**{fault: at}, times=1)
    with ends_soon(), pytest.raises(error, match=message):
        line.pull({f"{TMP}/x": local}, timeout=timeout)
    assert android.struck() == [fault]
    assert tree(here) == {"x"}
    assert local.read_bytes() == b"old"
    reconnect(android)
    line.pull({f"{TMP}/x": local}, timeout=LATE)
    assert local.read_bytes() == android.path(f"{TMP}/x").read_bytes()


# --- in mid command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "timeout"),
    [
        ("shell_drop", DeviceLostError, LATE),
        ("shell_close", DeviceLostError, LATE),
        ("shell_mute", DeviceTimeoutError, SOON),
    ],
)
@pytest.mark.parametrize("at", [0, 50_000, 1 << 40])
def test_fault_in_mid_command_is_no_short_output(
    line: AdbTransport,
    android: LoopbackDevice,
    reconnect: Callable[[LoopbackDevice], None],
    fault: str,
    error: type[DeviceError],
    timeout: float,
    at: int,
) -> None:
    android.faults(**{fault: at}, times=1)
    with ends_soon(), pytest.raises(error, match="while it ran head"):
        line.shell(["head", "-c", "100000", "/dev/zero"], timeout=timeout)
    assert android.struck() == [fault]
    reconnect(android)
    assert len(line.shell(["head", "-c", "100000", "/dev/zero"], timeout=LATE).stdout) == 100_000


def test_command_that_never_begins_is_a_timeout(line: AdbTransport, android: LoopbackDevice) -> None:
    android.faults(shell_hang=True)
    with ends_soon(), pytest.raises(DeviceTimeoutError, match="ran true"):
        line.shell(["true"], timeout=SOON)


def test_fault_in_mid_stream_is_told_to_who_reads_and_who_writes(
    line: AdbTransport, android: LoopbackDevice, reconnect: Callable[[LoopbackDevice], None]
) -> None:
    for fault, error in (
        ("shell_drop", DeviceLostError),
        ("shell_close", DeviceLostError),
        ("shell_mute", DeviceTimeoutError),
    ):
        android.faults(**{fault: 3}, times=1)
        stream = line.start(["cat"], timeout=LATE)
        with ends_soon(), pytest.raises(error):
            for _ in range(100):
                stream.write(b"abcdef", timeout=SOON)
                stream.read(6, timeout=SOON)
        stream.close()
        reconnect(android)


def test_program_dies_with_the_connection_that_started_it(line: AdbTransport, android: LoopbackDevice) -> None:
    sleep = marked_sleep()
    stream = line.start(sleep, timeout=LATE)
    android.drop()
    with ends_soon(), pytest.raises(DeviceLostError):
        stream.read(1, timeout=LATE)
    assert gone(sleep)


# --- the whole device -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "operation"), [("mute", name) for name in OPERATIONS] + [("open_hang", name) for name in OPERATIONS[:-1]]
)
def test_mute_device_is_a_timeout(
    line: AdbTransport, android: LoopbackDevice, big: Path, here: Path, operation: str, fault: str
) -> None:
    android.path(f"{TMP}/there").write_bytes(b"content")
    android.faults(**{fault: True})
    with ends_soon(), pytest.raises(DeviceTimeoutError, match=r"within 0\.3 s"):
        operations(line, big, here)[operation](SOON)
    assert not list(here.iterdir())


def test_mute_device_comes_back_by_a_new_connection(line: AdbTransport, android: LoopbackDevice) -> None:
    android.faults(shell_mute=0, times=1)  # of this connection, for ever
    with ends_soon(), pytest.raises(DeviceTimeoutError):
        line.shell(["true"], timeout=SOON)
    with ends_soon():
        line.reconnect(LATE)
    assert line.shell(["echo", "x"]).text == "x"


def test_device_that_stays_mute_is_lost_by_the_deadline(line: AdbTransport, android: LoopbackDevice) -> None:
    android.faults(mute=True)
    with ends_soon(), pytest.raises(DeviceLostError, match=r"did not come back within 0\.5 s"):
        line.reconnect(0.5)


def test_reboot_is_a_lost_device_and_it_comes_back(private_line: AdbTransport, private_device: LoopbackDevice) -> None:
    line, sleep = private_line, marked_sleep()
    stream = line.start(sleep, timeout=LATE)
    private_device.reboot(down=1.0)
    with ends_soon(), pytest.raises(DeviceLostError):
        stream.read(1, timeout=LATE)
    with pytest.raises(DeviceError):
        line.shell(["true"], timeout=SOON)
    with ends_soon():
        line.reconnect(LATE)
    assert line.shell(["echo", "x"]).text == "x"
    assert gone(sleep)


def test_device_that_stays_away_is_lost_by_the_deadline(line: AdbTransport, android: LoopbackDevice) -> None:
    android.unplug()
    with (
        ends_soon(),
        pytest.raises(DeviceLostError, match=rf"device {android.address} did not come back within 1\.5 s: "),
    ):
        line.reconnect(1.5)
    with ends_soon(), pytest.raises(DeviceLostError, match="not found|offline"):
        line.shell(["true"], timeout=LATE)
    android.plug()
    line.reconnect(LATE)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("offline", DeviceLostError, "offline|not found"),
        ("unauthorized", DeviceRefusedError, "Unlock the device's screen and allow USB debugging"),
    ],
)
def test_device_that_lets_nobody_in(
    line: AdbTransport,
    android: LoopbackDevice,
    adb_server: AdbServer,
    fault: str,
    error: type[DeviceError],
    message: str,
) -> None:
    android.faults(**{fault: True})
    adb_server.disconnect(android.address)
    with suppress(DeviceError):  # the server goes on trying
        adb_server.connect(android.address, timeout=1.0)
    with ends_soon(), pytest.raises(error, match=message):
        line.shell(["true"], timeout=LATE)


def test_unknown_device_is_lost(adb_server: AdbServer) -> None:
    with pytest.raises(DeviceLostError, match="device .NOSUCH. not found .*asked for device NOSUCH"):
        AdbTransport(adb_server, "NOSUCH").shell(["true"])


def test_device_without_exit_codes_is_refused_by_name(
    android: LoopbackDevice, adb_server: AdbServer, open_transport: Callable[[LoopbackDevice], AdbTransport]
) -> None:
    android.faults(no_shell_v2=True)
    adb_server.disconnect(android.address)
    android.connect(adb_server)
    with pytest.raises(DeviceRefusedError, match="shell_v2"):
        open_transport(android).shell(["true"], timeout=LATE)


def test_slow_push_ends_by_its_deadline(line: AdbTransport, android: LoopbackDevice, big: Path) -> None:
    android.faults(push_delay=0.5)
    with ends_soon(), pytest.raises(DeviceTimeoutError):
        line.push({f"{TMP}/x": big}, timeout=SOON)
    android.faults()
    line.push({f"{TMP}/y": b""}, timeout=LATE)
    assert gone_from(android.path(TMP), ".part")
    assert tree(android.path(TMP)) == {"y"}


def gone_from(folder: Path, suffix: str) -> bool:
    end = time.monotonic() + FAR_LESS
    while any(suffix in name for name in tree(folder)):
        if time.monotonic() > end:
            return False
    return True


# --- the server -------------------------------------------------------------------------------------------------------


def test_stopped_server_is_a_timeout(
    private_line: AdbTransport, private_device: LoopbackDevice, big: Path, here: Path
) -> None:
    line = private_line
    private_device.path(f"{TMP}/there").write_bytes(b"content")
    pid = pid_of(line.server)
    os.kill(pid, signal.SIGSTOP)
    try:
        for operation in operations(line, big, here).values():
            with (
                ends_soon(),
                pytest.raises(DeviceTimeoutError, match=r"the ADB server at .* did not answer within 0\.2 s"),
            ):
                operation(0.2)
        with ends_soon(), pytest.raises(DeviceLostError, match=r"did not come back within 0\.5 s"):
            line.reconnect(0.5)
    finally:
        os.kill(pid, signal.SIGCONT)
    line.reconnect(LATE)
    assert not list(here.iterdir())


def test_server_killed_in_mid_call_is_a_lost_device(private_line: AdbTransport, private_device: LoopbackDevice) -> None:
    line, sleep = private_line, marked_sleep()
    stream = line.start(sleep, timeout=LATE)
    server = psutil.Process(pid_of(line.server))
    server.kill()
    with ends_soon(), pytest.raises(DeviceLostError):
        stream.read(1, timeout=LATE)
    psutil.wait_procs([server], timeout=10)
    assert gone(sleep)
    for call in (
        lambda: line.shell(["true"]),
        lambda: line.push({f"{TMP}/x": b""}, timeout=LATE),
        lambda: line.stat("/"),
    ):
        with ends_soon(), pytest.raises(DeviceLostError, match=r"can't be reached: no ADB server at .* start-server"):
            call()
    with ends_soon(), pytest.raises(DeviceLostError, match=r"did not come back within 0\.5 s: .*no ADB server"):
        line.reconnect(0.5)
