"""What can be asked of a device, whatever it is reached by. :mod:`pytest_qnn.adb` answers over ADB; a recording, out of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")

COMMAND_SECONDS = 30.0
OUTPUT_BYTES = 64 << 20


@dataclass(frozen=True)
class Completed:
    """A command that came to its end on the device.

    Attributes:
        code: exit code; 128 + N if signal N ended it.
        stdout, stderr: what it wrote, apart.
    """

    code: int
    stdout: bytes = b""
    stderr: bytes = b""

    @property
    def text(self) -> str:
        """Standard output as text, without white space around it; bytes that aren't UTF-8 are escaped."""
        return self.stdout.decode("utf-8", "backslashreplace").strip()

    @property
    def error(self) -> str:
        """Standard error as text, like :attr:`text`."""
        return self.stderr.decode("utf-8", "backslashreplace").strip()


@dataclass(frozen=True)
class FileStat:
    """A file on the device: "file", "folder" or "other" (links are followed), bytes, seconds since 1970."""

    kind: str
    size: int
    mtime: int


class Stream(Protocol):
    """A program that runs on the device, with its standard streams. It is killed when the stream is closed or lost."""

    def write(self, *parts: bytes | memoryview, timeout: float) -> None:
        """Write to its standard input, all of it. What the program writes meanwhile is kept for :meth:`read`: neither side
        may block because both write at once.

        Raises:
            DeviceLostError: the program or the device is gone.
            DeviceTimeoutError: it didn't take it in time.
        """
        ...

    def read(self, count: int, *, timeout: float) -> bytes:
        """Exactly ``count`` bytes of its standard output.

        Raises:
            DeviceLostError: it ended before that (the message has its exit code and the end of its standard error), or the
                device is gone.
            DeviceTimeoutError: they didn't come in time.
        """
        ...

    def log(self) -> list[str]:
        """Lines of its standard error since this was last asked."""
        ...

    @property
    def exit_code(self) -> int | None:
        """None while it runs, as far as is known."""
        ...

    def close(self) -> None:
        """End it; harmless if it has ended."""
        ...


class Transport(Protocol):
    """A line to one device.

    Every operation ends by its deadline, ``timeout`` seconds from its start, also if the device or the server is mute.
    Words never reach a shell unquoted, and may be any text without NUL; paths on the device are absolute.

    All raise:
        DeviceLostError: the device or the way to it is gone.
        DeviceTimeoutError: the deadline passed. What was started on the device is killed there too.

    Attributes:
        serial: as ``adb devices`` shows it.
        address: where: ``adb://SERIAL@HOST:PORT``.
    """

    serial: str
    address: str

    def shell(
        self,
        words: Sequence[str],
        *,
        timeout: float = COMMAND_SECONDS,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        limit: int = OUTPUT_BYTES,
    ) -> Completed:
        """Run a program and wait for its end; any exit code is an answer and not an error. What only a shell knows (``cd``, pipes,
        variables) needs one: ``["sh", "-c", script, "sh", word, ...]``.

        Raises:
            ValueError: NUL in a word, or a command beyond what ADB takes (60,000 bytes): long lists go through ``stdin``.
            DeviceFileError: more than ``limit`` bytes of output.
        """
        ...

    def push(self, files: Mapping[str, Path | bytes], *, mode: int = 0o644, timeout: float) -> dict[str, str]:
        """Send files: path on the device -> a local file, or content. Folders are made.

        A file is seen under its name only when all of it is there and its digest, computed on the device, is right. With an
        error some of the files may be there, each whole.

        Returns:
            SHA-256 by path on the device.

        Raises:
            DeviceSpaceError: no space left on the device.
            DeviceFileError: the device refused a file (permission, a folder of that name, ...), or its digest differs.
            OSError: a local file can't be read.
        """
        ...

    def pull(
        self, files: Mapping[str, Path], *, timeout: float, sizes: Mapping[str, int] | None = None
    ) -> dict[str, str]:
        """Fetch files: path on the device -> local file. Each is checked against its digest on the device, and appears whole
        or not at all.

        Args:
            sizes: bytes that a file must have, by path on the device; one of another size is refused before it is fetched.

        Returns:
            SHA-256 by path on the device.

        Raises:
            DeviceFileError: missing, no regular file, unreadable, of another size, or changed meanwhile.
            OSError: a local file can't be written.
        """
        ...

    def read(self, path: str, *, limit: int = 1 << 20, timeout: float = COMMAND_SECONDS) -> bytes:
        """Content of a small file, also of one in /proc or /sys, where sizes say nothing.

        Raises:
            DeviceFileError: it can't be read, or has more than ``limit`` bytes.
        """
        ...

    def stat(self, path: str, *, timeout: float = COMMAND_SECONDS) -> FileStat | None:
        """What is there; None if nothing is."""
        ...

    def start(
        self, words: Sequence[str], *, timeout: float, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Stream:
        """Start a program and talk to it. ``timeout`` is for the start."""
        ...

    def reconnect(self, timeout: float) -> None:
        """Get back to a device that was lost, rebooted or is mute: returns once it answers a command.

        Raises:
            DeviceLostError: it didn't within ``timeout`` seconds.
        """
        ...

    def fresh_name(self) -> str:
        """A name that nobody has used, of 16 characters from 0-9a-f."""
        ...

    def clock(self) -> float:
        """Seconds from an arbitrary start; what is decided by time asks here, so that a recording can repeat it."""
        ...

    def wait(self, seconds: float) -> None:
        """Let time pass (a replay doesn't)."""
        ...

    def close(self) -> None:
        """Let go of the device."""
        ...


class OfThisHost(bytes):
    """Standard input for a command that says something about this host or process and decides no answer: an owner's note.

    A recording neither stores nor compares it.
    """


def part(transport: Transport, name: str, *, shared: bool = True) -> AbstractContextManager[None]:
    """What is asked in the block belongs together, and may come at another time, or not at all, when it is replayed.

    A recording keeps it apart from what is around it, so that a test can be replayed alone. Other transports don't care.

    Args:
        name: says what is done, and to what; the same in every run: no path of this host, no fresh name.
        shared: True: done once for several tests, by whichever needs it first: probing, sending a file, loading a model.
            False: done by this test, but only if another one came before: looking whether a program still runs.
    """
    enter = getattr(transport, "part", None)
    block: AbstractContextManager[None] = nullcontext() if enter is None else enter(name, shared)
    return block


def decided(transport: Transport, what: str, decide: Callable[[], T]) -> T:
    """What this host decides by something that the device doesn't know, such as which of its processes live.

    A recording keeps it; a replay, perhaps on another host, decides the same. Other transports don't care.

    Args:
        what: says what is decided; the same in every run.
        decide: gives JSON data (lists, not tuples).
    """
    remember = getattr(transport, "decided", None)
    value: T = decide() if remember is None else remember(what, decide)
    return value
