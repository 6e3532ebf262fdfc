"""Tensors in memory that two processes share.

An arena is an anonymous memory file (``memfd_create(2)``): it needs no name, no space in ``/dev/shm``, and the kernel
frees it with the last process that holds it, whatever that process died of.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64
Array = npt.NDArray[Any]


class Arena:
    """A growing stretch of shared memory. Both sides open it by file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls, name: str) -> Arena:
        """A new, empty arena."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create(name, os.MFD_CLOEXEC))
        with tempfile.TemporaryFile(prefix=name) as file:  # not Linux: a file that has lost its name already
            return cls(os.dup(file.fileno()))

    def reserve(self, size: int) -> mmap.mmap:
        """The memory, at least ``size`` bytes long, grown if need be."""
        if self._map is None or len(self._map) < size:
            have = os.fstat(self.fd).st_size
            if have < size:
                have = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
                os.ftruncate(self.fd, have)
            self._map = mmap.mmap(self.fd, have)  # views of the old mapping keep it alive until they are gone
        return self._map

    def write(self, arrays: Mapping[str, Array]) -> list[dict[str, Any]]:
        """Copy ``arrays`` in, one after the other; returns where each one lies."""
        layout, end = [], 0
        for name, array in arrays.items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            layout.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "offset": start})
            end = start + array.nbytes
        memory = self.reserve(max(end, 1))
        for place, array in zip(layout, arrays.values(), strict=True):
            np.copyto(_view(memory, place), array)
        return layout

    def views(self, layout: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
        """Arrays over the shared memory itself: valid until the next ``write`` of either side."""
        size = max((p["offset"] + _nbytes(p) for p in layout), default=0)
        memory = self.reserve(max(size, 1))
        return {p["name"]: _view(memory, p) for p in layout}

    def close(self) -> None:
        """Give the memory back."""
        self._map = None
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _nbytes(place: Mapping[str, Any]) -> int:
    count = 1
    for size in place["shape"]:
        count *= size
    return int(count * np.dtype(place["dtype"]).itemsize)


def _view(memory: mmap.mmap, place: Mapping[str, Any]) -> Array:
    return np.ndarray(tuple(place["shape"]), np.dtype(place["dtype"]), buffer=memory, offset=place["offset"])
