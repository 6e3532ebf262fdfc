"""The command line of qnn-net-run, and the configuration that goes with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_qnn.devices.facts import DeviceFacts
from pytest_qnn.devices.runtime_files import RuntimeFiles, find_runtime
from pytest_qnn.errors import ArtifactError, OptionError
from pytest_qnn.runners.net_run.raw_files import RawFile
from pytest_qnn.targets.backend_config import backend_extensions
from pytest_qnn.targets.options import OPTIONS
from pytest_qnn.targets.target import Plan

Kind = Literal["context binary", "model library", "DLC"]
SUFFIXES: Mapping[Kind, str] = {"context binary": ".bin", "model library": ".so", "DLC": ".dlc"}
BACKEND_LIBRARIES = {"htp": "libQnnHtp.so", "gpu": "libQnnGpu.so", "cpu": "libQnnCpu.so"}
DLC_LIBRARY = "libQnnModelDlc.so"


@dataclass(frozen=True)
class Executable:
    """What is to run.

    Attributes:
        kind: "context binary", "model library" (built for the device) or "DLC".
        path: the local file.
        sha256: its digest, where it is known what it must be; else empty.
    """

    kind: Kind
    path: Path
    sha256: str = ""

    @classmethod
    def of(cls, path: Path, sha256: str = "") -> Executable:
        """By the file's name.

        Raises:
            ArtifactError: it has none of the known endings.
        """
        for kind, suffix in SUFFIXES.items():
            if path.suffix.lower() == suffix:
                return cls(kind, path, sha256)
        raise ArtifactError(
            f"{path}: qnn-net-run takes a context binary (.bin), a model library (.so) or a .dlc: name one of these"
        )


def extensions(plan: Plan, executable: Executable, graph: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The backend's configuration, and further sections of the file that names it; both empty if nothing was asked for.

    What a context binary was compiled with stands in it; only options of running are said once more.

    Raises:
        OptionError: an option that qnn-net-run doesn't have.
    """
    asked = dict(plan.options)
    if executable.kind == "context binary":
        asked = {name: value for name, value in asked.items() if _at_run(plan.backend, name)}
    if not asked:
        return {}, {}
    return backend_extensions(plan.backend, plan.soc, asked, [graph])


def _at_run(backend: str, name: str) -> bool:
    option = OPTIONS[backend][name]
    return not option.compiles or option.extension.startswith(("devices.", "context_configs."))


def runtime_for(
    facts: DeviceFacts, plan: Plan, executable: Executable, graph: str, runtime_folder: Path | None
) -> RuntimeFiles:
    """The files that qnn-net-run needs on a device to run this.

    Args:
        graph: name of the graph.
        runtime_folder: as for :func:`~pytest_qnn.devices.runtime_files.find_runtime`.

    Raises:
        BackendUnavailableError: some are missing.
        OptionError: an option that qnn-net-run doesn't have.
    """
    inner, outer = extensions(plan, executable, graph)
    return find_runtime(
        facts,
        plan.backend,
        runtime_folder,
        tool=True,
        dlc=executable.kind == "DLC",
        extensions=bool(inner or outer),
    )


def model_arguments(executable: Executable, model: str, runtime: str) -> list[str]:
    """What names the model: its path on the device, and the folder of the runtime there."""
    if executable.kind == "context binary":
        return ["--retrieve_context", model]
    if executable.kind == "model library":
        return ["--model", model]
    return ["--model", f"{runtime}/{DLC_LIBRARY}", "--dlc_path", model]


def data_arguments(graph: str, inputs: Sequence[RawFile], outputs: Sequence[RawFile], path: object) -> list[str]:
    """What says how files are to be read and written.

    Raises:
        OptionError: tensors that must be named here have names that can't be.
    """
    if all(raw.native for raw in (*inputs, *outputs)):
        return ["--use_native_input_files", "--use_native_output_files"]
    arguments = []
    native = [raw.edge.tensor.name for raw in inputs if raw.native and raw.edge.tensor.dtype != "float32"]
    if native:
        for name in (graph, *native):
            if not name or re.search(r"[\s,:]", name):
                raise OptionError(
                    f"{path}: with float files {name!r} would have to stand in --native_input_tensor_names, which ends names "
                    "at ',', ':' and white space: use native files"
                )
        arguments += ["--native_input_tensor_names", f"{graph}:{','.join(native)}"]
    both = any(raw.native and raw.edge.tensor.dtype != "float32" for raw in outputs)
    return [*arguments, "--output_data_type", "float_and_native" if both else "float_only"]


def dsp_folders(runtime: str, os: str) -> list[str]:
    """Where the DSP's loader looks for skeletons: ours first, then the device's own folders for what else it needs."""
    if os == "android":
        return [runtime, "/vendor/dsp/cdsp", "/vendor/lib/rfsa/adsp", "/system/lib/rfsa/adsp", "/dsp"]
    return [runtime, "/usr/lib/dsp/cdsp", "/usr/lib/rfsa/adsp", "/dsp"]
