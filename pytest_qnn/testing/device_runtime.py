"""A folder laid out as the QNN SDK is, with what runs on devices; every file in it names itself as a stand-in."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest_qnn
from pytest_qnn.devices.soc import find_soc
from pytest_qnn.testing.net_run_stand_in import FAULTS
from pytest_qnn.testing.sdk_stand_in import MARK

VERSION = "2.51.0.260929000000"
TARGETS = ("aarch64-android", "aarch64-oe-linux-gcc11.2")
LIBRARIES = (
    "libQnnHtp.so",
    "libQnnHtpPrepare.so",
    "libQnnSystem.so",
    "libQnnHtpV{arch}Stub.so",
    "libQnnHtpNetRunExtensions.so",
    "libQnnGpu.so",
    "libQnnGpuNetRunExtensions.so",
    "libQnnCpu.so",
    "libQnnModelDlc.so",
)


def make_device_runtime(folder: Path, soc: str = "SM8650", version: str = VERSION) -> Path:
    """Lay out the stand-in of an SDK's device files in ``folder``.

    Args:
        soc: whose Hexagon architecture the stub and the skeleton are for.
        version: release that they all say they are of.

    Returns:
        ``folder``, to be used as ``QNN_SDK_ROOT`` or as the folder of a runtime.

    Raises:
        OptionError: unknown SoC.
        OSError: ``folder`` can't be written.
    """
    chosen = find_soc(soc)
    for target in TARGETS:
        programs, libraries = folder / "bin" / target, folder / "lib" / target
        programs.mkdir(parents=True, exist_ok=True)
        libraries.mkdir(parents=True, exist_ok=True)
        program = programs / "qnn-net-run"
        program.write_text(_program(target, chosen.name, version), encoding="utf-8")
        program.chmod(0o755)
        for name in LIBRARIES:
            name = name.format(arch=chosen.htp_arch)
            (libraries / name).write_bytes(_library(name, version))
    skeletons = folder / "lib" / f"hexagon-v{chosen.htp_arch}" / "unsigned"
    skeletons.mkdir(parents=True, exist_ok=True)
    name = f"libQnnHtpV{chosen.htp_arch}Skel.so"
    (skeletons / name).write_bytes(_library(name, version))
    if not (folder / "sdk.yaml").exists():  # the tools for this host may be there already
        text = f"# {MARK}\nname: QNN SDK stand-in\nversion: {version}\n"
        (folder / "sdk.yaml").write_text(text, encoding="utf-8")
    return folder


def set_net_run_fault(root: Path, fault: str = "", say: tuple[str, ...] = (), code: int = 1) -> None:
    """Make the stand-in of qnn-net-run on a loopback device misbehave; without ``fault`` and ``say`` it behaves again.

    Args:
        root: host path of the device's "/".
        fault: a name of :data:`~pytest_qnn.testing.net_run_stand_in.FAULTS`.
        say: lines with which it ends at once, with ``code``.
    """
    if fault and fault not in FAULTS:
        raise ValueError(f"no fault {fault!r}; known: {', '.join(FAULTS)}")
    file = root / "run" / "net-run-faults.json"
    if not fault and not say:
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"fault": fault} if fault else {"say": say, "code": code}), encoding="utf-8")


def _library(name: str, version: str) -> bytes:
    return f"{MARK} v{version}: {name}; no program can load it\nv{version}\n".encode()


def _program(target: str, soc: str, version: str) -> str:
    """A script that starts the stand-in with this interpreter, without the stand-in libraries in the linker's path."""
    package = Path(pytest_qnn.__file__).resolve().parents[1]
    return "\n".join(
        (
            "#!/bin/sh",
            f"# {MARK} v{version}: qnn-net-run of pytest-qnn's test kit; it computes on the host's simulator",
            f"# v{version}",
            'export QNN_STAND_IN_LIBRARIES="$LD_LIBRARY_PATH"',
            f"export QNN_STAND_IN_TARGET={target} QNN_STAND_IN_VERSION={version} QNN_STAND_IN_SOC={soc}",
            f"export PYTHONPATH={shlex.quote(os.fspath(package))} PYTHONDONTWRITEBYTECODE=1",
            "unset LD_LIBRARY_PATH",
            f'exec {shlex.quote(sys.executable)} -m pytest_qnn.testing.net_run_stand_in "$@"',
            "",
        )
    )
