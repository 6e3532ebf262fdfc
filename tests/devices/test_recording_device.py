"""A session with the loopback device, through real adb, and the same one afterwards without device, server and adb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_qnn.adb.server import AdbServer
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.devices.facts import probe
from pytest_qnn.devices.store import DeviceStore
from pytest_qnn.devices.transport import Transport, part
from pytest_qnn.devices.workspace import Workspace, sweep
from pytest_qnn.errors import DeviceError, DeviceFileError, DeviceLostError, DeviceTimeoutError, ReplayError
from pytest_qnn.recording import Recording, Replay
from pytest_qnn.recording.stored import problems, read_session
from pytest_qnn.testing import LoopbackDevice
from tests.devices.conftest import needs_own_root

HOSTILE = "-rf $(touch x) 'a\"b' ü\n*"


def session(transport: Transport, folder: Path) -> list[Any]:
    """What a test run does: probe, provide, run a command, talk to a program, tidy up."""
    model = folder / "model.bin"
    model.write_bytes(bytes(range(256)) * 4000)
    with part(transport, "probe"):
        facts = probe(transport, "/data/local/tmp")
    swept = sweep(transport, facts.folder)
    workspace = Workspace.make(transport, facts.folder)
    stored = DeviceStore(transport, facts.folder, 64).put({"model": model})["model"]
    link = workspace.link({"model.bin": stored})["model.bin"]
    transport.push({f"{workspace.path}/{HOSTILE}": b"hostile"}, timeout=10)
    got = folder / f"got-{transport.fresh_name()}"
    answers: list[Any] = [
        [facts.serial, facts.os, facts.abi, facts.soc.name if facts.soc else ""],
        len(swept.workspaces),
        transport.shell(["wc", "-c", link]).text,
        transport.shell(["cat"], stdin=b"through and back").text,
        transport.shell(["sh", "-c", "echo $LD_LIBRARY_PATH; exit 7"], env={"LD_LIBRARY_PATH": "/x"}).code,
        transport.shell(["echo", HOSTILE], cwd=workspace.path).text,
        transport.read("/proc/version")[:5].decode(),
        transport.pull({link: got, f"{workspace.path}/{HOSTILE}": folder / "hostile"}, timeout=10),
        got.read_bytes() == model.read_bytes(),
        (folder / "hostile").read_text(),
    ]
    got.unlink()
    stream = transport.start(["cat"], timeout=10)
    stream.write(b"x" * 5000, timeout=10)
    answers.append(stream.read(5000, timeout=10).decode())
    stream.close()
    for ask in (
        lambda: transport.read("/nowhere"),
        lambda: transport.shell(["sleep", "30"], timeout=0.5),
        lambda: transport.pull({"/nowhere": got}, timeout=10),
    ):
        try:
            ask()
        except (DeviceFileError, DeviceTimeoutError) as error:
            answers.append(type(error).__name__)
    answers.append(got.exists())
    workspace.close()
    return answers


def record(transport: Transport, folder: Path, recording: Path) -> list[Any]:
    recorder = Recording(recording)
    recorded = recorder.transport(transport)
    answers = session(recorded, folder)
    recorder.close("0")
    return answers


def replay(folder: Path, recording: Path) -> list[Any]:
    again = Replay(recording)
    answers = session(again.transport(0), folder)
    again.finish()
    return answers


def test_a_session_is_replayed_in_another_process_without_adb(
    android: LoopbackDevice, open_transport: Callable[[LoopbackDevice], AdbTransport], tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    recorded = record(open_transport(android), tmp_path, tmp_path / "rec")
    assert recorded[-4:] == ["DeviceFileError", "DeviceTimeoutError", "DeviceFileError", False]
    assert HOSTILE.strip() in recorded
    android.close()
    program = """
import json, sys
from pathlib import Path
from tests.devices.test_recording_device import replay
print(json.dumps(replay(Path(sys.argv[1]), Path(sys.argv[2]))))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "there"), str(tmp_path / "rec")],
        cwd=Path(__file__).parents[2],
        env={"PATH": "/nowhere", "HOME": str(tmp_path), "ANDROID_ADB_SERVER_PORT": "9", "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == recorded


def test_a_recording_of_a_real_line_names_neither_host_nor_user(
    android: LoopbackDevice,
    open_transport: Callable[[LoopbackDevice], AdbTransport],
    adb_server: AdbServer,
    tmp_path: Path,
) -> None:
    needs_own_root(android)
    record(open_transport(android), tmp_path, tmp_path / "rec")
    text = (tmp_path / "rec" / "recording.jsonl").read_text()
    for name in (str(tmp_path), os.uname().nodename, adb_server.address, f'"pid": {os.getpid()}'):
        assert name not in text
    assert android.address in text  # the device is named by its serial
    assert problems(read_session(tmp_path / "rec")) == []


def test_a_lost_device_is_lost_at_the_same_place_again(
    android: LoopbackDevice, open_transport: Callable[[LoopbackDevice], AdbTransport], tmp_path: Path
) -> None:
    def run(transport: Transport, lose: Callable[[], object]) -> list[str]:
        stream = transport.start(["cat"], timeout=10)
        lose()
        told = []
        try:
            stream.write(b"abc", timeout=10)
            stream.read(3, timeout=10)
        except DeviceError as error:
            told.append(type(error).__name__)
        transport.reconnect(20)
        told.append(transport.shell(["echo", "back"]).text)
        return told

    recorder = Recording(tmp_path / "rec")
    recorded = run(recorder.transport(open_transport(android)), android.drop)
    recorder.close()
    assert recorded == [DeviceLostError.__name__, "back"]
    again = Replay(tmp_path / "rec")
    assert run(again.transport(0), lambda: None) == recorded
    again.finish()


def test_another_model_is_told_apart(
    android: LoopbackDevice, open_transport: Callable[[LoopbackDevice], AdbTransport], tmp_path: Path
) -> None:
    def run(transport: Transport, content: bytes) -> None:
        (tmp_path / "model").write_bytes(content)
        facts = probe(transport, "/data/local/tmp")
        DeviceStore(transport, facts.folder, 64).put({"model": tmp_path / "model"})

    recorder = Recording(tmp_path / "rec")
    run(recorder.transport(open_transport(android)), b"1" * 1000)
    recorder.close()
    run(Replay(tmp_path / "rec").transport(0), b"1" * 1000)
    with pytest.raises(ReplayError, match=r"stdin line\[0\]: '.* 1000 1' instead of '.* 1000 1'"):
        run(Replay(tmp_path / "rec").transport(0), b"2" * 1000)
