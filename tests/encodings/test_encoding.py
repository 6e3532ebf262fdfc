"""Quantising and dequantising are ONNX's, bit for bit, as onnxruntime's CPU kernels and onnx's reference compute them."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from pytest_qnn import EncodingError, InputError
from pytest_qnn.model import Encoding
from tests.encodings.strategies import SMALL, encodings

FLOAT = TensorProto.FLOAT


@functools.cache
def model_of(operator: str, dtype: str, axis: int | None, block_size: int | None) -> onnx.ModelProto:
    """A model of one quantiser whose data, scales and zero points are inputs; numpy has no 4 bits, so 8 come in and go out."""
    kind = TensorProto.DataType.Value(dtype.upper())
    outer = TensorProto.DataType.Value(dtype.replace("int4", "int8").upper())
    attributes = {"axis": 1 if axis is None else axis} | ({} if block_size is None else {"block_size": block_size})
    real, whole = ("x", "y") if operator == "QuantizeLinear" else ("y", "x")
    nodes = [helper.make_node("Cast", ["zero"], ["z"], to=kind)]
    if operator == "QuantizeLinear":
        nodes += [
            helper.make_node(operator, ["x", "scale", "z"], ["q"], **attributes),
            helper.make_node("Cast", ["q"], ["y"], to=outer),
        ]
    else:
        nodes += [
            helper.make_node("Cast", ["x"], ["q"], to=kind),
            helper.make_node(operator, ["q", "scale", "z"], ["y"], **attributes),
        ]
    rank = 0 if axis is None else 1 if block_size is None else 3
    types = {real: (FLOAT, 3), whole: (outer, 3), "scale": (FLOAT, rank), "zero": (outer, rank)}
    info = {n: helper.make_tensor_value_info(n, t, [None] * r) for n, (t, r) in types.items()}
    graph = helper.make_graph(nodes, "g", [info["x"], info["scale"], info["zero"]], [info["y"]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@functools.cache
def session_of(*key: object) -> object:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model_of(*key).SerializeToString(), options)  # type: ignore[arg-type]


def feeds(x: np.ndarray, e: Encoding) -> dict[str, np.ndarray]:
    shape = e.scale_shape or (() if e.axis is None else (len(e.scale),))
    outer = e.dtype.replace("int4", "int8")
    return {
        "x": x,
        "scale": np.asarray(e.scale, np.float32).reshape(shape),
        "zero": np.asarray(e.zero_point, outer).reshape(shape),
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, Encoding]:
    """Reals of every size, among them those in the middle between two steps, and an encoding that fits their shape."""
    shape = draw(st.tuples(*[st.integers(1, 5)] * 3))
    axis = draw(st.sampled_from([None, 0, 1, 2, -1]))
    block = None if axis is None else draw(st.sampled_from([None, None, 2, 3]))
    if axis is None or (block is None and shape[axis] == 1):
        e = draw(encodings())
    elif block is None:
        e = draw(encodings(shape[axis], axis))
    else:
        blocks = tuple(-(-s // block) if i == axis % 3 else s for i, s in enumerate(shape))
        flat = draw(encodings(int(np.prod(blocks))))
        e = Encoding(flat.scale, flat.zero_point, flat.dtype, axis, block, blocks)
    scale = np.float32(draw(st.sampled_from(e.scale)))
    steps = st.integers(-140000, 140000).map(lambda half: np.float32(half) / np.float32(2) * scale)
    anything = st.floats(width=32, allow_nan=False)
    x = draw(hnp.arrays(np.float32, shape, elements=st.one_of(steps.map(float), anything)))
    return x, e


def key_of(operator: str, e: Encoding) -> tuple[str, str, int | None, int | None]:
    return operator, e.dtype, e.axis, e.block_size


@settings(max_examples=300, deadline=None)
@given(cases())
def test_quantize_is_onnxruntimes(case: tuple[np.ndarray, Encoding]) -> None:
    x, e = case
    expected = session_of(*key_of("QuantizeLinear", e)).run(None, feeds(x, e))[0]  # type: ignore[attr-defined]
    got = e.quantize(x)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_dequantize_is_onnxruntimes(case: tuple[np.ndarray, Encoding], data: st.DataObject) -> None:
    shape, e = case[0].shape, case[1]
    q = data.draw(hnp.arrays(e.dtype.replace("int4", "int8"), shape, elements=st.integers(*e.limits)))
    expected = session_of(*key_of("DequantizeLinear", e)).run(None, feeds(q, e))[0]  # type: ignore[attr-defined]
    got = e.dequantize(q)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_both_are_onnxs_reference(case: tuple[np.ndarray, Encoding]) -> None:
    x, e = case
    assume(np.isfinite(x).all())  # the reference casts an infinity to whatever numpy gives
    with np.errstate(all="ignore"):
        q = e.quantize(x)
        assume((np.abs(x / np.float32(e.step)) < 1e6).all())  # it adds the zero point in int32, which overflows
        quantized = ReferenceEvaluator(model_of(*key_of("QuantizeLinear", e))).run(None, feeds(x, e))[0]
        np.testing.assert_array_equal(q, quantized.astype(q.dtype))
        real = ReferenceEvaluator(model_of(*key_of("DequantizeLinear", e))).run(None, feeds(q, e))[0]
    np.testing.assert_array_equal(e.dequantize(q), real)


@pytest.mark.parametrize("dtype", SMALL)
def test_a_real_that_has_an_integer_survives(dtype: str) -> None:
    low, high = Encoding((1.0,), (0,), dtype).limits
    e = Encoding((0.037,), ((low + high) // 2,), dtype)
    q = np.arange(low, high + 1)
    np.testing.assert_array_equal(e.quantize(e.dequantize(q)), q)


def test_biases_saturate_at_32_bits() -> None:
    e = Encoding((1e-3,), (0,), "int32")
    q = e.quantize(np.array([1e9, -1e9, 0.0125, -0.0005], np.float32))
    assert q.tolist() == [2**31 - 1, -(2**31), 12, 0]
    assert e.dequantize(np.array([2**31 - 1])).dtype == np.float32


def test_the_unsigned_grid_holds_the_same_numbers() -> None:
    e = Encoding((0.5, 0.25), (-3, 7), "int8", 0)
    u = e.as_unsigned()
    assert (u.dtype, u.zero_point, u.ranges) == ("uint8", (125, 135), e.ranges)
    x = np.linspace(-80, 80, 64, dtype=np.float32).reshape(2, 32)
    np.testing.assert_array_equal(e.dequantize(e.quantize(x)), u.dequantize(u.quantize(x)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Encoding((1.0,), (0,), "int3"), "can't have type 'int3'"),
        (lambda: Encoding((1.0, 2.0), (0,), "int8", 0), "2 scales and 1 zero points"),
        (lambda: Encoding((), (), "int8"), "at least one"),
        (lambda: Encoding((1.0,) * 4, (0,) * 4, "int8", 0, 2, (2, 3)), "doesn't hold 4 scales"),
        (lambda: Encoding((0.0,), (0,), "int8").quantize(np.zeros(3, np.float32)), "scale 0 is not above 0"),
        (lambda: Encoding((1e-60,), (0,), "int8").quantize(np.zeros(3, np.float32)), "scale 1e-60 is not above 0"),
        (lambda: Encoding((float("nan"),), (0,), "int8").dequantize(np.zeros(3, np.int8)), "scale nan"),
        (lambda: Encoding((1.0, 2.0), (0, 0), "int8", 1).quantize(np.zeros((2, 3), np.float32)), "don't fit axis 1"),
        (
            lambda: Encoding((1.0, 2.0), (0, 0), "int8", 2).quantize(np.zeros((2, 3), np.float32)),
            "axis 2 doesn't exist",
        ),
        (
            lambda: Encoding((1.0, 2.0), (0, 0), "int8").quantize(np.zeros((2, 3), np.float32)),
            "which axis is not known",
        ),
        (
            lambda: Encoding((1.0,) * 4, (0,) * 4, "int8", 1, 2, (2, 2)).quantize(np.zeros((2, 5), np.float32)),
            "don't fit a tensor",
        ),
    ],
)
def test_what_makes_no_encoding_is_refused(make: object, message: str) -> None:
    with pytest.raises(EncodingError, match=message):
        make()  # type: ignore[operator]


def test_what_no_integer_stands_for_is_refused() -> None:
    e = Encoding((1.0,), (0,), "int8")
    with pytest.raises(InputError, match="NaN"):
        e.quantize(np.array([0.0, np.nan], np.float32))
    with pytest.raises(InputError, match="takes floats, got int8"):
        e.quantize(np.zeros(2, np.int8))
    with pytest.raises(InputError, match="takes integers, got float32"):
        e.dequantize(np.zeros(2, np.float32))
    assert e.quantize(np.array([np.inf, -np.inf], np.float32)).tolist() == [127, -128]
