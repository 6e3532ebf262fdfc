"""``pytest-qnn quantize`` as a user calls it, interrupts and kills it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pytest_qnn.cli import main
from tests.quantizing.conftest import samples

ENDLESS = """
import os, pathlib, signal
import numpy as np
def endless():
    "Samples, and a sign of life after the third."
    n = 0
    while True:
        yield {"x": np.full((1, 3, 16, 16), n % 7, np.float32)}
        n += 1
        if n == 3:
            print("running", flush=True)
def killed_while_writing():
    import pytest_qnn.quantization.quantize as q
    save = q.onnx.save
    def save_and_die(model, path, *arguments, **options):
        save(model, path, *arguments, **options)
        if ".part" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
    q.onnx.save = save_and_die
    yield from ({"x": np.full((1, 3, 16, 16), i, np.float32)} for i in range(9))
"""


@pytest.fixture
def folder(tmp_path: Path, float_net: Path) -> Path:
    (tmp_path / "net.onnx").write_bytes(float_net.read_bytes())
    (tmp_path / "calibration.py").write_text(ENDLESS)
    (tmp_path / "data").mkdir()
    (tmp_path / "temporary").mkdir()
    for i, sample in enumerate(samples()):
        np.save(tmp_path / "data" / f"{i:02}.npy", sample["x"])
    return tmp_path


def command(data: str, *more: str) -> list[str]:
    arguments = ["quantize", "net.onnx", "--data", data, "--output", "q.onnx", "--dimensions", "batch=1", *more]
    return [sys.executable, "-m", "pytest_qnn.cli", *arguments]


def left_in_temporary(folder: Path) -> list[str]:
    return [
        f.name for f in (folder / "temporary").iterdir() if f.name != ".ses"
    ]  # .ses: onnxruntime's own, in every process


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder / "temporary"), "COLUMNS": "120"}


def test_it_prints_the_worst_tensors_and_writes_model_and_report(folder: Path) -> None:
    done = subprocess.run(
        command("data", "--activations", "16", "--override", "y=8", "--range", "x=-1:1", "--report", "report.json"),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["tensor", "observed", "encoded", "bits", "clipped", "unused"]
    assert lines[1].split()[0] == "x"
    assert any(line.startswith("warning: tensor 'x': 3") for line in lines)
    assert lines[-1] == "q.onnx: A16W8, calibrated on 12 samples"
    assert done.stderr == ""
    report = json.loads((folder / "report.json").read_text())
    assert {t["name"]: t["bits"] for t in report["tensors"]}["y"] == 8
    assert left_in_temporary(folder) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "calibration data nowhere: there is no such file or folder"),
        (["--data", "data", "--override", "r"], "--override: expected NAME=NUMBER, got 'r'"),
        (["--data", "data", "--range", "r=1"], "--range: expected NAME=LOW:HIGH, got 'r=1'"),
        (["--data", "data", "--dimensions", "bach=1"], "no dynamic dimension 'bach'"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    if not any("bach" in a for a in arguments):
        arguments = [*arguments, "--dimensions", "batch=1"]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["quantize", "net.onnx", "--output", "q.onnx", *arguments]) == 2
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert message in capsys.readouterr().err
    assert not (folder / "q.onnx").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_it_leaves_nothing(folder: Path, number: signal.Signals, code: int) -> None:
    (folder / "q.onnx").write_text("of an earlier run")
    process = subprocess.Popen(
        command("calibration:endless"),
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert left_in_temporary(folder) == []
    assert (folder / "q.onnx").read_text() == "of an earlier run"


def test_what_a_kill_leaves_is_removed_by_the_next_run(folder: Path) -> None:
    (folder / "q.onnx").write_text("of an earlier run")
    for expected, data in ((-signal.SIGKILL, "calibration:killed_while_writing"), (0, "data")):
        done = subprocess.run(
            command(data), cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
        )
        assert done.returncode == expected, done.stderr
        drafts = [f.name for f in folder.iterdir() if f.name.endswith(".part")]
        if expected:
            assert len(drafts) == 1
            assert (folder / "q.onnx").read_text() == "of an earlier run"
    assert drafts == []
    assert [f.name for f in folder.iterdir() if f.name.startswith("q.")] == ["q.onnx"]


def test_a_full_disk_leaves_nothing(folder: Path) -> None:
    def few_bytes() -> None:  # as a full disk: a write past this size fails
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = subprocess.run(
        command("data"),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=few_bytes,
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr
    assert not [f for f in folder.iterdir() if f.name.startswith(("q.", ".q."))]
    assert left_in_temporary(folder) == []
