r"""The format of a recording, and the reading of it as what it is: data from somebody else.

A recording is a folder::

    recording.jsonl     what happened, in order: one JSON object per line
    files/<sha256>      content of more than 512 bytes, each once

Lines are only ever added, each in one write, after the files that it names: whenever the recorder is killed, everything up
to there can be replayed; half a line at the end is noticed and left out. The last member of each line, ``"sum"``, is the
first 16 hexadecimal digits of SHA-256 over the sum of the line before (nothing for the first) and the line without this
member, so that altered, missing or exchanged lines are noticed. That is no signature: who can write to the folder can make
another recording.

``"kind"`` says what a line is:

===========  ===========================================================================================================
recording    the first line: ``format`` (this text describes 1), ``pytest_qnn`` (version), ``began`` (ISO 8601, UTC)
device       ``device`` (number, from 0), ``serial``
facts        ``device``, ``facts`` (what the probe found), ``stand_in`` (what it is instead of a Qualcomm device, or "")
part         ``part`` (number, from 0), ``name``, ``occurrence``: operations that belong together, see :mod:`.parts`
test         ``part``, ``nodeid``: this part is a test
outcome      ``part``, ``outcome``: how it ended
asked        ``part``, ``thread`` (number within the part), ``device``, ``stream`` (number, or null), ``question``, and either
             ``answer`` or ``error``; ``began`` and ``took`` in seconds, the former from the start of the recording
artifact     ``key``, ``files``: name -> content, of a compiled model or a runtime; ``executable``: names of files
end          ``outcome``: the recording was closed
===========  ===========================================================================================================

Questions and answers are described in :mod:`.questions` and :mod:`.answers`. Content is ``{"text": ...}`` (UTF-8) or
``{"base64": ...}`` up to 512 bytes, else ``{"sha256": ..., "size": ...}``. Of content that went *to* the device programs and
libraries (ELF files: they are Qualcomm's, and no answer depends on having them) are known by their digest only.

Not in it: paths, user and host names of the recording host, and environment values other than folders
(:func:`.questions.environment`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
LOG, FILES = "recording.jsonl", "files"
LINE_BYTES = 64 << 20
_SUM = re.compile(rb',"sum":"([0-9a-f]{16})"\}$')


class DamagedRecordingError(Exception):
    """The recording isn't one, or was altered: what and where."""


@dataclass(frozen=True)
class Line:
    """A line of the log, with its number from 1."""

    number: int
    values: Mapping[str, Any]

    def get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A member of the declared type.

        Raises:
            DamagedRecordingError: it is missing or of another type.
        """
        return member(self.values, name, kind, f"line {self.number}")

    def number_of(self, name: str) -> int:
        """A number that counts something."""
        return count(self.values, name, f"line {self.number}")


def member(values: object, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """``values[name]``, of the declared type.

    Raises:
        DamagedRecordingError: it isn't.
    """
    if not isinstance(values, Mapping) or name not in values:
        raise DamagedRecordingError(f"{where}: {name!r} is missing")
    value = values[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise DamagedRecordingError(f"{where}: {name!r} is {type(value).__name__}")
    return value


def count(values: object, name: str, where: str) -> int:
    """``values[name]``, a whole number from 0 to 2**63.

    Raises:
        DamagedRecordingError: it isn't.
    """
    value: int = member(values, name, int, where)
    if not 0 <= value < 1 << 63:
        raise DamagedRecordingError(f"{where}: {name!r} is {value}")
    return value


def seconds(values: object, name: str, where: str) -> float:
    """``values[name]``, a time in seconds.

    Raises:
        DamagedRecordingError: it isn't.
    """
    value: float = member(values, name, (int, float), where)
    if not abs(value) < 1e15:
        raise DamagedRecordingError(f"{where}: {name!r} is no time")
    return float(value)


def encode(values: Mapping[str, Any], before: bytes) -> tuple[bytes, bytes]:
    """A line, and its sum; ``before``: sum of the line before."""
    body = json.dumps(values, separators=(",", ":"), allow_nan=False).encode("ascii")
    total = _sum(before, body)
    return body[:-1] + b',"sum":"' + total + b'"}\n', total


def _sum(before: bytes, body: bytes) -> bytes:
    return hashlib.sha256(before + body).hexdigest()[:16].encode()


def read_lines(folder: Path) -> Iterator[Line | None]:
    """The lines of a recording's log; None at the end stands for half a line that was left out.

    Raises:
        DamagedRecordingError: a line isn't what was written.
        OSError: the log can't be read.
    """
    before, number = b"", 0
    with open_plain(folder / LOG) as file:
        while line := file.readline(LINE_BYTES):
            number += 1
            if not line.endswith(b"\n"):
                if len(line) == LINE_BYTES:
                    raise DamagedRecordingError(f"line {number} is longer than {LINE_BYTES >> 20} MiB")
                yield None
                return
            line = line[:-1]
            found = _SUM.search(line)
            body = line[: found.start()] + b"}" if found else line
            if found is None or _sum(before, body) != found[1]:
                raise DamagedRecordingError(
                    f"line {number} was altered, or lines before it are missing: its sum differs"
                )
            before = found[1]
            try:
                values = json.loads(body, parse_constant=_refuse)
            except (ValueError, RecursionError) as error:
                raise DamagedRecordingError(f"line {number} is no JSON ({error})") from None
            if not isinstance(values, dict):
                raise DamagedRecordingError(f"line {number} is no JSON object")
            yield Line(number, values)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def open_plain(path: Path) -> Any:
    """Open a plain file for reading: no link, no FIFO, no device.

    Raises:
        DamagedRecordingError: it is one of those.
        OSError: it can't be read.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if path.is_symlink():
            raise DamagedRecordingError(f"{path.parent.name}/{path.name} is a link") from None
        raise error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise DamagedRecordingError(f"{path.parent.name}/{path.name} is no plain file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise
