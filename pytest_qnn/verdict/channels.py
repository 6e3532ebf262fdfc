"""Totals per channel, fed block by block while the block is still in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_CHANNELS = 8192
Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]


def channel_axes(shape: tuple[int, ...]) -> list[int]:
    """Axis 1 and the last axis (axis 0 is the batch), as far as they have 2 to ``MAX_CHANNELS`` channels."""
    axes = sorted({1, len(shape) - 1}) if len(shape) > 1 else []
    return [axis for axis in axes if 2 <= shape[axis] <= MAX_CHANNELS]


def blocks(shape: tuple[int, ...], largest: int) -> Iterator[slice]:
    """Slices of the flattened array, of at most ``largest`` elements: whole rows along the last axis, or parts of one."""
    size, row = math.prod(shape), shape[-1] if shape else 1
    if not size:
        return
    if len(shape) < 2 or row <= largest:
        length = largest // row * row if len(shape) > 1 else largest
        yield from (slice(start, min(start + length, size)) for start in range(0, size, length))
    else:
        for first in range(0, size, row):
            yield from (slice(start, min(start + largest, first + row)) for start in range(first, first + row, largest))


@dataclass
class Channels:
    """Totals along one axis with ``count`` channels; see :mod:`pytest_qnn.verdict.metrics` for the letters.

    Attributes:
        elements: how many elements of each channel have been added.
    """

    axis: int
    count: int
    elements: int = 0

    def __post_init__(self) -> None:
        self.e2, self.g2, self.h2, self.f2 = (np.zeros(self.count) for _ in range(4))
        self.q1, self.q2, self.y1, self.y2 = (np.zeros(self.count) for _ in range(4))

    def add(self, shape: tuple[int, ...], start: int, ones: Array, **blocks: Array) -> None:
        """Add a block (see :func:`blocks`) of an array of ``shape`` that starts at flat index ``start``.

        Args:
            ones: ones of the blocks' dtype, at least as many as a block has elements.
            blocks: by the name of a total, the block to add up.
        """
        row, size = shape[-1], next(iter(blocks.values())).size
        if self.axis == len(shape) - 1:
            for name, block in blocks.items():
                total = getattr(self, name)
                total += ones[: size // row] @ block.reshape(-1, row)
            return
        lines, width, rows_per_channel = -(-size // row), min(row, size), math.prod(shape[self.axis + 1 : -1])
        channel = np.arange(start // row, start // row + lines) // rows_per_channel % self.count
        for name, block in blocks.items():
            total = getattr(self, name)
            total += np.bincount(channel, block.reshape(-1, width) @ ones[:width], self.count)
