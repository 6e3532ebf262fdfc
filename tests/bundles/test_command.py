"""``pytest-qnn bundle``: shown, judged again, run again; and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_qnn.bench import Bench
from pytest_qnn.cli import main
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.records.bundle import digest_of
from pytest_qnn.session import Run
from pytest_qnn.verdict.tolerance import Tolerance
from tests import small_models

Keep = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Edit ``bundle.json`` as somebody would who also corrects its digest."""
    file = folder / "bundle.json"
    description = json.loads(file.read_text())
    change(description)
    description["digest"] = digest_of(description)
    file.write_text(json.dumps(description))


def test_show_tells_what_failed_by_how_much_and_where_it_ran(
    wrong_bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["bundle", "show", str(wrong_bundle)]) == 0
    shown = capsys.readouterr().out
    assert "conv.qdq.onnx on htp (SM8650, simulator)" in shown
    assert "output 'y':" in shown
    assert "test_it.py::test_it" in shown
    assert "onnxruntime_qnn 2." in shown
    assert "4 of 6: " in shown
    assert f"bundle run {wrong_bundle}" in shown


def test_the_worst_samples_are_the_ones_that_are_kept(keep: Keep, good_run: Run) -> None:
    from tests.bundles.conftest import corrupted

    description = json.loads((keep(corrupted(good_run, 1, 4)) / "bundle.json").read_text())
    assert {1, 4} <= set(description["samples"]["kept"])
    assert len(description["samples"]["kept"]) == 4
    assert description["verdict_of_kept"]["ok"] is False


