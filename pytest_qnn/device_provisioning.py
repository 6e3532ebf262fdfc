"""A model on a device: compiled here and sent there, or as somebody else made it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qnn.artifacts.binary import (
    ContextInfo,
    GraphInfo,
    TensorInfo,
    check_runs_on,
    read_context_binary,
    release_of,
)
from pytest_qnn.artifacts.context import Manifest, read_artifact
from pytest_qnn.artifacts.context_cache import WRAPPER, Context
from pytest_qnn.artifacts.foreign import ForeignArtifact
from pytest_qnn.artifacts.matching import FLOATS, Edge, Match, axes_of, converted_name, match_tensors
from pytest_qnn.artifacts.unwrap import unwrap
from pytest_qnn.devices.runtime_files import RuntimeFiles
from pytest_qnn.errors import ArtifactError, BackendUnavailableError, CompileError, OptionError, PlacementError
from pytest_qnn.model.onnx_file import Model, file_digest
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.provisioning import Artifact, Order, Provisioned, compile_order, explained, keep_context
from pytest_qnn.recording import Recording, Replay
from pytest_qnn.runners.compiler import place
from pytest_qnn.runners.net_run.command import Executable, runtime_for
from pytest_qnn.runners.net_run.model import NetRunModel
from pytest_qnn.runners.on_device import DeviceModel
from pytest_qnn.runners.ort import LoadRequest
from pytest_qnn.runners.placement import Placement
from pytest_qnn.sdk.tool import check_record
from pytest_qnn.settings import unknown_name

if TYPE_CHECKING:
    from pytest_qnn.devices.attached import AttachedDevice


def attached(order: Order) -> AttachedDevice:
    """The device of an order's plan."""
    from pytest_qnn.targets.adb import AdbTarget

    target = order.bench.target
    assert isinstance(target, AdbTarget)
    return target.attached(order.plan.serial)


# --- recorded artifacts -----------------------------------------------------------------------------------------------


def _tape_key(order: Order) -> str:
    """What decides a compiled model but for the compiler: who replays may have another."""
    return replace(order.recipe, onnxruntime="", onnxruntime_qnn="").key


def recorded_context(order: Order) -> Context | None:
    """The compiled model out of the recording that is replayed; None if nothing is replayed.

    Raises:
        ReplayError: it isn't in there.
    """
    tape = order.bench.target.tape
    if not isinstance(tape, Replay):
        return None
    folder = order.bench.folder() / "context"
    tape.artifact(_tape_key(order), folder)
    return Context(folder / WRAPPER, read_artifact(folder / WRAPPER))


def record_context(order: Order, context: Context) -> None:
    """Keep a compiled model with the session that is recorded, if one is."""
    tape = order.bench.target.tape
    if isinstance(tape, Recording):
        tape.keep_artifact(_tape_key(order), context.wrapper.parent)


def _recorded_runtime(order: Order, needs: str, find: Callable[[], RuntimeFiles]) -> RuntimeFiles:
    """The runtime's files, which a replay takes out of the recording."""
    tape, key = order.bench.target.tape, f"runtime for {order.plan.backend}, {needs}"
    if isinstance(tape, Replay):
        folder = order.bench.folder() / "runtime"
        tape.artifact(key, folder)
        return RuntimeFiles.from_folder(folder)
    runtime = find()
    if isinstance(tape, Recording):
        folder = order.bench.folder() / "runtime"
        runtime.to_folder(folder)
        tape.keep_artifact(key, folder)
        runtime = replace(
            RuntimeFiles.from_folder(folder), origin=runtime.origin
        )  # in the order in which a replay has it
    return runtime


# --- onnxruntime on the device ----------------------------------------------------------------------------------------


def load_on_device(order: Order, request: LoadRequest, prepare: Callable[[], LoadRequest | None]) -> DeviceModel:
    """Load into onnxruntime on the device; files go there unless they are there already.

    Raises:
        CompileError, ModelError, TargetError: as for :func:`pytest_qnn.provisioning.provide`.
    """
    from pytest_qnn.runners.device_ort import DeviceOrtModel

    device, plan = attached(order), order.plan
    agents = order.bench.agents(device)

    def there(asked: LoadRequest) -> LoadRequest:
        # not the host's process: a replay compiles nothing, and has none
        return replace(asked, process=f"{plan.backend} on {plan.serial}", provider_options=plan.device_options)

    def again() -> LoadRequest | None:
        asked = prepare()
        return None if asked is None else there(asked)

    def load() -> DeviceOrtModel:
        return DeviceOrtModel(agents, there(request), order.subject, order.limits, again)

    key = ("ort", plan.serial, there(request), order.subject, order.limits)
    return order.bench.share_on_device(key, lambda: DeviceModel(device, order.subject, load))


# --- qnn-net-run ------------------------------------------------------------------------------------------------------


