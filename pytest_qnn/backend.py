"""A backend as a test sees it: something to load models on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qnn.artifacts.context import check_artifact, compile_settings, store
from pytest_qnn.devices.soc import find_soc
from pytest_qnn.errors import ArtifactError, ModelError, OptionError, PlacementError, UsageError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.onnx_file import Model, edge_quantizers, load_proto, read_model
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.runners.ort import QNN, LoadedModel, LoadRequest, Placement, read_placement
from pytest_qnn.runners.process import Limits
from pytest_qnn.session import Artifact, Session
from pytest_qnn.settings import unknown_name
from pytest_qnn.targets.target import Plan

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
        artifact: FilePath | None = None,
        allow_cpu: bool | Iterable[str] = False,
        load_timeout: float | None = None,
        run_timeout: float | None = None,
        **options: object,
    ) -> Session:
        """Compile and load a model in a runtime process.

        Args:
            model: ONNX file, float32 or QDQ.
            float_model: the float original of a QDQ model, with the same inputs and outputs: it makes the verdict
                three-way, and it is what runs on ``cpu``, which computes in float only.
            dimensions: sizes for named dynamic dimensions, e.g. ``{"batch": 1}``.
            artifact: what :meth:`compile` made from ``model``: it runs in place of a fresh compile, once it is checked.
            allow_cpu: nodes that may run on onnxruntime's CPU provider without failing an accuracy verdict: operators or
                node names, or True for all.
            load_timeout, run_timeout: seconds, instead of the settings' values.
            **options: of the backend, as in the ``backend`` mark; they win over the mark's.

        Raises:
            ModelError: the model can't be used: broken, incomplete, or with dynamic dimensions left open.
            OptionError: unknown option or bad value.
            UsageError: a QDQ model without ``float_model`` on a backend that computes in float only.
            ArtifactError: a context binary that was altered or made for something else.
            CompileError: the backend refused the model.
            PlacementError: none of its nodes run on the backend.
            TargetError: the runtime died, hung or ran out of memory.
        """
        plan = self._plan(options)
        limits = self._limits(load_timeout, run_timeout)
        asked, original = self._models(model, float_model, dimensions)
        executed, notes = self._executed(plan, asked, original)
        wrapper, manifest = None, None
        if artifact is not None:
            wrapper = self.bench.locate(artifact)
            if plan.backend != "htp":
                raise UsageError(f"artifact={wrapper.name}: context binaries are for htp, this is {plan.backend}")
            manifest = check_artifact(wrapper, executed, plan)
        subject = f"{asked.path.name} on {self.name} ({plan.place})"
        request = LoadRequest(
            model=str(wrapper or executed.path),
            files=manifest.files(wrapper) if manifest and wrapper else executed.files,
            process=plan.process,
            provider=QNN,
            provider_options=plan.provider_options,
            dimensions=() if manifest else executed.dimensions,
        )
        loaded = self.bench.load_shared(request, subject, limits)
        placement = self._placement(executed, request, loaded, subject, limits)
        if not placement.backend:
            raise PlacementError(_nothing_placed(subject, self.name, placement, loaded.info.log))
        in_float = self.bench.float_precision(plan)
        return Session(
            self.bench,
            plan,
            loaded,
            model=asked,
            float_model=original,
            executed=executed,
            placement=placement,
            precision=executed.precision if executed.quantized else in_float,
            unquantized_precision=in_float,
            artifact=(
                Artifact("context binary", manifest.binary_sha256, str(wrapper))
                if manifest
                else Artifact("compiled in memory", self._digest(executed, plan))
            ),
            allow_cpu=_allowed(allow_cpu, placement, load_proto(executed.path)),
            notes=notes,
        )

    def compile(
        self,
        model: FilePath,
        output: FilePath,
        *,
        dimensions: Mapping[str, int] | None = None,
        load_timeout: float | None = None,
        **options: object,
    ) -> Path:
        """Compile a model to a context binary in the folder ``output``: ``NAME.SOC.ctx.onnx``, its ``.bin``, a manifest.

        Returns:
            The wrapper, to be given to :meth:`load` as ``artifact``.

        Raises:
            UsageError: the backend has no context binaries.
            ModelError, OptionError, CompileError, TargetError: as for :meth:`load`.
            ArtifactError: the model doesn't become a single context, or ``output`` can't be written.
        """
        plan = self._plan(options)
        if plan.backend != "htp":
            raise UsageError(f"context binaries are for htp, not for {plan.backend}")
        source = _usable(read_model(self.bench.locate(model), dimensions))
        folder = Path(output).expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".compile-") as work:
                made = Path(work, "model.onnx")
                request = LoadRequest(
                    model=str(source.path),
                    files=source.files,
                    process=plan.process,
                    provider=QNN,
                    provider_options=plan.provider_options,
                    dimensions=source.dimensions,
                    config=compile_settings(made),
                )
                subject = f"{source.path.name} on {self.name} ({plan.place})"
                LoadedModel(self.bench.pool, request, subject, self._limits(load_timeout, None)).close()
                if not made.is_file():
                    raise ArtifactError(f"{subject}: the runtime made no context: none of the nodes run on {self.name}")
                return store(made, folder, source, plan)
        except OSError as error:
            raise ArtifactError(f"{folder}: can't be written: {error.strerror or error}") from error

    def _plan(self, options: dict[str, object]) -> Plan:
        self.bench.test.check(self._request)
        soc = options.pop("soc", None)
        if soc is not None and self._request.pinned and find_soc(str(soc)).name != self._request.soc:
            raise OptionError(f"soc={soc!r} contradicts the test's device mark, which asks for {self._request.soc}")
        soc = self._request.soc if soc is None else soc
        merged = {**dict(self._request.options), **options}
        return self.bench.target.plan(self.name, None if soc is None else str(soc), merged)

    def _limits(self, load_timeout: float | None, run_timeout: float | None) -> Limits:
        default = self.bench.limits
        return Limits(
            _seconds("load_timeout", load_timeout, default.load_seconds),
            _seconds("run_timeout", run_timeout, default.run_seconds),
            default.memory_mib,
        )

    def _models(
        self, model: FilePath, float_model: FilePath | None, dimensions: Mapping[str, int] | None
    ) -> tuple[Model, Model | None]:
        """The model and its float original, with the same sizes given to their dynamic dimensions.

        The float original's are taken from the model where it has them fixed: models are often fixed while quantising.
        """
        file = self.bench.locate(model)
        if float_model is None:
            return _usable(read_model(file, dimensions)), None
        float_file = self.bench.locate(float_model)
        free = open_dimensions(read_model(float_file)), open_dimensions(read_model(file))
        given = dict(dimensions or {})
        asked = _usable(read_model(file, {n: s for n, s in given.items() if n in free[1] or n not in free[0]}))
        original = read_model(float_file)
        if original.quantized:
            raise ModelError(
                f"float_model {original.path.name} is itself quantised ({original.precision}): pass the float original that "
                f"{asked.path.name} was quantised from"
                + ("" if asked.quantized else f"; it looks as if {asked.path.name} were that, and the two exchanged")
            )
        _check_twins(asked, original)
        sizes = {n: s for n, s in given.items() if n in free[0]}
        return asked, read_model(float_file, {**_sizes_of(original, asked), **sizes})

    def _executed(self, plan: Plan, asked: Model, original: Model | None) -> tuple[Model, tuple[str, ...]]:
        """The model that really runs, and what a record must say of that."""
        if not (plan.float_only and asked.quantized):
            return asked, ()
        if original is None:
            raise UsageError(
                f"{asked.path.name} is quantised, and QNN's {self.name} backend computes in float only (it refuses "
                "quantised operators, which would then run elsewhere): pass float_model= with the float original, or "
                f"leave {self.name!r} out"
            )
        note = f"QNN {self.name} computes in float only: the float model ran in place of the QDQ model"
        return _usable(original), (note,)

    def _digest(self, model: Model, plan: Plan) -> str:
        versions = {**self.bench.versions, **plan.versions}
        key = json.dumps([model.digest, plan.provider_options, model.dimensions, versions], sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest()

    def _placement(
        self, model: Model, request: LoadRequest, loaded: LoadedModel, subject: str, limits: Limits
    ) -> Placement:
        graph = load_proto(model.path).graph
        names = [n.name for n in graph.node]
        edges = edge_quantizers(graph)
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


def open_dimensions(model: Model) -> set[str]:
    """Names of a model's dynamic dimensions."""
    return {name for spec in model.inputs + model.outputs for name in spec.unbound}


