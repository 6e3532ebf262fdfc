"""What a process of its own costs: runs through the plugin's runtime process against bare onnxruntime in this process.

Each round times both, one call after the other, so that both see the same host; medians of many rounds are compared.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn.bench import Bench
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.settings import Settings

MIB = 1 << 20


def conv_net(path: Path, size: int, layers: int) -> Path:
    """``layers`` convolutions on [1, 16, size, size]."""
    rng = np.random.default_rng(0)
    shape = [1, 16, size, size]
    names = ["x", *(f"t{i}" for i in range(layers - 1)), "y"]
    nodes = [
        helper.make_node("Conv", [names[i], f"w{i}"], [names[i + 1]], name=f"conv{i}", pads=[1] * 4)
        for i in range(layers)
    ]
    weights = [
        numpy_helper.from_array((0.1 * rng.normal(size=(16, 16, 3, 3))).astype(np.float32), f"w{i}")
        for i in range(layers)
    ]
    return save(path, nodes, {"x": shape}, {"y": shape}, weights)


def save(path: Path, nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], constants: list[Any]) -> Path:
    """Write a float32 model."""

    def infos(tensors: dict[str, Any]) -> list[Any]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in tensors.items()]

    graph = helper.make_graph(nodes, path.stem, infos(inputs), infos(outputs), constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def in_process(model: Path) -> Callable[[dict[str, Any]], Any]:
    """Bare onnxruntime with the QNN execution provider, in this process."""
    import onnxruntime as ort
    import onnxruntime_qnn

    if not any(d.ep_name == "QNNExecutionProvider" for d in ort.get_ep_devices()):
        ort.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == "QNNExecutionProvider"]
    options = ort.SessionOptions()
    options.add_provider_for_devices(devices, {"backend_type": "htp", "soc_model": "57"})
    session = ort.InferenceSession(str(model), options)
    session.disable_fallback()
    return lambda feed: session.run(None, feed)


def compare(bench: Bench, model: Path, rounds: int) -> tuple[float, float]:
    """Median ms of one run: bare, and through the runtime process."""
    bare = in_process(model)
    session = bench.backend(BackendRequest("htp")).load(model)
    (sample,) = seeded_inputs(session, 1)
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 3):
        for which, call in enumerate((bare, session.run)):
            start = time.perf_counter()
            call(sample)
            if i >= 3:
                times[which].append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def transfer(bench: Bench, folder: Path) -> tuple[float, float]:
    """GiB/s of a 64 MiB tensor on its way into the process, and out of it: time of a call without the run inside."""
    n = 64 * MIB // 4
    top = save(
        folder / "in.onnx",
        [helper.make_node("Slice", ["x", "zero", "one"], ["y"], name="slice")],
        {"x": [n]},
        {"y": [1]},
        [numpy_helper.from_array(np.array([i]), name) for i, name in enumerate(("zero", "one"))],
    )
    out = save(
        folder / "out.onnx",
        [helper.make_node("Expand", ["x", "shape"], ["y"], name="expand")],
        {"x": [1]},
        {"y": [n]},
        [numpy_helper.from_array(np.array([n]), "shape")],
    )
    speeds = []
    for model, sample in ((top, np.ones(n, np.float32)), (out, np.ones(1, np.float32))):
        from pytest_qnn.runners.ort import CPU, LoadedModel, LoadRequest

        loaded = LoadedModel(bench.pool, LoadRequest(str(model), (), "reference", CPU), model.name, bench.limits)
        spent = []
        for _ in range(12):
            start = time.perf_counter()
            _, inside = loaded.run({"x": sample})
            spent.append(time.perf_counter() - start - inside)
        speeds.append(64 / 1024 / statistics.median(spent[2:]))
    return speeds[0], speeds[1]


def main() -> None:
    """Print the ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(Settings(cache_dir=folder))
        try:
            for text, model, rounds in (
                ("tiny model", conv_net(folder / "tiny.onnx", 4, 1), 300),
                ("20 ms model", conv_net(folder / "medium.onnx", 40, 3), 60),
            ):
                bare, isolated = compare(bench, model, rounds)
                print(
                    f"{text}: in-process {bare:.2f} ms, isolated {isolated:.2f} ms, "
                    f"ratio {isolated / bare:.3f}, difference {isolated - bare:+.2f} ms"
                )
            into, out = transfer(bench, folder)
            print(f"64 MiB tensor: {into:.2f} GiB/s in, {out:.2f} GiB/s out")
        finally:
            bench.close()


if __name__ == "__main__":
    main()
