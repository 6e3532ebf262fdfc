"""One process's exclusive right to a device, among the processes of this user on this host.

A lock file in the user's state folder (``pytest-qnn/leases``); the kernel frees it when its holder ends, whatever of. Beside
it stands a note of who holds it, for messages; a note without a living process behind it means nothing. Other hosts that use
the same ADB server are not kept out by it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from filelock import FileLock, Timeout

from pytest_qnn.errors import DeviceBusyError, DeviceError

_POLL_SECONDS = 0.1
_HERE = ("127.0.0.1", "localhost", "[::1]", "::1")
NETWORK_SERIAL = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9_.-]+):\d{1,5}")  # the serial of a device on the network


@dataclass(frozen=True)
class Holder:
    """Who holds a device.

    Attributes:
        pid, host: the process.
        since: in seconds since 1970.
        what: "pytest", "cli", ...
    """

    pid: int
    host: str
    since: float
    what: str

    def describe(self) -> str:
        """``pytest (process 4711 on build7) since 14:05:09, 35 s ago``."""
        ago = max(0, round(time.time() - self.since))
        clock = time.strftime("%H:%M:%S", time.localtime(self.since))
        return f"{self.what} (process {self.pid} on {self.host}) since {clock}, {ago} s ago"


def lease_folder() -> Path:
    """Where leases lie."""
    from platformdirs import user_state_path

    return user_state_path("pytest-qnn") / "leases"


class DeviceLease:
    """The right to one device; not held yet.

    Args:
        serial: of the device.
        server: its ADB server, or its address.
        what: who asks, for messages to others.
    """

    def __init__(self, serial: str, server: str, what: str = "pytest") -> None:
        self.serial, self.what = serial, what
        key = hashlib.sha256(f"{serial}\n{_where(serial, server)}".encode()).hexdigest()[:32]
        self._note = lease_folder() / f"{key}.json"
        self._lock = FileLock(lease_folder() / f"{key}.lock", thread_local=False)

    @property
    def held(self) -> bool:
        """Whether this object holds it."""
        return self._lock.is_locked

    def acquire(self, timeout: float) -> None:
        """Take it, waiting up to ``timeout`` seconds; nothing to do if this object holds it.

        Raises:
            DeviceBusyError: somebody else holds it. The message says who and since when.
            DeviceError: the lock can't be made.
        """
        if self._lock.is_locked:
            return
        try:
            lease_folder().mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=max(0.0, timeout), poll_interval=_POLL_SECONDS)
        except Timeout:
            holder = self.holder()
            who = f"is used by {holder.describe()}" if holder else "is used by another process of this user"
            waited = f" and was not free within {timeout:g} s" if timeout > 0 else ""
            raise DeviceBusyError(
                f"device {self.serial} {who}{waited}: wait for that to end, use another device, or raise device_wait"
            ) from None
        except OSError as error:
            raise DeviceError(
                f"device {self.serial} can't be leased: {lease_folder()}: {error.strerror or error}: make that folder writable, "
                "or set XDG_STATE_HOME"
            ) from error
        self._write_note()

    def release(self) -> None:
        """Give it back; harmless if this object doesn't hold it."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._note.unlink(missing_ok=True)
            self._lock.release()

    def holder(self) -> Holder | None:
        """Who holds it, as far as a note with a living process behind it tells."""
        try:
            text = self._note.read_bytes()[:4096]
            told = json.loads(text)
            note = Holder(int(told["pid"]), str(told["host"])[:100], float(told["since"]), str(told["what"])[:100])
            alive = same_process(note.pid, float(told["started"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
            return None
        return note if alive else None

    def _write_note(self) -> None:
        note: dict[str, Any] = {
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "host": socket.gethostname(),
            "since": time.time(),
            "what": self.what,
        }
        draft = self._note.with_suffix(f".{os.getpid()}.part")
        with suppress(OSError):  # a note is a courtesy; the lock is what counts
            draft.write_text(json.dumps(note), encoding="utf-8")
            os.replace(draft, self._note)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _where(serial: str, server: str) -> str:
    """What, with its serial, tells a device from all others: its server by one name of several; nothing if it is on the network
    and the server here, for each server of this host reaches it."""
    host, _, port = server.rpartition("@")[2].rpartition(":")
    if host.lower() not in _HERE:
        return f"{host}:{port}"
    return "" if NETWORK_SERIAL.fullmatch(serial) else f"127.0.0.1:{port}"


def process_start(pid: int) -> float:
    """When a process started, in seconds since this host did: the clock may be set meanwhile; -1 if it isn't there."""
    try:
        booted = psutil.boot_time()  # first: it is what create_time then adds
        return float(psutil.Process(pid).create_time()) - booted
    except psutil.Error:
        return -1.0


def same_process(pid: int, started: float) -> bool:
    """Whether the process ``pid`` of this host is there and is the one that :func:`process_start` gave ``started`` for."""
    if pid <= 0:
        return False
    try:
        alive = psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # somebody's, and it can't be told whose
    return alive and abs(process_start(pid) - started) < 3.0
