"""What the stand-ins of the QNN SDK's tools have in common: how they name themselves, the models that they carry along, the
configuration that they read, and the compiler behind them, which is onnxruntime's QNN execution provider.

The tools for this host are in ``tests/sdk_stand_in``; qnn-net-run for a loopback device is
:mod:`pytest_qnn.testing.net_run_stand_in`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pytest_qnn.runners.net_run.log import STAND_IN_MARK

MARK = STAND_IN_MARK
LIBRARY_HEAD = b"QNN SDK STAND-IN model library\n"
DLC_HEAD = b"QNN SDK STAND-IN dlc\n"


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def fail(message: str, code: int = 1) -> NoReturn:
    """End as the real tools do: with error lines and a code."""
    sys.stdout.flush()
    for line in message.splitlines():
        sys.stderr.write(f"[ ERROR ] {line}\n")
    sys.exit(code)


def wheel_folder() -> Path:
    """Where the installed onnxruntime-qnn keeps its libraries."""
    spec = importlib.util.find_spec("onnxruntime_qnn")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def find_library(name: str, folders: Sequence[str]) -> Path | None:
    """As the dynamic linker does: a path, or a name along ``folders``."""
    if "/" in name:
        return Path(name) if Path(name).is_file() else None
    return next((path for folder in folders if folder and (path := Path(folder, name)).is_file()), None)


# --- the models that libraries and DLCs carry ---------------------------------------------------------------------------


def model_library(content: bytes, graph: str, target: str, made_by: str) -> bytes:
    """A stand-in of lib<name>.so that carries the ONNX model ``content``."""
    head = json.dumps({"target": target, "graph": graph, "made_by": made_by}).encode()
    return LIBRARY_HEAD + head + b"\n" + content


def dlc(content: bytes, graph: str) -> bytes:
    """A stand-in of a DLC that carries the ONNX model ``content``."""
    return DLC_HEAD + json.dumps({"graph": graph}).encode() + b"\n" + content


def open_model(library: Path, dlc_file: str | None, targets: Sequence[str]) -> tuple[str, bytes]:
    """The graph's name and the ONNX model that a library or DLC carries."""
    content = library.read_bytes()
    if dlc_file:
        if library.name != "libQnnModelDlc.so":
            fail("--dlc_path needs --model libQnnModelDlc.so")
        content = Path(dlc_file).read_bytes() if Path(dlc_file).is_file() else b""
        if not content.startswith(DLC_HEAD):
            fail(f"{dlc_file}: not a DLC")
        head, _, rest = content.removeprefix(DLC_HEAD).partition(b"\n")
        return json.loads(head)["graph"], rest
    if not content.startswith(LIBRARY_HEAD):
        fail(f"{library}: undefined symbol: QnnModel_composeGraphs")
    head, _, rest = content.removeprefix(LIBRARY_HEAD).partition(b"\n")
    if json.loads(head)["target"] not in targets:
        fail(f"{library}: cannot open shared object file: wrong ELF class or machine")
    return json.loads(head)["graph"], rest


# --- configuration -------------------------------------------------------------------------------------------------------


def read_config(
    file: str | None, graph: str | None, folders: Sequence[str], schema_in: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The device and the options of ``graph`` (None: whatever its name) in a ``--config_file``, as the schema allows them.

    Args:
        folders: where the extension library is looked for.
        schema_in: the real extension library, if the one that the file names is a stand-in.
    """
    if file is None:
        return {}, {}
    import jsonschema

    try:
        outer = json.loads(Path(file).read_text(encoding="utf-8"))
        named = outer["backend_extensions"]
        library = find_library(named["shared_library_path"], folders)
        if library is None:
            fail(f"{named['shared_library_path']}: cannot open shared object file: No such file or directory")
        content = json.loads(Path(named["config_file_path"]).read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"The config file {file} can't be parsed: {error!r}")
    if "Gpu" in library.name:
        return {}, content if isinstance(content, dict) else {}
    try:
        jsonschema.validate(content, schema_of(schema_in or library))
    except jsonschema.ValidationError as error:
        fail(f"backend config file schema validation failed: {error.message}")
    device = (content.get("devices") or [{}])[0]
    chosen: dict[str, Any] = {}
    for options in content.get("graphs", []):
        if graph is None or graph in options.get("graph_names", []):
            chosen |= options
        else:
            say(f"[ WARN ] graph options for {options.get('graph_names')} are ignored")
    return device, chosen


def schema_of(library: Path) -> Any:
    """The JSON schema inside Qualcomm's libQnnHtpNetRunExtensions.so."""
    content = library.read_bytes()
    at = content.index(b'"$schema"')
    start, end = content.rindex(b"\0", 0, at) + 1, content.index(b"\0", at)
    return json.loads(content[start:end])


# --- the compiler --------------------------------------------------------------------------------------------------------


def compile_model(content: bytes, device: Mapping[str, Any], options: Mapping[str, Any], work: Path) -> bytes:
    """The context binary of an ONNX model."""
    (work / "model.onnx").write_bytes(content)
    provider = {"backend_type": "htp"}
    if soc := device.get("soc_model", device.get("soc_id")):
        provider["soc_model"] = str(soc)
    if "vtcm_mb" in options:
        provider["vtcm_mb"] = str(options["vtcm_mb"])
    if "O" in options:
        provider["htp_graph_finalization_optimization_mode"] = str(options["O"])
    if "hvx_threads" in options:
        say(f"[ INFO ] {MARK}: hvx_threads is recorded, not applied")
    # in a process without LD_LIBRARY_PATH, where onnxruntime would find the stand-in's empty libQnnHtp.so before its own
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    command = [sys.executable, "-m", __name__, str(work), json.dumps(provider)]
    if subprocess.run(command, env=environment, check=False).returncode:
        fail("Graph finalization failed")
    binaries = list(work.glob("*.bin"))
    if len(binaries) != 1:
        fail("Failed to compose the graph: an operator is not supported")
    return binaries[0].read_bytes()


def main() -> None:
    """Compile ``FOLDER/model.onnx`` with onnxruntime's QNN execution provider into context binaries beside it."""
    import onnxruntime as ort
    import onnxruntime_qnn

    folder, provider = sys.argv[1:3]
    name = "QNNExecutionProvider"
    ort.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == name][:1]
    session = ort.SessionOptions()
    session.add_session_config_entry("ep.context_enable", "1")
    session.add_session_config_entry("ep.context_file_path", f"{folder}/model_ctx.onnx")
    session.add_session_config_entry("ep.context_embed_mode", "0")
    session.add_provider_for_devices(devices, json.loads(provider))
    ort.InferenceSession(f"{folder}/model.onnx", session)


if __name__ == "__main__":
    main()
