"""A point in time by which an operation is over, however many steps it has."""

from __future__ import annotations

import math
import time

LONGEST = 7 * 86400.0


class Deadline:
    """``seconds`` from now, on the monotonic clock; at most a week.

    Raises:
        ValueError: ``seconds`` is not a number.
    """

    __slots__ = ("at", "seconds")

    def __init__(self, seconds: float) -> None:
        if math.isnan(seconds):
            raise ValueError("a timeout must be a number of seconds")
        self.seconds = min(seconds, LONGEST)
        self.at = time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds that are left; zero or less once it has passed."""
        return self.at - time.monotonic()

    def sooner(self, seconds: float) -> Deadline:
        """``seconds`` from now, but not later than this one."""
        return Deadline(min(seconds, self.left()))
