"""ADB's transport protocol: messages, the connection that carries them, and the streams that share it.

A message is six 32-bit words, little endian (command, two arguments, payload length, checksum, command inverted), and its
payload (AOSP, ``packages/modules/adb/protocol.txt``).
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any


def _command(name: bytes) -> int:
    return int.from_bytes(name, "little")


CNXN, AUTH, OPEN, OKAY, CLSE, WRTE = (_command(name) for name in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"CLSE", b"WRTE"))
VERSION = 0x01000001  # the first that needs no checksums
MAX_PAYLOAD = 1 << 20
AUTH_TOKEN = 1
_HEADER = struct.Struct("<6I")


class StreamClosed(Exception):
    """The other side closed the stream, or the connection is gone."""


class Stream:
    """One ADB stream: bytes in, acknowledged once they were taken; bytes out, one message in flight."""

    def __init__(self, connection: Connection, local: int, remote: int) -> None:
        self.connection, self.local, self.remote = connection, local, remote
        self.closed = False
        self._buffer = bytearray()
        self._arrived, self._acknowledged = asyncio.Event(), asyncio.Event()
        self.opened: asyncio.Future[bool] | None = None  # of a stream that this side opened

    async def read(self, count: int = -1) -> bytes:
        """Up to ``count`` bytes, at least one; none at the end."""
        while not self._buffer:
            if self.closed:
                return b""
            self._arrived.clear()
            await self._arrived.wait()
        if count < 0 or count >= len(self._buffer):
            data, self._buffer = bytes(self._buffer), bytearray()
        else:
            data = bytes(self._buffer[:count])
            del self._buffer[:count]
        if not self._buffer and not self.closed:
            await self.connection.send(OKAY, self.local, self.remote)
        return data

    async def read_exactly(self, count: int) -> bytes:
        """``count`` bytes.

        Raises:
            StreamClosed: there are not as many.
        """
        parts = []
        while count:
            part = await self.read(count)
            if not part:
                raise StreamClosed
            parts.append(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def write(self, data: bytes) -> None:
        """Send ``data``; returns once all of it was acknowledged.

        Raises:
            StreamClosed: it was not.
        """
        view = memoryview(data)
        for start in range(0, len(view), self.connection.max_payload):
            if self.closed:
                raise StreamClosed
            self._acknowledged.clear()
            await self.connection.send(WRTE, self.local, self.remote, view[start : start + self.connection.max_payload])
            await self._acknowledged.wait()
        if self.closed:
            raise StreamClosed

    def receive(self, data: bytes) -> None:
        """Take what the other side sent."""
        self._buffer += data
        self._arrived.set()

    def acknowledge(self) -> None:
        """The other side took what was sent."""
        self._acknowledged.set()
        if self.opened is not None and not self.opened.done():
            self.opened.set_result(True)

    def end(self) -> None:
        """The other side closed it."""
        self.closed = True
        self._arrived.set()
        self._acknowledged.set()
        if self.opened is not None and not self.opened.done():
            self.opened.set_result(False)


class Connection:
    """One connection of an ADB server to the device.

    Args:
        greet: the banner to answer a CNXN with; None for no answer. Called with the connection.
        serve: what a service does with its stream. Returns None if there is no such service.
        awake: blocks while the device is mute.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        greet: Callable[[Connection], Awaitable[bytes | None]],
        serve: Callable[[Stream, bytes], Coroutine[Any, Any, None] | None],
        awake: Callable[[], Awaitable[None]],
    ) -> None:
        self._reader, self._writer = reader, writer
        self._greet, self._serve, self._awake = greet, serve, awake
        self.max_payload = MAX_PAYLOAD
        self._muted = False
        self._streams: dict[int, Stream] = {}
        self._next = 0
        self._sending = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[Any] | None = None

    async def send(self, command: int, first: int, second: int, payload: bytes | memoryview = b"") -> None:
        """Send one message."""
        await self._stay_awake()
        async with self._sending:
            self._writer.write(_HEADER.pack(command, first, second, len(payload), 0, command ^ 0xFFFFFFFF))
            if payload:
                self._writer.write(payload)
            await self._writer.drain()

    async def run(self) -> None:
        """Take messages until the connection ends."""
        self._task = asyncio.current_task()
        try:
            while True:
                header = await self._reader.readexactly(_HEADER.size)
                command, first, second, size, _, inverted = _HEADER.unpack(header)
                if inverted != command ^ 0xFFFFFFFF or size > MAX_PAYLOAD:
                    return
                payload = await self._reader.readexactly(size) if size else b""
                await self._stay_awake()
                await self._take(command, first, second, payload)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._end()

    async def _take(self, command: int, first: int, second: int, payload: bytes) -> None:
        if command == CNXN:
            self.max_payload = min(MAX_PAYLOAD, second)
            banner = await self._greet(self)
            if banner is not None:
                await self.send(CNXN, VERSION, MAX_PAYLOAD, banner)
        elif command == AUTH:
            await self.send(AUTH, AUTH_TOKEN, 0, bytes(20))
        elif command == OPEN:
            stream = self._new(first)
            work = self._serve(stream, payload.rstrip(b"\0"))
            if work is None:
                self._streams.pop(stream.local)
                await self.send(CLSE, 0, first)
            else:
                task = asyncio.get_running_loop().create_task(self._work(stream, work))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        elif stream_or_none := self._streams.get(second):
            if command == WRTE:
                stream_or_none.receive(payload)
            elif command == OKAY:
                stream_or_none.remote = first
                stream_or_none.acknowledge()
            elif command == CLSE:
                self._streams.pop(second)
                stream_or_none.end()

    async def _work(self, stream: Stream, work: Coroutine[Any, Any, None]) -> None:
        with contextlib.suppress(StreamClosed, ConnectionError, asyncio.CancelledError):
            try:
                await self.send(OKAY, stream.local, stream.remote)
            except BaseException:
                work.close()
                raise
            try:
                await work
            finally:
                self._streams.pop(stream.local, None)
                if not self._writer.is_closing():
                    await self.send(CLSE, stream.local, stream.remote)

    async def open(self, service: bytes) -> Stream | None:
        """Open a stream to the host: how reverse forwards get there. None if it was refused."""
        stream = self._new(0)
        stream.opened = asyncio.get_running_loop().create_future()
        await self.send(OPEN, stream.local, 0, service + b"\0")
        return stream if await stream.opened else None

    async def close_stream(self, stream: Stream) -> None:
        """Close a stream that this side opened."""
        if self._streams.pop(stream.local, None) and not self._writer.is_closing():
            with contextlib.suppress(ConnectionError):
                await self.send(CLSE, stream.local, stream.remote)

    async def demand_key(self) -> None:
        """Ask the server to sign a token, as a device does that doesn't know it."""
        await self.send(AUTH, AUTH_TOKEN, 0, bytes(20))

    def mute(self) -> None:
        """Say nothing and take nothing any more on this connection, which stays."""
        self._muted = True

    def drop(self) -> None:
        """Cut the connection."""
        if self._task is not None:
            self._task.cancel()
        self._end()

    async def _stay_awake(self) -> None:
        await self._awake()
        if self._muted:
            await asyncio.get_running_loop().create_future()

    def _new(self, remote: int) -> Stream:
        self._next += 1
        stream = self._streams[self._next] = Stream(self, self._next, remote)
        return stream

    def _end(self) -> None:
        for stream in list(self._streams.values()):
            stream.end()
        for task in list(self._tasks):
            task.cancel()
        self._writer.transport.abort()
