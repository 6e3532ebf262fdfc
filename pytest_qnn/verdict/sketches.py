"""What of an output is kept element by element: a thinned copy of each row, and the ends of the range."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MAX_ROWS = 64
MAX_BATCH = 64  # a longer first axis isn't a batch
ROW_ELEMENTS = 1 << 14  # 64 rows of it in float32, of q and y, are 8 MiB
KEPT = 16  # elements kept at each end of the range
Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]


class Rows:
    """A thinned copy of each row of q and y, to compare rows with each other.

    A row is one entry of the batch axis (the first, where it has 2 to ``MAX_BATCH`` entries), else a whole sample. Every
    k-th element is kept, so that about ``ROW_ELEMENTS`` remain.

    Attributes:
        share: part of a row's elements that is kept.
    """

    def __init__(self) -> None:
        self.q: list[F32] = []
        self.y: list[F32] = []
        self.share = 1.0

    def add(self, shape: tuple[int, ...], q: Array, y: Array) -> None:
        """Add one sample of ``shape``, given flat."""
        count = shape[0] if len(shape) > 1 and 1 < shape[0] <= MAX_BATCH else 1
        length = q.size // count
        stride = -(-length // ROW_ELEMENTS)
        self.share = len(range(0, length, stride)) / length
        for row in range(min(count, MAX_ROWS - len(self.q))):
            part = slice(row * length, (row + 1) * length, stride)
            kept_q, kept_y = q[part].astype(np.float32), y[part].astype(np.float32)
            usable = np.isfinite(kept_q) & np.isfinite(kept_y)
            self.q.append(np.where(usable, kept_q, np.float32(0)))
            self.y.append(np.where(usable, kept_y, np.float32(0)))


class RangeEnd:
    """The elements with the largest q (``sign`` 1) or the smallest (``sign`` -1), with their y; values times ``sign``.

    Attributes:
        q, y: up to ``KEPT`` elements, by descending q.
        limit: the largest y of all.
    """

    def __init__(self, sign: int) -> None:
        self.sign = sign
        self.q = np.empty(0)
        self.y = np.empty(0)
        self.limit = -np.inf

    def add(self, q: Array, y: Array, q_end: float, y_end: float) -> None:
        """Add a flat block of finite values whose extreme values on this side are ``q_end`` and ``y_end``."""
        self.limit = max(self.limit, self.sign * y_end)
        full = self.q.size == KEPT
        if full and self.sign * q_end <= self.q[-1]:
            return
        at = np.arange(q.size)
        if full:
            last = float(self.q[-1])
            at = np.flatnonzero(q > last if self.sign > 0 else q < -last)
        if at.size > KEPT:
            at = at[np.argpartition(self.sign * q[at], -KEPT)[-KEPT:]]
        all_q = np.concatenate([self.q, self.sign * q[at].astype(np.float64)])
        all_y = np.concatenate([self.y, self.sign * y[at].astype(np.float64)])
        best = np.argsort(-all_q, kind="stable")[:KEPT]
        self.q, self.y = all_q[best], all_y[best]

    def saturated(self, margin: float) -> int:
        """How many kept elements should lie beyond ``limit`` by more than ``margin`` but all lie at it; else 0."""
        beyond = self.q > self.limit + margin
        at_limit = self.y[beyond] >= self.limit - 5e-4 * margin
        return int(beyond.sum()) if bool(at_limit.all()) else 0
