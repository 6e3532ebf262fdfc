"""Reverse forwards: ports on the device whose connections go to the host (AOSP, ``SERVICES.TXT``, "reverse:")."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from pytest_qnn.testing.loopback.protocol import Connection, Stream


@dataclass(frozen=True)
class _Forward:
    connection: Connection
    host: bytes
    server: asyncio.Server


class ReverseForwards:
    """Those of one device, by its port."""

    def __init__(self, serial: str) -> None:
        self._serial = serial
        self._forwards: dict[bytes, _Forward] = {}

    async def run(self, stream: Stream, argument: bytes) -> None:
        """Answer a request."""
        word, _, rest = argument.partition(b":")
        if word == b"forward":
            await stream.write(await self._add(stream.connection, rest))
        elif word == b"list-forward":
            lines = [b"%s %s %s\n" % (self._serial.encode(), port, f.host) for port, f in self._forwards.items()]
            await stream.write(_block(b"".join(lines)))
        elif word in (b"killforward", b"killforward-all"):
            ports = [rest] if word == b"killforward" else list(self._forwards)
            if any(port not in self._forwards for port in ports):
                await stream.write(b"FAIL" + _block(b"listener '%s' not found" % rest))
                return
            for port in ports:
                self._forwards.pop(port).server.close()
            await stream.write(b"OKAY")

    async def _add(self, connection: Connection, request: bytes) -> bytes:
        keep = request.startswith(b"norebind:")
        device, _, host = request.removeprefix(b"norebind:").partition(b";")
        kind, _, port = device.partition(b":")
        if kind != b"tcp" or not port.isdigit() or not host:
            return b"FAIL" + _block(b"a loopback device forwards tcp:PORT only")
        if device in self._forwards:
            if keep:
                return b"FAIL" + _block(b"cannot rebind existing socket")
            self._forwards.pop(device).server.close()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = await connection.open(host)
            if stream is None:
                writer.close()
                return
            try:
                await splice(stream, reader, writer)
            finally:
                await connection.close_stream(stream)

        try:
            server = await asyncio.start_server(accept, "127.0.0.1", int(port))
        except (OSError, OverflowError) as error:
            return b"FAIL" + _block(str(error).encode())
        chosen = int(server.sockets[0].getsockname()[1])
        self._forwards[b"tcp:%d" % chosen] = _Forward(connection, host, server)
        return b"OKAY" + (_block(b"%d" % chosen) if port == b"0" else b"")

    def close(self, connection: Connection | None = None) -> None:
        """End those of a connection, or all."""
        for port, forward in list(self._forwards.items()):
            if connection is None or forward.connection is connection:
                self._forwards.pop(port).server.close()


async def splice(stream: Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Hand bytes over in both directions until one side ends."""

    async def up() -> None:
        while data := await reader.read(64 << 10):
            await stream.write(data)

    async def down() -> None:
        while data := await stream.read():
            writer.write(data)
            await writer.drain()

    ways = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        if ways[1].done():
            with suppress(OSError):
                await writer.drain()
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        writer.close()


def _block(text: bytes) -> bytes:
    return b"%04x" % len(text) + text
