"""``--qnn-record`` and ``--qnn-replay``: whole test runs on the loopback device, and again without device, adb and simulator."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pytest_qnn.adb.server import AdbServer
from pytest_qnn.recording.stored import problems, read_session
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.testing.device_runtime import make_device_runtime
from tests import sdk_stand_in
from tests.conftest import needs_simulator

TESTS = """
import os
import pytest
from pytest_qnn import *

@pytest.fixture(scope="module")
def conv(qnn_backend):
    return qnn_backend.load("conv.qdq.onnx", float_model="conv.onnx")

def test_accuracy(conv, qnn_inputs):
    assert_matches_reference(conv.run(qnn_inputs(conv, 3)))

def test_other(conv, qnn_inputs):
    run = conv.run(qnn_inputs(conv, 1, seed=int(os.environ.get("SEED", "7"))))
    print("first", float(run.outputs[0]["y"].ravel()[0]))
    assert_matches_reference(run)

def test_latency(conv, qnn_inputs):
    print("first", conv.measure(qnn_inputs(conv, 1)[0]).stats.p50_ms.value)

def test_float(qnn_backend, qnn_inputs):
    session = qnn_backend.load("conv.onnx")
    assert_matches_reference(session.run(qnn_inputs(session, 1)))
"""
WITHOUT = """
import sys
import time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder())
"""
# qnn-net-run's replay reads the context binary, with the QNN system library of onnxruntime-qnn or of an SDK
NOT_NEEDED = {"linux": ("adbutils", "onnxruntime_qnn"), "android": ("adbutils",)}


@dataclass(frozen=True)
class Recorded:
    """A project with a recording of its tests, whose device is gone."""

    project: Path
    folder: Path
    output: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def again(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Replay: exit code and output."""
        given = (f"--qnn-replay={self.folder}", "-rA", "-s", "-p", "without", *arguments)
        return run(
            self.project, *given, **self.environment, PATH="/nowhere", ANDROID_ADB_SERVER_PORT="9", **environment
        )


