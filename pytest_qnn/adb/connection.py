"""One connection to an ADB server: its requests and answers, each by a deadline, and what its refusals mean.

The protocol: four hexadecimal digits of length and a request; "OKAY", or "FAIL" with four digits and a reason (AOSP,
packages/modules/adb/docs/dev/services.md). Requests and answers are adbutils'; what it does around them (it starts servers
on its own, waits without end, and takes a closed connection for a short answer) is replaced here.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from adbutils import AdbConnection, AdbError

from pytest_qnn.adb.deadline import Deadline
from pytest_qnn.errors import AdbServerError, DeviceError, DeviceLostError, DeviceRefusedError, DeviceTimeoutError

LOCAL = ("127.0.0.1", "localhost", "::1")
RECEIVE = 1 << 18
VECTOR = 64  # buffers in one system call, far below IOV_MAX


class Connection(AdbConnection):  # type: ignore[misc]  # adbutils has no types
    """A connection to the ADB server at ``host:port``, of which every step ends by ``deadline``.

    Attributes:
        serial: the device whose service this is, once :meth:`switch` has been through; the server itself until then.
        doing: what is under way, for messages: "while it <doing>".
        deadline: may be set anew for each step.

    Raises:
        AdbServerError: nothing listens there, or something else does.
        DeviceTimeoutError: the deadline passed.
        DeviceLostError: the connection was closed at the other end.
    """

    def __init__(self, host: str, port: int, deadline: Deadline, doing: str = "asked for an answer") -> None:
        self.host, self.port, self.deadline, self.doing = host, port, deadline, doing
        self.serial: str | None = None
        left = deadline.left()
        if left <= 0:
            raise DeviceTimeoutError(
                f"no time was left of {deadline.seconds:.3g} s when the ADB server at {self.address} was {doing}"
            )
        try:
            self.socket = socket.create_connection((host, port), timeout=left)
        except TimeoutError as error:
            raise self._mute() from error
        except OSError as error:
            raise no_server(host, port, error) from error
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # adbutils sends and receives through these

    @property
    def conn(self) -> Self:
        return self

    @property
    def closed(self) -> bool:
        return self.socket.fileno() < 0

    def close(self) -> None:
        self.shut()
        self.socket.close()

    def shut(self) -> None:
        """End it, without freeing it: wakes a thread that waits on it, which closing doesn't."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def send(self, data: bytes) -> int:
        self._arm()
        try:
            self.socket.sendall(data)
        except TimeoutError as error:
            raise self._mute() from error
        except OSError as error:
            raise self.lost(error) from error
        return len(data)

    def read(self, count: int) -> bytes:
        data = bytearray(count)
        self.read_into(memoryview(data))
        return bytes(data)

    read_exact = read

    # ours

    def read_into(self, view: memoryview) -> None:
        """Fill ``view``."""
        filled = 0
        while filled < len(view):
            self._arm()
            try:
                count = self.socket.recv_into(view[filled:])
            except TimeoutError as error:
                raise self._mute() from error
            except OSError as error:
                raise self.lost(error) from error
            if not count:
                raise self.lost()
            filled += count

    def wait(self, *, writing: bool) -> tuple[bool, bool]:
        """Wait until there is something to read, or, if ``writing``, room to write: (readable, writable)."""
        poll = select.poll()
        try:
            poll.register(self.socket, select.POLLIN | (select.POLLOUT if writing else 0))
        except ValueError as error:  # closed, by another thread
            raise self.lost() from error
        left = self.deadline.left()
        events = poll.poll(max(0, int(left * 1000) + 1)) if left > 0 else poll.poll(0)
        if not events:
            raise self._mute()
        found = events[0][1]
        broken = bool(found & (select.POLLHUP | select.POLLERR | select.POLLNVAL))
        return bool(found & select.POLLIN) or broken, bool(found & select.POLLOUT) and not broken

    def receive_some(self) -> bytes | None:
        """What is there now, at most 256 KiB; None if nothing is.

        Raises:
            DeviceLostError: the connection ended.
        """
        try:
            self.socket.setblocking(False)
            data = self.socket.recv(RECEIVE)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self.lost(error) from error
        if not data:
            raise self.lost()
        return data

    def send_some(self, parts: Sequence[bytes | memoryview]) -> int:
        """Send as much of ``parts`` as there is room for; how many bytes that was."""
        try:
            self.socket.setblocking(False)
            return self.socket.sendmsg(parts[:VECTOR])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self.lost(error) from error

    def request(self, service: str) -> None:
        """Ask for ``service`` and wait for its OKAY.

        Raises:
            DeviceError: of the class that fits the reason that the server gave.
        """
        try:
            self.send_command(service)
            self.check_okay()
        except AdbError as error:
            text = str(error)
            if text.startswith("Unknown data"):
                raise self._no_adb(text) from error
            raise refusal(text, self.serial, self.host, self.port, self.doing) from error
        except ValueError as error:
            raise self._no_adb(str(error)) from error

    def text(self) -> str:
        """One block of text, with its length in front."""
        try:
            return str(self.read_string_block())
        except ValueError as error:
            raise self._no_adb(str(error)) from error

    def switch(self, serial: str) -> None:
        """From here on this connection speaks to the device ``serial``."""
        try:
            self.request(f"host:tport:serial:{serial}")
        except DeviceError as error:
            if "unknown host service" in str(error):
                raise AdbServerError(
                    f"the ADB server at {self.address} is too old (it has no host:tport): update platform-tools"
                ) from error
            raise
        self.read(8)  # the transport's number
        self.serial = serial

    @property
    def address(self) -> str:
        return host_port(self.host, self.port)

    def lost(self, error: OSError | None = None) -> DeviceLostError:
        """The error for a connection that ended, in words."""
        reason = f" ({error.strerror or error})" if error else ""
        if self.serial is None:
            return DeviceLostError(
                f"the ADB server at {self.address} closed the connection{reason} when {self.doing}: it was "
                f"stopped or crashed. See that it runs: {adb_command(self.host, self.port)} devices"
            )
        return DeviceLostError(
            f"lost device {self.serial}{reason} while it {self.doing}: it was unplugged, went down, or its ADB server at "
            f"{self.address} was stopped. See what is there: {adb_command(self.host, self.port)} devices"
        )

    def _mute(self) -> DeviceTimeoutError:
        if self.serial is None:
            return DeviceTimeoutError(
                f"the ADB server at {self.address} did not answer within {self.deadline.seconds:.3g} s when "
                f"{self.doing}. Restart it: adb -P {self.port} kill-server; adb -P {self.port} start-server"
            )
        return DeviceTimeoutError(
            f"device {self.serial} was not done within {self.deadline.seconds:.3g} s while it {self.doing}. Is it busy, hung, "
            "or the time too short?"
        )

    def _no_adb(self, text: str) -> AdbServerError:
        return AdbServerError(
            f"what listens at {self.address} is no ADB server ({text!r}). Name another: --qnn-adb-server"
        )

    def _arm(self) -> None:
        left = self.deadline.left()
        if left <= 0:
            raise self._mute()
        self.socket.settimeout(left)


