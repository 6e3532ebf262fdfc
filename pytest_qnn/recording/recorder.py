"""Storing a session: a :class:`Recording` is the folder, a :class:`RecordingTransport` one device in it."""

from __future__ import annotations

import datetime
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pytest_qnn.devices.transport import COMMAND_SECONDS, OUTPUT_BYTES, Completed, FileStat, Stream, Transport
from pytest_qnn.errors import RecordingError
from pytest_qnn.recording import answers, content, questions
from pytest_qnn.recording.checks import check_folder
from pytest_qnn.recording.log import FILES, FORMAT, LOG, encode
from pytest_qnn.recording.parts import Part, Parts
from pytest_qnn.recording.questions import Question

T = TypeVar("T")


class Recording:
    """A session that is being recorded. From several threads.

    Args:
        folder: new or empty; made if it is missing.

    Raises:
        OptionError: ``folder`` has something in it.
        RecordingError: nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self.folder = folder
        self._began = time.monotonic()
        self._lock = threading.RLock()
        self._parts = Parts()
        self._numbers: dict[Part, int] = {}
        self._threads: dict[Part, dict[object, int]] = {}
        self._devices = self._streams = self._operations = 0
        self._artifacts: dict[str, Mapping[str, Any]] = {}
        self._sum = b""
        self._handle: int | None = None
        self._through = False
        self.failure = ""
        try:
            (folder / FILES).mkdir(parents=True, exist_ok=True)
            self._handle = os.open(
                folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
        except OSError as error:
            raise self._fail(error) from error
        self._files = content.FileStore(folder / FILES)
        from pytest_qnn import __version__

        began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._write({"kind": "recording", "format": FORMAT, "pytest_qnn": __version__, "began": began})

    # --- what is recorded ---------------------------------------------------------------------------------------------

    def transport(self, inner: Transport) -> RecordingTransport:
        """``inner``, with everything that is asked of it recorded."""
        with self._lock:
            number = self._devices
            self._devices += 1
            self._write({"kind": "device", "device": number, "serial": inner.serial})
        return RecordingTransport(self, inner, number)

    def begin_test(self, nodeid: str) -> None:
        """``nodeid`` is running from now on; empty: between tests. Doesn't fail: what is asked next does."""
        with self._lock, suppress(RecordingError):
            before, part = self._parts.test, self._parts.begin_test(nodeid)
            if nodeid and part != before:
                self._write({"kind": "test", "part": self._number(part), "nodeid": nodeid})

    def end_test(self, outcome: str) -> None:
        """How the running test ended, e.g. "passed". Doesn't fail."""
        with self._lock, suppress(RecordingError):
            if self._parts.test.test:
                self._write({"kind": "outcome", "part": self._number(self._parts.test), "outcome": outcome})

    def keep_artifact(self, key: str, folder: Path) -> None:
        """Keep the files of a compiled model: a compiler's results differ in a few bytes from one time to the next.

        Args:
            key: what it is asked for by when it is replayed.
            folder: with files, no folders.

        Raises:
            RecordingError: it can't be written.
        """
        with self._lock:
            self.check()
            try:
                files = {path.name: content.describe_file(path) for path in sorted(folder.iterdir())}
                for name, described in files.items():
                    self._files.keep_file(folder / name, described)
            except (OSError, content.ChangedError) as error:
                raise self._fail(error) from error
            if self._artifacts.get(key) != files:
                self._artifacts[key] = files
                programs = [name for name in files if os.access(folder / name, os.X_OK)]
                self._write({"kind": "artifact", "key": key, "files": files, "executable": programs})

    @property
    def operations(self) -> int:
        """How many operations were recorded."""
        return self._operations

    def check(self) -> None:
        """Raise RecordingError if it was not possible to record everything."""
        if self.failure:
            raise RecordingError(self.failure)

    def let_through(self) -> None:
        """From now on nothing is recorded, and everything goes to the devices: to leave them clean after a failure."""
        self._through = True

    def close(self, outcome: str = "") -> None:
        """The session is over. ``outcome``: e.g. pytest's exit status.

        Raises:
            RecordingError: that can't be written, or something could not be recorded.
        """
        with self._lock:
            try:
                if self._handle is not None:
                    self._write({"kind": "end", "outcome": outcome})
                self.check()
            finally:
                self._let_go()

    def _let_go(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            with suppress(OSError):
                os.close(handle)

    # --- writing ------------------------------------------------------------------------------------------------------

    def _write(self, values: Mapping[str, Any]) -> None:
        with self._lock:
            self.check()
            if self._handle is None:
                raise RecordingError(
                    f"{self.folder}: the recording is closed: nothing more can be asked of its devices"
                )
            line, total = encode(values, self._sum)
            try:
                left = memoryview(line)
                while left:
                    left = left[os.write(self._handle, left) :]
            except OSError as error:
                raise self._fail(error) from error
            self._sum = total

    def _fail(self, error: Exception) -> RecordingError:
        reason = getattr(error, "strerror", None) or f"{error} changed meanwhile"
        self.failure = (
            f"{self.folder}: the session can't be recorded any further ({reason}): what was recorded so far can be replayed. "
            "Make room there, or record into another folder"
        )
        self._let_go()
        return RecordingError(self.failure)

    def _number(self, part: Part) -> int:
        if part not in self._numbers:
            number = len(self._numbers)
            self._write({"kind": "part", "part": number, "name": part.name, "occurrence": part.occurrence})
            self._numbers[part] = number
        return self._numbers[part]

    def inside(self, name: str, shared: bool = True) -> AbstractContextManager[None]:
        """What is asked in the block is part ``name``."""
        return self._parts.inside(name, shared)

    def new_stream(self) -> int:
        """The number of a stream."""
        with self._lock:
            self._streams += 1
            return self._streams - 1

    def ask(
        self,
        device: int,
        stream: int | None,
        question: Question,
        answer: Callable[[], T],
        to_data: Callable[[T], Any] = lambda value: None,
        hidden: Mapping[str, str] | None = None,
        keep: Callable[[content.FileStore], None] = lambda files: None,
    ) -> T:
        """Get an answer and record it.

        Args:
            question: as it is recorded.
            answer: asks the device.
            to_data: the answer as data; stores its contents.
            hidden: see :func:`.answers.scrub`.
            keep: stores the contents of the question.

        Raises:
            RecordingError: it can't be recorded. The device isn't asked if that is known before.
            Whatever ``answer`` raises.
        """
        if self._through:
            return answer()
        self.check()
        part, thread = self._parts.current, self._parts.thread
        try:
            keep(self._files)
        except (OSError, content.ChangedError) as error:
            raise self._fail(error) from error
        began = time.monotonic()

        def write(result: Mapping[str, Any]) -> None:
            took = time.monotonic() - began
            with self._lock:
                number = self._number(part)
                threads = self._threads.setdefault(part, {})
                line = {
                    "kind": "asked",
                    "part": number,
                    "thread": threads.setdefault(thread, len(threads)),
                    "device": device,
                    "stream": stream,
                    "question": question,
                    **result,
                    "began": round(began - self._began, 6),
                    "took": round(took, 6),
                }
                self._write(line)
                self._operations += 1

        try:
            value = answer()
        except BaseException as error:
            if isinstance(error, Exception):
                write({"error": answers.encode_error(error, hidden or {})})
            else:
                with suppress(RecordingError):  # Ctrl-C must come through
                    write({"error": answers.encode_error(error, hidden or {})})
            raise
        try:
            data = to_data(value)
        except (OSError, content.ChangedError) as error:
            raise self._fail(error) from error
        write({"answer": data})
        return value

    def keep_bytes(self, data: bytes, sent: bool = False) -> dict[str, Any]:
        """The content of ``data``, which is stored. Raises OSError."""
        described = content.describe(data)
        self._files.keep(data, described, sent)
        return described

    def keep_local(self, path: Path, digest: str) -> dict[str, Any]:
        """The content of a file that was fetched, which is stored. Raises OSError, ChangedError."""
        described = content.describe_file(path)
        if content.digest_of(described) != digest:
            raise content.ChangedError(path.name)
        self._files.keep_file(path, described)
        return described


class RecordingTransport:
    """A device whose answers are recorded; made by :meth:`Recording.transport`. Implements
    :class:`~pytest_qnn.devices.transport.Transport`.

    All operations raise RecordingError if they can't be recorded.
    """

    def __init__(self, recording: Recording, inner: Transport, number: int) -> None:
        self._recording, self._inner, self._number = recording, inner, number
        self.serial, self.address = inner.serial, inner.address

    def part(self, name: str, shared: bool = True) -> AbstractContextManager[None]:
        """See :func:`pytest_qnn.devices.transport.part`."""
        return self._recording.inside(name, shared)

    def decided(self, what: str, decide: Callable[[], T]) -> T:
        """See :func:`pytest_qnn.devices.transport.decided`."""
        value: T = self._ask({"op": "decided", "what": what}, decide, lambda data: data)
        return value

    def describe(self, facts: Mapping[str, Any], stand_in: str = "") -> None:
        """Record what the device is: JSON data, and what it is instead of a Qualcomm device; for those who read it."""
        facts = answers.scrub_all(facts, self._hidden())
        self._recording._write({"kind": "facts", "device": self._number, "facts": facts, "stand_in": stand_in})

    def _hidden(self, *local: Path) -> dict[str, str]:
        server = self._inner.address.rpartition("@")[2]
        hidden = {self._inner.address: f"recorded://{self.serial}"}
        if server and server != self.serial:
            hidden[server] = "<adb server>"
        for path in local:
            hidden |= {str(path): "<local file>", str(path.absolute()): "<local file>"}
        return hidden

    def _ask(
        self,
        question: Question,
        answer: Callable[[], T],
        to_data: Callable[[T], Any] = lambda value: None,
        *,
        stream: int | None = None,
        local: Sequence[Path] = (),
        keep: Callable[[content.FileStore], None] = lambda files: None,
    ) -> T:
        return self._recording.ask(self._number, stream, question, answer, to_data, self._hidden(*local), keep)

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
        question = questions.shell(words, cwd, env, stdin, limit)
        keep_bytes = self._recording.keep_bytes
        return self._ask(
            question,
            lambda: self._inner.shell(words, timeout=timeout, cwd=cwd, env=env, stdin=stdin, limit=limit),
            lambda done: {"code": done.code, "stdout": keep_bytes(done.stdout), "stderr": keep_bytes(done.stderr)},
            keep=lambda files: files.keep(stdin, question["stdin"], sent=True),
        )

    def push(self, files: Mapping[str, Path | bytes], *, mode: int = 0o644, timeout: float) -> dict[str, str]:
        question = questions.push(files, mode)
        contents = question["files"]

        def keep(store: content.FileStore) -> None:
            for name, file in files.items():
                if isinstance(file, bytes):
                    store.keep(file, contents[name], sent=True)
                else:
                    store.keep_file(file, contents[name], sent=True)

        def digests(pushed: Mapping[str, str]) -> dict[str, str]:
            for name, digest in pushed.items():
                if digest != content.digest_of(contents[name]):
                    raise content.ChangedError(name)
            return dict(pushed)

        local = [file for file in files.values() if not isinstance(file, bytes)]
        send = lambda: self._inner.push(files, mode=mode, timeout=timeout)  # noqa: E731
        return self._ask(question, send, digests, local=local, keep=keep)

    def pull(
        self, files: Mapping[str, Path], *, timeout: float, sizes: Mapping[str, int] | None = None
    ) -> dict[str, str]:
        return self._ask(
            questions.pull(files, sizes),
            lambda: self._inner.pull(files, timeout=timeout, sizes=sizes),
            lambda got: {name: self._recording.keep_local(files[name], digest) for name, digest in got.items()},
            local=list(files.values()),
        )

    def read(self, path: str, *, limit: int = 1 << 20, timeout: float = COMMAND_SECONDS) -> bytes:
        return self._ask(
            {"op": "read", "path": path, "limit": limit},
            lambda: self._inner.read(path, limit=limit, timeout=timeout),
            self._recording.keep_bytes,
        )

    def stat(self, path: str, *, timeout: float = COMMAND_SECONDS) -> FileStat | None:
        return self._ask(
            {"op": "stat", "path": path},
            lambda: self._inner.stat(path, timeout=timeout),
            lambda found: None if found is None else {"kind": found.kind, "size": found.size, "mtime": found.mtime},
        )

    def start(
        self, words: Sequence[str], *, timeout: float, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Stream:
        number = self._recording.new_stream()
        inner = self._ask(
            questions.start(words, cwd, env),
            lambda: self._inner.start(words, timeout=timeout, cwd=cwd, env=env),
            lambda stream: number,
        )
        return _RecordingStream(self, inner, number)

    def reconnect(self, timeout: float) -> None:
        self._ask({"op": "reconnect"}, lambda: self._inner.reconnect(timeout))

    def fresh_name(self) -> str:
        return self._ask({"op": "fresh_name"}, self._inner.fresh_name, str)

    def clock(self) -> float:
        return self._ask({"op": "clock"}, self._inner.clock, float)

    def wait(self, seconds: float) -> None:
        self._ask({"op": "wait"}, lambda: self._inner.wait(seconds))

    def close(self) -> None:
        self._inner.close()


class _RecordingStream:
    """A program on a device that is recorded; implements :class:`~pytest_qnn.devices.transport.Stream`."""

    def __init__(self, transport: RecordingTransport, inner: Stream, number: int) -> None:
        self._transport, self._inner, self._number = transport, inner, number

    def write(self, *parts: bytes | memoryview, timeout: float) -> None:
        data = questions.joined(parts)
        described = content.describe(data)
        self._transport._ask(
            {"op": "stream write", "data": described},
            lambda: self._inner.write(*parts, timeout=timeout),
            stream=self._number,
            keep=lambda files: files.keep(data, described, sent=True),
        )

    def read(self, count: int, *, timeout: float) -> bytes:
        return self._transport._ask(
            {"op": "stream read", "count": count},
            lambda: self._inner.read(count, timeout=timeout),
            self._transport._recording.keep_bytes,
            stream=self._number,
        )

    def log(self) -> list[str]:
        return self._transport._ask({"op": "stream log"}, self._inner.log, list, stream=self._number)

    @property
    def exit_code(self) -> int | None:
        code: int | None = self._transport._ask(
            {"op": "stream exit_code"}, lambda: self._inner.exit_code, lambda code: code, stream=self._number
        )
        return code

    def close(self) -> None:
        self._inner.close()
