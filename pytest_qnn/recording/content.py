"""Bytes in a recording: short ones in the line itself, others in a file named by their SHA-256, each once."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from pytest_qnn.model.replaced_file import replaced_file
from pytest_qnn.recording.log import DamagedRecordingError, count, member, open_plain

INLINE_BYTES = 512
DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
_PROGRAM = b"\x7fELF"

Content = Mapping[str, Any]


def describe(data: bytes | memoryview) -> dict[str, Any]:
    """How ``data`` stands in a line."""
    if len(data) > INLINE_BYTES:
        return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    data = bytes(data)
    try:
        return {"text": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode("ascii")}


def describe_file(path: Path) -> dict[str, Any]:
    """How a file's content stands in a line.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        head = file.read(INLINE_BYTES + 1)
        if len(head) <= INLINE_BYTES:
            return describe(head)
        digest, size = hashlib.sha256(head), len(head)
        for chunk in _chunks(file):
            digest.update(chunk)
            size += len(chunk)
    return {"sha256": digest.hexdigest(), "size": size}


def digest_of(content: Content) -> str:
    """SHA-256 of a content."""
    return str(content["sha256"]) if "sha256" in content else hashlib.sha256(short(content)).hexdigest()


def short(content: Content) -> bytes:
    """The bytes of a content that stands in its line."""
    return content["text"].encode("utf-8") if "text" in content else base64.b64decode(content["base64"], validate=True)


def size_of(content: Content) -> int:
    """Bytes of a content."""
    return int(content["size"]) if "size" in content else len(short(content))


def check(content: object, where: str) -> Content:
    """``content``, if it is one.

    Raises:
        DamagedRecordingError: it isn't.
    """
    if isinstance(content, Mapping) and content.keys() == {"sha256", "size"}:
        if not DIGEST.fullmatch(member(content, "sha256", str, where)):
            raise DamagedRecordingError(f"{where}: 'sha256' is no digest")
        count(content, "size", where)
        return content
    if isinstance(content, Mapping) and content.keys() in ({"text"}, {"base64"}):
        (name,) = content
        member(content, name, str, where)
        try:
            if len(short(content)) <= INLINE_BYTES:
                return content
        except (binascii.Error, ValueError):
            pass
    raise DamagedRecordingError(f"{where}: no content")


# --- writing ----------------------------------------------------------------------------------------------------------


class ChangedError(Exception):
    """A file changed while it was stored."""


class FileStore:
    """``files/`` of a recording, for writing. Args: the folder, which exists."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, data: bytes | memoryview, content: Content, sent: bool = False) -> None:
        """Store ``data``, which ``content`` describes. ``sent``: to the device, so that programs need not be kept.

        Raises:
            OSError: it can't be written.
        """
        if "sha256" in content and not (sent and bytes(data[:4]) == _PROGRAM):
            file = self._folder / content["sha256"]
            if not file.exists():
                with replaced_file(file) as draft:
                    draft.write_bytes(data)

    def keep_file(self, path: Path, content: Content, sent: bool = False) -> None:
        """Store a file of any size, as :meth:`keep`.

        Raises:
            ChangedError: it isn't what ``content`` says.
            OSError: it can't be read or written.
        """
        if "sha256" not in content or (self._folder / content["sha256"]).exists():
            return
        with path.open("rb") as source:
            if sent and source.read(len(_PROGRAM)) == _PROGRAM:
                return
            source.seek(0)
            with replaced_file(self._folder / content["sha256"]) as draft:
                if _copy(source, draft) != content["sha256"]:
                    raise ChangedError(path.name)


def _copy(source: IO[bytes], target: Path) -> str:
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for chunk in _chunks(source):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


# --- reading ----------------------------------------------------------------------------------------------------------


def load(folder: Path, content: Content) -> bytes:
    """The bytes of a content; ``folder``: ``files/``.

    Raises:
        DamagedRecordingError: its file is missing, or another one.
    """
    if "sha256" not in content:
        return short(content)
    with _opened(folder, content) as file:
        data: bytes = file.read(content["size"] + 1)
    if hashlib.sha256(data).hexdigest() != content["sha256"]:
        raise DamagedRecordingError(f"files/{content['sha256']} was altered: its digest differs")
    return data


def save(folder: Path, content: Content, target: Path) -> None:
    """Write a content to a file, which appears in one piece; ``folder``: ``files/``.

    Raises:
        DamagedRecordingError: its file is missing, or another one.
        OSError: ``target`` can't be written.
    """
    with replaced_file(target) as draft:
        if "sha256" not in content:
            draft.write_bytes(short(content))
            return
        with _opened(folder, content) as file:
            if _copy(file, draft) != content["sha256"]:
                raise DamagedRecordingError(f"files/{content['sha256']} was altered: its digest differs")


def verify(folder: Path, content: Content) -> None:
    """Make sure that a content is there and whole.

    Raises:
        DamagedRecordingError: it isn't.
    """
    if "sha256" in content:
        digest = hashlib.sha256()
        with _opened(folder, content) as file:
            for chunk in _chunks(file):
                digest.update(chunk)
        if digest.hexdigest() != content["sha256"]:
            raise DamagedRecordingError(f"files/{content['sha256']} was altered: its digest differs")


def _opened(folder: Path, content: Content) -> IO[bytes]:
    name = str(content["sha256"])
    try:
        file: IO[bytes] = open_plain(folder / name)
    except OSError as error:
        raise DamagedRecordingError(f"files/{name} can't be read ({error.strerror})") from None
    size = os.fstat(file.fileno()).st_size
    if size != content["size"]:
        file.close()
        raise DamagedRecordingError(f"files/{name} has {size} bytes instead of {content['size']}")
    return file
