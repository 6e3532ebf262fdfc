"""Compiled contexts on disk, by everything that decides them: a model is compiled once for all processes and runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_qnn.artifacts.content_cache import ContentCache, DamagedEntryError
from pytest_qnn.artifacts.context import Manifest, manifest_file, read_artifact
from pytest_qnn.errors import ArtifactError

WRAPPER = "model.ctx.onnx"


@dataclass(frozen=True)
class Context:
    """A context binary on disk: its wrapper model, and what is known of it."""

    wrapper: Path
    manifest: Manifest


class ContextCache(ContentCache[Context]):
    """A folder per context, with ``model.ctx.onnx``, its binary and its manifest. Args: the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "compiled models", _read)


def _read(entry: Path) -> Context:
    wrapper = entry / WRAPPER
    if not entry.exists():
        raise FileNotFoundError(entry)
    if not wrapper.is_file() or not manifest_file(wrapper).is_file():
        raise DamagedEntryError("files are missing")
    try:
        manifest = read_artifact(wrapper)
        if manifest.recipe.key != entry.name:
            raise DamagedEntryError("it was made for something else than its name says")
        return Context(wrapper, manifest)
    except ArtifactError as error:
        raise DamagedEntryError(str(error).partition(": compile it again")[0]) from error
