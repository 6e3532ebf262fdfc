"""ADB servers: which one to use, what devices it knows, and private ones that end with whoever started them.

A server is never started on a port that nobody asked for: the default port belongs to the user, and a server outlives
whoever started it.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from pytest_qnn.adb.connection import Connection, host_port, refusal
from pytest_qnn.adb.deadline import Deadline
from pytest_qnn.errors import AdbServerError, DeviceError, DeviceLostError, DeviceTimeoutError, OptionError

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 5037
START_SECONDS = 20.0
SERVER_SECONDS = 10.0

_SERIAL = re.compile(r"[A-Za-z0-9\[_.][A-Za-z0-9\[\]_.:%+=~#@-]{0,254}")
_FIELD = re.compile(r"\s(usb|product|model|device|features|transport_id|devpath):(\S*)")


@dataclass(frozen=True)
class DeviceEntry:
    """A device that a server knows.

    Attributes:
        serial: what it is addressed by.
        state: "device" if it can be used; "offline", "unauthorized", "no permissions (...)", "recovery", ...
        product, model: as the device says; empty if it doesn't.
        transport_id: the server's number for this line to it; None from servers that don't tell.
    """

    serial: str
    state: str
    product: str = ""
    model: str = ""
    transport_id: int | None = None


@dataclass(frozen=True)
class AdbServer:
    """An ADB server that may run at ``host:port``. Nothing is asked of it before a method is called, and none starts it.

    All methods raise:
        AdbServerError: nothing listens there, or something that is no ADB server.
        DeviceTimeoutError: it didn't answer within ``timeout`` seconds.
        DeviceLostError: it closed the connection.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT

    @property
    def address(self) -> str:
        """``HOST:PORT``."""
        return host_port(self.host, self.port)

    def open(self, deadline: Deadline, doing: str = "asked for an answer") -> Connection:
        """A connection to it."""
        return Connection(self.host, self.port, deadline, doing)

    def version(self, timeout: float = SERVER_SECONDS) -> int:
        """Version of its protocol: 41 is platform-tools 28 and later."""
        text = self._ask("host:version", timeout, "asked for its version")
        try:
            return int(text, 16)
        except ValueError:
            raise AdbServerError(f"what listens at {self.address} is no ADB server (version {text!r})") from None

    def devices(self, timeout: float = SERVER_SECONDS) -> list[DeviceEntry]:
        """The devices that it knows, in every state."""
        return parse_devices(self._ask("host:devices-l", timeout, "asked for its devices"))

    def connect(self, address: str, timeout: float = SERVER_SECONDS) -> str:
        """Make it connect to a device at ``HOST:PORT``; what it says. That it was connected already is no proof that the
        device lives.

        Raises:
            OptionError: ``address`` is none.
            DeviceLostError: it can't reach the device.
        """
        answer = self._ask(f"host:connect:{check_serial(address)}", timeout, f"told to connect to {address}")
        if not answer.startswith(("connected to", "already connected to")):
            raise DeviceLostError(
                f"the ADB server at {self.address} can't connect to {address}: {answer.strip()}. Is the device on, and its "
                "ADB listening there (adb tcpip 5555)?"
            )
        return answer

    def disconnect(self, address: str, timeout: float = SERVER_SECONDS) -> None:
        """Make it forget a device at ``HOST:PORT``; harmless if it doesn't know it."""
        try:
            self._ask(f"host:disconnect:{check_serial(address)}", timeout, f"told to disconnect {address}")
        except DeviceError as error:
            if "no such device" not in str(error):
                raise

    def reconnect(self, serial: str, timeout: float = SERVER_SECONDS) -> None:
        """Make it drop its line to a device and open it again, as after pulling the cable.

        Raises:
            DeviceLostError: it doesn't know the device.
        """
        answer = self._ask(f"host-serial:{check_serial(serial)}:reconnect", timeout, f"told to reconnect {serial}")
        if not answer.startswith("reconnecting"):  # it answers OKAY in any case
            raise refusal(answer, None, self.host, self.port, f"told to reconnect {serial}")

    def features(self, serial: str, timeout: float = SERVER_SECONDS) -> frozenset[str]:
        """What server and device can both do: "shell_v2", "stat_v2", ..."""
        text = self._ask(f"host-serial:{check_serial(serial)}:features", timeout, f"asked for the features of {serial}")
        return frozenset(text.split(","))

    def _ask(self, request: str, timeout: float, doing: str) -> str:
        with self.open(Deadline(timeout), doing) as connection:
            connection.request(request)
            return connection.text()


