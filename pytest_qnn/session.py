"""What a test holds: a loaded model, and what running it gave."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_qnn.errors import ExecutionError, InputError
from pytest_qnn.model.inputs import SeededSample, check_inputs
from pytest_qnn.model.onnx_file import Model
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.provisioning import Artifact
from pytest_qnn.runners.ort import LoadedModel
from pytest_qnn.runners.placement import Placement
from pytest_qnn.runners.profile import Profile, profile
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.settings import unknown_name
from pytest_qnn.targets.target import Plan
from pytest_qnn.verdict.latency import (
    LatencyBudget,
    LatencyStats,
    Outcome,
    is_precise,
    judge_latency,
    summarize,
)

if TYPE_CHECKING:
    from pytest_qnn.bench import Bench

Inputs = Mapping[str, Array] | Array


@dataclass(frozen=True)
class Run:
    """Outputs of one or more inferences and everything one must know to judge them.

    Attributes:
        session: that ran them.
        samples: inputs of each inference.
        results: outputs of each inference, in the same order. Read-only: copy them to change them.
        batch: whether ``outputs`` and ``inputs`` are lists.
        seconds: time of each inference inside the runtime process.
        synthetic: whether all inputs came from ``qnn_inputs``.
    """

    session: Session
    samples: tuple[dict[str, Array], ...]
    results: tuple[dict[str, Array], ...]
    batch: bool
    seconds: tuple[float, ...]
    synthetic: bool = False

    def __repr__(self) -> str:
        return f"<Run of {len(self.samples)} samples on {self.session!r}>"

    @property
    def outputs(self) -> dict[str, Array] | list[dict[str, Array]]:
        """Outputs by name; a list of them if the inputs were a list."""
        return list(self.results) if self.batch else self.results[0]

    @property
    def inputs(self) -> dict[str, Array] | list[dict[str, Array]]:
        """Inputs by name; a list of them if they came as a list."""
        return list(self.samples) if self.batch else self.samples[0]

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the outputs come from: model, artifact, backend, options, SoC, versions, target (JSON-able)."""
        return self.session.provenance

    def output(self, name: str | None = None) -> Array:
        """One output of all inferences, stacked along a new first axis unless there was a single inference.

        Raises:
            KeyError: the model has no such output, or several and no name was given.
        """
        names = [o.name for o in self.session.outputs]
        if name is None and len(names) > 1:
            raise KeyError(f"name one of the outputs: {names}")
        chosen = name if name is not None else names[0]
        if chosen not in names:
            raise KeyError(unknown_name("output", chosen, names))
        arrays = [r[chosen] for r in self.results]
        return np.stack(arrays) if self.batch else arrays[0]


@dataclass(frozen=True)
class Measurement:
    """Latencies of a session. ``not_a_device`` says why they can't be held against a device's budget, if so."""

    session: Session
    stats: LatencyStats
    not_a_device: str
    provenance: dict[str, Any] = field(repr=False)
    budget: LatencyBudget | None = None

    def __repr__(self) -> str:
        stats = self.stats
        return (
            f"<Measurement of {self.session!r}: {stats.samples} samples, p50 {stats.p50_ms.value:.3f} ms, "
            f"p95 {stats.p95_ms.value:.3f} ms>"
        )

    @property
    def simulated(self) -> bool:
        """Whether a simulator was timed."""
        return bool(self.provenance["simulated"])


