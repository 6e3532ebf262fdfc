"""A backend as a test sees it: something to load models on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qnn.artifacts.context import copy_to, manifest_file, read_artifact
from pytest_qnn.artifacts.context_cache import Context
from pytest_qnn.artifacts.foreign import SUFFIXES, ForeignArtifact
from pytest_qnn.devices.soc import find_soc
from pytest_qnn.errors import ArtifactError, CompileError, ModelError, OptionError, UsageError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.onnx_file import Model, read_model
from pytest_qnn.model.pair import read_pair, usable
from pytest_qnn.provisioning import (
    Order,
    Provisioned,
    compile_order,
    explained,
    keep_context,
    provide,
    provide_foreign,
    provide_given,
)
from pytest_qnn.runners.placement import Placement
from pytest_qnn.runners.process import Limits
from pytest_qnn.session import Session
from pytest_qnn.settings import unknown_name
from pytest_qnn.targets.options import check_options
from pytest_qnn.targets.target import Plan
from pytest_qnn.work_folder import work_folder

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
        return self.bench.target.soc_of(self.name, self._request.soc, self._request.serial)

    def load(
        self,
        model: FilePath,
        *,
        float_model: FilePath | None = None,
        dimensions: Mapping[str, int] | None = None,
        artifact: FilePath | ForeignArtifact | None = None,
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
            artifact: runs in place of a fresh compile, once it is checked: what :meth:`compile` made from ``model``; or what
                somebody else made from it, a context binary (``.bin``), model library (``.so``) or DLC. Where the latter needs
                explaining, a :class:`~pytest_qnn.artifacts.ForeignArtifact`.
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
        asked, original = read_pair(
            self.bench.locate(model), None if float_model is None else self.bench.locate(float_model), dimensions
        )
        executed, notes = self._executed(plan, asked, original)
        subject = f"{asked.path.name} on {self.name} ({plan.place})"
        order = Order(self.bench, plan, executed, subject, limits)
        if artifact is None:
            provided = provide(order)
        else:
            provided = self._provide_given(order, artifact)
        in_float = self.bench.float_precision(plan)
        unquantized = "quantized" if provided.artifact.quantizes else in_float.name  # somebody else's converter did it
        return Session(
            self.bench,
            plan,
            provided.loaded,
            model=asked,
            float_model=original,
            executed=executed,
            placement=provided.placement,
            precision=executed.precision if executed.quantized else unquantized,
            unquantized_precision=in_float.name,
            artifact=provided.artifact,
            allow_cpu=_allowed(allow_cpu, provided.placement, executed),
            notes=(*notes, *provided.notes, *([in_float.note] if in_float.note else [])),
            sampler=self.bench.target.sampler(plan.serial) if plan.serial else None,
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
        if not plan.has_contexts:
            raise UsageError(f"context binaries are for htp, not for {plan.backend}")
        source = usable(read_model(self.bench.locate(model), dimensions))
        subject = f"{source.path.name} on {self.name} ({plan.place})"
        order = Order(self.bench, plan, source, subject, self._limits(load_timeout, None))
        folder = Path(output).expanduser().absolute()
        stem = f"{source.path.name.removesuffix('.onnx')}.{plan.soc.name if plan.soc else plan.backend}"
        try:
            with suppress(CompileError, ModelError, FileNotFoundError):
                # refused: said below, where it is compiled without the cache; gone: pruned at this moment
                if kept := keep_context(order):
                    return copy_to(kept[0].wrapper, kept[0].manifest, folder, stem)
            folder.mkdir(parents=True, exist_ok=True)
            with work_folder(folder) as work:
                wrapper = work / "model.ctx.onnx"
                self.bench.artifacts["compiled"] += 1
                return copy_to(wrapper, compile_order(order, wrapper), folder, stem)
        except CompileError as error:
            raise explained(order, error) from error
        except OSError as error:
            raise ArtifactError(f"{folder}: can't be written: {error.strerror or error}") from error

    def _provide_given(self, order: Order, artifact: FilePath | ForeignArtifact) -> Provisioned:
        foreign = artifact if isinstance(artifact, ForeignArtifact) else ForeignArtifact(artifact)
        file = self.bench.locate(foreign.path)
        if not file.is_file():
            raise ArtifactError(
                f"{file}: there is no such file: correct the path, or make it with 'pytest-qnn compile'"
            )
        whole = order.plan.runner == "net_run" and foreign.suffix in (".so", ".dlc")  # these run on every backend
        if order.plan.backend != "htp" and not whole:
            raise UsageError(
                f"artifact={file.name}: context binaries are for htp, this is {self.name}"
                + (": it takes a model library (.so) or a DLC" if order.plan.runner == "net_run" else "")
            )
        ours = file.with_name(f"{file.stem}.ctx.onnx")
        if foreign.suffix == ".bin" and manifest_file(ours).is_file():  # its manifest knows more than it tells itself
            return provide_given(order, Context(ours, read_artifact(ours)))
        if foreign.suffix in SUFFIXES:
            return provide_foreign(order, replace(foreign, path=file), self.bench.folder())
        if isinstance(artifact, ForeignArtifact):
            raise ArtifactError(
                f"{file}: a foreign artifact must be a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"
            )
        return provide_given(order, Context(file, read_artifact(file)))

    def _plan(self, options: dict[str, object]) -> Plan:
        self.bench.test.check(self._request)
        soc = options.pop("soc", None)
        if soc is not None and self._request.pinned and find_soc(str(soc)).name != self._request.soc:
            raise OptionError(f"soc={soc!r} contradicts the test's device mark, which asks for {self._request.soc}")
        soc = self._request.soc if soc is None else soc
        merged = {**dict(self._request.options), **check_options(self.name, options)}
        return self.bench.target.plan(self.name, None if soc is None else str(soc), merged, self._request.serial)

    def _limits(self, load_timeout: float | None, run_timeout: float | None) -> Limits:
        default = self.bench.limits
        return Limits(
            _seconds("load_timeout", load_timeout, default.load_seconds),
            _seconds("run_timeout", run_timeout, default.run_seconds),
            default.memory_mib,
        )

    def _executed(self, plan: Plan, asked: Model, original: Model | None) -> tuple[Model, tuple[str, ...]]:
        """The model that really runs, and what a record must say of that."""
        if not (plan.float_only and asked.quantized):
            if asked.quantized and original is None:
                return asked, (f"{asked.path.name} was given no float_model: a wrong calibration of it can't be seen",)
            return asked, ()
        if original is None:
            raise UsageError(
                f"{asked.path.name} is quantised, and QNN's {self.name} backend computes in float only (it refuses "
                "quantised operators, which would then run elsewhere): pass float_model= with the float original, or "
                f"leave {self.name!r} out"
            )
        note = f"QNN {self.name} computes in float only: the float model ran in place of the QDQ model"
        return usable(original), (note,)


def _seconds(name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise OptionError(f"{name} must be a number of seconds greater than 0, got {value!r}")
    return float(value)


def _allowed(allow_cpu: bool | Iterable[str], placement: Placement, model: Model) -> bool | frozenset[str]:
    if isinstance(allow_cpu, bool):
        return allow_cpu
    names = list(allow_cpu) if isinstance(allow_cpu, Iterable) and not isinstance(allow_cpu, str) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise OptionError(
            f"allow_cpu takes True or a list of operators or node names, got {allow_cpu!r}: put them in a list"
        )
    known = {text for node in model.nodes for text in node if text} | set(placement.nodes)
    for name in names:
        if name not in known:
            raise OptionError(f"allow_cpu: {unknown_name('operator or node', name, known)[:300]}")
    return frozenset(names)
