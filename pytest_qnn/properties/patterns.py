"""Tensors in a few words: a kind, a few parameters, a seed, and single elements that were set by hand.

Property-based testing draws such descriptions, never elements: they are small whatever the tensor's size, they shrink to what
a reader understands, and their ``repr`` is Python that makes the same tensor again with the names of
:mod:`pytest_qnn.properties`. Everything is finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_qnn.errors import OptionError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.settings import unknown_name

Array = npt.NDArray[Any]
Index = tuple[int, ...]
Bounds = tuple[float, float]
DEFAULT_BOUNDS = (-3.0, 3.0)  # of floats that nothing is known of


@dataclass(frozen=True)
class Pattern:
    """One tensor, described. Made by the functions below: :func:`constant`, :func:`uniform` and so on.

    Attributes:
        kind: name of the function that makes it.
        shape: of the array.
        dtype: numpy name of its element type.
        within: what its values keep to: an encoding, or the smallest and the largest value.
        seed: of everything random in it.
        value: of a constant.
        amount: of the kind's one parameter; see the function.
        noise: seed and largest magnitude of uniform noise that is added; see :meth:`jittered`.
        edits: elements that were set, by index; see :meth:`but`.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    within: Encoding | Bounds = DEFAULT_BOUNDS
    seed: int = 0
    value: float = 0.0
    amount: float | None = None
    noise: tuple[int, float] | None = None
    edits: tuple[tuple[Index, float], ...] = ()

    def but(self, elements: Mapping[Index, float]) -> Pattern:
        """The same with single elements set: real numbers, or integers where the tensor has no encoding."""
        for index in elements:
            if len(index) != len(self.shape) or not all(0 <= i < n for i, n in zip(index, self.shape, strict=True)):
                raise OptionError(f"there is no element {list(index)} in a tensor of shape {list(self.shape)}")
        merged = dict(self.edits) | {tuple(index): float(value) for index, value in elements.items()}
        return replace(self, edits=tuple(sorted(merged.items())))

    def jittered(self, seed: int, size: float) -> Pattern:
        """The same with uniform noise of at most ``size`` (real units) added: a near-duplicate."""
        return replace(self, noise=(seed, float(size)))

    def array(self) -> Array:
        """The tensor; the same on every call and every host."""
        real = _MAKERS[self.kind](self, np.random.default_rng(self.seed))
        real = np.broadcast_to(np.asarray(real, np.float64), self.shape).copy()
        if self.noise is not None:
            seed, size = self.noise
            real += np.random.default_rng(seed).uniform(-size, size, self.shape)
            if self.kind != "saturating":
                real = np.clip(real, *bounds_of(self.within, self.shape))
        for index, value in self.edits:
            real[index] = value
        return as_dtype(real, self.dtype, self.within)

    @property
    def complexity(self) -> tuple[int, ...]:
        """For ordering: simpler ones first."""
        plain = self.kind == "constant" and self.value == 0
        rank = 0 if plain else 1 + list(_MAKERS).index(self.kind)
        return (len(self.edits), self.noise is not None, rank, self.seed, len(repr(self)))

    def __repr__(self) -> str:
        shown = [repr(self.value)] if self.kind == "constant" else []
        shown.append(repr(list(self.shape)))
        if self.dtype != "float32":
            shown.append(f"dtype={self.dtype!r}")
        if self.kind != "constant":
            shown.append(f"seed={self.seed}")
        if self.amount is not None:
            shown.append(f"{_AMOUNTS[self.kind]}={self.amount!r}")
        needed = self.kind != "constant" or self.noise or (isinstance(self.within, Encoding) and self.dtype[0] in "iu")
        if needed and self.within != DEFAULT_BOUNDS:
            shown.append(f"within={_within(self.within)}")
        text = f"{self.kind}({', '.join(shown)})"
        if self.noise is not None:
            text += f".jittered(seed={self.noise[0]}, size={self.noise[1]!r})"
        if self.edits:
            text += f".but({{{', '.join(f'{index}: {value!r}' for index, value in self.edits)}}})"
        return text