def parse_devices(text: str) -> list[DeviceEntry]:
    """Entries out of the answer to ``host:devices-l``: serial, state (which may have spaces), ``key:value`` fields."""
    entries = []
    for line in text.splitlines():
        serial, _, rest = line.strip().partition(" ")
        if line.startswith("(no serial number)"):
            serial, rest = "", line.removeprefix("(no serial number)")
        if not rest.strip():
            continue
        rest = " " + rest
        fields = {match[1]: match[2] for match in _FIELD.finditer(rest)}
        first = _FIELD.search(rest)
        state = rest[: first.start()] if first else rest
        number = fields.get("transport_id", "")
        entries.append(
            DeviceEntry(
                serial,
                state.strip(),
                fields.get("product", ""),
                fields.get("model", ""),
                int(number) if number.isdecimal() else None,
            )
        )
    return entries


# --- addresses --------------------------------------------------------------------------------------------------------


def check_serial(serial: str) -> str:
    """``serial``, if it can be a device's.

    Raises:
        OptionError: it has spaces, control characters, quotes, or others that no device's serial has.
    """
    if not _SERIAL.fullmatch(serial):
        raise OptionError(
            f"{serial!r} is no serial of a device: letters, digits and _ . : - + = ~ # @ % [ ] are allowed. "
            "See what 'adb devices' shows"
        )
    return serial


