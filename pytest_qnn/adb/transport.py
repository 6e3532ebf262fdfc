"""A line to one device over ADB: commands and files. One connection for each operation, so that threads can share it."""

from __future__ import annotations

import functools
import math
import os
import posixpath
import secrets
import shlex
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pytest_qnn.adb import shell as shells
from pytest_qnn.adb import sync
from pytest_qnn.adb.connection import Connection
from pytest_qnn.adb.deadline import Deadline
from pytest_qnn.adb.digests import FAST_BYTES, FAST_FOUND, FIND_FAST, MISMATCH, compute, differing, parse, publish
from pytest_qnn.adb.server import AdbServer, check_serial, parse_host_port
from pytest_qnn.adb.stream import AdbStream
from pytest_qnn.devices.transport import COMMAND_SECONDS, OUTPUT_BYTES, Completed, FileStat
from pytest_qnn.errors import (
    AdbServerError,
    DeviceError,
    DeviceFileError,
    DeviceLostError,
    DeviceRefusedError,
    DeviceTimeoutError,
    OptionError,
)

CLEANING_SECONDS = 1.0  # to remove what a failed push left, and to end a program that was let go
PROBE_SECONDS = 2.0
MARK = "PYTEST_QNN_PROGRAM"  # variable by whose value a program on the device, and what it started, is found again

_KILL = "for f in $(grep -lE '{}' /proc/[0-9]*/environ 2>/dev/null); do p=${{f#/proc/}}; kill -9 ${{p%/environ}} 2>/dev/null; done; :"


