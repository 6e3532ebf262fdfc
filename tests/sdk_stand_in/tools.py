"""The stand-in's tools. Copied into the ``lib/python`` of a stand-in SDK, so that they run only if PYTHONPATH names that.

``STAND_IN_FAULT=TOOL:FAULT`` in the environment makes a tool misbehave: hang, crash, half (half a file, then an error),
silent (success without a result), empty (success with an empty result), orphan (a helper process that never ends), module
(a Python module is missing), full (no space left), hang-help (no answer to ``--help`` either). Who hangs writes its process
id, and who leaves an orphan writes the orphan's, into ``STAND_IN_PID_FILE``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_qnn.testing.profiling_log import to_csv
from pytest_qnn.testing.sdk_stand_in import (
    MARK,
    compile_model,
    fail,
    find_library,
    model_library,
    open_model,
    read_config,
)

TARGETS = ("x86_64-linux-clang", "aarch64-android")
LAYOUTS = ("NCDHW", "NDHWC", "NCHW", "NHWC", "NFC", "NCF", "NTF", "TNF", "NF", "NC", "F", "NONTRIVIAL")


def main(tool: str) -> None:
    """Run a tool with the command line's arguments."""
    wanted, _, fault = os.environ.get("STAND_IN_FAULT", "").partition(":")
    asked = {"--help", "-h", "--version"} & set(sys.argv[1:])
    if wanted == tool and (not asked or fault in ("hang-help",)):
        misbehave(tool, fault)
    sys.stdout.write(f"[ INFO ] {MARK} {version()}: {tool}\n")
    {
        "qnn-onnx-converter": converter,
        "qnn-model-lib-generator": library_generator,
        "qnn-context-binary-generator": context_generator,
        "qnn-context-binary-utility": context_utility,
        "qnn-net-run": net_run,
        "qnn-profile-viewer": profile_viewer,
    }[tool](sys.argv[1:])


def version() -> str:
    """What the SDK's folder says of itself."""
    root = Path(sys.argv[0]).resolve().parents[2]
    values = dict(re.findall(r"^(\w+): (.*)$", (root / "sdk.yaml").read_text(), re.M))
    return f"v{values['version']}.{values['build_id']}"


def misbehave(tool: str, fault: str) -> None:
    """One of the ways in which a tool can go wrong."""
    target = _result_of(tool, sys.argv[1:])
    if fault in ("hang", "hang-help"):
        sys.stdout.write("[ INFO ] Composing the graph\n")
        sys.stdout.flush()
        if "STAND_IN_PID_FILE" in os.environ:
            Path(os.environ["STAND_IN_PID_FILE"]).write_text(str(os.getpid()))
        signal.pause()
    elif fault == "crash":
        sys.stdout.write("[ INFO ] Finalizing the graph\n")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "half":
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"half a res")
        fail("Failed to write the result: an internal error")
    elif fault == "full":
        fail(f"Failed to write {target}: No space left on device")
    elif fault == "module":
        sys.exit("Traceback (most recent call last):\nModuleNotFoundError: No module named 'qti'")
    elif fault in ("silent", "empty"):
        if fault == "empty":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        sys.stdout.write("[ INFO ] done\n")
        sys.exit(0)
    elif fault == "orphan":
        helper = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        Path(os.environ["STAND_IN_PID_FILE"]).write_text(str(helper.pid))
        fail("Compilation failed")


def _result_of(tool: str, arguments: list[str]) -> Path:
    def value(flag: str) -> str:
        return arguments[arguments.index(flag) + 1] if flag in arguments else "nothing"

    if tool == "qnn-onnx-converter":
        return Path(value("--output_path"))
    if tool == "qnn-model-lib-generator":
        return Path(value("-o")) / value("-t") / f"lib{value('-l')}.so"
    if tool == "qnn-context-binary-utility":
        return Path(value("--json_file"))
    return Path(value("--output_dir")) / f"{value('--binary_file')}.bin"


