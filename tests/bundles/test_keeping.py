"""What is kept of a failing case, and what happens where it can't be kept."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from onnx import helper

from pytest_qnn.assertions import assert_matches_reference
from pytest_qnn.records.bundle import bundle_schema, keep_bundle
from pytest_qnn.records.bundle_folder import NoRoomError, bundles_in, folder_name, replaced_folder
from pytest_qnn.records.stored_bundle import read_bundle
from pytest_qnn.session import Run
from pytest_qnn.verdict.tolerance import Tolerance
from tests import small_models

Project = Callable[..., pytest.RunResult]
Keep = Callable[..., Path]
MIB = 1 << 20

FAILS = """
@pytest.mark.backend("htp")
def test_too_strict(qnn_backend, qnn_inputs):
    session = qnn_backend.load("conv.qdq.onnx", float_model="conv.onnx")
    run = session.run(qnn_inputs(session, 6))
    assert_matches_reference(run, Tolerance(sqnr_db=10))
    assert_matches_reference(run, Tolerance(sqnr_db=90))
"""


def bundles(pytester: pytest.Pytester, folder: str = "kept") -> list[Path]:
    return bundles_in(pytester.path / folder)


def described(folder: Path) -> dict[str, Any]:
    """``bundle.json``, checked against its published schema."""
    description: dict[str, Any] = json.loads((folder / "bundle.json").read_text())
    jsonschema.validate(description, bundle_schema())
    return description


def test_a_failing_case_is_kept_with_all_that_it_takes_to_see_it_again(
    pytester: pytest.Pytester, project: Project
) -> None:
    result = project(FAILS, "--qnn-artifacts=kept", "--qnn-json=out.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "*bundle: */kept/test-too-strict-htp-* (4 of 6 samples)",
            "*alone: * bundle run */kept/*",
            "bundles of failing cases: 1; pytest-qnn bundle show */kept",
        ]
    )
    (folder,) = bundles(pytester)  # nothing of the assertion that passed
    told = described(folder)
    assert told["test"] == "test_it.py::test_too_strict[htp]"
    assert told["provenance"]["options"] == {}
    assert told["provenance"]["soc"] == "SM8650"
    assert told["verdict"]["samples"] == 6
    assert told["verdict_of_kept"]["ok"] is False
    assert sorted(told["files"]) == [
        "backend.npz", "check.npz", "float.npz", "float_model.onnx", "inputs.npz", "model.onnx", "quantized.npz",
    ]  # fmt: skip
    (record,) = [r for r in json.loads((pytester.path / "out.json").read_text())["records"] if r["bundle"]]
    assert record["bundle"] == str(folder)
    stored = read_bundle(folder)
    q, y, f = (stored.references[0].quantized["y"], stored.results[0]["y"], stored.references[0].real["y"])  # type: ignore[index]
    assert q.shape == y.shape == f.shape == (1, 8, 16, 16)
    assert 0 < np.abs(y - q).mean() < np.abs(q - f).mean()  # three ways, and not one of them thrice


@pytest.mark.slow
def test_its_commands_work_when_pasted_elsewhere(pytester: pytest.Pytester, project: Project, tmp_path: Path) -> None:
    pytester.makepyprojecttoml('[tool.pytest_qnn]\nartifacts = "of the project"\n')
    (pytester.path / "options.json").write_text('{"htp_config": {"htp_performance_mode": "burst"}}')
    project(FAILS, "--qnn-backend-config=options.json").assert_outcomes(failed=1)
    told = described(bundles(pytester, "of the project")[0])
    commands = told["commands"]
    assert told["provenance"]["options"] == {"htp_performance_mode": "burst"}
    assert f"--qnn-backend-config={pytester.path / 'options.json'}" in commands["test"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for command, code, text in (
        (commands["bundle"], 0, "reproduced: the outputs are the same"),
        (commands["test"], 1, "1 failed"),
    ):
        done = subprocess.run(
            command, shell=True, cwd="/", env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert text in done.stdout


def test_a_run_that_passes_keeps_nothing(good_run: Run, keeping: Any, tmp_path: Path) -> None:
    keeping.settings = replace(keeping.settings, artifacts=tmp_path / "kept")
    assert assert_matches_reference(good_run).ok
    assert not (tmp_path / "kept").exists()


@pytest.mark.slow
def test_two_workers_with_one_test_leave_one_bundle(pytester: pytest.Pytester, project: Project) -> None:
    project(FAILS, "--qnn-artifacts=kept", "-n2", "--dist=each").assert_outcomes(failed=2)
    (folder,) = bundles(pytester)
    read_bundle(folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == [".lock", folder.name]


@pytest.mark.slow
def test_a_full_disk_is_said_and_changes_no_verdict(pytester: pytest.Pytester, project: Project) -> None:
    full = FAILS.replace(
        "    assert_matches_reference(run, Tolerance(sqnr_db=90))",
        "    import resource\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "    assert_matches_reference(run, Tolerance(sqnr_db=90))",
    )
    for extra in ((), ("-W", "error")):
        result = project(full, "--qnn-artifacts=kept", *extra)
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(
            ["*AccuracyError: *", "*bundle: not kept: *: File too large: free some space there*"]
        )
        assert not bundles(pytester)
        assert not [p.name for p in (pytester.path / "kept").iterdir() if p.name != ".lock"]


def test_a_file_in_place_of_the_folder_is_a_usage_error(pytester: pytest.Pytester, project: Project) -> None:
    (pytester.path / "kept").write_text("")
    result = project(FAILS, "--qnn-artifacts=kept")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--qnn-artifacts: *kept is a file: name a folder*"])


def test_hostile_names_of_tensors_and_tests_are_no_paths(keep: Keep, keeping: Any, tmp_path: Path) -> None:
    from pytest_qnn.markers import BackendRequest
    from pytest_qnn.model.inputs import seeded_inputs

    x, y = "../../../x", "/tmp/\n\x1b[31m/y"
    node = helper.make_node("Relu", [x], [y], name="relu")
    model = small_models.save(tmp_path / "relu.onnx", [node], {x: [1, 16]}, {y: [1, 16]})
    session = keeping.backend(BackendRequest("htp")).load(model)
    folder = keep(session.run(seeded_inputs(session, 2)), Tolerance(sqnr_db=300))
    stored = read_bundle(folder)
    assert set(stored.samples[0]) == {x}
    assert set(stored.results[0]) == {y}
    for name in ("../../etc/passwd", "a/b", "", "..", "\0", "x" * 5000, "ключ\ud800"):
        assert re.fullmatch(r"[A-Za-z0-9-]{1,59}", folder_name(name))
    assert folder_name("a/b") != folder_name("a-b")


def test_samples_are_bounded_and_the_bundle_says_which_are_there(
    keep: Keep, good_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.bundles.conftest import corrupted

    monkeypatch.setattr("pytest_qnn.records.bundle.ARRAYS_LIMIT", 1)
    told = described(keep(corrupted(good_run, 4)))
    assert told["samples"] == {"run": 6, "kept": [4], "note": ""}


def test_what_failed_otherwise_is_kept_without_a_verdict(
    good_run: Run, keeping: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping.settings = replace(keeping.settings, artifacts=tmp_path / "kept")
    folder = keep_bundle(good_run, None, "not deterministic: 3 elements differ")
    assert folder is not None
    told = described(folder)
    assert told["verdict"] is None
    assert told["reason"] == "not deterministic: 3 elements differ"
    keeping.settings = replace(keeping.settings, artifacts=None)
    assert keep_bundle(good_run, None, "x") is None


# --- the folder -------------------------------------------------------------------------------------------------------


def fill(folder: Path, size: int, limit: float = 100 * MIB, run_began: float | None = None) -> Path:
    with replaced_folder(folder, limit, time.time() if run_began is None else run_began) as draft:
        (draft / "bundle.json").write_bytes(bytes(size))
    return folder


def test_a_writer_that_is_killed_leaves_the_old_bundle_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / folder_name("case")
    fill(folder, 10)
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pytest_qnn.records.bundle_folder import replaced_folder\n"
        "with replaced_folder(Path(sys.argv[1]), 1e9, 0) as draft:\n"
        "    (draft / 'bundle.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (folder / "bundle.json").stat().st_size == 10
    assert [p for p in tmp_path.iterdir() if p.name.endswith(".part")]
    # killed between moving the old one aside and the new one in
    os.rename(folder, tmp_path / f".{folder.name}.old")
    fill(tmp_path / folder_name("other"), 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".lock", folder.name, folder_name("other")])


def test_the_oldest_bundles_of_earlier_runs_make_room_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "of-the-user").mkdir()
    (tmp_path / "of-the-user" / "data").write_bytes(bytes(2000))
    first, second, third = (tmp_path / folder_name(name) for name in ("first", "second", "third"))
    for age, folder in ((300, first), (200, second)):
        fill(folder, 1000)
        os.utime(folder, (time.time() - age,) * 2)
    fill(third, 1000, limit=2500)
    assert bundles_in(tmp_path) == sorted([second, third])
    with pytest.raises(NoRoomError, match="artifacts_limit_mb"):
        fill(first, 1000, limit=1500, run_began=time.time() - 1000)
    assert bundles_in(tmp_path) == sorted([second, third])
    assert (tmp_path / "of-the-user" / "data").exists()
