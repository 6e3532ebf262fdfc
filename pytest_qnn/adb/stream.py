"""A program that stays on the device, and is written to and read from."""

from __future__ import annotations

import contextlib
from collections import deque

from pytest_qnn.adb.deadline import Deadline
from pytest_qnn.adb.shell import ShellSession
from pytest_qnn.errors import DeviceError, DeviceLostError

LOG_LINES = 2000  # that are kept until somebody asks
LOG_LINE_BYTES = 64 << 10
TAIL_LINES = 12  # of standard error in messages
UNREAD_BYTES = 1 << 30


class AdbStream:
    """Answers for :class:`pytest_qnn.devices.transport.Stream`. One thread at a time may use it; any may close it."""

    def __init__(self, session: ShellSession, program: str) -> None:
        self._session, self._program = session, program
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._closed = False

    def write(self, *parts: bytes | memoryview, timeout: float) -> None:
        self._exchange(timeout, "took its input", parts)
        if self._session.ended:
            raise self._gone()

    def read(self, count: int, *, timeout: float) -> bytes:
        stdout = self._session.stdout
        if len(stdout) < count:
            self._exchange(timeout, "answered", (), count)
        if len(stdout) < count:
            raise self._gone()
        data = bytes(memoryview(stdout)[:count])
        del stdout[:count]
        return data

    def log(self) -> list[str]:
        if not self._closed:
            with contextlib.suppress(DeviceLostError):  # what it said before counts; the next use tells
                self._session.poll()
        self._note()
        lines = list(self._lines)
        self._lines.clear()
        return lines

    @property
    def exit_code(self) -> int | None:
        if self._session.code is None and not self._closed and not self._session.ended:
            try:
                self._session.poll()
            except DeviceLostError:
                return None
        return self._session.code

    def close(self) -> None:
        self._closed = True
        self._session.connection.close()

    def _exchange(self, timeout: float, doing: str, parts: tuple[bytes | memoryview, ...], count: int = 0) -> None:
        if self._closed:
            raise DeviceLostError(f"{self._subject} was closed. Start it again")
        session = self._session
        session.connection.deadline = Deadline(timeout)
        session.connection.doing = f"ran {self._program}, which {doing}"

        def enough() -> bool:
            if len(session.stdout) > UNREAD_BYTES:
                raise DeviceError(f"{self._subject} wrote more than {UNREAD_BYTES >> 20} MiB that nobody asked for")
            self._note()
            return len(session.stdout) >= count

        try:
            session.exchange(parts, enough=enough)
        finally:
            self._note()

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
