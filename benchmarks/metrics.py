"""How fast all metrics of an output are, against one numpy.testing.assert_allclose on the same arrays.

Run: ``OPENBLAS_NUM_THREADS=1 python -m benchmarks.metrics``. Medians of interleaved repeats; memory by tracemalloc, which numpy
reports its arrays to.
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from pytest_qnn.verdict.metrics import Evidence

ELEMENTS = 16_000_000
SHAPES = ((ELEMENTS,), (1, 64, 500, 500), (1, 500, 500, 64))
REPEATS = 9


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call, in s."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak_mib(action: Callable[[], object]) -> float:
    """Largest memory that one call allocates, in MiB."""
    tracemalloc.start()
    action()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def main() -> None:
    """Print times, their ratio and memory for each shape."""
    rng = np.random.default_rng(0)
    flat_q = rng.standard_normal(ELEMENTS, dtype=np.float32)
    flat_y = flat_q + np.float32(0.01) * rng.standard_normal(ELEMENTS, dtype=np.float32)
    for shape in SHAPES:
        q, y = flat_q.reshape(shape), flat_y.reshape(shape)

        def metrics(q: object = q, y: object = y) -> None:
            Evidence(step=0.01, has_float=False, has_check=False).add(q, y)  # type: ignore[arg-type]

        def allclose(q: object = q, y: object = y) -> None:
            np.testing.assert_allclose(y, q, rtol=1, atol=1)  # type: ignore[call-overload]

        metrics(), allclose()
        pairs = [(seconds(metrics), seconds(allclose)) for _ in range(REPEATS)]
        ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            f"{list(shape)}: metrics {1e3 * ours:.0f} ms, assert_allclose {1e3 * theirs:.0f} ms: {theirs / ours:.2f} times "
            f"as fast; memory {peak_mib(metrics):.1f} MiB, assert_allclose {peak_mib(allclose):.0f} MiB"
        )


if __name__ == "__main__":
    main()
