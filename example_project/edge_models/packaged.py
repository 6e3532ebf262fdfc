"""Files that installed packages ship."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def packaged_file(package: str, *parts: str) -> Path:
    """Path of a file inside an installed package, which isn't imported for it.

    Raises:
        FileNotFoundError: the package is not installed, or has no such file.
    """
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:  # the parent of a dotted name is missing
        spec = None
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"package {package} is not installed: run `pip install -r requirements.txt`")
    file = Path(spec.origin).parent.joinpath(*parts)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: is this the release of {package} that requirements.txt names?")
    return file
