"""Tensors of a model: names, shapes, types, encodings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pytest_qnn.model.encoding import Encoding

# numpy types that travel between processes; anything else is refused by name
DTYPES = frozenset(
    ["float16", "float32", "float64", "bool"] + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output.

    Attributes:
        name: as the model spells it.
        dtype: numpy name of the element type, e.g. "float32".
        shape: sizes; a name where a dimension is not bound.
        encoding: of the quantised values behind it; None where it isn't quantised.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    encoding: Encoding | None = None

    @property
    def unbound(self) -> tuple[str, ...]:
        """Names of the dimensions that have no size."""
        return tuple(d for d in self.shape if isinstance(d, str))

    def describe(self) -> str:
        """``name: float32[1, 3, 224, 224]``"""
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


def digest_of_arrays(arrays: dict[str, npt.NDArray[np.generic]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of ``arrays``."""
    import hashlib

    h = hashlib.sha256()
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        h.update(f"{name}\0{a.dtype.str}\0{a.shape}\0".encode())
        h.update(a.reshape(-1).view(np.uint8).data if a.size else b"")
    return h.hexdigest()
