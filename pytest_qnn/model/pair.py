"""A model as QNN can run it, and the float original that a quantised one was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pytest_qnn.errors import ModelError
from pytest_qnn.model.onnx_file import Model, read_model
from pytest_qnn.model.tensors import TensorSpec


def read_pair(file: Path, float_file: Path | None, dimensions: Mapping[str, int] | None) -> tuple[Model, Model | None]:
    """The model and its float original, with the same sizes given to their dynamic dimensions.

    The float original's are taken from the model where it has them fixed: models are often fixed while quantising.

    Raises:
        ModelError: one can't be used, or they don't belong together.
    """
    if float_file is None:
        return usable(read_model(file, dimensions)), None
    free = open_dimensions(read_model(float_file)), open_dimensions(read_model(file))
    given = dict(dimensions or {})
    asked = usable(read_model(file, {n: s for n, s in given.items() if n in free[1] or n not in free[0]}))
    original = read_model(float_file)
    if original.quantized:
        raise ModelError(
            f"float_model {original.path.name} is itself quantised ({original.precision}): pass the float original that "
            f"{asked.path.name} was quantised from"
            + ("" if asked.quantized else f"; it looks as if {asked.path.name} were that, and the two exchanged")
        )
    _check_twins(asked, original)
    sizes = {n: s for n, s in given.items() if n in free[0]}
    return asked, read_model(float_file, {**_sizes_of(original, asked), **sizes})


def open_dimensions(model: Model) -> set[str]:
    """Names of a model's dynamic dimensions."""
    return {name for spec in model.inputs + model.outputs for name in spec.unbound}


def _sizes_of(original: Model, asked: Model) -> dict[str, int]:
    """Sizes that ``asked`` has where its float original has named dynamic dimensions."""
    fixed = {spec.name: spec.shape for spec in asked.inputs + asked.outputs}
    return {
        name: size
        for spec in original.inputs + original.outputs
        for name, size in zip(spec.shape, fixed.get(spec.name, ()), strict=False)
        if isinstance(name, str) and not name.startswith("?") and isinstance(size, int)
    }


def usable(model: Model) -> Model:
    """The model, if QNN can run such a graph at all.

    Raises:
        ModelError: no inputs, dynamic or empty dimensions, or a context binary's wrapper.
    """
    if model.context:
        raise ModelError(
            f"{model.path}: this is the wrapper of a context binary, which can't be judged alone: load the model that it "
            "was made from, with artifact=... naming this file"
        )
    if not model.inputs:
        raise ModelError(f"{model.path}: the model has no inputs: QNN can't run such a graph")
    for spec in model.inputs:
        if spec.unbound:
            names = ", ".join(spec.unbound)
            raise ModelError(
                f"{model.path}: input {spec.describe()} has dynamic dimensions ({names}), and QNN runs fixed shapes only: "
                + (
                    f"say dimensions={{{spec.unbound[0]!r}: 1}} (on the command line --dimensions {spec.unbound[0]}=1)"
                    if not spec.unbound[0].startswith("?")
                    else "fix the shape in the model, e.g. with onnxruntime.tools.make_dynamic_shape_fixed"
                )
            )
        if any(size == 0 for size in spec.shape):
            raise ModelError(f"{model.path}: input {spec.describe()} has no elements: QNN crashes on such shapes")
    return model


def _check_twins(model: Model, original: Model) -> None:
    for what, ours, theirs in (
        ("input", model.inputs, original.inputs),
        ("output", model.outputs, original.outputs),
    ):
        mine, other = {t.name: t for t in ours}, {t.name: t for t in theirs}
        if mine.keys() != other.keys():
            raise ModelError(
                f"float_model {original.path.name} is not the original of {model.path.name}: its {what}s are "
                f"{sorted(other)}, not {sorted(mine)}"
            )
        for name, spec in mine.items():
            if not _compatible(spec, other[name]):
                raise ModelError(
                    f"float_model {original.path.name} is not the original of {model.path.name}: {what} "
                    f"{other[name].describe()} there, {spec.describe()} here"
                )


def _compatible(spec: TensorSpec, other: TensorSpec) -> bool:
    same_shape = len(spec.shape) == len(other.shape) and all(
        a == b or isinstance(a, str) or isinstance(b, str) for a, b in zip(spec.shape, other.shape, strict=True)
    )
    same_type = spec.dtype == other.dtype or (spec.encoding is not None and other.dtype == "float32")
    return same_shape and same_type
