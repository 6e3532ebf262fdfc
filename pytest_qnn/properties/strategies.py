"""Hypothesis strategies for inputs, batches, encodings, SoCs and backend options.

What is drawn of a tensor is its description (:mod:`pytest_qnn.properties.patterns`), a handful of choices whatever its size.
Simpler kinds come first, so examples shrink towards a constant 0 without edits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pytest_qnn.devices.soc import SOCS, find_soc, soc_of_arch
from pytest_qnn.errors import OptionError
from pytest_qnn.model.encoding import INTEGER_BITS, Encoding
from pytest_qnn.model.inputs import check_bound, input_specs
from pytest_qnn.model.onnx_file import Model
from pytest_qnn.model.tensors import DTYPES, TensorSpec
from pytest_qnn.properties.patterns import (
    DEFAULT_BOUNDS,
    KINDS,
    NEED_ENCODING,
    Bounds,
    Pattern,
    bounds_of,
    steps_of,
)
from pytest_qnn.properties.samples import DescribedArray, Sample
from pytest_qnn.settings import unknown_name
from pytest_qnn.targets.options import OPTIONS

GROUPS = {
    "in_range": ("uniform",),
    "image": ("gradient", "blobs", "smooth", "edge"),
    "audio": ("sines", "chirp", "bursts"),
}
NEAR_DUPLICATES = "near_duplicates"  # of batches only
ALL_KINDS = (
    "constant",
    "in_range",
    "edges",
    "on_steps",
    "ties",
    "sparse",
    "denormal",
    "image",
    "audio",
    "saturating",
    NEAR_DUPLICATES,
)
IN_RANGE = tuple(kind for kind in ALL_KINDS if kind != "saturating")
LEAST_PICTURE, LEAST_SOUND = 4, 16  # elements along an axis, below which there is nothing to correlate
INTEGER_BOUNDS = (0.0, 9.0)  # of integers that nothing is known of: indices would lead out of a table
BITS = (8, 16, 4)
ModelOrSession = str | os.PathLike[str] | Model | Any


# --- tensors ----------------------------------------------------------------------------------------------------------


def tensors(
    shape: Sequence[int],
    dtype: str = "float32",
    encoding: Encoding | None = None,
    kinds: Collection[str] = IN_RANGE,
    within: Bounds | None = None,
) -> st.SearchStrategy[DescribedArray]:
    """Arrays of one shape and type; all finite.

    Args:
        shape: of every array.
        dtype: numpy name: floats, integers or bool.
        encoding: of the tensor; for integers, what they stand for. Without one there are no steps, ties and saturation.
        kinds: what may be drawn, out of :data:`ALL_KINDS`, or functions of :mod:`~pytest_qnn.properties.patterns` by name. Those
            that the tensor can't have are left out.
        within: smallest and largest value, where there is no encoding. Default: -3 and 3, for integers 0 and 9.

    Raises:
        OptionError: an unknown type or kind, no kind that the tensor can have, or an encoding that doesn't fit.
    """
    draw_one = _drawer(tuple(shape), dtype, encoding, _known(kinds), within)

    @st.composite
    def tensor(draw: st.DrawFn) -> DescribedArray:
        return DescribedArray.of(draw_one(draw))

    return tensor()


def inputs_of(
    model: ModelOrSession,
    kinds: Collection[str] = IN_RANGE,
    *,
    within: Mapping[str, Bounds] | None = None,
    dimensions: Mapping[str, int] | None = None,
) -> st.SearchStrategy[Sample]:
    """Input sets for a model: dicts of arrays whose ``repr`` makes them again.

    A file is read when the first example is drawn, so that it may be named in a decorator before it exists.

    Args:
        model: ONNX file, model or session.
        kinds: see :func:`tensors`; default: whatever lies in the inputs' ranges.
        within: smallest and largest value of inputs without encodings, by name: of real data, or of indices.
        dimensions: sizes for named dynamic dimensions, for a file.

    Raises:
        OptionError: an unknown kind or input; InputError: a dynamic dimension is left open. For a file both come when drawing.
    """
    known = _known(kinds)

    def samples() -> st.SearchStrategy[Sample]:
        draw_sample = _sample_drawer(input_specs(model, dimensions), known, within or {})
        return st.composite(draw_sample)()

    return st.deferred(samples) if isinstance(model, str | os.PathLike) else samples()


def batches_of(
    model: ModelOrSession,
    size: int = 8,
    kinds: Collection[str] = IN_RANGE,
    *,
    within: Mapping[str, Bounds] | None = None,
    dimensions: Mapping[str, int] | None = None,
) -> st.SearchStrategy[list[Sample]]:
    """Lists of at most ``size`` input sets for ``session.run``: one round trip to a device for all of them.

    Most are of full size; failing ones shrink to a single sample. With the kind "near_duplicates" a sample may be another one
    with noise of a fraction of a step. Other arguments as for :func:`inputs_of`.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise OptionError(f"size must be a whole number of at least 1, got {size!r}")
    known = _known(kinds)

    def batches() -> st.SearchStrategy[list[Sample]]:
        return _batches(_sample_drawer(input_specs(model, dimensions), known, within or {}), size, known)

    return st.deferred(batches) if isinstance(model, str | os.PathLike) else batches()


