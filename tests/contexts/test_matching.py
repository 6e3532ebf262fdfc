"""A binary's tensors are matched with a model's for sure, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from pytest_qnn import ArtifactError, OptionError
from pytest_qnn.artifacts.binary import ContextInfo, GraphInfo, TensorInfo, read_context_binary
from pytest_qnn.artifacts.matching import Match, converted_name, match_tensors
from pytest_qnn.model.onnx_file import Model, read_model
from pytest_qnn.model.tensors import Encoding, TensorSpec
from tests import small_models
from tests.contexts.conftest import MakeBinary

A8 = Encoding((0.1,), (12,), "uint8")


def match(
    inputs: list[TensorSpec], tensors: list[TensorInfo], outputs: list[TensorSpec] | None = None, **given: object
) -> Match:
    """Match a model's inputs (and outputs, if any) with a binary's, the last tensors being its outputs."""
    outs = outputs or [TensorSpec("y", "float32", (1,))]
    there = tensors if outputs else [*tensors, TensorInfo("y", "FLOAT_32", "float32", (1,))]
    cut = len(there) - len(outs)
    graph = GraphInfo("g", tuple(there[:cut]), tuple(there[cut:]))
    info = ContextInfo(Path("/x.bin"), "", 1, 6, "v2.51.0", "", "", "", 1, 57, 75, (graph,))
    model = Model(Path("/m.onnx"), "", tuple(inputs), tuple(outs), (), False, (), (), False)
    return match_tensors(info, model, **given)  # type: ignore[arg-type]


def floats(name: str, *shape: int | str, encoding: Encoding | None = None) -> TensorSpec:
    return TensorSpec(name, "float32", shape, encoding)


def tensor(name: str, *shape: int, encoding: Encoding | None = None) -> TensorInfo:
    if encoding is None:
        return TensorInfo(name, "FLOAT_32", "float32", shape)
    return TensorInfo(name, f"UFIXED_POINT_{encoding.bits}", encoding.dtype, shape, encoding)


# --- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "converted"),
    [
        ("x", "x"),
        ("/model.22/Concat_output_0", "_model_22_Concat_output_0"),
        ("1:out", "_1_out"),
        ("serving_default_input:0", "serving_default_input_0"),
        ("Eingäng", "Eing_ng"),
    ],
)
def test_names_become_identifiers_as_in_the_converters_code(name: str, converted: str) -> None:
    assert converted_name(name) == converted


def test_names_that_a_converter_changed_are_found_whatever_the_order() -> None:
    found = match([floats("/a.1", 1, 8), floats("2:b", 1, 8)], [tensor("_2_b", 1, 8), tensor("_a_1", 1, 8)])
    assert [(e.spec.name, e.tensor.name, e.by) for e in found.inputs] == [
        ("/a.1", "_a_1", "converted name"),
        ("2:b", "_2_b", "converted name"),
    ]
    assert found.notes == ()


def test_names_that_become_equal_in_conversion_are_not_guessed() -> None:
    with pytest.raises(ArtifactError, match=r"which input of the binary is m\.onnx's 'a\.b' and 'a/b'\?"):
        match([floats("a.b", 4), floats("a/b", 4)], [tensor("a_b", 4), tensor("other", 4)])


def test_the_only_tensor_left_of_its_shape_and_type_is_taken_and_noted() -> None:
    found = match([floats("a", 4), floats("b", 5)], [tensor("p", 5), tensor("q", 4)])
    assert [(e.spec.name, e.tensor.name) for e in found.inputs] == [("a", "q"), ("b", "p")]
    assert found.notes[0] == "'a' is taken to be the binary's 'q': the only one left of its shape and type"


def test_several_that_could_be_meant_are_refused_until_they_are_named() -> None:
    model, binary = [floats("a", 4), floats("b", 4)], [tensor("p", 4), tensor("q", 4)]
    with pytest.raises(
        ArtifactError, match=r"'a' and 'b'\? By shape and type any of 'p', 'q' could be.*names=\{'a': 'p'"
    ):
        match(model, binary)
    found = match(model, binary, names={"a": "q"})
    assert [(e.tensor.name, e.by) for e in found.inputs] == [("q", "given name"), ("p", "shape and type")]


def test_misspelt_names_and_layouts_suggest_what_was_meant() -> None:
    for given, text in (
        ({"names": {"imgae": "p"}}, r"names: .*'imgae'.*image"),
        ({"names": {"image": "pp"}}, r"names: .*context binary 'pp'"),
        ({"layouts": {"imgae": "same"}}, r"layouts: .*'imgae'"),
        ({"layouts": {"image": "channel_last"}}, r"layouts: .*channels_last"),
    ):
        with pytest.raises(OptionError, match=text):
            match([floats("image", 4)], [tensor("p", 4)], **given)


# --- shapes and layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "binary", "layout", "permutation"),
    [
        ((1, 3, 8, 9), (1, 3, 8, 9), "same", None),
        ((1, 3, 8, 9), (1, 8, 9, 3), "channels_last", (0, 2, 3, 1)),
        ((1, 8, 9, 3), (1, 3, 8, 9), "channels_first", (0, 3, 1, 2)),
        ((1, 3, 80), (1, 80, 3), "channels_last", (0, 2, 1)),
        ((1, 3, 4, 5, 6), (1, 4, 5, 6, 3), "channels_last", (0, 2, 3, 4, 1)),
        ((1, 1, 8, 8), (1, 8, 8, 1), "channels_last", (0, 2, 3, 1)),
        ((), (1,), "reshaped", None),
        ((1, 10, 1, 1), (1, 10), "reshaped", None),
        (("n", 3, 8, 9), (1, 8, 9, 3), "channels_last", (0, 2, 3, 1)),
    ],
)
def test_the_order_of_axes_follows_from_the_sizes(
    model: tuple[int | str, ...], binary: tuple[int, ...], layout: str, permutation: tuple[int, ...] | None
) -> None:
    (edge,) = match([floats("x", *model)], [tensor("x", *binary)]).inputs
    assert (edge.layout, edge.permutation) == (layout, permutation)
    assert all(isinstance(size, int) for size in edge.spec.shape)
    if permutation:
        assert np.zeros([int(s) for s in edge.spec.shape]).transpose(permutation).shape == binary


def test_sizes_that_a_model_leaves_open_are_the_binarys() -> None:
    outputs = [floats("p", "n", 3, "h", "w"), floats("q", "?")]
    found = match([], [tensor("p", 1, 8, 9, 3), tensor("q", 2, 5)], outputs)
    assert [e.spec.shape for e in found.outputs] == [(1, 3, 8, 9), (2, 5)]


def test_a_shape_that_cannot_tell_is_the_models_own_with_a_note_or_must_be_told() -> None:
    cube = [floats("x", 1, 8, 8, 8)], [tensor("x", 1, 8, 8, 8)]
    found = match(*cube)
    assert (found.inputs[0].layout, found.notes) == (
        "same",
        ("the axes of 'x' are taken to be in the model's order: its shape can't tell",),
    )
    assert match(*cube, layouts={"x": "channels_last"}).inputs[0].permutation == (0, 2, 3, 1)
    mixed = [*cube[0], floats("z", 1, 3, 5, 5)], [*cube[1], tensor("z", 1, 5, 5, 3)]
    with pytest.raises(
        ArtifactError, match=r"order of the axes of 'x' can't be told.*'z' isn't in the model's order.*layouts="
    ):
        match(*mixed)
    assert match(*mixed, layouts={"x": "same"}).notes == ()
    with pytest.raises(ArtifactError, match=r"layouts: 'z'.*doesn't become.*possible: channels_last"):
        match(*mixed, layouts={"x": "same", "z": "same"})


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "there", "text"),
    [
        (
            floats("x", 1, 4),
            tensor("x", 1, 5),
            r"'x' has another shape in the binary: \[1, 5\], the model has \[1, 4\]",
        ),
        (
            floats("x", 4),
            tensor("z", 5),
            r"m\.onnx has the input x: float32\[4\], the binary has nothing that fits.*z: FLOAT",
        ),
        (TensorSpec("x", "int32", (4,)), tensor("x", 4), r"'x' is x: FLOAT_32\[4\] in the binary and x: int32\[4\]"),
        (floats("x", 4), TensorInfo("x", "UINT_8", "uint8", (4,)), "floats can't become UINT_8 without an encoding"),
        (floats("x", 4), replace(tensor("x", 4), note="a format"), "a format"),
        (
            floats("x", 4, encoding=A8),
            tensor("x", 4, encoding=replace(A8, scale=(0.11,))),
            r"quantised differently: uint8 from -1\.32 to 26\.73 in the binary, uint8 from -1\.2 to 24\.3 in the model",
        ),
        (
            floats("x", 4, encoding=A8),
            tensor("x", 4, encoding=Encoding((0.1 / 257,), (12 * 257,), "uint16")),
            "quantised differently: uint16",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_both_sides(spec: TensorSpec, there: TensorInfo, text: str) -> None:
    with pytest.raises(ArtifactError, match=text):
        match([spec], [there])


def test_missing_and_extra_tensors_are_named() -> None:
    with pytest.raises(ArtifactError, match=r"m\.onnx has the input b: float32\[4\], the binary has nothing"):
        match([floats("a", 4), floats("b", 4)], [tensor("a", 4)])
    with pytest.raises(ArtifactError, match=r"the binary's input b: FLOAT_32\[4\] has no counterpart in m\.onnx"):
        match([floats("a", 4)], [tensor("a", 4), tensor("b", 4)])


@pytest.mark.parametrize(
    "there",
    [
        replace(A8, scale=(0.1 * (1 + 1e-7),)),  # rounded on its way through a converter's min and max
        Encoding((0.1,), (12 - 128,), "int8"),  # the same grid with a sign
    ],
)
def test_the_same_grid_written_otherwise_is_the_same(there: Encoding) -> None:
    assert match([floats("x", 4, encoding=A8)], [tensor("x", 4, encoding=there)]).inputs[0].quantized


# --- with real files ----------------------------------------------------------------------------------------------------


def test_a_converters_names_are_found_in_a_real_binary(make_binary: MakeBinary, tmp_path: Path) -> None:
    def model(name: str, first: str, second: str, out: str) -> Path:
        node = helper.make_node("Sub", [first, second], [out], name="sub")
        return small_models.save(tmp_path / name, [node], {first: [1, 8], second: [1, 8]}, {out: [1, 8]})

    binary = make_binary(model("converted.onnx", "_1_b", "_in_a", "out_0"))
    found = match_tensors(read_context_binary(binary), read_model(model("m.onnx", "1.b", "/in/a", "out:0")))
    assert [e.tensor.name for e in (*found.inputs, *found.outputs)] == ["_1_b", "_in_a", "out_0"]
    assert found.notes == ()


def test_the_binary_of_another_model_is_refused(make_binary: MakeBinary, models: Path, tmp_path: Path) -> None:
    other = small_models.quantized(models / "conv.onnx", tmp_path / "other.onnx", scale_of_data=3.0)
    with pytest.raises(ArtifactError, match=r"'x' is x: UFIXED_POINT_8\[1, 3, 16, 16\].*quantised differently"):
        match_tensors(read_context_binary(make_binary(other)), read_model(models / "conv.qdq.onnx"))
    resized = onnx.load(str(models / "conv.onnx"))
    for value in (*resized.graph.input, *resized.graph.output):
        value.type.tensor_type.shape.dim[2].dim_value = 32
    onnx.save(resized, str(tmp_path / "resized.onnx"))
    with pytest.raises(ArtifactError, match=r"'x' has another shape in the binary"):
        match_tensors(read_context_binary(make_binary(models / "conv.onnx")), read_model(tmp_path / "resized.onnx"))


def test_a_symmetric_shape_needs_to_be_told_where_it_matters(
    make_binary: MakeBinary, kinds: Path, models: Path
) -> None:
    cube = match_tensors(read_context_binary(make_binary(kinds / "cube.onnx")), read_model(kinds / "cube.onnx"))
    assert [e.layout for e in (*cube.inputs, *cube.outputs)] == ["same", "same"]
    assert len(cube.notes) == 2
