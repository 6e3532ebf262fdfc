"""Encodings files: what each format says is read, what is written reads back the same, what it can't say is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qnn import EncodingError, OptionError
from pytest_qnn.model import (
    Encoding,
    EncodingSet,
    Precision,
    TensorEncoding,
    check_encodings,
    read_encodings,
    read_graph,
    write_encodings,
)
from tests.encodings.strategies import TENSORS, model, sets
from tests.encodings.strategies import encodings as any_encoding

FLOATS = (Precision("float", 16), Precision("float", 32))
SEED = {  # as the QNN tool chain's document shows it: objects instead of lists, a positive offset, bit widths beside the sections
    "activation_encodings": {"relu": {"bitwidth": 8, "max": 6.0, "min": 0.0, "scale": 0.023529, "offset": 0}},
    "param_encodings": {"weight": {"bitwidth": 8, "max": 2.5, "min": -2.5, "scale": 0.019608, "offset": 127}},
    "activation_bitwidth": 8,
    "param_bitwidth": 8,
    "bias_bitwidth": 32,
}


def read(document: object, tmp_path: Path, **options: Any) -> EncodingSet:
    file = tmp_path / "given.encodings"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return read_encodings(file, **options)


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("encodings") / "m.onnx")


# --- round trips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["aimet-0.6.1", "aimet-1.0.0", "aimet-2.0.0", "qnn"])
def test_a_written_set_reads_back_the_same(
    format: str, float_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    graph = read_graph(float_model)
    file = tmp_path_factory.mktemp("round") / "e.json"
    precisions = {"aimet-2.0.0": (), "qnn": (*FLOATS, Precision("int", 8), Precision("int", 16))}.get(format, FLOATS)

    @settings(max_examples=80, deadline=None)
    @given(sets(plain=format != "aimet-2.0.0", precisions=precisions))
    def round_trip(given_set: EncodingSet) -> None:
        write_encodings(given_set, file, format, graph)
        found = read_encodings(file, graph)
        assert found.by_name == given_set.by_name
        assert (found.about, found.format, found.notes) == (given_set.about, format, ())

    round_trip()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_set_survives_a_journey_through_all_formats(
    float_model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    given_set = data.draw(sets())
    file, found = tmp_path_factory.getbasetemp() / "journey.json", given_set
    for format in data.draw(st.permutations(["aimet-0.6.1", "aimet-1.0.0", "aimet-2.0.0", "qnn"])):
        write_encodings(found, file, format, float_model)
        found = read_encodings(file, float_model)
    assert found.by_name == given_set.by_name
    assert check_encodings(found, read_graph(float_model)) == ()


@settings(max_examples=40, deadline=None)
@given(any_encoding(6, None, plain=True))
def test_without_a_model_the_axis_stays_open(tmp_path_factory: pytest.TempPathFactory, encoding: Encoding) -> None:
    file = tmp_path_factory.getbasetemp() / "open.json"
    write_encodings(EncodingSet((TensorEncoding("w", "param", encoding),)), file, "aimet-1.0.0")
    found = read_encodings(file)
    assert found.params == {"w": encoding}
    assert found.params["w"].unbound
    with pytest.raises(EncodingError, match=r"must say along which axis: name the float model"):
        write_encodings(found, file, "aimet-2.0.0")


def test_blocks_of_a_matrix_are_turned_as_aimet_turns_them(float_model: Path, tmp_path: Path) -> None:
    """1.0.0 lists [output channels, blocks] whatever the weight's layout; this MatMul's weight is [8 inputs, 3 outputs]."""
    entry = {"name": "w3", "enc_type": "PER_BLOCK", "dtype": "INT", "bw": 4, "is_sym": True, "block_size": 4}
    entry |= {"scale": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "offset": [-8] * 6}
    document = {"version": "1.0.0", "activation_encodings": [], "param_encodings": [entry]}
    found = read(document, tmp_path, model=float_model)
    expected = Encoding((1.0, 3.0, 5.0, 2.0, 4.0, 6.0), (0,) * 6, "int4", 0, 4, (2, 3))
    assert found.params == {"w3": expected}
    for format in ("aimet-1.0.0", "aimet-2.0.0"):
        write_encodings(found, tmp_path / "b.json", format, float_model)
        assert read_encodings(tmp_path / "b.json", float_model).params == {"w3": expected}
    write_encodings(found, tmp_path / "b.json", "aimet-1.0.0", float_model)
    assert json.loads((tmp_path / "b.json").read_text()) == document


# --- what formats say ---------------------------------------------------------------------------------------------------


def test_one_encoding_in_every_formats_words(float_model: Path, tmp_path: Path) -> None:
    """Offsets are minus the zero point on the unsigned grid, but in 2.0.0, which writes ONNX's zero point."""
    values = {"x": Encoding((0.5,), (3,), "uint8"), "w": Encoding((0.25,) * 6, (0,) * 6, "int8", 0)}
    given_set = EncodingSet(
        tuple(TensorEncoding(n, "param" if TENSORS[n][0] else "activation", e) for n, e in values.items())
    )

    def written(format: str) -> Any:
        write_encodings(given_set, tmp_path / "e.json", format, float_model)
        return json.loads((tmp_path / "e.json").read_text())

    x = {"bitwidth": 8, "dtype": "int", "is_symmetric": "False", "max": 126.0, "min": -1.5, "offset": -3, "scale": 0.5}
    w = {
        "bitwidth": 8,
        "dtype": "int",
        "is_symmetric": "True",
        "max": 31.75,
        "min": -32.0,
        "offset": -128,
        "scale": 0.25,
    }
    sections = {"activation_encodings": {"x": [x]}, "param_encodings": {"w": [w] * 6}}
    assert written("qnn") == sections
    assert written("aimet-0.6.1") == {"version": "0.6.1", **sections}
    one = {
        "enc_type": "PER_TENSOR",
        "dtype": "INT",
        "bw": 8,
        "is_sym": False,
        "scale": [0.5],
        "offset": [-3],
        "name": "x",
    }
    each = {
        "enc_type": "PER_CHANNEL",
        "dtype": "INT",
        "bw": 8,
        "is_sym": True,
        "scale": [0.25] * 6,
        "offset": [-128] * 6,
    }
    assert written("aimet-1.0.0") == {
        "version": "1.0.0",
        "activation_encodings": [one],
        "param_encodings": [{**each, "name": "w"}],
    }
    assert written("aimet-2.0.0") == {
        "version": "2.0.0",
        "encodings": [
            {"name": "x", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 3},
            {"name": "w", "output_dtype": "int8", "y_scale": [0.25] * 6, "axis": 0},
        ],
    }