def provide_net_run(order: Order) -> Provisioned:
    """Compile a model here, for qnn-net-run on the device.

    Raises:
        BackendUnavailableError: nothing here compiles for that backend.
        CompileError: the compiler refused the model.
        PlacementError: parts of the model would not run on the backend: qnn-net-run runs whole models only.
        TargetError: the device or a tool failed.
    """
    plan = order.plan
    if plan.backend != "htp":
        return _library_of(order)
    if not plan.has_contexts:
        raise BackendUnavailableError(
            f"{order.subject}: nothing on this host compiles for the HTP: install 'pytest-qnn[sim]' (x86-64 Linux), or load "
            "what was compiled elsewhere with artifact="
        )
    try:
        context, source = keep_context(order) or (_compile_apart(order), "compiled")
    except CompileError as error:
        raise explained(order, error) from error
    return run_context(order, context, source)


def _compile_apart(order: Order) -> Context:
    """A context outside of the cache, which is off or can't be used."""
    wrapper = order.bench.folder() / WRAPPER
    order.bench.artifacts["compiled"] += 1
    context = Context(wrapper, compile_order(order, wrapper))
    record_context(order, context)
    return context


def run_context(order: Order, context: Context, source: str) -> Provisioned:
    """A context binary that pytest-qnn compiled, for qnn-net-run.

    Raises:
        ArtifactError: its files were altered, or the device's runtime is older than what compiled it.
        PlacementError, TargetError: as for :func:`provide_net_run`.
    """
    manifest, model = context.manifest, order.model
    manifest.check_files(context.wrapper)
    placement = place(model, order.plan.backend, manifest.placement, manifest.reasons)
    _check_whole(order, manifest, placement)
    info, match = unwrap(context.wrapper, model, order.bench.folder())
    executable = Executable("context binary", info.path, manifest.binary_sha256)
    runtime = _runtime(order, executable, match.graph.name)
    notes = _check_release(order, info, runtime)
    loaded = _net_run(order, executable, match, runtime)
    artifact = Artifact(
        "context binary",
        source,
        manifest.binary_sha256,
        str(context.wrapper),
        manifest.binary_size,
        manifest.partitions,
    )
    return Provisioned(loaded, placement, artifact, (*notes, *match.notes))


def _check_whole(order: Order, manifest: Manifest, placement: Placement) -> None:
    if not placement.misplaced and manifest.partitions == 1:
        return
    lines = [
        f"{order.subject}: qnn-net-run runs whole models only, and of this one {len(placement.misplaced)} of "
        f"{placement.total} nodes don't run on {order.plan.backend} ({manifest.partitions} graphs): change the model, or run it "
        "with onnxruntime on the device (runner = ort)"
    ]
    lines += [f"  {node}" for node in placement.misplaced[:10]]
    raise PlacementError("\n".join(lines), placement)


def _check_release(order: Order, info: ContextInfo, runtime: RuntimeFiles) -> tuple[str, ...]:
    """The device's runtime can't load what a newer release compiled."""
    known = release_of(runtime.version)
    if known and info.release and info.release > known:
        raise ArtifactError(
            f"{order.subject}: compiled by QNN {info.build_id}, newer than the device's runtime {runtime.version}: use a newer "
            "runtime (device_runtime), or compile with an older onnxruntime-qnn or SDK"
        )
    return () if known else (f"the release of the QNN runtime for {order.plan.serial} is unknown",)


def _net_run(
    order: Order, executable: Executable, match: Match, runtime: RuntimeFiles, io: str = "native"
) -> DeviceModel:
    device, plan = attached(order), order.plan

    def load() -> NetRunModel:
        return NetRunModel(device, executable, match, runtime, plan, order.subject, order.limits, io)

    key = ("net_run", plan.serial, executable, plan.options, io, order.subject, order.limits)
    return order.bench.share_on_device(key, lambda: DeviceModel(device, order.subject, load))


def _runtime(order: Order, executable: Executable, graph: str) -> RuntimeFiles:
    facts, folder = attached(order).facts, order.bench.settings.device_runtime
    needs = f"{executable.kind}, {sorted(order.plan.options)}"
    return _recorded_runtime(order, needs, lambda: runtime_for(facts, order.plan, executable, graph, folder))


# --- what somebody else made, for qnn-net-run -------------------------------------------------------------------------


