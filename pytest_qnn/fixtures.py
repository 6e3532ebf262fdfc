"""The fixtures that a test sees. Heavy imports happen inside, on first use."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_qnn.backend import Backend
    from pytest_qnn.bench import Bench
    from pytest_qnn.runners.reference import Reference
    from pytest_qnn.targets.target import Target

bench_key: pytest.StashKey[Bench] = pytest.StashKey()
item_key: pytest.StashKey[pytest.Item | None] = pytest.StashKey()  # the test that is running


def open_bench(config: pytest.Config) -> Bench:
    """The bench of this pytest process, made on first use."""
    if bench_key not in config.stash:
        from pytest_qnn.bench import Bench
        from pytest_qnn.plugin import project_settings

        config.stash[bench_key] = Bench(project_settings(config), config.rootpath)
        if config.stash.get(item_key, None) is not None:
            begin(config)
    return config.stash[bench_key]


def begin(config: pytest.Config) -> None:
    """Tell the bench, where there is one, which test is running; none between tests."""
    bench, item = config.stash.get(bench_key, None), config.stash.get(item_key, None)
    if bench is None:
        return
    if item is None:
        from pytest_qnn.bench import CurrentTest

        bench.enter(CurrentTest())
    else:
        from pytest_qnn.records.collector import begin_test

        begin_test(item, bench)


def close_bench(config: pytest.Config) -> str:
    """End what the bench started; harmless without one. Returns what went wrong, or an empty text."""
    bench = config.stash.get(bench_key, None)
    if bench is None:
        return ""
    from pytest_qnn.errors import TargetError

    del config.stash[bench_key]
    try:
        bench.close()
    except TargetError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def qnn_backend(request: pytest.FixtureRequest) -> Backend:
    """A QNN backend to load models on: the one that the ``backend`` mark names, else the project's ``backends``.

    Skips if the backend isn't there, saying what is missing; ``--qnn-require`` makes that an error.
    """
    from pytest_qnn.errors import BackendUnavailableError
    from pytest_qnn.markers import BackendRequest

    bench = open_bench(request.config)
    wanted = getattr(request, "param", None)
    if wanted is None:  # asked for with getfixturevalue: nothing could be parametrised
        wanted = BackendRequest(bench.settings.backends[0])
    missing, backend = "", None
    try:
        backend = bench.backend(wanted)
    except BackendUnavailableError as error:
        if wanted.name in bench.settings.require:
            raise
        missing = str(error)
    if backend is None:  # not inside the handler: a skip that carries an infrastructure error would be taken for one
        pytest.skip(missing)
    return backend


@pytest.fixture(scope="session")
def qnn_target(request: pytest.FixtureRequest) -> Target:
    """The target that this process holds."""
    return open_bench(request.config).target


@pytest.fixture(scope="session")
def onnx_reference(request: pytest.FixtureRequest) -> Callable[..., Reference]:
    """``onnx_reference(model, dimensions=None)``: the model's onnxruntime CPU reference, whose ``run(inputs)`` gives outputs."""
    return open_bench(request.config).reference


@pytest.fixture(scope="session")
def qnn_inputs(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """``qnn_inputs(model, count=4, seed=0, dimensions=None)``: seeded inputs of the model's shapes, types and encodings."""
    from pytest_qnn.model.inputs import seeded_inputs

    bench = open_bench(request.config)

    def make(model: Any, *arguments: Any, **named: Any) -> list[Any]:
        known = hasattr(model, "inputs") or not isinstance(model, str | os.PathLike)
        return seeded_inputs(model if known else bench.locate(model), *arguments, **named)

    return make
