"""A folder of folders that appear whole or not at all: shared by processes, bounded in size, safe under kill -9."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock

LOCK_SECONDS = 60.0
DESCRIPTION = "bundle.json"  # whatever has it, under a name of ours, is a bundle
MIB = 1 << 20
_DAY = 86400
_DRAFT, _OLD = ".part", ".old"
_NAME = re.compile(r"[A-Za-z0-9-]+-[0-9a-f]{10}")
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9]+")


class NoRoomError(Exception):
    """The folder is full of what this run kept."""


def folder_name(title: str, *identity: str) -> str:
    """A name for a folder: readable, and never a path, whatever ``title`` and ``identity`` contain.

    The same title and identity give the same name, others another one.
    """
    digest = hashlib.sha256("\0".join((title, *identity)).encode("utf-8", "surrogatepass")).hexdigest()
    plain = _NOT_PLAIN.sub("-", title)[-48:].strip("-")
    return f"{plain or 'case'}-{digest[:10]}"


def bundles_in(folder: Path) -> list[Path]:
    """The bundles in a folder, by name.

    Raises:
        OSError: the folder can't be read.
    """
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / DESCRIPTION).is_file())


@contextmanager
def replaced_folder(folder: Path, limit: float, run_began: float) -> Iterator[Path]:
    """A draft to write to; it takes the place of ``folder`` if the block ends well, and goes if it doesn't.

    Bundles beside it go, the oldest first, until all of them are within the limit; those of this run stay.

    Args:
        limit: of all bundles beside it together with the new one, in bytes.
        run_began: seconds since the epoch.

    Raises:
        OSError: it can't be written, or another process holds the lock for a minute.
        NoRoomError: what this run kept leaves no room.
    """
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    _sweep(parent, host)
    draft = parent / f".{folder.name}.{host}.{os.getpid()}{_DRAFT}"
    _remove(draft)
    try:
        draft.mkdir()
        yield draft
        with FileLock(parent / ".lock", timeout=LOCK_SECONDS):
            _restore(parent)
            _make_room(parent, folder, _size(draft), limit, run_began)
            old = parent / f".{folder.name}{_OLD}"
            if os.path.lexists(folder):
                os.rename(folder, old)
            os.rename(draft, folder)
            _remove(old)
    finally:
        _remove(draft)


def _sweep(parent: Path, host: str) -> None:
    """Remove drafts of processes that were killed."""
    for left in parent.glob(f".*{_DRAFT}"):
        parts = left.name.split(".")
        with suppress(OSError, IndexError):
            if parts[-3] == host and parts[-2].isdigit():
                dead = not psutil.pid_exists(int(parts[-2]))
            else:  # another host's: nobody writes for a day
                dead = time.time() - left.lstat().st_mtime > _DAY
            if dead and _NAME.fullmatch(parts[1]):
                _remove(left)


def _restore(parent: Path) -> None:
    """Put back what a process had moved aside when it was killed. Under the lock."""
    for old in parent.glob(f".*{_OLD}"):
        name = old.name[1 : -len(_OLD)]
        if not _NAME.fullmatch(name):
            continue
        if os.path.lexists(parent / name):
            _remove(old)
        else:
            os.rename(old, parent / name)


def _make_room(parent: Path, folder: Path, needed: int, limit: float, run_began: float) -> None:
    others = [(p.stat().st_mtime, _size(p), p) for p in bundles_in(parent) if p.name != folder.name]
    used = sum(size for _, size, _ in others)
    for began, size, path in sorted(others):
        if used + needed <= limit or began >= run_began:
            break
        _remove(path)
        used -= size
    if used + needed > limit:
        raise NoRoomError(
            f"{parent} has {used / MIB:.1f} MiB of this run's bundles, and this one of {needed / MIB:.1f} MiB would go "
            f"beyond artifacts_limit_mb = {limit / MIB:g}"
        )


def _size(folder: Path) -> int:
    return sum(f.lstat().st_size for f in folder.rglob("*"))


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
