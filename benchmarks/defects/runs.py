"""What the bench judges: float, QDQ and backend results of every net, precision and SoC, kept on disk as they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.defects.nets import NETS, PRECISIONS, Net, Pair, Sample, prepare
from pytest_qnn.bench import Bench
from pytest_qnn.devices.soc import find_soc
from pytest_qnn.layers.arithmetic import is_coarse
from pytest_qnn.layers.envelope import DRAW, DRAWS, write_envelope
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.model.replaced_file import replaced_file
from pytest_qnn.runners.reference import CHECK_LEVEL, LEVEL

Array = npt.NDArray[Any]
SOCS = ("SM8350", "SM8650", "SM8850")
KEPT_DRAWS = 2
TUNED_SEED, UNSEEN_SEED = 11, 12


@dataclass(frozen=True)
class Outcome:
    """One output over all inputs of a run; arrays are [inputs, ...].

    Attributes:
        f, q, r, y: float, QDQ, QDQ at another optimisation level, and the backend's result.
        b: the draws of the envelope: [draws, inputs, ...].
        encoding: of the output.
    """

    pair: Pair
    soc: str
    seed: int
    output: str
    encoding: Encoding | None
    bounded: bool
    f: Array
    q: Array
    r: Array
    y: Array
    b: Array

    @property
    def step(self) -> float | None:
        """One quantisation step."""
        return self.encoding.step if self.encoding else None

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.pair.name} on {self.soc}, seed {self.seed}"


class Runs:
    """The runs, made on demand. Args: the folder that keeps them."""

    def __init__(self, bench: Bench, folder: Path, count: int = 32) -> None:
        self.bench, self.folder, self.count = bench, folder, count
        folder.mkdir(parents=True, exist_ok=True)

    def pair(self, net: Net, precision: str) -> Pair:
        """A net, quantised."""
        return prepare(net, precision, self.folder / "models")

    def outcomes(self, pair: Pair, soc: str, seed: int) -> list[Outcome]:
        """The healthy run of a pair on a SoC."""
        samples = pair.net.samples(self.count, seed)
        reference = self.kept(f"reference-{pair.name}-{seed}-{self.count}", lambda: self._references(pair, samples))
        backend = self.kept(
            f"{soc}-{pair.name}-{seed}-{self.count}", lambda: self._backend(pair.quantized, soc, samples)
        )
        kind = "coarse" if is_coarse(find_soc(soc)) else "fine"
        drawn = self.kept(f"envelope-{kind}-{pair.name}-{seed}-{self.count}", lambda: self._draws(pair, kind, samples))
        model = read_model(pair.quantized)
        return [
            Outcome(
                pair,
                soc,
                seed,
                spec.name,
                spec.encoding,
                spec.name in model.bounded_outputs,
                *(reference[f"{k}{index}"] for k in "fqr"),
                backend[f"y{index}"],
                drawn[f"b{index}"],
            )
            for index, spec in enumerate(model.outputs)
        ]

    def defective(self, pair: Pair, soc: str, seed: int, name: str, model: Path) -> list[Array]:
        """What the backend gives for the same inputs when it runs ``model`` instead; one array for each output."""
        samples = pair.net.samples(self.count, seed)
        kept = self.kept(f"{soc}-{pair.name}-{seed}-{self.count}-{name}", lambda: self._backend(model, soc, samples))
        return [kept[f"y{index}"] for index in range(len(kept))]

    def _backend(self, model: Path, soc: str, samples: Sequence[Sample]) -> dict[str, Array]:
        session = self.bench.backend(BackendRequest("htp", soc=soc)).load(model)
        results = session.run_many(samples).results
        return {
            f"y{index}": np.stack([result[spec.name] for result in results])
            for index, spec in enumerate(session.outputs)
        }

    def _references(self, pair: Pair, samples: Sequence[Sample]) -> dict[str, Array]:
        quantized, real = read_model(pair.quantized), read_model(pair.float_model)
        run = self.bench.references.run
        found = {
            "q": [run(quantized, s, LEVEL) for s in samples],
            "r": [run(quantized, s, CHECK_LEVEL) for s in samples],
            "f": [run(real, s, LEVEL) for s in samples],
        }
        arrays: dict[str, Array] = {}
        for index, spec in enumerate(quantized.outputs):
            for letter, results in found.items():
                arrays[f"{letter}{index}"] = np.stack([result[spec.name] for result in results])
        return arrays

    def _draws(self, pair: Pair, kind: str, samples: Sequence[Sample]) -> dict[str, Array]:
        quantized, run = read_model(pair.quantized), self.bench.references.run
        noisy = self.folder / "models" / f"{quantized.digest[:16]}.{kind}.envelope.onnx"
        if not write_envelope(pair.quantized, noisy, coarse=kind == "coarse"):
            raise AssertionError(f"{pair.name} has no envelope: it isn't quantised throughout")
        envelope = read_model(noisy)
        draws = [[run(envelope, {**s, DRAW: value}, LEVEL) for s in samples] for value in DRAWS[:KEPT_DRAWS]]
        return {
            f"b{index}": np.stack([[result[spec.name] for result in draw] for draw in draws])
            for index, spec in enumerate(quantized.outputs)
        }

    def kept(self, name: str, make: Any) -> dict[str, Array]:
        """Arrays from the folder, or made and put there."""
        file = self.folder / f"{name}.npz"
        if not file.exists():
            arrays = make()
            with replaced_file(file) as draft, draft.open("wb") as stream:
                np.savez(stream, **arrays)
        with np.load(file, allow_pickle=False) as stored:
            return dict(stored)


def all_pairs(runs: Runs, held_out: bool | None = None) -> Iterator[Pair]:
    """Every net in every precision; of the tuned or the held-out nets only, if that is said."""
    for net in NETS:
        if held_out is None or net.held_out == held_out:
            for precision in PRECISIONS:
                yield runs.pair(net, precision)
