"""The sync service: files to and from a device (AOSP, ``packages/modules/adb/SYNC.TXT`` and ``file_sync_protocol.h``)."""

from __future__ import annotations

import asyncio
import os
import stat
import struct
from typing import TYPE_CHECKING

from pytest_qnn.testing.loopback.faults import Request
from pytest_qnn.testing.loopback.protocol import Stream, StreamClosed

if TYPE_CHECKING:
    from pytest_qnn.testing.loopback.daemon import Daemon

BLOCK = 64 << 10  # of DATA; the protocol allows no more
_BATCH = 16  # blocks in one ADB message
_STAT1 = struct.Struct("<III")
_STAT2 = struct.Struct("<IQQIIIIQqqq")
_PATH_LIMIT = 1024


class SyncService:
    """Serves one stream."""

    def __init__(self, daemon: Daemon, stream: Stream) -> None:
        self._daemon, self._stream = daemon, stream

    async def run(self) -> None:
        """Answer requests until the other side is done, or one failed."""
        while True:
            word, size = await self._header()
            if word == b"QUIT":
                return
            if size > _PATH_LIMIT:
                await self._fail("path too long")
                return
            path = await self._stream.read_exactly(size)
            if word in (b"STAT", b"STA2", b"LST2"):
                self._daemon.note(word, path)
                await self._stat(word, self._daemon.paths.local(path))
            elif word in (b"LIST", b"LIS2"):
                self._daemon.note(word, path)
                await self._list(word, self._daemon.paths.local(path))
            elif word == b"SEND":
                if not await self._receive_file(path):
                    return
            elif word == b"RECV":
                if not await self._send_file(path):
                    return
            else:
                await self._fail(f"unknown command {word.decode('ascii', 'backslashreplace')}")
                return

    async def _header(self) -> tuple[bytes, int]:
        header = await self._stream.read_exactly(8)
        return header[:4], int.from_bytes(header[4:], "little")

    async def _fail(self, message: str) -> None:
        text = message.encode()
        await self._stream.write(b"FAIL" + len(text).to_bytes(4, "little") + text)

    # --- what is there ------------------------------------------------------------------------------------------------

    async def _stat(self, word: bytes, path: bytes) -> None:
        try:
            status: os.stat_result | None = os.stat(path) if word == b"STA2" else os.lstat(path)
            error = 0
        except (OSError, ValueError) as caught:
            status, error = None, getattr(caught, "errno", None) or 22
        await self._stream.write(word + (_stat1(status) if word == b"STAT" else _stat2(status, error)))

    async def _list(self, word: bytes, path: bytes) -> None:
        entries = bytearray()
        try:
            names = [b".", b"..", *sorted(os.listdir(path))]
        except (OSError, ValueError):
            names = []
        for name in names:
            try:
                status = os.lstat(os.path.join(path, name))
            except OSError:
                continue
            head = b"DENT" + _stat1(status) if word == b"LIST" else b"DNT2" + _stat2(status)
            entries += head + len(name).to_bytes(4, "little") + name
        await self._stream.write(bytes(entries) + b"DONE" + bytes(16 if word == b"LIST" else 72))

    # --- push ---------------------------------------------------------------------------------------------------------

    async def _receive_file(self, request: bytes) -> bool:
        """Take a file. False if the stream ends with it."""
        name, _, mode_text = request.rpartition(b",")
        if not name or not mode_text.isdigit():
            await self._fail(f"invalid send request {request.decode('utf-8', 'backslashreplace')}")
            return False
        mode = int(mode_text)
        path = self._daemon.paths.local(name)
        faults = self._daemon.request(b"SEND", request, "push")
        if stat.S_ISLNK(mode):
            return await self._receive_link(path)
        file, trouble = _create(path)
        try:
            if trouble:
                await self._fail(trouble)
            finished = await self._receive_blocks(file, faults, failed=bool(trouble))
            if finished is None:
                return False
            if file >= 0:
                os.fchmod(file, mode & 0o777)
                os.utime(file, (finished, finished))
                os.close(file)
                file = -1
        finally:
            if file >= 0:  # as adbd does: a file that didn't come whole isn't left there
                os.close(file)
                os.unlink(path)
        await self._stream.write(b"OKAY" + bytes(4))
        return True

    async def _receive_blocks(self, file: int, faults: Request, failed: bool) -> int | None:
        """Take blocks until the last; returns its time stamp, None if something failed.

        A failure is told at once, and the rest is swallowed: clients read nothing before they have sent everything.
        """
        done = 0
        while True:
            word, size = await self._header()
            if word == b"DONE":
                return None if failed else size
            if word != b"DATA" or size > BLOCK:
                await self._fail("invalid data message" if word != b"DATA" else "oversize data message")
                return None
            data = await self._stream.read_exactly(size)
            if failed:
                continue
            start, done = done, done + size
            self._daemon.pushed += size
            if delay := self._daemon.faults.has("push_delay"):
                await asyncio.sleep(delay * size / BLOCK)
            if faults.strikes("push_drop", start, done) is not None:
                self._stream.connection.drop()
                return None
            if faults.strikes("push_mute", start, done) is not None:
                self._stream.connection.mute()
            if faults.strikes("push_no_space", start, done) is not None:
                failed = True
                await self._fail("write failed: No space left on device")
                continue
            byte = faults.strikes("push_corrupt", start, done)
            try:
                _write_all(file, data if byte is None else _flipped(data, byte - start))
            except OSError as error:
                failed = True
                await self._fail(f"write failed: {error.strerror}")

    async def _receive_link(self, path: bytes) -> bool:
        target = b""
        while True:
            word, size = await self._header()
            if word == b"DONE":
                break
            if word != b"DATA" or size > BLOCK:
                await self._fail("invalid data message")
                return False
            target += await self._stream.read_exactly(size)
        try:
            if os.path.lexists(path):
                os.unlink(path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(target.rstrip(b"\0"), path)
        except OSError as error:
            await self._fail(f"couldn't create symlink: {error.strerror}")
            return False
        await self._stream.write(b"OKAY" + bytes(4))
        return True

    # --- pull ---------------------------------------------------------------------------------------------------------

    async def _send_file(self, name: bytes) -> bool:
        """Send a file. False if the stream ends with it."""
        faults = self._daemon.request(b"RECV", name, "pull")
        try:
            file = os.open(self._daemon.paths.local(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:
            await self._fail(f"open failed: {getattr(error, 'strerror', None) or error}")
            return False
        try:
            return await self._send_blocks(file, faults)
        finally:
            os.close(file)

    async def _send_blocks(self, file: int, faults: Request) -> bool:
        done, batch = 0, bytearray()
        while True:
            try:
                data = os.read(file, BLOCK)
            except OSError as error:
                await self._fail(f"read failed: {error.strerror}")
                return False
            start, done = done, done + len(data)
            for name in ("pull_drop", "pull_mute", "pull_cut", "pull_done"):
                byte = faults.strikes(name, start, done)
                if byte is not None:
                    await self._stream.write(bytes(batch))
                    await self._break_off(name, data[: byte - start])
                    return name == "pull_done"
            byte = faults.strikes("pull_corrupt", start, done)
            if byte is not None:
                data = _flipped(data, byte - start)
            if data:
                batch += b"DATA" + len(data).to_bytes(4, "little") + data
                self._daemon.pulled += len(data)
            if not data or len(batch) >= _BATCH * BLOCK:
                await self._stream.write(bytes(batch) if data else bytes(batch) + b"DONE" + bytes(4))
                batch.clear()
            if not data:
                return True

    async def _break_off(self, how: str, data: bytes) -> None:
        if how == "pull_done":
            block = b"DATA" + len(data).to_bytes(4, "little") + data if data else b""
            await self._stream.write(block + b"DONE" + bytes(4))
        elif how == "pull_cut":
            await self._stream.write(b"DATA" + BLOCK.to_bytes(4, "little") + data)
        elif how == "pull_mute":
            self._stream.connection.mute()
            await self._stream.write(b"DATA")
        else:
            self._stream.connection.drop()
            raise StreamClosed


def _create(path: bytes) -> tuple[int, str]:
    """A new file in the place of whatever file was there: its descriptor, or -1 and what adbd would say."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    except (OSError, ValueError) as error:
        return -1, f"secure_mkdirs failed: {getattr(error, 'strerror', error)}"
    try:
        if os.path.lexists(path) and not os.path.isdir(path):
            os.unlink(path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), ""
    except FileExistsError:
        return -1, "couldn't create file: Is a directory"
    except (OSError, ValueError) as error:
        return -1, f"couldn't create file: {getattr(error, 'strerror', error)}"


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 0xFF]) + data[index + 1 :]


def _stat1(status: os.stat_result | None) -> bytes:
    """Mode, size and time in 32 bits each: sizes of 4 GiB and more wrap, as they do on a device."""
    if status is None:
        return bytes(_STAT1.size)
    return _STAT1.pack(status.st_mode, status.st_size & 0xFFFFFFFF, int(status.st_mtime) & 0xFFFFFFFF)


def _stat2(status: os.stat_result | None, error: int = 0) -> bytes:
    if status is None:
        return _STAT2.pack(error, *[0] * 10)
    return _STAT2.pack(
        0,
        status.st_dev & 0xFFFFFFFFFFFFFFFF,
        status.st_ino,
        status.st_mode,
        status.st_nlink,
        2000,  # shell, whoever runs the tests
        2000,
        status.st_size,
        int(status.st_atime),
        int(status.st_mtime),
        int(status.st_ctime),
    )