class Session:
    """A model on a backend. Made by :meth:`pytest_qnn.bench.Backend.load`.

    Attributes:
        model: the model that was asked for.
        float_model: its float original, if one was given.
        executed: the model that really runs: ``model``, but ``float_model`` on a backend that computes in float only.
        placement: where the nodes ran.
        precision: what the backend computes in: e.g. "A8W8", "float16", "float32".
        unquantized_precision: what it computes the float parts of a model in: "float16" or "float32".
        allow_cpu: what may run on onnxruntime's CPU provider without failing an accuracy verdict: operators, node names,
            or everything (``True``).
        notes: what a reader of a record must know, e.g. that the float model ran.
    """

    def __init__(
        self,
        bench: Bench,
        plan: Plan,
        loaded: LoadedModel,
        *,
        model: Model,
        float_model: Model | None,
        executed: Model,
        placement: Placement,
        precision: str,
        unquantized_precision: str,
        artifact: Artifact,
        allow_cpu: bool | frozenset[str],
        notes: tuple[str, ...],
    ) -> None:
        self.bench, self.plan, self._loaded = bench, plan, loaded
        self.model, self.float_model, self.executed = model, float_model, executed
        self.placement, self.artifact = placement, artifact
        self.precision, self.unquantized_precision = precision, unquantized_precision
        self.allow_cpu, self.notes = allow_cpu, notes

    def __repr__(self) -> str:
        return f"<Session {self.model.path.name} on {self.backend}, {self.placement.describe()}>"

    @property
    def backend(self) -> str:
        """Name of the backend."""
        return self.plan.backend

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes, shapes and encodings of the inputs.

        Encodings are those of ``model`` also where the float model runs, so that all backends are fed alike.
        """
        asked = {spec.name: spec for spec in self.model.inputs}
        return tuple(
            replace(spec, encoding=asked[spec.name].encoding) if asked[spec.name].dtype == spec.dtype else spec
            for spec in self.executed.inputs
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes, shapes and encodings of the outputs."""
        return self.executed.outputs

    @property
    def subject(self) -> str:
        """For messages: ``model.onnx on htp (SM8650, simulator)``."""
        return self._loaded.subject

    @property
    def loads(self) -> int:
        """How often the model was loaded in this pytest process: 1, or more after a crash."""
        return self._loaded.loads

    @property
    def provenance(self) -> dict[str, Any]:
        """Where results come from (JSON-able)."""
        from pytest_qnn import __version__

        plan = self.plan
        return {
            "model": {
                "file": str(self.model.path),
                "sha256": self.model.digest,
                "precision": self.model.precision,
            },
            "float_model": self.float_model and {"file": str(self.float_model.path), "sha256": self.float_model.digest},
            "executed": "float_model" if self.executed is self.float_model else "model",
            "artifact": {
                "kind": self.artifact.kind,
                "source": self.artifact.source,
                "sha256": self.artifact.digest,
                "bytes": self.artifact.size,
                "partitions": self.artifact.partitions,
            },
            "backend": plan.backend,
            "options": dict(plan.options),
            "target": plan.target,
            "runner": "ort",
            "simulated": plan.simulated,
            "soc": plan.soc.name if plan.soc else None,
            "htp_arch": plan.soc.htp_arch if plan.soc else None,
            "computed_in": self.precision,
            "library": plan.library or None,
            "versions": {"pytest_qnn": __version__, **self.bench.versions, **plan.versions},
            "dimensions": dict(self.model.dimensions),
            "placement": {
                "on_backend": self.placement.backend,
                "edge_quantizers_on_cpu": len(self.placement.edges),
                "fell_back_to_cpu": [str(m) for m in self.placement.misplaced],
            },
            "loads": self.loads,
            "notes": list(self.notes),
        }

    # --- running ------------------------------------------------------------------------------------------------------

    def run(self, inputs: Inputs | Sequence[Inputs], *, allow_non_finite: bool = False) -> Run:
        """Run one inference, or one for each element of a list.

        Args:
            inputs: a dict from input name to array; for a model with one input the array alone will do. Arrays must have
                the model's shapes and dtypes exactly.
            allow_non_finite: let NaN and infinities through.

        Raises:
            InputError: names, shapes, dtypes or values don't fit.
            TargetError: the runtime died, hung, ran out of memory or reported an error.
        """
        if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
            return self.run_many(inputs, allow_non_finite=allow_non_finite)
        return self._run([inputs], batch=False, allow_non_finite=allow_non_finite)

    def run_many(self, samples: Sequence[Inputs], *, allow_non_finite: bool = False) -> Run:
        """Run one inference for each element of ``samples``; see :meth:`run`."""
        listed = list(samples)
        if not listed:
            raise InputError(f"{self.subject}: no samples: the list of inputs is empty")
        return self._run(listed, batch=True, allow_non_finite=allow_non_finite)

    def _run(self, samples: list[Inputs], batch: bool, allow_non_finite: bool) -> Run:
        checked = [
            self._check(sample, allow_non_finite, f" (sample {i} of the list)" if batch else "")
            for i, sample in enumerate(samples)
        ]
        synthetic = all(isinstance(sample, SeededSample) for sample in samples)
        # copies: a caller who reuses its arrays must not change what the reference is fed with later
        checked = [{name: array.copy() for name, array in sample.items()} for sample in checked]
        results, seconds = [], []
        for sample in checked:
            outputs, spent = self._loaded.run(sample)
            missing = [o.name for o in self.outputs if o.name not in outputs]
            if missing:
                raise ExecutionError(f"{self.subject}: the runtime returned no output {', '.join(missing)}")
            for array in (*sample.values(), *outputs.values()):
                array.flags.writeable = False  # what was computed is what will be judged
            results.append(outputs)
            seconds.append(spent)
        self.bench.note_run(self)
        return Run(self, tuple(checked), tuple(results), batch, tuple(seconds), synthetic)

    def _check(self, sample: object, allow_non_finite: bool, where: str) -> dict[str, Array]:
        return check_inputs(f"{self.subject}{where}", self.inputs, sample, allow_non_finite)

    # --- measuring ----------------------------------------------------------------------------------------------------

    def measure(
        self,
        inputs: Inputs | Sequence[Inputs],
        *,
        budget: LatencyBudget | None = None,
        warmup: int = 3,
        min_samples: int = 30,
        max_samples: int = 20_000,
        max_seconds: float | None = None,
        relative_width: float = 0.05,
    ) -> Measurement:
        """Time single inferences inside the runtime process.

        Samples are taken until the 95% confidence intervals are narrow enough (the median's at most ``relative_width`` of
        the median, p95's at most twice that) and a budget, where there is one, is decided; or until ``max_seconds`` are
        over (default 10, but 1 where the figures won't be judged, as on a simulator) or there are ``max_samples``.

        Args:
            inputs: as for :meth:`run`; of a list, the first element is used.
            budget: limits to decide on; default: those of the ``latency_budget`` marks and the project's configuration.

        Raises:
            InputError: inputs that don't fit, or senseless numbers.
            TargetError: as for :meth:`run`.
        """
        judged = not self.plan.not_a_device or self.bench.settings.simulated_latency
        max_seconds = max_seconds if max_seconds is not None else 10.0 if judged else 1.0
        if min_samples < 1 or max_samples < min_samples or warmup < 0 or max_seconds <= 0 or relative_width <= 0:
            raise InputError(
                f"{self.subject}: measure needs 1 <= min_samples <= max_samples, warmup >= 0, max_seconds > 0 and "
                "relative_width > 0"
            )
        if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
            if not len(inputs):
                raise InputError(f"{self.subject}: no samples: the list of inputs is empty")
            inputs = inputs[0]
        sample = self._check(inputs, False, "")
        budget = budget or self.bench.latency_budget(self)
        for _ in range(warmup):
            self._loaded.run(sample)
        start = time.monotonic()
        times: list[float] = []
        peak = 0.0
        while True:
            left = max_seconds - (time.monotonic() - start)
            slice_seconds = min(max(left, 1e-3), 0.5)
            batch, peak = self._loaded.time(sample, max_samples - len(times), slice_seconds, reset_peak=not times)
            times += batch
            stats = summarize(times, warmup=warmup, peak_memory_mb=peak or None)
            if len(times) >= max_samples or time.monotonic() - start >= max_seconds:
                break
            if len(times) >= min_samples and is_precise(stats, relative_width) and _decided(stats, budget):
                break
        self.bench.note_run(self)
        return Measurement(self, stats, self.plan.not_a_device, self.provenance, budget)

    def profile(self, inputs: Inputs) -> Profile:
        """The runtime's own events of one inference: cycles per node, times of its phases.

        Raises:
            InputError, TargetError: as for :meth:`run`.
        """
        return profile(self._loaded, self._check(inputs, False, ""), self.plan.not_a_device)

    def close(self) -> None:
        """Free the model in the runtime process. A session that is used again loads again."""
        self._loaded.close()


def _decided(stats: LatencyStats, budget: LatencyBudget | None) -> bool:
    return budget is None or judge_latency(stats, budget).outcome is not Outcome.UNDECIDED
