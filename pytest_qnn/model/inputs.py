"""Inputs of a model: checking those that are given, making seeded ones from what it says of its own tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_qnn.errors import InputError
from pytest_qnn.model.onnx_file import Model, read_model
from pytest_qnn.model.tensors import DTYPES, TensorSpec
from pytest_qnn.settings import unknown_name


class SeededSample(dict[str, npt.NDArray[Any]]):
    """One set of inputs that was made up, not measured: it says nothing about real data, and records say so.

    Attributes:
        passing: whether it was drawn at random, to be used once: what is computed from it isn't worth a place on disk.
    """

    passing = False


def seeded_inputs(
    model: str | os.PathLike[str] | Model | Any,
    count: int = 4,
    seed: int = 0,
    dimensions: Mapping[str, int] | None = None,
) -> list[SeededSample]:
    """``count`` input sets; the same arguments give the same arrays, on every host.

    They exercise the backend, but they are no substitute for real data: drawn over the range that the calibration found,
    they can't show that this range is wrong.

    Float tensors that are quantised at the graph's edge are uniform over their encoding's range; other floats are standard
    normal. Integers with an encoding are uniform over their type, others uniform over 0..9; booleans are fair coins.

    Args:
        model: an ONNX file, a :class:`~pytest_qnn.model.onnx_file.Model`, or a loaded session.
        dimensions: sizes for named dynamic dimensions.

    Raises:
        InputError: a bad count, a dynamic dimension left open, or a type that no array can have.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"count must be a whole number of at least 1, got {count!r}")
    specs = input_specs(model, dimensions)
    rng = np.random.default_rng(seed)
    return [SeededSample({spec.name: _draw(spec, rng) for spec in specs}) for _ in range(count)]


def input_specs(
    model: str | os.PathLike[str] | Model | Any, dimensions: Mapping[str, int] | None = None
) -> tuple[TensorSpec, ...]:
    """The inputs of an ONNX file, a model or a session.

    Raises:
        InputError: it is none of them.
        ModelError: the file can't be read.
    """
    if hasattr(model, "inputs"):
        return tuple(model.inputs)
    if isinstance(model, str | os.PathLike):
        return read_model(model, dimensions).inputs
    raise InputError(f"expected a model file or a session, got {type(model).__name__}")


def check_bound(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of an input all of whose dimensions have sizes.

    Raises:
        InputError: one has none.
    """
    if spec.unbound:
        raise InputError(f"input {spec.describe()} has dynamic dimensions: pass dimensions={{{spec.unbound[0]!r}: 1}}")
    return tuple(int(size) for size in spec.shape)


def _draw(spec: TensorSpec, rng: np.random.Generator) -> npt.NDArray[Any]:
    shape = check_bound(spec)
    if spec.dtype == "bool":
        return rng.integers(0, 2, shape).astype(np.bool_)
    if spec.dtype in ("float16", "float32", "float64"):
        if spec.encoding is not None:
            low, high = spec.encoding.range
            return rng.uniform(low, high, shape).astype(spec.dtype)
        return rng.standard_normal(shape).astype(spec.dtype)
    try:
        limits = np.iinfo(spec.dtype)
    except (TypeError, ValueError):
        raise InputError(f"input {spec.describe()}: no arrays of that type can be made") from None
    if spec.encoding is not None:
        return rng.integers(limits.min, limits.max, shape, dtype=spec.dtype, endpoint=True)
    return rng.integers(0, 10, shape).astype(spec.dtype)


def check_inputs(
    subject: str, specs: Sequence[TensorSpec], sample: object, allow_non_finite: bool = False
) -> dict[str, npt.NDArray[Any]]:
    """``sample`` as a dict of arrays that fit ``specs`` exactly; for a single input the array alone will do.

    Raises:
        InputError: names, shapes, dtypes or values don't fit; the message starts with ``subject``.
    """
    wanted = {spec.name: spec for spec in specs}
    if isinstance(sample, np.ndarray):
        if len(wanted) != 1:
            raise InputError(f"{subject}: the model has inputs {list(wanted)}: pass a dict of arrays")
        sample = {next(iter(wanted)): sample}
    if not isinstance(sample, Mapping):
        raise InputError(f"{subject}: expected a dict of arrays, got {type(sample).__name__}")
    for name in sample:
        if name not in wanted:
            raise InputError(f"{subject}: {unknown_name('input', name, wanted)}")
    checked = {}
    for name, spec in wanted.items():
        if name not in sample:
            raise InputError(f"{subject}: input {spec.describe()} is missing")
        checked[name] = _check_array(subject, spec, sample[name], allow_non_finite)
    return checked


def _check_array(subject: str, spec: TensorSpec, value: object, allow_non_finite: bool) -> npt.NDArray[Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise InputError(
            f"{subject}: input {spec.describe()}: expected a numpy array, got {type(value).__name__}: convert it with "
            f"np.asarray(..., np.{spec.dtype})"
        )
    array = np.asarray(value)
    if spec.dtype not in DTYPES:
        raise InputError(f"{subject}: input {spec.describe()}: arrays of type {spec.dtype} can't be handed over")
    if array.dtype.name != spec.dtype:
        raise InputError(
            f"{subject}: input {spec.describe()} got dtype {array.dtype}: convert it with .astype(np.{spec.dtype})"
        )
    if array.shape != spec.shape:
        hint = ""
        if len(array.shape) == len(spec.shape) == 4 and _layout_swapped(array.shape, spec.shape):
            hint = ": it looks like the other of NCHW and NHWC, transpose it"
        elif array.shape == spec.shape[1:]:
            hint = ": the batch axis is missing, add it with [np.newaxis]"
        elif array.shape[1:] == spec.shape[1:] and array.shape[0] == 0:
            hint = ": the batch is empty"
        elif array.shape[1:] == spec.shape[1:]:
            hint = f": pass a list of {array.shape[0]} inputs, or load a model with that batch size"
        raise InputError(f"{subject}: input {spec.describe()} got shape {list(array.shape)}{hint}")
    if array.size == 0:
        raise InputError(f"{subject}: input {spec.describe()} is empty")
    if array.dtype.kind == "f" and not allow_non_finite:
        finite = np.isfinite(array)
        if not finite.all():
            bad = int(finite.size - np.count_nonzero(finite))
            first = tuple(int(i) for i in np.unravel_index(int(np.argmin(finite)), array.shape))
            raise InputError(
                f"{subject}: input {spec.name!r} has {bad} NaN or infinite elements, the first at {list(first)}. QNN "
                "turns such values into finite ones; pass allow_non_finite=True to run it all the same"
            )
    return array


def _layout_swapped(got: tuple[int, ...], wanted: tuple[int | str, ...]) -> bool:
    n, a, b, c = got
    return wanted in ((n, c, a, b), (n, b, c, a)) and math.prod(got) != 0
