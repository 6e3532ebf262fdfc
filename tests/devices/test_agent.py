"""The program that is pushed to a device, as a program: started here, spoken to over pipes, and ended in every way there is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pytest_qnn.runners import agent
from pytest_qnn.runners.agent import make_frame, read_frame
from pytest_qnn.runners.device_agent import read_greeting
from tests import small_models
from tests.conftest import needs_simulator

SIMULATOR = [["backend_type", "htp"], ["soc_model", "57"]]


class Program:
    """The agent, as a child of this process."""

    def __init__(self, folder: Path, idle: float = 60, **environment: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, agent.__file__, str(idle)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={**os.environ, **environment},
        )
        self.hello = read_greeting(self.read)

    def send(
        self, op: str, arrays: dict[str, Any] | None = None, allowed: float = 60, mib: float = 1e5, **fields: Any
    ) -> None:
        assert self.process.stdin
        header = {"op": op, "id": 1, "limit_seconds": allowed, "limit_mib": mib, **fields}
        for part in make_frame(header, arrays or {}):
            self.process.stdin.write(part)
        self.process.stdin.flush()

    def receive(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return read_frame(self.read)

    def read(self, count: int) -> bytes:
        assert self.process.stdout
        data = self.process.stdout.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def ask(
        self, op: str, arrays: dict[str, Any] | None = None, **fields: Any
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        self.send(op, arrays, **fields)
        return self.receive()

    def send_load(self, model: Path, options: Any = SIMULATOR, **fields: Any) -> None:
        given: dict[str, Any] = {
            "session": 1,
            "folder": "models/1",
            "files": [["model.onnx", str(model)]],
            "provider": "QNNExecutionProvider",
            "provider_options": options,
            "dimensions": [],
            "level": "ORT_ENABLE_ALL",
            "config": [],
            "run_options": [],
            "log_severity": 2,
        }
        self.send("load", **{**given, **fields})

    def load(self, model: Path, options: Any = SIMULATOR, **fields: Any) -> dict[str, Any]:
        self.send_load(model, options, **fields)
        return self.receive()[0]

    @property
    def runtime(self) -> psutil.Process:
        """The process that holds the runtime."""
        return psutil.Process(self.hello["pid"])

    def end(self) -> tuple[int, str]:
        """Exit code and standard error; both processes are gone."""
        runtime = self.hello["pid"]
        _, errors = self.process.communicate(timeout=20)
        assert wait_for(lambda: is_gone(runtime))
        return self.process.returncode, errors.decode()


def is_gone(pid: int) -> bool:
    """Whether a process has ended; an orphan may wait for init to notice."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    needs_simulator()
    programs: list[Program] = []

    def start(**options: Any) -> Program:
        programs.append(Program(tmp_path, **options))
        return programs[-1]

    yield start
    for program in programs:
        program.process.kill()
        program.process.wait()
        for stream in (program.process.stdin, program.process.stdout, program.process.stderr):
            assert stream
            with suppress(OSError):
                stream.close()
        assert wait_for(lambda program=program: is_gone(program.hello["pid"])), "kill -9 left the runtime"


SLEEPER = """
import ctypes, sys
__path__ = []
def get_library_path():
    if "restarted" in sys.argv:
        open("sleeping", "w").close()
        ctypes.PyDLL(None).sleep(60)
    return "/nowhere/lib.so"
"""


@pytest.fixture
def stuck(start: Callable[..., Program], tmp_path: Path) -> Program:
    """In native code that doesn't let go of the interpreter for a minute: no thread of Python's can end it."""
    package = tmp_path / "sleepy" / "onnxruntime_qnn" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.write_text(SLEEPER)
    program = start(PYTHONPATH=str(tmp_path / "sleepy"))
    program.send("versions", qnn=True)
    assert wait_for((tmp_path / "sleeping").exists)
    return program


@pytest.fixture
def busy(start: Callable[..., Program], tmp_path: Path) -> Program:
    """In the middle of a compilation that takes most of a minute."""
    program = start()
    program.send_load(small_models.compiles_for_long(tmp_path / "long.onnx"), mib=1e5)
    assert wait_for(lambda: program.runtime.cpu_times().user > 0.6)
    return program


