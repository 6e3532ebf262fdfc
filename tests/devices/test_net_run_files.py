"""What stands in qnn-net-run's files and logs, without a device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn import ArtifactError, OptionError
from pytest_qnn.artifacts.binary import TensorInfo
from pytest_qnn.artifacts.matching import Edge
from pytest_qnn.errors import BackendUnavailableError, DeviceFileError, ExecutionError, InputError, RuntimeCrashError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.runners.net_run.command import data_arguments
from pytest_qnn.runners.net_run.invocation import Usage, check_outputs, read_usage
from pytest_qnn.runners.net_run.log import Surroundings, failure, lines_of, stand_in_notes, succeeded
from pytest_qnn.runners.net_run.names import check_names, input_line, sanitized
from pytest_qnn.runners.net_run.profiling import times_ms
from pytest_qnn.runners.net_run.raw_files import RawFile, raw_files
from pytest_qnn.runners.profile import Event, Profile

NEAR = Surroundings("m.onnx on htp", "m.bin", "/w/runtime", "/w/runtime;/dsp", 75)


def edge(
    dtype: str, tensor: str, encoding: Encoding | None = None, shape: tuple[int, ...] = (2, 3), **how: object
) -> Edge:
    """A model's tensor of type ``dtype`` that the binary has as ``tensor``."""
    permutation = how.get("permutation")
    inner = tuple(shape[a] for a in permutation) if isinstance(permutation, tuple) else shape
    inner = how.pop("inner", inner)  # type: ignore[assignment]
    return Edge(TensorSpec("x", dtype, shape), TensorInfo("t", tensor.upper(), tensor, inner, encoding), **how)  # type: ignore[arg-type]


def onnxruntime_quantizes(array: np.ndarray, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
    """Integers, and the floats that they stand for, by onnxruntime's own operators."""
    import onnxruntime as ort

    element = helper.np_dtype_to_tensor_dtype(np.dtype(encoding.dtype))
    zero = np.array(encoding.zero_point, encoding.dtype)
    scale = np.array(encoding.scale, np.float32)
    if encoding.axis is None:
        zero, scale = zero.reshape(()), scale.reshape(())
    how = {} if encoding.axis is None else {"axis": encoding.axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **how),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **how),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, array.shape)],
        [
            helper.make_tensor_value_info("q", element, array.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, array.shape),
        ],
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return tuple(session.run(["q", "y"], {"x": array}))


# --- raw files ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["uint8", "int8", "uint16", "int16"]),
    scale=st.floats(2**-20, 1024, width=32),
    zero=st.integers(0, 255),
    halves=st.lists(st.integers(-600, 600), min_size=6, max_size=6),
    seed=st.integers(0, 100),
)
def test_floats_become_integers_as_onnxruntime_makes_them(
    dtype: str, scale: float, zero: int, halves: list[int], seed: int
) -> None:
    encoding = Encoding((float(np.float32(scale)),), (zero if dtype[0] == "u" else zero - 128,), dtype)
    ties = np.float32(scale) * np.array(halves, np.float32) / 2  # where rounding shows
    noise = np.random.default_rng(seed).normal(0, 300 * scale, 6).astype(np.float32)
    for values in (ties, noise):
        array = values.astype(np.float32).reshape(2, 3)
        q, y = onnxruntime_quantizes(array, encoding)
        raw = RawFile(edge("float32", dtype, encoding))
        content = raw.encode(array, "m")
        assert len(content) == raw.size
        assert np.array_equal(np.frombuffer(content, dtype).reshape(2, 3), q)
        assert np.array_equal(raw.decode(content, "m"), y)