def grid(
    scale: float | Sequence[float], zero_point: int | Sequence[int] = 0, dtype: str = "uint8", axis: int | None = None
) -> Encoding:
    """An encoding, in the few words that a ``repr`` has for it: numbers, or lists of them for an encoding per channel."""
    scales = (scale,) if isinstance(scale, int | float) else tuple(scale)
    zeros = (zero_point,) * len(scales) if isinstance(zero_point, int) else tuple(zero_point)
    return Encoding(tuple(float(s) for s in scales), zeros, dtype, axis)


def _within(within: Encoding | Bounds) -> str:
    if not isinstance(within, Encoding):
        return repr(within)
    if within.block_size is not None:
        return repr(within)
    if len(within.scale) == 1:
        return f"grid({within.scale[0]!r}, {within.zero_point[0]}, {within.dtype!r})"
    return f"grid({list(within.scale)}, {list(within.zero_point)}, {within.dtype!r}, axis={within.axis})"


def as_dtype(real: Array, dtype: str, within: Encoding | Bounds) -> Array:
    """Real numbers as an array of a type: rounded, and kept to what the type can write; integers with an encoding are quantised."""
    if dtype == "bool":
        return np.asarray(real != 0)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        top = float(np.finfo(kind).max)
        return np.asarray(np.clip(real, -top, top).astype(kind))
    if isinstance(within, Encoding):
        return np.asarray(within.quantize(real).astype(kind))
    limits = np.iinfo(kind)
    return np.asarray(np.clip(np.rint(real), float(limits.min), float(limits.max)).astype(kind))


def bounds_of(within: Encoding | Bounds, shape: tuple[int, ...] = ()) -> tuple[Array, Array]:
    """Smallest and largest value, in float64; per channel shaped to be combined with an array of ``shape``."""
    if not isinstance(within, Encoding):
        return np.float64(within[0]), np.float64(within[1])  # type: ignore[return-value]
    low, high = within.limits
    return _real(within, np.float64(low), shape), _real(within, np.float64(high), shape)


def steps_of(within: Encoding, shape: tuple[int, ...]) -> Array:
    """One step, in float64; per channel shaped to be combined with an array of ``shape``."""
    return _per_channel(within, within.scale, shape)


def _real(encoding: Encoding, integers: Any, shape: tuple[int, ...]) -> Array:
    """Real numbers of integers, or of what lies between them, in float64: float32's rounding comes at the very end."""
    zero = _per_channel(encoding, encoding.zero_point, shape)
    return np.asarray((integers - zero) * _per_channel(encoding, encoding.scale, shape))


def _per_channel(encoding: Encoding, values: Sequence[float], shape: tuple[int, ...]) -> Array:
    array = np.asarray(values, np.float64)
    if len(values) == 1:
        return array.reshape(())
    if encoding.axis is None or encoding.block_size is not None or encoding.misfit(shape):
        raise OptionError(f"an encoding with {len(values)} scales doesn't fit a tensor of shape {list(shape)}")
    return array.reshape([-1 if i == encoding.axis % len(shape) else 1 for i in range(len(shape))])


# --- kinds ------------------------------------------------------------------------------------------------------------

_MAKERS: dict[str, Callable[[Pattern, np.random.Generator], Array]] = {}
_AMOUNTS: dict[str, str] = {}
Maker = Callable[[Pattern, np.random.Generator], Any]


def _kind(name: str, amount: str = "") -> Callable[[Maker], Maker]:
    def register(maker: Maker) -> Maker:
        _MAKERS[name] = maker
        if amount:
            _AMOUNTS[name] = amount
        return maker

    return register


