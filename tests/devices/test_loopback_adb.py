"""The loopback device as the adb program sees it: both versions, with a root of its own and without."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pytest_qnn.adb.server import AdbServer, start_server
from pytest_qnn.testing import LoopbackDevice

ODD_NAMES = ["a b", "'quoted\"", "$(reboot)", "new\nline", "-rf", "üñí漢", "back\\slash", "*?[x]", "; true", "&|<>"]


class Adb:
    """The adb program, bound to one device."""

    def __init__(self, program: Path, server: AdbServer, device: LoopbackDevice) -> None:
        self.program, self.server, self.device = program, server, device

    def __call__(
        self, *words: str | Path, stdin: bytes = b"", timeout: float = 30
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.command(*words), input=stdin, capture_output=True, timeout=timeout)

    def command(self, *words: str | Path) -> list[str]:
        return [str(self.program), "-P", str(self.server.port), "-s", self.device.address, *map(str, words)]


@pytest.fixture(scope="module")
def server(each_adb: Path) -> Iterator[AdbServer]:
    with start_server(adb=each_adb) as server:
        yield server


@pytest.fixture(scope="module", params=["isolated", "rewritten"])
def device(
    request: pytest.FixtureRequest, server: AdbServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoopbackDevice]:
    folder = tmp_path_factory.mktemp("device")
    with LoopbackDevice(folder, isolate=request.param == "isolated", reboot_seconds=0.1) as device:
        device.connect(server)
        yield device
        device.disconnect(server)


@pytest.fixture
def adb(each_adb: Path, server: AdbServer, device: LoopbackDevice) -> Iterator[Adb]:
    device.connect(server)
    yield Adb(each_adb, server, device)
    device.faults()


def test_the_exit_code_and_both_outputs_of_a_command_arrive_apart(adb: Adb) -> None:
    done = adb("shell", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_a_command_that_a_signal_ended_has_that_exit_code(adb: Adb) -> None:
    assert adb("shell", "kill -KILL $$").returncode == 128 + 9


def test_standard_input_reaches_the_command_and_ends(adb: Adb) -> None:
    data = os.urandom(3_000_000)
    done = adb("shell", "cat", stdin=data)
    assert done.stdout == data


def test_without_the_shell_protocol_outputs_are_merged(adb: Adb) -> None:
    done = adb("shell", "-x", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout) == (0, b"out\nerr\n")


def test_a_terminal_is_one(adb: Adb) -> None:
    done = adb("shell", "-t", "-t", "test -t 0 && test -t 1 && echo terminal; stty size; exit 4")
    assert done.stdout.startswith(b"terminal\r\n"), done
    assert done.returncode == 4


def test_exec_hands_bytes_over_as_they_are(adb: Adb) -> None:
    data = bytes(range(256)) * 5000
    adb.device.path("/data/local/tmp/bytes").write_bytes(data)
    assert adb("exec-out", "cat /data/local/tmp/bytes").stdout == data


@pytest.mark.parametrize("name", ODD_NAMES)
def test_files_with_odd_names_come_back_as_they_went(adb: Adb, tmp_path: Path, name: str) -> None:
    sent, back = tmp_path / "sent", tmp_path / "back"
    sent.write_bytes(os.urandom(70_000))
    sent.chmod(0o640)
    os.utime(sent, (1_500_000_000, 1_500_000_000))
    path = f"/data/local/tmp/odd/{name}"
    assert adb("push", sent, path).returncode == 0
    place = adb.device.path(path)
    assert place.read_bytes() == sent.read_bytes()
    assert place.stat().st_mode & 0o777 == 0o640
    assert int(place.stat().st_mtime) == 1_500_000_000
    assert adb("pull", path, back).returncode == 0
    assert back.read_bytes() == sent.read_bytes()


def test_folders_come_back_as_they_went(adb: Adb, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    for number in range(20):
        (sent / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        (sent / f"{number % 3}" / f"{number}").write_bytes(bytes([number]) * number * 1000)
    assert adb("push", sent, "/data/local/tmp/folder").returncode == 0
    assert adb("pull", "/data/local/tmp/folder", tmp_path / "back").returncode == 0
    for file in sent.rglob("*"):
        if file.is_file():
            assert (tmp_path / "back" / file.relative_to(sent)).read_bytes() == file.read_bytes()


def test_a_large_file_comes_back_as_it_went(adb: Adb, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    sent.write_bytes(os.urandom(1 << 20) * 20 + b"tail")
    assert adb("push", sent, "/data/local/tmp/large").returncode == 0
    assert adb("pull", "/data/local/tmp/large", tmp_path / "back").returncode == 0
    assert (tmp_path / "back").read_bytes() == sent.read_bytes()


def test_what_can_not_be_is_refused_as_a_device_does(adb: Adb, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    missing = adb("pull", "/data/local/tmp/nothing", tmp_path / "back")
    assert missing.returncode == 1
    assert b"nothing" in missing.stdout + missing.stderr
    adb.device.path("/data/local/tmp/plain").write_bytes(b"")
    refused = adb("push", tmp_path / "file", "/data/local/tmp/plain/inside")
    assert refused.returncode == 1
    assert b"Not a directory" in refused.stdout + refused.stderr or b"File exists" in refused.stdout + refused.stderr


def test_paths_do_not_lead_out_of_the_device(adb: Adb, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert adb("push", tmp_path / "file", "/data/local/tmp/" + "../" * 20 + "data/escaped").returncode == 0
    assert adb.device.path("/data/escaped").read_bytes() == b"x"


def test_ports_are_forwarded_to_the_device(adb: Adb) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = adb("forward", "tcp:0", f"tcp:{listening.getsockname()[1]}").stdout.strip().decode()
        with socket.create_connection(("127.0.0.1", int(port)), 10) as near:
            far, _ = listening.accept()
            with far:
                _exchange(near, far)
    assert adb("forward", "--remove", f"tcp:{port}").returncode == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)), 10)


def test_ports_are_forwarded_from_the_device(adb: Adb) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host = f"tcp:{listening.getsockname()[1]}"
        port = adb("reverse", "tcp:0", host).stdout.strip().decode()
        assert host in adb("reverse", "--list").stdout.decode()
        with socket.create_connection(("127.0.0.1", int(port)), 10) as near:
            far, _ = listening.accept()
            with far:
                _exchange(near, far)
        assert adb("reverse", "--remove", f"tcp:{port}").returncode == 0
        assert adb("reverse", "--remove", f"tcp:{port}").returncode == 1


def _exchange(near: socket.socket, far: socket.socket) -> None:
    """A million bytes each way at the same time."""
    data = os.urandom(1_000_000)
    got: dict[str, bytes] = {}

    def receive(name: str, side: socket.socket) -> None:
        parts = bytearray()
        while len(parts) < len(data):
            parts += side.recv(1 << 16)
        got[name] = bytes(parts)

    threads = [threading.Thread(target=receive, args=(name, side)) for name, side in (("near", near), ("far", far))]
    threads += [threading.Thread(target=side.sendall, args=(data,)) for side in (near, far)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert got == {"near": data, "far": data}


def test_a_reboot_ends_what_ran_and_what_lasts_no_longer(adb: Adb) -> None:
    adb("shell", "echo x > /tmp/gone; echo x > /data/local/tmp/kept; setsid sleep 1000 < /dev/null > /dev/null 2>&1 &")
    before = adb("shell", "cat /proc/sys/kernel/random/boot_id").stdout
    assert adb.device.processes() == 1
    adb("reboot")
    adb("wait-for-disconnect")
    _come_back(adb)
    assert adb.device.processes() == 0
    after = adb("shell", "cat /proc/sys/kernel/random/boot_id").stdout
    assert len(before) == len(after) == 37
    assert before != after
    assert adb("shell", "ls /tmp; ls /data/local/tmp/kept; test ! -e /tmp/gone").returncode == 0


def _come_back(adb: Adb) -> None:
    adb.device.disconnect(adb.server)
    while True:  # the device decides when
        try:
            adb.device.connect(adb.server)
            return
        except OSError:
            continue


def test_it_is_no_root_and_says_so(adb: Adb) -> None:
    assert b"cannot run as root" in adb("root").stdout
    assert b"root" in adb("remount").stdout
    assert adb("shell", "id -u").stdout == b"2000\n"
    assert adb("shell", "dmesg").returncode == 1


def test_a_program_talks_both_ways_for_as_long_as_it_likes(adb: Adb) -> None:
    """As an agent does: large messages both ways at once, thousands of small ones, errors beside them."""
    adb.device.path("/data/local/tmp/echo.sh").write_text("echo started >&2; exec cat\n")
    with subprocess.Popen(
        adb.command("shell", "sh /data/local/tmp/echo.sh"), stdin=-1, stdout=-1, stderr=-1, bufsize=0
    ) as program:
        assert program.stdin
        assert program.stdout
        assert program.stderr
        assert program.stderr.readline() == b"started\n"
        for number in range(300):
            message = number.to_bytes(4, "little")
            program.stdin.write(message)
            assert _exactly(program.stdout.fileno(), 4) == message
        large = os.urandom(8 << 20)
        writer = threading.Thread(target=_write, args=(program.stdin.fileno(), large))
        writer.start()
        assert _exactly(program.stdout.fileno(), len(large)) == large
        writer.join(20)
        program.stdin.close()
        assert program.wait(20) == 0


def test_a_program_that_takes_nothing_stops_only_its_own_stream(adb: Adb) -> None:
    """A server with bytes waiting for the program doesn't notice that its client is gone, so it's the program that ends."""
    with _takes_nothing(adb) as (stuck, writer, program):
        assert adb("shell", "echo other").stdout == b"other\n"
        assert writer.is_alive()
        assert adb("shell", f"kill -9 {program}").returncode == 0
        assert stuck.wait(20) == 128 + 9
        writer.join(20)
        assert not writer.is_alive()


def test_a_program_that_takes_nothing_is_hung_up_on_with_the_connection(adb: Adb) -> None:
    with _takes_nothing(adb) as (_, writer, _):
        assert adb.device.processes() == 1
        adb.device.drop()
        writer.join(20)
        assert not writer.is_alive()
        end = time.monotonic() + 20
        while adb.device.processes():
            assert time.monotonic() < end, "the program lives on"
            time.sleep(0.05)
    assert adb("wait-for-device").returncode == 0


@contextlib.contextmanager
def _takes_nothing(adb: Adb) -> Iterator[tuple[subprocess.Popen[bytes], threading.Thread, int]]:
    """A program that reads nothing of the 64 MiB it is sent, the thread that sends them, and its process on the device."""
    with subprocess.Popen(adb.command("shell", "echo $$; exec sleep 1000"), stdin=-1, stdout=-1) as stuck:
        try:
            assert stuck.stdin
            assert stuck.stdout
            program = int(stuck.stdout.readline())
            writer = threading.Thread(target=_write, args=(stuck.stdin.fileno(), bytes(64 << 20)))
            writer.start()
            yield stuck, writer, program
        finally:
            stuck.kill()


def _write(file: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(file, view[: 1 << 20]) :]
    except BrokenPipeError:
        pass


def _exactly(file: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = os.read(file, count - len(parts))
        assert part, f"it ended after {len(parts)} of {count} bytes"
        parts += part
    return bytes(parts)


def test_what_it_was_asked_is_known(adb: Adb, tmp_path: Path) -> None:
    adb.device.requests()
    pushed, pulled = adb.device.traffic()
    (tmp_path / "file").write_bytes(bytes(1000))
    adb("shell", "true")
    adb("push", tmp_path / "file", "/data/local/tmp/asked")
    requests = adb.device.requests()
    assert "shell true" in requests
    assert any(text.startswith("SEND /data/local/tmp/asked,") for text in requests)
    assert adb.device.requests() == []
    assert adb.device.traffic() == (pushed + 1000, pulled)


def test_the_device_says_that_it_is_a_stand_in(adb: Adb) -> None:
    assert b"loopback" in adb("shell", "cat /run/pytest-qnn-stand-in").stdout
    assert adb("shell", "getprop ro.product.model").stdout == b"pytest-qnn loopback\n"


def test_a_lost_shell_gets_a_hangup_and_its_children_do_not(adb: Adb) -> None:
    folder = "/data/local/tmp"
    command = f"trap 'echo > {folder}/hangup; exit' HUP; sleep 1000 & echo $! > {folder}/child; echo go; while :; do sleep 0.01; done"
    with subprocess.Popen(adb.command("shell", command), stdin=-1, stdout=-1) as program:
        assert program.stdout
        assert program.stdout.readline() == b"go\n"
        program.kill()
    while not adb.device.path(f"{folder}/hangup").exists():
        assert adb("shell", "true").returncode == 0
    assert adb("shell", f"kill $(cat {folder}/child)").returncode == 0


def test_many_commands_leave_nothing_behind_in_the_device_itself(adb: Adb) -> None:
    process = psutil.Process(adb.device.process)
    adb("shell", "true")
    before = process.num_fds()
    for _ in range(8):
        assert adb("shell", "for i in 1 2 3 4 5 6 7 8; do (sleep 0 &) ; done").returncode == 0
    while adb.device.processes():
        assert adb("shell", "true").returncode == 0
    end = time.monotonic() + 20
    while process.num_fds() > before or len(process.children()) > 1:  # the last command's may be on its way
        assert time.monotonic() < end, f"{process.num_fds()} open files ({before} before), {process.children()}"
        assert adb("shell", "true").returncode == 0