def test_the_axis_of_channels_is_the_operators(float_model: Path, tmp_path: Path) -> None:
    entries = {
        name: [{"bitwidth": 8, "is_symmetric": "True", "scale": 0.5, "offset": -128}] * channels
        for name, (param, channels, _) in TENSORS.items()
        if param
    }
    found = read({"version": "0.6.1", "param_encodings": entries}, tmp_path, model=float_model)
    assert {n: e.axis for n, e in found.params.items()} == {"w": 0, "b": 0, "w2": 1, "w3": 1}


def test_one_object_with_lists_is_a_per_channel_encoding(tmp_path: Path) -> None:
    lists = {"bitwidth": 8, "is_symmetric": "True", "min": [-1.0, -2.0], "max": [1.0, 2.0], "scale": [2 / 255, 4 / 255]}
    found = read({"param_encodings": {"w": [{**lists, "offset": [-128, -128]}]}}, tmp_path)
    assert found.params["w"] == Encoding((2 / 255, 4 / 255), (0, 0), "int8")


def test_entries_that_state_a_precision_alone(tmp_path: Path) -> None:
    section = {"a": [{"bitwidth": 16, "dtype": "float"}], "b": [{"bitwidth": 16, "dtype": "int"}]}
    found = read({"activation_encodings": section}, tmp_path)
    assert [t.value for t in found.tensors] == [Precision("float", 16), Precision("int", 16)]