def _known(kinds: Collection[str]) -> tuple[str, ...]:
    if isinstance(kinds, str):
        raise OptionError(f"kinds takes a list of kinds, got {kinds!r}: put it in a list")
    known = (*ALL_KINDS, *(kind for kind in KINDS if kind not in ALL_KINDS))
    for kind in kinds:
        if kind not in known:
            raise OptionError(f"kinds: {unknown_name('kind', kind, known)}")
    return tuple(kinds)


def _sample_drawer(
    specs: Sequence[TensorSpec], kinds: tuple[str, ...], within: Mapping[str, Bounds]
) -> Callable[[st.DrawFn], Sample]:
    names = [spec.name for spec in specs]
    for name in within:
        if name not in names:
            raise OptionError(f"within: {unknown_name('input', name, names)}")
    drawers = {
        spec.name: _drawer(check_bound(spec), spec.dtype, spec.encoding, kinds, within.get(spec.name)) for spec in specs
    }

    def sample(draw: st.DrawFn) -> Sample:
        return Sample({name: draw_one(draw) for name, draw_one in drawers.items()})

    return sample


def _batches(
    draw_sample: Callable[[st.DrawFn], Sample], size: int, kinds: tuple[str, ...]
) -> st.SearchStrategy[list[Sample]]:
    # one choice before each further sample, as Hypothesis's own lists have it: so it can take any of them away
    near = NEAR_DUPLICATES in kinds
    another = st.sampled_from(["none", *["new"] * 48, *["near"] * (12 if near else 0)])

    @st.composite
    def batch(draw: st.DrawFn) -> list[Sample]:
        drawn = [draw_sample(draw)]
        while len(drawn) < size and (what := draw(another)) != "none":
            if what == "new":
                drawn.append(draw_sample(draw))
            else:
                seed, closeness = draw(_SEEDS), draw(_CLOSENESS)
                drawn.append(_near(drawn[seed % len(drawn)], seed, closeness))
        return drawn

    return batch()


def _near(sample: Sample, seed: int, closeness: float) -> Sample:
    """A near-duplicate: float inputs with noise of ``closeness`` steps, or of that share of a 256th of their range."""
    return Sample(
        {
            name: pattern.jittered(seed, closeness * _unit(pattern)) if pattern.dtype.startswith("float") else pattern
            for name, pattern in sample.patterns.items()
        }
    )


def _unit(pattern: Pattern) -> float:
    low, high = bounds_of(pattern.within, pattern.shape)
    encoding = pattern.within if isinstance(pattern.within, Encoding) else None
    step = steps_of(encoding, pattern.shape) if encoding else (high - low) / 256
    return float(f"{float(np.max(step)):.3g}")


_SEEDS = st.integers(0, 65535)
_CLOSENESS = st.sampled_from([0.25, 0.01, 1.0])


