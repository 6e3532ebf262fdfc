"""What a Linux device must have to run models in onnxruntime, and the options that its QNN execution provider gets.

Never run against a real board: what differs there from the x86-64 stand-in (``backend_path``, the DSP's skeleton libraries)
follows the documentation of onnxruntime's QNN execution provider.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pytest_qnn.devices.facts import DeviceFacts
from pytest_qnn.devices.transport import Transport, part
from pytest_qnn.errors import BackendUnavailableError
from pytest_qnn.targets.backend_config import provider_options

OLDEST_ONNXRUNTIME = (1, 24)  # the first that tells where a model's nodes ran
INSTALL = "python3 -m pip install 'onnxruntime>=1.24' onnxruntime-qnn (in a virtual environment: name its Python with device_python)"
BACKEND_LIBRARIES = {"htp": "libQnnHtp.so", "cpu": "libQnnCpu.so", "gpu": "libQnnGpu.so"}
LOOK_SECONDS = 60.0  # for Python on a slow board


def check_python(facts: DeviceFacts, chosen: str | None = None) -> None:
    """Make sure, from what is known of it, that a device can run models in onnxruntime.

    Args:
        chosen: the setting device_python.

    Raises:
        BackendUnavailableError: Python, onnxruntime or onnxruntime-qnn is missing there or too old; with what to do.
    """
    where = f"device {facts.serial}"
    python = facts.python
    if facts.os == "linux" and chosen and (python is None or python.version is None):
        raise BackendUnavailableError(
            f"{where}: {chosen} (device_python) is no program there, or is no Python: correct it"
        )
    if facts.os != "linux" or python is None:
        raise BackendUnavailableError(
            f"{where} has no python3 ({facts.os}), and the runner ort needs it: install it there, or take the runner net_run"
        )
    for package in ("onnxruntime", "onnxruntime-qnn", "numpy"):
        if package not in python.packages:
            raise BackendUnavailableError(
                f"{where}: its Python {python.version} ({python.path}) has no {package}, and the runner ort needs it: run there: "
                f"{INSTALL}. Or take the runner net_run"
            )
    version = python.packages["onnxruntime"]
    if _numbers(version) < OLDEST_ONNXRUNTIME:
        raise BackendUnavailableError(
            f"{where}: its onnxruntime {version} is too old: only {'.'.join(map(str, OLDEST_ONNXRUNTIME))} and later tell where "
            f"a model's nodes ran. Run there: {INSTALL}"
        )


_HAS_LIBRARY = """
import importlib.util, os, sys
spec = importlib.util.find_spec("onnxruntime_qnn")
folders = (spec.submodule_search_locations or []) if spec else []
print("there" if any(os.path.isfile(os.path.join(f, sys.argv[1])) for f in folders) else "missing")
"""


def check_library(transport: Transport, facts: DeviceFacts, backend: str) -> None:
    """Make sure that the device's onnxruntime-qnn has the library of a backend. On a stand-in ``htp`` needs none.

    Raises:
        BackendUnavailableError: it hasn't; with what to do.
        DeviceError: of the transport.
    """
    assert facts.python is not None
    _check_gpu(facts, backend)
    library = BACKEND_LIBRARIES[backend]
    words = [facts.python.path, "-I", "-B", "-c", _HAS_LIBRARY, library]
    with part(transport, f"is {library} in onnxruntime-qnn"):
        answer = transport.shell(words, timeout=LOOK_SECONDS, limit=1 << 16)
    if answer.text == "missing":
        raise BackendUnavailableError(
            f"device {facts.serial}: its onnxruntime-qnn has no {library}, which backend {backend!r} needs: install a release "
            "that has it, or leave the backend out"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d{1,6}", version)[:2])


def _simulates(facts: DeviceFacts) -> bool:
    return bool(facts.stand_in) or facts.abi in ("x86_64", "amd64")


def _check_gpu(facts: DeviceFacts, backend: str) -> None:
    if backend == "gpu" and _simulates(facts):
        raise BackendUnavailableError(
            f"device {facts.serial} is an x86-64 host, and QNN's GPU backend can't run models there: it needs an Adreno GPU"
        )


def device_provider_options(facts: DeviceFacts, backend: str, options: Mapping[str, str]) -> dict[str, str]:
    """The options of the QNN execution provider on a device.

    On a stand-in, which is x86-64 whatever it says, ``htp`` is the simulator and must be told which SoC to be. On a real one the
    backend's library is named, as the execution provider's documentation asks for on Linux, and the SoC is left to the
    device: it is the one that it is. The name has no folder: the agent takes the library from the installed onnxruntime-qnn.

    Args:
        options: checked options of the backend.

    Raises:
        BackendUnavailableError: the device can't run the backend.
        OptionError: an option that onnxruntime has no way to honour.
    """
    asked = provider_options(backend, options)
    _check_gpu(facts, backend)
    if backend != "htp" or not _simulates(facts):
        return {**asked, "backend_path": BACKEND_LIBRARIES[backend]}
    if facts.soc is None:
        raise BackendUnavailableError(f"device {facts.serial}: its SoC is unknown, and the simulator must be told one")
    return {**asked, "backend_type": "htp", "soc_model": str(facts.soc.soc_id)}
