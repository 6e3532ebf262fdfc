"""onnxruntime on a device, through a real ADB server, on the real HTP simulator: results, placement, faults, recovery."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pytest_qnn import BackendUnavailableError, RuntimeCrashError, TargetMemoryError, TargetTimeoutError
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.backend import Backend
from pytest_qnn.devices.attached import AttachedDevice
from pytest_qnn.devices.facts import DeviceFacts, Python, probe
from pytest_qnn.devices.lease import DeviceLease
from pytest_qnn.devices.soc import find_soc
from pytest_qnn.errors import (
    CompileError,
    DeviceError,
    DeviceLostError,
    DeviceTimeoutError,
    ExecutionError,
    InputError,
    ModelError,
)
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.runners import agent, device_agent
from pytest_qnn.runners.device_agent import DeviceAgents
from pytest_qnn.runners.device_ort import DeviceOrtModel
from pytest_qnn.runners.device_python import check_library, check_python, device_provider_options
from pytest_qnn.runners.ort import CPU, QNN, LoadRequest
from pytest_qnn.runners.process import Limits
from pytest_qnn.testing import LoopbackDevice
from tests import small_models
from tests.conftest import needs_simulator

LIMITS = Limits(60, 60, 8192)
X = np.linspace(-2, 2, 3 * 256, dtype=np.float32).reshape(1, 3, 16, 16)


class Board:
    """A loopback device as this process uses it."""

    def __init__(self, device: LoopbackDevice, transport: AdbTransport) -> None:
        self.device, self.transport = device, transport
        self.attached = AttachedDevice(
            transport,
            probe(transport),
            DeviceLease(transport.serial, transport.address),
            limit_mib=1000,
            wait_seconds=10,
            recover_seconds=20,
            may_retry=lambda what: True,
        )
        self.agents = DeviceAgents(self.attached)

    def request(self, model: Path, process: str = "htp", **options: str) -> LoadRequest:
        chosen = device_provider_options(self.attached.facts, "htp", options)
        return LoadRequest(str(model), (), process, QNN, tuple(chosen.items()))

    def load(self, model: Path, limits: Limits = LIMITS, **options: str) -> DeviceOrtModel:
        return DeviceOrtModel(self.agents, self.request(model, **options), f"{model.name} on htp", limits)

    def load_on_cpu(self, model: Path, limits: Limits = LIMITS) -> DeviceOrtModel:
        return DeviceOrtModel(self.agents, LoadRequest(str(model), (), "cpu", CPU), f"{model.name} on cpu", limits)

    def runtimes(self) -> list[psutil.Process]:
        """Processes of agents on the device: each has two."""
        found = []
        for process in psutil.Process(self.device.process).children(recursive=True):
            try:
                if any(word.endswith("agent.py") for word in process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def runtime(self) -> psutil.Process:
        """The one that holds the runtime."""
        return max(self.runtimes(), key=lambda process: process.memory_info().rss)

    def close(self) -> None:
        self.agents.close()
        self.attached.close()


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def open_board(open_transport: Callable[[LoopbackDevice], AdbTransport]) -> Iterator[Callable[[LoopbackDevice], Board]]:
    needs_simulator()
    boards: list[Board] = []

    def open_(device: LoopbackDevice) -> Board:
        boards.append(Board(device, open_transport(device)))
        return boards[-1]

    yield open_
    for board in boards:
        board.device.faults()
        board.close()
        assert wait_for(lambda board=board: not board.runtimes()), "something was left running"


@pytest.fixture
def board(open_board: Callable[[LoopbackDevice], Board], kept_device: Callable[[str], LoopbackDevice]) -> Board:
    """A board that this module's tests share; programs and workspace are each test's own."""
    return open_board(kept_device("linux"))


# --- results --------------------------------------------------------------------------------------------------------------


def test_a_model_computes_what_it_computes_on_the_host(board: Board, htp: Backend, models: Path) -> None:
    host = htp.load(models / "conv.qdq.onnx")
    there = board.load(models / "conv.qdq.onnx")
    samples = seeded_inputs(host, 3)
    mine, theirs = host.run(samples), there.run_many(samples)
    for expected, found in zip(mine.results, theirs, strict=True):
        assert found.outputs["y"].tobytes() == expected["y"].tobytes()
        assert found.outputs["y"].dtype == np.float32
        assert found.round_trip_seconds is not None
        assert 0 < found.seconds < found.round_trip_seconds * len(samples)
    info = there.info
    assert (info.inputs, info.outputs) == (
        (("x", "tensor(float)", (1, 3, 16, 16)),),
        (("y", "tensor(float)", (1, 8, 16, 16)),),
    )
    assert {provider for provider, _, op in info.placement if op == "Conv"} == {QNN}
    assert [os.path.basename(path) for path in there.libraries] == ["libQnnHtp.so"]


def test_a_compiled_model_finds_its_binary_beside_it(board: Board, htp: Backend, models: Path, tmp_path: Path) -> None:
    compiled = htp.compile(models / "conv.qdq.onnx", tmp_path / "out" / "conv_ctx.onnx")
    assert {f.suffix for f in compiled.parent.iterdir()} >= {".onnx", ".bin"}
    there = board.load(compiled)
    assert (QNN, "EPContext") in {(provider, op) for provider, _, op in there.info.placement}
    assert "libQnnHtp.so" in {os.path.basename(path) for path in there.libraries}
    (expected,) = htp.load(models / "conv.qdq.onnx").run({"x": X}).results
    assert there.run_many([{"x": X}])[0].outputs["y"].tobytes() == expected["y"].tobytes()


HOSTILE = "we '\"ird\n$(touch pwned)`touch pwned`; -rf ü"


def test_names_may_be_anything(board: Board, tmp_path: Path) -> None:
    """Of the model's file, of its data, of its folders, of nodes and of tensors."""
    folder = tmp_path / HOSTILE
    (folder / HOSTILE).mkdir(parents=True)
    model = small_models.save(
        folder / f"{HOSTILE}.onnx",
        [onnx.helper.make_node("Add", [HOSTILE, "-w"], ["../y"], name=HOSTILE)],
        {HOSTILE: [2, 512]},
        {"../y": [2, 512]},
        {"-w": np.arange(1024, dtype=np.float32).reshape(2, 512)},
    )
    proto = onnx.load(str(model))
    onnx.save(proto, str(model), save_as_external_data=True, location=f"{HOSTILE}/{HOSTILE}.data", size_threshold=0)
    there = board.load_on_cpu(model)
    x = np.ones((2, 512), np.float32)
    (ran,) = there.run_many([{HOSTILE: x}])
    assert np.array_equal(ran.outputs["../y"], x + np.arange(1024).reshape(2, 512))
    assert there.info.placement == ((CPU, HOSTILE, "Add"),)
    assert not list(board.device.root.rglob("pwned"))


