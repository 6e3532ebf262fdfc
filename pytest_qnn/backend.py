"""A backend as a test sees it: something to load models on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_qnn.errors import ModelError, OptionError, PlacementError, UsageError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.onnx_file import Model, load_proto, read_model
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.runners.ort import QNN, LoadedModel, LoadRequest, Placement, read_placement
from pytest_qnn.runners.process import Limits
from pytest_qnn.session import Artifact, Session

if TYPE_CHECKING:
    from pytest_qnn.bench import Bench

FilePath = str | os.PathLike[str]


class Backend:
    """A backend of the target this process holds; the value of the ``qnn_backend`` fixture.

    Attributes:
        name: "htp", "cpu" or "gpu".
        soc: the SoC that is simulated or driven, e.g. "SM8650".
    """

    def __init__(self, bench: Bench, request: BackendRequest) -> None:
        self.bench, self._request = bench, request
        self.name = request.name

    def __repr__(self) -> str:
        return f"<Backend {self.name}>"

    @property
    def soc(self) -> str:
        """Name of the SoC."""
        return self._request.soc or self.bench.settings.soc

    def load(
        self,
        model: FilePath,
        *,
        float_model: FilePath | None = None,
        dimensions: Mapping[str, int] | None = None,
        allow_cpu: bool | Iterable[str] = False,
        load_timeout: float | None = None,
        run_timeout: float | None = None,
        **options: object,
    ) -> Session:
        """Compile and load a model in a runtime process.

        Args:
            model: ONNX file, float32 or QDQ, or the wrapper of a context binary made by :meth:`compile`.
            float_model: the float original of a QDQ model, with the same inputs and outputs: it makes the verdict three-way, and
                it is what runs on ``cpu``, which computes in float only.
            dimensions: sizes for named dynamic dimensions, e.g. ``{"batch": 1}``.
            allow_cpu: nodes that may run on onnxruntime's CPU provider without failing an accuracy verdict: operators or
                node names, or True for all.
            load_timeout, run_timeout: seconds, instead of the settings' values.
            **options: of the backend, as in the ``backend`` mark; they win over the mark's.

        Raises:
            ModelError: the model can't be used: broken, incomplete, or with dynamic dimensions left open.
            OptionError: unknown option or bad value.
            ArtifactError: a context binary that was altered or made for something else.
            CompileError: the backend refused the model.
            PlacementError: none of its nodes run on the backend.
            TargetError: the runtime died, hung or ran out of memory.
        """
        soc = options.pop("soc", None) or self._request.soc
        plan = self.bench.target.plan(
            self.name, str(soc) if soc else None, {**dict(self._request.options), **options}
        )
        limits = Limits(
            _seconds("load_timeout", load_timeout, self.bench.limits.load_seconds),
            _seconds("run_timeout", run_timeout, self.bench.limits.run_seconds),
            self.bench.limits.memory_mib,
        )
        asked = read_model(model, dimensions)
        original = (
            read_model(float_model, _shared_dimensions(float_model, dimensions)) if float_model else None
        )
        for used in (asked, original):
            if used is not None:
                _check_usable(used)
        if original is not None:
            _check_twins(asked, original)
        executed, notes = asked, []
        if plan.float_only and asked.quantized:
            if original is None:
                raise UsageError(
                    f"{asked.path.name} is quantised, and QNN's {self.name} backend computes in float only (it refuses "
                    "quantised operators, which would then run elsewhere): pass float_model= with the float original, or "
                    f"leave {self.name!r} out"
                )
            executed = original
            notes.append(
                f"QNN {self.name} computes in float only: the float model ran in place of the QDQ model"
            )
        if executed.context:
            from pytest_qnn.artifacts.context import check_context

            check_context(executed, plan)
        subject = (
            f"{asked.path.name} on {self.name} ({plan.soc.name + ', ' if plan.soc else ''}{plan.target})"
        )
        request = LoadRequest(
            model=str(executed.path),
            digest=executed.digest,
            process=plan.process,
            provider=QNN,
            provider_options=plan.provider_options,
            dimensions=executed.dimensions,
        )
        loaded = self.bench.load_shared(request, subject, limits)
        placement = self._placement(executed, request, loaded, subject, limits)
        if not placement.backend:
            raise PlacementError(
                f"{subject}: none of the model's {placement.total} nodes run on {self.name}: all of them fell back to "
                "onnxruntime's CPU provider"
                + "".join(f"\n  {m}" for m in placement.misplaced[:10])
                + "".join(f"\n  log: {line[:300]}" for line in loaded.info.log[-4:] if "rror" in line)
            )
        in_float = self.bench.float_precision(plan)
        precision = executed.precision if executed.quantized else in_float
        key = json.dumps(
            [
                executed.digest,
                plan.provider_options,
                executed.dimensions,
                self.bench.versions,
                dict(plan.versions),
            ]
        )
        return Session(
            self.bench,
            plan,
            loaded,
            model=asked,
            float_model=original,
            executed=executed,
            placement=placement,
            precision=precision,
            unquantized_precision=in_float,
            artifact=Artifact(
                "context binary" if executed.context else "compiled in memory",
                hashlib.sha256(key.encode()).hexdigest(),
            ),
            allow_cpu=allow_cpu if isinstance(allow_cpu, bool) else frozenset(allow_cpu),
            notes=tuple(notes),
        )

    def _placement(
        self, model: Model, request: LoadRequest, loaded: LoadedModel, subject: str, limits: Limits
    ) -> Placement:
        graph = load_proto(model.path).graph
        names = [n.name for n in graph.node]
        ends = {t.name for t in (*model.inputs, *model.outputs)}
        edges = [
            n.name
            for n in graph.node
            if (n.op_type == "QuantizeLinear" and n.input[0] in ends)
            or (n.op_type == "DequantizeLinear" and n.output[0] in ends)
        ]
        placement = read_placement(self.name, loaded.info.placement, edges, names, loaded.info.log)
        if placement.misplaced:
            # the reasons stand in the verbose log only: ask for that where there is something to explain
            verbose = LoadedModel(self.bench.pool, replace(request, log_severity=0), subject, limits)
            verbose.close()
            placement = read_placement(self.name, loaded.info.placement, edges, names, verbose.info.log)
        return placement


def _seconds(name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise OptionError(f"{name} must be a number of seconds greater than 0, got {value!r}")
    return float(value)


def _shared_dimensions(file: FilePath, dimensions: Mapping[str, int] | None) -> dict[str, int]:
    """Those of ``dimensions`` that the float original has too: quantising may have fixed or renamed some."""
    if not dimensions:
        return {}
    model = read_model(file)
    open_ones = {name for spec in model.inputs + model.outputs for name in spec.unbound}
    return {name: size for name, size in dimensions.items() if name in open_ones}


def _check_usable(model: Model) -> None:
    if not model.inputs:
        raise ModelError(f"{model.path}: the model has no inputs: QNN can't run such a graph")
    for spec in model.inputs:
        if spec.unbound:
            names = ", ".join(spec.unbound)
            raise ModelError(
                f"{model.path}: input {spec.describe()} has dynamic dimensions ({names}), and QNN runs fixed shapes only: "
                + (
                    f"pass dimensions={{{spec.unbound[0]!r}: 1}} to load()"
                    if not spec.unbound[0].startswith("?")
                    else "fix the shape in the model, e.g. with onnxruntime.tools.make_dynamic_shape_fixed"
                )
            )
        if any(size == 0 for size in spec.shape):
            raise ModelError(
                f"{model.path}: input {spec.describe()} has no elements: QNN crashes on such shapes"
            )


def _check_twins(model: Model, original: Model) -> None:
    for what, ours, theirs in (
        ("input", model.inputs, original.inputs),
        ("output", model.outputs, original.outputs),
    ):
        mine, other = {t.name: t for t in ours}, {t.name: t for t in theirs}
        if mine.keys() != other.keys():
            raise ModelError(
                f"float_model {original.path.name} is not the original of {model.path.name}: its {what}s are "
                f"{sorted(other)}, not {sorted(mine)}"
            )
        for name, spec in mine.items():
            if not _compatible(spec, other[name]):
                raise ModelError(
                    f"float_model {original.path.name} is not the original of {model.path.name}: {what} "
                    f"{other[name].describe()} there, {spec.describe()} here"
                )


def _compatible(spec: TensorSpec, other: TensorSpec) -> bool:
    same_shape = len(spec.shape) == len(other.shape) and all(
        a == b or isinstance(a, str) or isinstance(b, str)
        for a, b in zip(spec.shape, other.shape, strict=True)
    )
    same_type = spec.dtype == other.dtype or (spec.encoding is not None and other.dtype == "float32")
    return same_shape and same_type
