"""Arrays on disk by content: an ``.npz`` file without pickles per entry (numpy's format, a zip with a CRC-32 per array).

Beside the arrays stands a list of their names and the entry's key: a zip whose directory is damaged may just lack some, and a
file may have been copied to another name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pytest_qnn.artifacts.content_cache import ContentCache, DamagedEntryError
from pytest_qnn.runners.shared_tensors import Array

Arrays = dict[str, Array]
FORMAT = 2  # of the files: part of what a key must be made from


class ArrayCache(ContentCache[Arrays]):
    """Results of computing, by what was computed. Args: the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "reference results", _read, ".npz")

    def compute(self, key: str, compute: Callable[[], Mapping[str, Array]], wait_seconds: float) -> Arrays:
        """The arrays for ``key``: from the folder, else from ``compute``, with the cache or without it."""
        computed: Arrays = {}

        def make(file: Path) -> None:
            computed.update(compute())
            told = np.frombuffer(json.dumps([key, sorted(computed)]).encode(), np.uint8)
            np.savez(file, contents=told, **{_escape(name): array for name, array in computed.items()})  # type: ignore[arg-type]

        found = self.get(key, make, wait_seconds)
        return found if found is not None else computed or dict(compute())


def _read(file: Path) -> Arrays:
    try:
        if not file.is_file() and file.exists():
            raise ValueError("not a regular file")
        with np.load(file, allow_pickle=False) as stored:
            told = json.loads(stored["contents"].tobytes())
            arrays = {_unescape(name): stored[name] for name in stored.files if name != "contents"}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile and numpy raise nearly anything for a damaged file
        raise DamagedEntryError(f"not the arrays that were kept ({error or type(error).__name__})") from error
    if told != [file.stem, sorted(arrays)]:
        raise DamagedEntryError("not the arrays that were kept: others, or not all")
    return arrays


def _escape(name: str) -> str:
    """A tensor name as an archive member: any text is possible in a model, not in a zip."""
    return "t" + name.encode("utf-8", "surrogatepass").hex()


def _unescape(member: str) -> str:
    return bytes.fromhex(member[1:]).decode("utf-8", "surrogatepass")
