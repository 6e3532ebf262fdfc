"""What judging costs, against the inferences that are judged: with references that are kept, and with references to be computed."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.defects.nets import NETS, prepare
from pytest_qnn.assertions import judge_run
from pytest_qnn.bench import Bench
from pytest_qnn.markers import BackendRequest
from pytest_qnn.settings import Settings

SAMPLES = 8
CHOSEN = ("orientation", "speech-embedding", "age")


def main() -> None:
    """Print a line for each net: ms for one sample."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Settings(cache_dir=Path(name, "cache")))
        try:
            for net in NETS:
                if net.name in CHOSEN:
                    _measure(bench, net.name, Path(name))
        finally:
            bench.close()


def _measure(bench: Bench, name: str, folder: Path) -> None:
    net = next(n for n in NETS if n.name == name)
    try:
        pair = prepare(net, "A8W8", folder)
    except FileNotFoundError as error:
        print(f"judging {name}: {error}")
        return
    session = bench.backend(BackendRequest("htp")).load(pair.quantized, float_model=pair.float_model)
    samples = net.samples(SAMPLES, seed=2)
    session.run(samples[:1])
    start = time.perf_counter()
    run = session.run(samples)
    inference = (time.perf_counter() - start) / SAMPLES
    times = []
    for _ in range(6):
        start = time.perf_counter()
        judge_run(run)
        times.append((time.perf_counter() - start) / SAMPLES)
    kept = min(times[1:])
    print(
        f"judging {name}: inference {1e3 * inference:.1f} ms; references kept {1e3 * kept:.2f} ms = {100 * kept / inference:.1f}%; "
        f"the first time {1e3 * times[0]:.1f} ms = {100 * times[0] / inference:.0f}%"
    )
