"""Tensors of a model: names, shapes, types, encodings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# numpy types that travel between processes; anything else is refused by name
DTYPES = frozenset(
    ["float16", "float32", "float64", "bool"] + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
_INTEGER_BITS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32}


@dataclass(frozen=True)
class Encoding:
    """How real numbers are written as integers: ``real = scale * (q - zero_point)``, as ONNX defines it.

    Attributes:
        scale: one number, or one per slice along ``axis``.
        zero_point: same length as ``scale``.
        dtype: integer type, e.g. "uint8".
        axis: axis of a per-channel encoding; None for one scale for the whole tensor.
    """

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    dtype: str
    axis: int | None = None

    @property
    def bits(self) -> int:
        """Bit width."""
        return _INTEGER_BITS[self.dtype]

    @property
    def step(self) -> float:
        """One quantisation step in real units; of a per-channel encoding the smallest, so that no channel is let off."""
        return min(self.scale)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest real number that can be written (per-channel: over all channels)."""
        low, high = (
            (0, 2**self.bits - 1) if self.dtype[0] == "u" else (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        )
        pairs = list(zip(self.scale, self.zero_point, strict=True))
        return min(s * (low - z) for s, z in pairs), max(s * (high - z) for s, z in pairs)


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