class AdbTransport:
    """Answers for :class:`pytest_qnn.devices.transport.Transport` over the ADB server ``server``. Opens nothing by itself."""

    def __init__(self, server: AdbServer, serial: str) -> None:
        self.server, self.serial = server, check_serial(serial)
        self.address = f"adb://{serial}@{server.address}"
        self._killer: str | None = None
        self._has_stat: bool | None = None
        self._has_fast: bool | None = None
        self._leftovers: list[str] = []  # folders
        self._orphans: list[str] = []  # marks of programs
        self._cleaning = threading.Lock()
        self._streams: weakref.WeakSet[AdbStream] = weakref.WeakSet()

    # --- commands -----------------------------------------------------------------------------------------------------

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
        return self._shell(words, Deadline(timeout), cwd=cwd, env=env, stdin=stdin, limit=limit)

    def _shell(
        self,
        words: Sequence[str],
        deadline: Deadline,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        limit: int = OUTPUT_BYTES,
    ) -> Completed:
        shells.command_line(words, cwd=cwd, env=env)  # refuses what can't be, before the device is asked
        prefix = self._prefix(deadline)
        mark = secrets.token_hex(8)
        if not prefix:
            env = {**(env or {}), MARK: mark}
        line = shells.command_line(words, prefix=prefix, cwd=cwd, env=env, drain=bool(stdin))
        try:
            return self._run(line, deadline, f"ran {_short(words)}", stdin, limit)
        except DeviceTimeoutError:
            if not prefix:
                self._kill(mark)
            raise

    def _line(self, words: Sequence[str], deadline: Deadline) -> str:
        return shells.command_line(words, prefix=self._prefix(deadline))

    def _run(
        self, line: str, deadline: Deadline, doing: str, stdin: bytes = b"", limit: int = OUTPUT_BYTES
    ) -> Completed:
        with self._begin(line, deadline, doing) as session:
            return self._finish(session, stdin, limit)

    @contextmanager
    def _begin(self, line: str, deadline: Deadline, doing: str) -> Iterator[shells.ShellSession]:
        """A command that runs, until the end of the context at most."""
        with self._open(shells.SERVICE + line, deadline, doing) as connection:
            yield shells.ShellSession(connection)

    def _finish(self, session: shells.ShellSession, stdin: bytes = b"", limit: int = OUTPUT_BYTES) -> Completed:
        def too_much() -> bool:
            if len(session.stdout) + len(session.stderr) > limit:
                raise DeviceFileError(
                    f"device {self.serial} {session.connection.doing}: it wrote more than {limit} bytes"
                )
            return False

        session.exchange([stdin], enough=too_much, close_stdin=True)
        too_much()
        assert session.code is not None
        return Completed(session.code, bytes(session.stdout), bytes(session.stderr))

    def start(
        self, words: Sequence[str], *, timeout: float, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> AdbStream:
        mark = secrets.token_hex(8)
        line = shells.command_line(words, cwd=cwd, env={**(env or {}), MARK: mark})
        connection = self._connect(shells.SERVICE + line, Deadline(timeout), f"started {_short(words)}")
        stream = AdbStream(
            shells.ShellSession(connection), posixpath.basename(words[0]), functools.partial(self._kill, mark)
        )
        self._streams.add(stream)
        return stream

    def kills(self, timeout: float = COMMAND_SECONDS) -> bool:
        """Whether the device itself kills a command when its time is over; without a program ``timeout`` we have to, which works as
        long as it can be reached."""
        return bool(self._prefix(Deadline(timeout)))

    def _prefix(self, deadline: Deadline) -> str:
        """What ends a command on the device itself: ``timeout -s KILL 9``; older busybox has its own form of it."""
        if self._killer is None:
            script = (
                "timeout -s KILL 9 true 2>/dev/null && echo new && exit; "
                "timeout -t 9 -s KILL true 2>/dev/null && echo old && exit; echo none"
            )
            found = self._run(script, deadline, "looked for the program `timeout`").text
            self._killer = {"new": "timeout -s KILL {}", "old": "timeout -t {} -s KILL"}.get(found, "")
        return self._killer.format(max(1, math.ceil(deadline.left()) + 1))

    # --- files --------------------------------------------------------------------------------------------------------

    def push(self, files: Mapping[str, Path | bytes], *, mode: int = 0o644, timeout: float) -> dict[str, str]:
        deadline = Deadline(timeout)
        folders: dict[str, str] = {}  # folder -> the hidden one in it, where files are until they are whole
        uploads: list[sync.Upload] = []
        for path, source in files.items():
            folder, name = _split(path)
            hidden = folders.setdefault(folder, posixpath.join(folder, f".{secrets.token_hex(8)}.part"))
            uploads.append(sync.Upload(f"{hidden}/{name}", path, source))
            if len(uploads[-1].path.encode()) > sync.LONGEST_PATH:
                raise DeviceFileError(
                    f"device {self.serial} refused {path!r}: a path has at most {sync.LONGEST_PATH - 30} bytes"
                )
        if not uploads:
            return {}
        try:
            with self._open("sync:", deadline, f"took {_named(files)}") as connection:
                digests = sync.send(connection, uploads, mode)
            self._publish(folders, uploads, digests, deadline)
        except BaseException as error:
            with self._cleaning:
                for hidden in folders.values():
                    # adbd may or may not make the folder before a ".."
                    self._leftovers += dict.fromkeys((hidden, posixpath.normpath(hidden)))
            if not isinstance(error, (DeviceLostError, DeviceTimeoutError)):  # else when it is there again, or at close
                self._clean(Deadline(CLEANING_SECONDS))
            raise
        self._clean(deadline)
        return dict(zip(files, digests, strict=True))

    def _publish(
        self, folders: Mapping[str, str], uploads: Sequence[sync.Upload], digests: Sequence[str], deadline: Deadline
    ) -> None:
        """Compare digests on the device, and move files to their names."""
        wanted: dict[str, dict[str, str]] = {folder: {} for folder in folders}
        for upload, digest in zip(uploads, digests, strict=True):
            folder, name = _split(upload.name)
            wanted[folder][name] = digest
        fast = self._fast(sum(map(_size, uploads)), deadline)
        for folder, hidden in folders.items():
            for script in publish(wanted[folder], hidden, folder, fast=fast):
                done = self._shell(["sh", "-c", script], deadline)
                what = _named([posixpath.join(folder, name) for name in wanted[folder]])
                if done.code == MISMATCH:
                    bad = differing(done.stdout, wanted[folder])
                    raise DeviceFileError(
                        f"device {self.serial} has not got what was sent: the digest of "
                        f"{_named([posixpath.join(folder, name) for name in bad]) if bad else what} differs. Is its storage "
                        "or cable failing?"
                    )
                if done.code:
                    raise sync.file_error(self.serial, what, done.error or f"exit code {done.code}")

    def pull(
        self, files: Mapping[str, Path], *, timeout: float, sizes: Mapping[str, int] | None = None
    ) -> dict[str, str]:
        deadline = Deadline(timeout)
        for path in files:
            self._check_length(path)
        if not files:
            return {}
        downloads: list[sync.Download] = []
        try:
            with self._open("sync:", deadline, f"sent {_named(files)}") as connection:
                for path, found in zip(files, self._stats(connection, list(files), deadline), strict=True):
                    size = self._check_fetchable(path, found, (sizes or {}).get(path))
                    part = files[path].parent / f".{secrets.token_hex(8)}.part"
                    downloads.append(sync.Download(path, part, size))
                digests, there = self._receive(connection, downloads, deadline)
            for download, digest, other in zip(downloads, digests, there, strict=True):
                if digest != other:
                    raise DeviceFileError(
                        f"{download.path} on device {self.serial} was cut short, or changed while it was fetched: its digest "
                        "differs. Does something still write to it?"
                    )
            for download in downloads:
                os.replace(download.part, files[download.path])
        finally:
            for download in downloads:
                download.part.unlink(missing_ok=True)
        return dict(zip(files, digests, strict=True))

    def _receive(
        self, connection: Connection, files: Sequence[sync.Download], deadline: Deadline
    ) -> tuple[list[str], list[str]]:
        """Fetch files into their parts: SHA-256 of what came, and as the device computes it, most of it meanwhile."""
        fast = self._fast(sum(file.size for file in files), deadline)
        scripts = list(compute([file.path for file in files], fast=fast))
        there: list[str] = []
        with self._begin(self._line(["sh", "-c", scripts[0][0]], deadline), deadline, "computed digests") as session:
            digests = sync.receive(connection, files)
            for number, (script, paths) in enumerate(scripts):
                done = self._shell(["sh", "-c", script], deadline) if number else self._finish(session)
                if done.code:
                    raise sync.file_error(self.serial, _named(paths), done.error or f"exit code {done.code}")
                there += parse(done.stdout, paths)
        return digests, there

    def _check_fetchable(self, path: str, found: FileStat | None, size: int | None) -> int:
        if found is None:
            raise DeviceFileError(f"{path} is not there on device {self.serial}")
        if found.kind != "file":
            raise DeviceFileError(f"{path} on device {self.serial} is a {found.kind} and no regular file")
        if size is not None and found.size != size:
            raise DeviceFileError(f"{path} on device {self.serial} has {found.size} bytes, and not {size}")
        return found.size

    def _fast(self, size: int, deadline: Deadline) -> bool:
        """Whether a faster program than ``sha256sum`` is there, and worth its start for ``size`` bytes."""
        if size < FAST_BYTES:
            return False
        if self._has_fast is None:
            done = self._shell(["sh", "-c", FIND_FAST], deadline)
            self._has_fast = done.text.startswith(FAST_FOUND)
        return self._has_fast

    def read(self, path: str, *, limit: int = 1 << 20, timeout: float = COMMAND_SECONDS) -> bytes:
        done = self.shell(["cat", shells.check_path(path)], timeout=timeout, limit=limit)
        if done.code:
            raise sync.file_error(self.serial, path, done.error or f"exit code {done.code}")
        return done.stdout

    def stat(self, path: str, *, timeout: float = COMMAND_SECONDS) -> FileStat | None:
        deadline = Deadline(timeout)
        self._check_length(path)
        with self._open("sync:", deadline, f"looked at {path}") as connection:
            return self._stats(connection, [path], deadline)[0]

    def _stats(self, connection: Connection, paths: Sequence[str], deadline: Deadline) -> list[FileStat | None]:
        if self._has_stat is None:
            self._has_stat = "stat_v2" in self.server.features(self.serial, max(0.001, deadline.left()))
        if self._has_stat:
            return sync.stats(connection, paths)
        return [self._stat_by_shell(path, deadline) for path in paths]  # an adbd before Android 8

    def _stat_by_shell(self, path: str, deadline: Deadline) -> FileStat | None:
        done = self._shell(["stat", "-L", "-c", "%f %s %Y", path], deadline)
        if done.code:
            low = done.error.lower()
            if "no such file" in low or "not a directory" in low:
                return None
            raise sync.file_error(self.serial, path, done.error)
        try:
            mode, size, mtime = done.text.split()
            return FileStat(sync.kind_of(int(mode, 16)), int(size), int(mtime))
        except ValueError:
            raise sync.file_error(self.serial, path, f"stat says {done.text[:100]!r}") from None

    def _check_length(self, path: str) -> None:
        if len(shells.check_path(path).encode()) > sync.LONGEST_PATH:
            raise DeviceFileError(
                f"device {self.serial} refused {path!r}: a path has at most {sync.LONGEST_PATH} bytes"
            )

    def _kill(self, mark: str) -> None:
        with self._cleaning:
            self._orphans.append(mark)
        self._clean(Deadline(CLEANING_SECONDS))

    def _clean(self, deadline: Deadline) -> None:
        """Remove what failed pushes left, and end programs that may still run; what can't be done now is for the next time."""
        with self._cleaning:
            folders, self._leftovers = self._leftovers, []
            orphans, self._orphans = self._orphans, []
        try:
            if folders:
                self._run(shells.command_line(["rm", "-rf", *folders]), deadline, "removed what a failed push left")
                folders = []
            if orphans:
                self._run(_KILL.format("|".join(orphans)), deadline, "ended programs that nobody waits for")
                orphans = []
        except (DeviceError, ValueError):
            with self._cleaning:
                self._leftovers += folders
                self._orphans += orphans

    # --- the line itself ----------------------------------------------------------------------------------------------

    def reconnect(self, timeout: float) -> None:
        deadline, pause = Deadline(timeout), 0.0
        last: DeviceError | None = None
        while deadline.left() > 0:
            try:
                self._run("exit 0", deadline.sooner(PROBE_SECONDS), "was asked whether it lives")
                self._clean(deadline)
                return
            except DeviceError as error:
                last = error
            try:
                self._renew(deadline.sooner(5.0))
            except DeviceError as error:
                last = error if isinstance(error, AdbServerError) else last
            time.sleep(max(0.0, min(pause, deadline.left())))
            pause = min(0.4, 2 * pause + 0.02)
        raise DeviceLostError(f"device {self.serial} did not come back within {timeout:g} s: {last}") from last

    def _renew(self, deadline: Deadline) -> None:
        """Have the server drop its line to the device and open a new one. A device's state says nothing about its life."""
        try:
            parse_host_port(self.serial)
        except OptionError:  # USB, or an emulator
            self.server.reconnect(self.serial, max(0.001, deadline.left()))
            return
        self.server.disconnect(self.serial, max(0.001, deadline.left()))
        self.server.connect(self.serial, max(0.001, deadline.left()))

    def fresh_name(self) -> str:
        return secrets.token_hex(8)

    def clock(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        for stream in list(self._streams):
            stream.close()
        self._clean(Deadline(CLEANING_SECONDS))

    @contextmanager
    def _open(self, service: str, deadline: Deadline, doing: str) -> Iterator[Connection]:
        connection = self._connect(service, deadline, doing)
        with connection:
            yield connection

    def _connect(self, service: str, deadline: Deadline, doing: str) -> Connection:
        try:
            connection = self.server.open(deadline, f"asked for device {self.serial}")
        except AdbServerError as error:
            raise DeviceLostError(f"device {self.serial} can't be reached: {error}") from error
        try:
            connection.switch(self.serial)
            connection.doing = doing
            connection.request(service)
        except DeviceLostError as error:
            connection.close()
            if ": closed" in str(error) and service.startswith("shell,v2"):
                self._explain_closed(deadline, error)
            raise
        except BaseException:
            connection.close()
            raise
        return connection

    def _explain_closed(self, deadline: Deadline, error: DeviceLostError) -> None:
        try:
            features = self.server.features(self.serial, max(0.001, deadline.left()))
        except (DeviceLostError, DeviceTimeoutError, AdbServerError):
            return
        if "shell_v2" not in features:
            raise DeviceRefusedError(
                f"device {self.serial} has an ADB daemon without exit codes (no shell_v2; Android 7 is the first with it): "
                "update the device's system, or its adbd"
            ) from error


# --- names ------------------------------------------------------------------------------------------------------------


def _split(path: str) -> tuple[str, str]:
    """Folder and name of a path that is to become a file.

    Raises:
        ValueError: it is not absolute, can't be passed on, or names a folder.
    """
    folder, name = posixpath.split(shells.check_path(path))
    if name in ("", ".", ".."):
        raise ValueError(f"{path!r} is the path of a folder: a file's is needed")
    return folder, name


def _size(upload: sync.Upload) -> int:
    return upload.source.stat().st_size if isinstance(upload.source, Path) else len(upload.source)


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more files"


def _short(words: Sequence[str]) -> str:
    text = shlex.join(words)
    return text if len(text) <= 100 else text[:97] + "..."
