"""Files to and from a device, over ADB's ``sync`` service; many over one connection.

The wire format: packets of four letters and a length (4 bytes, little-endian): SEND with "path,mode", then DATA of at most
64 KiB each, DONE with a time, answered by OKAY or by FAIL with a reason; RECV with a path, answered by DATA ... DONE; STA2
with a path, answered by a structure (AOSP, packages/modules/adb/SYNC.TXT and file_sync_protocol.h). SEND and RECV have no
sizes, so files over 4 GiB are no special case; STA2, unlike STAT, has 64 bits for them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pytest_qnn.adb.connection import Connection
from pytest_qnn.devices.transport import FileStat
from pytest_qnn.errors import DeviceError, DeviceFileError, DeviceLostError, DeviceSpaceError

DATA = 1 << 16  # adbd takes no more in one packet
BLOCK = 16 * DATA  # read from a file at once
LARGEST_PACKET = 16 << 20
LONGEST_PATH = 1024  # bytes; adbd refuses longer ones
AHEAD = 32  # requests that are sent before their answers are read

_HEADER = struct.Struct("<4sI")
_STAT2 = struct.Struct("<IQQIIIIQqqq")  # error, dev, ino, mode, nlink, uid, gid, size, atime, mtime, ctime


@dataclass(frozen=True)
class Upload:
    """A file on its way to the device: where it goes, what it is called in messages, and a local file or content."""

    path: str
    name: str
    source: Path | bytes


@dataclass(frozen=True)
class Download:
    """A file on its way from the device: where from, where to, and how many bytes it had when it was looked at."""

    path: str
    part: Path
    size: int


def send(connection: Connection, files: Sequence[Upload], mode: int) -> list[str]:
    """Send files; their SHA-256. The connection is of the sync service.

    Raises:
        DeviceSpaceError, DeviceFileError: the device refused one; the first that it refused is named.
        DeviceLostError, DeviceTimeoutError: as ever.
        OSError: a local file can't be read.
    """
    sender = _Sender(connection, files)
    digests = []
    for file in files:
        digest = hashlib.sha256()
        spec = f"{file.path},{stat.S_IFREG | mode}".encode()
        sender.put([_HEADER.pack(b"SEND", len(spec)), spec])
        if isinstance(file.source, Path):
            with open_regular(file.source) as source:
                buffer = memoryview(bytearray(BLOCK))
                while count := source.readinto(buffer):  # type: ignore[attr-defined]  # it is a FileIO
                    sender.put_data(buffer[:count])
                    digest.update(buffer[:count])
        else:
            view = memoryview(file.source).cast("B")
            digest.update(view)
            for start in range(0, len(view), BLOCK):
                sender.put_data(view[start : start + BLOCK])
        sender.put([_HEADER.pack(b"DONE", int(time.time()) & 0xFFFFFFFF)])
        digests.append(digest.hexdigest())
    sender.finish()
    return digests


class _Sender:
    """Writes packets and minds the answers meanwhile: a device that refuses says so at once, and may then stop reading."""

    def __init__(self, connection: Connection, files: Sequence[Upload]) -> None:
        self._connection, self._files = connection, files
        self._answers = bytearray()
        self._accepted = 0

    def put_data(self, view: memoryview) -> None:
        parts: list[bytes | memoryview] = []
        for start in range(0, len(view), DATA):
            chunk = view[start : start + DATA]
            parts += (_HEADER.pack(b"DATA", len(chunk)), chunk)
        self.put(parts)

    def put(self, parts: list[bytes | memoryview]) -> None:
        first = 0
        while first < len(parts):
            readable, writable = self._connection.wait(writing=True)
            if readable:
                self._answer()
            elif writable:
                try:
                    sent = self._connection.send_some(parts[first:])
                except DeviceLostError:
                    self.finish()  # it may have said why
                    raise
                while sent and sent >= len(parts[first]):
                    sent -= len(parts[first])
                    first += 1
                if sent:
                    parts[first] = memoryview(parts[first])[sent:]

    def finish(self) -> None:
        """Wait for all answers that are due."""
        while self._accepted < len(self._files):
            self._connection.wait(writing=False)
            self._answer()

    def _answer(self) -> None:
        answers = self._answers
        answers += self._connection.receive_some() or b""
        while len(answers) >= _HEADER.size:
            kind, size = _HEADER.unpack_from(answers)
            if kind == b"OKAY":
                self._accepted += 1
                del answers[: _HEADER.size]
                continue
            if kind != b"FAIL" or size > LARGEST_PACKET:
                raise _garbage(self._connection, kind)
            if len(answers) < _HEADER.size + size:
                self._connection.wait(writing=False)
                answers += self._connection.receive_some() or b""
                continue
            reason = answers[_HEADER.size : _HEADER.size + size].decode("utf-8", "backslashreplace")
            name = self._files[min(self._accepted, len(self._files) - 1)].name
            raise file_error(self._connection.serial, name, reason)


def receive(connection: Connection, files: Sequence[Download]) -> list[str]:
    """Fetch files into their parts, which must not exist; their SHA-256. The connection is of the sync service.

    Raises:
        DeviceFileError: the device refused one, or one has more bytes than it had.
        DeviceLostError, DeviceTimeoutError: as ever.
        OSError: a local file can't be written.
    """
    digests = []
    for number, file in enumerate(files):
        asked = files[:AHEAD] if number == 0 else files[number + AHEAD - 1 : number + AHEAD]
        connection.send(b"".join(_request(b"RECV", f.path) for f in asked))
        with open(file.part, "xb", buffering=0) as part:
            digests.append(_receive_one(connection, file, part))
    return digests


def _receive_one(connection: Connection, file: Download, part: BinaryIO) -> str:
    digest, received = hashlib.sha256(), 0
    buffer = memoryview(bytearray(DATA))
    while True:
        kind, size = _HEADER.unpack(connection.read(_HEADER.size))
        if kind == b"DONE":
            return digest.hexdigest()
        if size > LARGEST_PACKET or kind not in (b"DATA", b"FAIL"):
            raise _garbage(connection, kind)
        if size > len(buffer):
            buffer = memoryview(bytearray(size))
        view = buffer[:size]
        connection.read_into(view)
        if kind == b"FAIL":
            raise file_error(connection.serial, file.path, bytes(view).decode("utf-8", "backslashreplace"))
        received += size
        if received > file.size:
            raise DeviceFileError(
                f"{file.path} on device {connection.serial} has more than the {file.size} bytes that it had a moment ago: "
                "something writes to it (or it is one of the system's, without a size)"
            )
        digest.update(view)
        while view:  # a raw file may take less than all
            view = view[part.write(view) :]


def stats(connection: Connection, paths: Sequence[str]) -> list[FileStat | None]:
    """What is at ``paths``, links followed; None where nothing is. The connection is of the sync service, of a device with
    the feature ``stat_v2``.

    Raises:
        DeviceFileError: the device may not look.
        DeviceLostError, DeviceTimeoutError: as ever.
    """
    found: list[FileStat | None] = []
    for number, path in enumerate(paths):
        asked = paths[:AHEAD] if number == 0 else paths[number + AHEAD - 1 : number + AHEAD]
        connection.send(b"".join(_request(b"STA2", p) for p in asked))
        kind = connection.read(4)
        if kind == b"FAIL":
            size = min(int.from_bytes(connection.read(4), "little"), LARGEST_PACKET)
            raise file_error(connection.serial, path, connection.read(size).decode("utf-8", "backslashreplace"))
        if kind != b"STA2":
            raise _garbage(connection, kind)
        error, _, _, mode, _, _, _, size, _, mtime, _ = _STAT2.unpack(connection.read(_STAT2.size))
        if error in (errno.ENOENT, errno.ENOTDIR):
            found.append(None)
        elif error:
            raise file_error(connection.serial, path, os.strerror(error))
        else:
            found.append(FileStat(kind_of(mode), size, mtime))
    return found


def kind_of(mode: int) -> str:
    """ "file", "folder" or "other", by a mode as stat has it."""
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def file_error(serial: str | None, name: str, reason: str) -> DeviceError:
    """The error for a file that a device refused for ``reason``, in its own words."""
    reason = " ".join(reason.split())
    if says_no_space(reason):
        return DeviceSpaceError(
            f"no space left on device {serial} for {name} ({reason}). Make room: pytest-qnn device {serial} clean"
        )
    return DeviceFileError(f"device {serial} refused {name}: {reason or 'it gave no reason'}")


def says_no_space(text: str) -> bool:
    """Whether a device's message says that it is full."""
    low = text.lower()
    return "no space left" in low or "quota exceeded" in low or "enospc" in low


def open_regular(path: Path) -> BinaryIO:
    """A local file, unbuffered, to read; only a regular one, since others may block or never end.

    Raises:
        OSError: it can't be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def _request(kind: bytes, path: str) -> bytes:
    name = path.encode()
    return _HEADER.pack(kind, len(name)) + name


def _garbage(connection: Connection, kind: bytes) -> DeviceLostError:
    return DeviceLostError(f"device {connection.serial} sent what is no sync protocol ({kind!r}): reconnect it")