def _sizes_of(original: Model, asked: Model) -> dict[str, int]:
    """Sizes that ``asked`` has where its float original has named dynamic dimensions."""
    fixed = {spec.name: spec.shape for spec in asked.inputs + asked.outputs}
    return {
        name: size
        for spec in original.inputs + original.outputs
        for name, size in zip(spec.shape, fixed.get(spec.name, ()), strict=False)
        if isinstance(name, str) and not name.startswith("?") and isinstance(size, int)
    }


def _allowed(allow_cpu: bool | Iterable[str], placement: Placement, proto: Any) -> bool | frozenset[str]:
    if isinstance(allow_cpu, bool):
        return allow_cpu
    if isinstance(allow_cpu, str):
        raise OptionError(
            f"allow_cpu takes True or a list of operators or node names, got {allow_cpu!r}: put it in a list"
        )
    known = {n.op_type for n in proto.graph.node} | {n.name for n in proto.graph.node if n.name} | set(placement.nodes)
    for name in allow_cpu:
        if name not in known:
            raise OptionError(f"allow_cpu: {unknown_name('operator or node', name, known)[:300]}")
    return frozenset(allow_cpu)


def _nothing_placed(subject: str, backend: str, placement: Placement, log: Iterable[str]) -> str:
    lines = [
        f"{subject}: none of the model's {placement.total} nodes run on {backend}: all of them fell back to onnxruntime's "
        "CPU provider"
    ]
    lines += [f"  {node}" for node in placement.misplaced[:10]]
    lines += [f"  log: {line[:300]}" for line in log if "[E:" in line][-4:]
    return "\n".join(lines)


def _usable(model: Model) -> Model:
    """The model, if QNN can run such a graph at all.

    Raises:
        ModelError: no inputs, dynamic or empty dimensions, or a context binary's wrapper.
    """
    if model.context:
        raise ModelError(
            f"{model.path}: this is the wrapper of a context binary, which can't be judged alone: load the model that it "
            "was made from, with artifact=... naming this file"
        )
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
            raise ModelError(f"{model.path}: input {spec.describe()} has no elements: QNN crashes on such shapes")
    return model


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
        a == b or isinstance(a, str) or isinstance(b, str) for a, b in zip(spec.shape, other.shape, strict=True)
    )
    same_type = spec.dtype == other.dtype or (spec.encoding is not None and other.dtype == "float32")
    return same_shape and same_type