NAMES = st.text(st.sampled_from("aZ0_.-'\"`$();&|<>*?[]{}!#%\\~=:,/é☃🙂\u202e \t\r\n"), min_size=1, max_size=20)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=st.lists(NAMES, min_size=4, max_size=4, unique=True), file=NAMES)
@example(tensors=["..", "../../y", "/etc/x", "-rf"], file="-")
@example(tensors=["$(touch pwned)", "`touch pwned`", "';touch pwned;'", '";touch pwned;"'], file="$(touch pwned)")
def test_any_names_compute_the_same_and_touch_nothing(
    board: Board, tmp_path_factory: pytest.TempPathFactory, tensors: list[str], file: str
) -> None:
    x_name, w_name, y_name, node = tensors
    folder = tmp_path_factory.mktemp("named")
    model = small_models.save(
        folder / f"{file.replace('/', '_')}.onnx",
        [onnx.helper.make_node("Add", [x_name, w_name], [y_name], name=node)],
        {x_name: [2, 8]},
        {y_name: [2, 8]},
        {w_name: np.arange(16, dtype=np.float32).reshape(2, 8)},
    )
    before = set(os.listdir(".")), set(folder.parent.iterdir())
    on_device = set(board.device.root.rglob("*"))
    there = board.load_on_cpu(model)
    x = np.ones((2, 8), np.float32)
    (ran,) = there.run_many([{x_name: x}])
    there.close()
    assert list(ran.outputs) == [y_name]
    assert np.array_equal(ran.outputs[y_name], x + np.arange(16).reshape(2, 8))
    assert (set(os.listdir(".")), set(folder.parent.iterdir())) == before
    assert os.listdir(folder) == [model.name]
    new = set(board.device.root.rglob("*")) - on_device
    strange = {path for path in new if path.name in (*tensors, file, "pwned")}
    assert {path for path in strange if "models" not in path.parts} == set()  # where the agent's own copies lie


