"""The services shell and exec: programs on the device, with their standard streams.

Shell protocol (AOSP, ``packages/modules/adb/shell_protocol.h``): packets of an id, a 32-bit length and data. Like adbd's, a
program's standard input and output are one socket, standard error another; with a terminal all are the terminal. When the
other side goes away, the program that was started gets SIGHUP and its streams end; what it started itself is left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import socket
import struct
import termios
from typing import TYPE_CHECKING, Any

from pytest_qnn.testing.loopback.faults import Request
from pytest_qnn.testing.loopback.protocol import Stream, StreamClosed

if TYPE_CHECKING:
    from pytest_qnn.testing.loopback.daemon import Daemon

STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN, WINDOW_SIZE = range(6)
_PACKET = struct.Struct("<BI")
_CHUNK = 256 << 10
_LONGEST = 1 << 30  # of a packet, so that nonsense isn't waited for


class ShellService:
    """Runs one command for one stream.

    Args:
        command: for sh; empty for an interactive shell.
        packets: whether the shell protocol is spoken (v2), else bare bytes with standard error among them.
        terminal: whether the program gets a terminal.
    """

    def __init__(
        self, daemon: Daemon, stream: Stream, command: bytes, *, packets: bool, terminal: bool, faults: Request
    ) -> None:
        self._daemon, self._stream, self._command, self._faults = daemon, stream, command, faults
        self._packets, self._terminal = packets, terminal
        self._written = 0
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Run it to its end, or to the stream's."""
        if self._faults.strikes("shell_hang", 0, 2) is not None:
            await self._until_closed()
            return
        if await self._strike(0, 0):
            return
        try:
            ours, errors, theirs = await self._streams()
        except OSError as error:
            await self._send(STDERR, f"error: no terminal: {error}\n".encode())
            await self._exit(1)
            return
        program = [self._daemon.shell, "-c", self._daemon.paths.command(self._command)]
        if not self._command:
            program = [self._daemon.shell, "-i"]
        try:
            process = await self._daemon.spawn(program, theirs, terminal=self._terminal)
        finally:
            for file in set(theirs):
                os.close(file)
        outputs = [self._pump(ours[0], STDOUT)] + ([self._pump(errors[0], STDERR)] if errors else [])
        output = asyncio.ensure_future(asyncio.gather(*outputs))
        feeder = asyncio.ensure_future(self._feed(ours[1], process))
        try:
            waited: set[asyncio.Future[Any]] = {output, feeder}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not output.done():
                raise StreamClosed  # the feeder ends when the other side goes away, and not before
            await output
            if not self._cut_short():
                code = await process.wait()
                await self._exit(code if code >= 0 else 128 - code)
        finally:
            for task in (feeder, output):
                task.cancel()
            await asyncio.gather(feeder, output, return_exceptions=True)
            for writer in [ours[1]] + ([errors[1]] if errors else []):
                writer.transport.abort()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGHUP)

    async def _streams(
        self,
    ) -> tuple[
        tuple[asyncio.StreamReader, asyncio.StreamWriter],
        tuple[asyncio.StreamReader, asyncio.StreamWriter] | None,
        tuple[int, int, int],
    ]:
        """Ours of the program's output and errors, and its three file descriptors."""
        if self._terminal:
            master, slave = pty.openpty()
            return await _open_terminal(master), None, (slave, slave, slave)
        ours, theirs = _socket_pair()
        main = await asyncio.open_connection(sock=ours, limit=1 << 20)
        file = theirs.detach()
        if not self._packets:
            return main, None, (file, file, file)
        ours, theirs = _socket_pair()
        errors = await asyncio.open_connection(sock=ours, limit=1 << 20)
        return main, errors, (file, file, theirs.detach())

    async def _pump(self, source: asyncio.StreamReader, kind: int) -> None:
        while True:
            try:
                data = await source.read(_CHUNK)
            except OSError:  # of a terminal whose program ended
                return
            if not data:
                return
            await self._send(kind, self._daemon.paths.output(data))

    async def _send(self, kind: int, data: bytes) -> None:
        async with self._writing:
            if kind != EXIT and await self._strike(self._written, self._written + len(data), kind, data):
                raise StreamClosed
            self._written += len(data)
            await self._stream.write(self._packet(kind, data))

    async def _exit(self, code: int) -> None:
        if self._packets:
            await self._send(EXIT, bytes([code]))

    def _packet(self, kind: int, data: bytes) -> bytes:
        return _PACKET.pack(kind, len(data)) + data if self._packets else data

    async def _strike(self, start: int, end: int, kind: int = STDOUT, data: bytes = b"") -> bool:
        """Show the fault that comes in these bytes of output; whether one did. Byte 0 comes before the program starts."""
        low, high = (0, 1) if start == end else (max(start, 1), end)
        for name in ("shell_drop", "shell_mute", "shell_close"):
            byte = self._faults.strikes(name, low, high)
            if byte is not None:
                if before := data[: byte - start]:
                    await self._stream.write(self._packet(kind, before))
                if name == "shell_mute":
                    self._stream.connection.mute()
                if name == "shell_drop":
                    self._stream.connection.drop()
                return True
        return False

    def _cut_short(self) -> bool:
        """Show the fault that lies beyond the output, once the program ended: it may be one without any."""
        for name in ("shell_drop", "shell_mute", "shell_close"):
            if self._faults.strikes(name, self._written, 1 << 62) is not None:
                if name == "shell_drop":
                    self._stream.connection.drop()
                elif name == "shell_mute":
                    self._stream.connection.mute()
                return True
        return False

    async def _feed(self, sink: asyncio.StreamWriter, process: asyncio.subprocess.Process) -> None:
        """Hand over standard input until the other side goes away; what the program doesn't take is thrown away."""
        while True:
            if self._packets:
                kind, size = _PACKET.unpack(await self._stream.read_exactly(_PACKET.size))
                if size > _LONGEST:
                    raise StreamClosed
                if kind != STDIN:
                    data = await self._stream.read_exactly(size)
                    self._control(kind, data, sink)
                    continue
            else:
                size = 1 << 62
            while size:
                data = await self._stream.read(min(size, _CHUNK))
                if not data:
                    raise StreamClosed
                size -= len(data) if self._packets else 0
                try:
                    sink.write(data)
                    await sink.drain()
                except (ConnectionError, OSError):
                    pass

    def _control(self, kind: int, data: bytes, sink: asyncio.StreamWriter) -> None:
        if kind == CLOSE_STDIN:
            with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
                if self._terminal:
                    sink.write(b"\x04")
                elif sink.can_write_eof():
                    sink.write_eof()
        elif kind == WINDOW_SIZE and self._terminal:
            found = re.match(rb"(\d{1,4})x(\d{1,4}),(\d{1,5})x(\d{1,5})", data)
            if found:
                size = struct.pack("HHHH", *(int(text) for text in found.groups()))
                with contextlib.suppress(OSError):
                    fcntl.ioctl(sink.get_extra_info("pipe").fileno(), termios.TIOCSWINSZ, size)

    async def _until_closed(self) -> None:
        while await self._stream.read():
            pass


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    for side in (ours, theirs):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            side.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
    return ours, theirs


async def _open_terminal(master: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    reading = asyncio.StreamReaderProtocol(reader)
    await loop.connect_read_pipe(lambda: reading, open(os.dup(master), "rb", buffering=0))  # noqa: SIM115
    sink = open(master, "wb", buffering=0)  # noqa: SIM115  (the transport closes it)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sink)
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)
