"""100 inputs of 1 MiB through qnn-net-run on a loopback phone, against the usual script.

The script makes a fresh workspace, pushes each file of the runtime, the model and the input with a call of its own, runs
qnn-net-run for each input, and pulls each output, as scripts around ``adb`` do. Both use the same server, device and stand-in
of qnn-net-run, whose own time (a process start and a load into the simulator) is spent once or 100 times. The script is timed
over fewer inputs and extrapolated: each of its turns costs the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from benchmarks.isolation import save
from pytest_qnn.adb.server import start_server
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.artifacts.binary import read_context_binary
from pytest_qnn.artifacts.matching import match_tensors
from pytest_qnn.bench import Bench
from pytest_qnn.devices.attached import AttachedDevice
from pytest_qnn.devices.facts import probe
from pytest_qnn.devices.lease import DeviceLease
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.runners.net_run.command import Executable, runtime_for
from pytest_qnn.runners.net_run.model import NetRunModel
from pytest_qnn.runners.process import Limits
from pytest_qnn.settings import Settings
from pytest_qnn.targets.target import Plan
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.testing.device_runtime import make_device_runtime

COUNT, SCRIPTED = 100, 10
SHAPE = [1, 16, 128, 128]  # float32: 1 MiB
FLAT = [1, 1 << 18]
FOLDER = "/data/local/tmp/script"


def script(
    adb: Callable[..., None], runtime: Sequence[Path], binary: Path, samples: Sequence[Any], work: Path
) -> list[Any]:
    """What people do by hand; returns the outputs."""
    adb("shell", f"rm -rf {FOLDER}; mkdir -p {FOLDER}")
    for file in (*runtime, binary):
        adb("push", file, f"{FOLDER}/{file.name}")
    outputs = []
    for number, sample in enumerate(samples):
        raw = work / f"input_{number}.raw"
        sample["x"].tofile(raw)
        (work / "input_list.txt").write_text(f"{FOLDER}/{raw.name}\n")
        adb("push", raw, f"{FOLDER}/{raw.name}")
        adb("push", work / "input_list.txt", f"{FOLDER}/input_list.txt")
        adb(
            "shell",
            f"cd {FOLDER} && rm -rf output && LD_LIBRARY_PATH={FOLDER} ADSP_LIBRARY_PATH={FOLDER} ./qnn-net-run "
            f"--backend libQnnHtp.so --retrieve_context {binary.name} --input_list input_list.txt "
            "--use_native_input_files --use_native_output_files",
        )
        result = work / f"output_{number}.raw"
        adb("pull", f"{FOLDER}/output/Result_0/y.raw", result)
        outputs.append(np.fromfile(result, np.float32).reshape(FLAT))
    return outputs


def main() -> None:
    """Print the ratio."""
    import adbutils

    program = Path(adbutils.__file__).parent / "binaries" / "adb"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx_file = save(
            folder
            / "reshape.onnx",  # what computes least, so that the rest shows; the simulator still takes 50 ms for it
            [helper.make_node("Reshape", ["x", "shape"], ["y"], name="reshape")],
            {"x": SHAPE},
            {"y": FLAT},
            [numpy_helper.from_array(np.array(FLAT), "shape")],
        )
        bench = Bench(Settings(cache_dir=folder / "cache"))
        try:
            bench.backend(BackendRequest("htp")).compile(onnx_file, folder / "out")
        finally:
            bench.close()
        binary = next((folder / "out").glob("*.bin"))
        sdk = make_device_runtime(folder / "sdk")
        rng = np.random.default_rng(0)
        samples = [{"x": rng.normal(size=SHAPE).astype(np.float32)} for _ in range(COUNT)]
        with start_server(adb=program) as server, LoopbackDevice(folder / "phone") as phone:
            phone.connect(server)
            environment = {**os.environ, "ANDROID_ADB_SERVER_PORT": str(server.port), "ANDROID_SERIAL": phone.address}

            def adb(*words: object) -> None:
                subprocess.run([program, *map(str, words)], env=environment, check=True, capture_output=True)

            transport = AdbTransport(server, phone.address)
            facts = probe(transport)
            lease = DeviceLease(facts.serial, facts.address)
            device = AttachedDevice(transport, facts, lease, limit_mib=512, wait_seconds=5, recover_seconds=5)
            plan = Plan("htp", "adb", "", (), soc=facts.soc, runner="net_run")
            match = match_tensors(read_context_binary(binary), read_model(onnx_file))
            executable = Executable.of(binary)
            runtime = runtime_for(facts, plan, executable, match.graph.name, sdk)
            start = time.perf_counter()
            model = NetRunModel(device, executable, match, runtime, plan, "reshape", Limits(60, 60, 4096))
            ours = model.run_many(samples)
            together = time.perf_counter() - start
            work = folder / "work"
            work.mkdir()
            count = int(os.environ.get("SCRIPTED", SCRIPTED))
            start = time.perf_counter()
            theirs = script(adb, list(runtime.local.values()), binary, samples[:count], work)
            by_script = (time.perf_counter() - start) * COUNT / count
            for a, b in zip(ours, theirs, strict=False):
                assert np.array_equal(a.outputs["y"], b)
            device.close()
    extrapolated = f", extrapolated from {count}" if count < COUNT else ""
    print(f"{COUNT} inputs of 1 MiB: one run {together:.1f} s; script {by_script:.1f} s{extrapolated}")
    print(f"ratio {by_script / together:.1f} (goal: at least 5)")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