def test_channels_with_scales_of_their_own_are_counted_along_the_binarys_axis() -> None:
    encoding = Encoding((0.1, 0.2, 0.5), (0, 1, 2), "uint8", axis=3)
    raw = RawFile(edge("float32", "uint8", encoding, (1, 3, 2, 2), permutation=(0, 2, 3, 1), layout="channels_last"))
    array = np.linspace(0, 20, 12, dtype=np.float32).reshape(1, 3, 2, 2)
    q, y = onnxruntime_quantizes(np.ascontiguousarray(array.transpose(0, 2, 3, 1)), encoding)
    assert raw.encode(array, "m") == q.tobytes()
    assert np.array_equal(raw.decode(q.tobytes(), "m"), y.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("int64", "int32"),
        ("uint64", "uint32"),
        ("uint8", "uint8"),
        ("float32", "float16"),
        ("float64", "float32"),
        ("bool", "bool"),
        ("int64", "int64"),
    ],
)
def test_other_types_are_cast_and_come_back(ours: str, theirs: str) -> None:
    raw = RawFile(edge(ours, theirs, shape=(2, 3), permutation=(1, 0)))
    array = np.array([[0, 1, 2], [3, 0, 5]]).astype(ours)
    back = raw.decode(raw.encode(array, "m"), "m")
    assert back.dtype == array.dtype
    assert back.flags.c_contiguous
    assert np.array_equal(back, array)
    assert raw.encode(array, "m") == np.ascontiguousarray(array.T).astype(theirs).tobytes()


def test_axes_of_size_one_may_be_missing() -> None:
    raw = RawFile(edge("float32", "float32", shape=(1, 4), inner=(4,), layout="reshaped"))
    array = np.arange(4, dtype=np.float32).reshape(1, 4)
    assert np.array_equal(raw.decode(raw.encode(array, "m"), "m"), array)


def test_values_that_the_binary_cant_hold_are_refused_by_place() -> None:
    with pytest.raises(InputError, match=r"m: input 'x' has -2147483649, which INT32 .* from -2147483648"):
        RawFile(edge("int64", "int32")).encode(np.array([[0, 0, 0], [0, -(1 << 31) - 1, 0]]), "m")
    encoding = Encoding((0.1,), (0,), "uint8")
    with pytest.raises(InputError, match="m: input 'x': quantize got NaN"):
        RawFile(edge("float32", "uint8", encoding)).encode(np.full((2, 3), np.nan, np.float32), "m")


def test_a_file_of_another_size_is_never_read() -> None:
    for count in (0, 5, 7, 24):
        with pytest.raises(ExecutionError, match=f"has {count} bytes, t: UINT8.2, 3. has 6"):
            RawFile(edge("uint8", "uint8")).decode(bytes(count), "m")


def test_booleans_are_what_is_not_zero() -> None:
    assert RawFile(edge("bool", "bool")).decode(bytes([0, 1, 2, 255, 0, 1]), "m").tolist() == [
        [False, True, True],
        [True, False, True],
    ]


def test_float_files_are_only_for_what_a_float_can_hold() -> None:
    encoding = Encoding((0.1,), (0,), "uint8")
    edges = (
        edge("float32", "uint8", encoding),
        edge("float32", "float16"),
        edge("int64", "int32"),
        edge("bool", "bool"),
    )
    assert [raw.native for raw in raw_files(edges, "float", "m")] == [False, False, True, True]
    assert [raw.native for raw in raw_files(edges, "native", "m")] == [True] * 4
    assert [raw.suffix for raw in raw_files(edges, "float", "m")] == [".raw", ".raw", "_native.raw", "_native.raw"]
    assert RawFile(edge("float32", "float32")).suffix == ".raw"  # native or not: it has one file only
    arguments = data_arguments("g", raw_files(edges[:3], "float", "m"), raw_files(edges[3:], "float", "m"), "m")
    assert arguments == ["--native_input_tensor_names", "g:t", "--output_data_type", "float_and_native"]
    assert data_arguments("g", raw_files(edges[:2], "float", "m"), (), "m") == ["--output_data_type", "float_only"]
    with pytest.raises(OptionError, match="'g,h' would have to stand in --native_input_tensor_names"):
        data_arguments("g,h", raw_files(edges[1:3], "float", "m"), (), "m")


def test_a_tensor_without_a_numpy_type_is_refused() -> None:
    packed = TensorInfo("t", "UFIXED_POINT_4", "", (2, 3), None, None, "no array of it")
    with pytest.raises(ArtifactError, match="UFIXED_POINT_4.*can't be handed over: no array of it"):
        raw_files((Edge(TensorSpec("x", "float32", (2, 3)), packed),), "native", "m")


