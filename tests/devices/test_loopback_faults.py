"""Faults of the loopback device, as the adb program and a bare socket see them."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from pytest_qnn.adb.server import AdbServer
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.testing.loopback.faults import IN_MID_WORK, Faults
from pytest_qnn.testing.loopback.protocol import AUTH, CNXN, VERSION

SIZE = 1_000_000
BYTE = 300_000  # where faults come
Adb = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="module")
def device(adb_server: AdbServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackDevice]:
    with LoopbackDevice(tmp_path_factory.mktemp("device"), reboot_seconds=0.1) as device:
        yield device
        device.disconnect(adb_server)


@pytest.fixture
def adb(adb_binary: Path, adb_server: AdbServer, device: LoopbackDevice) -> Iterator[Adb]:
    device.faults()
    device.disconnect(adb_server)
    device.connect(adb_server)
    device.struck()

    def run(*words: str | Path, timeout: float = 20) -> subprocess.CompletedProcess[bytes]:
        command = [str(adb_binary), "-P", str(adb_server.port), "-s", device.address, *map(str, words)]
        return subprocess.run(command, capture_output=True, timeout=timeout)

    yield run
    device.faults()


@pytest.fixture
def file(tmp_path: Path, device: LoopbackDevice) -> Path:
    """Bytes, also in /data/local/tmp/there."""
    content = bytes(range(250)) * (SIZE // 250)
    device.path("/data/local/tmp/there").write_bytes(content)
    (tmp_path / "file").write_bytes(content)
    return tmp_path / "file"


def state(adb_server: AdbServer, device: LoopbackDevice) -> str:
    return next((entry.state for entry in adb_server.devices() if entry.serial == device.address), "not there")


# --- push -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["push_drop", "push_no_space"])
def test_a_push_that_fails_leaves_no_file(adb: Adb, device: LoopbackDevice, file: Path, fault: str) -> None:
    device.faults(**{fault: BYTE})
    done = adb("push", file, "/data/local/tmp/new")
    assert done.returncode != 0
    assert device.struck() == [fault]
    assert not device.path("/data/local/tmp/new").exists()
    assert (b"No space left on device" in done.stdout + done.stderr) == (fault == "push_no_space")


def test_a_pushed_byte_is_flipped(adb: Adb, device: LoopbackDevice, file: Path) -> None:
    device.faults(push_corrupt=BYTE, times=1)
    assert adb("push", file, "/data/local/tmp/new").returncode == 0
    sent, arrived = file.read_bytes(), device.path("/data/local/tmp/new").read_bytes()
    assert [index for index in range(SIZE) if sent[index] != arrived[index]] == [BYTE]


def test_a_push_is_slow(adb: Adb, device: LoopbackDevice, file: Path) -> None:
    device.faults(push_delay=1000.0)
    with pytest.raises(subprocess.TimeoutExpired):
        adb("push", file, "/data/local/tmp/new", timeout=0.5)
    device.drop()


# --- pull -------------------------------------------------------------------------------------------------------------


def test_a_pull_ends_early_and_adb_does_not_notice(
    adb: Adb, device: LoopbackDevice, file: Path, tmp_path: Path
) -> None:
    device.faults(pull_done=BYTE)
    assert adb("pull", "/data/local/tmp/there", tmp_path / "back").returncode == 0
    assert (tmp_path / "back").read_bytes() == file.read_bytes()[:BYTE]


@pytest.mark.parametrize("fault", ["pull_cut", "pull_drop"])
def test_a_pull_breaks_off(adb: Adb, device: LoopbackDevice, file: Path, tmp_path: Path, fault: str) -> None:
    device.faults(**{fault: BYTE})
    assert adb("pull", "/data/local/tmp/there", tmp_path / "back").returncode != 0
    assert device.struck() == [fault]


def test_a_pulled_byte_is_flipped(adb: Adb, device: LoopbackDevice, file: Path, tmp_path: Path) -> None:
    device.faults(pull_corrupt=BYTE)
    assert adb("pull", "/data/local/tmp/there", tmp_path / "back").returncode == 0
    there, back = file.read_bytes(), (tmp_path / "back").read_bytes()
    assert [index for index in range(SIZE) if there[index] != back[index]] == [BYTE]


# --- shell ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["shell_drop", "shell_close"])
def test_output_breaks_off_without_an_exit_code(adb: Adb, device: LoopbackDevice, file: Path, fault: str) -> None:
    device.faults(**{fault: 5})
    done = adb("shell", "echo 0123456789; exit 0")
    assert done.returncode != 0
    assert done.stdout == b"01234"[: len(done.stdout)], "what was under way when the connection drops may be lost"
    assert fault == "shell_drop" or done.stdout == b"01234"
    assert device.struck() == [fault]


def test_a_command_that_says_too_little_is_cut_off_before_its_exit_code(adb: Adb, device: LoopbackDevice) -> None:
    device.faults(shell_close=1000)
    done = adb("shell", "echo all; exit 0")
    assert (done.returncode, done.stdout) == (255, b"all\n")


def test_at_byte_0_a_command_is_not_even_started(adb: Adb, device: LoopbackDevice) -> None:
    device.faults(shell_close=0)
    adb("shell", "touch /data/local/tmp/started")
    assert device.struck() == ["shell_close"]
    assert not device.path("/data/local/tmp/started").exists()


@pytest.mark.parametrize("fault", ["shell_hang", "open_hang", "mute"])
def test_a_command_hangs_until_somebody_loses_patience(adb: Adb, device: LoopbackDevice, fault: str) -> None:
    device.faults(**{fault: True})
    with pytest.raises(subprocess.TimeoutExpired):
        adb("shell", "echo never", timeout=0.5)
    assert fault in device.struck()


@pytest.mark.parametrize("fault", ["push_mute", "pull_mute", "shell_mute"])
def test_it_goes_mute_amid_work_and_is_back_on_a_new_connection(
    adb: Adb, adb_server: AdbServer, device: LoopbackDevice, file: Path, tmp_path: Path, fault: str
) -> None:
    words: dict[str, list[str | Path]] = {
        "push_mute": ["push", file, "/data/local/tmp/new"],
        "pull_mute": ["pull", "/data/local/tmp/there", tmp_path / "back"],
        "shell_mute": ["shell", "cat /data/local/tmp/there"],
    }
    device.faults(**{fault: BYTE}, times=1)
    with pytest.raises(subprocess.TimeoutExpired):
        adb(*words[fault], timeout=0.5)
    device.disconnect(adb_server)
    device.connect(adb_server)
    assert adb(*words[fault]).returncode == 0


def test_after_being_mute_it_goes_on_as_if_nothing_had_been(adb: Adb, device: LoopbackDevice) -> None:
    device.faults(mute=True)
    with pytest.raises(subprocess.TimeoutExpired):
        adb("shell", "true", timeout=0.3)
    device.faults()
    assert adb("shell", "echo back").stdout == b"back\n"


# --- the whole device -------------------------------------------------------------------------------------------------


def test_it_drops_its_connections_and_is_connected_again(
    adb: Adb, adb_binary: Path, adb_server: AdbServer, device: LoopbackDevice
) -> None:
    command = [str(adb_binary), "-P", str(adb_server.port), "-s", device.address, "shell", "echo there; sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as session:
        assert session.stdout
        assert session.stdout.readline() == b"there\n"
        device.drop()
        assert session.wait(20) != 0
    assert adb("wait-for-device").returncode == 0
    end = time.monotonic() + 20
    while adb("shell", "echo back").stdout != b"back\n":
        assert time.monotonic() < end, "it is not connected again"


def test_it_is_offline(adb: Adb, adb_server: AdbServer, device: LoopbackDevice) -> None:
    device.disconnect(adb_server)
    device.faults(offline=True)
    with closing(socket.create_connection(("127.0.0.1", device.port))) as line:
        line.sendall(greeting())
        line.settimeout(0.2)
        with pytest.raises(TimeoutError):
            line.recv(1)


def test_it_knows_no_key(adb: Adb, adb_server: AdbServer, device: LoopbackDevice) -> None:
    device.disconnect(adb_server)
    device.faults(unauthorized=True)
    with closing(socket.create_connection(("127.0.0.1", device.port))) as line:
        line.sendall(greeting())
        assert int.from_bytes(line.recv(4), "little") == AUTH
    with pytest.raises(OSError, match="authenticat"):
        device.connect(adb_server)


def greeting() -> bytes:
    """What a server says first."""
    words = (CNXN, VERSION, 1 << 20, 7, 0, CNXN ^ 0xFFFFFFFF)
    return b"".join(word.to_bytes(4, "little") for word in words) + b"host::\0"


def test_it_lacks_the_shell_protocol(adb: Adb, adb_server: AdbServer, device: LoopbackDevice) -> None:
    device.disconnect(adb_server)
    device.faults(no_shell_v2=True)
    device.connect(adb_server)
    done = adb("shell", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout) == (0, b"out\nerr\n")


def test_it_is_unplugged_and_plugged_in_again(adb: Adb, adb_server: AdbServer, device: LoopbackDevice) -> None:
    device.unplug()
    device.disconnect(adb_server)
    with pytest.raises(OSError, match="refused|cannot connect|failed to connect"):
        device.connect(adb_server)
    device.plug()
    device.connect(adb_server)
    assert adb("shell", "echo back").stdout == b"back\n"


# --- which and how often ----------------------------------------------------------------------------------------------


def test_a_fault_comes_as_often_as_is_said_and_where_is_said(adb: Adb, device: LoopbackDevice) -> None:
    device.faults(shell_close=0, times=2, only="marked")
    answers = [adb("shell", f"echo {word}").stdout for word in ("plain", "marked", "marked", "plain", "marked")]
    assert answers == [b"plain\n", b"", b"", b"plain\n", b"marked\n"]


def test_random_faults_are_the_same_with_the_same_seed() -> None:
    def chosen(seed: int) -> list[object]:
        faults = Faults()
        faults.set({"random": 0.5, "seed": seed})
        requests = [faults.request("push", f"SEND {number}") for number in range(50)]
        return [(request.reboot, [request.at(name) for name in IN_MID_WORK]) for request in requests]

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)


def test_random_faults_come_about_as_often_as_is_said() -> None:
    faults = Faults()
    faults.set({"random": 0.2, "seed": 3, "kinds": ["shell_close"]})
    hit = sum(faults.request("shell", "echo").at("shell_close") is not None for _ in range(2000))
    assert 300 < hit < 500


def test_a_random_reboot_is_one(adb: Adb, adb_server: AdbServer, device: LoopbackDevice) -> None:
    before = device.path("/run/boot_id").read_text()
    device.faults(random=1.0, kinds=["reboot"])
    adb("shell", "echo")
    assert "reboot" in device.struck()
    device.faults()
    end = time.monotonic() + 20
    while device.path("/run/boot_id").read_text() == before:  # it is on its way down
        assert time.monotonic() < end, "it did not boot anew"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"push_dorp": 1}, "no fault 'push_dorp'.*push_drop"),
        ({"push_drop": True}, "push_drop=True: expected int"),
        ({"push_drop": -1}, "push_drop=-1: expected 0 or more"),
        ({"random": 0.1, "kinds": ["reboot", "fire"]}, "no kind of random fault: 'fire'"),
        ({"push_delay": float("nan")}, "expected a number"),
    ],
)
def test_faults_that_do_not_exist_are_refused(device: LoopbackDevice, faults: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        device.faults(**faults)
