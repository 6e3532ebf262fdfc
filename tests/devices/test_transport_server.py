"""ADB servers: which is meant, what they say, and that private ones never stay."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qnn.adb.server import AdbServer, find_server, parse_address, parse_devices, parse_host_port, start_server
from pytest_qnn.errors import AdbServerError, DeviceError, DeviceLostError, DeviceTimeoutError, OptionError
from pytest_qnn.testing import LoopbackDevice


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADB_SERVER_SOCKET", "ANDROID_ADB_SERVER_ADDRESS", "ANDROID_ADB_SERVER_PORT"):
        monkeypatch.delenv(name, raising=False)


def pid_of(server: AdbServer) -> int:
    (pid,) = {
        c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == server.port
    }
    assert pid
    return pid


# --- which server -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        (None, {}, ("127.0.0.1", 5037)),
        ("farm:7000", {"ADB_SERVER_SOCKET": "tcp:other:1"}, ("farm", 7000)),
        ("[::1]:7000", {}, ("::1", 7000)),
        ("7000", {}, ("127.0.0.1", 7000)),
        (None, {"ADB_SERVER_SOCKET": "tcp:farm:7001", "ANDROID_ADB_SERVER_PORT": "1"}, ("farm", 7001)),
        (None, {"ADB_SERVER_SOCKET": "tcp:7001"}, ("127.0.0.1", 7001)),
        (None, {"ANDROID_ADB_SERVER_PORT": "7002"}, ("127.0.0.1", 7002)),
        (None, {"ANDROID_ADB_SERVER_ADDRESS": "farm"}, ("farm", 5037)),
        (None, {"ANDROID_ADB_SERVER_ADDRESS": "::1", "ANDROID_ADB_SERVER_PORT": "7003"}, ("::1", 7003)),
    ],
)
def test_server_is_found_as_adb_finds_it(
    setting: str | None, environment: dict[str, str], expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_server(setting) == AdbServer(*expected)


@pytest.mark.parametrize(
    "text", ["", "farm", "farm:", ":1", "farm:0", "farm:65536", "farm:1x", "::1:5037", "-x:1", "a b:1"]
)
def test_bad_address_of_a_server_is_refused_by_name(text: str) -> None:
    with pytest.raises(OptionError, match="HOST:PORT"):
        parse_host_port(text)


@pytest.mark.parametrize("spec", ["localfilesystem:/tmp/x", "tcp:", "7000"])
def test_socket_that_is_no_tcp_is_refused(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADB_SERVER_SOCKET", spec)
    with pytest.raises(OptionError):
        find_server()


@pytest.mark.parametrize(
    ("address", "serial", "server"),
    [
        ("R5CT10", "R5CT10", None),
        ("adb://R5CT10", "R5CT10", None),
        ("adb://R5CT10@farm:7000", "R5CT10", AdbServer("farm", 7000)),
        ("adb://127.0.0.1:5555@127.0.0.1:5037", "127.0.0.1:5555", AdbServer("127.0.0.1", 5037)),
        ("adb://[fe80::1%eth0]:5555@[::1]:5037", "[fe80::1%eth0]:5555", AdbServer("::1", 5037)),
        ("adb://emulator-5554@localhost:5037", "emulator-5554", AdbServer("localhost", 5037)),
        ("adb-R5CT._adb-tls-connect._tcp", "adb-R5CT._adb-tls-connect._tcp", None),
    ],
)
def test_address_names_serial_and_server(address: str, serial: str, server: AdbServer | None) -> None:
    assert parse_address(address) == (serial, server)


@pytest.mark.parametrize(
    "serial",
    [
        "",
        "a b",
        "a\nb",
        "a\tb",
        "-s",
        "a'b",
        'a"b',
        "$(id)",
        "`id`",
        "a;b",
        "a/b",
        "../x",
        "a\0b",
        "ü",
        "\u2028",
        "x" * 256,
    ],
)
def test_hostile_serial_is_refused(serial: str) -> None:
    for address in (serial, f"adb://{serial}@127.0.0.1:5037"):
        with pytest.raises(OptionError):
            parse_address(address)


@settings(max_examples=50)
@given(st.text(max_size=20) | st.text(st.sampled_from("aZ09_.:@/-'\"`$();&|<>*?[]%\\~#+= \n\t\0é"), max_size=20))
def test_any_serial_is_refused_or_is_one_word_for_shell_server_and_terminal(serial: str) -> None:
    try:
        found, _ = parse_address(serial)
    except OptionError:
        return
    assert found in serial
    assert not found.startswith("-")
    assert not set(found) & set("'\"`$();&|<>*?\\/ \n\t\0")
    assert found.isascii()
    assert found.isprintable()


@pytest.mark.parametrize(
    "address", ["adb://", "adb://@127.0.0.1:5037", "adb://x@127.0.0.1", "adb://x@:1", "ssh://x@y:1"]
)
def test_bad_address_of_a_device_is_refused(address: str) -> None:
    with pytest.raises(OptionError):
        parse_address(address)


# --- what a server says -----------------------------------------------------------------------------------------------


def test_list_of_devices_is_read_in_every_state() -> None:
    text = (
        "R5CT10                 device usb:1-2 product:e1s model:SM_S921B device:e1s transport_id:3\n"
        "127.0.0.1:5555         offline transport_id:4\n"
        "(no serial number)     no permissions (user in plugdev group; are your udev rules wrong?); "
        "see [http://developer.android.com/tools/device.html] usb:1-4 transport_id:5\n"
        "0123                   unauthorized usb:1-5\n"
        "weird line\n\n"
    )
    entries = parse_devices(text)
    assert [(e.serial, e.state, e.model, e.transport_id) for e in entries[:2]] == [
        ("R5CT10", "device", "SM_S921B", 3),
        ("127.0.0.1:5555", "offline", "", 4),
    ]
    assert entries[2].serial == ""
    assert entries[2].state.startswith("no permissions (user")
    assert (entries[3].state, entries[3].transport_id) == ("unauthorized", None)


@pytest.fixture
def private_server(each_adb: Path) -> Iterator[AdbServer]:
    """A server of the test's own."""
    with start_server(adb=each_adb) as server:
        yield server


