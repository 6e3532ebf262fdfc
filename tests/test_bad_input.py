"""Bad input gets a clear error that names the thing and what to do, and loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_qnn import InputError, ModelError, OptionError, Tolerance, UsageError, assert_matches_reference
from pytest_qnn.backend import Backend
from pytest_qnn.bench import Bench
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.session import Session
from tests import small_models

# --- files ---------------------------------------------------------------------------------------------------------------


def empty(path: Path, models: Path) -> None:
    path.write_bytes(b"")


def folder(path: Path, models: Path) -> None:
    path.mkdir()


def text(path: Path, models: Path) -> None:
    path.write_text("this is not a model\n" * 20)


def truncated(path: Path, models: Path) -> None:
    content = (models / "conv.onnx").read_bytes()
    path.write_bytes(content[: len(content) // 2])


def without_outputs(path: Path, models: Path) -> None:
    proto = onnx.load(str(models / "conv.onnx"))
    del proto.graph.output[:]
    onnx.save(proto, str(path))


def picture(path: Path, models: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8)


def with_dangling_node(path: Path, models: Path) -> None:
    small_models.save(path, [helper.make_node("Relu", ["nowhere"], ["y"], name="r")], {"x": [1, 4]}, {"y": [1, 4]})


FILES: dict[str, tuple[Callable[[Path, Path], None] | None, str]] = {
    "missing": (None, "can't be read: No such file or directory. Check the path"),
    "empty": (empty, r"the model is empty \(0 bytes\)"),
    "folder": (folder, "this is a folder"),
    "text": (text, "not an ONNX model, or truncated"),
    "picture": (picture, "not an ONNX model, or truncated"),
    "truncated": (truncated, "not an ONNX model, or truncated"),
    "without outputs": (without_outputs, "the graph has no outputs"),
}


@pytest.mark.parametrize(("make", "message"), FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("role", ["model", "float_model"])
def test_a_file_that_is_no_model(
    htp: Backend, models: Path, tmp_path: Path, make: Callable[[Path, Path], None] | None, message: str, role: str
) -> None:
    file = tmp_path / "broken.onnx"
    if make is not None:
        make(file, models)
    paths = {"model": models / "conv.qdq.onnx", "float_model": models / "conv.onnx", role: file}
    with pytest.raises(ModelError, match=f"broken.onnx: .*{message}"):
        htp.load(paths["model"], float_model=paths["float_model"])


def test_a_graph_that_onnxruntime_refuses(htp: Backend, tmp_path: Path) -> None:
    file = tmp_path / "dangling.onnx"
    with_dangling_node(file, tmp_path)
    with pytest.raises(Exception, match="nowhere") as caught:
        htp.load(file)
    assert type(caught.value).__name__ == "CompileError"


@pytest.mark.parametrize(
    ("damage", "message"),
    [("missing", "external data file 'weights.bin' of tensor 'w' is missing"), ("short", "'weights.bin' is truncated")],
)
def test_external_data_that_is_not_there(htp: Backend, models: Path, tmp_path: Path, damage: str, message: str) -> None:
    proto = onnx.load(str(models / "conv.onnx"))
    onnx.save(
        proto,
        str(tmp_path / "m.onnx"),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    session = htp.load(tmp_path / "m.onnx")
    assert assert_matches_reference(session.run(seeded_inputs(session))).ok
    data = tmp_path / "weights.bin"
    content = data.read_bytes()
    data.unlink()
    if damage == "short":
        data.write_bytes(content[:10])
    with pytest.raises(ModelError, match=message):
        htp.load(tmp_path / "m.onnx")


def test_external_data_outside_of_the_folder_is_not_followed(htp: Backend, models: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(models / "conv.onnx"))
    tensor = proto.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="lies outside of the model's folder"):
        htp.load(tmp_path / "m.onnx")


def test_a_misspelt_file_name_is_recognized(htp: Backend, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    with pytest.raises(ModelError, match=r"conv.onx: there is no such file in .* Did you mean 'conv.onnx'\?"):
        htp.load("conv.qdq.onnx", float_model="conv.onx")


# --- dynamic dimensions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.unary(tmp_path_factory.mktemp("dynamic") / "dynamic.onnx", "Relu", shape=("batch", 16))


def test_dynamic_dimensions_left_open(htp: Backend, dynamic: Path) -> None:
    with pytest.raises(ModelError, match=r"x: float32\[batch, 16\] has dynamic dimensions.*dimensions=\{'batch': 1\}"):
        htp.load(dynamic)


def test_dynamic_dimensions_given(htp: Backend, dynamic: Path) -> None:
    session = htp.load(dynamic, dimensions={"batch": 3})
    assert session.inputs[0].shape == (3, 16)
    assert assert_matches_reference(session.run(seeded_inputs(session))).ok


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [({"bath": 1}, "no dynamic dimension 'bath'; it has \\['batch'\\]"), ({"batch": 0}, "at least 1, got 0")],
)
def test_senseless_dimensions(htp: Backend, dynamic: Path, dimensions: dict[str, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        htp.load(dynamic, dimensions=dimensions)


def test_shapes_without_elements_are_refused_before_they_crash_the_runtime(htp: Backend, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"x: float32\[0, 4\] has no elements"):
        htp.load(small_models.unary(tmp_path / "zero.onnx", "Relu", shape=(0, 4)))


# --- inputs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(htp: Backend, models: Path) -> Session:
    return htp.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")


GOOD = np.zeros((1, 3, 16, 16), np.float32)
WITH_NAN = GOOD.copy()
WITH_NAN[0, 1, 2, 3] = np.nan
INPUTS: dict[str, tuple[Any, str]] = {
    "unknown name": ({"x": GOOD, "X": GOOD}, "unknown input 'X'. Did you mean 'x'"),
    "missing name": ({}, r"input x: float32\[1, 3, 16, 16\] is missing"),
    "wrong rank": ({"x": GOOD[0]}, r"got shape \[3, 16, 16\]: the batch axis is missing"),
    "other layout": ({"x": GOOD.transpose(0, 2, 3, 1)}, "got shape .*the other of NCHW and NHWC"),
    "wrong size": ({"x": np.zeros((1, 3, 8, 8), np.float32)}, r"got shape \[1, 3, 8, 8\]"),
    "empty batch": ({"x": GOOD[:0]}, "the batch is empty"),
    "float64": ({"x": GOOD.astype(np.float64)}, r"got dtype float64: convert it with .astype\(np.float32\)"),
    "uint8": ({"x": GOOD.astype(np.uint8)}, "got dtype uint8"),
    "a list": ({"x": GOOD.tolist()}, "expected a numpy array, got list"),
    "NaN": ({"x": WITH_NAN}, r"input 'x' has 1 NaN or infinite elements, the first at \[0, 1, 2, 3\]"),
    "infinity": ({"x": np.full_like(GOOD, np.inf)}, "has 768 NaN or infinite elements"),
    "no samples": ([], "no samples"),
    "not a dict": ([3], r"\(sample 0 of the list\): expected a dict of arrays, got int"),
    "second sample": ([{"x": GOOD}, {"x": GOOD[0]}], r"\(sample 1 of the list\): input x"),
    "a text": ("x", "expected a dict of arrays, got str"),
}


@pytest.mark.parametrize(("inputs", "message"), INPUTS.values(), ids=INPUTS.keys())
def test_inputs_that_do_not_fit(session: Session, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"conv.qdq.onnx on htp.*{message}"):
        session.run(inputs)
    assert session.run(GOOD).output().shape == (1, 8, 16, 16), "the session must go on working"


def test_big_endian_arrays_are_read_as_what_they_mean(session: Session) -> None:
    x = seeded_inputs(session, 1)[0]["x"]
    assert np.array_equal(session.run(x.astype(">f4")).output(), session.run(x).output())


def test_arrays_with_gaps_are_read_as_what_they_mean(session: Session) -> None:
    x = seeded_inputs(session, 1)[0]["x"]
    with_gaps = np.zeros((1, 3, 32, 32), np.float32)[:, :, ::2, ::2]
    with_gaps[...] = x
    assert np.array_equal(session.run(with_gaps).output(), session.run(x).output())


def test_an_array_alone_is_ambiguous_for_several_inputs(htp: Backend, tmp_path: Path) -> None:
    node = helper.make_node("Add", ["a", "b"], ["y"], name="add")
    two = htp.load(small_models.save(tmp_path / "add.onnx", [node], {"a": [1, 4], "b": [1, 4]}, {"y": [1, 4]}))
    with pytest.raises(InputError, match=r"the model has inputs \['a', 'b'\]: pass a dict"):
        two.run(np.zeros((1, 4), np.float32))


# --- twins ----------------------------------------------------------------------------------------------------------------


def test_a_float_model_that_is_not_the_original(htp: Backend, models: Path, tmp_path: Path) -> None:
    other = small_models.unary(tmp_path / "other.onnx", "Relu", shape=(1, 3, 16, 16))
    with pytest.raises(
        ModelError, match=r"other.onnx is not the original of conv.qdq.onnx: output y: float32\[1, 3, 16, 16\]"
    ):
        htp.load(models / "conv.qdq.onnx", float_model=other)


def test_a_float_model_with_other_names(htp: Backend, models: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(models / "conv.onnx"))
    proto.graph.input[0].name = "image"
    proto.graph.node[0].input[0] = "image"
    onnx.save(proto, str(tmp_path / "renamed.onnx"))
    with pytest.raises(ModelError, match=r"its inputs are \['image'\], not \['x'\]"):
        htp.load(models / "conv.qdq.onnx", float_model=tmp_path / "renamed.onnx")


def test_a_quantized_model_on_the_cpu_backend_needs_its_float_original(cpu: Backend, models: Path) -> None:
    with pytest.raises(UsageError, match="computes in float only.*pass float_model= with the float original"):
        cpu.load(models / "conv.qdq.onnx")


# --- calls ----------------------------------------------------------------------------------------------------------------


def test_assertions_say_what_they_take(session: Session) -> None:
    with pytest.raises(UsageError, match="takes what session.run"):
        assert_matches_reference(session)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, "soon", True])
def test_a_deadline_must_be_a_positive_number(htp: Backend, models: Path, value: Any) -> None:
    with pytest.raises(OptionError, match="run_timeout must be a number of seconds greater than 0"):
        htp.load(models / "conv.onnx", run_timeout=value)


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_a_senseless_number_of_inputs(models: Path, count: Any) -> None:
    with pytest.raises(InputError, match="count must be a whole number of at least 1"):
        seeded_inputs(models / "conv.onnx", count)


def test_the_reference_of_a_broken_model_is_an_error_too(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "dangling.onnx"
    with_dangling_node(file, tmp_path)
    with pytest.raises(ModelError, match="nowhere"):
        bench.reference(file).run({"x": np.zeros((1, 4), np.float32)})


# --- twins of other kinds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False], ids=["the same file", "another quantised file"])
def test_a_quantized_float_model_is_refused(htp: Backend, models: Path, tmp_path: Path, same: bool) -> None:
    other = models / "conv.qdq.onnx"
    if not same:
        other = small_models.quantized(models / "conv.onnx", tmp_path / "other.onnx")
    with pytest.raises(ModelError, match=r"is itself quantised \(A8W8\): pass the float original"):
        htp.load(models / "conv.qdq.onnx", float_model=other)


def test_exchanged_models_are_noticed(htp: Backend, models: Path) -> None:
    with pytest.raises(ModelError, match="it looks as if conv.onnx were that, and the two exchanged"):
        htp.load(models / "conv.onnx", float_model=models / "conv.qdq.onnx")


def test_a_float_model_may_have_dynamic_dimensions_where_the_quantized_one_has_none(
    htp: Backend, cpu: Backend, models: Path, tmp_path: Path
) -> None:
    proto = onnx.load(str(models / "conv.onnx"))
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(proto, str(tmp_path / "dynamic.onnx"))
    for backend in (htp, cpu):
        for dimensions in (None, {"batch": 1}):
            session = backend.load(
                models / "conv.qdq.onnx", float_model=tmp_path / "dynamic.onnx", dimensions=dimensions
            )
            assert assert_matches_reference(session.run(seeded_inputs(session))).ok


# --- limits that can't apply ------------------------------------------------------------------------------------------------------


def test_steps_of_an_output_without_encoding_are_the_tests_mistake(htp: Backend, models: Path) -> None:
    session = htp.load(models / "conv.onnx")
    with pytest.raises(OptionError, match="output 'y' isn't quantised, so it has no steps"):
        assert_matches_reference(session.run(seeded_inputs(session)), Tolerance(steps=2))


def test_steps_hold_on_the_cpu_backend_too(cpu: Backend, models: Path) -> None:
    """The float model runs there; a step is the quantised model's."""
    session = cpu.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    assert assert_matches_reference(session.run(seeded_inputs(session)), Tolerance(steps=1)).ok


