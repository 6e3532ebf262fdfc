"""What a model is turned into, and the caches that keep results by content."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qnn.artifacts.binary import ContextInfo, read_context_binary
    from pytest_qnn.artifacts.export import Exported, export_binary
    from pytest_qnn.artifacts.foreign import ForeignArtifact

__all__ = ["ContextInfo", "Exported", "ForeignArtifact", "export_binary", "read_context_binary"]

_HOME = {
    "ContextInfo": "binary",
    "read_context_binary": "binary",
    "Exported": "export",
    "export_binary": "export",
    "ForeignArtifact": "foreign",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
