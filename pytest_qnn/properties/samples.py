"""One set of inputs whose tensors are described, so that its ``repr`` says what it is and makes it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pytest_qnn.model.inputs import SeededSample
from pytest_qnn.properties.patterns import Pattern


class Sample(SeededSample):
    """Inputs by name, made from :class:`Pattern` descriptions; a dict of arrays for whoever runs it.

    Names that are no Python identifiers come as one dict: ``Sample({"serving:0": constant(0.0, [1, 4])})``.

    Attributes:
        patterns: the descriptions, by input.
    """

    passing = True  # drawn once and never seen again: its references aren't worth keeping on disk

    def __init__(self, patterns: Mapping[str, Pattern] | None = None, /, **named: Pattern) -> None:
        self.patterns: dict[str, Pattern] = {**(patterns or {}), **named}
        super().__init__({name: pattern.array() for name, pattern in self.patterns.items()})

    def __repr__(self) -> str:
        if all(name.isidentifier() for name in self.patterns):
            return f"Sample({', '.join(f'{name}={pattern!r}' for name, pattern in self.patterns.items())})"
        return f"Sample({{{', '.join(f'{name!r}: {pattern!r}' for name, pattern in self.patterns.items())}}})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.patterns,)

    @property
    def complexity(self) -> tuple[int, ...]:
        """For ordering: simpler ones first."""
        parts = [pattern.complexity for pattern in self.patterns.values()]
        return tuple(map(sum, zip(*parts, strict=True)))


class DescribedArray(np.ndarray[Any, Any]):
    """An array that says how it was made, as long as it is as it was made.

    Attributes:
        pattern: the description; None for what was computed from it.
    """

    pattern: Pattern | None

    @classmethod
    def of(cls, pattern: Pattern) -> DescribedArray:
        """The array that ``pattern`` describes; read-only, so that it goes on to be that."""
        array = pattern.array().view(cls)
        array.pattern = pattern
        array.flags.writeable = False
        return array

    def __array_finalize__(self, source: Any) -> None:
        self.pattern = None

    def __repr__(self) -> str:
        return super().__repr__() if self.pattern is None else f"{self.pattern!r}.array()"

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.pattern is None else (DescribedArray.of, (self.pattern,))
