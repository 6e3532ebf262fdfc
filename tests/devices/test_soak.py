"""Many tests on devices that fail at random: each ends in the right outputs or in an infrastructure error, and nothing is left.

Every misfortune comes at least once; further tests get one by chance, or none. ``QNN_SOAK=500 python -m pytest -s
tests/devices/test_soak.py`` runs as many as that with each flavour.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
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
from pytest_qnn.runners import device_agent
from pytest_qnn.runners.net_run import invocation
from pytest_qnn.settings import Settings
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.testing.device_runtime import make_device_runtime
from tests.devices.test_agent_device import wait_for

TESTS = max(26, int(os.environ.get("QNN_SOAK", "0")))
PATIENCE = (
    4.0  # with a device that says nothing: less than the runners have, or most of the time would be spent with that
)
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
    monkeypatch.setattr(device_agent, "SLACK_SECONDS", PATIENCE)
    monkeypatch.setattr(invocation, "SHELL_SECONDS", PATIENCE)
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
            recover_timeout=4.0,
            run_timeout=2.0,
            load_timeout=20.0,
        )
        before = processes()
        bench = Bench(settings)
        life.callback(lambda: bench.close())  # of the last one
        session, slowest, fell, struck = None, 0.0, Counter[str](), Counter[str]()
        for number, name in enumerate(fates(chance, TESTS)):
            if name in IN_MID:
                bench.close()
                bench, session = Bench(settings), None
            bench.enter(CurrentTest(f"test_soak.py::test_{number}"))
            undo = MISFORTUNES[name](chance, device, server)
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
            fell[name] += 1
            struck.update(device.struck())
            slowest = max(slowest, time.monotonic() - begun)
            assert time.monotonic() - begun < MOST_SECONDS, (name, ends)
            bench.enter(CurrentTest())
        sys.stdout.write(
            f"{flavor}: {dict(ends)}, the slowest took {slowest:.1f} s; {dict(fell)}; in mid work {dict(struck)}\n"
        )
        assert ends.total() == TESTS
        assert ends["passed"] + ends["retried"] >= TESTS // 3, ends
        assert fell.keys() == MISFORTUNES.keys()
        assert struck.keys() >= {fault for fault in IN_MID if flavor == "android" or not fault.startswith("pull_")}
        bench.close()
        bench = Bench(settings)  # the next session, which finds what the others could not remove
        bench.enter(CurrentTest("test_soak.py::test_healthy_again"))
        session = bench.backend(BackendRequest("htp")).load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
        np.testing.assert_array_equal(session.run(samples).results[0]["y"], expected[0])
        bench.close()
        assert folders(device, "pytest-qnn/work/*") == []
        assert wait_for(lambda: device.processes() == 0), "a program of ours outlives its connection"
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


# --- what happens -----------------------------------------------------------------------------------------------------

Undo = Callable[[], None]
Misfortune = Callable[[random.Random, LoopbackDevice, OneServer], Undo]


def nothing(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Undo:
    return lambda: None


def server_stopped(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Undo:
    """Until the test has ended."""
    process = server.process()
    process.suspend()
    return process.resume


def server_killed(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Undo:
    """And somebody starts another one after a while."""
    server.kill()
    starter = threading.Timer(chance.random(), server.start)
    starter.start()
    return starter.join


def mute(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Undo:
    device.faults(mute=True)
    return lambda: None


def mute_for_a_while(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Undo:
    device.faults(mute=True)
    speaker = threading.Timer(2 * chance.random(), device.faults)
    speaker.start()
    return speaker.join


def offline(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Undo:
    device.faults(offline=True)
    device.drop()
    return lambda: None


def dropped(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Undo:
    device.drop()
    return lambda: None


def reboot(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Undo:
    device.reboot(down=0.3)
    return lambda: None


def by_chance(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Undo:
    """Any of those that end without a deadline, in any request."""
    device.faults(random=0.15, seed=chance.randrange(1 << 30))
    return lambda: None


def programs_killed(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Undo:
    """As a system does that is short of memory."""
    for program in psutil.Process(device.process).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            program.kill()
    return lambda: None


def in_mid(fault: str) -> Misfortune:
    """A fault in the first request of its kind, or in the stream of the agent; in a session of its own, to a device without our
    files: else the agent runs already, and nothing is pushed."""

    def strike(chance: random.Random, device: LoopbackDevice, server: OneServer) -> Undo:
        forget(device)
        only = chance.choice(("", "agent.py")) if fault.startswith("shell_") and device.flavor == "linux" else ""
        device.faults(**{fault: chance.choice((0, 20, 1000))}, only=only, times=1)
        return lambda: None

    return strike


def folders(device: LoopbackDevice, pattern: str) -> list[Path]:
    """What is in our folder on the device, wherever that is."""
    return [path for place in ("data/local/tmp", "var/tmp", "tmp") for path in (device.root / place).glob(pattern)]


def forget(device: LoopbackDevice) -> None:
    """All files that are kept there are gone, as after somebody cleaned up."""
    for path in folders(device, "pytest-qnn/store/*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


IN_MID = ("push_drop", "push_no_space", "push_corrupt", "pull_done", "pull_cut", "shell_drop", "shell_close")
MISFORTUNES: dict[str, Misfortune] = {
    "nothing": nothing,
    "by_chance": by_chance,
    "reboot": reboot,
    "server_stopped": server_stopped,
    "server_killed": server_killed,
    "mute": mute,
    "mute_for_a_while": mute_for_a_while,
    "offline": offline,
    "dropped": dropped,
    "programs_killed": programs_killed,
    **{fault: in_mid(fault) for fault in IN_MID},
}
WEIGHTS = {"nothing": 12, "by_chance": 12, "reboot": 2}


def fates(chance: random.Random, count: int) -> list[str]:
    """What happens to each of ``count`` tests: everything once, then by chance. Faults in mid work come first, for a device that
    isn't back yet has no work for them."""
    rest = [name for name in MISFORTUNES if name not in ("nothing", *IN_MID)]
    once = ["nothing", *chance.sample(IN_MID, len(IN_MID)), *chance.sample(rest, len(rest))]
    weights = [WEIGHTS.get(name, 1) for name in MISFORTUNES]
    return once + chance.choices(list(MISFORTUNES), weights, k=count - len(once))
