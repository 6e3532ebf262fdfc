"""How fast all metrics of an output are, against one numpy.testing.assert_allclose on the same arrays.

Run: ``OPENBLAS_NUM_THREADS=1 python -m benchmarks.metrics``. Medians and minima of interleaved repeats (on a machine that
others use too, the minima tell more); memory by tracemalloc, which numpy reports its arrays to. The metrics use one thread
of their own: their calls are of some microseconds each, so several would mostly wait for Python's lock (measured with two
threads on two cores: 0.7 to 1.2 times as fast).
"""

from __future__ import annotations

import os
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
    print(f"one thread; OPENBLAS_NUM_THREADS={os.environ.get('OPENBLAS_NUM_THREADS', 'unset')}")
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
        ours, theirs = ([1e3 * value for value in times] for times in zip(*pairs, strict=True))
        median, best = (pick(theirs) / pick(ours) for pick in (statistics.median, min))
        print(
            f"{list(shape)}: metrics {statistics.median(ours):.0f} ms (best {min(ours):.0f}), assert_allclose "
            f"{statistics.median(theirs):.0f} ms (best {min(theirs):.0f}): {median:.2f} times as fast (best by best "
            f"{best:.2f}); memory {peak_mib(metrics):.1f} MiB, assert_allclose {peak_mib(allclose):.0f} MiB"
        )


if __name__ == "__main__":
    main()
