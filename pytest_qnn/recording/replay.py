"""Answering out of a recording: a :class:`Replay` is the folder, a :class:`ReplayTransport` one device in it.

What is guaranteed: inside of a part (a test, or what it marked as done for several tests), each thread must ask exactly what
was recorded, of the same device and stream, in the same order; each answer is that of the same question at the same place.
Parts may come in another order, or not at all. Everything else is a ReplayError; after the first one nothing is answered any
more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from pytest_qnn.devices.transport import COMMAND_SECONDS, OUTPUT_BYTES, Completed, FileStat, Stream
from pytest_qnn.errors import ReplayError
from pytest_qnn.recording import answers, content, questions
from pytest_qnn.recording.log import LOG, DamagedRecordingError
from pytest_qnn.recording.parts import SESSION, Part, Parts
from pytest_qnn.recording.questions import Question
from pytest_qnn.recording.stored import Asked, StoredDevice, StoredPart, read_session
from pytest_qnn.work_folder import work_folder

T = TypeVar("T")

_DIFFERENCES = 8
_LEFT = 5


class _Tape:
    """What one thread asked in one part, and how much of it was asked again."""

    def __init__(self, asked: list[Asked]) -> None:
        self.asked, self.position = asked, 0
        self.owner: object = None

    @property
    def next(self) -> Asked | None:
        return self.asked[self.position] if self.position < len(self.asked) else None


class Replay:
    """A recorded session, to be asked the same again. From several threads.

    Args:
        folder: with a recording.

    Raises:
        ReplayError: there is none, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._session = read_session(folder)
        self._lock = threading.RLock()
        self._parts = Parts()
        self._stored = {(part.name, part.occurrence): part for part in self._session.parts}
        self._tapes: dict[Part, list[_Tape]] = {}
        self._begun: list[str] = []
        self.failure = ""

    @property
    def about(self) -> str:
        """What is replayed, for records: ``recording of 2026-01-31T10:00:00+00:00``."""
        return f"recording of {self._session.began}"

    @property
    def devices(self) -> Sequence[StoredDevice]:
        """The devices that were used, in the order in which they were opened."""
        return self._session.devices

    def transport(self, number: int) -> ReplayTransport:
        """The device ``devices[number]``."""
        return ReplayTransport(self, number, self._session.devices[number].serial)

    def begin_test(self, nodeid: str) -> None:
        """``nodeid`` is running from now on; empty: between tests."""
        with self._lock:
            nodeid = self._known_as(nodeid)
            before, part = self._parts.test, self._parts.begin_test(nodeid)
            if nodeid and part != before:
                self._begun.append(nodeid)

    def _known_as(self, nodeid: str) -> str:
        """A test's id when it was recorded. pytest begins ids at its root folder, which moves with the arguments it gets: the
        same test may be ``test_it.py::test`` once and ``project/test_it.py::test`` another time."""
        recorded = {part.nodeid for part in self._session.tests}
        if nodeid in recorded:
            return nodeid
        alike = [other for other in recorded if other.endswith(f"/{nodeid}") or nodeid.endswith(f"/{other}")]
        return alike[0] if nodeid and len(alike) == 1 else nodeid

    def end_test(self, outcome: str) -> None:
        """How the running test ended: nobody asks here."""

    def inside(self, name: str, shared: bool = True) -> AbstractContextManager[None]:
        """What is asked in the block is part ``name``."""
        return self._parts.inside(name, shared)

    def artifact(self, key: str, into: Path) -> None:
        """Put the files of a compiled model, as they were kept, into a new folder.

        Raises:
            ReplayError: none was kept under that key, or it is damaged.
            OSError: ``into`` is there already, or can't be written.
        """
        with self._lock:
            self.check()
            files = self._session.artifacts.get(key)
            if files is None:
                raise self._fail(
                    f"{self._where()}a compiled model was asked for that wasn't recorded ({key[:100]}): {self._same()}"
                )
        if into.exists():
            raise FileExistsError(17, "this is there already", str(into))
        into.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(into.parent) as draft:
            folder = draft / "files"
            folder.mkdir()
            for name, described in files.items():
                try:
                    content.save(self._session.files, described, folder / name)
                except DamagedRecordingError as error:
                    raise self._damaged(error) from None
                if name in self._session.executable[key]:
                    (folder / name).chmod(0o755)
            os.replace(folder, into)

    def finish(self, unfinished: Collection[str] = ()) -> None:
        """The session is over, and all that belongs to it was asked, also what tidies up.

        Args:
            unfinished: tests that did not come to their end this time; they may have asked less.

        Raises:
            ReplayError: something was asked before that differs, or less was asked than was recorded.
        """
        with self._lock:
            self.check()
            all_run = {part.nodeid for part in self._session.tests} <= set(self._begun)
            excused = {self._known_as(nodeid) for nodeid in unfinished}
            left: list[tuple[str, Asked]] = []
            entered = {(part.name, part.occurrence): part for part in self._tapes}
            for key, stored in self._stored.items():
                part = entered.get(key)
                if part is not None and part.test not in excused:
                    for tape in self._tapes[part]:
                        left += [(_title(stored), asked) for asked in tape.asked[tape.position :]]
                elif part is None and self._ought_to_be_asked(stored, all_run and not excused, excused):
                    left += [(_title(stored), asked) for asked in stored.asked]
            if left:
                left.sort(key=lambda pair: pair[1].line)
                lines = [
                    f"  {title}, line {asked.line}: {questions.show(asked.question)}" for title, asked in left[:_LEFT]
                ]
                if len(left) > _LEFT:
                    lines.append(f"  and {len(left) - _LEFT} more")
                raise self._fail(
                    f"replay of {self.folder}: {len(left)} recorded {'operation was' if len(left) == 1 else 'operations were'} not asked again:\n"
                    + "\n".join(lines)
                    + f"\n{self._same()}"
                )

    def _ought_to_be_asked(self, stored: StoredPart, all_run: bool, excused: Collection[str]) -> bool:
        """Whether a part that was recorded and nobody came to should have been."""
        if stored.nodeid:
            again = self._begun.count(stored.nodeid) > stored.occurrence
            return again and stored.nodeid not in excused
        return all_run or stored.name == SESSION

    # --- asking -------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ReplayError if something was asked before that differs."""
        if self.failure:
            raise ReplayError(self.failure)

    def ask(self, device: int, stream: int | None, question: Question) -> Asked:
        """What was recorded for ``question`` at this place.

        Raises:
            ReplayError: another question was, or none.
            Whatever was recorded.
        """
        with self._lock:
            self.check()
            part, thread = self._parts.current, self._parts.thread
            stored = self._stored.get((part.name, part.occurrence))
            if part not in self._tapes:
                self._tapes[part] = [_Tape(asked) for asked in (stored.threads if stored else [])]
            tape = self._tape(part, thread, lambda asked: _same_question(asked, device, stream, question))
            found = tape.next if tape else None
            if found is None or tape is None:
                raise self._fail(self._unrecorded(part, stored, question))
            if not _same_question(found, device, stream, question):
                raise self._fail(self._differs(part, tape, found, device, stream, question))
            tape.position += 1
        if found.error is not None:
            error = answers.decode_error(found.error)
            if error is None:
                raise self._fail(
                    f"{self._where(part)}{questions.show(question)}: this operation was not answered when it was recorded: it was "
                    f"ended by {found.error['class'][:100]} (line {found.line}). The recording can be replayed up to there only"
                )
            raise error
        return found

    def _tape(self, part: Part, thread: object, fits: Any) -> _Tape | None:
        """The tape of a thread. One that asks for the first time takes that of a recorded thread that began with the same."""
        tapes = self._tapes[part]
        for tape in tapes:
            if tape.owner is thread:
                return tape
        free = [tape for tape in tapes if tape.owner is None]
        chosen = next((tape for tape in free if tape.next is not None and fits(tape.next)), free[0] if free else None)
        if chosen is not None:
            chosen.owner = thread
        return chosen

    def load(self, described: content.Content) -> bytes:
        """The bytes of a recorded content. Raises ReplayError."""
        try:
            return content.load(self._session.files, described)
        except DamagedRecordingError as error:
            raise self._damaged(error) from None

    def save(self, described: content.Content, target: Path) -> None:
        """Write a recorded content to a file. Raises ReplayError, OSError."""
        try:
            content.save(self._session.files, described, target)
        except DamagedRecordingError as error:
            raise self._damaged(error) from None

    # --- what differs -------------------------------------------------------------------------------------------------

    def _fail(self, text: str) -> ReplayError:
        self.failure = self.failure or text
        return ReplayError(self.failure)

    def _damaged(self, error: DamagedRecordingError) -> ReplayError:
        return self._fail(f"{self.folder}: the recording is damaged: {error}. Copy it again, or record again")

    def _where(self, part: Part | None = None) -> str:
        test = self._parts.test.test
        inner = f", in {part.name!r}" if part is not None and not _is_test(part) else ""
        return f"replay of {self.folder}: {test or 'between tests'}{inner}: "

    def _unrecorded(self, part: Part, stored: StoredPart | None, question: Question) -> str:
        asked = f"  asked:    {questions.show(question)}"
        if stored is None:
            again = f" for the {part.occurrence + 1}. time" if part.occurrence else ""
            known = [other.nodeid for other in self._session.tests]
            hint = f"\n  recorded tests: {_few(known)}" if _is_test(part) and part.test not in known else ""
            return f"{self._where(part)}nothing was recorded here{again}:\n{asked}{hint}\n{self._same()}"
        return (
            f"{self._where(part)}more was asked than was recorded ({len(stored.asked)} operations here):\n{asked}\n"
            f"  recorded: nothing more{self._cut()}\n{self._same()}"
        )

    def _differs(
        self, part: Part, tape: _Tape, found: Asked, device: int, stream: int | None, question: Question
    ) -> str:
        lines = [
            f"{self._where(part)}something else was asked than was recorded (operation {tape.position + 1} of "
            f"{len(tape.asked)} here, line {found.line} of {LOG}):",
            f"  asked:    {questions.show(question)}",
            f"  recorded: {questions.show(found.question)}",
        ]
        differing = questions.differences(question, found.question)
        if found.device != device:
            differing.insert(0, f"device: number {device} instead of {found.device}")
        if found.stream != stream:
            differing.insert(0, f"stream: number {stream} instead of {found.stream}")
        lines += [f"  differs:  {line}" for line in differing[:_DIFFERENCES]]
        if len(differing) > _DIFFERENCES:
            lines.append(f"            and {len(differing) - _DIFFERENCES} more")
        return "\n".join([*lines, self._same()])

    def _same(self) -> str:
        from pytest_qnn import __version__

        versions = f"pytest-qnn {self._session.version[:40]}"
        versions += "" if self._session.version == __version__ else f", this is {__version__}"
        skipped = self._skipped()
        rest = (
            f" Or it depends on {_few(skipped)}, recorded before and not run this time: replay them too."
            if skipped
            else ""
        )
        return f"Are these the same tests, models, inputs and options as recorded ({versions})? If the change is meant, record again.{rest}"

    def _skipped(self) -> list[str]:
        """Tests that were recorded before the one that runs, and didn't run this time."""
        recorded = [part.nodeid for part in self._session.tests]
        running = self._parts.test.test
        before = recorded[: recorded.index(running)] if running in recorded else []
        return [nodeid for nodeid in dict.fromkeys(before) if nodeid not in self._begun]

    def _cut(self) -> str:
        return "" if self._session.ended else " (the recording is incomplete: the recorder was killed)"


