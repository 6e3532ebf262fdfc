"""Things on disk by content: made once per key, shared by processes, bounded in size, safe under kill -9.

An entry is a file or a folder whose name is the key. It is made under another name and appears under its own by
``os.replace``, so nobody sees half of one. A lock per key (``flock``: the kernel frees it when its holder dies) lets one
process make an entry while the others wait. An entry that doesn't read back is thrown away and made again, and that is
said. A folder that can't be written is done without, and said.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from filelock import FileLock, Timeout

T = TypeVar("T")
_DRAFT, _LOCK = ".part", ".lock"
_OURS = re.compile(r"[0-9a-f]{64}(\.|$)")  # a user may have chosen a folder with other things in it
_DAY = 86400
MIB = 1 << 20


class CacheUnusableWarning(UserWarning):
    """The cache can't be used; what it would keep is made each time."""


class CacheDamagedWarning(UserWarning):
    """An entry of the cache was damaged; it was made again."""


class DamagedEntryError(Exception):
    """Raised by a reader: this entry isn't what was written."""


@dataclass(frozen=True)
class Entry:
    """One entry.

    Attributes:
        key: its name, without suffix.
        size: bytes, of all its files.
        used: time of last use, in seconds since the epoch.
    """

    key: str
    path: Path
    size: int
    used: float


class ContentCache(Generic[T]):
    """A folder of entries of one kind.

    Args:
        folder: made if it is missing.
        what: of what it is a cache, for messages, e.g. "reference results".
        read: gives an entry's value; raises FileNotFoundError, or :class:`DamagedEntryError` where it isn't whole.
        suffix: of the entries' names.
    """

    def __init__(self, folder: Path, what: str, read: Callable[[Path], T], suffix: str = "") -> None:
        self.folder, self.what, self.suffix = folder, what, suffix
        self._read_entry = read
        self.hits = self.misses = self.damaged = 0
        self.enabled = True
        self._not_waited_for: set[str] = set()
        self._complained = False

    def path(self, key: str) -> Path:
        """Where the entry for ``key`` lies, or would."""
        return self.folder / key[:2] / f"{key}{self.suffix}"

    def get(self, key: str, make: Callable[[Path], None], wait_seconds: float) -> T | None:
        """The value for ``key`` (hexadecimal): read, or made by ``make`` at the path that it is given.

        While another process makes the same one this one waits, for at most ``wait_seconds``.

        Returns:
            The value; None if the cache can't be used (said in a warning), is off, or the other process takes too long.

        Raises:
            Whatever ``make`` raises, but for OSError, which means that the folder can't be written.
        """
        if not self.enabled:
            return None
        entry = self.path(key)
        found = self._read(entry)
        if found is not None:
            self.hits += 1
            return found
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(entry.with_name(key + _LOCK))
            lock.acquire(timeout=0 if key in self._not_waited_for else wait_seconds)
            os.utime(lock.lock_file)  # sweep() spares those that were taken lately
        except Timeout:
            self._not_waited_for.add(key)  # whoever makes it may have been stopped: once is enough
            return None
        except OSError as error:
            self._complain(error)
            return None
        try:
            found = self._read(entry, make_room=True)
            if found is not None:
                self.hits += 1
                return found
            self.misses += 1
            return self._make(entry, make)
        finally:
            lock.release()

    def _make(self, entry: Path, make: Callable[[Path], None]) -> T | None:
        with suppress(OSError):
            for left in entry.parent.glob(f"{entry.name}.*{_DRAFT}"):  # by a maker that was killed
                _remove(left)
        draft = None
        try:
            draft = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f"{entry.name}.", suffix=_DRAFT))
            make(draft / entry.name)
            os.replace(draft / entry.name, entry)
            return self._read_entry(entry)
        except (OSError, DamagedEntryError) as error:
            self._complain(error)
            return None
        finally:
            if draft is not None:
                _remove(draft)

    def _read(self, entry: Path, make_room: bool = False) -> T | None:
        try:
            value = self._read_entry(entry)
        except DamagedEntryError as error:
            if make_room:  # under the lock: whoever holds it makes a new one
                self.damaged += 1
                _remove(entry)
                self._warn(CacheDamagedWarning, f"{entry}: {error}: it was thrown away and is made again")
            return None
        except OSError:
            return None
        with suppress(OSError):
            os.utime(entry)  # the time of last use
        return value

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            self._warn(
                CacheUnusableWarning,
                f"the cache of {self.what} {self.folder} can't be used ({reason}): they are made anew each time. Free some "
                "space there or set cache_dir",
            )

    def _warn(self, category: type[Warning], text: str) -> None:
        with suppress(category):  # where warnings are errors, this one still isn't the test's fault
            warnings.warn(text, category, stacklevel=4)

    # --- upkeep -------------------------------------------------------------------------------------------------------

    def entries(self) -> Iterator[Entry]:
        """All entries, in no order."""
        for path in self._files():
            if path.name == path.name[:64] + self.suffix:
                with suppress(OSError):
                    stat = path.stat()
                    size = sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else stat.st_size
                    yield Entry(path.name.removesuffix(self.suffix), path, size, stat.st_mtime)

    def read(self, entry: Entry) -> T:
        """The value of an entry.

        Raises:
            DamagedEntryError: it isn't whole.
            OSError: it can't be read, or is gone.
        """
        return self._read_entry(entry.path)

    def remove(self, entry: Entry) -> bool:
        """Remove an entry; whether that went well. Who uses it at this moment makes it again."""
        _remove(entry.path)
        return not entry.path.exists()

    def sweep(self) -> int:
        """Remove what killed processes left: drafts that nobody is at, locks that nobody took for a day.

        Returns:
            How many went.
        """
        removed = 0
        for path in self._files():
            with suppress(OSError, Timeout):
                if path.suffix == _DRAFT:
                    key = path.name.partition(".")[0]
                    with FileLock(path.with_name(key + _LOCK), timeout=0):
                        _remove(path)
                        removed += 1
                elif path.suffix == _LOCK and path.stat().st_mtime < time.time() - _DAY:
                    with FileLock(path, timeout=0):
                        path.unlink()
        return removed

    def _files(self) -> list[Path]:
        try:
            return [f for f in self.folder.glob("??/*") if _OURS.match(f.name) and f.name[:2] == f.parent.name]
        except OSError:
            return []


def prune(caches: list[ContentCache[T]], limit_mib: float) -> int:
    """Remove the least recently used entries of all ``caches`` until they keep the limit together, and what is left over.

    Returns:
        How many entries went.
    """
    for cache in caches:
        cache.sweep()
    entries = sorted(((e, cache) for cache in caches for e in cache.entries()), key=lambda pair: pair[0].used)
    total, removed = sum(e.size for e, _ in entries), 0
    for entry, cache in entries:
        if total <= limit_mib * MIB:
            break
        if cache.remove(entry):
            total -= entry.size
            removed += 1
    return removed


def _remove(path: Path) -> None:
    """Remove a file or a folder, as far as possible. A folder goes by another name first: nobody sees half of it."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            if path.suffix != _DRAFT:
                doomed = path.with_name(f"{path.name}.{os.getpid()}{_DRAFT}")
                os.replace(path, doomed)
                path = doomed
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