def test_judge_repeats_the_verdict_without_a_backend(
    wrong_bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a bench was opened")

    monkeypatch.setattr("pytest_qnn.bench.Bench.__init__", refuse)
    assert main(["bundle", "judge", "--json", str(wrong_bundle)]) == 1
    judged = json.loads(capsys.readouterr().out)
    assert judged == json.loads((wrong_bundle / "bundle.json").read_text())["verdict_of_kept"]
    # by limits that it keeps it passes, and that is told
    rewritten(wrong_bundle, lambda d: d["limits"][0].update(tolerance={"sqnr_db": -100}))
    assert main(["bundle", "judge", str(wrong_bundle)]) == 0
    assert "judged otherwise by pytest-qnn" in capsys.readouterr().out


def test_run_says_reproduced_different_or_not_reproduced(
    keep: Keep, good_run: Run, wrong_bundle: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    strict = keep(good_run, Tolerance(sqnr_db=90))
    assert main(["bundle", "run", str(strict)]) == 0
    shown = capsys.readouterr().out
    assert "reproduced: the outputs are the same, bit for bit" in shown
    assert "sqnr_db:" in shown
    # a backend that fails again, with another output in one bit
    path = strict / "backend.npz"
    with np.load(path) as stored:
        arrays = {name: stored[name].copy() for name in stored.files}
    next(iter(arrays.values())).reshape(-1).view(np.uint32)[7] ^= 1
    np.savez(path, **arrays)
    import hashlib

    rewritten(strict, lambda d: d["files"]["backend.npz"].update(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    assert main(["bundle", "run", str(strict)]) == 0
    assert "different: it fails again, but the outputs" in capsys.readouterr().out

    assert main(["bundle", "run", "--json", str(wrong_bundle)]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["outcome"] == "not reproduced"
    assert told["outputs_that_differ"] == ["y"]
    assert told["changed"] == []


def test_run_on_another_soc_says_so(keep: Keep, good_run: Run, capsys: Capture) -> None:
    strict = keep(good_run, Tolerance(sqnr_db=90))
    assert main(["bundle", "run", "--json", "--soc", "sm8550", str(strict)]) == 0
    assert "soc: SM8650 -> SM8550" in json.loads(capsys.readouterr().out)["changed"]


def test_a_model_that_moved_is_named_and_checked(
    wrong_bundle: Path, models: Path, tmp_path: Path, capsys: Capture
) -> None:
    def move(description: dict[str, Any]) -> None:
        description["model"].update(file="/nowhere/conv.qdq.onnx", copy=None)

    rewritten(wrong_bundle, move)
    assert main(["bundle", "run", str(wrong_bundle)]) == 2
    assert "--model FILE" in capsys.readouterr().err
    assert main(["bundle", "run", str(wrong_bundle), "--model", str(models / "conv.onnx")]) == 2
    assert "another model: its SHA-256 is" in capsys.readouterr().err
    moved = shutil.copy(models / "conv.qdq.onnx", tmp_path / "moved.onnx")
    assert main(["bundle", "run", str(wrong_bundle), "--model", str(moved)]) == 1
    assert "not reproduced" in capsys.readouterr().out


def test_a_small_model_comes_with_its_bundle(wrong_bundle: Path, capsys: Capture) -> None:
    def move(description: dict[str, Any]) -> None:
        description["model"]["file"] = description["float_model"]["file"] = "/nowhere/model.onnx"

    rewritten(wrong_bundle, move)
    assert main(["bundle", "run", str(wrong_bundle)]) == 1


def test_what_is_not_judged_has_an_exit_code_of_its_own(wrong_bundle: Path, capsys: Capture) -> None:
    """A script that asks "is it fixed?" must not take a missing backend for an answer."""
    rewritten(wrong_bundle, lambda d: d["provenance"].update(backend="gpu"))
    assert main(["bundle", "run", str(wrong_bundle)]) == 2
    assert "nothing was judged: BackendUnavailableError" in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------------------------------


def _truncate(folder: Path) -> None:
    os.truncate(folder / "float.npz", 100)


def _flip(folder: Path) -> None:
    data = bytearray((folder / "backend.npz").read_bytes())
    data[-300] ^= 1
    (folder / "backend.npz").write_bytes(data)


def _edit(folder: Path) -> None:
    text = (folder / "bundle.json").read_text()
    (folder / "bundle.json").write_text(text.replace('"sqnr_db"', '"cosine"', 1))


def _pickle(folder: Path) -> None:
    """An array that would be unpickled, with digests that fit."""
    import hashlib

    path = folder / "inputs.npz"
    with np.load(path) as stored:
        names = stored.files
    np.savez(path, **{name: np.array([{}], dtype=object) for name in names})
    known = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    rewritten(folder, lambda d: d["files"].update({"inputs.npz": known}))


def _bomb(folder: Path) -> None:
    """A small file that unpacks to much more."""
    import hashlib

    path = folder / "inputs.npz"
    with zipfile.ZipFile(path) as stored:
        names = stored.namelist()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, bytes(1 << 20))
    known = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    rewritten(folder, lambda d: d["files"].update({"inputs.npz": known}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "float.npz: damaged or altered: 100 bytes"),
    "one bit": (_flip, "backend.npz: damaged or altered: its SHA-256"),
    "missing": (lambda f: (f / "check.npz").unlink(), "check.npz: missing"),
    "edited": (_edit, "bundle.json: altered since it was written"),
    "half": (lambda f: os.truncate(f / "bundle.json", 500), "bundle.json: damaged: not JSON"),
    "link": (lambda f: ((f / "inputs.npz").unlink(), (f / "inputs.npz").symlink_to("/dev/zero")), "not a regular file"),
    "newer": (lambda f: rewritten(f, lambda d: d.update(schema=2)), "a bundle of version 2"),
    "outside": (lambda f: rewritten(f, lambda d: d["files"].update({"../x": {}})), "names a file '../x'"),
    "copy": (lambda f: rewritten(f, lambda d: d["model"].update(copy="../x.onnx")), "its model is '../x.onnx'"),
    "limits": (lambda f: rewritten(f, lambda d: d.update(limits=[])), "not one limit for each output"),
    "types": (lambda f: rewritten(f, lambda d: d.update(samples=3)), "not as its schema says"),
    "options": (lambda f: rewritten(f, lambda d: d["provenance"]["options"].update(artifact="x.so")), "provenance"),
    "device": (lambda f: rewritten(f, lambda d: d["device_options"].update(artifact="x.so")), "provenance"),
    "pickle": (_pickle, "inputs.npz: not the arrays of this bundle"),
    "bomb": (_bomb, "inputs.npz: compressed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_altered_bundle_is_refused_with_what_is_wrong(
    damage: str, wrong_bundle: Path, capsys: Capture
) -> None:
    harm, text = DAMAGES[damage]
    harm(wrong_bundle)
    for action in ("show", "judge", "run"):
        assert main(["bundle", action, str(wrong_bundle)]) == 2
        assert text in capsys.readouterr().err


def test_a_folder_of_bundles_is_listed_and_damaged_ones_named(keep: Keep, good_run: Run, capsys: Capture) -> None:
    folder = keep(good_run, Tolerance(sqnr_db=90))
    assert main(["bundle", "show", str(folder.parent)]) == 0
    assert "test_it.py::test_it" in capsys.readouterr().out
    (folder / "bundle.json").write_text("{}")
    assert main(["bundle", "show", str(folder.parent)]) == 1
    assert "damaged" in capsys.readouterr().out


def test_what_is_no_bundle_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert main(["bundle", "show", str(tmp_path)]) == 2
    assert "it has no bundle.json" in capsys.readouterr().err
    assert main(["bundle", "show", str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--device=1234", "--soc=SM8350"], "--soc: an attached device has its own"),
        (["--adb-server=127.0.0.1:9"], "--adb-server is for a device: name it with --device"),
        (["--device=1234", "--adb-server=127.0.0.1:9"], "nothing was judged: .*127.0.0.1:9"),
    ],
)
def test_how_a_device_is_chosen_is_checked(options: list[str], text: str, wrong_bundle: Path, capsys: Capture) -> None:
    assert main(["bundle", "run", str(wrong_bundle), *options]) == 2
    assert re.search(text, capsys.readouterr().err)


def test_nodes_on_the_cpu_are_no_answer(keep: Keep, keeping: Bench, tmp_path: Path, capsys: Capture) -> None:
    """What onnxruntime's CPU provider computes passes by itself: "not reproduced" would be wrong."""
    model = small_models.unary(tmp_path / "partly.onnx", "Relu", "Erf", "Relu")
    session = keeping.backend(BackendRequest("htp")).load(model, allow_cpu=["Erf"])
    folder = keep(session.run(seeded_inputs(session, 2)), Tolerance(sqnr_db=300))
    assert main(["bundle", "run", str(folder)]) == 0
    assert "reproduced" in capsys.readouterr().out
    rewritten(folder, lambda d: d.update(allow_cpu=False))
    assert main(["bundle", "run", str(folder)]) == 2
    assert "1 nodes ran on the CPU, the first: n1 (Erf)" in capsys.readouterr().err


def test_an_artifact_that_the_test_gave_is_named_and_never_looked_for(
    keep: Keep, keeping: Bench, models: Path, tmp_path: Path, capsys: Capture
) -> None:
    backend = keeping.backend(BackendRequest("htp"))
    artifact = backend.compile(models / "conv.qdq.onnx", tmp_path / "built")
    session = backend.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx", artifact=artifact)
    folder = keep(session.run(seeded_inputs(session, 2)), Tolerance(sqnr_db=90))
    assert json.loads((folder / "bundle.json").read_text())["commands"]["bundle"].endswith(f" --artifact {artifact}")
    assert main(["bundle", "run", str(folder)]) == 2
    assert f"it lay at {artifact}" in capsys.readouterr().err
    assert main(["bundle", "run", str(folder), "--artifact", str(artifact)]) == 0
    other = backend.compile(models / "conv.onnx", tmp_path / "other")
    assert main(["bundle", "run", str(folder), "--artifact", str(other)]) == 2
