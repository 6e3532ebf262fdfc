"""A stand-in for a device that lives in memory, for tests of what is between a test and its device."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_qnn.devices.transport import COMMAND_SECONDS, OUTPUT_BYTES, Completed, FileStat
from pytest_qnn.errors import DeviceFileError, DeviceLostError, DeviceSpaceError, DeviceTimeoutError


class MemoryDevice:
    """Files by path; commands ``cat FILE``, ``put FILE`` (from standard input), ``env``, ``count``, ``lose`` and ``hang``.

    Two of them never answer alike where time or chance is asked for.
    """

    _instances = itertools.count()

    def __init__(self, serial: str = "memory", room: int = 1 << 30) -> None:
        self.serial, self.address = serial, f"adb://{serial}@labhost.example:5037"
        self.files: dict[str, bytes] = {}
        self.room, self.asked = room, 0
        self._names = itertools.count(next(self._instances) << 32)
        self.now = float(next(self._instances))

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
        self.asked += 1
        if any("\0" in word for word in words):
            raise ValueError("NUL in a word")
        name, rest = words[0], list(words[1:])
        if name == "lose":
            error = DeviceLostError(f"{self.address}: it is gone")
            error.log = "kernel: unplugged"
            raise error
        if name == "hang":
            raise DeviceTimeoutError(f"{self.address}: no answer within {timeout} s")
        if name == "put":
            self.files[rest[0]] = stdin
        if name == "cat":
            if rest[0] not in self.files:
                return Completed(1, b"", b"No such file\n")
            return Completed(0, self.files[rest[0]])
        if name == "count":
            return Completed(0, str(self.asked).encode())
        return Completed(len(rest) % 4, "\n".join(rest).encode("utf-8", "surrogatepass"), repr((cwd, env)).encode())

    def push(self, files: Mapping[str, Path | bytes], *, mode: int = 0o644, timeout: float) -> dict[str, str]:
        digests = {}
        for name, file in files.items():
            data = file if isinstance(file, bytes) else file.read_bytes()
            if len(data) > self.room:
                raise DeviceSpaceError(f"{self.address}: no space left for {file if isinstance(file, Path) else name}")
            self.files[name] = data
            digests[name] = hashlib.sha256(data).hexdigest()
        return digests

    def pull(
        self, files: Mapping[str, Path], *, timeout: float, sizes: Mapping[str, int] | None = None
    ) -> dict[str, str]:
        for name, file in files.items():
            if name not in self.files or len(self.files[name]) != (sizes or {}).get(name, len(self.files[name])):
                raise DeviceFileError(f"{name} is missing or of another size, not written to {file}")
            file.write_bytes(self.files[name])
        return {name: hashlib.sha256(self.files[name]).hexdigest() for name in files}

    def read(self, path: str, *, limit: int = 1 << 20, timeout: float = COMMAND_SECONDS) -> bytes:
        if path not in self.files or len(self.files[path]) > limit:
            raise DeviceFileError(f"{path}: can't be read")
        return self.files[path]

    def stat(self, path: str, *, timeout: float = COMMAND_SECONDS) -> FileStat | None:
        return FileStat("file", len(self.files[path]), int(self.clock())) if path in self.files else None

    def start(
        self, words: Sequence[str], *, timeout: float, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Echo:
        return Echo()

    def reconnect(self, timeout: float) -> None:
        if timeout < 1:
            raise DeviceLostError(f"{self.serial} did not come back")

    def fresh_name(self) -> str:
        return f"{next(self._names):016x}"

    def clock(self) -> float:
        self.now += 0.25 + self.now / 3
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def close(self) -> None:
        pass


class Echo:
    """A program that gives back what it takes, and ends when a byte is asked for that it hasn't got."""

    def __init__(self) -> None:
        self.buffer, self.lines, self.exit_code = b"", ["started"], None

    def write(self, *parts: bytes | memoryview, timeout: float) -> None:
        self.buffer += b"".join(parts)
        self.lines.append(f"got {len(self.buffer)}")

    def read(self, count: int, *, timeout: float) -> bytes:
        if count > len(self.buffer):
            self.exit_code = 3
            raise DeviceLostError("the program ended with exit code 3")
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def log(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    def close(self) -> None:
        pass
