"""Commands on a device, over ADB's ``shell,v2,raw`` service: exit code, standard output and standard error apart.

The wire format: packets of an id (1 byte), a length (4 bytes, little-endian) and data; ids are standard input 0, output 1,
error 2, exit code 3 (one byte), end of standard input 4 (AOSP, packages/modules/adb/shell_protocol.h).
"""

from __future__ import annotations

import re
import shlex
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence

from pytest_qnn.adb.connection import VECTOR, Connection
from pytest_qnn.errors import DeviceLostError

SERVICE = "shell,v2,raw:"
LONGEST_COMMAND = 60_000  # bytes; a request of the protocol has at most 65,535
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
PACKET = 1 << 16
LARGEST_PACKET = 16 << 20  # adbd's own are at most 1 MiB

_HEADER = struct.Struct("<BI")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def command_line(
    words: Sequence[str],
    *,
    prefix: str = "",
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    drain: bool = False,
) -> str:
    """A line for the device's shell that runs the program ``words``, each quoted.

    Args:
        prefix: what runs the program, ``timeout -s KILL 9`` for one; it sees neither ``cwd`` nor ``env``. Both then ignore the
            hang-up that the device sends when the connection ends, lest the prefix dies of it before it has ended the
            program.
        cwd: an absolute path; if it isn't there the exit code is 126.
        env: variables that are added.
        drain: read what the program leaves of its standard input. Else adbd, when it can't hand over all of it, drops what
            the program wrote last.

    Raises:
        ValueError: something of it can't be passed on: NUL, lone surrogates, no words, a program like ``-x``, a name that
            is no variable's, ``cwd`` not absolute, or more than 60,000 bytes in all.
    """
    if isinstance(words, str):
        raise ValueError(f"{words!r} is one text: a list of words is needed, as in ['ls', '/']")
    if not words or not words[0] or words[0].startswith("-"):
        raise ValueError(f"no program to run on the device: {list(words)!r}")
    program = " ".join(map(quote, words))
    setup = ""
    for name, value in (env or {}).items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an environment variable")
        setup += f"export {name}={quote(value)}; "
    if cwd is not None:
        setup += f"cd {quote(check_path(cwd))} || exit 126; "
    if prefix and setup:
        # the prefix runs without the variables: LD_LIBRARY_PATH is for the program and not for `timeout`
        program = f"{prefix} sh -c {quote(f'{setup}exec {program}')}"
    elif prefix:
        program = f"{prefix} {program}"
    line = f"trap '' HUP; exec {program}" if prefix else f"{setup}exec {program}"
    if drain:
        line = f"({line}); code=$?; cat >/dev/null; exit $code"
    if len(line.encode()) > LONGEST_COMMAND:
        raise ValueError(f"a command of {len(line.encode())} bytes: {LONGEST_COMMAND} are possible. Use standard input")
    return line


def quote(word: str) -> str:
    """``word`` for a POSIX shell.

    Raises:
        ValueError: NUL or a lone surrogate in it.
    """
    return shlex.quote(check_text(word))


def check_text(text: str) -> str:
    """``text``, if it can be passed to a device.

    Raises:
        ValueError: NUL or a lone surrogate in it.
    """
    if "\0" in text:
        raise ValueError(f"NUL in {text!r}: nothing on a device can be called that")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is no text: it has a lone surrogate") from None
    return text


def check_path(path: str) -> str:
    """``path``, if it is an absolute path on a device.

    Raises:
        ValueError: it isn't, or has NUL or a lone surrogate.
    """
    if not check_text(path).startswith("/"):
        raise ValueError(f"{path!r} is no absolute path on the device")
    return path


class ShellSession:
    """A program on the device, seen through an open connection of the shell service.

    Attributes:
        stdout, stderr: what came and was not taken yet.
        code: its exit code, once it told.
        ended: it told.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.stdout, self.stderr = bytearray(), bytearray()
        self.code: int | None = None
        self.ended = False
        self._raw = bytearray()

    def exchange(
        self,
        parts: Iterable[bytes | memoryview] = (),
        *,
        enough: Callable[[], bool] = lambda: False,
        close_stdin: bool = False,
    ) -> None:
        """Send ``parts`` to standard input, and meanwhile receive, until all is sent and ``enough()`` or the program ended.

        Both directions go on at once, so neither side can wait for the other for ever. What a program no longer reads
        is dropped.

        Raises:
            DeviceLostError: the connection ended before the program did.
            DeviceTimeoutError: the connection's deadline passed.
        """
        outgoing = list(_packets(parts))
        if close_stdin:
            outgoing.append(_HEADER.pack(CLOSE_STDIN, 0))
        first, cut = 0, False
        while not self.ended and (first < len(outgoing) or cut or not enough()):
            readable, writable = self.connection.wait(writing=first < len(outgoing))
            if readable:
                self._take(self.connection.receive_some())
            if writable and not self.ended:
                try:
                    sent = self.connection.send_some(outgoing[first : first + VECTOR])
                except DeviceLostError:
                    first, cut = (
                        len(outgoing),
                        True,
                    )  # what it said before it went, its exit code perhaps, is still to come
                    continue
                while sent and sent >= len(outgoing[first]):
                    sent -= len(outgoing[first])
                    first += 1
                if sent:
                    outgoing[first] = memoryview(outgoing[first])[sent:]

    def poll(self) -> None:
        """Receive what is there already."""
        while not self.ended:
            data = self.connection.receive_some()
            if data is None:
                return
            self._take(data)

    def _take(self, data: bytes | None) -> None:
        self._raw += data or b""
        position, raw = 0, self._raw
        while len(raw) - position >= _HEADER.size:
            kind, size = _HEADER.unpack_from(raw, position)
            if size > LARGEST_PACKET:
                raise DeviceLostError(
                    f"device {self.connection.serial} sent what is no shell protocol (a packet of {size} bytes)"
                )
            start = position + _HEADER.size
            if len(raw) < start + size:
                break
            position = start + size
            if kind == STDOUT:
                self.stdout += memoryview(raw)[start:position]
            elif kind == STDERR:
                self.stderr += memoryview(raw)[start:position]
            elif kind == EXIT and size:
                self.code, self.ended = raw[start], True
                break
        del raw[:position]


def _packets(parts: Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), PACKET):
            chunk = view[start : start + PACKET]
            yield _HEADER.pack(STDIN, len(chunk))
            yield chunk