def test_every_type_travels_and_comes_back(board: Board, tmp_path: Path) -> None:
    for dtype in sorted(agent.SIZES):
        code = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        model = small_models.save(
            tmp_path / f"{dtype}.onnx",
            [onnx.helper.make_node("Identity", ["x"], ["y"])],
            {"x": [2, "n", 3]},
            {"y": [2, "n", 3]},
            types={"x": code, "y": code},
        )
        x = np.random.default_rng(0).integers(0, 2, (2, 4, 3)).astype(dtype)
        (ran,) = board.load_on_cpu(model).run_many([{"x": x}])
        assert (ran.outputs["y"].dtype, ran.outputs["y"].tobytes()) == (x.dtype, x.tobytes())


def test_many_samples_are_answered_in_order_also_large_ones(board: Board, tmp_path: Path) -> None:
    """More than is let to be on its way at once, in both directions."""
    model = small_models.unary(tmp_path / "relu.onnx", "Relu", shape=(3 << 20,))
    there = board.load_on_cpu(model)
    samples = [{"x": np.full(3 << 20, i, np.float32)} for i in range(5)]
    for i, ran in enumerate(there.run_many(samples)):
        assert np.array_equal(ran.outputs["y"], samples[i]["x"])
    small = small_models.unary(tmp_path / "small.onnx", "Relu", shape=(4,))
    answers = board.load_on_cpu(small).run_many([{"x": np.full(4, i, np.float32)} for i in range(100)])
    assert [int(ran.outputs["y"][0]) for ran in answers] == list(range(100))


def test_a_second_session_sends_nothing(
    open_board: Callable[[LoopbackDevice], Board], kept_device: Callable[[str], LoopbackDevice], models: Path
) -> None:
    sent = []
    for _ in range(2):
        board = open_board(kept_device("linux"))
        board.load(models / "conv.qdq.onnx").run_many([{"x": X}])
        sent.append(board.attached.store.sent_bytes)
        board.close()
    assert sent[1] == 0


def test_times_are_the_devices_and_round_trips_are_apart(board: Board, models: Path) -> None:
    timing = board.load(models / "conv.qdq.onnx").time({"x": X}, 5, 20, reset_peak=True)
    assert len(timing.times_ms) == 5
    assert all(t > 0 for t in timing.times_ms)
    assert timing.round_trip_ms
    assert 1 <= len(timing.round_trip_ms) <= 5
    assert not set(timing.round_trip_ms) & set(timing.times_ms)
    assert timing.peak_memory_mib > 20
    assert timing.cpu_share is not None
    assert timing.cpu_share > 0.05


def test_a_profile_has_the_nodes_of_the_device(board: Board, models: Path) -> None:
    there = board.load(models / "conv.qdq.onnx")
    assert any(name.startswith("conv") for name in there.profile({"x": X}).nodes)
    assert there.run_many([{"x": X}])[0].outputs["y"].shape == (1, 8, 16, 16), "the model itself is still there"


def test_what_runs_there_is_told(board: Board, models: Path) -> None:
    import onnxruntime
    import onnxruntime_qnn

    told = board.agents.versions()
    there = board.load(models / "conv.qdq.onnx")
    names = ("python", "onnxruntime", "onnxruntime_qnn", "qnn", "numpy")
    assert there.versions == {f"device_{name}": told[name] for name in names}
    assert there.notes == (
        f"computed on the device by onnxruntime {onnxruntime.__version__}, onnxruntime-qnn {onnxruntime_qnn.__version__} "
        f"(QNN {told['qnn']}), Python {told['python']}, x86_64",
    )
    assert told["onnxruntime"] == onnxruntime.__version__
    assert told["onnxruntime_qnn"] == onnxruntime_qnn.__version__
    assert told["qnn"] == onnxruntime_qnn.build_and_package_info.qnn_version
    assert told["machine"] == "x86_64", "whatever the stand-in's uname says"
    before = len(board.runtimes())
    board.agents.get("htp")
    assert len(board.runtimes()) == before, "the program that was asked is the one that is used"


# --- what is refused ------------------------------------------------------------------------------------------------------


