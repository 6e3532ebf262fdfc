"""Scale and offset as AIMET 0.6.1, AIMET 1.0.0 and QNN write them, against scale and zero point of ONNX.

They count integers from 0 up, whether or not the encoding is symmetric, and write minus the zero point:
``real = (q + offset) * scale`` with ``q`` in 0 .. 2**bits - 1 and ``offset`` in -(2**bits - 1) .. 0. A symmetric 8-bit encoding has
offset -128. Source: AIMET's encoding specification, the files that aimet-onnx 2.42 writes, ``Qnn_ScaleOffset_t``.
"""

from __future__ import annotations

from collections.abc import Sequence

from pytest_qnn.errors import EncodingError
from pytest_qnn.model.encoding import INTEGER_BITS, Encoding

BITS = tuple(sorted(set(INTEGER_BITS.values())))

# How an offset may be meant, the usual one first: (what it says, zero point on the unsigned grid of an offset)
READINGS = {
    "(q + offset) * scale, q from 0": lambda offset, half: -offset,
    "(q - offset) * scale, q from 0": lambda offset, half: offset,
    "(q + offset) * scale, q from -2**(bits-1)": lambda offset, half: half - offset,
}
USUAL, OPPOSITE, SIGNED = READINGS

Range = tuple[float, float]


def encoding_of(
    scales: Sequence[float],
    offsets: Sequence[int],
    bits: int,
    symmetric: bool | None,
    reading: str = USUAL,
    block_size: int | None = None,
) -> Encoding:
    """The encoding behind scales and offsets; which axis they lie along such files don't say.

    Signed if the file calls it symmetric and the offset agrees, as AIMET reads it; 32 bits, used by biases alone, always.

    Raises:
        EncodingError: no encoding has so many bits, or scales and offsets don't belong together.
    """
    if bits not in BITS:
        raise EncodingError(f"{bits} bits: only {', '.join(map(str, BITS))} can be applied")
    half = 2 ** (bits - 1)
    zero = [READINGS[reading](offset, half) for offset in offsets]
    if bits == 32 or reading == SIGNED or (symmetric and all(z == half for z in zero)):
        return Encoding(tuple(scales), tuple(z - half for z in zero), f"int{bits}", block_size=block_size)
    return Encoding(tuple(scales), tuple(zero), f"uint{bits}", block_size=block_size)


def offsets_of(encoding: Encoding) -> tuple[int, ...]:
    """Offsets of an encoding, in the usual reading.

    Raises:
        EncodingError: it is signed with zero points that aren't 0: read back it would be unsigned.
    """
    if not encoding.signed:
        return tuple(-z for z in encoding.zero_point)
    if not encoding.symmetric:
        hint = "" if encoding.bits == 32 else ": write it on the unsigned grid, the same numbers, with as_unsigned()"
        raise EncodingError(
            f"{encoding.dtype} with zero point {next(z for z in encoding.zero_point if z)} can't be said{hint}"
        )
    return (-(2 ** (encoding.bits - 1)),) * len(encoding.zero_point)


def reading_of(
    scales: Sequence[float],
    offsets: Sequence[int],
    bits: int,
    symmetric: bool | None,
    ranges: Sequence[Range] | None,
) -> str:
    """How the offsets of a file without a version are meant: the reading under which min and max fit.

    Raises:
        EncodingError: none fits, or there is no min and max to tell.
    """
    if ranges is None:
        if any(o > 0 for o in offsets):
            raise EncodingError(
                f"field 'offset' is {max(offsets)}, but QNN's are 0 or below: without 'min' and 'max' nothing tells what it means"
            )
        if symmetric and not all(offsets):
            raise EncodingError(
                f"field 'offset' is 0 and 'is_symmetric' true: that may be {-(2 ** (bits - 1))} .. or 0 .. steps; give 'min' and 'max'"
            )
        return USUAL
    for reading in READINGS:
        found = encoding_of(scales, offsets, bits, symmetric, reading).ranges
        if all(fits(a, b, s) for a, b, s in zip(found, ranges, scales, strict=True)):
            return reading
    meant = ", ".join(
        "{:g} .. {:g}".format(*encoding_of(scales, offsets, bits, symmetric, reading).ranges[0]) for reading in READINGS
    )
    low, high = ranges[0]
    raise EncodingError(
        f"fields 'scale' {scales[0]:g} and 'offset' {offsets[0]} of {bits} bits mean {meant} in turn as offsets are written; "
        f"'min' {low:g} and 'max' {high:g} fit none of them"
    )


def fits(real: Range, stated: Range, scale: float) -> bool:
    """Whether a stated range is the real one, to a step (symmetric ranges leave out the lowest) and to printed digits."""
    allowed = 1.01 * abs(scale) + 1e-4 * abs(stated[1] - stated[0])
    return abs(real[0] - stated[0]) <= allowed and abs(real[1] - stated[1]) <= allowed


def from_range(low: float, high: float, bits: int, symmetric: bool | None) -> tuple[float, int]:
    """Scale and offset of a range alone, in the usual reading; zero gets an integer of its own.

    Raises:
        EncodingError: the range is empty, not finite, or doesn't contain zero.
    """
    if not low <= 0 <= high or low == high or not high - low < float("inf"):
        raise EncodingError(
            f"fields 'min' {low:g} and 'max' {high:g}: a range must contain zero and more, and be finite"
        )
    half = 2 ** (bits - 1)
    if symmetric:
        return max(-low / half, high / (half - 1)), -half
    scale = (high - low) / (2**bits - 1)
    return scale, round(low / scale)
