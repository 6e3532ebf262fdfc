"""An installed QNN SDK (QAIRT): where its tools and libraries are, which release it is, what its tools need around them.

The layout is that of Qualcomm's public manual: host tools in ``bin/x86_64-linux-clang``, host libraries in
``lib/x86_64-linux-clang``, Python modules of the converters in ``lib/python``; the release stands in ``sdk.yaml``
(``version``, ``build_id``) and in ``include/QNN/QnnSdkBuildId.h``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pytest_qnn.errors import BackendUnavailableError

HOST = "x86_64-linux-clang"
ANDROID = "aarch64-android"
CONVERTER = "qnn-onnx-converter"
LIBRARY_GENERATOR = "qnn-model-lib-generator"
CONTEXT_GENERATOR = "qnn-context-binary-generator"
CONTEXT_UTILITY = "qnn-context-binary-utility"
NET_RUN = "qnn-net-run"
TOOLS = (CONVERTER, LIBRARY_GENERATOR, CONTEXT_GENERATOR, CONTEXT_UTILITY, NET_RUN, "qnn-profile-viewer")


@dataclass(frozen=True)
class Sdk:
    """An installed SDK.

    Attributes:
        root: its folder, as in ``QNN_SDK_ROOT``.
        version: its release, e.g. "2.51.0.260929181845"; "unknown" if it doesn't say.
        python: interpreter for those of its tools that are Python programs; None: the one that they name themselves.
    """

    root: Path
    version: str
    python: str | None = None

    @property
    def libraries(self) -> Path:
        """Folder of the host's libraries."""
        return self.root / "lib" / HOST

    @property
    def release(self) -> tuple[int, int] | None:
        """Release as numbers, e.g. (2, 51)."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(found[1]), int(found[2])) if found else None

    def tool(self, name: str) -> Path:
        """A host tool.

        Raises:
            BackendUnavailableError: it is missing or not executable.
        """
        path = self.root / "bin" / HOST / name
        if not path.is_file():
            raise BackendUnavailableError(
                f"{name}: the SDK in {self.root} has no {path.relative_to(self.root)}: install the whole SDK for x86-64 "
                "Linux, or correct QNN_SDK_ROOT"
            )
        if not os.access(path, os.X_OK):
            raise BackendUnavailableError(f"{name}: {path} is not executable: chmod +x {path}")
        return path

    def library(self, name: str) -> Path:
        """A library of the host.

        Raises:
            BackendUnavailableError: it is missing.
        """
        path = self.libraries / name
        if not path.is_file():
            raise BackendUnavailableError(
                f"{name}: the SDK in {self.root} has no lib/{HOST}/{name}: install the whole SDK, or correct QNN_SDK_ROOT"
            )
        return path

    def command(self, name: str) -> list[str]:
        """How to start a host tool.

        Raises:
            BackendUnavailableError: as for :meth:`tool`.
        """
        path = self.tool(name)
        return [self.python, str(path)] if self.python and is_python(path) else [str(path)]

    def environment(self) -> dict[str, str]:
        """This process's environment with what the SDK's tools look for."""
        changed = dict(os.environ)
        ndk = os.environ.get("ANDROID_NDK_ROOT")
        for name, folders in (
            ("PATH", [str(self.root / "bin" / HOST), *([ndk] if ndk and Path(ndk, "ndk-build").is_file() else [])]),
            ("LD_LIBRARY_PATH", [str(self.libraries)]),
            ("PYTHONPATH", [str(self.root / "lib" / "python")]),
        ):
            changed[name] = os.pathsep.join([*folders, *([changed[name]] if changed.get(name) else [])])
        return changed | {"QNN_SDK_ROOT": str(self.root), "PYTHONUNBUFFERED": "1"}


def is_python(tool: Path) -> bool:
    """Whether a tool is a Python program, by its first line."""
    with tool.open("rb") as f:
        line = f.readline(200)
    return line.startswith(b"#!") and b"python" in line


def find_sdk(root: str | os.PathLike[str] | None = None, python: str | None = None) -> Sdk:
    """The SDK in ``root``, by default in ``QNN_SDK_ROOT``.

    Args:
        python: interpreter for its converters, which need the Python that they were built for; by default
            ``QNN_SDK_PYTHON``, else the ``python3`` that is found first.

    Raises:
        BackendUnavailableError: there is none.
    """
    given = os.fspath(root) if root is not None else os.environ.get("QNN_SDK_ROOT", "")
    if not given:
        raise BackendUnavailableError(
            "the QNN SDK's tools are needed: install the Qualcomm AI Runtime SDK and set QNN_SDK_ROOT to its folder"
        )
    folder = Path(given).expanduser().absolute()
    if not (folder / "bin" / HOST).is_dir():
        raise BackendUnavailableError(
            f"QNN SDK: {folder / 'bin' / HOST} doesn't exist: set QNN_SDK_ROOT to the folder that has bin and lib, e.g. "
            "/opt/qcom/aistack/qairt/2.51.0.260929"
        )
    return Sdk(folder, read_version(folder), python or os.environ.get("QNN_SDK_PYTHON") or None)


def read_version(root: Path) -> str:
    """The release of an SDK as its files tell it; "unknown" if they don't."""
    manifest, header = root / "sdk.yaml", root / "include" / "QNN" / "QnnSdkBuildId.h"
    if manifest.is_file():
        text = manifest.read_text(encoding="utf-8", errors="replace")
        values = dict(re.findall(r"^(version|build_id):\s*['\"]?([^\s'\"]+)", text, re.M))
        if "version" in values:
            build = values.get("build_id", "")
            return values["version"] if not build or build in values["version"] else f"{values['version']}.{build}"
    if header.is_file():
        text = header.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r'QNN_SDK_BUILD_ID\s+"v?([^"]+)"', text):
            return found[1]
    return "unknown"
