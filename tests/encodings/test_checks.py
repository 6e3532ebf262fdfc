"""What is wrong with a set is found, all of it, each with its tensor and field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pytest_qnn import EncodingError, ModelError
from pytest_qnn.encodings.encoding_set import Stated
from pytest_qnn.model import (
    Encoding,
    EncodingSet,
    Precision,
    TensorEncoding,
    apply_encodings,
    check_encodings,
    read_graph,
)
from tests import small_models
from tests.encodings.strategies import model, sets

U8 = Encoding((0.5,), (3,), "uint8")


def problems(*tensors: TensorEncoding, file: Path | None = None) -> tuple[str, ...]:
    return check_encodings(EncodingSet(tensors), read_graph(file) if file else None)


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("encodings") / "m.onnx")


@settings(max_examples=50, deadline=None)
@given(sets(plain=False, precisions=(Precision("float", 16),)))
def test_nothing_is_wrong_with_a_sound_set(float_model: Path, found: EncodingSet) -> None:
    assert check_encodings(found, read_graph(float_model)) == ()


@pytest.mark.parametrize(
    ("encoding", "stated", "message"),
    [
        (Encoding((0.0,), (0,), "uint8"), Stated(), "scale is 0: it must be above 0 and finite"),
        (Encoding((-0.5,), (0,), "uint8"), Stated(), "scale is -0.5"),
        (Encoding((float("nan"),), (0,), "uint8"), Stated(), "scale is nan"),
        (Encoding((float("inf"),), (0,), "uint8"), Stated(), "scale is inf"),
        (Encoding((1e-50,), (0,), "uint8"), Stated(), "float32, in which it is applied, can't hold it"),
        (Encoding((0.5, 0.0), (0, 0), "int8", 0), Stated(), "scale of channel 1 is 0"),
        (
            Encoding((0.5,), (256,), "uint8"),
            Stated(),
            r"zero point is 256 \(offset -256\), outside of uint8's 0 .. 255: the range",
        ),
        (Encoding((0.5,), (-1,), "uint8"), Stated(), r"zero point is -1 \(offset 1\), .* doesn't contain zero"),
        (Encoding((0.5,), (9,), "int4"), Stated(), "zero point is 9, outside of int4's -8 .. 7"),
        (Encoding((0.5,), (7,), "int32"), Stated(), "zero point is 7: an int32's must be 0"),
        (
            U8,
            Stated(((-1.5, 60.0),)),
            "min -1.5 and max 60 contradict scale 0.5 and offset at 8 bits, which give -1.5 .. 126",
        ),
        (U8, Stated(((1.0, 126.0),)), "min 1 and max 126 don't contain zero"),
        (U8, Stated(((float("nan"), 126.0),)), "min nan and max 126 must be finite"),
        (
            Encoding((0.5,), (127,), "uint8"),
            Stated(None, True),
            "is_symmetric is true, but the offset is -127: it must be -128, or 0",
        ),
        (Precision("float", 12), Stated(), "bit width 12: floats have 16 or 32 bits"),
        (Precision("int", 12), Stated(), "bit width 12: ints have 4 or 8 or 16 or 32 bits"),
    ],
)
def test_a_value_that_contradicts_itself(encoding: Any, stated: Stated, message: str) -> None:
    (problem,) = problems(TensorEncoding("t", "activation", encoding, stated))
    assert problem.startswith("activation 't': ")
    with pytest.raises(EncodingError, match=message):
        raise EncodingError(problem)


def test_stated_ranges_may_be_rounded_and_strictly_symmetric() -> None:
    stated = Stated(((-63.5, 63.5),), True)
    assert problems(TensorEncoding("t", "param", Encoding((0.5,), (0,), "int8"), stated)) == ()
    assert problems(TensorEncoding("t", "param", Encoding((0.5,), (0,), "uint8"), Stated(None, True))) == ()


def test_a_tensor_that_is_defined_twice() -> None:
    a, p = TensorEncoding("t", "activation", U8), TensorEncoding("t", "param", U8)
    assert problems(a, a) == ("activation 't': is defined twice: remove one",)
    assert problems(a, p) == ("param 't': is defined both among the activations and the params: remove one",)


@pytest.mark.parametrize(
    ("name", "kind", "value", "message"),
    [
        ("ww", "param", U8, "param 'ww': m.onnx has no such tensor. Did you mean 'w'?"),
        ("conv1.weight", "param", U8, "param 'conv1.weight': m.onnx has no such tensor; it has 'b', 'c', 't', …"),
        ("x", "param", U8, "param 'x': is computed in m.onnx, so it belongs among the activations"),
        ("w", "activation", U8, "activation 'w': is constant in m.onnx, so it belongs among the params"),
        (
            "x",
            "activation",
            Encoding((0.5,) * 4, (0,) * 4, "uint8", 1),
            "activation 'x': has 4 scales: activations have one",
        ),
        (
            "w",
            "param",
            Encoding((0.5,) * 4, (0,) * 4, "int8"),
            "which don't fit the channels of its shape [6, 4, 1, 1]",
        ),
        (
            "w",
            "param",
            Encoding((0.5,) * 5, (0,) * 5, "int8", 0),
            "5 scales don't fit axis 0 of a tensor of shape [6, 4, 1, 1]",
        ),
        (
            "w",
            "param",
            Encoding((0.5,) * 6, (0,) * 6, "int8", 4),
            "axis 4 doesn't exist in a tensor of shape [6, 4, 1, 1]",
        ),
        ("w3", "param", Encoding((0.5,) * 6, (0,) * 6, "int4", 0, 3, (2, 3)), "in blocks of 3 along axis 0 don't fit"),
    ],
)
def test_what_does_not_fit_the_model(float_model: Path, name: str, kind: Any, value: Encoding, message: str) -> None:
    (problem,) = problems(TensorEncoding(name, kind, value), file=float_model)
    assert message in problem


def test_tensors_that_cannot_be_quantised(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["inside"], name="neg")],
        "then",
        [],
        [helper.make_tensor_value_info("inside", 1, [4])],
    )
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], name="shape"),
        helper.make_node("If", ["flag"], ["y"], name="if", then_branch=inner, else_branch=inner),
    ]
    types = {"flag": TensorProto.BOOL}
    file = small_models.save(tmp_path / "if.onnx", nodes, {"x": [4], "flag": []}, {"y": [4]}, types=types)
    found = problems(*(TensorEncoding(n, "activation", U8) for n in ("inside", "shape", "flag")), file=file)
    assert [p.split(" of ")[0] for p in found[:1]] == ["activation 'inside': lies in a subgraph (If, Loop or Scan)"]
    assert found[1:] == tuple(
        f"activation {n!r}: is {t} in if.onnx: only float32 tensors can be quantised"
        for n, t in (("shape", "int64"), ("flag", "bool"))
    )


def test_all_problems_come_at_once_and_nothing_is_written(float_model: Path, tmp_path: Path) -> None:
    tensors = (
        TensorEncoding("x", "activation", Encoding((0.0,), (0,), "uint8")),
        TensorEncoding("nowhere", "activation", U8),
        TensorEncoding("w", "param", Encoding((float("nan"),), (0,), "int8")),
    )
    with pytest.raises(EncodingError, match="3 problems") as caught:
        apply_encodings(float_model, EncodingSet(tensors, source="mine.json"), tmp_path / "q.onnx")
    assert [p.split(":")[0] for p in caught.value.problems] == ["activation 'x'", "activation 'nowhere'", "param 'w'"]
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_quantised_already(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"conv.qdq.onnx: already quantised \(node .*\): name the float model"):
        read_graph(models / "conv.qdq.onnx")
    with pytest.raises(ModelError, match="already quantised"):
        apply_encodings(models / "conv.qdq.onnx", EncodingSet(()), tmp_path / "q.onnx")
    integer = helper.make_node("QLinearMatMul", ["a", "s", "z", "b", "s", "z", "s", "z"], ["y"], name="mm")
    graph = helper.make_graph([integer], "g", [], [helper.make_tensor_value_info("y", TensorProto.UINT8, [1])])
    onnx.save(helper.make_model(graph), str(tmp_path / "integer.onnx"))
    with pytest.raises(ModelError, match="'mm' is a QLinearMatMul"):
        read_graph(tmp_path / "integer.onnx")


@settings(max_examples=50, deadline=None)
@given(st.integers(-300, 300), st.booleans())
def test_an_offset_is_sound_exactly_if_zero_is_in_the_range(offset: int, symmetric: bool) -> None:
    encoding = Encoding((0.5,), (-offset,), "uint8")
    (low, high), *_ = encoding.ranges
    assert bool(problems(TensorEncoding("t", None, encoding))) == (not low <= 0 <= high)
