"""Folders for work in progress: nothing of them stays, also of processes that were killed, and nobody loses a living one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_qnn import work_folder as module
from pytest_qnn.work_folder import work_folder

Project = Callable[..., pytest.RunResult]

HOLDER = """
import sys
from pathlib import Path
from pytest_qnn.work_folder import work_folder
with work_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""
MANY = """
import sys
from pathlib import Path
from pytest_qnn import work_folder as module
for number in range(300):
    module._swept.clear()
    with module.work_folder(Path(sys.argv[1])) as folder:
        (folder / "file").write_text(str(number))
        assert (folder / "file").read_text() == str(number)
"""


@pytest.fixture(autouse=True)
def nothing_swept_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_swept", set())


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that holds a folder until its standard input ends."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_what_a_killed_process_left_goes_with_the_next(holder: tuple[subprocess.Popen[str], Path]) -> None:
    process, left = holder
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert (left / "file").exists()
    with work_folder(left.parent) as folder:
        assert os.listdir(left.parent) == [folder.name]
    assert os.listdir(left.parent) == []


def test_what_a_living_process_uses_stays(holder: tuple[subprocess.Popen[str], Path]) -> None:
    process, used = holder
    with work_folder(used.parent):
        assert (used / "file").read_text() == "x"
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert os.listdir(used.parent) == []


def test_only_our_own_folders_are_swept(tmp_path: Path) -> None:
    names = ["pytest-qnn-work-notes", ".pytest-qnn-work-abcdefgh.old", "pytest-qnn-abcdefgh"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "pytest-qnn-work-abcdefg1").write_text("a file")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "file").touch()
    (tmp_path / "pytest-qnn-work-abcdefg2").symlink_to(elsewhere)
    before = sorted(os.listdir(tmp_path))
    with work_folder(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(elsewhere) == ["file"]


def test_processes_that_sweep_all_the_time_take_no_folder_from_each_other(tmp_path: Path) -> None:
    running = [subprocess.Popen([sys.executable, "-c", MANY, str(tmp_path)], stderr=-1, text=True) for _ in range(6)]
    assert [(process.communicate(timeout=120)[1], process.returncode) for process in running] == [("", 0)] * 6
    assert os.listdir(tmp_path) == []


def test_where_nothing_can_be_locked_folders_work_and_nothing_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    (tmp_path / "pytest-qnn-work-abcdefgh").mkdir()
    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with work_folder(tmp_path) as folder:
        assert folder.is_dir()
    assert os.listdir(tmp_path) == ["pytest-qnn-work-abcdefgh"]


def test_an_error_of_what_uses_it_is_told_and_removes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mine"), work_folder(tmp_path):
        raise FileNotFoundError("mine")
    assert os.listdir(tmp_path) == []


def test_a_killed_pytest_leaves_nothing_to_the_one_after_the_next(
    pytester: pytest.Pytester, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary := pytester.path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.delenv("PYTEST_DEBUG_TEMPROOT", raising=False)
    text = """
import os
def test_a(qnn_backend, qnn_inputs):
    session = qnn_backend.load("conv.qdq.onnx", float_model="conv.onnx")
    assert_matches_reference(session.run(qnn_inputs(session)))
    os.kill(os.getpid(), 9)
"""
    project(text)
    assert list(temporary.glob("pytest-qnn-work-*"))
    project(text.replace("os.kill(os.getpid(), 9)", "")).assert_outcomes(passed=1)
    assert not list(temporary.glob("pytest-qnn-*"))