def _drawer(
    shape: tuple[int, ...],
    dtype: str,
    encoding: Encoding | None,
    kinds: tuple[str, ...],
    within: Bounds | None,
) -> Callable[[st.DrawFn], Pattern]:
    """Draws one pattern in as few choices as will do: each costs as much as the rest of the sample."""
    if dtype not in DTYPES:
        raise OptionError(unknown_name("element type", dtype, sorted(DTYPES)))
    if encoding is not None and (problem := encoding.misfit(shape)):
        raise OptionError(f"the encoding doesn't fit: {problem}")
    limits: Encoding | Bounds = encoding if encoding is not None else _bounds(dtype, within)
    possible = _possible(shape, dtype, encoding, kinds)
    size = math.prod(shape)
    low, high = _outermost(limits, shape)
    zero = min(max(0.0, low), high)
    step = encoding.step if encoding is not None else (high - low) / 256
    if dtype.startswith("float"):
        plain = dict.fromkeys([zero, min(zero + step, high), min(zero + step / 2, high), low, high])
        values = st.floats(low, high)
    else:
        plain = dict.fromkeys([zero, low, high])
        values = st.integers(math.ceil(low), math.floor(high)).map(float)
    # a plain constant needs no further choice, so it is what Hypothesis takes for the simplest
    kind = st.sampled_from(_variants(possible, tuple(plain)))
    edit_count = st.sampled_from([*[0] * 12, *[1] * 3, 2, 3] if size else [0])
    positions = st.integers(0, max(size - 1, 0))
    edited = st.sampled_from([*plain, None])

    def edit(draw: st.DrawFn) -> tuple[tuple[int, ...], float]:
        at, value = draw(positions), draw(edited)
        return _index(at, shape), draw(values) if value is None else value

    def pattern(draw: st.DrawFn) -> Pattern:
        name, value, amount = draw(kind)
        seed = 0
        if name != "constant":
            seed = draw(_SEEDS)
        elif value is None:
            value = draw(values)
        drawn = Pattern(name, shape, dtype, limits, seed, value or 0.0, amount)
        count = draw(edit_count)
        return drawn.but(dict(edit(draw) for _ in range(count))) if count else drawn

    return pattern


_AMOUNTS: dict[str, tuple[float, ...]] = {"saturating": (1.0, 10.0, 1e6), "sparse": (0.1, 0.5, 0.01)}
_Variant = tuple[str, float | None, float | None]  # kind, value of a constant (None: any), amount