@pytest.mark.parametrize(
    ("symmetric", "low", "high", "expected"),
    [
        (None, -1.0, 4.1, Encoding((0.02,), (50,), "uint8")),
        ("True", -2.54, 2.54, Encoding((0.02,), (0,), "int8")),
    ],
)
def test_a_range_alone_is_enough_for_qnn(
    tmp_path: Path, symmetric: str | None, low: float, high: float, expected: Encoding
) -> None:
    entry = {"bitwidth": 8, "min": low, "max": high} | ({"is_symmetric": symmetric} if symmetric else {})
    found = read({"activation_encodings": {"a": [entry]}}, tmp_path).activations["a"]
    assert (found.zero_point, found.dtype) == (expected.zero_point, expected.dtype)
    assert found.scale == pytest.approx(expected.scale)


def test_what_a_file_says_of_itself_is_kept(tmp_path: Path) -> None:
    found = read({**SEED, "quantizer_args": {"quant_scheme": "min_max"}}, tmp_path)
    assert dict(found.about) == {
        "activation_bitwidth": 8,
        "param_bitwidth": 8,
        "bias_bitwidth": 32,
        "quantizer_args": {"quant_scheme": "min_max"},
    }
    write_encodings(found, tmp_path / "again.json")
    assert read_encodings(tmp_path / "again.json").about == found.about


# --- signs --------------------------------------------------------------------------------------------------------------


def test_the_documents_example_has_its_offset_the_other_way_round(tmp_path: Path) -> None:
    found = read(SEED, tmp_path)
    assert found.activations == {"relu": Encoding((0.023529,), (0,), "uint8")}
    assert found.params == {"weight": Encoding((0.019608,), (127,), "uint8")}
    assert found.params["weight"].range == pytest.approx((-2.490216, 2.509824))
    (note,) = found.notes
    assert "param 'weight' (min and max -2.5 .. 2.5, really -2.49022 .. 2.50982)" in note
    assert "read as real = (q - offset) * scale, q from 0" in note
    assert check_encodings(found) == ()


def entry_of(offset: int, low: float, high: float, bits: int = 8, **more: Any) -> dict[str, Any]:
    return {"bitwidth": bits, "min": low, "max": high, "offset": offset, "scale": (high - low) / (2**bits - 1), **more}