def test_server_connects_and_forgets_a_device(private_server: AdbServer, tmp_path: Path) -> None:
    server = private_server
    assert server.version() >= 41
    with LoopbackDevice(tmp_path) as device:
        server.connect(device.address)
        assert "already" in server.connect(device.address)
        (entry,) = [e for e in server.devices() if e.serial == device.address]
        assert entry.state == "device"
        assert "shell_v2" in server.features(device.address)
        server.reconnect(device.address)
        server.disconnect(device.address)
        server.disconnect(device.address)
        assert device.address not in [e.serial for e in server.devices()]
        with pytest.raises(DeviceLostError):
            server.reconnect(device.address)
        with pytest.raises(DeviceLostError):
            server.features(device.address)


def test_device_that_is_not_there_can_not_be_connected(adb_server: AdbServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(DeviceLostError, match=r"can't connect to 127\.0\.0\.1:\d+: .*refused"):
        adb_server.connect(address)


def test_no_server_is_an_error_that_tells_how_to_start_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(AdbServerError, match=rf"no ADB server at 127\.0\.0\.1:{port} .*adb -P {port} start-server"):
        AdbServer("127.0.0.1", port).devices()
    assert not listens(port), "a server was started on a port that nobody asked for"
    with pytest.raises(AdbServerError, match=r"no ADB server at no\.such\.host\.invalid:1 "):
        AdbServer("no.such.host.invalid", 1).devices(timeout=20)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def impostor(request: pytest.FixtureRequest) -> Iterator[AdbServer]:
    """Something that listens and answers, but is no ADB server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(100)
                    connection.sendall(request.param)
                    with suppress(OSError):  # who asked may have gone
                        connection.shutdown(socket.SHUT_WR)
                        connection.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        yield AdbServer("127.0.0.1", listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "impostor", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"OKAYzzzz", b"OKAY0004zzzz", b"FAIL-003abc"], indirect=True
)
def test_what_is_no_adb_server_is_told_so(impostor: AdbServer) -> None:
    with pytest.raises(AdbServerError, match="is no ADB server"):
        impostor.version(timeout=5)


@pytest.mark.parametrize("impostor", [b"", b"OK", b"OKAY00", b"OKAY0004ab", b"FAIL0010abc"], indirect=True)
def test_short_answer_is_a_lost_server(impostor: AdbServer) -> None:
    with pytest.raises(DeviceLostError, match="closed the connection"):
        impostor.version(timeout=5)


def test_stopped_server_is_a_timeout(private_server: AdbServer) -> None:
    server = private_server
    pid = pid_of(server)
    os.kill(pid, signal.SIGSTOP)
    try:
        for ask in (server.version, server.devices):
            with pytest.raises(DeviceTimeoutError, match=r"did not answer within 0\.3 s"):
                ask(0.3)
        with pytest.raises(DeviceTimeoutError):
            server.connect("127.0.0.1:1", timeout=0.3)
    finally:
        os.kill(pid, signal.SIGCONT)


# --- private servers --------------------------------------------------------------------------------------------------


def test_private_server_is_gone_at_the_end() -> None:
    with pytest.raises(RuntimeError, match="in the middle"), start_server() as server:
        pid = pid_of(server)
        raise RuntimeError("in the middle")
    assert not psutil.pid_exists(pid)
    with pytest.raises(AdbServerError):
        server.version()


def test_private_server_dies_with_a_killed_owner(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pytest_qnn.adb.server import start_server\n"
        "with start_server() as server:\n    print(server.port, flush=True)\n    time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout
    server = AdbServer("127.0.0.1", int(owner.stdout.readline()))
    process = psutil.Process(pid_of(server))
    watchdog = process.parent()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert not psutil.wait_procs([process, watchdog], timeout=20)[1]


def test_taken_port_is_told_and_left_alone() -> None:
    with start_server() as first:
        with (
            pytest.raises(AdbServerError, match=f"can't start an ADB server at 127.0.0.1:{first.port}"),
            start_server(first.port),
        ):
            pass
        assert first.version() >= 41


def test_missing_adb_program_is_told(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="can't start an ADB server"), start_server(adb=tmp_path / "adb"):
        pass
