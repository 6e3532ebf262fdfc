"""Fields of a JSON object, each checked to be what it must be, with the field's name in the complaint."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from pytest_qnn.errors import EncodingError


class Fields:
    """A JSON object whose fields are asked for by name and type. Every method raises EncodingError on a field that is bad."""

    def __init__(self, value: object, where: str) -> None:
        self.where = where
        if not isinstance(value, dict):
            raise EncodingError(f"{where}: must be an object with fields, got {_shown(value)}")
        self.values: dict[str, Any] = value

    def bad(self, field: str, why: str) -> EncodingError:
        """The error about a field."""
        return EncodingError(f"{self.where}: field {field!r} {why}")

    def has(self, field: str) -> bool:
        """Whether it is there and not null."""
        return self.values.get(field) is not None

    def given(self, field: str) -> Any:
        """Its value, whatever it is."""
        if not self.has(field):
            raise self.bad(field, f"is missing; there are {', '.join(sorted(self.values)) or 'none'}")
        return self.values[field]

    def text(self, field: str, known: Sequence[str] = ()) -> str:
        """A string, one of ``known`` if there are such."""
        value = self.given(field)
        if not isinstance(value, str) or not value:
            raise self.bad(field, f"must be a text, got {_shown(value)}")
        if known and value not in known:
            raise self.bad(field, f"must be one of {', '.join(known)}, got {value!r}")
        return value

    def whole(self, field: str) -> int:
        """A whole number; AIMET writes some as 8.0."""
        return self._whole(field, self.given(field))

    def flag(self, field: str) -> bool | None:
        """true, false, or the texts "True" and "False" of AIMET 0.6.1; None where it isn't there."""
        value = self.values.get(field)
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise self.bad(field, f"must be true or false, got {_shown(value)}")

    def numbers(self, field: str) -> list[float]:
        """A number or a list of numbers, as a list. NaN and infinity pass: the checks name them."""
        value = self.given(field)
        return [self._number(field, v) for v in (value if isinstance(value, list) else [value])]

    def wholes(self, field: str) -> list[int]:
        """A whole number or a list of them, as a list."""
        value = self.given(field)
        return [self._whole(field, v) for v in (value if isinstance(value, list) else [value])]

    def array(self, field: str, whole: bool = False) -> tuple[list[Any], tuple[int, ...]]:
        """A number or an even nest of lists of numbers: its numbers in row-major order, and its shape."""
        flat: list[Any] = []

        def walk(value: object) -> tuple[int, ...]:
            if not isinstance(value, list):
                flat.append(self._whole(field, value) if whole else self._number(field, value))
                return ()
            shapes = {walk(v) for v in value}
            if len(shapes) != 1:
                raise self.bad(field, "must be lists of equal length and depth" if value else "has an empty list")
            return (len(value), *shapes.pop())

        shape = walk(self.given(field))
        return flat, shape

    def _number(self, field: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(field, f"must be a number, got {_shown(value)}")
        try:
            return float(value)
        except OverflowError:
            raise self.bad(field, "is too large a number") from None

    def _whole(self, field: str, value: object) -> int:
        number = self._number(field, value)
        if not math.isfinite(number) or number != int(number):
            raise self.bad(field, f"must be a whole number, got {_shown(value)}")
        return int(number)


def _shown(value: object) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