def run(project: Path, *arguments: str, command: str = "pytest", **environment: str) -> tuple[int, str]:
    """pytest in ``project``, with a cache of its own that is new each time; exit code and output."""
    cache = project.parent / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    options = ["-p", "no:cacheprovider", f"--qnn-cache-dir={cache}"]
    options += ["--qnn-target=adb"] if command == "pytest" else []
    done = subprocess.run(
        [sys.executable, "-m", command, *arguments, *options],
        cwd=project,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(project), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module", params=["linux", pytest.param("android", marks=pytest.mark.slow)])
def recorded(
    request: pytest.FixtureRequest, adb_server: AdbServer, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recorded:
    needs_simulator()
    folder = tmp_path_factory.mktemp(f"recorded-{request.param}")
    project = folder / "project"
    project.mkdir()
    for model in models.glob("conv*.onnx"):
        shutil.copy(model, project)
    (project / "test_it.py").write_text(TESTS)
    (project / "without.py").write_text(f"PACKAGES = {NOT_NEEDED[request.param]}\n{WITHOUT}")
    with LoopbackDevice(folder / "device", flavor=request.param) as device:
        device.connect(adb_server)
        where = [f"--qnn-adb-server={adb_server.address}", f"--qnn-device={device.address}"]
        sdk = {}
        if request.param == "android":  # its qnn-profile-viewer reads times, in a replay too
            sdk["QNN_SDK_ROOT"] = str(make_device_runtime(sdk_stand_in.install(folder / "qairt")))
        code, output = run(
            project,
            "record",
            str(folder / "rec"),
            "--",
            "-s",
            f"--qnn-json={folder / 'recorded.json'}",
            *where,
            command="pytest_qnn.cli",
            **sdk,
        )
        device.disconnect(adb_server)
    assert code == 0, output
    return Recorded(project, folder / "rec", output, sdk)


def test_the_same_tests_pass_with_the_same_numbers_without_the_device(recorded: Recorded, tmp_path: Path) -> None:
    report = tmp_path / "replayed.json"
    code, output = recorded.again(f"--qnn-json={report}")
    assert code == 0, output
    assert "4 passed" in output
    numbers = re.findall(r"first (\S+)", recorded.output)
    assert len(numbers) == 2
    assert re.findall(r"first (\S+)", output) == numbers
    assert "was not asked: this is a replay of a recording of" in output
    assert "was not asked" not in recorded.output
    for file, replayed in ((report, True), (recorded.folder.parent / "recorded.json", False)):
        devices = [record["provenance"]["device"] for record in json.loads(file.read_text())["records"]]
        assert len(devices) == 3
        assert all(device["stand_in"] and bool(device["replayed"]) == replayed for device in devices)


@pytest.mark.parametrize("name", ["test_other", "test_latency"])
def test_a_test_is_replayed_alone(recorded: Recorded, name: str) -> None:
    code, output = recorded.again("-k", name)
    assert code == 0, output
    assert "1 passed" in output


def test_other_inputs_are_an_infrastructure_error(recorded: Recorded) -> None:
    code, output = recorded.again("-k", "test_other or test_float", SEED="8")
    assert code == 1
    assert "something else was asked than was recorded" in output
    assert "passed" not in output.splitlines()[-1]


def test_another_model_is_an_infrastructure_error(recorded: Recorded, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(recorded.project, project)
    model = (project / "conv.onnx").read_bytes()
    (project / "conv.onnx").write_bytes(model + b"\x72\x00")  # the same with an empty doc string
    code, output = Recorded(project, recorded.folder, "", recorded.environment).again("-k", "test_float")
    assert code == 1
    assert "ReplayError" in output
    assert "passed" not in output.splitlines()[-1]


def test_the_recording_is_whole_and_says_what_it_is(recorded: Recorded) -> None:
    session = read_session(recorded.folder)
    assert problems(session) == []
    assert [part.nodeid for part in session.tests] == [
        f"test_it.py::test_{name}[htp]" for name in ("accuracy", "other", "latency", "float")
    ]
    assert {part.outcome for part in session.tests} == {"passed"}
    assert session.devices[0].stand_in
    text = (recorded.folder / "recording.jsonl").read_text()
    for path in (recorded.project, recorded.folder):  # the device's own folder may be told: it lies beside them
        assert str(path) not in text
    own_name = re.escape(os.uname().nodename)  # as a word: a short one occurs in Base64 by chance
    assert not re.search(rf"(?<![\w+/=]){own_name}(?![\w+/=])", text)


def test_two_processes_are_refused(recorded: Recorded) -> None:
    code, output = recorded.again("-n2")
    assert code == 4
    assert "--qnn-replay and -n (xdist) were both given" in output


def command(*words: str, **environment: str) -> tuple[int, str]:
    """pytest-qnn; exit code and output."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest_qnn.cli", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_show(recorded: Recorded) -> None:
    assert f"Replay: pytest-qnn replay {recorded.folder}" in recorded.output
    code, shown = command("record", "show", str(recorded.folder))
    assert code == 0
    assert "stand-in: loopback device" in shown
    assert "test_it.py::test_other[htp]" in shown
    summary = json.loads(command("record", "show", "--json", str(recorded.folder))[1])
    assert summary["complete"]
    assert [test["outcome"] for test in summary["tests"]] == ["passed"] * 4


def test_replay_runs_what_was_recorded(recorded: Recorded) -> None:
    cut = recorded.project.parent / "cut"
    shutil.copytree(recorded.folder, cut)
    code, output = run(
        recorded.project, "replay", str(recorded.folder), command="pytest_qnn.cli", **recorded.environment
    )
    assert code == 0, output
    assert "4 passed" in output
    log = cut / "recording.jsonl"
    log.write_bytes(log.read_bytes()[:-5])  # as if the recorder had been killed
    code, output = command("record", "show", str(cut))
    assert code == 1
    assert "the recorder was killed while it wrote" in output


LOST = """
import os, time
from pathlib import Path
from pytest_qnn import *

def test_before_and_after(qnn_backend, qnn_inputs):
    session = qnn_backend.load("conv.qdq.onnx")
    first = session.run(qnn_inputs(session, 1))
    if waits := os.environ.get("WAIT"):
        Path(waits, "ready").touch()
        while not Path(waits, "go").exists():
            time.sleep(0.02)
    again = session.run(qnn_inputs(session, 1))
    assert (first.outputs[0]["y"] == again.outputs[0]["y"]).all()
"""


@pytest.mark.slow
def test_a_device_that_was_lost_and_got_back_is_so_again(adb_server: AdbServer, models: Path, tmp_path: Path) -> None:
    needs_simulator()
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(models / "conv.qdq.onnx", project)
    (project / "test_it.py").write_text(LOST)
    (project / "without.py").write_text(f"PACKAGES = {NOT_NEEDED['linux']}\n{WITHOUT}")
    with LoopbackDevice(tmp_path / "device", flavor="linux") as device, ThreadPoolExecutor(1) as pool:
        device.connect(adb_server)
        where = [f"--qnn-adb-server={adb_server.address}", f"--qnn-device={device.address}"]
        recording = pool.submit(run, project, f"--qnn-record={tmp_path / 'rec'}", *where, WAIT=str(tmp_path))
        while not (tmp_path / "ready").exists() and not recording.done():
            time.sleep(0.02)
        device.drop()
        (tmp_path / "go").touch()
        code, output = recording.result()
        device.disconnect(adb_server)
    assert code == 0, output
    assert "device lost, done once more" in output
    code, output = Recorded(project, tmp_path / "rec", "").again()
    assert code == 0, output
    assert "device lost, done once more" in output