def make(kind: str, shape: Sequence[int], **given: Any) -> Pattern:
    """A pattern of a kind by name; ``given`` as for its function."""
    if kind not in _MAKERS:
        raise OptionError(unknown_name("kind of tensor", kind, _MAKERS))
    amount = _AMOUNTS.get(kind)
    if amount is not None and amount in given:
        given["amount"] = given.pop(amount)
    known = {f.name for f in fields(Pattern)}
    for name in given:
        if name not in known:
            raise OptionError(f"{kind}: {unknown_name('argument', name, known)}")
    return Pattern(kind, tuple(shape), **given)


def constant(value: float, shape: Sequence[int], **given: Any) -> Pattern:
    """One value everywhere."""
    return make("constant", shape, value=float(value), **given)


def uniform(shape: Sequence[int], **given: Any) -> Pattern:
    """Uniform over ``within``."""
    return make("uniform", shape, **given)


def edges(shape: Sequence[int], **given: Any) -> Pattern:
    """The ends of ``within``, one step inside of them, and the floats next to them on either side."""
    return make("edges", shape, **given)


def on_steps(shape: Sequence[int], **given: Any) -> Pattern:
    """Exactly what the encoding ``within`` can write."""
    return make("on_steps", shape, **given)


def ties(shape: Sequence[int], **given: Any) -> Pattern:
    """Exactly between two steps of the encoding ``within``, and the floats next to that on either side."""
    return make("ties", shape, **given)


def saturating(shape: Sequence[int], **given: Any) -> Pattern:
    """Mostly beyond ``within``, by up to ``reach`` times its width."""
    return make("saturating", shape, **given)


def denormal(shape: Sequence[int], **given: Any) -> Pattern:
    """Subnormal numbers of the tensor's type, of both signs, and zeros of both signs."""
    return make("denormal", shape, **given)


def sparse(shape: Sequence[int], **given: Any) -> Pattern:
    """Zero (or what in ``within`` is next to it), but for a ``share`` of elements, uniform over ``within``."""
    return make("sparse", shape, **given)


def gradient(shape: Sequence[int], **given: Any) -> Pattern:
    """An image: a ramp in a random direction in each channel."""
    return make("gradient", shape, **given)


def blobs(shape: Sequence[int], **given: Any) -> Pattern:
    """An image: a few soft bright and dark spots on mid-grey in each channel."""
    return make("blobs", shape, **given)


def smooth(shape: Sequence[int], **given: Any) -> Pattern:
    """An image: a random field whose amplitudes fall with the frequency, as in photographs."""
    return make("smooth", shape, **given)


def edge(shape: Sequence[int], **given: Any) -> Pattern:
    """An image: two flat halves, parted by a straight line."""
    return make("edge", shape, **given)


def sines(shape: Sequence[int], **given: Any) -> Pattern:
    """Audio: a sum of three sines along the longest axis."""
    return make("sines", shape, **given)


def chirp(shape: Sequence[int], **given: Any) -> Pattern:
    """Audio: a sine whose frequency rises along the longest axis."""
    return make("chirp", shape, **given)


def bursts(shape: Sequence[int], **given: Any) -> Pattern:
    """Audio: silence, with two bursts of noise along the longest axis."""
    return make("bursts", shape, **given)


@_kind("constant")
def _constant(p: Pattern, rng: np.random.Generator) -> Any:
    return p.value


@_kind("uniform")
def _uniform(p: Pattern, rng: np.random.Generator) -> Array:
    low, high = bounds_of(p.within, p.shape)
    if p.dtype[0] in "iub" and not isinstance(p.within, Encoding):
        return rng.integers(int(low), int(high), p.shape, endpoint=True).astype(np.float64)
    return np.asarray(low + (high - low) * rng.random(p.shape))


@_kind("edges")
def _edges(p: Pattern, rng: np.random.Generator) -> Array:
    low, high = bounds_of(p.within, p.shape)
    inside = steps_of(p.within, p.shape) if isinstance(p.within, Encoding) else (high - low) / 256
    end = rng.random(p.shape) < 0.5
    real = np.where(end, low, high)
    which = rng.integers(0, 4, p.shape)
    real = np.where(which == 1, real + np.where(end, inside, -inside), real)
    return _nudged(real, np.where(which == 2, -1, np.where(which == 3, 1, 0)), p.dtype)


