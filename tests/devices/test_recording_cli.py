"""``pytest-qnn record`` and ``replay`` where no device is needed: folders, damage, hostile recordings, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pytest_qnn.cli import main
from pytest_qnn.recording import Recording
from pytest_qnn.recording.log import LOG
from tests.devices.memory_device import MemoryDevice


def make(folder: Path, *nodeids: str, stand_in: str = "a device in memory") -> Path:
    """A recording of tests that each ask one thing."""
    recording = Recording(folder)
    transport = recording.transport(MemoryDevice())
    transport.describe({"model": "Memory"}, stand_in)
    for nodeid in nodeids:
        recording.begin_test(nodeid)
        transport.shell(["count"])
        recording.end_test("passed")
        recording.begin_test("")
    recording.close("0")
    return folder


def test_show_names_devices_tests_and_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "rec", "t.py::test_a", "t.py::test_\x1b[31m")
    assert main(["record", "show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "device memory (stand-in: a device in memory): Memory" in shown
    assert "t.py::test_a" in shown
    assert "\x1b" not in shown
    (folder / LOG).write_bytes((folder / LOG).read_bytes()[:-3])
    assert main(["record", "show", str(folder)]) == 1
    assert "incomplete" in capsys.readouterr().out
    (folder / LOG).write_bytes((folder / LOG).read_bytes().replace(b"passed", b"failed"))
    assert main(["record", "show", str(folder)]) == 1
    assert "not a recording as it was made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["record", "show"], "name one folder"),
        (["record", "show", "a", "b"], "name one folder"),
        (["record", "--json", "rec"], "--json goes with"),
        (["record", "rec"], "there is a recording of"),
        (["record", "--replace", "photos"], "there are other files in it"),
        (["replay", "nowhere"], "there is no recording"),
    ],
)
def test_mistakes_are_told(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "rec")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    before = (tmp_path / "rec" / LOG).read_bytes()
    code = main(words)
    assert code in (1, 2)
    assert told in "".join(capsys.readouterr())
    assert (tmp_path / "rec" / LOG).read_bytes() == before
    assert (tmp_path / "photos" / "cat.jpg").exists()


@pytest.mark.parametrize("nodeid", ["-p evil", "--pdb", "@arguments", "../../evil.py::test", "/evil.py::test_x", "::x"])
def test_a_test_named_like_an_option_or_elsewhere_is_not_run(
    nodeid: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "rec", nodeid)
    assert main(["replay", str(tmp_path / "rec")]) == 2
    assert "name the tests to run" in capsys.readouterr().err


def test_the_former_recording_stays_if_no_new_one_is_made(tmp_path: Path) -> None:
    before = (make(tmp_path / "rec", "t.py::test_a") / LOG).read_bytes()
    (tmp_path / "test_t.py").write_text("def test_a(): pass")
    for words in (["--no-such-option"], ["-q"]):
        done = subprocess.run(
            [sys.executable, "-m", "pytest_qnn.cli", "record", "--replace", "rec", "--", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode != 0
        assert "nothing was recorded: the former recording was kept" in done.stdout
        assert (tmp_path / "rec" / LOG).read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("rec")) == ["rec"]


def test_ctrl_c_lets_pytest_tidy_up(tmp_path: Path) -> None:
    (tmp_path / "test_t.py").write_text(
        "import time, pytest\n"
        "@pytest.fixture\ndef device():\n    yield\n    open('tidied', 'w').close()\n"
        "def test_a(device):\n    open('started', 'w').close()\n    time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest_qnn.cli", "record", "rec"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGINT)
    output = child.communicate(timeout=30)[0]
    assert (tmp_path / "tidied").exists(), output
    assert child.returncode == 2
    assert "Traceback" not in output