def test_a_model_that_the_runtime_refuses(board: Board, tmp_path: Path) -> None:
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nowhere")
    model = small_models.save(tmp_path / "unknown.onnx", [node], {"x": [1]}, {"y": [1]})
    with pytest.raises(CompileError, match=r"unknown\.onnx on htp: .*NoSuchOperator"):
        board.load(model)
    with pytest.raises(ModelError, match=r"unknown\.onnx on cpu: "):
        board.load_on_cpu(model)


def test_inputs_that_the_runtime_refuses_fail_alone(board: Board, models: Path) -> None:
    there = board.load(models / "conv.qdq.onnx")
    good = there.run_many([{"x": X}])[0].outputs["y"]
    with pytest.raises(InputError, match="onnxruntime refused the inputs"):
        there.run_many([{"x": X}] * 3 + [{"x": X[:, :, :5]}] + [{"x": X}] * 30)
    assert np.array_equal(there.run_many([{"x": X}])[0].outputs["y"], good), "requests and answers are in step"
    assert there.loads == 1


def test_outputs_that_cannot_travel(board: Board, tmp_path: Path) -> None:
    text = onnx.TensorProto.STRING
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    constant = onnx.helper.make_tensor("x", text, [1], [b"text"])
    graph = onnx.helper.make_graph([node], "g", [], [onnx.helper.make_tensor_value_info("y", text, [1])], [constant])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "text.onnx"))
    with pytest.raises(ModelError, match="can't be handed over"):
        board.load_on_cpu(tmp_path / "text.onnx").run_many([{}])


def test_a_model_that_changed_since_it_was_read(board: Board, models: Path, tmp_path: Path) -> None:
    model = small_models.conv(tmp_path / "conv.onnx")
    with pytest.raises(ModelError, match="changed on disk"):
        DeviceOrtModel(
            board.agents, replace(board.request(model), files=((str(model), "0" * 64),)), "conv.onnx on htp", LIMITS
        )


def test_a_placement_that_changes_on_the_way_is_no_result(board: Board, models: Path, tmp_path: Path) -> None:
    """A program that died is replaced; if the model isn't the same there any more, nothing may be judged."""
    model = small_models.conv(tmp_path / "conv.onnx")
    there = board.load(model)
    small_models.unary(model, "Relu", shape=(1, 3, 16, 16))
    board.agents.close()
    with pytest.raises(ExecutionError, match="loaded anew, the model is not what it was"):
        there.run_many([{"x": X}])


# --- crashes, hangs, greed ------------------------------------------------------------------------------------------------


def test_a_crash_is_an_error_with_the_log_and_the_next_use_starts_afresh(
    board: Board, models: Path, tmp_path: Path
) -> None:
    good = board.load(models / "conv.qdq.onnx")
    before = good.run_many([{"x": X}])[0].outputs["y"]
    with pytest.raises(
        RuntimeCrashError,
        match=r"stft.onnx on htp: the runtime process on the device was killed by signal 11 \(SIGSEGV\) during load",
    ) as caught:
        board.load(small_models.crashes_while_compiling(tmp_path / "stft.onnx"))
    assert "log" in str(caught.value)
    assert np.array_equal(good.run_many([{"x": X}])[0].outputs["y"], before)
    assert good.loads == 2
    assert board.agents.faults == [caught.value]


def test_a_load_that_takes_too_long_ends_there_by_its_deadline(board: Board, tmp_path: Path) -> None:
    model = small_models.compiles_for_long(tmp_path / "long.onnx")
    start = time.monotonic()
    with pytest.raises(TargetTimeoutError, match=r"long.onnx on htp: load did not finish in time; .*load_timeout"):
        board.load(model, Limits(1, 60, 8192))
    assert time.monotonic() - start < 10
    assert wait_for(lambda: not board.runtimes())


@pytest.mark.slow
def test_a_run_that_takes_too_long_ends_there_by_its_deadline(board: Board, tmp_path: Path) -> None:
    there = board.load(small_models.runs_for_long(tmp_path / "long.onnx"), Limits(60, 1, 8192))
    with pytest.raises(TargetTimeoutError, match="run did not finish in time; .*run_timeout"):
        there.run_many([{"x": np.ones((1, 16384, 1024), np.float32)}])
    assert wait_for(lambda: not board.runtimes())


def test_a_process_that_takes_too_much_memory_ends(board: Board, tmp_path: Path) -> None:
    model = small_models.compiles_for_long(tmp_path / "greedy.onnx")
    with pytest.raises(TargetMemoryError, match="grew beyond its limit of memory during load, .*memory_limit_mb"):
        board.load(model, Limits(60, 60, 120))


