"""Many tests on devices that fail at random: each ends in the right outputs or in an infrastructure error, and nothing is left.

``QNN_SOAK=500 python -m pytest tests/devices/test_soak.py`` runs as many as that.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest

from pytest_qnn.adb.server import start_server
from pytest_qnn.backend import Backend
from pytest_qnn.bench import Bench, CurrentTest
from pytest_qnn.errors import TargetError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.settings import Settings
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.testing.device_runtime import make_device_runtime

TESTS = int(os.environ.get("QNN_SOAK", "24"))
KINDS = [
    "push_drop",
    "push_no_space",
    "push_corrupt",
    "pull_drop",
    "pull_cut",
    "pull_done",
    "pull_corrupt",
    "shell_drop",
    "shell_close",
    "reboot",
]
MOST_SECONDS = 120.0  # for one test, whatever happens: what its deadlines add up to


def server_process(port: int) -> psutil.Process:
    """The ADB server on ``port``."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "adb" in Path(words[0] if words else "").name and str(port) in words:
            return process
    raise AssertionError(f"no ADB server on port {port}")


@pytest.mark.slow
@pytest.mark.parametrize("flavor", ["linux", "android"])
def test_every_test_is_accounted_for_and_none_is_wrong(
    flavor: str,
    tmp_path: Path,
    models: Path,
    htp: Backend,
    monkeypatch: pytest.MonkeyPatch,
    adb_binary: Path,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    here = htp.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    samples = seeded_inputs(here, 4)
    expected = [result["y"] for result in here.run(samples).results]
    chance = random.Random(7)
    ends: Counter[str] = Counter()
    with ExitStack() as life:
        server = life.enter_context(start_server(adb=adb_binary))
        device = life.enter_context(LoopbackDevice(tmp_path / "device", flavor=flavor))
        device.connect(server)
        settings = Settings(
            target="adb",
            device=(f"adb://{device.address}@{server.address}",),
            device_runtime=make_device_runtime(tmp_path / "runtime"),
            cache_dir=tmp_path / "cache",
            recover_timeout=15.0,
            run_timeout=15.0,
            load_timeout=30.0,
        )
        bench = Bench(settings)
        life.callback(bench.close)
        session = None
        for number in range(TESTS):
            bench.enter(CurrentTest(f"test_soak.py::test_{number}"))
            undo = misfortune(chance, device, server.port)
            begun = time.monotonic()
            try:
                if session is None or number % 8 == 0:
                    session = bench.backend(BackendRequest("htp")).load(
                        models / "conv.qdq.onnx", float_model=models / "conv.onnx"
                    )
                results = session.run(samples).results
            except TargetError as error:
                ends[type(error).__name__] += 1
            else:
                for result, wanted in zip(results, expected, strict=True):
                    np.testing.assert_array_equal(result["y"], wanted)
                ends["retried" if bench.test.retries else "passed"] += 1
            finally:
                undo()
                device.faults()
            assert time.monotonic() - begun < MOST_SECONDS, ends
            bench.enter(CurrentTest())
        assert ends.total() == TESTS
        assert ends["passed"] + ends["retried"] >= TESTS // 3, ends
        bench.enter(CurrentTest("test_soak.py::test_healthy_again"))
        assert session is not None
        np.testing.assert_array_equal(session.run(samples).results[0]["y"], expected[0])
        bench.close()
        places = [device.path(place) for place in ("/data/local/tmp", "/var/tmp", "/tmp")]
        assert [folder for place in places for folder in place.glob("pytest-qnn/work/*")] == []
        assert device.processes() == 0


def misfortune(chance: random.Random, device: LoopbackDevice, port: int) -> Callable[[], None]:
    """Something that happens to the next test, or nothing; returns what ends it."""
    drawn = chance.random()
    if drawn < 0.05:  # the server is stopped for a while
        process = server_process(port)
        process.send_signal(signal.SIGSTOP)
        return lambda: process.send_signal(signal.SIGCONT)
    if drawn < 0.1:
        device.reboot(down=0.3)
    elif drawn < 0.5:
        device.faults(random=0.15, seed=chance.randrange(1 << 30), kinds=KINDS)
    return lambda: None
