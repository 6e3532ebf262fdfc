"""Arrays on disk by content: computed once per key, shared by processes, safe under kill -9.

An entry is an ``.npz`` file without pickles (numpy's format, a zip with a CRC-32 per array). It appears under its name by
``os.replace``, so nobody sees half of one; one that doesn't read back is thrown away and computed again. A lock per key
lets one process compute while the others wait. A folder that can't be written is done without, and said.
"""

from __future__ import annotations

import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from pytest_qnn.runners.shared_tensors import Array

Arrays = dict[str, Array]


class CacheUnusableWarning(UserWarning):
    """The cache can't be used; results are computed each time."""


class ArrayCache:
    """A size-bounded folder of arrays.

    Args:
        folder: made if it is missing.
        limit_mib: size to which :meth:`prune` brings the folder.
    """

    def __init__(self, folder: Path, limit_mib: float) -> None:
        self.folder = folder
        self.limit_mib = limit_mib
        self.hits = self.misses = 0
        self._complained = False

    def get(self, key: str, compute: Callable[[], Mapping[str, Array]], wait_seconds: float) -> Arrays:
        """The arrays for ``key`` (hexadecimal): from the folder, else from ``compute``.

        While another process computes the same key this one waits, for at most ``wait_seconds``, then computes itself.
        """
        entry = self.folder / key[:2] / f"{key}.npz"
        found = self._read(entry)
        if found is not None:
            return self._hit(found)
        lock: FileLock | None = None
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(entry.with_suffix(".lock"))
            lock.acquire(timeout=wait_seconds)
        except Timeout:
            lock = None
        except OSError as error:
            lock = None
            self._complain(error)
        try:
            found = self._read(entry) if lock is not None else None
            if found is not None:
                return self._hit(found)
            self.misses += 1
            arrays = dict(compute())
            self._write(entry, arrays)
            return arrays
        finally:
            if lock is not None:
                lock.release()

    def _hit(self, found: Arrays) -> Arrays:
        self.hits += 1
        return found

    def _read(self, entry: Path) -> Arrays | None:
        try:
            with np.load(entry, allow_pickle=False) as stored:
                arrays = {_unescape(name): stored[name] for name in stored.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError):
            with suppress(OSError):  # damaged: whoever finds it first makes room for a new one
                entry.unlink()
            return None
        with suppress(OSError):
            os.utime(entry)  # the time of last use, for prune()
        return arrays

    def _write(self, entry: Path, arrays: Arrays) -> None:
        temporary = ""
        try:
            with tempfile.NamedTemporaryFile(dir=entry.parent, suffix=".part", delete=False) as f:
                temporary = f.name
                np.savez(f, **{_escape(name): array for name, array in arrays.items()})  # type: ignore[arg-type]
            os.replace(temporary, entry)
        except OSError as error:
            self._complain(error)
            with suppress(OSError):
                if temporary:
                    os.unlink(temporary)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            with suppress(CacheUnusableWarning):  # where warnings are errors, this one still isn't the test's fault
                warnings.warn(
                    f"the cache of reference results {self.folder} can't be used ({error.strerror or error}): references "
                    "are computed anew each time. Free some space there or set cache_dir",
                    CacheUnusableWarning,
                    stacklevel=2,
                )

    def prune(self) -> int:
        """Remove the least recently used entries until the folder keeps its limit; returns how many went.

        Also removes what killed processes left: partial files and locks older than a day.
        """
        import time

        entries, removed, day_ago = [], 0, time.time() - 86400
        try:
            for file in self.folder.glob("??/*"):
                with suppress(OSError):
                    stat = file.stat()
                    if file.suffix == ".npz":
                        entries.append((stat.st_mtime, stat.st_size, file))
                    elif stat.st_mtime < day_ago:
                        file.unlink()
        except OSError:
            return 0
        total = sum(size for _, size, _ in entries)
        for _, size, file in sorted(entries):
            if total <= self.limit_mib * (1 << 20):
                break
            with suppress(OSError):
                file.unlink()
                total -= size
                removed += 1
        return removed


def _escape(name: str) -> str:
    """A tensor name as an archive member: any text is possible in a model, not in a zip."""
    return "t" + name.encode("utf-8", "surrogatepass").hex()


def _unescape(member: str) -> str:
    return bytes.fromhex(member[1:]).decode("utf-8", "surrogatepass")
