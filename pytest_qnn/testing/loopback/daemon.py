"""What answers a device's ADB servers: it listens, knows the services, and can be dropped and rebooted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from pytest_qnn.testing.loopback.faults import Faults, Request
from pytest_qnn.testing.loopback.paths import DevicePaths
from pytest_qnn.testing.loopback.processes import descendants, kill_all, reap_orphans
from pytest_qnn.testing.loopback.protocol import MAX_PAYLOAD, Connection, Stream
from pytest_qnn.testing.loopback.reverse import ReverseForwards, splice
from pytest_qnn.testing.loopback.shell import ShellService
from pytest_qnn.testing.loopback.sync import SyncService

FEATURES = ("shell_v2", "cmd", "stat_v2", "ls_v2", "fixed_push_mkdir", "fixed_push_symlink_timestamp")
_MANY = 100_000  # requests that are remembered


class Daemon:
    """
    Args:
        serial: as the device itself calls it.
        banner: properties that it introduces itself with.
        environment: of the programs that it starts.
        shell: what runs commands.
        folders: that are emptied when it reboots, as this process finds them.
        boot_id: file with the id of this start, and log files that begin anew.
        reboot_seconds: how long it is away when it is told to reboot over ADB.
    """

    def __init__(
        self,
        serial: str,
        paths: DevicePaths,
        *,
        banner: Mapping[str, str],
        environment: Mapping[str, str],
        shell: str,
        folders: tuple[str, ...],
        boot_id: str,
        logs: tuple[str, ...],
        reboot_seconds: float,
    ) -> None:
        self.serial, self.paths, self.shell, self.reboot_seconds = serial, paths, shell, reboot_seconds
        self.faults = Faults()
        self.pushed = self.pulled = 0
        self.port = 0
        self._banner, self._environment = banner, environment
        self._folders, self._boot_id, self._logs = folders, boot_id, logs
        self._requests: list[str] = []
        self._connections: set[Connection] = set()
        self._awake = asyncio.Event()
        self._awake.set()
        self._server: asyncio.Server | None = None
        self._listening = asyncio.Lock()
        self._reverses = ReverseForwards(serial)
        self._own: set[int] = set()  # programs that somebody waits for
        self._starting = 0
        self._rebooting = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._new_boot()

    # --- being there --------------------------------------------------------------------------------------------------

    async def listen(self) -> None:
        """Be there: on a free port the first time, on the same ever after."""
        async with self._listening:
            if self._server is None:
                self._server = await asyncio.start_server(
                    self._accept, "127.0.0.1", self.port, limit=4 * MAX_PAYLOAD, reuse_address=True
                )
                self.port = self._server.sockets[0].getsockname()[1]

    def unplug(self) -> None:
        """Be away: connections drop, new ones are refused."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.drop()

    def drop(self) -> None:
        """Drop every connection."""
        for connection in list(self._connections):
            connection.drop()

    async def reboot(self, down: float) -> None:
        """Go away, forget everything that doesn't survive a reboot, and come back after ``down`` seconds."""
        if self._rebooting:
            return
        self._rebooting = True
        try:
            self.unplug()
            self._reverses.close()
            await self._shut_down()
            await asyncio.sleep(down)
            await self.listen()
        finally:
            self._rebooting = False

    def start_reboot(self, down: float) -> None:
        """Reboot, without waiting for it."""
        self._background(self.reboot(down))

    def programs(self) -> int:
        """How many processes run on the device."""
        return len(descendants())

    async def stop(self) -> None:
        """Go away for good."""
        self.unplug()
        self._reverses.close()
        await asyncio.to_thread(kill_all)

    async def _shut_down(self) -> None:
        await asyncio.to_thread(kill_all)
        for folder in self._folders:
            _empty(folder)
        self._new_boot()

    def _new_boot(self) -> None:
        Path(self._boot_id).write_text(f"{uuid.uuid4()}\n")
        for log in self._logs:
            Path(log).write_text("--------- beginning of the stand-in's log\n")

    def set_faults(self, faults: Mapping[str, Any]) -> None:
        """Show these from now on."""
        self.faults.set(faults)
        if faults.get("mute"):
            self._awake.clear()
        else:
            self._awake.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(reader, writer, greet=self._greet, serve=self._serve, awake=self._stay_awake)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._reverses.close(connection)

    async def _stay_awake(self) -> None:
        if not self._awake.is_set():
            self.faults.came("mute")
            await self._awake.wait()

    async def _greet(self, connection: Connection) -> bytes | None:
        if self.faults.has("offline"):
            self.faults.came("offline")
            return None
        if self.faults.has("unauthorized"):
            self.faults.came("unauthorized")
            await connection.demand_key()
            return None
        features = [name for name in FEATURES if not (name == "shell_v2" and self.faults.has("no_shell_v2"))]
        properties = "".join(f"{name}={value};" for name, value in self._banner.items())
        return f"device::{properties}features={','.join(features)}".encode()

    # --- services -----------------------------------------------------------------------------------------------------

    def note(self, word: bytes, subject: bytes) -> str:
        """Remember a request."""
        text = f"{word.decode('ascii')} {os.fsdecode(subject)}"
        self._remember(text)
        return text

    def _remember(self, text: str) -> None:
        if len(self._requests) < _MANY:
            self._requests.append(text)

    def take_requests(self) -> list[str]:
        """Requests since this was last asked."""
        requests, self._requests = self._requests, []
        return requests

    def request(self, word: bytes, subject: bytes, work: str) -> Request:
        """Remember a request, and choose its faults."""
        faults = self.faults.request(work, self.note(word, subject))
        if faults.reboot:
            self.faults.came("reboot")
            self._background(self.reboot(self.reboot_seconds))
        return faults

    def _serve(self, stream: Stream, service: bytes) -> Coroutine[Any, Any, None] | None:
        name, _, argument = service.partition(b":")
        kind, *options = name.decode("utf-8", "surrogateescape").split(",")
        subject = os.fsdecode(service)
        if kind not in ("shell", "exec", "sync"):
            self._remember(subject)
        if self.faults.hangs(subject):
            return self._hang(stream)
        if kind in ("shell", "exec"):
            if "v2" in options and self.faults.has("no_shell_v2"):
                return None
            faults = self.request(kind.encode(), argument, "shell")
            terminal = kind == "shell" and ("pty" in options or (not argument and "raw" not in options))
            return ShellService(self, stream, argument, packets="v2" in options, terminal=terminal, faults=faults).run()
        if kind == "sync":
            return SyncService(self, stream).run()
        if kind == "tcp":
            return self._tcp(stream, argument)
        if kind == "reverse":
            return self._reverses.run(stream, argument)
        if kind == "reboot":
            return self._reboot(stream)
        refusals = {
            "root": "adbd cannot run as root in production builds\n",
            "unroot": "adbd not running as root\n",
            "remount": 'Not running as root. Try "adb root" first.\n',
            "disable-verity": 'Not running as root. Try "adb root" first.\n',
            "tcpip": "a loopback device stays on the port it has\n",
            "usb": "a loopback device has no USB\n",
        }
        text = refusals.get(kind)
        return stream.write(text.encode()) if text else None

    async def _hang(self, stream: Stream) -> None:
        await asyncio.get_running_loop().create_future()

    async def _reboot(self, stream: Stream) -> None:
        self._background(self.reboot(self.reboot_seconds))

    async def _tcp(self, stream: Stream, argument: bytes) -> None:
        port = argument.rpartition(b":")[2]
        if not port.isdigit():
            return
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
            await splice(stream, reader, writer)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- programs -----------------------------------------------------------------------------------------------------

    async def spawn(
        self, program: list[Any], streams: tuple[int, int, int], *, terminal: bool
    ) -> asyncio.subprocess.Process:
        """Start a program, in a session of its own."""
        if terminal:  # its first terminal becomes the controlling one
            program = [program[0], "-c", b'exec "$@" <>"$(tty)" >&0 2>&1', "sh", *program]
        self._starting += 1
        try:
            process = await asyncio.create_subprocess_exec(
                *program,
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                env=dict(self._environment),
                cwd=self.paths.root or "/",
                start_new_session=True,
            )
            self._own.add(process.pid)
        finally:
            self._starting -= 1
        self._background(self._wait_for(process))
        return process

    async def _wait_for(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        self._own.discard(process.pid)
        if not self._starting:
            reap_orphans(self._own)


def _empty(folder: str) -> None:
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(path, name))
        for name in folders:
            inner = os.path.join(path, name)
            with contextlib.suppress(OSError):
                if os.path.islink(inner):
                    os.unlink(inner)
                else:
                    os.rmdir(inner)
