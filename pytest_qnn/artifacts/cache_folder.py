"""The folder that keeps what need not be made twice: reference results and compiled models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_qnn.artifacts.array_cache import ArrayCache
from pytest_qnn.artifacts.content_cache import ContentCache, prune
from pytest_qnn.artifacts.context_cache import ContextCache


def default_cache_folder() -> Path:
    """``pytest-qnn`` in the user's cache folder."""
    from platformdirs import user_cache_path

    return user_cache_path("pytest-qnn")


class CacheFolder:
    """Both caches.

    Args:
        folder: default: the user's cache folder.
        limit_mib: size to which :meth:`prune` brings both together.
        enabled: False: nothing is read or kept.
    """

    def __init__(self, folder: Path | None, limit_mib: float, enabled: bool = True) -> None:
        self.folder, self.limit_mib = folder or default_cache_folder(), limit_mib
        self.references = ArrayCache(self.folder / "references")
        self.contexts = ContextCache(self.folder / "contexts")
        for cache in self.kinds.values():
            cache.enabled = enabled

    @property
    def kinds(self) -> dict[str, ContentCache[Any]]:
        """The caches by name."""
        return {"references": self.references, "contexts": self.contexts}

    def prune(self) -> int:
        """Remove what was used least recently until the limit is kept; returns how many entries went."""
        return prune(list(self.kinds.values()), self.limit_mib)

    def close(self) -> None:
        """Prune, if this process added something."""
        if self.references.misses or self.contexts.misses:
            self.prune()