def _same_question(asked: Asked, device: int, stream: int | None, question: Question) -> bool:
    same_place = (asked.device, asked.stream) == (device, stream)
    return same_place and questions.canonical(asked.question) == questions.canonical(question)


def _is_test(part: Part) -> bool:
    return part.name == SESSION or part.name.startswith("test ")


def _title(stored: StoredPart) -> str:
    return stored.nodeid or stored.name


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


class ReplayTransport:
    """A device that answers out of a recording; made by :meth:`Replay.transport`. Implements
    :class:`~pytest_qnn.devices.transport.Transport`.

    All operations raise ReplayError where something else is asked than was recorded.
    """

    def __init__(self, replay: Replay, number: int, serial: str) -> None:
        self._replay, self._number = replay, number
        self.serial, self.address = serial, f"recorded://{serial}"

    def part(self, name: str, shared: bool = True) -> AbstractContextManager[None]:
        """See :func:`pytest_qnn.devices.transport.part`."""
        return self._replay.inside(name, shared)

    def decided(self, what: str, decide: Callable[[], T]) -> T:
        """See :func:`pytest_qnn.devices.transport.decided`."""
        value: T = self._ask({"op": "decided", "what": what})
        return value

    def describe(self, facts: Mapping[str, Any], stand_in: str = "") -> None:
        """Nobody asks here."""

    def _ask(self, question: Question, stream: int | None = None) -> Any:
        return self._replay.ask(self._number, stream, question).answer

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
        done = self._ask(questions.shell(words, cwd, env, stdin, limit))
        return Completed(done["code"], self._replay.load(done["stdout"]), self._replay.load(done["stderr"]))

    def push(self, files: Mapping[str, Path | bytes], *, mode: int = 0o644, timeout: float) -> dict[str, str]:
        return dict(self._ask(questions.push(files, mode)))

    def pull(
        self, files: Mapping[str, Path], *, timeout: float, sizes: Mapping[str, int] | None = None
    ) -> dict[str, str]:
        got = self._ask(questions.pull(files, sizes))
        for name, described in got.items():
            self._replay.save(described, files[name])
        return {name: content.digest_of(described) for name, described in got.items()}

    def read(self, path: str, *, limit: int = 1 << 20, timeout: float = COMMAND_SECONDS) -> bytes:
        return self._replay.load(self._ask({"op": "read", "path": path, "limit": limit}))

    def stat(self, path: str, *, timeout: float = COMMAND_SECONDS) -> FileStat | None:
        found = self._ask({"op": "stat", "path": path})
        return None if found is None else FileStat(found["kind"], found["size"], found["mtime"])

    def start(
        self, words: Sequence[str], *, timeout: float, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Stream:
        return _ReplayStream(self, self._ask(questions.start(words, cwd, env)))

    def reconnect(self, timeout: float) -> None:
        self._ask({"op": "reconnect"})

    def fresh_name(self) -> str:
        return str(self._ask({"op": "fresh_name"}))

    def clock(self) -> float:
        return float(self._ask({"op": "clock"}))

    def wait(self, seconds: float) -> None:
        self._ask({"op": "wait"})

    def close(self) -> None:
        pass


class _ReplayStream:
    """A recorded program; implements :class:`~pytest_qnn.devices.transport.Stream`."""

    def __init__(self, transport: ReplayTransport, number: int) -> None:
        self._transport, self._number = transport, number

    def write(self, *parts: bytes | memoryview, timeout: float) -> None:
        data = content.describe(questions.joined(parts))
        self._transport._ask({"op": "stream write", "data": data}, self._number)

    def read(self, count: int, *, timeout: float) -> bytes:
        return self._transport._replay.load(self._transport._ask({"op": "stream read", "count": count}, self._number))

    def log(self) -> list[str]:
        return list(self._transport._ask({"op": "stream log"}, self._number))

    @property
    def exit_code(self) -> int | None:
        code: int | None = self._transport._ask({"op": "stream exit_code"}, self._number)
        return code

    def close(self) -> None:
        pass
