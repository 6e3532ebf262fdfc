"""A program that stays on the device, and is written to and read from."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from pytest_qnn.adb.deadline import Deadline
from pytest_qnn.adb.shell import ShellSession
from pytest_qnn.errors import DeviceError, DeviceLostError

LOG_LINES = 2000  # that are kept until somebody asks
LOG_LINE_BYTES = 64 << 10
TAIL_LINES = 12  # of standard error in messages
UNREAD_BYTES = 1 << 30


class AdbStream:
    """Answers for :class:`pytest_qnn.devices.transport.Stream`. One thread at a time may use it; any may close it.

    Args:
        kill: ends the program where the end of the connection may not do that: adbd doesn't notice it while the program leaves
            it with input that it can't hand over.
    """

    def __init__(self, session: ShellSession, program: str, kill: Callable[[], None]) -> None:
        self._session, self._program, self._kill = session, program, kill
        self._stuck = False
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._closed = False
        self._using = threading.Lock()

    def write(self, *parts: bytes | memoryview, timeout: float) -> None:
        self._exchange(timeout, "it was given input", parts)
        if self._session.ended:
            raise self._gone()

    def read(self, count: int, *, timeout: float) -> bytes:
        stdout = self._session.stdout
        if len(stdout) < count:
            self._exchange(timeout, "its answer was awaited", (), count)
        if len(stdout) < count:
            raise self._gone()
        data = bytes(memoryview(stdout)[:count])
        del stdout[:count]
        return data

    def log(self) -> list[str]:
        self._poll()
        self._note()
        lines = list(self._lines)
        self._lines.clear()
        return lines

    @property
    def exit_code(self) -> int | None:
        self._poll()
        return self._session.code

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._session.connection.shut()  # who waits for it is woken, and frees it: its number may be another's in no time
        if self._using.acquire(blocking=False):
            self._session.connection.close()
            self._using.release()
        if self._stuck:
            self._kill()

    def _exchange(self, timeout: float, doing: str, parts: tuple[bytes | memoryview, ...], count: int = 0) -> None:
        if self._closed:
            raise DeviceLostError(f"{self._subject} was closed. Start it again")
        session = self._session
        session.connection.deadline = Deadline(timeout)
        session.connection.doing = f"ran {self._program} ({doing})"

        def enough() -> bool:
            if len(session.stdout) > UNREAD_BYTES:
                raise DeviceError(f"{self._subject} wrote more than {UNREAD_BYTES >> 20} MiB that nobody asked for")
            self._note()
            return len(session.stdout) >= count

        with self._using:
            self._stuck = True
            try:
                session.exchange(parts, enough=enough)
                self._stuck = False
            finally:
                self._note()
                if self._closed:
                    session.connection.close()

    def _poll(self) -> None:
        """Receive what is there already. That the connection was lost is for the next use to tell."""
        if self._using.acquire(blocking=False):
            try:
                if not self._closed:
                    self._session.poll()
            except DeviceLostError:
                pass
            finally:
                self._using.release()

    def _note(self) -> None:
        """Move whole lines from standard error to the log."""
        stderr = self._session.stderr
        if not stderr or (b"\n" not in stderr and len(stderr) < LOG_LINE_BYTES and not self._session.ended):
            return
        text, newline, rest = bytes(stderr).rpartition(b"\n")
        if self._session.ended or not newline:
            text, rest = bytes(stderr), b""
        for line in text.decode("utf-8", "backslashreplace").splitlines():
            self._lines.append(line[:LOG_LINE_BYTES])
            self._tail.append(line[:1000])
        stderr[:] = rest

    @property
    def _subject(self) -> str:
        return f"{self._program} on device {self._session.connection.serial}"

    def _gone(self) -> DeviceLostError:
        code = self._session.code
        said = "\n  ".join(self._tail)
        return DeviceLostError(
            f"{self._subject} ended with exit code {code}" + (f"; it said:\n  {said}" if said else " and said nothing")
        )
