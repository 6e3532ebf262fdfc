"""What a test holds: a loaded model, and what running it gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_qnn.errors import ExecutionError, InputError
from pytest_qnn.measuring import Conditions, Effort, measure
from pytest_qnn.model.inputs import SeededSample, check_inputs
from pytest_qnn.model.onnx_file import Model
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.provisioning import Artifact
from pytest_qnn.runners.loaded import Loaded
from pytest_qnn.runners.ort import LoadedModel
from pytest_qnn.runners.placement import Placement
from pytest_qnn.runners.profile import Profile
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.settings import unknown_name
from pytest_qnn.targets.target import Plan
from pytest_qnn.verdict.latency import LatencyBudget, LatencyStats

if TYPE_CHECKING:
    from pytest_qnn.bench import Bench
    from pytest_qnn.devices.health import HealthSampler
    from pytest_qnn.layers.run import LayeredModel

Inputs = Mapping[str, Array] | Array


@dataclass(frozen=True)
class Run:
    """Outputs of one or more inferences and everything one must know to judge them.

    Attributes:
        session: that ran them.
        samples: inputs of each inference.
        results: outputs of each inference, in the same order. Read-only: copy them to change them.
        batch: whether ``outputs`` and ``inputs`` are lists.
        seconds: time of each inference inside the runtime; NaN where the runner can't tell.
        synthetic: whether all inputs were made up: by ``qnn_inputs`` or :mod:`pytest_qnn.properties`.
        round_trip_seconds: of each inference, from this host to the device and back; None where nothing was sent anywhere.
        passing: whether an input was drawn at random, to be used once.
    """

    session: Session
    samples: tuple[dict[str, Array], ...]
    results: tuple[dict[str, Array], ...]
    batch: bool
    seconds: tuple[float, ...]
    synthetic: bool = False
    round_trip_seconds: tuple[float | None, ...] = ()
    passing: bool = False

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
    """Latencies of a session.

    Attributes:
        stats: of the times of single inferences in the runtime; this is what budgets are held against.
        not_a_device: why they can't be held against a device's budget, if so.
        budget: that decided how long was measured.
        round_trip: of the times from this host to the device and back, where the runner measures them; never judged.
        conditions: how the device was meanwhile; None where models run on this host.
    """

    session: Session
    stats: LatencyStats
    not_a_device: str
    provenance: dict[str, Any] = field(repr=False)
    budget: LatencyBudget | None = None
    round_trip: LatencyStats | None = None
    conditions: Conditions | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        stats = self.stats
        stability = f", device {self.conditions.assessment.stability}" if self.conditions else ""
        return (
            f"<Measurement of {self.session!r}: {stats.samples} samples, p50 {stats.p50_ms.value:.3f} ms, "
            f"p95 {stats.p95_ms.value:.3f} ms{stability}>"
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
        sampler: watches the device while it is measured; None where models run on this host.
    """

    def __init__(
        self,
        bench: Bench,
        plan: Plan,
        loaded: Loaded,
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
        sampler: HealthSampler | None = None,
    ) -> None:
        self.bench, self.plan, self._loaded = bench, plan, loaded
        self.model, self.float_model, self.executed = model, float_model, executed
        self.placement, self.artifact = placement, artifact
        self.precision, self.unquantized_precision = precision, unquantized_precision
        self.allow_cpu, self.notes = allow_cpu, notes
        self.sampler = sampler

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
            "runner": plan.runner,
            "device": plan.device,
            "simulated": plan.simulated,
            "soc": plan.soc.name if plan.soc else None,
            "htp_arch": plan.soc.htp_arch if plan.soc else None,
            "computed_in": self.precision,
            "library": plan.library or None,
            "versions": {"pytest_qnn": __version__, **self.bench.versions, **plan.versions, **self._loaded.versions},
            "dimensions": dict(self.model.dimensions),
            "placement": {
                "on_backend": self.placement.backend,
                "edge_quantizers_on_cpu": len(self.placement.edges),
                "fell_back_to_cpu": [str(m) for m in self.placement.misplaced],
            },
            "loads": self.loads,
            "notes": list(dict.fromkeys([*self.notes, *self._loaded.notes])),
        }

    @cached_property
    def layered(self) -> LayeredModel:
        """The model, cut so that each of its layers can be run alone.

        Raises:
            UsageError: what runs isn't quantised.
            ModelError: it has no quantised activation.
        """
        from pytest_qnn.layers.run import LayeredModel

        return LayeredModel(self.bench, self.plan, self.executed, self.bench.limits)

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
        passing = any(isinstance(sample, SeededSample) and sample.passing for sample in samples)
        # copies: a caller who reuses its arrays must not change what the reference is fed with later
        checked = [{name: array.copy() for name, array in sample.items()} for sample in checked]
        inferences = self._loaded.run_many(checked)
        if len(inferences) != len(checked):
            raise ExecutionError(f"{self.subject}: the runtime answered {len(inferences)} of {len(checked)} samples")
        for sample, inference in zip(checked, inferences, strict=True):
            missing = [o.name for o in self.outputs if o.name not in inference.outputs]
            if missing:
                raise ExecutionError(f"{self.subject}: the runtime returned no output {', '.join(missing)}")
            for array in (*sample.values(), *inference.outputs.values()):
                array.flags.writeable = False  # what was computed is what will be judged
        self.bench.note_run(self)
        return Run(
            self,
            tuple(checked),
            tuple(inference.outputs for inference in inferences),
            batch,
            tuple(inference.seconds for inference in inferences),
            synthetic,
            tuple(inference.round_trip_seconds for inference in inferences),
            passing,
        )

    def check_samples(self, inputs: Inputs | Sequence[Inputs]) -> list[dict[str, Array]]:
        """One dict of arrays for each inference, as :meth:`run` would take them; nothing is run.

        Raises:
            InputError: names, shapes, dtypes or values don't fit, or there are none.
        """
        several = isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes)
        listed: list[Any] = list(inputs) if several else [inputs]
        if not listed:
            raise InputError(f"{self.subject}: no samples: the list of inputs is empty")
        places = (f" (sample {i} of the list)" if several else "" for i in range(len(listed)))
        return [self._check(sample, False, where) for sample, where in zip(listed, places, strict=True)]

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
        """Time single inferences inside the runtime, on a device without the way there and back.

        Samples are taken until the 95% confidence intervals are narrow enough (the median's at most ``relative_width`` of
        the median, p95's at most twice that) and a budget, where there is one, is decided; or until ``max_seconds`` are
        over (default 10, but 1 where the figures won't be judged, as on a simulator) or there are ``max_samples``.

        A device is watched meanwhile. If it throttles, or its latencies drift by more than ``relative_width``, it may cool down
        (setting ``cool_down``) and the samples are taken anew, three times in all; documentation: "Measuring on a device".

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
        effort = Effort(warmup, min_samples, max_samples, max_seconds, relative_width)
        cool_down = self.bench.settings.cool_down if judged else 0.0  # else it isn't worth the wait
        energy = not self.plan.not_a_device  # a stand-in has no battery of its own
        measured = measure(self._loaded, sample, effort, budget, self.sampler, cool_down, energy)
        self.bench.note_run(self)
        return Measurement(
            self,
            measured.stats,
            self.plan.not_a_device,
            self.provenance,
            budget,
            measured.round_trip,
            measured.conditions,
        )

    def profile(self, inputs: Inputs) -> Profile:
        """The runtime's own events of one inference: cycles per node, times of its phases.

        Raises:
            InputError, TargetError: as for :meth:`run`.
        """
        found = self._loaded.profile(self._check(inputs, False, ""))
        return replace(found, not_a_device=self.plan.not_a_device)

    def restart(self) -> None:
        """Have the next use load the model anew: where the runtime is on this host, into a fresh process.

        Other sessions in that process load again by themselves.
        """
        if isinstance(self._loaded, LoadedModel):
            self._loaded.end_process()
        else:
            self._loaded.close()

    def close(self) -> None:
        """Free the model in the runtime process. A session that is used again loads again."""
        self._loaded.close()