@pytest.mark.parametrize(
    ("entry", "zero_point", "dtype", "noted"),
    [
        (entry_of(-100, -1.0, 1.55), 100, "uint8", False),
        (entry_of(100, -1.0, 1.55), 100, "uint8", True),
        (entry_of(-128, -1.28, 1.27, is_symmetric="True"), 0, "int8", False),
        (entry_of(0, -1.28, 1.27, is_symmetric="True"), 0, "int8", True),
        (entry_of(0, -1.28, 1.27), 0, "int8", True),
        (entry_of(0, 0.0, 2.55, is_symmetric="True"), 0, "uint8", False),
        (entry_of(-8, -1.6, 1.4, bits=4, is_symmetric="True"), 0, "int4", False),
        (entry_of(0, -214748.3648, 214748.3647, bits=32), 0, "int32", True),
        (entry_of(-(2**31), -214748.3648, 214748.3647, bits=32), 0, "int32", False),
        (entry_of(-33605, -4.023147581, 3.822499, bits=16), 33605, "uint16", False),
    ],
)
def test_min_and_max_tell_how_an_offset_is_meant(
    tmp_path: Path, entry: dict[str, Any], zero_point: int, dtype: str, noted: bool
) -> None:
    found = read({"activation_encodings": {"a": [entry]}}, tmp_path)
    assert (found.activations["a"].zero_point, found.activations["a"].dtype) == ((zero_point,), dtype)
    assert bool(found.notes) == noted


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {**entry_of(-100, -1.0, 1.55), "offset": 30},
            r"'scale' 0\.01 and 'offset' 30 of 8 bits mean .* fit none of them",
        ),
        ({**entry_of(-100, -1.0, 1.55), "scale": 0.05}, "fit none of them"),
        ({"bitwidth": 8, "scale": 0.1, "offset": 127}, "field 'offset' is 127, but QNN's are 0 or below"),
        ({"bitwidth": 8, "scale": 0.1, "offset": 0, "is_symmetric": "True"}, "give 'min' and 'max'"),
    ],
)
def test_an_offset_that_nothing_explains_is_refused(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(EncodingError, match=f"param 'w': .*{message}"):
        read({"param_encodings": {"w": [entry]}}, tmp_path)


def test_in_a_file_of_aimets_the_offset_has_one_meaning(tmp_path: Path) -> None:
    found = read({**SEED, "version": "0.6.1"}, tmp_path)
    outside, turned = check_encodings(found)
    assert "param 'weight': zero point is -127 (offset 127), outside of uint8's 0 .. 255" in outside
    assert turned.endswith("the offset has the wrong sign")


# --- broken files -------------------------------------------------------------------------------------------------------

GOOD = {"bitwidth": 8, "scale": 0.5, "offset": -3, "dtype": "int", "is_symmetric": "False"}
ONE = {"name": "w", "enc_type": "PER_TENSOR", "dtype": "INT", "bw": 8, "is_sym": True, "scale": [0.5], "offset": [-128]}
TWO = {"name": "w", "output_dtype": "int8", "y_scale": 0.5}


def zero(**fields: Any) -> dict[str, Any]:
    return {"version": "0.6.1", "param_encodings": {"w": [{k: v for k, v in (GOOD | fields).items() if v != "gone"}]}}


def first(**fields: Any) -> dict[str, Any]:
    return {"version": "1.0.0", "param_encodings": [{k: v for k, v in (ONE | fields).items() if v != "gone"}]}


def second(**fields: Any) -> dict[str, Any]:
    return {"version": "2.0.0", "encodings": [{k: v for k, v in (TWO | fields).items() if v != "gone"}]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("", "broken JSON at line 1, column 1"),
        ('{"version": ', "broken JSON at line 1, column 13: Expecting value"),
        ("// config.json\n{}", "broken JSON at line 1, column 1: Expecting value. JSON has no comments: remove it"),
        ("[1, 2]", "expected an object, got list"),
        ("{}", "has neither 'activation_encodings' nor 'param_encodings' nor 'encodings', but nothing"),
        ({"weights": {}}, "but 'weights'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"param_encodings": {"w": {}, "w": {}}}', "'w' is defined twice"),
        (
            {"version": "3.0.0", "encodings": []},
            "field 'version': unknown encodings version '3.0.0'.*Known: 0.6.1, 1.0.0, 2.0.0",
        ),
        ({"version": 1.0, "encodings": []}, "field 'version': unknown encodings version 1.0"),
        ({"version": ["1.0.0"], "encodings": []}, r"field 'version': unknown encodings version \['1.0.0'\]"),
        (
            {"version": "1.0.0", "param_encodings": {"w": []}},
            "field 'param_encodings' must be a list in aimet-1.0.0, got dict",
        ),
        (
            {"version": "0.6.1", "param_encodings": [ONE]},
            "field 'param_encodings' must be an object in aimet-0.6.1, got list",
        ),
        ({"version": "2.0.0", "param_encodings": []}, "field 'encodings' is missing"),
        ({"param_encodings": {"w": 7}}, "param 'w': must be an object with fields, got 7"),
        ({"param_encodings": {"w": []}}, "param 'w': has no encodings: its list is empty"),
        (zero(bitwidth="gone"), "param 'w': field 'bitwidth' is missing; there are dtype, is_symmetric, offset, scale"),
        (zero(bitwidth="8"), "param 'w': field 'bitwidth' must be a number, got '8'"),
        (zero(bitwidth=5), "param 'w': 5 bits: only 4, 8, 16, 32 can be applied"),
        (zero(scale=True), "param 'w': field 'scale' must be a number, got true"),
        (zero(scale=None), "param 'w': field 'scale' is missing"),
        (zero(scale=[0.1, 0.2]), "param 'w': field 'offset' has 1 values, 'scale' 2"),
        (zero(offset="gone"), "param 'w': field 'offset' is missing"),
        (zero(offset=-3.5), "param 'w': field 'offset' must be a whole number, got -3.5"),
        (zero(dtype="bfloat"), "param 'w': field 'dtype' must be one of int, float, got 'bfloat'"),
        (zero(is_symmetric="maybe"), "param 'w': field 'is_symmetric' must be true or false, got 'maybe'"),
        (zero(min=0.0), "param 'w': field 'max' is missing"),
        ({"param_encodings": {"w": [GOOD, {**GOOD, "bitwidth": 4}]}}, "field 'bitwidth' differs between channels"),
        ({"version": "1.0.0", "param_encodings": [{}]}, "entry 0 of 'param_encodings': field 'name' is missing"),
        (first(enc_type="PER_ROW"), "param 'w': field 'enc_type' must be one of PER_TENSOR, PER_CHANNEL"),
        (first(enc_type="LPBQ"), "param 'w': field 'enc_type' is LPBQ"),
        (first(is_sym="gone"), "param 'w': field 'is_sym' is missing"),
        (first(scale=[0.5, 0.5], offset=[-1, -1]), "field 'scale' has 2 values in a PER_TENSOR encoding"),
        (first(enc_type="PER_BLOCK"), "field 'block_size' is missing"),
        (first(zero_point_shift=[0.5]), "field 'zero_point_shift' moves zero"),
        (second(output_dtype="float8e4m3fn"), "tensor 'w': field 'output_dtype' is 'float8e4m3fn'"),
        (second(y_scale=[0.1, 0.2]), "field 'axis' is missing"),
        (second(y_scale=[[0.1], [0.2, 0.3]], axis=0, block_size=2), "field 'y_scale' must be lists of equal length"),
        (second(y_scale=[[0.1], [0.2]], axis=0), "has 2 dimensions, but there is no 'block_size'"),
        (second(y_scale=[], axis=0), "field 'y_scale' has an empty list"),
        (second(y_zero_point=-0.5), "field 'y_zero_point' must be a whole number, got -0.5"),
        (second(y_zero_point=[1, 2]), r"field 'y_zero_point' has shape \[2\], 'y_scale' \[\]"),
        (second(y_scale={"x": [3], "x_scale": 0.1}), "field 'y_scale' makes this LPBQ"),
        (second(per_block_int_scale=[[3]]), "field 'per_block_int_scale' makes this LPBQ"),
    ],
)
def test_a_broken_file_names_file_tensor_and_field(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(EncodingError, match=f"given.encodings: .*{message}"):
        read(document, tmp_path)


def test_every_broken_entry_is_named_at_once(tmp_path: Path) -> None:
    section = {"a": [{**GOOD, "scale": "x"}], "b": [GOOD], "c": [{**GOOD, "offset": None}]}
    with pytest.raises(EncodingError, match="2 problems") as caught:
        read({"version": "0.6.1", "activation_encodings": section}, tmp_path)
    assert [p.split(":")[0] for p in caught.value.problems] == ["activation 'a'", "activation 'c'"]


def test_what_is_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "picture.encodings").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(EncodingError, match="it is no text"):
        read_encodings(tmp_path / "picture.encodings")
    with pytest.raises(EncodingError, match="can't be read: No such file"):
        read_encodings(tmp_path / "nowhere.encodings")
    with pytest.raises(EncodingError, match="can't be read: Is a directory"):
        read_encodings(tmp_path)


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda children: (
            st.lists(children, max_size=3)
            | st.dictionaries(
                st.sampled_from([*GOOD, *ONE, *TWO, "min", "max", "axis", "block_size"]), children, max_size=6
            )
        ),
        max_leaves=12,
    ),
    st.sampled_from(["0.6.1", "1.0.0", "2.0.0", None]),
)
def test_no_entry_gets_past_the_reader_in_disorder(
    tmp_path_factory: pytest.TempPathFactory, entry: object, version: str | None
) -> None:
    """Whatever stands in a file, it is read, or refused with the file's name: nothing else is raised."""
    file = tmp_path_factory.getbasetemp() / "any.json"
    entries = [entry] if version in ("1.0.0", "2.0.0") else {"w": entry}
    document = {"encodings" if version == "2.0.0" else "param_encodings": entries}
    file.write_text(json.dumps(document if version is None else {"version": version, **document}))
    try:
        check_encodings(read_encodings(file))
    except EncodingError as error:
        assert "any.json" in str(error)  # noqa: PT017


