"""What is asked of a device, as data that can be written, compared and shown.

A question is ``{"op": ..., ...}`` with everything that the device is asked for and nothing about this host: local files
stand as their content. Timeouts, and how long to wait, are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_qnn.devices.transport import OfThisHost
from pytest_qnn.recording.content import check as check_content
from pytest_qnn.recording.content import describe, describe_file, short
from pytest_qnn.recording.log import DamagedRecordingError, member

Question = Mapping[str, Any]
STREAM_OPERATIONS = ("stream write", "stream read", "stream log", "stream exit_code")
OPERATIONS = frozenset(
    (
        "shell",
        "push",
        "pull",
        "read",
        "stat",
        "start",
        "reconnect",
        "fresh_name",
        "clock",
        "wait",
        "decided",
        *STREAM_OPERATIONS,
    )
)
NOT_RECORDED = {"host": "not recorded"}  # in place of content that only says something about this host
_SHOWN, _WORD, _BYTES = 160, 60, 16
_FOLDER_NAMES = ("PATH", "DIR", "HOME", "ROOT", "FOLDER")


def environment(env: Mapping[str, str] | None) -> dict[str, str]:
    """Environment values as they are recorded: those of folders as they are, others, which may be secrets, as a digest."""
    shown = {}
    for name, value in sorted((env or {}).items()):
        digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()
        shown[name] = value if name.upper().endswith(_FOLDER_NAMES) else f"sha256:{digest}"
    return shown


def shell(
    words: Sequence[str], cwd: str | None, env: Mapping[str, str] | None, stdin: bytes, limit: int
) -> dict[str, Any]:
    """A command."""
    return {
        "op": "shell",
        "words": list(words),
        "cwd": cwd,
        "env": environment(env),
        "stdin": dict(NOT_RECORDED) if isinstance(stdin, OfThisHost) else describe(stdin),
        "limit": limit,
    }


def start(words: Sequence[str], cwd: str | None, env: Mapping[str, str] | None) -> dict[str, Any]:
    """A program with a stream."""
    return {"op": "start", "words": list(words), "cwd": cwd, "env": environment(env)}


def push(files: Mapping[str, Path | bytes], mode: int) -> dict[str, Any]:
    """Files to send.

    Raises:
        OSError: a local file can't be read.
    """
    contents = {
        name: describe(file) if isinstance(file, bytes) else describe_file(file) for name, file in files.items()
    }
    return {"op": "push", "files": contents, "mode": f"{mode:o}"}


def pull(files: Mapping[str, Path], sizes: Mapping[str, int] | None) -> dict[str, Any]:
    """Files to fetch."""
    return {"op": "pull", "files": sorted(files), "sizes": dict(sizes or {})}


def joined(parts: Sequence[bytes | memoryview]) -> bytes:
    """What is written to a stream, however it was cut."""
    return b"".join(parts)


# --- comparing --------------------------------------------------------------------------------------------------------


def canonical(question: Question) -> str:
    """A text that two questions share only if they ask the same."""
    return json.dumps(question, sort_keys=True)


def check(question: object, where: str) -> Question:
    """``question``, if it may be one; most of what it holds is compared and never used otherwise.

    Raises:
        DamagedRecordingError: it isn't.
    """
    op = member(question, "op", str, where)
    if not isinstance(question, Mapping) or op not in OPERATIONS:
        raise DamagedRecordingError(f"{where}: unknown operation {op!r}")
    sent = [question.get("stdin")] if op == "shell" else [question.get("data")] if op == "stream write" else []
    if op == "push":
        sent = list(member(question, "files", dict, where).values())
    for described in sent:
        if described != NOT_RECORDED:
            check_content(described, where)
    return question


def show(question: Question) -> str:
    """A question in one line."""
    op = question["op"]
    rest = {name: value for name, value in question.items() if name != "op"}
    words = rest.get("words")
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        text = " ".join(_shorten(shlex.quote(word), _WORD) for word in words)
    elif op in ("push", "pull") and isinstance(rest.get("files"), (list, Mapping)):
        text = ", ".join(map(str, rest["files"]))
    else:
        text = ", ".join(f"{name}={_value(value)}" for name, value in rest.items())
    return _shorten(f"{op} {text}".strip())


def differences(asked: Question, recorded: Question) -> list[str]:
    """What differs, a line for each word, file or other value."""
    if asked["op"] != recorded["op"]:
        return [f"operation: {asked['op']} instead of {recorded['op']}"]
    return _differences("", asked, recorded)


def _differences(name: str, asked: object, recorded: object) -> list[str]:
    if asked == recorded:
        return []
    if isinstance(asked, list) and isinstance(recorded, list):
        found = []
        for index in range(max(len(asked), len(recorded))):
            here = f"{name}[{index}]"
            if index >= len(asked):
                found.append(f"{here}: missing, recorded was {_value(recorded[index])}")
            elif index >= len(recorded):
                found.append(f"{here}: {_value(asked[index])}, recorded was nothing")
            else:
                found += _differences(here, asked[index], recorded[index])
        return found
    if (
        isinstance(asked, Mapping)
        and isinstance(recorded, Mapping)
        and not (_is_content(asked) or _is_content(recorded))
    ):
        found = []
        for key in dict.fromkeys([*recorded, *asked]):
            here = f"{name}[{key!r}]" if name else str(key)
            if key not in asked:
                found.append(f"{here}: missing, recorded was {_value(recorded[key])}")
            elif key not in recorded:
                found.append(f"{here}: {_value(asked[key])}, recorded was nothing")
            else:
                found += _differences(here, asked[key], recorded[key])
        return found
    now, then = _lines(asked), _lines(recorded)
    if now is not None and then is not None:
        return _differences(f"{name} line", now, then) or [f"{name}: ends of lines"]
    data, kept = _bytes(asked), _bytes(recorded)
    if data is None or kept is None:
        return [f"{name}: {_value(asked)} instead of {_value(recorded)}"]
    places = [at for at, (one, other) in enumerate(zip(data, kept, strict=False)) if one != other]
    first = places[0] if places else min(len(data), len(kept))
    what = f"{len(places)} of {len(data)} bytes differ"
    if len(data) != len(kept):
        what = f"{len(data)} bytes instead of {len(kept)}, which differ"
    shown = f"{data[first : first + _BYTES]!r} instead of {kept[first : first + _BYTES]!r}"
    return [f"{name}: {what} from byte {first} on: {shown}"]


def _bytes(value: object) -> bytes | None:
    """A content that stands in its line and isn't a text."""
    try:
        return short(value) if isinstance(value, Mapping) and value.keys() == {"base64"} else None
    except (TypeError, ValueError):
        return None


def _lines(value: object) -> list[str] | None:
    """The lines of a content that is a text of several."""
    text = value.get("text") if isinstance(value, Mapping) else None
    return text.splitlines() if isinstance(text, str) and "\n" in text else None


def _is_content(value: Mapping[str, Any]) -> bool:
    return value.keys() in ({"text"}, {"base64"}, {"sha256", "size"})


def _value(value: object) -> str:
    if isinstance(value, Mapping) and _is_content(value):
        if "text" in value:
            return _shorten(repr(value["text"]))
        if "sha256" in value:
            return f"{value['size']} bytes with digest {str(value['sha256'])[:12]}"
        data = _bytes(value) or b""
        return f"{len(data)} bytes {data[:_BYTES]!r}"
    return _shorten(repr(value))


def _shorten(text: str, limit: int = _SHOWN) -> str:
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
