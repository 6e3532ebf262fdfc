"""The command line, as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qnn.cli import main
from tests.conftest import needs_simulator


def call(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest_qnn.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )


def test_doctor_runs_each_backend_for_real(tmp_path: Path, cpu_library: Path) -> None:
    done = call("doctor", "--require", "htp,cpu", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    checks = {c["name"]: c for c in found["checks"]}
    assert found["ok"] is True
    assert checks["htp"]["ok"] is True
    assert (checks["htp"]["precision"], checks["cpu"]["precision"]) == ("float16", "float32")
    assert checks["htp"]["load_ms"] > 0
    assert checks["gpu"]["ok"] is False
    assert "Adreno" in checks["gpu"]["detail"]
    assert {"python", "onnxruntime", "onnxruntime-qnn", "QNN SDK", "adb", "devices"} <= checks.keys()


def test_doctor_fails_if_what_was_required_does_not_work(tmp_path: Path) -> None:
    needs_simulator()
    done = call("doctor", "--require", "gpu", cwd=tmp_path)
    assert done.returncode == 1
    assert "required, but doesn't work: gpu" in done.stdout
    assert "htp" in done.stdout


def test_doctor_reports_a_broken_library_and_goes_on(tmp_path: Path) -> None:
    needs_simulator()
    broken = tmp_path / "libQnnCpu.so"
    broken.write_bytes(b"not a library")
    (tmp_path / "pyproject.toml").write_text(f"[tool.pytest_qnn]\ncpu_library = '{broken}'\n")
    done = call("doctor", "--json", cwd=tmp_path)
    checks = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0
    assert checks["cpu"]["ok"] is False
    assert "none of the model's 1 nodes run on cpu" in checks["cpu"]["detail"]
    assert checks["htp"]["ok"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "--require", "hpt"], "unknown backend 'hpt'. Did you mean 'htp'?"),
        (["doctor", "--soc", "SM9999"], "unknown SoC 'SM9999'"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doktor"])
    assert caught.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