def _variants(kinds: Sequence[str], plain: Sequence[float]) -> list[_Variant]:
    """All that can be drawn without a further choice, simplest first; each kind about as often as another."""
    found: list[_Variant] = []
    for kind in kinds:
        amounts = _AMOUNTS.get(kind, (None,))
        some: list[_Variant] = [(kind, 0.0, amount) for amount in amounts]
        if kind == "constant":
            some = [(kind, value, None) for value in plain] + [(kind, None, None)]
        found += [variant for variant in some for _ in range(max(6 // len(some), 1))]
    return found


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def _bounds(dtype: str, within: Bounds | None) -> Bounds:
    if within is None:
        return DEFAULT_BOUNDS if dtype.startswith("float") else (0.0, 1.0) if dtype == "bool" else INTEGER_BOUNDS
    low, high = (float(bound) for bound in within)
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise OptionError(f"within takes the smallest and the largest value, got {within!r}")
    return low, high


def _outermost(limits: Encoding | Bounds, shape: tuple[int, ...]) -> Bounds:
    """The range that single elements are drawn from: per channel the one that all channels share."""
    low, high = bounds_of(limits, shape)
    return min(float(np.max(low)), float(np.min(high))), float(np.min(high))


def _possible(shape: tuple[int, ...], dtype: str, encoding: Encoding | None, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The functions that ``kinds`` name and that make sense for a tensor, simplest first."""
    wanted = {kind for name in kinds for kind in GROUPS.get(name, (name,))}
    real = dtype.startswith("float")
    sizes = sorted(shape)
    impossible = set() if encoding is not None else set(NEED_ENCODING) | {"saturating"}
    if not real:
        impossible |= {"denormal", "ties", "saturating"}
    if dtype == "bool":
        impossible |= {"edges", "image", "audio", *GROUPS["image"], *GROUPS["audio"]}
    if len(shape) < 2 or sizes[-2] < LEAST_PICTURE or (not real and encoding is None):
        impossible |= set(GROUPS["image"])
    if not sizes or sizes[-1] < LEAST_SOUND or (not real and encoding is None):
        impossible |= set(GROUPS["audio"])
    found = tuple(kind for kind in KINDS if kind in wanted - impossible)
    if not found:
        raise OptionError(
            f"kinds: none of {', '.join(kinds) or 'nothing'} can be drawn for a tensor {dtype}{list(shape)} "
            f"{'with' if encoding else 'without'} an encoding: name others, such as in_range"
        )
    return found


# --- encodings --------------------------------------------------------------------------------------------------------


def encodings(
    bits: int | Collection[int] = BITS,
    signed: bool | None = None,
    symmetric: bool | None = None,
    channels: int = 1,
    axis: int | None = None,
    scales: st.SearchStrategy[float] | None = None,
) -> st.SearchStrategy[Encoding]:
    """Valid encodings.

    Args:
        bits: 4, 8 or 16, or several of them.
        signed: only signed or only unsigned integers; None: both.
        symmetric: only with, or only without all zero points in the middle (0 for signed integers, 128 for uint8); None: both.
        channels: number of scales, along ``axis``.
        scales: draws one scale; default: from 2^-20 to 2^4.

    Raises:
        OptionError: bit widths that no encoding has, or channels without an axis.
    """
    widths = (bits,) if isinstance(bits, int) else tuple(bits)
    dtypes = [f"{sign}int{width}" for width in widths for sign in ("u", "") if signed is None or signed == (sign == "")]
    for name in dtypes:
        if name not in INTEGER_BITS or name == "int32":
            raise OptionError(f"bits: an encoding has 4, 8 or 16 bits, got {widths}")
    if not dtypes or channels < 1:
        raise OptionError(
            f"encodings needs bit widths and at least one channel, got bits={widths}, channels={channels}"
        )
    drawn_scale = st.floats(2.0**-20, 2.0**4).map(_float32) if scales is None else scales

    @st.composite
    def encoding(draw: st.DrawFn) -> Encoding:
        dtype = draw(st.sampled_from(dtypes))
        width = INTEGER_BITS[dtype]
        low, high = (0, 2**width - 1) if dtype[0] == "u" else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
        middle = (low + high + 1) // 2
        balanced = draw(st.booleans()) if symmetric is None else symmetric
        zero = st.just(middle) if balanced else st.integers(low, high)
        zeros = tuple(draw(st.lists(zero, min_size=channels, max_size=channels)))
        if symmetric is False and all(z == middle for z in zeros):
            zeros = (low, *zeros[1:])
        return Encoding(tuple(draw(st.lists(drawn_scale, min_size=channels, max_size=channels))), zeros, dtype, axis)

    return encoding()


def _float32(value: float) -> float:
    return float(np.float32(value))


# --- backends ---------------------------------------------------------------------------------------------------------


def socs(arch: int | str | Collection[int | str] | None = None) -> st.SearchStrategy[str]:
    """Names of SoCs that the HTP runtime knows, oldest architecture first.

    Args:
        arch: only those with this Hexagon architecture, e.g. 75 or "v75", or with one of several.

    Raises:
        OptionError: no known SoC has it.
    """
    asked = [] if arch is None else [arch] if isinstance(arch, int | str) else list(arch)
    archs = {soc_of_arch(one).htp_arch for one in asked} or {soc.htp_arch for soc in SOCS.values()}
    names = sorted((soc.htp_arch, soc.name) for soc in SOCS.values() if soc.htp_arch in archs)
    return st.sampled_from([find_soc(name).name for _, name in names])


def backend_options(backend: str = "htp", names: Collection[str] | None = None) -> st.SearchStrategy[dict[str, str]]:
    """Options for ``load(model, **options)`` that the backend takes where onnxruntime runs; the simplest: none.

    Args:
        backend: "htp", "cpu" or "gpu".
        names: only these options. Default: all, but for ``device_id``, of which only a host with several devices has others
            than 0.

    Raises:
        OptionError: unknown backend or option.
    """
    if backend not in OPTIONS:
        raise OptionError(unknown_name("backend", backend, OPTIONS))
    table = OPTIONS[backend]
    for name in names or ():
        if name not in table:
            raise OptionError(unknown_name("option", name, table))
    chosen = names if names is not None else [n for n, o in table.items() if (o.provider or o.run) and n != "device_id"]
    values = {name: st.sampled_from(table[name].parse.examples) for name in chosen}
    return st.fixed_dictionaries({}, optional=values)
