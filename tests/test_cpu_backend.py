"""Finding, fetching and using QNN's CPU library."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from pytest_qnn import TargetError, assert_fully_offloaded, assert_matches_reference
from pytest_qnn.backend import Backend
from pytest_qnn.bench import Bench
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.settings import Settings
from pytest_qnn.targets import qnn_cpu
from pytest_qnn.targets.qnn_cpu import LIBRARY, CpuLibraryMissing, find_cpu_library


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No SDK, no library in the wheel, an empty cache."""
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(qnn_cpu.util, "find_spec", lambda name: None)
    return tmp_path


def library_in(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LIBRARY).write_bytes(b"library")
    return folder / LIBRARY


def test_the_order_in_which_the_library_is_looked_for(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CpuLibraryMissing, match="run 'pytest-qnn fetch cpu-backend'"):
        find_cpu_library(None)
    cached = library_in(qnn_cpu.cache_folder() / "onnxruntime_qnn")
    monkeypatch.setattr(qnn_cpu, "LIBRARY_SHA256", qnn_cpu._sha256(cached))
    assert find_cpu_library(None).path == cached

    wheel = library_in(nowhere / "site" / "onnxruntime_qnn")

    class Spec:
        submodule_search_locations = (str(wheel.parent),)

    monkeypatch.setattr(qnn_cpu.util, "find_spec", lambda name: Spec)
    assert find_cpu_library(None) == qnn_cpu.CpuLibrary(wheel, "installed wheel")

    sdk = library_in(nowhere / "sdk" / "lib" / "x86_64-linux-clang")
    monkeypatch.setenv("QNN_SDK_ROOT", str(nowhere / "sdk"))
    assert find_cpu_library(None) == qnn_cpu.CpuLibrary(sdk, "QNN_SDK_ROOT")

    own = library_in(nowhere / "own")
    assert find_cpu_library(own) == qnn_cpu.CpuLibrary(own, "configured")
    assert find_cpu_library(own.parent).path == own


def test_a_configured_library_that_is_missing_is_not_replaced_by_another(nowhere: Path) -> None:
    library_in(qnn_cpu.cache_folder() / "onnxruntime_qnn")
    with pytest.raises(CpuLibraryMissing, match=r"configured cpu_library .*gone.so doesn't exist"):
        find_cpu_library(nowhere / "gone.so")


def test_an_altered_library_in_the_cache_is_not_used(nowhere: Path) -> None:
    library_in(qnn_cpu.cache_folder() / "onnxruntime_qnn")
    with pytest.raises(CpuLibraryMissing, match="was altered: run 'pytest-qnn fetch cpu-backend --force'"):
        find_cpu_library(None)


def test_fetching_unpacks_what_is_needed_and_nothing_else(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("onnxruntime_qnn/libQnnCpu.so", "onnxruntime_qnn/libQnnHtp.so", "onnxruntime_qnn.libs/libc++.so"):
            archive.writestr(name, name)
    downloads = []

    def download(work: Path) -> Path:
        downloads.append(work)
        return Path(shutil.copy(wheel, work))

    monkeypatch.setattr(qnn_cpu, "_download", download)
    library = qnn_cpu.fetch_cpu_library()
    monkeypatch.setattr(qnn_cpu, "LIBRARY_SHA256", qnn_cpu._sha256(library))
    files = {str(f.relative_to(qnn_cpu.cache_folder())) for f in qnn_cpu.cache_folder().rglob("*") if f.is_file()}
    assert files == {"onnxruntime_qnn/libQnnCpu.so", "onnxruntime_qnn.libs/libc++.so"}
    assert qnn_cpu.fetch_cpu_library() == library
    assert len(downloads) == 1, "what is there and intact isn't fetched again"
    library.write_bytes(b"altered")
    qnn_cpu.fetch_cpu_library()
    assert len(downloads) == 2
    assert not list(qnn_cpu.cache_folder().parent.glob("fetch-*")), "no temporary folder stays"


def test_a_failing_download_says_why_and_leaves_nothing(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qnn_cpu, "WHEEL_VERSION", "0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        TargetError, match="pip could not download onnxruntime-qnn 0.0.0: ERROR: Could not find a version"
    ):
        qnn_cpu.fetch_cpu_library()
    assert not qnn_cpu.cache_folder().exists()


def test_a_float_model_runs_wholly_on_it_in_float32(cpu: Backend, models: Path) -> None:
    session = cpu.load(models / "conv.onnx")
    verdict = assert_matches_reference(session.run(seeded_inputs(session)))
    assert (session.precision, assert_fully_offloaded(session).misplaced) == ("float32", ())
    assert verdict.outputs[0].figures["sqnr_db"] > 100  # type: ignore[operator]


def test_a_quantized_model_runs_as_its_float_model_and_every_record_says_so(cpu: Backend, models: Path) -> None:
    session = cpu.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    assert session.executed.path == models / "conv.onnx"
    assert session.provenance["executed"] == "float_model"
    assert session.provenance["notes"] == [
        "QNN cpu computes in float only: the float model ran in place of the QDQ model"
    ]


def test_a_missing_library_is_a_skip_that_says_how_to_get_it(tmp_path: Path) -> None:
    bench = Bench(Settings(cpu_library=tmp_path / "gone.so", cache_dir=tmp_path))
    try:
        with pytest.raises(TargetError, match="backend 'cpu' is not available: the configured cpu_library"):
            bench.backend(BackendRequest("cpu"))
    finally:
        bench.close()