def host_port(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def no_server(host: str, port: int, error: OSError) -> AdbServerError:
    """The error for a server that isn't there."""
    how = f"adb -P {port} start-server" if host in LOCAL else f"adb -a -P {port} nodaemon server (on {host})"
    return AdbServerError(
        f"no ADB server at {host_port(host, port)} ({error.strerror or error}). Start one: {how}; or name another: "
        "the setting adb_server (HOST:PORT)"
    )


def adb_command(host: str, port: int) -> str:
    """How the ``adb`` program is called for that server."""
    where = "" if host in LOCAL else f" -H {host}"
    return f"adb{where}" + ("" if port == 5037 else f" -P {port}")


def refusal(text: str, serial: str | None, host: str, port: int, doing: str) -> DeviceError:
    """What the reason means that an ADB server gave for a refusal."""
    low, reason, server = text.lower(), " ".join(text.split()), host_port(host, port)
    if serial:
        what = f"device {serial}: {reason} (ADB server {server}), when it {doing}"
    else:
        what = f"{reason} (ADB server {server} {doing})"
    if "unauthorized" in low or "authorizing" in low:
        return DeviceRefusedError(f"{what}. Unlock the device's screen and allow USB debugging for this host")
    if "permission" in low:
        return DeviceRefusedError(
            f"{what}. This host needs udev rules for the device, and the user the group plugdev; then: adb kill-server"
        )
    if "more than one" in low:
        return DeviceError(f"{what}. Two devices have this serial: unplug one")
    if "unknown host service" in low:
        return DeviceError(f"{what}. Update platform-tools")
    return DeviceLostError(f"{what}. See what is there: {adb_command(host, port)} devices")