def provide_foreign_net_run(order: Order, foreign: ForeignArtifact, notes: Iterable[str]) -> Provisioned:
    """A context binary, a model library built for the device, or a DLC, for qnn-net-run.

    Raises:
        ArtifactError: it is no such artifact, was made for something else, or doesn't fit the model.
        OptionError: ``names`` or ``layouts`` makes no sense, or a layout that must be told isn't.
        TargetError: the device failed.
    """
    file, told = Path(foreign.path), list(notes)
    if foreign.suffix == ".bin":
        assert order.plan.soc is not None or order.plan.backend != "htp"
        info = read_context_binary(file)
        if order.plan.soc is None or order.plan.backend != "htp":
            raise ArtifactError(
                f"{file}: context binaries are for htp, not for {order.plan.backend}: take a model library or DLC"
            )
        told += check_runs_on(info, order.plan.soc)
        match = match_tensors(info, order.model, graph=foreign.graph, names=foreign.names, layouts=foreign.layouts)
        executable = Executable("context binary", file, info.sha256)
        runtime = _runtime(order, executable, match.graph.name)
        told += _check_release(order, info, runtime)
        loaded = _net_run(order, executable, match, runtime)
        edges = (*match.inputs, *match.outputs)
        quantizes = any(e.tensor.encoding is not None and e.spec.encoding is None for e in edges)
        kind, digest = "foreign context binary", info.sha256
    else:
        executable = replace(Executable.of(file), sha256=file_digest(file))
        match = declared_match(order.model, foreign)
        runtime = _runtime(order, executable, match.graph.name)
        loaded = _net_run(order, executable, match, runtime, "float")
        told.append(f"what {file.name} computes in isn't known: its files are float32, whatever it quantises inside")
        quantizes, kind, digest = order.model.quantized, f"foreign {executable.kind}", executable.sha256
    artifact = Artifact(kind, "given", digest, str(file), file.stat().st_size, 1, quantizes=quantizes)
    placement = Placement(1, {match.graph.name: order.plan.backend}, (), ())
    return Provisioned(loaded, placement, artifact, (*told, *match.notes))


def declared_match(model: Model, foreign: ForeignArtifact) -> Match:
    """The tensors of a model library or DLC, which nothing on this host can read: as the model has them, and as declared.

    Names are the model's as the SDK's converters write them, unless ``names`` says otherwise. Elements are float32, or the
    model's own where those are no floats. The order of axes must be declared where there are three or more.

    Raises:
        OptionError: a name or layout is unknown, or a layout that must be told isn't.
    """
    names, layouts = foreign.names or {}, foreign.layouts or {}
    known = [spec.name for spec in (*model.inputs, *model.outputs)]
    for option, given in (("names", names), ("layouts", layouts)):
        for name in given:
            if name not in known:
                raise OptionError(f"{option}: {unknown_name('tensor of the model', name, known)}")

    def edge(spec: TensorSpec) -> Edge:
        if spec.unbound:
            raise OptionError(f"{model.path.name}: {spec.describe()} has open sizes: give them with dimensions=")
        shape = tuple(int(size) for size in spec.shape)
        layout = layouts.get(spec.name, "same" if len(shape) < 3 else "")
        if not layout:
            raise OptionError(
                f"{Path(foreign.path).name}: the order of the axes of {spec.name!r} {list(shape)} isn't known, and a wrong one runs "
                f"all the same: say layouts={{{spec.name!r}: 'same'}} (kept as in the model, --preserve_io) or 'channels_last'"
            )
        order = axes_of(layout, len(shape))
        dtype = "float32" if spec.dtype in FLOATS else spec.dtype
        stored = shape if order is None else tuple(shape[axis] for axis in order)
        tensor = TensorInfo(names.get(spec.name, converted_name(spec.name)), dtype.upper(), dtype, stored)
        return Edge(spec, tensor, layout, order, "declared")

    inputs, outputs = tuple(map(edge, model.inputs)), tuple(map(edge, model.outputs))
    name = foreign.graph or Path(foreign.path).stem.removeprefix("lib")
    return Match(GraphInfo(name, tuple(e.tensor for e in inputs), tuple(e.tensor for e in outputs)), inputs, outputs)


def _library_of(order: Order) -> Provisioned:
    """A model library for a backend that only the SDK's tools build for."""
    facts, subject = attached(order).facts, order.subject
    if not os.environ.get("QNN_SDK_ROOT") or facts.os != "android":
        raise BackendUnavailableError(
            f"{subject}: {order.plan.backend} on a device takes a model library or DLC, and nothing here makes one: set QNN_SDK_ROOT "
            "(Android, with the NDK), or build it elsewhere and load it with artifact="
        )
    from pytest_qnn.sdk import find_sdk
    from pytest_qnn.sdk.conversion import convert
    from pytest_qnn.sdk.installation import ANDROID
    from pytest_qnn.sdk.library import build_library

    sdk, folder = find_sdk(), order.bench.folder()
    model, seconds = order.model, order.limits.load_seconds
    converted = convert(sdk, model.path, folder, dimensions=dict(model.dimensions), timeout=seconds)
    library = build_library(sdk, converted.cpp, folder, weights=converted.weights, target=ANDROID, timeout=seconds)
    order.bench.artifacts["compiled"] += 1
    layouts = {spec.name: "same" for spec in (*model.inputs, *model.outputs)}
    foreign = ForeignArtifact(library.path, graph=converted.graph, layouts=layouts)
    made = provide_foreign_net_run(order, foreign, (f"built by {check_record(library.path)}",))
    kind = "model library"
    return replace(made, artifact=replace(made.artifact, kind=kind, source="compiled", quantizes=False))