def parse_host_port(text: str, what: str = "the ADB server", host: str | None = None) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``; of a bare ``PORT`` where a default for ``host`` is given.

    Raises:
        OptionError: it isn't one.
    """
    name, colon, number = text.strip().rpartition(":")
    if not colon and host is not None:
        name = host
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    elif ":" in name:
        name = ""
    good = re.fullmatch(r"[A-Za-z0-9_.:%-]+", name) and not name.startswith("-")
    if not good or not re.fullmatch(r"[0-9]{1,5}", number) or not 0 < int(number) < 65536:
        raise OptionError(
            f"{text!r} is no address of {what}: HOST:PORT is expected, as in 127.0.0.1:5037 or [::1]:5037"
        )
    return name, int(number)


def parse_address(address: str) -> tuple[str, AdbServer | None]:
    """Serial and server of ``adb://SERIAL@HOST:PORT``; a serial alone, or ``adb://SERIAL``, leaves the server open.

    Raises:
        OptionError: it is none, or no device can have that serial.
    """
    if not address.startswith("adb://"):
        if "://" in address:
            raise OptionError(
                f"{address!r} is no address of a device: adb://SERIAL@HOST:PORT, or a serial, is expected"
            )
        return check_serial(address), None
    serial, at, server = address.removeprefix("adb://").rpartition("@")
    if not at:
        return check_serial(server), None
    return check_serial(serial), AdbServer(*parse_host_port(server))


def find_server(setting: str | None = None) -> AdbServer:
    """The server to use: ``setting`` (HOST:PORT), else what adb itself would use: ADB_SERVER_SOCKET (tcp:HOST:PORT),
    ANDROID_ADB_SERVER_ADDRESS and ANDROID_ADB_SERVER_PORT, 127.0.0.1:5037. It need not run.

    Raises:
        OptionError: the setting or the variable is no address.
    """
    if setting:
        return AdbServer(*parse_host_port(setting, host=DEFAULT_HOST))
    if spec := os.environ.get("ADB_SERVER_SOCKET"):
        kind, _, rest = spec.partition(":")
        if kind != "tcp":
            raise OptionError(f"ADB_SERVER_SOCKET={spec!r}: only tcp:HOST:PORT is supported")
        return AdbServer(*parse_host_port(rest, "the ADB server (ADB_SERVER_SOCKET)", host=DEFAULT_HOST))
    host = (os.environ.get("ANDROID_ADB_SERVER_ADDRESS") or DEFAULT_HOST).strip("[]")
    port = os.environ.get("ANDROID_ADB_SERVER_PORT") or DEFAULT_PORT
    text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return AdbServer(*parse_host_port(text, "the ADB server (ANDROID_ADB_SERVER_ADDRESS, ANDROID_ADB_SERVER_PORT)"))


# --- private servers --------------------------------------------------------------------------------------------------

# Holds the server as its child until its own standard input ends, which it does when we close it or die, whatever of;
# then it removes the log and its folder, which nobody else does after kill -9.
_WATCHDOG = 'trap "" INT HUP; "$@" </dev/null >"$LOG" 2>&1 & echo $!; cat >/dev/null; kill -9 $! 2>/dev/null; wait; rm -f -- "$LOG"; rmdir -- "${LOG%/*}" 2>/dev/null'


@contextmanager
def start_server(port: int = 0, adb: str | Path | None = None) -> Iterator[AdbServer]:
    """A server of our own on 127.0.0.1, gone at the end; also if this process is killed.

    Args:
        port: 0 takes a free one.
        adb: the program; by default what adbutils finds: ADBUTILS_ADB_PATH, ``adb`` on PATH, its own.

    Raises:
        AdbServerError: it can't be started, or the port is taken.
    """
    program = str(adb) if adb else find_adb()
    with tempfile.TemporaryDirectory(prefix="qnn-adb-") as folder:
        log = Path(folder, "adb.log")
        for attempt in range(5):
            number = port or _free_port()
            try:
                with _running(program, number, log) as server:
                    yield server
                return
            except _PortTaken as error:
                if port or attempt == 4:
                    raise AdbServerError(f"can't start an ADB server at 127.0.0.1:{number}: {error}") from error


def find_adb() -> str:
    """The adb program.

    Raises:
        AdbServerError: there is none.
    """
    from adbutils import AdbError, adb_path

    try:
        return str(adb_path())
    except AdbError as error:
        raise AdbServerError(
            f"there is no adb program ({error}): install platform-tools, or set ADBUTILS_ADB_PATH"
        ) from error


class _PortTaken(Exception):
    """The server ended at once."""


@contextmanager
def _running(program: str, port: int, log: Path) -> Iterator[AdbServer]:
    # libusb and mDNS make adb slow to start, and listen on all interfaces; all servers of a user share one log otherwise
    environment = {**os.environ, "ADB_LIBUSB": "0", "ADB_MDNS": "0", "ANDROID_ADB_LOG_PATH": str(log), "LOG": str(log)}
    for name in ("ADB_SERVER_SOCKET", "ANDROID_ADB_SERVER_PORT", "ANDROID_ADB_SERVER_ADDRESS"):
        environment.pop(name, None)
    watchdog = subprocess.Popen(
        ["/bin/sh", "-c", _WATCHDOG, "sh", program, "-P", str(port), "nodaemon", "server"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the terminal is for us; we end it
    )
    try:
        assert watchdog.stdout
        server = AdbServer("127.0.0.1", port)
        _await_server(server, int(watchdog.stdout.readline()), log)
        yield server
    finally:
        assert watchdog.stdin
        assert watchdog.stdout
        with contextlib.suppress(OSError):
            watchdog.stdin.close()
        watchdog.wait()
        watchdog.stdout.close()


def _await_server(server: AdbServer, pid: int, log: Path) -> None:
    """Until the process ``pid`` itself listens at the server's port and answers."""
    deadline = Deadline(START_SECONDS)
    while True:
        try:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                raise psutil.NoSuchProcess(pid)
            if any(
                c.laddr.port == server.port and c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp")
            ):
                server.version(timeout=max(1.0, deadline.left()))
                return
        except psutil.NoSuchProcess:
            text = log.read_text("utf-8", "replace").strip() if log.exists() else ""
            raise _PortTaken(f"it ended at once: {text[-500:] or 'it said nothing'}") from None
        if deadline.left() <= 0:
            raise DeviceTimeoutError(f"the ADB server did not start at {server.address} within {START_SECONDS:.0f} s")
        time.sleep(0.005)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
