"""An artifact that somebody else built, as a user names it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".bin", ".so", ".dlc")


@dataclass(frozen=True)
class ForeignArtifact:
    """A context binary (``.bin``), model library (``.so``) or DLC that pytest-qnn did not make.

    A model library or DLC is compiled to a context binary by the SDK's own generator (``QNN_SDK_ROOT``).

    Attributes:
        path: the file.
        graph: which of its graphs; needed if there are several.
        names: the model's tensor name -> the artifact's, where the two can't be matched otherwise.
        layouts: the model's tensor name -> "same", "channels_last" or "channels_first", where sizes can't tell.
    """

    path: str | os.PathLike[str]
    graph: str | None = None
    names: Mapping[str, str] | None = None
    layouts: Mapping[str, str] | None = None

    @property
    def suffix(self) -> str:
        """Of the file, e.g. ".bin"."""
        return Path(self.path).suffix.lower()
