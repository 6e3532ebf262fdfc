"""How a tensor's real numbers are written as integers: ONNX's QuantizeLinear and DequantizeLinear, in numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_qnn.errors import EncodingError, InputError

INTEGER_BITS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32}


@dataclass(frozen=True)
class Encoding:
    """How real numbers are written as integers: ``real = scale * (q - zero_point)``, as ONNX defines it.

    Attributes:
        scale: one number, or one per slice along ``axis``, or one per block in row-major order.
        zero_point: same length as ``scale``.
        dtype: integer type, e.g. "uint8".
        axis: axis of a per-channel encoding, or the one that blocks are counted along; None for one scale for the whole
            tensor, and where a file says that the scales are per channel but not of which axis (``unbound``).
        block_size: elements along ``axis`` that share a scale (ONNX opset 21); None without blocks.
        scale_shape: of a blocked encoding: the shape of the array of scales. It has the tensor's rank.
    """

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    dtype: str
    axis: int | None = None
    block_size: int | None = None
    scale_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in INTEGER_BITS:
            raise EncodingError(f"an encoding can't have type {self.dtype!r}. Known: {', '.join(INTEGER_BITS)}")
        if not self.scale or len(self.scale) != len(self.zero_point):
            raise EncodingError(
                f"an encoding needs as many zero points as scales, at least one: got {len(self.scale)} scales and "
                f"{len(self.zero_point)} zero points"
            )
        if self.block_size is not None and self.block_size < 1:
            raise EncodingError(f"block_size must be at least 1, got {self.block_size}")
        if self.scale_shape is not None and math.prod(self.scale_shape) != len(self.scale):
            raise EncodingError(f"scale_shape {self.scale_shape} doesn't hold {len(self.scale)} scales")
        if len(self.scale) == 1 and self.block_size is None:
            object.__setattr__(self, "axis", None)  # one channel and the whole tensor are the same thing

    @property
    def bits(self) -> int:
        """Bit width."""
        return INTEGER_BITS[self.dtype]

    @property
    def signed(self) -> bool:
        """Whether the integers are signed."""
        return self.dtype[0] != "u"

    @property
    def symmetric(self) -> bool:
        """Signed, with every zero point at 0."""
        return self.signed and not any(self.zero_point)

    @property
    def unbound(self) -> bool:
        """Whether only a model can tell along which axis the scales lie: some file formats don't say it."""
        if self.block_size is not None:
            return self.axis is None or self.scale_shape is None
        return len(self.scale) > 1 and self.axis is None

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer."""
        return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.signed else (0, 2**self.bits - 1)

    @property
    def step(self) -> float:
        """One quantisation step in real units; of a per-channel encoding the smallest, so that no channel is let off."""
        return min(self.scale)

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """Smallest and largest real number that can be written, for each scale."""
        low, high = self.limits
        return tuple((s * (low - z), s * (high - z)) for s, z in zip(self.scale, self.zero_point, strict=True))

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest real number that can be written (per-channel: over all channels)."""
        lows, highs = zip(*self.ranges, strict=True)
        return min(lows), max(highs)

    def as_unsigned(self) -> Encoding:
        """The encoding of the same real numbers by unsigned integers: every integer and zero point moved by half the range.

        Raises:
            EncodingError: 32 bits: no operator takes unsigned ones.
        """
        if not self.signed:
            return self
        if self.bits == 32:
            raise EncodingError("int32 has no unsigned counterpart")
        moved = tuple(z + 2 ** (self.bits - 1) for z in self.zero_point)
        return Encoding(self.scale, moved, f"u{self.dtype}", self.axis, self.block_size, self.scale_shape)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why an encoding with an axis doesn't fit a tensor of ``shape``; None if it does."""
        if self.axis is None:
            return None
        if not -len(shape) <= self.axis < len(shape):
            return f"axis {self.axis} doesn't exist in a tensor of shape {list(shape)}"
        axis = self.axis % len(shape)
        if self.block_size is None:
            if shape[axis] == len(self.scale):
                return None
            return f"{len(self.scale)} scales don't fit axis {axis} of a tensor of shape {list(shape)}"
        if self.scale_shape == blocks_of(shape, axis, self.block_size):
            return None
        return (
            f"scales of shape {list(self.scale_shape or ())} in blocks of {self.block_size} along axis {axis} don't fit a tensor of "
            f"shape {list(shape)}"
        )

    def quantize(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Integers of real numbers: ``saturate(round_half_to_even(x / scale) + zero_point)``, in float32 as onnxruntime does.

        int32, which QuantizeLinear doesn't have, follows the same formula.

        Args:
            array: floats of any shape that fits the encoding; float64 is rounded to float32 first.

        Returns:
            Same shape; numpy's type of that name, int8 and uint8 for 4 bits.

        Raises:
            EncodingError: a scale that is not above 0 and finite, or a shape that doesn't fit.
            InputError: not floats, or NaN among them, which no integer stands for.
        """
        x = np.asarray(array)
        if x.dtype.kind != "f":
            raise InputError(f"quantize takes floats, got {x.dtype}")
        scale, zero = self._arrays(x.shape)
        low, high = self.limits
        with np.errstate(over="ignore"):  # beyond float32 is beyond every range
            q = np.rint(x.astype(np.float32, copy=False) / scale)
        if np.isnan(q).any():
            raise InputError("quantize got NaN: no integer stands for it")
        if self.bits == 32:  # float32 can't hold the sums and limits of 32 bits; it holds those of 16
            q = q.astype(np.float64)
        return np.asarray(np.clip(q + zero.astype(q.dtype), low, high).astype(self._storage))

    def dequantize(self, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Real numbers of integers: ``(q - zero_point) * scale``, the difference exact, the product in float32.

        Args:
            array: integers of any numpy type.

        Returns:
            float32, same shape.

        Raises:
            EncodingError: a scale that is not above 0 and finite, or a shape that doesn't fit.
            InputError: not integers.
        """
        q = np.asarray(array)
        if q.dtype.kind not in "iu":
            raise InputError(f"dequantize takes integers, got {q.dtype}")
        scale, zero = self._arrays(q.shape)
        return np.asarray((q.astype(np.int64) - zero).astype(np.float32) * scale)

    @property
    def _storage(self) -> str:
        return self.dtype.replace("int4", "int8")

    def _arrays(self, shape: tuple[int, ...]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Scales and zero points, shaped to be combined with an array of ``shape``."""
        with np.errstate(over="ignore"):
            scale = np.asarray(self.scale, np.float64).astype(np.float32)
        zero = np.asarray(self.zero_point, np.int64)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            bad = next(s for s, f in zip(self.scale, scale, strict=True) if not (np.isfinite(f) and f > 0))
            raise EncodingError(f"scale {bad:g} is not above 0 and finite in float32")
        if self.unbound:
            raise EncodingError(f"{len(self.scale)} scales, but of which axis is not known: resolve it with the model")
        if self.axis is None:
            return scale.reshape(()), zero.reshape(())
        if problem := self.misfit(shape):
            raise EncodingError(problem)
        axis = self.axis % len(shape)
        if self.block_size is None:
            spread = [-1 if i == axis else 1 for i in range(len(shape))]
            return scale.reshape(spread), zero.reshape(spread)
        assert self.scale_shape is not None
        cut = tuple(slice(0, size) for size in shape)
        scale = np.repeat(scale.reshape(self.scale_shape), self.block_size, axis)[cut]
        return scale, np.repeat(zero.reshape(self.scale_shape), self.block_size, axis)[cut]


def blocks_of(shape: tuple[int, ...], axis: int, block_size: int) -> tuple[int, ...]:
    """Shape of the scales of a tensor that has one per block of ``block_size`` along ``axis``."""
    return tuple(-(-size // block_size) if i == axis else size for i, size in enumerate(shape))
