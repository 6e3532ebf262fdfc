"""A bench that keeps bundles, and bundles of one small model that was made to fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pytest_qnn.assertions import assert_matches_reference
from pytest_qnn.bench import Bench, CurrentTest
from pytest_qnn.errors import AccuracyError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.session import Run, Session
from pytest_qnn.settings import Settings
from pytest_qnn.verdict.tolerance import Tolerance
from tests.conftest import needs_simulator


@pytest.fixture(scope="session")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench with a folder of artifacts."""
    needs_simulator()
    folder = tmp_path_factory.mktemp("keeping")
    bench = Bench(Settings(cache_dir=folder / "cache", artifacts=folder / "kept"))
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def session(keeping: Bench, models: Path) -> Session:
    return keeping.backend(BackendRequest("htp")).load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")


@pytest.fixture(scope="session")
def good_run(session: Session) -> Run:
    """A run that is right."""
    return session.run(seeded_inputs(session, 6))


def corrupted(run: Run, *samples: int) -> Run:
    """The run as if the backend had given zeros for some samples."""
    results = [{n: np.zeros_like(a) for n, a in r.items()} if i in samples else r for i, r in enumerate(run.results)]
    return replace(run, results=tuple(results))


@pytest.fixture
def keep(keeping: Bench, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Let a run fail, and give its bundle, in a folder of this test."""

    def make(run: Run, tolerance: Tolerance | None = None) -> Path:
        keeping.enter(CurrentTest(nodeid="test_it.py::test_it"))
        keeping.settings = replace(keeping.settings, artifacts=tmp_path / "kept")
        with pytest.raises(AccuracyError) as failure:
            assert_matches_reference(run, tolerance)
        assert "bundle: not kept" not in str(failure.value)
        (folder,) = (p for p in (tmp_path / "kept").iterdir() if p.is_dir())
        return folder

    return make


@pytest.fixture
def wrong_bundle(keep: Callable[..., Path], good_run: Run, tmp_path: Path) -> Path:
    """The bundle of outputs that the backend doesn't give any more: two of six samples were zeros."""
    folder = keep(corrupted(good_run, 1, 4))
    return Path(shutil.copytree(folder, tmp_path / "copy"))
