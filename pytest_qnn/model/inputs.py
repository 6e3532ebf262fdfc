"""Seeded inputs for a model, from what it says of its own tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_qnn.errors import InputError
from pytest_qnn.model.onnx_file import Model, read_model
from pytest_qnn.model.tensors import TensorSpec


def seeded_inputs(
    model: str | os.PathLike[str] | Model | Any,
    count: int = 4,
    seed: int = 0,
    dimensions: Mapping[str, int] | None = None,
) -> list[dict[str, npt.NDArray[Any]]]:
    """``count`` input sets; the same arguments give the same arrays, on every host.

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
    specs = model.inputs if hasattr(model, "inputs") else read_model(model, dimensions).inputs
    rng = np.random.default_rng(seed)
    return [{spec.name: _draw(spec, rng) for spec in specs} for _ in range(count)]


def _draw(spec: TensorSpec, rng: np.random.Generator) -> npt.NDArray[Any]:
    if spec.unbound:
        raise InputError(f"input {spec.describe()} has dynamic dimensions: pass dimensions={{{spec.unbound[0]!r}: 1}}")
    shape = tuple(int(size) for size in spec.shape)
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
