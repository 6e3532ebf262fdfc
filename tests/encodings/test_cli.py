"""``pytest-qnn encodings`` as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qnn.cli import main
from pytest_qnn.model import read_encodings
from tests.encodings.test_files import SEED

X = {"bitwidth": 8, "min": -4.0, "max": 3.96875, "scale": 0.03125, "offset": -128}
Y = {"bitwidth": 8, "min": 0.0, "max": 15.9375, "scale": 0.0625, "offset": 0}
W = {"bitwidth": 8, "is_symmetric": "True", "min": -4.0, "max": 3.96875, "scale": 0.03125, "offset": -128}
DOCUMENT = {"activation_encodings": {"x": [X], "y": [Y]}, "param_encodings": {"w": [W] * 8}}


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the float model and its encodings."""
    (tmp_path / "conv.onnx").write_bytes((models / "conv.onnx").read_bytes())
    (tmp_path / "e.json").write_text(json.dumps(DOCUMENT))
    (tmp_path / "seed.json").write_text(json.dumps(SEED))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["encodings", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "show", "seed.json")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines[0][-1] == "qnn"
    assert lines[1][:3] == ["note:", "param", "'weight'"]
    assert lines[-1] == ["weight", "param", "uint8", "0.019608", "127", "-2.4902", "..", "2.5098", "1"]
    code, out, _ = call(capsys, "show", "e.json", "--tensor", "w", "--model", "conv.onnx")
    assert [line.split()[0] for line in out.splitlines()[1:]] == [f"w[{i}]" for i in range(8)]
    _, out, _ = call(capsys, "show", "e.json", "--model", "conv.onnx", "--json")
    assert json.loads(out)["tensors"][2]["axis"] == 0


def test_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "check", "e.json", "--model", "conv.onnx")[:2] == (
        0,
        f"{folder / 'e.json'}: qnn\nnothing wrong in 3 encodings\n",
    )
    code, out, _ = call(capsys, "check", "seed.json", "--model", "conv.onnx")
    assert code == 1
    assert "param 'weight': conv.onnx has no such tensor" in out
    assert "2 problems in 2 encodings" in out
    (folder / "bad.json").write_text(
        json.dumps({"version": "0.6.1", "param_encodings": {"w": [{**W, "scale": float("nan")}]}})
    )
    code, out, _ = call(capsys, "check", "bad.json", "--json")
    assert (code, json.loads(out)["problems"]) == (1, ["param 'w': scale is nan: it must be above 0 and finite"])


def test_convert_there_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "convert", "e.json", "two.json", "--to", "aimet-2.0.0", "--model", "conv.onnx")
    assert (code, out.splitlines()[-1]) == (0, "wrote two.json: aimet-2.0.0, 3 encodings")
    assert call(capsys, "convert", "two.json", "back.json", "--to", "qnn", "--model", "conv.onnx")[0] == 0
    assert read_encodings("back.json").by_name == read_encodings("e.json").by_name
    code, _, err = call(capsys, "convert", "two.json", "again.json", "--to", "qnn")
    assert code == 2
    assert "the format must say whether they are activations or parameters: name the float model" in err
    assert not Path("again.json").exists()


def test_compare(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = {
        **DOCUMENT,
        "activation_encodings": {"x": [{**X, "offset": -130, "min": -4.0625, "max": 3.90625}], "y": [Y]},
    }
    (folder / "moved.json").write_text(json.dumps(moved))
    code, out, _ = call(capsys, "compare", "e.json", "moved.json")
    assert code == 0
    assert out.splitlines()[1].split()[:2] == ["x", "2"]
    assert out.splitlines()[-1] == "2 the same, 1 changed, 0 in one file alone"
    assert call(capsys, "compare", "e.json", "moved.json", "--max-steps", "2")[0] == 0
    assert call(capsys, "compare", "e.json", "moved.json", "--max-steps", "1.9")[0] == 1
    code, out, _ = call(capsys, "compare", "e.json", "seed.json", "--json", "--max-steps", "0")
    assert (code, json.loads(out)["only_second"]) == (1, ["relu", "weight"])


def test_apply(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "apply", "conv.onnx", "e.json", "q.onnx")
    assert code == 0
    assert out.splitlines()[-1] == "wrote q.onnx: 3 tensors by the file's encodings, 1 by derived ones"
    assert any(
        line.split() == ["b", "bias:", "scale", "of", "'x'", "times", "scale", "of", "'w'"] for line in out.splitlines()
    )
    code, out, _ = call(capsys, "compare", "e.json", "q.onnx")
    assert "3 the same, 0 changed, 1 in one file alone" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere.json"], "nowhere.json: the encodings can't be read: No such file or directory"),
        (["show", "e.json", "--tensor", "ww"], "--tensor: unknown tensor 'ww'. Did you mean 'w'?"),
        (["show", "conv.onnx"], "has no encodings: it is no QDQ model"),
        (["convert", "e.json", "o.json", "--to", "aimet"], "unknown encodings format 'aimet'"),
        (["apply", "e.json", "conv.onnx", "q.onnx"], "conv.onnx: has no encodings: it is no QDQ model"),
        (["apply", "conv.onnx", "seed.json", "q.onnx"], "2 problems:"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert message in err
    assert not (folder / "q.onnx").exists()


def test_a_full_disk_leaves_nothing_half_written(folder: Path) -> None:
    before = sorted(os.listdir(folder))
    for command in ("apply conv.onnx e.json q.onnx", "convert e.json o.json --to aimet-0.6.1"):
        done = subprocess.run(
            ["bash", "-c", f"ulimit -f 1; exec {sys.executable} -m pytest_qnn.cli encodings {command}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert "can't be written: File too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(os.listdir(folder)) == before
