"""Compiling a model to a context binary, in a runtime process, through onnxruntime's QNN execution provider."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pytest_qnn.artifacts.context import Manifest, Recipe, finish
from pytest_qnn.errors import CompileError
from pytest_qnn.model.onnx_file import Model
from pytest_qnn.runners.ort import QNN, LoadedModel, LoadInfo, LoadRequest
from pytest_qnn.runners.placement import Placement, read_placement, refusal_reasons
from pytest_qnn.runners.process import Limits, ProcessPool

UNWRITTEN = (
    "Failed to write context cache file"  # onnxruntime's words for a disk that is full, or a folder that is locked
)


class NothingPlacedError(Exception):
    """None of a model's nodes run on the backend."""

    def __init__(self, placement: Placement, log: tuple[str, ...]) -> None:
        super().__init__(placement.describe())
        self.placement, self.log = placement, log


def compile_settings(wrapper: Path) -> tuple[tuple[str, str], ...]:
    """Session configuration entries that make onnxruntime write a context binary and its wrapper."""
    return (
        ("ep.context_enable", "1"),
        ("ep.context_file_path", str(wrapper)),
        ("ep.context_embed_mode", "0"),
    )


def compile_context(
    pool: ProcessPool,
    model: Model,
    request: LoadRequest,
    recipe: Recipe,
    htp_arch: int,
    subject: str,
    limits: Limits,
    wrapper: Path,
) -> Manifest:
    """Compile ``model`` into ``wrapper`` and a binary beside it.

    Args:
        request: how to load the model on the backend.
        recipe: what it is made from and for, to be kept with it.

    Raises:
        NothingPlacedError: the backend takes none of the nodes.
        CompileError: the backend refused the model.
        OSError: the files can't be written.
        TargetError: the runtime died, hung or ran out of memory.
    """
    try:
        loaded = LoadedModel(pool, replace(request, config=compile_settings(wrapper)), subject, limits)
    except CompileError as error:
        if UNWRITTEN in str(error):
            raise OSError(errno.EIO, "onnxruntime could not write the context binary", str(wrapper.parent)) from error
        raise
    loaded.close()
    assignment = loaded.info.placement
    reasons = explain(pool, model, request, loaded.info, subject, limits)
    placement = place(model, recipe.backend, assignment, reasons)
    if not placement.backend:
        raise NothingPlacedError(placement, loaded.info.log)
    return finish(wrapper, recipe, model.path.name, htp_arch, assignment, reasons, loaded.info.seconds)


def explain(
    pool: ProcessPool, model: Model, request: LoadRequest, info: LoadInfo, subject: str, limits: Limits
) -> Mapping[str, str]:
    """Why the backend refused nodes, by name; empty if it took all but graph-edge quantisers."""
    if not place(model, "", info.placement, {}).misplaced:
        return {}
    # the reasons stand in the verbose log only: ask for that where there is something to explain
    verbose = LoadedModel(pool, replace(request, log_severity=0), subject, limits)
    verbose.close()
    return refusal_reasons(verbose.info.log)


def place(
    model: Model, backend: str, assignment: tuple[tuple[str, str, str], ...], reasons: Mapping[str, str]
) -> Placement:
    """The placement of a model's nodes, from what onnxruntime assigned."""
    return read_placement(backend, assignment, model.edges, [name for name, _ in model.nodes], reasons)


def qnn_request(model: Model, process: str, provider_options: tuple[tuple[str, str], ...]) -> LoadRequest:
    """How to load a model on the QNN execution provider."""
    return LoadRequest(
        model=str(model.path),
        files=model.files,
        process=process,
        provider=QNN,
        provider_options=provider_options,
        dimensions=model.dimensions,
    )
