"""What an inference through the agent on a device costs beyond the runner's own time: a loopback device behind a real ADB server.

The runner's own time is what onnxruntime on the device took inside ``run``, told with each answer: both are of the same call.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.isolation import conv_net
from pytest_qnn.adb.server import start_server
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.devices.attached import AttachedDevice
from pytest_qnn.devices.facts import probe
from pytest_qnn.devices.lease import DeviceLease
from pytest_qnn.runners.device_agent import DeviceAgents
from pytest_qnn.runners.device_ort import DeviceOrtModel
from pytest_qnn.runners.device_python import device_provider_options
from pytest_qnn.runners.ort import CPU, QNN, LoadRequest
from pytest_qnn.runners.process import Limits
from pytest_qnn.testing import LoopbackDevice

GOAL_MS = 10


def measure(
    model: DeviceOrtModel, transport: AdbTransport, shape: list[int], rounds: int
) -> tuple[float, float, float]:
    """Medians over ``rounds`` calls (ms): the runner's own time, the whole call's beyond it, and what the line alone takes for as
    many bytes there and, when all have arrived, back again."""
    sample = {"x": np.ones(shape, np.float32)}
    data, size = sample["x"].tobytes(), sample["x"].nbytes
    line = transport.start(
        ["sh", "-c", f"while [ $(head -c {size} | wc -c) = {size} ]; do head -c {size} /dev/zero; done"], timeout=10
    )
    own, beyond, alone = [], [], []
    for i in range(rounds + 3):
        start = time.perf_counter()
        line.write(data, timeout=10)
        line.read(size, timeout=10)
        alone.append(1e3 * (time.perf_counter() - start))
        start = time.perf_counter()
        (ran,) = model.run_many([sample])
        spent = time.perf_counter() - start
        if i >= 3:
            own.append(1e3 * ran.seconds)
            beyond.append(1e3 * (spent - ran.seconds))
    line.close()
    return statistics.median(own), statistics.median(beyond), statistics.median(alone[3:])


def together(model: DeviceOrtModel, shape: list[int], count: int) -> float:
    """The whole time over the runner's own, of ``count`` samples that go together."""
    samples = [{"x": np.full(shape, i, np.float32)} for i in range(count)]
    start = time.perf_counter()
    answers = model.run_many(samples)
    return (time.perf_counter() - start) / sum(ran.seconds for ran in answers)


def main() -> None:
    """Print times, and the difference that is to be at most 10 ms."""
    with (
        tempfile.TemporaryDirectory() as name,
        start_server() as server,
        LoopbackDevice(Path(name, "device"), flavor="linux") as device,
    ):
        device.connect(server)
        transport = AdbTransport(server, device.address)
        facts = probe(transport)
        attached = AttachedDevice(
            transport,
            facts,
            DeviceLease(transport.serial, transport.address),
            limit_mib=1000,
            wait_seconds=10,
            recover_seconds=10,
        )
        agents = DeviceAgents(attached)
        htp = tuple(device_provider_options(facts, "htp", {}).items())
        try:
            start = time.perf_counter()
            agents.versions()
            print(f"start of the agent: {time.perf_counter() - start:.2f} s")
            for size, layers, rounds, provider in ((4, 1, 200, QNN), (40, 3, 40, QNN), (128, 1, 40, CPU)):
                shape = [1, 16, size, size]
                file = conv_net(Path(name, f"{size}.onnx"), size, layers)
                request = LoadRequest(str(file), (), provider, provider, htp if provider == QNN else ())
                start = time.perf_counter()
                model = DeviceOrtModel(agents, request, file.name, Limits(60, 60, 8192))
                loading = time.perf_counter() - start
                own, beyond, alone = measure(model, transport, shape, rounds)
                print(
                    f"{'HTP simulator' if provider == QNN else 'onnxruntime CPU'}, {4 * size * size * 16 / 1024:.0f} KiB each way: "
                    f"runner {own:.2f} ms, round trip {beyond:+.2f} ms ({'within' if beyond <= GOAL_MS else 'BEYOND'} {GOAL_MS} ms; the "
                    f"line alone {alone:.2f} ms), "
                    f"{rounds} together {together(model, shape, rounds):.2f} times the runner's own, load {loading:.2f} s"
                )
        finally:
            agents.close()
            attached.close()


if __name__ == "__main__":
    main()
