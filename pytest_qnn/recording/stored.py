"""A recording as it was read: checked, and sorted by part."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_qnn.errors import ReplayError
from pytest_qnn.recording import answers, content, questions
from pytest_qnn.recording.log import FILES, FORMAT, LOG, DamagedRecordingError, Line, read_lines, seconds
from pytest_qnn.recording.questions import Question

_FILE_NAME = re.compile(r"[^/\0]{1,255}")


@dataclass(frozen=True)
class Asked:
    """One recorded operation.

    Attributes:
        line: number of its line.
        thread, device, stream: numbers.
        answer: checked; meaningless where there is an error.
        error: as data, or None.
        began, took: seconds.
    """

    line: int
    thread: int
    device: int
    stream: int | None
    question: Question
    answer: Any
    error: Mapping[str, Any] | None
    began: float
    took: float


@dataclass
class StoredPart:
    """A part: its name and occurrence, what was asked in it, and of which test it is, if of one."""

    name: str
    occurrence: int
    asked: list[Asked] = field(default_factory=list)
    nodeid: str = ""
    outcome: str = ""

    @property
    def threads(self) -> list[list[Asked]]:
        """What each thread asked, in order."""
        found: dict[int, list[Asked]] = {}
        for asked in self.asked:
            found.setdefault(asked.thread, []).append(asked)
        return [found[thread] for thread in sorted(found)]


@dataclass
class StoredDevice:
    """A device: its serial, what was found out about it, and what it is instead of a Qualcomm device."""

    serial: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    stand_in: str = ""


@dataclass
class StoredSession:
    """A recording.

    Attributes:
        folder: where it lies.
        version: of pytest-qnn that made it.
        began: when, ISO 8601.
        artifacts: key -> file name -> content, of the last time it was kept.
        executable: key -> names of those that are.
        ended: whether it was closed; else ``cut``: whether half a line was left out at its end.
        outcome: how the session ended.
    """

    folder: Path
    version: str = ""
    began: str = ""
    parts: list[StoredPart] = field(default_factory=list)
    devices: list[StoredDevice] = field(default_factory=list)
    artifacts: dict[str, Mapping[str, content.Content]] = field(default_factory=dict)
    executable: dict[str, frozenset[str]] = field(default_factory=dict)
    ended: bool = False
    cut: bool = False
    outcome: str = ""

    @property
    def files(self) -> Path:
        """Where contents lie."""
        return self.folder / FILES

    @property
    def tests(self) -> list[StoredPart]:
        """The parts that are tests, in the order in which they ran."""
        return [part for part in self.parts if part.nodeid]

    @property
    def operations(self) -> int:
        """How many operations there are."""
        return sum(len(part.asked) for part in self.parts)


def read_session(folder: Path) -> StoredSession:
    """Read a recording. Contents in files are checked when they are used.

    Raises:
        ReplayError: there is none, or it is damaged.
    """
    try:
        return _read(folder)
    except FileNotFoundError:
        raise ReplayError(
            f"{folder}: there is no recording ({LOG} is missing): make one with --qnn-record, or correct the path"
        ) from None
    except DamagedRecordingError as error:
        raise ReplayError(
            f"{folder / LOG}: not a recording as it was made: {error}. Copy it again, or record again"
        ) from None
    except OSError as error:
        raise ReplayError(
            f"{folder}: the recording can't be read ({error.strerror}): correct the path or the rights"
        ) from None


def _read(folder: Path) -> StoredSession:
    session = StoredSession(folder)
    first = True
    for line in read_lines(folder):
        if line is None:
            session.cut = True
            break
        kind = line.get("kind", str)
        if first != (kind == "recording"):
            raise DamagedRecordingError(
                f"line {line.number}: {kind!r} {'begins it' if first else 'stands there again'}"
            )
        first = False
        if session.ended:
            raise DamagedRecordingError(f"line {line.number}: something follows its end")
        if kind not in _READERS:
            raise DamagedRecordingError(f"line {line.number}: unknown kind {kind!r}")
        _READERS[kind](session, line)
    if first:
        raise DamagedRecordingError("it is empty")
    return session


def _recording(session: StoredSession, line: Line) -> None:
    version = line.get("pytest_qnn", str)
    if line.number_of("format") != FORMAT:
        raise DamagedRecordingError(
            f"it has format {line.values['format']} (pytest-qnn {version[:40]}), this release reads {FORMAT}"
        )
    session.version, session.began = version, line.get("began", str)


def _device(session: StoredSession, line: Line) -> None:
    if line.number_of("device") != len(session.devices):
        raise DamagedRecordingError(f"line {line.number}: devices out of order")
    session.devices.append(StoredDevice(line.get("serial", str)))


def _facts(session: StoredSession, line: Line) -> None:
    device = _at(session.devices, line, "device")
    device.facts, device.stand_in = line.get("facts", dict), line.get("stand_in", str)


def _part(session: StoredSession, line: Line) -> None:
    if line.number_of("part") != len(session.parts):
        raise DamagedRecordingError(f"line {line.number}: parts out of order")
    session.parts.append(StoredPart(line.get("name", str), line.number_of("occurrence")))


def _test(session: StoredSession, line: Line) -> None:
    _at(session.parts, line, "part").nodeid = line.get("nodeid", str)


def _outcome(session: StoredSession, line: Line) -> None:
    _at(session.parts, line, "part").outcome = line.get("outcome", str)


def _asked(session: StoredSession, line: Line) -> None:
    where = f"line {line.number}"
    part = _at(session.parts, line, "part")
    _at(session.devices, line, "device")
    stream = line.get("stream", (int, type(None)))
    question = questions.check(line.values.get("question"), where)
    if (stream is not None) != question["op"].startswith("stream "):
        raise DamagedRecordingError(f"{where}: 'stream' doesn't fit {question['op']!r}")
    error = answer = None
    if "error" in line.values:
        error = answers.check_error(line.values["error"], where)
    elif "answer" in line.values:
        answer = answers.check(line.values["answer"], question, where)
    else:
        raise DamagedRecordingError(f"{where}: 'answer' is missing")
    began, took = (seconds(line.values, name, where) for name in ("began", "took"))
    part.asked.append(
        Asked(
            line.number, line.number_of("thread"), line.values["device"], stream, question, answer, error, began, took
        )
    )


def _artifact(session: StoredSession, line: Line) -> None:
    files = line.get("files", dict)
    for name, described in files.items():
        if not _FILE_NAME.fullmatch(name) or name in (".", ".."):
            raise DamagedRecordingError(f"line {line.number}: {name!r} is no file name")
        content.check(described, f"line {line.number}")
    key, executable = line.get("key", str), line.get("executable", list)
    if not all(isinstance(name, str) for name in executable):
        raise DamagedRecordingError(f"line {line.number}: 'executable' is no list of names")
    session.artifacts[key] = files
    session.executable[key] = frozenset(executable)


def _end(session: StoredSession, line: Line) -> None:
    session.ended, session.outcome = True, line.get("outcome", str)


def _at(entries: list[Any], line: Line, name: str) -> Any:
    number = line.number_of(name)
    if number >= len(entries):
        raise DamagedRecordingError(f"line {line.number}: {name} {number} is unknown")
    return entries[number]


_READERS: Mapping[str, Callable[[StoredSession, Line], None]] = {
    "recording": _recording,
    "device": _device,
    "facts": _facts,
    "part": _part,
    "test": _test,
    "outcome": _outcome,
    "asked": _asked,
    "artifact": _artifact,
    "end": _end,
}


def problems(session: StoredSession) -> list[str]:
    """What is wrong with a recording that can be read: files of answers and artifacts that are missing or altered."""
    found = []
    if session.cut:
        found.append("the last line is incomplete and was left out: the recorder was killed while it wrote")
    elif not session.ended:
        found.append(
            "it was never closed: the recorder was killed, could not write, or is still at work; up to there it can be replayed"
        )
    needed = [
        described
        for part in session.parts
        for asked in part.asked
        if asked.error is None
        for described in answers.contents(asked.answer, asked.question)
    ]
    needed += [described for files in session.artifacts.values() for described in files.values()]
    for digest, described in {content.digest_of(c): c for c in needed if "sha256" in c}.items():
        try:
            content.verify(session.files, described)
        except (DamagedRecordingError, OSError) as error:
            found.append(
                str(error) if isinstance(error, DamagedRecordingError) else f"files/{digest}: {error.strerror}"
            )
    return found


def bytes_asked(question: Question) -> int:
    """Bytes that a checked question sends to the device."""
    if question["op"] == "push":
        return sum(content.size_of(sent) for sent in question["files"].values())
    sent = question.get("stdin") or question.get("data") or {}
    return 0 if "host" in sent else content.size_of(sent) if sent else 0
