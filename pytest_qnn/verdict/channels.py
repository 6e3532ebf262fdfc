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


class Layout:
    """How an array of ``shape`` is cut into blocks, so that channels can be added up without a second look.

    A block never splits a row of channels along the last axis. Along axis 1, the elements of a channel lie in contiguous
    runs: a block is a whole number of short runs; a long run is cut into blocks of about equal size, of which the block's
    own total is the channel's.

    Attributes:
        row: elements that are kept together for the last axis.
        run: contiguous elements of one channel of axis 1; all elements, if that isn't an axis of channels.
        undivided: whether every block lies within one run.
        needs_blocks: whether channels need the elements of a block, not only their total.
    """

    def __init__(self, shape: tuple[int, ...], largest: int) -> None:
        axes, last = channel_axes(shape), len(shape) - 1
        self.shape, self.largest, self.size = shape, largest, math.prod(shape)
        self.row = shape[-1] if last in axes else 1
        self.run = math.prod(shape[2:]) if 1 in axes and last > 1 else self.size
        self.undivided = 4 * self.run >= largest  # shorter blocks would cost more calls than they save
        self.needs_blocks = last in axes or (1 in axes and not self.undivided)

    def blocks(self) -> Iterator[slice]:
        """Slices of the flattened array, in order; of at most ``largest`` elements, or one row if that is longer."""
        if not self.size:
            return
        if self.undivided:
            rows = self.run // self.row
            parts = -(-rows // max(self.largest // self.row, 1))
            length, whole = -(-rows // parts) * self.row, self.run
        else:
            length, whole = self.largest // self.run * self.run, self.size
        for first in range(0, self.size, whole):
            yield from (
                slice(start, min(start + length, first + whole)) for start in range(first, first + whole, length)
            )


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
        self.e1, self.e2, self.q1, self.q2 = (np.zeros(self.count) for _ in range(4))
        self.eq, self.f2, self.g2, self.h2 = (np.zeros(self.count) for _ in range(4))

    @property
    def y1(self) -> F64:
        """Sum of y."""
        return self.q1 + self.e1

    @property
    def y2(self) -> F64:
        """Sum of y^2. It cancels where y is near zero, to what float32 tells of q^2 (the q that varies)."""
        return np.maximum(self.q2 + 2 * self.eq + self.e2, 0.0)

    def add(self, layout: Layout, start: int, ones: Array, **parts: tuple[Array, float]) -> None:
        """Add a block that starts at flat index ``start``.

        Args:
            ones: ones of the blocks' dtype, at least as many as a block has elements.
            parts: by the name of a total, the block to add up and its total. The block is only looked at where it belongs
                to several channels (see ``Layout.needs_blocks``).
        """
        if self.axis == len(layout.shape) - 1:
            for name, (block, _) in parts.items():
                total = getattr(self, name)
                total += ones[: block.size // self.count] @ block.reshape(-1, self.count)
        elif layout.undivided:
            channel = start // layout.run % self.count
            for name, (_, value) in parts.items():
                getattr(self, name)[channel] += value
        else:
            for name, (block, _) in parts.items():
                lines = block.reshape(-1, layout.run) @ ones[: layout.run]
                channels = np.arange(start // layout.run, start // layout.run + lines.size) % self.count
                total = getattr(self, name)
                total += np.bincount(channels, lines, self.count)
