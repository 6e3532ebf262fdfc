"""A device that several tests use, each of which finds it as it was."""

from __future__ import annotations

import filecmp
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_qnn.testing import LoopbackDevice

_WORKING = ("data/local/tmp", "var/tmp", "tmp")  # emptied
_GIVEN = ("system", "bin", "vendor", "sys", "run", "etc")  # restored


@contextmanager
def as_before(device: LoopbackDevice) -> Iterator[LoopbackDevice]:
    """Restore a device's files at the end, take its faults away, and connect it again if it was dropped."""
    root = Path(device.root)
    with tempfile.TemporaryDirectory() as kept:
        for name in _GIVEN:
            if (root / name).is_dir() and not (root / name).is_symlink():
                shutil.copytree(root / name, Path(kept, name), symlinks=True)
        try:
            yield device
        finally:
            device.faults()
            for name in _WORKING:
                for path in (root / name).glob("*"):
                    _remove(path)
            _restore(Path(kept), root)


def on_host(device: LoopbackDevice, path: str) -> Path:
    """Where a path that the device told is on this host."""
    return Path(path) if path.startswith(f"{device.root}/") else device.path(path)


def _restore(kept: Path, place: Path) -> None:
    """Make the files of ``kept`` and no others be in the folders of ``place`` that ``kept`` has."""
    for entry in kept.iterdir():
        there = place / entry.name
        if entry.is_dir() and not entry.is_symlink():
            if there.is_symlink() or not there.is_dir():
                _remove(there)
                shutil.copytree(entry, there, symlinks=True)
                continue
            for extra in {path.name for path in there.iterdir()} - {path.name for path in entry.iterdir()}:
                _remove(there / extra)
            _restore(entry, there)
        elif entry.is_symlink():
            if not there.is_symlink() or there.readlink() != entry.readlink():
                _remove(there)
                there.symlink_to(entry.readlink())
        elif there.is_symlink() or not there.is_file() or not filecmp.cmp(entry, there, shallow=False):
            _remove(there)
            shutil.copy2(entry, there)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