def parser_of(tool: str) -> argparse.ArgumentParser:
    """A parser that refuses unknown flags and abbreviations."""
    parser = argparse.ArgumentParser(prog=tool, description=MARK, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"QNN SDK {version()}")
    return parser


# --- qnn-onnx-converter -----------------------------------------------------------------------------------------------


def converter(arguments: Sequence[str]) -> None:
    """ONNX to .cpp, .bin and _net.json; with an input list the model is really quantised, by onnxruntime."""
    parser = parser_of("qnn-onnx-converter")
    parser.add_argument("--input_network", "-i", required=True)
    parser.add_argument("--output_path", "-o")
    parser.add_argument("--input_dim", "-d", nargs=2, action="append", default=[], metavar=("INPUT_NAME", "INPUT_DIM"))
    parser.add_argument("--input_layout", "-l", nargs=2, action="append", default=[])
    parser.add_argument("--preserve_io", nargs="*", action="append")
    parser.add_argument("--quantization_overrides")
    parser.add_argument("--input_list")
    if os.environ.get("STAND_IN_OLD_FLAGS"):
        parser.add_argument("--act_bw", type=int, default=8, dest="act_bitwidth")
        parser.add_argument("--weight_bw", type=int, default=8, dest="weights_bitwidth")
        parser.add_argument("--bias_bw", type=int, default=8, dest="bias_bitwidth")
    else:
        parser.add_argument("--act_bitwidth", type=int, default=8)
        parser.add_argument("--weights_bitwidth", type=int, default=8)
        parser.add_argument("--bias_bitwidth", type=int, default=8)
    parser.add_argument("--use_per_channel_quantization", action="store_true")
    parser.add_argument("--float_fallback", action="store_true")
    parser.add_argument("--ignore_encodings", action="store_true")
    parser.add_argument("--keep_quant_nodes", action="store_true")
    parser.add_argument("--debug", nargs="?")
    chosen = parser.parse_args(arguments)
    import onnx

    if not Path(chosen.input_network).is_file():
        fail(f"Input model file not found: {chosen.input_network}")
    if chosen.float_fallback and (chosen.input_list or chosen.ignore_encodings):
        fail("--float_fallback can't be given together with --input_list or --ignore_encodings")
    try:
        model = onnx.load(chosen.input_network)
        onnx.checker.check_model(model)
    except Exception as error:
        fail(f"ONNX model can't be loaded: {str(error).splitlines()[0]}")
    _give_dimensions(model, chosen.input_dim)
    for name, layout in chosen.input_layout:
        if layout not in LAYOUTS:
            fail(f"Invalid input layout {layout} for {name}")
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
        if value.name not in {i.name for i in model.graph.initializer}
    }
    for name, shape in shapes.items():
        if not all(shape):
            fail(f"Input {name} has dynamic dimensions {shape}: specify them with --input_dim")
    encodings = None
    if chosen.quantization_overrides:
        try:
            encodings = json.loads(Path(chosen.quantization_overrides).read_text())
        except (OSError, ValueError) as error:
            fail(f"Quantization overrides can't be parsed: {error}")
        sys.stdout.write(f"[ INFO ] {MARK}: overrides are recorded, not applied\n")
    output = Path(chosen.output_path or Path(chosen.input_network).with_suffix(".cpp"))
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        fail(f"Output path {output.parent} doesn't exist or is not writable")
    with tempfile.TemporaryDirectory() as work:
        fixed = Path(work, "model.onnx")
        onnx.save(model, str(fixed))
        if chosen.input_list:
            fixed = _quantize(fixed, _read_list(chosen.input_list, shapes), chosen, Path(work))
        content = fixed.read_bytes()
    graph = re.sub(r"\W", "_", output.stem, flags=re.ASCII)
    output.write_text(f"// {MARK} {version()}\n// graph: {graph}\n// weights: {len(content)} bytes\n")
    output.with_suffix(".bin").write_bytes(content)
    described = {"made_by": f"{MARK} {version()}", "graph": graph, "inputs": shapes, "overrides": encodings}
    output.with_name(f"{output.stem}_net.json").write_text(json.dumps(described))
    sys.stdout.write("[ INFO ] Conversion complete!\n")


