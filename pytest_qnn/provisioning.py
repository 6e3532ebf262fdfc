"""From a model to something loaded on a backend: out of the cache of compiled models, compiled for it, or as it was given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qnn.artifacts.binary import check_runs_on, read_context_binary
from pytest_qnn.artifacts.context import Manifest, Recipe
from pytest_qnn.artifacts.context_cache import WRAPPER, Context
from pytest_qnn.artifacts.foreign import ForeignArtifact
from pytest_qnn.artifacts.wrapper import EDGE_OPERATORS, wrap
from pytest_qnn.errors import ArtifactError, CompileError, PlacementError
from pytest_qnn.model.onnx_file import Model
from pytest_qnn.runners.compiler import NothingPlacedError, compile_context, explain, place, qnn_request
from pytest_qnn.runners.loaded import Loaded, LoadedOnnx
from pytest_qnn.runners.ort import QNN, LoadRequest
from pytest_qnn.runners.placement import Placement
from pytest_qnn.runners.process import Limits
from pytest_qnn.sdk.tool import check_record
from pytest_qnn.targets.options import compile_options
from pytest_qnn.targets.target import Plan

PROBE = "precision probe"

if TYPE_CHECKING:
    from pytest_qnn.bench import Bench


@dataclass(frozen=True)
class Artifact:
    """What a session executes.

    Attributes:
        kind: "context binary", "foreign context binary" (somebody else's), or "compiled in memory".
        source: "compiled" (just now), "cache", "recording" (replayed), or "given".
        digest: SHA-256 of the binary; of what is compiled in memory, over everything that decides it.
        path: file of a context binary's wrapper.
        size: of the binary, in bytes.
        partitions: number of graphs that the backend got; None where that isn't known.
        quantizes: whether it quantises inputs or outputs that the model has in float: somebody else's converter did.
    """

    kind: str
    source: str
    digest: str
    path: str | None = None
    size: int | None = None
    partitions: int | None = None
    quantizes: bool = False


@dataclass(frozen=True)
class Provisioned:
    """A loaded artifact, and where the nodes of its model run; ``notes``: what was taken for granted."""

    loaded: Loaded
    placement: Placement
    artifact: Artifact
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Order:
    """What is to be provided: a model on a backend, under limits. ``subject`` is for messages."""

    bench: Bench
    plan: Plan
    model: Model
    subject: str
    limits: Limits

    @property
    def recipe(self) -> Recipe:
        """Everything that decides the artifact."""
        plan = self.plan
        return Recipe(
            model_sha256=self.model.digest,
            dimensions=dict(self.model.dimensions),
            backend=plan.backend,
            soc=plan.soc.name if plan.soc else "",
            options=compile_options(plan.backend, dict(plan.options)),
            onnxruntime=self.bench.versions["onnxruntime"],
            onnxruntime_qnn=plan.versions.get("onnxruntime_qnn", ""),
        )

    @property
    def request(self) -> LoadRequest:
        """How the model itself is loaded."""
        request = qnn_request(self.model, self.plan.process, self.plan.provider_options)
        return replace(request, run_options=self.plan.run_options)

    def load(self, request: LoadRequest, prepare: Callable[[], LoadRequest | None] = lambda: None) -> LoadedOnnx:
        """Load into onnxruntime where the plan says: in a process here, or on a device.

        Args:
            prepare: see :class:`~pytest_qnn.runners.ort.LoadedModel`.

        Raises:
            CompileError, ModelError, TargetError: as for :func:`provide`.
        """
        if not self.plan.serial:
            return self.bench.load_shared(request, self.subject, self.limits, prepare)
        from pytest_qnn.device_provisioning import load_on_device

        return load_on_device(self, request, prepare)

    @property
    def htp_arch(self) -> int:
        """Hexagon architecture; 0 where there is none."""
        return self.plan.soc.htp_arch if self.plan.soc else 0


def provide(order: Order) -> Provisioned:
    """Load a model on a backend; a backend that has context binaries compiles it once, for all processes and runs.

    Raises:
        CompileError: the backend refused the model.
        PlacementError: none of its nodes run on the backend.
        TargetError: the runtime died, hung or ran out of memory.
    """
    bench, model = order.bench, order.model
    trouble = None
    if order.plan.runner == "net_run":
        from pytest_qnn.device_provisioning import provide_net_run

        return provide_net_run(order)
    if order.plan.has_contexts:
        try:
            if kept := keep_context(order):
                return _load_context(order, *kept, put_back=_put_back(order, kept[1]))
        except (CompileError, ArtifactError) as error:
            trouble = error  # some models load, but can't be made into a context
    try:
        loaded = order.load(order.request)
    except CompileError as error:
        raise explained(order, error) from error
    bench.artifacts["compiled" if order.plan.has_contexts else "in_memory"] += 1
    can_ask = order.plan.has_contexts or not order.plan.serial  # the reasons come from this host's runtime
    reasons = explain(bench.pool, model, order.request, loaded.info, order.subject, order.limits) if can_ask else {}
    placement = place(model, order.plan.backend, loaded.info.placement, reasons)
    if not placement.backend:
        raise _nothing_placed(order, placement, loaded.info.log)
    notes: tuple[str, ...] = ()
    if trouble is not None:
        reason = str(trouble).partition("\n")[0].removeprefix(f"{order.subject}: ")
        notes = (f"{model.path.name} can't be kept compiled, and is compiled each time: {reason[:200]}",)
    return Provisioned(loaded, placement, Artifact("compiled in memory", "compiled", order.recipe.key), notes)


def _put_back(order: Order, source: str) -> Callable[[], LoadRequest | None]:
    """Sees that the compiled model is there before it is loaded; where that can't be, the model itself is."""
    if source == "recording":
        return lambda: None
    return lambda: None if _obtain(order)[0] else order.request


def explained(order: Order, error: CompileError) -> CompileError:
    """``error``, or what it comes from: some SoCs take no float models, and the runtime's own words don't say so."""
    plan = order.plan
    if order.model.quantized or plan.soc is None or order.subject.startswith(PROBE):
        return error
    if order.bench.float_precision(plan).name != "refused":
        return error
    return CompileError(
        f"{order.subject}: {plan.soc.name} takes quantised models only, and this one is float: quantise it (pytest-qnn "
        "quantize), or take another SoC"
    )


def provide_given(order: Order, context: Context) -> Provisioned:
    """Load an artifact that :meth:`Backend.compile` made, once it is checked against what is asked for.

    Raises:
        ArtifactError: it was made from or for something else.
        TargetError: the runtime died, hung or ran out of memory.
    """
    context.manifest.check_fits(context.wrapper, order.recipe, order.htp_arch)
    if order.plan.runner == "net_run":
        from pytest_qnn.device_provisioning import run_context

        return run_context(order, context, "given")
    return _load_context(order, context, "given")


def provide_foreign(order: Order, foreign: ForeignArtifact, folder: Path) -> Provisioned:
    """Load an artifact that somebody else made from the model, once its tensors are matched with the model's.

    Args:
        folder: for the wrapper; it must last as long as what is returned.

    Raises:
        ArtifactError: it is no such artifact, was made for something else, or doesn't fit the model.
        CompileError: the SDK's generator refused a model library or DLC.
        OptionError: ``names`` or ``layouts`` makes no sense.
        TargetError: the runtime or the SDK's tool died, hung or isn't there.
    """
    plan = order.plan
    file = Path(foreign.path)
    maker = check_record(file)
    notes = [
        f"{file.name} was {f'made by {maker}' if maker else 'built elsewhere'}: its converter's faults count as the backend's"
    ]
    if plan.runner == "net_run":
        from pytest_qnn.device_provisioning import provide_foreign_net_run

        return provide_foreign_net_run(order, replace(foreign, path=file), notes)
    if plan.soc is None:
        raise ArtifactError(f"{file}: context binaries are for htp, not for {plan.backend}")
    if foreign.suffix != ".bin":
        file, told = _from_sdk(order, foreign, folder)
        notes += [f"compiled by {check_record(file)}", *told]
    info = read_context_binary(file)
    notes += check_runs_on(info, plan.soc, plan.simulated)
    wrapped = wrap(info, folder, order.model, graph=foreign.graph, names=foreign.names, layouts=foreign.layouts)
    request = replace(
        order.request, model=str(wrapped.path), files=(*order.request.files, *wrapped.files), dimensions=()
    )
    loaded = order.load(request)
    others = {operator for _, _, operator in loaded.info.placement if operator != "EPContext"}
    contexts = [provider for provider, _, operator in loaded.info.placement if operator == "EPContext"]
    if contexts != [QNN] or not others <= EDGE_OPERATORS:
        raise PlacementError(f"{order.subject}: the runtime did not take {file}: {loaded.info.placement}")
    edges = (*wrapped.match.inputs, *wrapped.match.outputs)
    return Provisioned(
        loaded,
        Placement(1, {wrapped.match.graph.name: plan.backend}, (), ()),
        Artifact(
            "foreign context binary",
            "given",
            info.sha256,
            str(file),
            info.size,
            1,
            quantizes=any(e.tensor.encoding is not None and e.spec.encoding is None for e in edges),
        ),
        (*notes, *wrapped.match.notes),
    )


def _from_sdk(order: Order, foreign: ForeignArtifact, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """A model library or DLC as a context binary, made by the SDK's generator."""
    from pytest_qnn.sdk import find_sdk, make_context

    assert order.plan.soc is not None
    made = make_context(
        find_sdk(),
        foreign.path,
        folder,
        order.plan.soc.name,
        options=compile_options("htp", dict(order.plan.options)),
        graph=foreign.graph,
        timeout=order.limits.load_seconds,
    )
    order.bench.artifacts["compiled"] += 1
    return made.path, made.notes


def keep_context(order: Order) -> tuple[Context, str] | None:
    """The compiled model, from the cache or put there now: with "cache" or "compiled". None: the cache can't be used.

    Raises:
        CompileError, ArtifactError: the backend refused the model, or it doesn't become one binary.
        PlacementError, TargetError: as for :func:`provide`.
    """
    if order.plan.serial:
        from pytest_qnn.device_provisioning import recorded_context

        if context := recorded_context(order):
            order.bench.artifacts["reused"] += 1
            return context, "recording"
    context, compiled = _obtain(order)
    if context is None:
        return None
    if not compiled:
        order.bench.artifacts["reused"] += 1
    if order.plan.serial:
        from pytest_qnn.device_provisioning import record_context

        record_context(order, context)
    return context, "compiled" if compiled else "cache"


def _obtain(order: Order) -> tuple[Context | None, bool]:
    """The compiled model in the cache, and whether it was compiled for that."""
    cache, counts = order.bench.cache.contexts, order.bench.artifacts
    made: list[Manifest] = []
    damaged = cache.damaged

    def make(folder: Path) -> None:
        folder.mkdir()
        made.append(compile_order(order, folder / WRAPPER))

    context = cache.get(order.recipe.key, make, order.limits.load_seconds)
    counts["rebuilt"] += cache.damaged - damaged
    counts["compiled"] += context is not None and bool(made)
    return context, bool(made)


def compile_order(order: Order, wrapper: Path) -> Manifest:
    """Compile what was ordered into ``wrapper``.

    Raises:
        ArtifactError: the model doesn't become one binary.
        CompileError, PlacementError, TargetError: as for :func:`provide`.
        OSError: the files can't be written.
    """
    bench = order.bench
    try:
        return compile_context(
            bench.pool,
            order.model,
            order.request,
            order.recipe,
            order.htp_arch,
            order.subject,
            order.limits,
            wrapper,
        )
    except NothingPlacedError as error:
        raise _nothing_placed(order, error.placement, error.log) from None


def _load_context(
    order: Order, context: Context, source: str, put_back: Callable[[], LoadRequest | None] | None = None
) -> Provisioned:
    """Load a compiled model; ``put_back`` is called before each load: the cache may have been pruned since, or damaged."""
    manifest = context.manifest
    request = replace(order.request, model=str(context.wrapper), dimensions=())
    if put_back is None:  # given by the user: another file of that name is another artifact
        request = replace(request, files=(*request.files, *manifest.files(context.wrapper)))

    def prepare() -> LoadRequest | None:
        if put_back is not None:
            return put_back()
        manifest.check_files(context.wrapper)
        return None

    loaded = order.load(request, prepare)
    ran = [provider for provider, _, operator in loaded.info.placement if operator == "EPContext"]
    if not ran:  # the cache's files couldn't be put back: the model itself was loaded
        placement = place(order.model, order.plan.backend, loaded.info.placement, manifest.reasons)
        if not placement.backend:
            raise _nothing_placed(order, placement, loaded.info.log)
        return Provisioned(loaded, placement, Artifact("compiled in memory", "compiled", order.recipe.key))
    if ran != [QNN] * manifest.partitions:
        raise PlacementError(
            f"{order.subject}: the runtime took {ran.count(QNN)} of the {manifest.partitions} graphs of {context.wrapper}: "
            "delete it and compile the model again"
        )
    placement = place(order.model, order.plan.backend, manifest.placement, manifest.reasons)
    return Provisioned(
        loaded,
        placement,
        Artifact(
            "context binary",
            source,
            manifest.binary_sha256,
            str(context.wrapper),
            manifest.binary_size,
            manifest.partitions,
        ),
    )


def _nothing_placed(order: Order, placement: Placement, log: Iterable[str]) -> PlacementError:
    backend = order.plan.backend
    lines = [
        f"{order.subject}: none of the model's {placement.total} nodes run on {backend}: all of them fell back to "
        "onnxruntime's CPU provider"
    ]
    lines += [f"  {node}" for node in placement.misplaced[:10]]
    lines += [f"  log: {line[:300]}" for line in log if "[E:" in line][-4:]
    return PlacementError("\n".join(lines), placement)