@_kind("on_steps")
def _on_steps(p: Pattern, rng: np.random.Generator) -> Array:
    encoding = _encoding(p)
    low, high = encoding.limits
    return _real(encoding, rng.integers(low, high, p.shape, endpoint=True), p.shape)


@_kind("ties")
def _ties(p: Pattern, rng: np.random.Generator) -> Array:
    encoding = _encoding(p)
    low, high = encoding.limits
    real = _real(encoding, rng.integers(low, high, p.shape) + 0.5, p.shape)
    return _nudged(real, rng.integers(-1, 2, p.shape), p.dtype)


@_kind("saturating", amount="reach")
def _saturating(p: Pattern, rng: np.random.Generator) -> Array:
    low, high = bounds_of(p.within, p.shape)
    width, reach = high - low, 1.0 if p.amount is None else p.amount
    return np.asarray(low - reach * width + (1 + 2 * reach) * width * rng.random(p.shape))


@_kind("denormal")
def _denormal(p: Pattern, rng: np.random.Generator) -> Array:
    if np.dtype(p.dtype).kind != "f":
        raise OptionError(f"denormal: {p.dtype} has no subnormal numbers")
    tiny = np.finfo(p.dtype).smallest_normal
    return np.asarray(rng.uniform(-1, 1, p.shape) * float(tiny) * rng.integers(0, 2, p.shape))


@_kind("sparse", amount="share")
def _sparse(p: Pattern, rng: np.random.Generator) -> Array:
    share = 0.05 if p.amount is None else p.amount
    zero = np.clip(np.zeros(()), *bounds_of(p.within, p.shape))
    return np.where(rng.random(p.shape) < share, _uniform(p, rng), zero)


@_kind("gradient")
def _gradient(p: Pattern, rng: np.random.Generator) -> Array:
    x, y = _plane(p.shape)
    turn, offset = (_each_channel(p.shape, rng, 0, high) for high in (2 * math.pi, 1))
    return _between(p, (x * np.cos(turn) + y * np.sin(turn) + offset) % 1)


@_kind("blobs")
def _blobs(p: Pattern, rng: np.random.Generator) -> Array:
    x, y = _plane(p.shape)
    total: Any = 0.5
    for _ in range(4):
        center_x, center_y = _each_channel(p.shape, rng, 0, 1), _each_channel(p.shape, rng, 0, 1)
        width, height = _each_channel(p.shape, rng, 0.05, 0.3), _each_channel(p.shape, rng, -0.6, 0.6)
        total = total + height * np.exp(-((x - center_x) ** 2 + (y - center_y) ** 2) / width**2)
    return _between(p, np.clip(total, 0, 1))


@_kind("smooth")
def _smooth(p: Pattern, rng: np.random.Generator) -> Array:
    rows, columns = _image_axes(p.shape)
    spectrum = np.fft.fftn(rng.standard_normal(p.shape), axes=(rows, columns))
    ky, kx = (_along(np.fft.fftfreq(p.shape[axis]), axis, len(p.shape)) for axis in (rows, columns))
    frequency = np.sqrt(kx**2 + ky**2)
    field_ = np.fft.ifftn(spectrum / (frequency + 0.5 / max(p.shape)) ** 1.5, axes=(rows, columns)).real
    low, high = field_.min(), field_.max()
    return _between(p, (field_ - low) / (high - low) if high > low else np.full(p.shape, 0.5))


@_kind("edge")
def _edge(p: Pattern, rng: np.random.Generator) -> Array:
    x, y = _plane(p.shape)
    turn, cut = rng.uniform(0, 2 * math.pi), rng.uniform(-0.3, 0.3)
    side = (x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn) > cut
    return _between(p, np.where(side, _each_channel(p.shape, rng, 0, 1), _each_channel(p.shape, rng, 0, 1)))