def test_more_classes_asked_for_than_there_are(session: Session) -> None:
    with pytest.raises(OptionError, match=r"has 16 classes \(its last axis\), so top_k=16 says nothing"):
        assert_matches_reference(session.run(seeded_inputs(session)), Tolerance(top_k=16))


@pytest.mark.parametrize("tolerance", [0.1, {"y": 2}, "tight"])
def test_a_tolerance_that_is_none(session: Session, tolerance: Any) -> None:
    with pytest.raises(UsageError, match="must be a Tolerance"):
        assert_matches_reference(session.run(GOOD), tolerance)


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ("Erf", r"takes True or a list of operators or node names, got 'Erf'"),
        (["Erff"], "unknown operator or node 'Erff'"),
    ],
)
def test_what_may_run_elsewhere_must_exist(htp: Backend, models: Path, allowed: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        htp.load(models / "conv.onnx", allow_cpu=allowed)


def test_inputs_of_a_reference_are_checked_too(bench: Bench, models: Path) -> None:
    with pytest.raises(InputError, match=r"conv.onnx on the onnxruntime reference: unknown input 'y'"):
        bench.reference(models / "conv.onnx").run({"y": GOOD})


def test_arrays_that_the_caller_reuses_do_not_change_what_is_judged(htp: Backend, models: Path) -> None:
    session = htp.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    buffer = seeded_inputs(session, 1)[0]["x"]
    run = session.run(buffer)
    buffer[:] = 0
    assert assert_matches_reference(run).ok