# --- what it does ---------------------------------------------------------------------------------------------------------


def test_it_loads_runs_times_and_profiles(start: Callable[..., Program], models: Path) -> None:
    program = start()
    loaded = program.load(models / "conv.qdq.onnx")
    assert loaded["ok"], loaded
    assert {provider for provider, _, _ in loaded["placement"]} == {"QNNExecutionProvider", "CPUExecutionProvider"}
    assert [os.path.basename(path) for path in loaded["libraries"]] == ["libQnnHtp.so"]
    x = {"x": np.ones((1, 3, 16, 16), np.float32)}
    answer, outputs = program.ask("run", x, session=1)
    assert answer["ok"]
    assert outputs["y"].shape == (1, 8, 16, 16)
    timed, _ = program.ask("time", x, session=1, count=3, seconds=20, reset_peak=True)
    assert len(timed["times_ms"]) == 3
    assert timed["peak_memory_mib"] > 20
    assert timed["cpu_share"] > 0.05
    profile, arrays = program.ask(
        "profile",
        x,
        **{
            "folder": "models/2",
            "files": [["model.onnx", str(models / "conv.qdq.onnx")]],
            "dimensions": [],
            "config": [],
        },
        **{
            "provider": "QNNExecutionProvider",
            "provider_options": SIMULATOR,
            "level": "ORT_ENABLE_ALL",
            "log_severity": 2,
        },
        run_options=[],
    )
    assert profile["ok"], profile
    assert b"NODE" in arrays["profile"].tobytes()
    assert not list(program.folder.glob("profile-*"))
    program.ask("close", session=1)
    answer, _ = program.ask("run", x, session=1)
    assert (answer["ok"], answer["kind"]) == (False, "internal")


def test_a_request_that_makes_no_sense_is_refused_and_the_next_is_answered(start: Callable[..., Program]) -> None:
    program = start()
    for op in ("nonsense", "run", "_add_qnn"):
        answer, _ = program.ask(op, session=9)
        assert (answer["ok"], answer["kind"]) == (False, "internal")
    assert program.ask("versions", qnn=True)[0]["qnn"]


def test_the_simulator_must_be_told_which_soc_to_be(start: Callable[..., Program], models: Path) -> None:
    program = start()
    for options in ([["backend_type", "htp"]], [["backend_path", "libQnnHtp.so"]]):
        answer = program.load(models / "conv.qdq.onnx", options)
        assert (answer["kind"], "which SoC" in answer["message"]) == ("unavailable", True)
    assert program.load(models / "conv.qdq.onnx", [["backend_path", "libQnnHtp.so"], ["soc_model", "57"]])["ok"]


def test_a_backend_that_the_package_lacks_is_named(start: Callable[..., Program], models: Path) -> None:
    answer = start().load(models / "conv.onnx", [["backend_path", "libQnnNone.so"]])
    assert answer["kind"] == "unavailable"
    assert "has no libQnnNone.so" in answer["message"]


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "", ".", "a\0b"])
def test_a_file_stays_in_its_models_folder(start: Callable[..., Program], models: Path, name: str) -> None:
    files = [["model.onnx", str(models / "conv.onnx")], [name, str(models / "conv.onnx")]]
    program = start()
    answer = program.load(models / "conv.onnx", files=files)
    assert (answer["ok"], answer["kind"]) == (False, "file")
    assert {path.name for path in program.folder.rglob("*")} <= {"models", "1", "model.onnx"}


