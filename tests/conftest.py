"""What the tests share: small models made once, and one bench for tests that need no pytest run of their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_qnn.backend import Backend
from pytest_qnn.bench import Bench
from pytest_qnn.markers import BackendRequest
from pytest_qnn.settings import Settings
from pytest_qnn.targets.qnn_cpu import CpuLibraryMissing, find_cpu_library
from tests import small_models

SKIPS_ALLOWED = not os.environ.get("CI")


def needs_simulator() -> None:
    """Skip, but not in CI, where the HTP simulator isn't installed."""
    import importlib.util

    if importlib.util.find_spec("onnxruntime_qnn") is None:
        if not SKIPS_ALLOWED:
            pytest.fail("CI must have onnxruntime-qnn")
        pytest.skip("onnxruntime-qnn is not installed (it is for x86-64 Linux only)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped and not SKIPS_ALLOWED:
        terminalreporter.write_line(f"ERROR: {len(skipped)} tests skipped in CI, where none may", red=True)
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``conv.onnx`` and ``conv.qdq.onnx`` (A8W8)."""
    folder = tmp_path_factory.mktemp("models")
    small_models.quantized(small_models.conv(folder / "conv.onnx"), folder / "conv.qdq.onnx")
    return folder


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench with a reference cache of its own."""
    needs_simulator()
    bench = Bench(Settings(cache_dir=tmp_path_factory.mktemp("references")))
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def htp(bench: Bench) -> Backend:
    """The simulated HTP of the default SoC."""
    return bench.backend(BackendRequest("htp"))


@pytest.fixture(scope="session")
def cpu_library() -> Path:
    """QNN's CPU library; skips where it was not fetched, but not in CI."""
    needs_simulator()
    try:
        return find_cpu_library(None).path
    except CpuLibraryMissing as error:
        if not SKIPS_ALLOWED:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cpu(bench: Bench, cpu_library: Path) -> Backend:
    """QNN's CPU backend."""
    return bench.backend(BackendRequest("cpu"))


@pytest.fixture
def project(
    pytester: pytest.Pytester, models: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., pytest.RunResult]:
    """Run a project whose test file has the given text: ``project(text, "-n2", ...)``.

    The folder has the models; the cache is the test's own.
    """
    needs_simulator()
    monkeypatch.setenv("COLUMNS", "200")
    for model in models.glob("*.onnx"):
        shutil.copy(model, pytester.path)

    def run(text: str, *arguments: str) -> pytest.RunResult:
        if text:
            pytester.makepyfile(test_it="import pytest\nfrom pytest_qnn import *\n" + text)
        cache = f"--qnn-cache-dir={pytester.path / 'cache'}"
        return pytester.runpytest_subprocess("-p", "no:cacheprovider", cache, *arguments, timeout=120)

    return run