# --- what a format can't say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "format", "message"),
    [
        (Encoding((0.5,), (3,), "int8"), "aimet-0.6.1", r"int8 with zero point 3 can't be said: .* as_unsigned"),
        (Encoding((0.5,), (3,), "int8"), "aimet-1.0.0", "int8 with zero point 3"),
        (Encoding((0.5,), (3,), "int8"), "qnn", "int8 with zero point 3"),
        (Encoding((0.5,) * 4, (0,) * 4, "int4", 0, 4, (2, 2)), "aimet-0.6.1", "block_size 4 can't be said"),
        (Encoding((0.5,) * 6, (0,) * 6, "int8", 0), "qnn", "axis 0 can't be said"),
        (Precision("float", 16), "aimet-2.0.0", "float16 without a scale can't be said"),
        (Precision("int", 16), "aimet-1.0.0", "int16 without a scale can't be said"),
        (Encoding((float("nan"),), (0,), "int8"), "aimet-2.0.0", "scale nan can't be said"),
    ],
)
def test_what_a_format_cannot_say_is_refused_by_name(tmp_path: Path, value: Any, format: str, message: str) -> None:
    given_set = EncodingSet((TensorEncoding("w", "param", value),))
    with pytest.raises(EncodingError, match=rf"can't be written as {format}: param 'w': {message}"):
        write_encodings(given_set, tmp_path / "e.json", format)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_axis_is_not_written_where_the_file_would_mean_another(float_model: Path, tmp_path: Path) -> None:
    given_set = EncodingSet((TensorEncoding("w", "param", Encoding((0.5,) * 4, (0,) * 4, "int8", 1)),))
    with pytest.raises(EncodingError, match="axis 1 can't be said: this format means the output channels' axis"):
        write_encodings(given_set, tmp_path / "e.json", "aimet-1.0.0", float_model)


