"""A model on a device: compiled here and sent there, or as somebody else made it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qnn.artifacts.binary import (
    ContextInfo,
    GraphInfo,
    TensorInfo,
    check_runs_on,
    read_context_binary,
    runtime_release,
)
from pytest_qnn.artifacts.context import Manifest
from pytest_qnn.artifacts.context_cache import WRAPPER, Context
from pytest_qnn.artifacts.foreign import ForeignArtifact
from pytest_qnn.artifacts.matching import Edge, Match, converted_name, match_tensors
from pytest_qnn.artifacts.unwrap import unwrap
from pytest_qnn.errors import ArtifactError, BackendUnavailableError, CompileError, OptionError, PlacementError
from pytest_qnn.model.onnx_file import file_digest
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.provisioning import Artifact, Order, Provisioned, compile_order, explained, keep_context
from pytest_qnn.runners.compiler import place
from pytest_qnn.runners.net_run.model import NetRunModel
from pytest_qnn.runners.on_device import DeviceModel
from pytest_qnn.runners.ort import LoadRequest
from pytest_qnn.runners.placement import Placement

if TYPE_CHECKING:
    from pytest_qnn.devices.attached import AttachedDevice

FLOATS = ("float32", "float16", "float64")


def attached(order: Order) -> AttachedDevice:
    """The device of an order's plan."""
    from pytest_qnn.targets.adb import AdbTarget

    target = order.bench.target
    assert isinstance(target, AdbTarget)
    return target.attached(order.plan.serial)


# --- onnxruntime on the device ----------------------------------------------------------------------------------------


def load_on_device(order: Order, request: LoadRequest, prepare: Callable[[], LoadRequest | None]) -> DeviceModel:
    """Load into onnxruntime on the device; files go there unless they are there already.

    Raises:
        CompileError, ModelError, TargetError: as for :func:`pytest_qnn.provisioning.provide`.
    """
    from pytest_qnn.runners.device_ort import DeviceOrtModel

    device, plan = attached(order), order.plan

    def load() -> DeviceOrtModel:
        chosen = replace(
            prepare() or request, process=f"agent on {plan.serial}", provider_options=plan.device_options
        )
        return DeviceOrtModel(device, chosen, order.subject, order.limits)

    key = ("ort", plan.serial, replace(request, provider_options=plan.device_options), order.subject, order.limits)
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
    return Context(wrapper, compile_order(order, wrapper))


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
    notes = _check_release(order, info)
    loaded = _net_run(order, "context binary", info.path, match)
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


def _check_release(order: Order, info: ContextInfo) -> tuple[str, ...]:
    """The device's runtime can't load what a newer release compiled."""
    from pytest_qnn.artifacts.binary import release_of

    theirs = _runtime(order).version
    known = release_of(theirs)
    if known and info.release and info.release > known:
        raise ArtifactError(
            f"{order.subject}: compiled by QNN {info.build_id}, newer than the device's runtime {theirs}: push a newer runtime "
            "(device_runtime), or compile with an older onnxruntime-qnn or SDK"
        )
    return () if known else (f"the release of the QNN runtime for {order.plan.serial} is unknown",)
