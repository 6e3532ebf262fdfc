"""Versions of installed packages, read once: importlib.metadata parses a file on every call, which takes over a millisecond."""

from __future__ import annotations

import functools
from importlib import metadata


@functools.cache
def installed_version(package: str) -> str:
    """The version of a package that is installed.

    Raises:
        importlib.metadata.PackageNotFoundError: it isn't.
    """
    return metadata.version(package)