def test_the_unsigned_grid_makes_a_signed_set_writable(tmp_path: Path) -> None:
    given_set = EncodingSet((TensorEncoding("w", "param", Encoding((0.5,), (3,), "int8")),))
    write_encodings(given_set.as_unsigned(), tmp_path / "e.json", "qnn")
    assert read_encodings(tmp_path / "e.json").params["w"] == Encoding((0.5,), (131,), "uint8")


def test_writing_to_where_nothing_can_be_written(tmp_path: Path) -> None:
    given_set = EncodingSet((TensorEncoding("w", "param", Encoding((0.5,), (0,), "int8")),))
    with pytest.raises(OptionError, match="unknown encodings format 'aimet-1.0'. Did you mean 'aimet-1.0.0'"):
        write_encodings(given_set, tmp_path / "e.json", "aimet-1.0")
    with pytest.raises(OptionError, match="can't be written: No such file or directory"):
        write_encodings(given_set, tmp_path / "no" / "e.json", "qnn")
    twice = EncodingSet(given_set.tensors * 2)
    with pytest.raises(EncodingError, match="param 'w': is defined twice"):
        write_encodings(twice, tmp_path / "e.json", "aimet-1.0.0")


def test_an_absent_section_is_noted(tmp_path: Path) -> None:
    file = tmp_path / "half.encodings"
    file.write_text('{"version": "1.0.0", "activation_encodings": []}')
    assert read_encodings(file).notes == ("there is no 'param_encodings', which AIMET writes even if it is empty",)
