"""Many tests on devices that fail at random: each ends in the right outputs or in an infrastructure error, and nothing is left.

``QNN_SOAK=500 python -m pytest tests/devices/test_soak.py`` runs as many as that.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
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
MOST_SECONDS = 90.0  # for one test, whatever happens: what its deadlines add up to


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
    (tmp_path / "folders").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "folders"))
    here = htp.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    samples = seeded_inputs(here, 2)
    expected = [result["y"] for result in here.run(samples).results]
    chance = random.Random(7)
    ends: Counter[str] = Counter()
    with ExitStack() as life:
        server = OneServer(adb_binary)
        life.callback(server.close)
        device = life.enter_context(LoopbackDevice(tmp_path / "device", flavor=flavor))
        device.connect(server.address)
        settings = Settings(
            target="adb",
            device=(f"adb://{device.address}@{server.address.address}",),
            device_runtime=make_device_runtime(tmp_path / "runtime"),
            cache_dir=tmp_path / "cache",
            recover_timeout=6.0,
            run_timeout=2.0,
            load_timeout=20.0,
        )
        before = processes()
        bench = Bench(settings)
        life.callback(bench.close)
        session, slowest = None, 0.0
        for number in range(TESTS):
            bench.enter(CurrentTest(f"test_soak.py::test_{number}"))
            undo = misfortune(chance, device, server)
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
            slowest = max(slowest, time.monotonic() - begun)
            assert time.monotonic() - begun < MOST_SECONDS, ends
            bench.enter(CurrentTest())
        sys.stdout.write(f"{flavor}: {dict(ends)}, the slowest took {slowest:.1f} s\n")
        assert ends.total() == TESTS
        assert ends["passed"] + ends["retried"] >= TESTS // 3, ends
        bench.enter(CurrentTest("test_soak.py::test_healthy_again"))
        assert session is not None
        np.testing.assert_array_equal(session.run(samples).results[0]["y"], expected[0])
        bench.close()
        places = [device.path(place) for place in ("/data/local/tmp", "/var/tmp", "/tmp")]
        assert [folder for place in places for folder in place.glob("pytest-qnn/work/*")] == []
        assert device.processes() == 0
        assert processes() - before - server.processes() == set()
        assert not list((tmp_path / "state").rglob("*.json")), "a lease's note"
        assert [f.name for f in (tmp_path / "folders").iterdir() if not f.name.startswith("qnn-adb-")] == []


def processes() -> set[int]:
    """Processes that this one started, and theirs; not those that have ended, of which a loopback device takes leave later."""
    found = psutil.Process().children(recursive=True)
    return {process.pid for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}


class OneServer:
    """An ADB server that can be killed and started again at the same port."""

    def __init__(self, adb: Path) -> None:
        self.adb, self._life = adb, ExitStack()
        self.address = self._life.enter_context(start_server(adb=adb))

    def process(self) -> psutil.Process:
        """The server's own."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "adb" in Path(words[0] if words else "").name and str(self.address.port) in words:
                return process
        raise AssertionError(f"no ADB server on port {self.address.port}")

    def processes(self) -> set[int]:
        """All that belong to it: what watches over it, too."""
        watch = self.process().parent()
        assert watch
        return {
            watch.pid,
            *(process.pid for process in watch.children(recursive=True)),
            *(p.pid for p in watch.parents()),
        }

    def kill(self) -> None:
        """As kill -9 does."""
        process = self.process()
        process.kill()
        self._life.close()

    def start(self) -> None:
        """Anew, after :meth:`kill`."""
        self._life.enter_context(start_server(self.address.port, self.adb))

    def close(self) -> None:
        """Let it end."""
        self._life.close()


def misfortune(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Callable[[], None]:
    """Something that happens to the next test, or nothing; returns what ends it."""
    drawn = chance.random()
    if drawn < 0.04:  # the server is stopped until the test has ended
        process = server.process()
        process.suspend()
        return process.resume
    if drawn < 0.08:  # the server is killed, and somebody starts another one after a while
        server.kill()
        starter = threading.Timer(chance.random(), server.start)
        starter.start()
        return starter.join
    if drawn < 0.12:
        device.faults(mute=True)
    elif drawn < 0.16:  # mute for a while only
        device.faults(mute=True)
        speaker = threading.Timer(2 * chance.random(), device.faults)
        speaker.start()
        return speaker.join
    elif drawn < 0.2:
        device.faults(offline=True)
        device.drop()
    elif drawn < 0.26:
        device.reboot(down=0.3)
    elif drawn < 0.6:
        device.faults(random=0.15, seed=chance.randrange(1 << 30), kinds=KINDS)
    return lambda: None