# --- names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a b", "it has ' ' in it"),
        ("a\nb", "in it"),
        ("a:=b", "':=' ends the name"),
        ("a:", "':=' ends the name"),
        ("#a", "no list of files"),
        ("%a", "no list of files"),
        ("", "it is empty"),
        ("\ud800", "no proper text"),
    ],
)
def test_inputs_that_a_list_cant_name_are_refused_unless_there_is_one_only(name: str, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        check_names([name, "other"], ["y"], "m.bin")
    check_names([name], ["y"], "m.bin")
    assert input_line({name: "/w/in0.raw"}) == "/w/in0.raw"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/b", "'/'"),
        ("../../y", "'/'"),
        ("a\nb", "in it"),
        ("a\0b", "in it"),
        ("", "empty"),
        ("é" * 101, "202 bytes"),
        ("\udcff", "text"),
    ],
)
def test_outputs_that_cant_be_files_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        check_names(["x"], [name], "m.bin")


def test_names_that_the_tool_takes_for_one_are_refused() -> None:
    assert sanitized("/model.22/Concat") == "_model_22_Concat"
    assert sanitized("0x") == "_0x"
    with pytest.raises(ArtifactError, match="'a.b' and 'a_b' are one and the same"):
        check_names(["a.b", "a_b"], ["y"], "m.bin")
    with pytest.raises(ArtifactError, match="written to one file, 'y_native.raw'"):
        check_names(["x"], ["y", "y_native"], "m.bin")


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


@given(st.lists(TEXT, min_size=2, max_size=4, unique=True))
def test_a_list_that_is_accepted_is_read_back_as_it_was_meant(names: list[str]) -> None:
    files = {name: f"/w/in0_{i}.raw" for i, name in enumerate(names)}
    try:
        check_names(names, ["y"], "m.bin")
    except ArtifactError:
        return
    line = input_line(files)
    assert line[0] not in "#%"
    read = dict(part.split(":=", 1) for part in line.split())  # by any white space, at the first ":="
    assert read == files


# --- outputs, usage, times ------------------------------------------------------------------------------------------------


def test_outputs_must_be_exactly_those_that_were_asked_for() -> None:
    wanted = ["output/Result_0/y_native.raw"]
    own = {"output/execution_metadata.yaml", "output/qnn-profiling-data_0.log", "output/Result_0/y_native.json"}
    check_outputs(frozenset({*wanted, *own}), wanted, [], "m")
    for extra in (
        "output/Result_0/y.raw",
        "output/Result_1/y_native.raw",
        "output/other",
        "output/execution_metadata.yaml.raw",
    ):
        with pytest.raises(ExecutionError, match="nobody asked for"):
            check_outputs(frozenset({*wanted, extra}), wanted, [], "m")
    check_outputs(frozenset({*wanted, "output/Result_0/y.raw"}), wanted, ["output/Result_0/y.raw"], "m")
    with pytest.raises(ExecutionError, match="did not write 1 of 1 output files.*There is nothing"):
        check_outputs(frozenset(), wanted, [], "m")


def test_memory_and_processor_time_are_read_as_data() -> None:
    stat = "S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 3 0 10000 1 2"
    assert read_usage(f"20480 104.00 {stat}\n") == Usage(20.0, 0.5)
    assert read_usage("20480 104.00 S 1") == Usage(20.0, None)  # torn off while it was written
    assert read_usage("") == read_usage("lots of memory") == Usage(0.0, None)


def test_times_are_those_around_the_graph_else_the_backends() -> None:
    def event(source: str, time: int, level: str = "ROOT", message: str = "EXECUTE", unit: str = "US") -> Event:
        return Event(message, time, unit, level, source)

    backend = [event("QNN (execute) time", 900), event("QNN accelerator (execute) time", 700)]
    around = [event("Graph 0: g", 1500), event("Graph 0: g", 1600)]
    node = event("conv:OpId_3 (cycles)", 42, "SUB-EVENT", unit="CYCLES")
    total = event("Accelerator (execute) time (cycles)", 99, unit="CYCLES")
    load = event("Graph 0: g", 5, message="FINALIZE")
    assert times_ms([*backend, *around, node, total, load]) == [1.5, 1.6]
    assert times_ms(backend) == [0.9]
    assert Profile((*around, node, total)).nodes == {"conv:OpId_3": 42}


