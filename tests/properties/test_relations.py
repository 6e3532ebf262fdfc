"""Two models, or two SoCs, that must agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from pytest_qnn import InvariantError, UsageError
from pytest_qnn.backend import Backend
from pytest_qnn.errors import OptionError
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.properties import (
    ModelPair,
    QdqModel,
    Relation,
    Step,
    assert_batch_invariant,
    assert_equal_across_socs,
    assert_layout_invariant,
    assert_padding_invariant,
    assert_related,
)
from pytest_qnn.session import Session
from tests import small_models
from tests.properties.tampered import tampered


def resized(source: Path, target: Path, *axes: int, size: int) -> Path:
    """The model with another size of some axes of its inputs and outputs."""
    proto = onnx.load(source)
    for value in [*proto.graph.input, *proto.graph.output]:
        for axis in axes:
            value.type.tensor_type.shape.dim[axis].dim_value = size
    del proto.graph.value_info[:]
    onnx.save(proto, target)
    return target


@pytest.fixture(scope="module")
def conv(htp: Backend, models: Path) -> Session:
    return htp.load(models / "conv.qdq.onnx")


@pytest.fixture(scope="module")
def conv_of_4(htp: Backend, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return htp.load(resized(models / "conv.qdq.onnx", tmp_path_factory.mktemp("batch") / "conv4.onnx", 0, size=4))


def test_a_batch_of_four_gives_what_single_samples_give(conv: Session, conv_of_4: Session) -> None:
    verdict = assert_batch_invariant(conv, conv_of_4, seeded_inputs(conv, 6), steps=0)
    assert (verdict.name, verdict.judged) == ("batch_invariant", 6)


def test_a_batch_whose_rows_are_exchanged_is_found(conv: Session, conv_of_4: Session) -> None:
    exchanged = tampered(conv_of_4, lambda n, x, y: {"y": np.roll(y["y"], 1, 0)})
    with pytest.raises(InvariantError, match=r"4 of 4 samples break it\n.*in conv.qdq.onnx, .* in conv4.onnx"):
        assert_batch_invariant(conv, exchanged, seeded_inputs(conv, 4))


def test_a_larger_input_padded_with_zeros_gives_the_same(
    htp: Backend, conv: Session, models: Path, tmp_path: Path
) -> None:
    large = htp.load(resized(models / "conv.qdq.onnx", tmp_path / "large.onnx", 2, 3, size=24))
    samples = seeded_inputs(conv, 3)
    assert assert_padding_invariant(conv, large, samples, steps=0).ok
    with pytest.raises(InvariantError, match="padding_invariant"):
        assert_padding_invariant(conv, large, samples, value=1.5)
    assert assert_padding_invariant(conv, large, samples, value=1.5, border=1, steps=0).ok, (
        "a 3 x 3 kernel reaches one pixel"
    )


def test_another_layout_gives_the_same(htp: Backend, conv: Session, models: Path, tmp_path: Path) -> None:
    proto = onnx.load(models / "conv.qdq.onnx")
    inner_x, inner_y = "x_nchw", "y_nchw"
    for node in proto.graph.node:
        node.input[:] = [inner_x if name == "x" else name for name in node.input]
        node.output[:] = [inner_y if name == "y" else name for name in node.output]
    proto.graph.node.insert(0, helper.make_node("Transpose", ["image"], [inner_x], perm=[0, 3, 1, 2], name="to_nchw"))
    proto.graph.node.append(helper.make_node("Transpose", [inner_y], ["features"], perm=[0, 2, 3, 1], name="to_nhwc"))
    for values, name, shape in (
        (proto.graph.input, "image", [1, 16, 16, 3]),
        (proto.graph.output, "features", [1, 16, 16, 8]),
    ):
        del values[:]
        values.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "nhwc.onnx")
    nhwc = htp.load(tmp_path / "nhwc.onnx", allow_cpu=True)
    assert assert_layout_invariant(conv, nhwc, seeded_inputs(conv, 3)).ok
    mirrored = tampered(nhwc, lambda n, x, y: {"features": y["features"][:, :, ::-1].copy()})
    with pytest.raises(InvariantError, match="layout_invariant"):
        assert_layout_invariant(conv, mirrored, seeded_inputs(conv, 3))
    with pytest.raises(UsageError, match="is not .* with its axes in order"):
        assert_layout_invariant(conv, nhwc, seeded_inputs(conv, 1), order=(0, 3, 1, 2))
    with pytest.raises(OptionError, match="each axis once"):
        assert_layout_invariant(conv, nhwc, seeded_inputs(conv, 1), order=(0, 2, 2, 1))


def test_any_relation_can_be_stated(htp: Backend, tmp_path: Path) -> None:
    session = htp.load(small_models.unary(tmp_path / "relu.onnx", "Relu", shape=(1, 16)))
    doubled = Relation(
        "scales with its input",
        lambda samples: [{"x": 2 * sample["x"]} for sample in samples],
        lambda results: [{"y": result["y"] / 2} for result in results],
    )
    assert assert_related(session, session, seeded_inputs(session, 3), doubled).ok
    broken = tampered(session, lambda n, x, y: {"y": y["y"] + np.float32(1)})
    with pytest.raises(InvariantError, match="scales with its input doesn't hold"):
        assert_related(session, broken, seeded_inputs(session, 3), doubled)


@pytest.mark.slow
def test_socs_of_one_group_of_architectures_compute_the_same_bits(htp: Backend, tmp_path: Path) -> None:
    steps = (Step("Conv", 1), Step("Relu"), Step("MaxPool"), Step("Conv", 11), Step("Softmax"))
    for activation in (8, 16):
        pair = QdqModel((1, 3, 16, 16), steps, activation=activation).save(tmp_path / str(activation))
        verdicts = assert_equal_across_socs(htp, pair.quantized, seeded_inputs(pair.quantized, 3))
        assert len(verdicts) == 4, "one for v69, three for v75, v79 and v81"


def test_socs_of_different_groups_are_not_compared(htp: Backend, pair: ModelPair) -> None:
    with pytest.raises(UsageError, match="no two of SM8350, SM8650 belong to one group"):
        assert_equal_across_socs(htp, pair.quantized, [], ["SM8350", "SM8650"])


def test_models_that_do_not_belong_together_are_refused(conv: Session, classifier: Session) -> None:
    for relation in (assert_batch_invariant, assert_padding_invariant):
        with pytest.raises(UsageError, match="is not a batch|doesn't fit into"):
            relation(conv, classifier, seeded_inputs(conv, 1))
    with pytest.raises(UsageError, match="takes two sessions"):
        assert_related(conv, conv.model, [], Relation("r", lambda s: s, lambda r: r))  # type: ignore[arg-type]
