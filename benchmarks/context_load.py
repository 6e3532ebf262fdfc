"""What checking and caching cost: a compiled model out of the plugin's cache against bare onnxruntime loading the same one.

Both where QNN is loaded already; each round does both, so that both see the same host. The plugin's time is all of
``Backend.load``: the model's digest, the cache's checksums, the load in the runtime process, placement.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from benchmarks.isolation import save
from pytest_qnn.artifacts.cache_folder import CacheFolder
from pytest_qnn.bench import Bench
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model import onnx_file
from pytest_qnn.settings import Settings

ROUNDS = 15


def wide_net(path: Path, mebibytes: int) -> Path:
    """Matrix products whose float weights have about ``mebibytes``."""
    size, rng = 1024, np.random.default_rng(0)
    layers = max(1, mebibytes * 2**20 // (4 * size * size))
    names = ["x", *(f"t{i}" for i in range(layers - 1)), "y"]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], name=f"m{i}") for i in range(layers)]
    weights = [
        numpy_helper.from_array((rng.normal(size=(size, size)) / 32).astype(np.float32), f"w{i}") for i in range(layers)
    ]
    return save(path, nodes, {"x": [1, size]}, {"y": [1, size]}, weights)


def bare(wrapper: Path) -> Any:
    """Bare onnxruntime, in this process."""
    import onnxruntime as ort
    import onnxruntime_qnn

    if not any(d.ep_name == "QNNExecutionProvider" for d in ort.get_ep_devices()):
        ort.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == "QNNExecutionProvider"]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_provider_for_devices(devices[:1], {"backend_type": "htp", "soc_model": "57"})
    return ort.InferenceSession(str(wrapper), options)


def main() -> None:
    """Print a row per size."""
    for mebibytes in (1, 24, 96):
        with tempfile.TemporaryDirectory() as folder:
            model = wide_net(Path(folder, "net.onnx"), mebibytes)
            settings = Settings(cache_dir=Path(folder, "cache"))
            first = Bench(settings)
            start = time.perf_counter()
            first.backend(BackendRequest("htp")).load(model)
            cold = 1e3 * (time.perf_counter() - start)
            first.close()
            (entry,) = [e for e in CacheFolder(settings.cache_dir, 1).contexts.entries() if e.size > 2**19]
            wrapper = entry.path / "model.ctx.onnx"
            bench = Bench(settings)
            backend = bench.backend(BackendRequest("htp"))
            backend.load(model)  # starts the process, probes the precision
            for fresh in (True, False):
                times: tuple[list[float], list[float]] = ([], [])
                for i in range(ROUNDS + 2):
                    for which in (0, 1):
                        start = time.perf_counter()
                        if which:
                            if fresh:  # as a new process would
                                onnx_file._digests.clear()
                                onnx_file._models.clear()
                            session = backend.load(model, load_timeout=100.0 + i)  # another limit: not the loaded one
                        else:
                            session = bare(wrapper)
                        spent = 1e3 * (time.perf_counter() - start)
                        if i >= 2:
                            times[which].append(spent)
                        if which:
                            session.close()
                        del session
                plain, ours = (statistics.median(t) for t in times)
                print(
                    f"context of {entry.size / 2**20:.0f} MiB, {'first' if fresh else 'later'} load in a process: bare "
                    f"{plain:.1f} ms, plugin {ours:.1f} ms: {ours - plain:+.1f} ms (compiling: {cold:.0f} ms)"
                )
            bench.close()
