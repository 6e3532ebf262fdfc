"""What a device answered, or the error that it ended with, as data; and back, checked.

===================  ================================================================================================
question             answer
===================  ================================================================================================
shell                ``{"code", "stdout": content, "stderr": content}``
push                 ``{path: SHA-256}``
pull                 ``{path: content}``
read, stream read    content
stat                 ``{"kind", "size", "mtime"}``, or null
start                number of the stream, from 0
fresh_name           16 characters from 0-9a-f
clock                seconds
stream log           list of lines
stream exit_code     number, or null
decided              JSON data
others               null
===================  ================================================================================================

An error is ``{"class", "message", "attributes"}``: one of the classes in :data:`ERRORS`, with this host's paths and
the ADB server's address taken out of the message. Anything else that ended an operation (Ctrl-C, a fault of the tool) is recorded by its name and can't be
repeated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_qnn import errors
from pytest_qnn.devices.transport import Completed, FileStat
from pytest_qnn.errors import TargetError
from pytest_qnn.recording import content, questions
from pytest_qnn.recording.log import DamagedRecordingError, count, member, seconds
from pytest_qnn.recording.questions import Question

ERRORS: Mapping[str, type[Exception]] = {
    **{
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type)
        and issubclass(kind, TargetError)
        and kind not in (errors.ReplayError, errors.RecordingError)
    },
    "ValueError": ValueError,
    "TypeError": TypeError,
    "OSError": OSError,
}
_NAME = re.compile(r"[0-9a-f]{16}")
_ERRNOS = range(1, 200)


def encode_error(error: BaseException, hidden: Mapping[str, str]) -> dict[str, Any]:
    """An error as data. ``hidden``: what its message must not say, and what instead, see :func:`scrub`."""
    if isinstance(error, OSError):
        return {"class": "OSError", "message": os.strerror(error.errno or 5), "attributes": {"errno": error.errno or 5}}
    name = next((kind.__name__ for kind in type(error).__mro__ if ERRORS.get(kind.__name__) is kind), "")
    attributes = {"log": scrub(error.log, hidden)} if isinstance(error, TargetError) and error.log else {}
    return {"class": name or type(error).__name__, "message": scrub(str(error), hidden), "attributes": attributes}


def scrub(text: str, hidden: Mapping[str, str]) -> str:
    """``text`` with each key of ``hidden`` replaced by its value, and without the user's folder."""
    for name in sorted(hidden, key=len, reverse=True):
        text = text.replace(name, hidden[name])
    home = os.path.expanduser("~")
    if home not in ("/", "/root", "~"):
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return text


def scrub_all(value: Any, hidden: Mapping[str, str]) -> Any:
    """JSON data with all its texts scrubbed."""
    if isinstance(value, str):
        return scrub(value, hidden)
    if isinstance(value, Mapping):
        return {scrub(str(name), hidden): scrub_all(inner, hidden) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [scrub_all(inner, hidden) for inner in value]
    return value


def check_error(values: object, where: str) -> dict[str, Any]:
    """An error as data, if it is one.

    Raises:
        DamagedRecordingError: it isn't.
    """
    name, message = member(values, "class", str, where), member(values, "message", str, where)
    attributes = member(values, "attributes", dict, where)
    if name == "OSError" and attributes.get("errno") not in _ERRNOS:
        raise DamagedRecordingError(f"{where}: 'errno' is none")
    return {"class": name, "message": message, "attributes": attributes}


def decode_error(values: Mapping[str, Any]) -> Exception | None:
    """The error to raise again; None if it is none that can be repeated."""
    kind = ERRORS.get(values["class"])
    if kind is None:
        return None
    if kind is OSError:
        return OSError(values["attributes"]["errno"], values["message"])
    error = kind(values["message"])
    if isinstance(error, TargetError) and isinstance(values["attributes"].get("log"), str):
        error.log = values["attributes"]["log"]
    return error


# --- answers ----------------------------------------------------------------------------------------------------------


def check(answer: Any, question: Question, where: str) -> Any:
    """``answer``, if ``question`` may have it.

    Raises:
        DamagedRecordingError: it isn't one.
    """
    op = question["op"]
    if op == "shell":
        code = member(answer, "code", int, where)
        if not -(1 << 31) <= code < 1 << 31:
            raise DamagedRecordingError(f"{where}: 'code' is {code}")
        content.check(answer.get("stdout"), where)
        content.check(answer.get("stderr"), where)
    elif op == "push":
        files = member(question, "files", dict, where)
        good = (
            isinstance(answer, dict) and answer.keys() == files.keys() and questions.NOT_RECORDED not in files.values()
        )
        if not good or any(answer[name] != content.digest_of(files[name]) for name in files):
            raise DamagedRecordingError(f"{where}: 'answer' has not the digests of the pushed files")
    elif op == "pull":
        if not isinstance(answer, dict) or sorted(answer) != member(question, "files", list, where):
            raise DamagedRecordingError(f"{where}: 'answer' has other files than were asked for")
        for value in answer.values():
            content.check(value, where)
    elif op in ("read", "stream read"):
        content.check(answer, where)
        if op == "stream read" and content.size_of(answer) != question.get("count"):
            raise DamagedRecordingError(f"{where}: 'answer' has not the bytes that were asked for")
    elif op == "stat":
        if answer is not None:
            if member(answer, "kind", str, where) not in ("file", "folder", "other"):
                raise DamagedRecordingError(f"{where}: 'kind' is {answer['kind']!r}")
            count(answer, "size", where)
            member(answer, "mtime", int, where)
    elif op == "start":
        count({"answer": answer}, "answer", where)
    elif op == "fresh_name":
        if not isinstance(answer, str) or not _NAME.fullmatch(answer):
            raise DamagedRecordingError(f"{where}: 'answer' is no fresh name")
    elif op == "clock":
        seconds({"answer": answer}, "answer", where)
    elif op == "stream log":
        if not isinstance(answer, list) or not all(isinstance(line, str) for line in answer):
            raise DamagedRecordingError(f"{where}: 'answer' is no list of lines")
    elif op == "stream exit_code":
        if answer is not None:
            member({"answer": answer}, "answer", int, where)
    elif op != "decided" and answer is not None:
        raise DamagedRecordingError(f"{where}: 'answer' is {type(answer).__name__}")
    return answer


def contents(answer: Any, question: Question) -> list[content.Content]:
    """The contents that a checked answer is made of."""
    op = question["op"]
    if op == "shell":
        return [answer["stdout"], answer["stderr"]]
    if op == "pull":
        return list(answer.values())
    return [answer] if op in ("read", "stream read") else []


def completed(answer: Mapping[str, Any], files: Path) -> Completed:
    """The answer to ``shell``. Raises DamagedRecordingError."""
    return Completed(answer["code"], content.load(files, answer["stdout"]), content.load(files, answer["stderr"]))


def file_stat(answer: Mapping[str, Any] | None) -> FileStat | None:
    """The answer to ``stat``."""
    return None if answer is None else FileStat(answer["kind"], answer["size"], answer["mtime"])