def test_what_is_too_large_for_the_device_is_refused_and_skipped(start: Callable[..., Program]) -> None:
    program = start(LD_PRELOAD="")
    free = psutil.virtual_memory().available
    if free // 2 < 1 << 30:
        program.send("run", {"x": np.zeros(free // 2 + (1 << 20), np.uint8)}, session=1)
        assert program.receive()[0]["kind"] == "memory"
    assert program.ask("versions")[0]["ok"]


def test_much_from_both_sides_at_once(start: Callable[..., Program], tmp_path: Path) -> None:
    """16 requests of 4 MiB are written while nobody reads the answers of 4 MiB each; more than any buffer between holds."""
    model = small_models.unary(tmp_path / "identity.onnx", "Relu", shape=(1 << 20,))
    program = start()
    assert program.load(model, provider="CPUExecutionProvider")["ok"]
    sent = [np.full(1 << 20, i, np.float32) for i in range(16)]

    def send_all() -> None:
        for x in sent:
            program.send("run", {"x": x}, session=1)

    writer = threading.Thread(target=send_all)
    writer.start()
    for x in sent:
        _, outputs = program.receive()
        assert np.array_equal(outputs["y"], x)
    writer.join(20)


# --- what others print ----------------------------------------------------------------------------------------------------

NOISE = """
import ctypes, os, sys
os.write(1, b"a stray write")
libc = ctypes.CDLL(None)
libc.puts(b"a stray puts")
libc.fflush(None)
print("a stray print")
__path__ = [{folder!r}]
exec(open({folder!r} + "/__init__.py").read())
"""


def test_stray_output_does_not_disturb_the_answers(start: Callable[..., Program], tmp_path: Path) -> None:
    """A package that prints while it is imported, in Python and in C: before the runtime's process is there and in it."""
    import onnxruntime_qnn

    (tmp_path / "noisy" / "onnxruntime_qnn").mkdir(parents=True)
    noise = tmp_path / "noisy" / "onnxruntime_qnn" / "__init__.py"
    noise.write_text(
        "__file__ = " + repr(onnxruntime_qnn.__file__) + NOISE.format(folder=os.path.dirname(onnxruntime_qnn.__file__))
    )
    program = start(PYTHONPATH=str(tmp_path / "noisy"))
    answer, _ = program.ask("versions", qnn=True)
    assert answer["ok"], answer
    assert answer["onnxruntime_qnn"] == onnxruntime_qnn.__version__
    log = "\n".join(answer["log"])
    assert "a stray write" in log
    assert "a stray puts" in log
    assert program.ask("versions")[0]["log"] == [], "each answer has the log of its own request"


def test_the_log_of_a_load_comes_with_its_answer(start: Callable[..., Program], models: Path) -> None:
    program = start()
    quiet = program.load(models / "conv.qdq.onnx")
    verbose = program.load(models / "conv.qdq.onnx", log_severity=0, session=2)
    assert any("QNN" in line for line in verbose["log"])
    assert len(verbose["log"]) > len(quiet["log"])


def test_a_library_that_is_not_the_packages_is_refused(
    start: Callable[..., Program], models: Path, tmp_path: Path
) -> None:
    import onnxruntime_qnn

    (tmp_path / "onnxruntime_qnn.libs").symlink_to(Path(onnxruntime_qnn.__file__).parents[1] / "onnxruntime_qnn.libs")
    copy = tmp_path / "sdk" / "libQnnHtp.so"
    copy.parent.mkdir()
    shutil.copy(onnxruntime_qnn.get_qnn_htp_path(), copy)
    answer = start(LD_PRELOAD=str(copy)).load(models / "conv.qdq.onnx")
    assert (answer["ok"], answer["kind"]) == (False, "library")
    assert str(copy) in answer["message"]
    found = start(LD_LIBRARY_PATH=str(copy.parent)).load(models / "conv.qdq.onnx")
    assert found["ok"], "the package's own folder comes first, whatever the device's variables say"
    assert str(copy) not in found["libraries"]


def test_the_packages_folder_comes_first() -> None:
    changed = agent.library_environment("/qnn", {"LD_LIBRARY_PATH": "/sdk:/qnn", "ADSP_LIBRARY_PATH": "/dsp;/other"})
    assert changed == {"LD_LIBRARY_PATH": "/qnn:/sdk:/qnn", "ADSP_LIBRARY_PATH": "/qnn;/dsp;/other"}
    assert agent.library_environment("/qnn", {"LD_LIBRARY_PATH": "/qnn", "ADSP_LIBRARY_PATH": "/qnn"}) == {}


# --- its end --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_mid", ["busy", "stuck"])
def test_the_end_of_the_requests_is_its_end(request: pytest.FixtureRequest, in_mid: str) -> None:
    program = request.getfixturevalue(in_mid)
    start = time.monotonic()
    assert program.end()[0] == 0
    assert time.monotonic() - start < 10


def test_a_deadline_ends_it_in_mid_compilation(start: Callable[..., Program], tmp_path: Path) -> None:
    program = start()
    program.send_load(small_models.compiles_for_long(tmp_path / "long.onnx"), allowed=1)
    assert wait_for(lambda: program.process.poll() is not None)
    code, errors = program.end()
    assert (code, "it took too long" in errors) == (agent.END_DEADLINE, True)


def test_a_memory_limit_ends_it_in_mid_compilation(start: Callable[..., Program], tmp_path: Path) -> None:
    program = start()
    program.send_load(small_models.compiles_for_long(tmp_path / "long.onnx"), mib=120)
    assert wait_for(lambda: program.process.poll() is not None)
    code, errors = program.end()
    assert (code, "MiB of memory" in errors) == (agent.END_MEMORY, True)


@pytest.mark.slow
def test_idleness_ends_it_but_not_while_it_works(start: Callable[..., Program], models: Path) -> None:
    program = start(idle=1)
    assert program.load(models / "conv.qdq.onnx")["ok"]
    x = {"x": np.ones((1, 3, 16, 16), np.float32)}
    long, _ = program.ask("time", x, session=1, count=10**9, seconds=1.5, reset_peak=False)
    assert long["ok"]
    answered = time.monotonic()
    assert wait_for(lambda: program.process.poll() is not None)
    assert time.monotonic() - answered > 0.5, "idleness begins with the answer"
    assert program.end()[0] == agent.END_IDLE


def test_a_crash_is_told_with_the_log(start: Callable[..., Program], tmp_path: Path) -> None:
    program = start()
    program.send_load(small_models.crashes_while_compiling(tmp_path / "stft.onnx"), log_severity=0)
    assert wait_for(lambda: program.process.poll() is not None)
    code, errors = program.end()
    assert code == 128 + signal.SIGSEGV
    assert "stft" in errors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_runtime_that_is_killed_is_told(busy: Program, number: signal.Signals) -> None:
    busy.runtime.send_signal(number)
    assert wait_for(lambda: busy.process.poll() is not None)
    assert busy.end()[0] == 128 + number


def test_a_runtime_that_is_killed_while_nothing_is_asked(start: Callable[..., Program]) -> None:
    program = start()
    program.runtime.kill()
    assert wait_for(lambda: program.process.poll() is not None)
    assert program.end() == (agent.END_BETWEEN, "\nit was killed by signal 9 between requests\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_killing_the_program_ends_the_runtime(stuck: Program, number: signal.Signals) -> None:
    stuck.process.send_signal(number)
    stuck.process.wait(10)
    assert wait_for(lambda: is_gone(stuck.hello["pid"]), 10), "also while its requests are still open"


@pytest.mark.parametrize("data", [b"x" * 64, b"QnA1" + b"\xff" * 64, b"\0" * 20])
def test_what_is_no_frame_ends_it(start: Callable[..., Program], data: bytes) -> None:
    program = start()
    assert program.process.stdin
    program.process.stdin.write(data)
    program.process.stdin.flush()
    assert wait_for(lambda: program.process.poll() is not None)
    code, errors = program.end()
    assert (code, "can't be read" in errors) == (agent.END_FRAME, True)


def test_answers_that_nobody_reads_do_not_keep_it(start: Callable[..., Program], tmp_path: Path) -> None:
    model = small_models.unary(tmp_path / "identity.onnx", "Relu", shape=(4 << 20,))
    program = start()
    assert program.load(model, provider="CPUExecutionProvider")["ok"]
    program.send("run", {"x": np.ones(4 << 20, np.float32)}, session=1)
    assert program.process.stdout
    program.process.stdout.read(1)  # it is in the middle of its answer
    program.process.stdout.close()
    assert program.process.stdin
    program.process.stdin.close()
    program.process.wait(20)
    assert wait_for(lambda: is_gone(program.hello["pid"]))