# --- logs -----------------------------------------------------------------------------------------------------------------


def test_a_log_is_shown_without_what_a_terminal_obeys() -> None:
    assert lines_of(b"\x1b[31m red\x1b[0m\n\n a\x07b\r\n\xff\xfe") == ["red", "a b", "\N{REPLACEMENT CHARACTER}" * 2]
    assert succeeded(["[INFO] [Qnn Runtime] Finished Executing Graphs"])
    assert not succeeded(["[ERROR] no output for tensor Finished Executing Graphs x", "Executing Graphs"])
    assert stand_in_notes(["[ INFO ] QNN SDK STAND-IN v1: x", "other"]) == ("QNN SDK STAND-IN v1: x",)


@pytest.mark.parametrize(
    ("code", "log", "error", "message"),
    [
        (139, [], RuntimeCrashError, "died of SIGSEGV .the runtime itself crashed.*empty"),
        (137, ["Executing Graphs"], RuntimeCrashError, "SIGKILL .*low-memory killer"),
        (128 + 77, [], RuntimeCrashError, "died of signal 77"),
        (126, ["sh: /w/qnn-net-run: Permission denied"], BackendUnavailableError, "permission denied.*noexec"),
        (127, ["sh: /w/qnn-net-run: inaccessible or not found"], DeviceFileError, "not on the device"),
        (127, [], ExecutionError, "was not started"),
        (0, ["Executing Graphs"], ExecutionError, "as if all were well"),
        (1, ["[ERROR] wrong ELF class: ELFCLASS32"], BackendUnavailableError, "another kind of device"),
        (
            1,
            ['CANNOT LINK EXECUTABLE "/w/q": library "libc++_shared.so" not found'],
            BackendUnavailableError,
            "libc\\+\\+_shared.so is missing",
        ),
        (9, ["QnnDsp <E> qnn_open failed, 0x80000600"], BackendUnavailableError, "refused its skeleton.*same release"),
        (
            9,
            ["QnnDsp <E> loadRemoteSymbols failed with err 4000"],
            BackendUnavailableError,
            "V75Stub.so along LD_LIBRARY_PATH=/w/runtime",
        ),
        (9, ["QnnDsp <E> Transport layer setup failed: 14001"], BackendUnavailableError, "HTP could not be opened"),
        (9, ["Unable to load backend. dlerror(): no such luck"], BackendUnavailableError, "linker.*no such luck"),
        (
            9,
            ['Unable to load backend. dlerror(): dlopen failed: library "/w/libQnnHtp.so" not found'],
            BackendUnavailableError,
            ": libQnnHtp.so is missing",
        ),
        (
            9,
            ["libQnnHtp.so: cannot open shared object file: No such file"],
            BackendUnavailableError,
            "libQnnHtp.so is missing",
        ),
        (
            9,
            ["Could not create context from binary."],
            ArtifactError,
            "made for another SoC, by a newer release, or is damaged",
        ),
        (9, ["Could not create context from binary : err 5000"], ArtifactError, "by a newer release"),
        (9, ["Could not create context from binary : err 1002"], ExecutionError, "no memory left"),
        (9, ["Graph Execution failure"], ExecutionError, "failed while it executed"),
        (1, ["backend config file schema validation failed: x"], ExecutionError, "did not take its configuration"),
        (
            1,
            ["QnnDsp <E> Failed to load skel, error: 4000", "Could not create context from binary."],
            BackendUnavailableError,
            "stub",
        ),
    ],
)
def test_an_end_is_explained(code: int, log: list[str], error: type[Exception], message: str) -> None:
    made = failure(code, log, NEAR)
    assert type(made) is error
    with pytest.raises(error, match=message):
        raise made
    assert all(line in str(made) for line in log)


def test_the_words_of_a_fault_in_a_models_name_are_no_fault() -> None:
    made = failure(1, ["something else"], Surroundings("No space left on device.onnx", "14001.bin", "/4000", "", None))
    assert type(made) is ExecutionError
    assert isinstance(made, ExecutionError)
    assert Path("14001.bin").name in str(made)
