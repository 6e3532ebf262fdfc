"""Quantising through the plugin against bare onnxruntime.quantization on the same data: time, and peak memory.

Run: ``python -m benchmarks.quantizing``. Each variant runs in a process of its own (that is how its peak memory is its own),
plugin and bare one by turns; the ratio is of the medians. The time is that of quantising alone, imports are done before. Data
is made sample by sample, the same for both, so that what grows with the number of samples is the quantiser's doing.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SIZE, LAYERS, BINS = 96, 12, 128
ROUNDS = 7
CASES = (("minmax", 64), ("minmax", 512), ("percentile", 8), ("percentile", 64), ("entropy", 8), ("entropy", 64))


def samples(count: int) -> Iterator[dict[str, Any]]:
    """Inputs for the benchmark's model, one at a time."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"x": rng.standard_normal((1, 16, SIZE, SIZE), dtype=np.float32)}


def bare(model: Path, target: Path, method: str, count: int) -> None:
    """As onnxruntime's documentation has it."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config, qnn_preprocess_model

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = samples(count)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rest, None)

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    prepared = target.with_name("prepared.onnx")
    start = prepared if qnn_preprocess_model(model, prepared) else model
    quantize(start, target, get_qnn_qdq_config(start, Reader(), methods[method]))


def through_plugin(model: Path, target: Path, method: str, count: int) -> None:
    """The same with pytest-qnn, with as many bins as onnxruntime takes."""
    from pytest_qnn.model import quantize

    quantize(model, samples(count), target, method=method, bins=BINS if method == "entropy" else None)


def child(which: str, model: str, target: str, method: str, count: str) -> None:
    """One measurement, printed as JSON: seconds, and peak memory of the whole process in MiB."""
    import onnxruntime.quantization.execution_providers.qnn  # noqa: F401

    if which == "plugin":
        import pytest_qnn.quantization.quantize
        import pytest_qnn.quantization.ranges  # noqa: F401
    act = through_plugin if which == "plugin" else bare
    start = time.perf_counter()
    act(Path(model), Path(target), method, int(count))
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def measure(which: str, model: Path, method: str, count: int) -> tuple[float, float]:
    """Seconds and MiB of one variant, in a process of its own."""
    target = model.with_name(f"{which}.onnx")
    command = [sys.executable, "-m", "benchmarks.quantizing", which, str(model), str(target), method, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, mib = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds, mib


def main() -> None:
    """Print the ratios."""
    from benchmarks.isolation import conv_net

    with tempfile.TemporaryDirectory() as name:
        model = conv_net(Path(name, "net.onnx"), SIZE, LAYERS)
        for method, count in CASES:
            pairs = [
                (measure("plugin", model, method, count), measure("bare", model, method, count)) for _ in range(ROUNDS)
            ]
            ours, theirs = (
                [statistics.median(values) for values in zip(*side, strict=True)] for side in zip(*pairs, strict=True)
            )
            best = [min(seconds for seconds, _ in side) for side in zip(*pairs, strict=True)]
            print(
                f"{method}, {count} samples: plugin {ours[0]:.2f} s, bare {theirs[0]:.2f} s, ratio {ours[0] / theirs[0]:.3f} "
                f"(best by best {best[0] / best[1]:.3f}); peak memory {ours[1]:.0f} MiB, bare {theirs[1]:.0f} MiB"
            )


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) > 1 else main()
