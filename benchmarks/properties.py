"""What property-based testing costs beside the inferences: 200 Hypothesis examples against 200 bare inferences on the same inputs.

Run: ``python -m benchmarks.properties``. On HTP's simulator. Three ways by turns, on a net of two convolutions and on a tiny one: a loop over
``session.run``; the same in a test of Hypothesis with ``inputs_of``; and with ``batches_of``, eight samples a time. Then the same with
judging (``judge_run``, three references for each sample), where the bare loop judges too. Ratios are of processor time, of this process and the
runtime processes together, which doesn't depend on who else uses the machine as wall time does; the best of some rounds.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy

from pytest_qnn.assertions import judge_run
from pytest_qnn.bench import Bench
from pytest_qnn.markers import BackendRequest
from pytest_qnn.properties import QdqModel, Step, batches_of, inputs_of
from pytest_qnn.session import Run, Session
from pytest_qnn.settings import Settings

EXAMPLES, BATCH, ROUNDS = 200, 8, 3
NETS = {
    "tiny": QdqModel((1, 3, 16, 16), (Step("Conv", 1), Step("Relu"))),
    "small": QdqModel(
        (1, 3, 64, 64), (Step("Conv", 25), Step("Relu"), Step("Conv", 25), Step("Relu"), Step("MaxPool"))
    ),
}


def processor_seconds() -> float:
    """Processor time so far of this process and those that it started and that still run, in s."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


def seconds(action: Callable[[], object]) -> float:
    """Processor time of one call, in s."""
    start = processor_seconds()
    action()
    return processor_seconds() - start


def hypothesis_test(strategy: SearchStrategy[Any], body: Callable[[Any], object], examples: int) -> Callable[[], None]:
    """A test that Hypothesis runs ``examples`` times, the same each time."""

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True)
    @given(strategy)
    def test(drawn: Any) -> None:
        body(drawn)

    return test


def samples_of(strategy: SearchStrategy[Any], examples: int) -> list[Any]:
    """What such a test draws."""
    drawn: list[Any] = []
    hypothesis_test(strategy, drawn.append, examples)()
    return drawn


def judged(run: Run) -> None:
    """Judge a run whose references are not known yet."""
    run.session.bench.references._passing.clear()
    judge_run(replace(run, passing=True))


def compare(name: str, session: Session) -> None:
    """Print the ratios of one net."""
    single, many = inputs_of(session), batches_of(session, BATCH)
    batches = EXAMPLES // BATCH
    inputs, lists = samples_of(single, EXAMPLES), samples_of(many, batches)
    count = sum(map(len, lists))

    def bare() -> None:
        for x in inputs:
            session.run(x)

    def bare_lists() -> None:
        for batch in lists:
            for x in batch:
                session.run(x)

    def bare_judged() -> None:
        for x in inputs:
            judged(session.run(x))

    ways = {
        "bare": bare,
        "singles": hypothesis_test(single, session.run, EXAMPLES),
        "bare batches": bare_lists,
        "batches": hypothesis_test(many, session.run, batches),
        "bare judged": bare_judged,
        "judged": hypothesis_test(single, lambda x: judged(session.run(x)), EXAMPLES),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):
        for way, action in ways.items():
            best[way] = min(best[way], seconds(action))
    print(
        f"{name}: one inference takes {1e3 * best['bare'] / len(inputs):.1f} ms of processor time; {EXAMPLES} examples {best['singles'] / best['bare']:.2f} "
        f"times {len(inputs)} bare inferences; {len(lists)} batches of up to {BATCH} {best['batches'] / best['bare batches']:.2f} times "
        f"their {count} bare inferences; judged, {best['judged'] / best['bare judged']:.2f} times a loop that judges, and "
        f"{best['judged'] / best['bare']:.2f} times one that doesn't"
    )


def main() -> None:
    """Print the ratios."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Settings(cache_dir=Path(name, "cache")))
        try:
            backend = bench.backend(BackendRequest("htp"))
            for net, model in NETS.items():
                pair = model.save(Path(name, net))
                compare(net, backend.load(pair.quantized, float_model=pair.float_model))
        finally:
            bench.close()


if __name__ == "__main__":
    main()
