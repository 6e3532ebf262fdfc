"""A device that several tests use, each of which finds it as it was."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_qnn.devices.facts import probe
from pytest_qnn.devices.transport import Transport
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.testing.loopback import python_environment

_WORKING = ("data/local/tmp", "var/tmp", "tmp")  # emptied
_GIVEN = ("system", "bin", "vendor", "sys", "run", "etc")  # restored


@contextmanager
def as_before(device: LoopbackDevice) -> Iterator[LoopbackDevice]:
    """Restore a device's files at the end, take its faults away, and connect it again if it was dropped."""
    root, kept = Path(device.root), device.folder / "kept"
    for name in () if kept.exists() else _GIVEN:
        if (root / name).is_dir() and not (root / name).is_symlink():
            shutil.copytree(root / name, kept / name, symlinks=True)
    try:
        yield device
    finally:
        device.faults()
        # this host's folders that a board shows: to remove where one is mounted would take it away, for all later tests
        shown = {Path(folder) for folder in python_environment.shown()}
        for name in _WORKING:
            for path in (root / name).glob("*"):
                if not any(folder.is_relative_to(Path("/", name, path.name)) for folder in shown):
                    _remove(path)
        _restore(kept, root)


def on_host(device: LoopbackDevice, path: str) -> Path:
    """Where a path that the device told is on this host."""
    return Path(path) if path.startswith(f"{device.root}/") else device.path(path)


_folders: dict[str, str] = {}


def folder_on(device: LoopbackDevice, transport: Transport) -> str:
    """The folder for our files on a device, as the device tells it; asked once."""
    if device.address not in _folders:
        _folders[device.address] = probe(transport).folder
    on_host(device, _folders[device.address]).mkdir(exist_ok=True)
    return _folders[device.address]


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
        elif there.is_symlink() or not there.is_file() or not filecmp.cmp(entry, there):
            _remove(there)
            shutil.copy2(entry, there)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