def test_a_program_that_somebody_kills_between_requests(board: Board, models: Path) -> None:
    there = board.load(models / "conv.qdq.onnx")
    for both in (False, True):
        for process in board.runtimes() if both else [board.runtime()]:
            with suppress(psutil.NoSuchProcess):  # each ends when the other does
                process.kill()
        if both:  # nobody is left to say that it happened between requests
            assert wait_for(lambda: there._agent is not None and not there._agent.alive)
        assert there.run_many([{"x": X}])[0].outputs["y"].shape == (1, 8, 16, 16)
    assert there.loads == 3
    assert board.agents.faults == []


def test_a_program_that_somebody_kills_in_mid_run(board: Board, tmp_path: Path) -> None:
    there = board.load(small_models.runs_for_long(tmp_path / "long.onnx"))
    runtime = board.runtime()

    def kill() -> None:
        spent = runtime.cpu_times().user
        wait_for(lambda: runtime.cpu_times().user > spent + 0.3)
        runtime.kill()

    threading.Thread(target=kill).start()
    with pytest.raises(
        RuntimeCrashError, match=r"killed by signal 9 \(SIGKILL\), as the kernel does when memory runs out"
    ):
        there.run_many([{"x": np.ones((1, 16384, 1024), np.float32)}])


# --- the line -------------------------------------------------------------------------------------------------------------


def test_a_drop_in_mid_run_ends_the_program_and_the_run_is_done_again(board: Board, tmp_path: Path) -> None:
    board.device.faults(shell_drop=3 << 20, times=1, only="python3")  # in the answer to the third run
    there = board.load_on_cpu(small_models.unary(tmp_path / "relu.onnx", "Relu", shape=(1, 1 << 18)))
    x = {"x": np.linspace(-1, 1, 1 << 18, dtype=np.float32).reshape(1, -1)}
    before = there.run_many([x])[0].outputs["y"]
    first = board.runtime()
    with pytest.raises(DeviceLostError, match="relu.onnx on cpu: run: "):
        there.run_many([x] * 4)
    assert wait_for(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE)
    board.device.faults()
    after = board.attached.attempt("running relu.onnx", lambda: there.run_many([x] * 4))
    assert [ran.outputs["y"].tobytes() for ran in after] == [before.tobytes()] * 4


@pytest.mark.slow
def test_a_reboot_is_recovered_from(board: Board, models: Path) -> None:
    there = board.load(models / "conv.qdq.onnx")
    before = there.run_many([{"x": X}])[0].outputs["y"]
    other = board.load_on_cpu(models / "conv.onnx")
    board.device.reboot(down=0.2)
    (after,) = board.attached.attempt("running conv", lambda: there.run_many([{"x": X}]))
    assert np.array_equal(after.outputs["y"], before)
    assert (there.loads, board.attached.generation) == (2, 1)
    assert other.run_many([{"x": X}])[0].outputs["y"].shape == (1, 8, 16, 16), (
        "its program went too, though nobody asked it yet"
    )
    assert other.loads == 2


