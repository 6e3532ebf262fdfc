"""Python on a device: an environment with this host's packages, and without whatever a test wants to be missing."""

from __future__ import annotations

import os
import re
import site
import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path

PREFIX = "/opt/python"
_OURS = re.compile(
    r"(__editable__.*)?pytest[_.-]qnn", re.I
)  # a device doesn't have us: what runs there must need no more


def make(root: Path, missing: Collection[str] | None) -> str:
    """Make a virtual environment below a device's root, of links to the packages that this interpreter sees.

    Args:
        missing: distributions to leave out, e.g. ["onnxruntime-qnn"]; None for an environment without any package.

    Returns:
        The interpreter's path on the device.
    """
    base = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    prefix = root / PREFIX.lstrip("/")
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = prefix / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (prefix / "bin").mkdir()
    for name in ("python3", "python", version):
        (prefix / "bin" / name).symlink_to(base)
    (prefix / "pyvenv.cfg").write_text(f"home = {os.path.dirname(base)}\ninclude-system-site-packages = false\n")
    if missing is not None:
        left_out = {_plain(name) for name in missing}
        for folder in _package_folders():
            for entry in sorted(os.listdir(folder)):
                name = _plain(re.split(r"-\d|\.(?:py|so|pth|libs|dist-info|egg-info)", entry)[0])
                place = packages / entry
                if name not in left_out and not _OURS.match(entry) and not os.path.lexists(place):
                    place.symlink_to(os.path.join(folder, entry))
    return f"{PREFIX}/bin/python3"


def shown() -> list[str]:
    """Folders of this host that Python and its packages need, and this project; none inside of another, none below /usr."""
    here = Path(__file__).resolve().parents[2]
    wanted = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    wanted |= {
        *_package_folders(),
        str(here),
        *(path for path in sys.path if path.endswith(("-packages", "lib-dynload"))),
    }
    for scheme in ("stdlib", "platstdlib"):
        wanted.add(sysconfig.get_path(scheme))
    folders: list[str] = []
    for path in sorted({os.path.abspath(path) for path in wanted} | {os.path.realpath(path) for path in wanted}):
        inside = path == "/usr" or path.startswith("/usr/") or any(path.startswith(f + "/") for f in folders)
        if not inside and path != "/" and os.path.isdir(path):
            folders.append(path)
    return folders


def _package_folders() -> list[str]:
    places = [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and os.path.isdir(path)]
    places += [path for path in site.getsitepackages() if os.path.isdir(path)]
    return list(dict.fromkeys(places))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
