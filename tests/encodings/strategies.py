"""Encodings and sets of them, drawn at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from onnx import helper

from pytest_qnn.encodings.encoding_set import EncodingSet, Precision, TensorEncoding
from pytest_qnn.model.encoding import INTEGER_BITS, Encoding
from pytest_qnn.properties import encodings as drawn_encodings
from tests import small_models

SMALL = sorted(INTEGER_BITS.keys() - {"int32"})


def scales() -> st.SearchStrategy[float]:
    """Every normal float32 that leaves room for a range."""
    return st.floats(1e-30, 1e30, width=64)


def encodings(count: int = 1, axis: int | None = None, plain: bool = False) -> st.SearchStrategy[Encoding]:
    """An encoding with ``count`` scales; a ``plain`` one is signed only if it is symmetric, as AIMET's early formats have it."""
    if not plain:
        return drawn_encodings(channels=count, axis=axis, scales=scales())
    unsigned = drawn_encodings(signed=False, channels=count, axis=axis, scales=scales())
    return unsigned | drawn_encodings(signed=True, symmetric=True, channels=count, axis=axis, scales=scales())


# what the model below has: name -> (is it a parameter, channels, axis of the output channels)
TENSORS = {
    "x": (False, 1, None),
    "c": (False, 1, None),
    "w": (True, 6, 0),
    "b": (True, 6, 0),
    "w2": (True, 5, 1),
    "w3": (True, 3, 1),
}


def model(path: Path) -> Path:
    """Conv, ConvTranspose and MatMul: weights with their output channels on axis 0, 1 and 1."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv"),
        helper.make_node("ConvTranspose", ["c", "w2"], ["t"], name="up"),
        helper.make_node("MatMul", ["t", "w3"], ["y"], name="mm"),
    ]
    constants = {
        "w": rng.normal(size=(6, 4, 1, 1)).astype(np.float32),
        "b": rng.normal(size=6).astype(np.float32),
        "w2": rng.normal(size=(6, 5, 1, 1)).astype(np.float32),
        "w3": rng.normal(size=(8, 3)).astype(np.float32),
    }
    return small_models.save(path, nodes, {"x": [1, 4, 8, 8]}, {"y": [1, 5, 8, 3]}, constants)


@st.composite
def sets(draw: st.DrawFn, plain: bool = True, precisions: tuple[Precision, ...] = ()) -> EncodingSet:
    """A set for the tensors of :func:`model`."""
    chosen = draw(st.lists(st.sampled_from(sorted(TENSORS)), unique=True, min_size=1))
    tensors = []
    for name in chosen:
        param, channels, axis = TENSORS[name]
        if precisions and draw(st.integers(0, 4)) == 0:
            value: Any = draw(st.sampled_from(precisions))
        elif name == "b" and draw(st.booleans()):
            value = Encoding(tuple(draw(st.lists(scales(), min_size=6, max_size=6))), (0,) * 6, "int32", 0)
        else:
            per_channel = param and draw(st.booleans())
            value = draw(encodings(channels if per_channel else 1, axis if per_channel else None, plain))
        tensors.append(TensorEncoding(name, "param" if param else "activation", value))
    words = st.dictionaries(
        st.sampled_from(["quantizer_args", "producer", "note"]), st.integers() | st.text(), max_size=2
    )
    return EncodingSet(tuple(tensors), draw(words))