@pytest.mark.slow
def test_a_device_that_falls_silent_is_an_error_by_the_deadline(
    board: Board, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = board.load(models / "conv.qdq.onnx", Limits(60, 1, 8192))
    monkeypatch.setattr(device_agent, "SLACK_SECONDS", 0.2)
    monkeypatch.setattr(device_agent, "SLOWEST", 1 << 30)
    board.device.faults(mute=True)
    start = time.monotonic()
    with pytest.raises(DeviceTimeoutError, match="conv.qdq.onnx on htp: run: "):
        there.run_many([{"x": X}])
    assert time.monotonic() - start < 10
    board.device.faults()
    board.attached.transport.reconnect(20)
    assert there.run_many([{"x": X}])[0].outputs["y"].shape == (1, 8, 16, 16)


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_that_the_next_request_could_take_for_its_answer(board: Board, tmp_path: Path) -> None:
    there = board.load(small_models.runs_for_long(tmp_path / "long.onnx"))
    busy = board.runtime()

    def interrupt() -> None:
        spent = busy.cpu_times().user
        wait_for(lambda: busy.cpu_times().user > spent + 0.3)
        os.kill(os.getpid(), 2)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        there.run_many([{"x": np.ones((1, 16384, 1024), np.float32)}])
    assert wait_for(lambda: not board.runtimes())


# --- a device that lies ---------------------------------------------------------------------------------------------------

LIAR = """
import os, sys
sys.path.insert(0, {folder!r})
del sys.argv[2:]
source = open(__import__('os').environ.get('FAKE_ROOT', '') + {agent!r}).read().replace('if __name__ == "__main__":', "if False:")
exec(compile(source, "agent", "exec"), globals())
{lie}
sys.argv.append("restarted")
main()
"""

LIES = {
    "garbage": "Server._send = lambda self, header, arrays: os.write(self.answers, b'x' * 70000)",
    "another request's answer": "make, last = make_frame, []\n"
    "def make_frame(header, arrays): return make(dict(header, id=header.get('id', 0) + 1), arrays)",
    "an answer that says nothing": "make = make_frame\n"
    "def make_frame(header, arrays): return make({'id': header.get('id'), 'op': header.get('op')} if 'op' in header else header, {})",
    "outputs of another name": "make = make_frame\n"
    "def make_frame(header, arrays): return make(header, {n + 'z': a for n, a in arrays.items()})",
    "outputs of another type": "make = make_frame\n"
    "def make_frame(header, arrays): return make(header, {n: a.astype('float64') for n, a in arrays.items()})",
    "outputs of another shape": "make = make_frame\n"
    "def make_frame(header, arrays): return make(header, {n: a[..., 1:] for n, a in arrays.items()})",
    "no outputs": "make = make_frame\ndef make_frame(header, arrays): return make(header, {})",
    "a flipped bit": "make = make_frame\n"
    "def make_frame(header, arrays):\n"
    "    parts = make(header, arrays)\n    return [parts[0], *[b'\\1' + bytes(p)[1:] for p in parts[1:]]] if arrays else parts",
    "a tensor of a petabyte": "make = make_frame\n"
    "def make_frame(header, arrays):\n"
    "    text = json.dumps(dict(header, tensors=[['y', 'float32', [1 << 50]]])).encode()\n"
    "    return [PREFIX.pack(MAGIC, len(text), 1 << 52, 0) + text] if arrays else make(header, arrays)",
    "a tensor of 12 GiB": "make = make_frame\n"
    "def make_frame(header, arrays):\n"
    "    text = json.dumps(dict(header, tensors=[['y', 'float32', [3 << 30]]])).encode()\n"
    "    return [PREFIX.pack(MAGIC, len(text), 12 << 30, 0) + text] if arrays else make(header, arrays)",
    "a time below zero": "make = make_frame\n"
    "def make_frame(header, arrays): return make(dict(header, seconds=-1) if 'seconds' in header else header, arrays)",
    "a placement of numbers": "make = make_frame\n"
    "def make_frame(header, arrays): return make(dict(header, placement=[[1, 2, 3]]) if 'placement' in header else header, arrays)",
    "outputs that nobody asked about": "make = make_frame\n"
    "def make_frame(header, arrays): return make(dict(header, outputs=[['q', 'x', []]]) if 'outputs' in header else header, arrays)",
    "no versions": "make = make_frame\n"
    "def make_frame(header, arrays): return make(dict(header, versions=[]) if 'versions' in header else header, arrays)",
    "a shape of text": "make = make_frame\n"
    "def make_frame(header, arrays): return make(dict(header, inputs=[['x', 'tensor(float)', 'abc']]) if 'inputs' in header else header, arrays)",
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_device_sends_is_believed_only_as_far_as_it_can_be(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    model = small_models.unary(tmp_path / "relu.onnx", "Relu", shape=(2, 4))
    program = tmp_path / "liar.py"
    program.write_text(LIAR.format(folder=str(tmp_path), agent="/var/tmp/agent.py", lie=LIES[lie]))
    board.device.write("/var/tmp/agent.py", Path(agent.__file__).read_text())
    monkeypatch.setattr(agent, "__file__", str(program))
    with pytest.raises(DeviceError) as caught:
        board.load_on_cpu(model).run_many([{"x": np.ones((2, 4), np.float32)}])
    assert type(caught.value) is DeviceError, "neither lost nor mute: nothing is got back by waiting"
    assert "relu.onnx on cpu" in str(caught.value) or "the runtime process on device" in str(caught.value)
    assert wait_for(lambda: not board.runtimes()), "a program that lies is ended"


def test_a_program_that_does_not_start_is_explained(
    board: Board, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "broken.py"
    program.write_text("import sys; print('no such thing here', file=sys.stderr); sys.exit(3)")
    monkeypatch.setattr(agent, "__file__", str(program))
    with pytest.raises(
        BackendUnavailableError, match=r"(?s)could not run the agent \(exit code 3\).*no such thing here"
    ):
        board.load(models / "conv.qdq.onnx")
    assert board.agents.faults == []


# --- what a device must have ----------------------------------------------------------------------------------------------


def facts(**values: Any) -> DeviceFacts:
    packages = {"onnxruntime": "1.24.2", "onnxruntime-qnn": "2.4.0", "numpy": "2.0"}
    given = {"os": "linux", "abi": "aarch64", "python": Python("/usr/bin/python3", "3.12.3", packages), **values}
    return DeviceFacts("serial", "adb://serial@host:1", **given)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"python": None}, "has no python3"),
        ({"os": "android"}, "has no python3"),
        (
            {"python": Python("/usr/bin/python3", "3.9.1", {})},
            r"has no onnxruntime, .*pip install 'onnxruntime>=1\.24'",
        ),
        (
            {"python": Python("/usr/bin/python3", "3.9.1", {"onnxruntime": "1.24.2", "numpy": "2"})},
            "has no onnxruntime-qnn, .*pip install",
        ),
        (
            {"python": Python("/p", "3.11", {"onnxruntime": "1.23.2", "onnxruntime-qnn": "2.1", "numpy": "2"})},
            r"onnxruntime 1\.23\.2 is too old: only 1\.24 and later",
        ),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(values: dict[str, Any], said: str) -> None:
    check_python(facts())
    with pytest.raises(BackendUnavailableError, match=said):
        check_python(facts(**values))


def test_a_real_device_without_a_package(
    make_device: Callable[..., LoopbackDevice], open_board: Callable[[LoopbackDevice], Board], models: Path
) -> None:
    board = open_board(make_device("linux", without=["onnxruntime-qnn"]))
    with pytest.raises(BackendUnavailableError, match="has no onnxruntime-qnn"):
        check_python(board.attached.facts)
    said = "onnxruntime-qnn is not installed: .*pip install 'onnxruntime-qnn'"
    with pytest.raises(BackendUnavailableError, match=said):
        board.agents.versions()
    with pytest.raises(BackendUnavailableError, match=said):
        board.load(models / "conv.qdq.onnx")
    assert board.load_on_cpu(models / "conv.onnx").loads == 1, "the CPU provider needs no QNN"


def test_a_real_device_without_python(
    make_device: Callable[..., LoopbackDevice], open_board: Callable[[LoopbackDevice], Board], models: Path
) -> None:
    board = open_board(make_device("linux", python=False))
    with pytest.raises(BackendUnavailableError, match="has no python3"):
        check_python(board.attached.facts)
    with pytest.raises(BackendUnavailableError, match="could not run the agent"):
        board.load(models / "conv.qdq.onnx")


def test_options_for_a_board_name_the_library_and_leave_the_soc_to_it() -> None:
    board = facts(soc=find_soc("QCS6490"))
    assert device_provider_options(board, "htp", {"htp_performance_mode": "burst"}) == {
        "htp_performance_mode": "burst",
        "backend_path": "libQnnHtp.so",
    }
    assert device_provider_options(board, "gpu", {}) == {"backend_path": "libQnnGpu.so"}
    assert device_provider_options(board, "cpu", {}) == {"backend_path": "libQnnCpu.so"}


def test_options_for_a_stand_in_tell_the_simulator_which_soc_to_be(board: Board) -> None:
    stand_in = facts(stand_in="a loopback device", soc=find_soc("QCS6490"))
    assert device_provider_options(stand_in, "htp", {}) == {"backend_type": "htp", "soc_model": "35"}
    with pytest.raises(BackendUnavailableError, match="Adreno"):
        device_provider_options(stand_in, "gpu", {})
    with pytest.raises(BackendUnavailableError, match="Adreno"):  # though the package has a library of that name
        check_library(board.transport, board.attached.facts, "gpu")
    with pytest.raises(BackendUnavailableError, match="SoC is unknown"):
        device_provider_options(replace(stand_in, soc=None), "htp", {})