def _give_dimensions(model: Any, given: Sequence[Sequence[str]]) -> None:
    inputs = {value.name: value for value in model.graph.input}
    for name, text in given:
        if name not in inputs:
            fail(f"Input {name} not found in the model")
        dims = inputs[name].type.tensor_type.shape.dim
        sizes = [int(size) for size in text.split(",")]
        if len(sizes) != len(dims):
            fail(f"Input {name} has {len(dims)} dimensions, --input_dim gives {len(sizes)}")
        for dim, size in zip(dims, sizes, strict=True):
            if dim.dim_value and dim.dim_value != size:
                fail(f"Input {name}: --input_dim gives {size} for a dimension of {dim.dim_value}")
            dim.dim_value = size


def _read_list(file: str, shapes: dict[str, list[int]]) -> list[dict[str, Any]]:
    import numpy as np

    samples = []
    for line in Path(file).read_text().splitlines():
        sample = {}
        for position, part in enumerate(line.split()):
            name, _, path = part.rpartition(":=")
            name = name or list(shapes)[position]
            if not Path(path).is_file():
                fail(f"Can't open input file {path}")
            array = np.fromfile(path, np.float32)
            if array.size != np.prod(shapes[name]):
                fail(f"The size of {path} doesn't match input {name} of {shapes[name]}")
            sample[name] = array.reshape(shapes[name])
        samples.append(sample)
    return samples


def _quantize(model: Path, samples: list[dict[str, Any]], chosen: argparse.Namespace, work: Path) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.samples = iter(samples)

        def get_next(self) -> Any:
            return next(self.samples, None)

    types = {8: QuantType.QUInt8, 16: QuantType.QUInt16}
    config = get_qnn_qdq_config(
        str(model),
        Reader(),
        activation_type=types[chosen.act_bitwidth],
        weight_type=types[chosen.weights_bitwidth],
        per_channel=chosen.use_per_channel_quantization,
    )
    quantize(str(model), str(work / "quantized.onnx"), config)
    return work / "quantized.onnx"


# --- qnn-model-lib-generator --------------------------------------------------------------------------------------------


def library_generator(arguments: Sequence[str]) -> None:
    """.cpp and .bin to lib<name>.so for each target; like the real one it leaves scratch files in the current folder."""
    parser = parser_of("qnn-model-lib-generator")
    parser.add_argument("-c", dest="cpp", required=True)
    parser.add_argument("-b", dest="bin")
    parser.add_argument("-t", dest="targets", default="aarch64-android x86_64-linux-clang")
    parser.add_argument("-l", dest="name")
    parser.add_argument("-o", dest="output", default="lib")
    chosen = parser.parse_args(arguments)
    try:
        source = Path(chosen.cpp).read_text()
        content = Path(chosen.bin).read_bytes() if chosen.bin else b""
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    (Path.cwd() / "tmp_scratch_of_make").mkdir()
    graph = re.search(r"^// graph: (\w+)$", source, re.M)
    size = re.search(r"^// weights: (\d+) bytes$", source, re.M)
    if MARK not in source or not graph or not size:
        fail(f"{chosen.cpp}:1: error: this is not C++ that a converter made")
    if int(size[1]) != len(content):
        fail(f"{chosen.cpp}: error: the weights have {len(content)} bytes, expected {size[1]}")
    for target in chosen.targets.split():
        if target not in TARGETS:
            fail(f"Invalid target {target}")
        if target == "aarch64-android" and not any(
            Path(folder, "ndk-build").is_file() for folder in os.environ["PATH"].split(os.pathsep)
        ):
            fail("ndk-build: command not found")
        folder = Path(chosen.output, target)
        folder.mkdir(parents=True, exist_ok=True)
        made = model_library(content, graph[1], target, version())
        (folder / f"lib{chosen.name or Path(chosen.cpp).stem}.so").write_bytes(made)


