"""Explicit limits for one output, and where they came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pytest_qnn.errors import OptionError


def _number(where: str, name: str, value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        raise OptionError(f"{where}: {name} must be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)


def check_fields(kind: type, where: str, values: Mapping[str, Any]) -> None:
    """Raise OptionError if ``values`` has a key that the dataclass ``kind`` lacks, or is empty."""
    from pytest_qnn.settings import unknown_name

    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise OptionError(f"{where}: {unknown_name('argument', key, known)}")
    if all(value is None for value in values.values()):
        raise OptionError(f"{where}: needs at least one of {', '.join(known)}")


@dataclass(frozen=True)
class Tolerance:
    """Limits that one output must keep; a limit of None isn't applied.

    Attributes:
        steps: largest ``|y - q|`` in quantisation steps of the output, against the QDQ reference q.
        absolute: with ``relative``: ``|y - q| <= absolute + relative * |q|`` for every element.
        relative: see ``absolute``.
        sqnr_db: smallest signal-to-quantisation-noise ratio of y against the float32 reference, in dB.
        cosine: smallest cosine similarity of y with the float32 reference, -1 to 1.
        top_k: the float32 reference's best class (last axis) must be among y's k best, in every row.

    ``q`` is the QDQ model's reference (for a model that isn't quantised, its own float32 reference).
    """

    steps: float | None = None
    absolute: float | None = None
    relative: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_fields(Tolerance, "tolerance", vars(self))
        bounds = {
            "steps": (0, math.inf),
            "absolute": (0, math.inf),
            "relative": (0, math.inf),
            "sqnr_db": (-200, 400),
            "cosine": (-1, 1),
            "top_k": (1, 1_000_000),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None:
                _number("tolerance", name, value, low, high)
        if self.top_k is not None and int(self.top_k) != self.top_k:
            raise OptionError(f"tolerance: top_k must be a whole number, got {self.top_k!r}")

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> Tolerance:
        """Build from a marker's or a table's values; errors name ``where``.

        Raises:
            OptionError: unknown argument, bad value, or nothing given.
        """
        check_fields(cls, where, values)
        try:
            return cls(**values)
        except OptionError as error:
            raise OptionError(f"{where}: {str(error).removeprefix('tolerance: ')}") from None

    def __str__(self) -> str:
        given = [f"{f.name}={getattr(self, f.name):g}" for f in fields(self) if getattr(self, f.name) is not None]
        return ", ".join(given)