@_kind("sines")
def _sines(p: Pattern, rng: np.random.Generator) -> Array:
    time = _time(p.shape)
    wave = sum(
        rng.uniform(0.1, 0.33) * np.sin(time * math.pi * rng.uniform(0.001, 0.8) + rng.uniform(0, 6)) for _ in range(3)
    )
    return _between(p, np.asarray(0.5 + 0.5 * wave))


@_kind("chirp")
def _chirp(p: Pattern, rng: np.random.Generator) -> Array:
    time, last = _time(p.shape), rng.uniform(0.1, 0.9)
    phase = math.pi * last * time**2 / (2 * max(p.shape, default=1))
    return _between(p, 0.5 + 0.5 * rng.uniform(0.2, 1) * np.sin(phase))


@_kind("bursts")
def _bursts(p: Pattern, rng: np.random.Generator) -> Array:
    time, length = _time(p.shape), max(p.shape, default=1)
    loud: Any = np.zeros_like(time)
    for _ in range(2):
        loud = loud + np.exp(-(((time - rng.uniform(0, length)) / (1 + length * rng.uniform(0.01, 0.1))) ** 2))
    return _between(p, 0.5 + 0.5 * np.clip(loud, 0, 1) * rng.uniform(-1, 1, p.shape))


KINDS = tuple(_MAKERS)
NEED_ENCODING = ("on_steps", "ties")


def _encoding(p: Pattern) -> Encoding:
    if not isinstance(p.within, Encoding):
        raise OptionError(f"{p.kind}: within must be an encoding: only that has steps")
    return p.within


def _nudged(real: Array, towards: Array, dtype: str) -> Array:
    """The float next to each number, up where ``towards`` is 1, down where it is -1; integers stay."""
    kind = np.dtype(dtype if np.dtype(dtype).kind == "f" else "float64")
    with np.errstate(over="ignore"):
        rounded = real.astype(kind)
    return np.where(towards == 0, rounded, np.nextafter(rounded, np.where(towards > 0, np.inf, -np.inf).astype(kind)))


def _between(p: Pattern, share: Array) -> Array:
    """From 0..1 to the range. Silence and mid-grey are 0 where the range has it in the middle."""
    low, high = bounds_of(p.within, p.shape)
    return np.asarray(low + (high - low) * share)


def _image_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns: the last two axes, or those before the last where that looks like channels."""
    rank = len(shape)
    if rank < 2:
        return -1, -1
    channels_last = rank >= 3 and shape[-1] <= 4 < min(shape[-2], shape[-3])
    return (rank - 3, rank - 2) if channels_last else (rank - 2, rank - 1)


def _along(values: Array, axis: int, rank: int) -> Array:
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)]) if rank else values.reshape(())


def _plane(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Coordinates from 0 to 1 along columns and rows."""
    rank = len(shape)
    if rank == 0:
        return np.zeros(()), np.zeros(())
    rows, columns = _image_axes(shape)
    x = _along(np.linspace(0, 1, shape[columns]), columns, rank)
    return x, (_along(np.linspace(0, 1, shape[rows]), rows, rank) if rank > 1 else np.zeros(1))


def _each_channel(shape: tuple[int, ...], rng: np.random.Generator, low: float, high: float) -> Array:
    """One random number for each plane."""
    rows, columns = (axis % len(shape) for axis in _image_axes(shape)) if shape else (0, 0)
    return np.asarray(rng.uniform(low, high, [1 if i in (rows, columns) else n for i, n in enumerate(shape)]))


def _time(shape: tuple[int, ...]) -> Array:
    """Samples along the longest axis; of several the last."""
    if not shape:
        return np.zeros(())
    axis = max(range(len(shape)), key=lambda i: (shape[i], i))
    return _along(np.arange(shape[axis], dtype=np.float64), axis, len(shape))