# --- qnn-context-binary-generator ---------------------------------------------------------------------------------------


def context_generator(arguments: Sequence[str]) -> None:
    """A model library or DLC to a real context binary, by onnxruntime's QNN execution provider."""
    parser = parser_of("qnn-context-binary-generator")
    parser.add_argument("--model")
    parser.add_argument("--dlc_path")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--binary_file", required=True)
    parser.add_argument("--output_dir", default="./output")
    parser.add_argument("--config_file")
    parser.add_argument("--log_level", choices=("error", "warn", "info", "verbose"))
    parser.add_argument("--op_packages")
    chosen = parser.parse_args(arguments)
    if not chosen.model:
        fail("Missing option: --model")
    backend = _host_library(chosen.backend)
    if backend.name != "libQnnHtp.so":
        fail(f"{backend.name} doesn't support serialized contexts")
    graph, content = open_model(_host_library(chosen.model), chosen.dlc_path, ["x86_64-linux-clang"])
    device, settings = read_config(chosen.config_file, graph, _library_folders())
    output = Path(chosen.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            binary = compile_model(content, device, settings, Path(work))
            (output / f"{chosen.binary_file}.bin").write_bytes(binary)
    except OSError as error:
        fail(f"Can't write to {output}: {error.strerror}")
    note = {"made_by": f"{MARK} {version()}", "graph": graph}
    (output / f"{chosen.binary_file}.bin.stand-in.json").write_text(json.dumps(note))


def _host_library(name: str) -> Path:
    found = find_library(name, _library_folders())
    if found is None:
        fail(f"{name}: cannot open shared object file: No such file or directory")
    return found


def _library_folders() -> list[str]:
    return os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)


# --- the others ---------------------------------------------------------------------------------------------------------


def context_utility(arguments: Sequence[str]) -> None:
    """What is known of a context binary, as JSON. The graph's name is the one that a real SDK would have given it."""
    parser = parser_of("qnn-context-binary-utility")
    parser.add_argument("--context_binary", required=True)
    parser.add_argument("--json_file", required=True)
    chosen = parser.parse_args(arguments)
    binary = Path(chosen.context_binary)
    if not binary.is_file() or b"QNN" not in binary.read_bytes()[:65536]:
        fail("Failed to get context binary info.")
    beside = binary.with_name(binary.name + ".stand-in.json")
    graph = json.loads(beside.read_text())["graph"] if beside.is_file() else binary.stem
    described = {"info": {"buildId": f"{version()} {MARK}", "graphs": [{"info": {"graphName": graph}}]}}
    Path(chosen.json_file).write_text(json.dumps(described))


def net_run(arguments: Sequence[str]) -> None:
    """Only what it refuses: the stand-in runs nothing."""
    parser = parser_of("qnn-net-run")
    for flag in (
        "model",
        "dlc_path",
        "retrieve_context",
        "backend",
        "input_list",
        "output_dir",
        "config_file",
        "op_packages",
    ):
        parser.add_argument(f"--{flag}")
    for flag in ("debug", "use_native_input_files", "use_native_output_files"):
        parser.add_argument(f"--{flag}", action="store_true")
    chosen = parser.parse_args(arguments)
    if bool(chosen.model) == bool(chosen.retrieve_context):
        fail("Exactly one of --model and --retrieve_context is needed")
    if chosen.debug and chosen.retrieve_context:
        fail("--debug is not allowed with --retrieve_context")
    fail(f"{MARK}: it runs no models")


def profile_viewer(arguments: Sequence[str]) -> None:
    """A profiling log of the stand-in of qnn-net-run as CSV; it can't read real ones."""
    parser = parser_of("qnn-profile-viewer")
    parser.add_argument("--input_log", required=True)
    parser.add_argument("--output")
    chosen = parser.parse_args(arguments)
    try:
        text = to_csv(Path(chosen.input_log).read_bytes())
    except (OSError, ValueError) as error:
        fail(f"Failed to read {chosen.input_log}: {error}")
    if chosen.output:
        Path(chosen.output).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
