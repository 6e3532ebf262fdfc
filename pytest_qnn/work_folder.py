"""Folders for work in progress: gone when it ends, and what a killed process left is swept by the next one that works there.

A folder is locked (``flock``) as long as its owner lives, forked children of it included; one that can be locked by somebody
else has no owner any more. Where a file system can't lock, nothing is swept.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pytest_qnn.errors import TargetError

_PREFIX = "pytest-qnn-work-"
_OURS = re.compile(rf"\.?{_PREFIX}[a-z0-9_]{{8}}")
_swept: set[tuple[int, int]] = set()  # device and inode of the folders that this process has looked through


@contextmanager
def work_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder that is gone afterwards.

    Args:
        parent: where, so that a result can be renamed into place (the folder's name starts with a dot there); by default
            where temporary files go.

    Raises:
        OSError: it can't be made.
    """
    where = Path(tempfile.gettempdir() if parent is None else parent)
    _sweep(where)
    prefix = _PREFIX if parent is None else f".{_PREFIX}"
    while True:
        with tempfile.TemporaryDirectory(dir=where, prefix=prefix, ignore_cleanup_errors=True) as name:
            lock = _claim(name)
            if lock is None:
                continue  # swept before it was locked: another one
            try:
                yield Path(name)
            finally:
                os.close(lock)
            return


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder among the temporary files that is gone afterwards.

    Raises:
        TargetError: none can be made.
    """
    with ExitStack() as life:
        try:
            folder = life.enter_context(work_folder())
        except OSError as error:
            raise TargetError(f"no temporary folder can be made: {error.strerror or error}: see TMPDIR") from error
        yield folder


def _claim(folder: str) -> int | None:
    """A descriptor that holds a new folder's lock; None: somebody swept it."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    if _locked(lock) is False or not os.fstat(lock).st_nlink:
        os.close(lock)
        return None
    return lock


def _locked(folder: int) -> bool | None:
    """Lock a folder; False: somebody else has it, None: there are no locks here."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sweep(where: Path) -> None:
    """Remove what processes that died left in a folder; once per process and folder."""
    with suppress(OSError):
        found = where.stat()
        if (found.st_dev, found.st_ino) in _swept:
            return
        _swept.add((found.st_dev, found.st_ino))
        with os.scandir(where) as entries:
            left = [e.path for e in entries if _OURS.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
        for path in left:
            with suppress(OSError):  # gone meanwhile, or another user's
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    if os.fstat(folder).st_uid == os.geteuid() and _locked(folder):
                        shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(folder)
