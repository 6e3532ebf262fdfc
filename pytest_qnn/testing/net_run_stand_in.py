"""A stand-in of qnn-net-run for loopback devices: it takes the real one's command line and computes real HTP results.

Context binaries are loaded into Qualcomm's HTP simulator through onnxruntime's QNN execution provider; model libraries and
DLCs of the stand-in SDK, which carry an ONNX model, are compiled first. Backends ``gpu`` and ``cpu`` compute that model with
onnxruntime's CPU provider in float32. It says so in its log, in lines that start with ``[ INFO ] QNN SDK STAND-IN``. What it
refuses it refuses in the words of real logs: a library that is missing, one of another release, a binary for another
device, files of wrong sizes, options that contradict each other. :mod:`pytest_qnn.testing.device_runtime` installs it.

Not modelled: several graphs in a binary, ``--debug``, op packages, files of several batches, clocks and power.

``/run/net-run-faults.json`` on the device makes it misbehave: ``{"fault": NAME}`` with a name of :data:`FAULTS`, or
``{"say": [lines], "code": number}`` to end at once with these lines.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pytest_qnn.runners.net_run.log import SUCCESS
from pytest_qnn.runners.net_run.names import sanitized
from pytest_qnn.testing.profiling_log import Row, inference_rows, to_log
from pytest_qnn.testing.sdk_stand_in import (
    MARK,
    compile_model,
    fail,
    find_library,
    open_model,
    read_config,
    say,
    wheel_folder,
)

if TYPE_CHECKING:
    from pytest_qnn.artifacts.binary import TensorInfo
    from pytest_qnn.devices.soc import Soc
    from pytest_qnn.runners.shared_tensors import Array

FAULTS = (
    "crash",  # dies of SIGSEGV while it executes
    "killed",  # dies of SIGKILL while it executes, as the low-memory killer does it
    "hang",  # never ends
    "silent",  # ends with code 0, without a word and without outputs
    "no-success",  # writes everything, ends with code 0, never says that it finished
    "bad-code",  # says that it finished, then fails
    "missing-output",  # one file of the last inference isn't written
    "short-output",  # one file is cut
    "long-output",  # one file has more than it should
    "extra-output",  # writes a tensor that the model doesn't have
    "stale-output",  # there is a result of an inference that nobody asked for
    "no-profile",  # no profiling log
)
FAULT_FILE = Path(
    f"{os.environ.get('FAKE_ROOT', '')}/run/net-run-faults.json"
)  # set on devices without a root of their own
PERF_PROFILES = (
    "low_balanced",
    "balanced",
    "default",
    "high_performance",
    "sustained_high_performance",
    "burst",
    "low_power_saver",
    "power_saver",
    "high_power_saver",
    "extreme_power_saver",
    "system_settings",
)
DEVICE_FAILED = (
    "QnnDsp <E> Failed to create transport for device, error: {0}\n"
    "QnnDsp <E> Failed to load skel, error: {0}\n"
    "QnnDsp <E> Transport layer setup failed: 14001\n"
    "QnnDsp <E> Failed to parse default platform info: 14001\n"
    "Device Creation failure"
)


@dataclass(frozen=True)
class Installed:
    """Where this program is, as its start-up script says.

    Attributes:
        target: e.g. "aarch64-android".
        version: release that it pretends to be.
        libraries: LD_LIBRARY_PATH, which the script has taken out of the way of the host's own libraries.
        skeletons: ADSP_LIBRARY_PATH.
    """

    target: str = field(default_factory=lambda: os.environ.get("QNN_STAND_IN_TARGET", "aarch64-android"))
    version: str = field(default_factory=lambda: os.environ.get("QNN_STAND_IN_VERSION", "unknown"))
    libraries: tuple[str, ...] = field(
        default_factory=lambda: tuple(os.environ.get("QNN_STAND_IN_LIBRARIES", "").split(":"))
    )
    skeletons: tuple[str, ...] = field(
        default_factory=lambda: tuple(os.environ.get("ADSP_LIBRARY_PATH", "").split(";"))
    )

    def library(self, name: str) -> Path | None:
        """A library where the linker would find it."""
        return find_library(name, self.libraries)


@dataclass(frozen=True)
class Model:
    """What is executed: the tensors, in the order of the binary, and the function that computes."""

    graph: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    run: Callable[[Mapping[str, Array]], dict[str, Array]]
    nodes: Callable[[], list[tuple[str, int]]] = lambda: []


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="qnn-net-run", description=MARK, allow_abbrev=False)
    for flag in ("model", "dlc_path", "retrieve_context", "backend", "input_list", "config_file", "op_packages"):
        p.add_argument(f"--{flag}")
    p.add_argument("--output_dir", default="./output")
    for flag in (
        "debug",
        "use_native_input_files",
        "use_native_output_files",
        "shared_buffer",
        "synchronous",
        "version",
    ):
        p.add_argument(f"--{flag}", action="store_true")
    p.add_argument("--native_input_tensor_names")
    p.add_argument("--input_data_type", choices=("float", "native"), default="float")
    p.add_argument(
        "--output_data_type", choices=("float_only", "native_only", "float_and_native"), default="float_only"
    )
    p.add_argument("--num_inferences", type=int)
    p.add_argument("--duration", type=float)
    p.add_argument("--keep_num_outputs", type=int)
    p.add_argument("--perf_profile", default="default")
    p.add_argument("--profiling_level", choices=("basic", "detailed", "backend"))
    p.add_argument("--log_level", choices=("error", "warn", "info", "verbose", "debug"))
    return p


def main() -> None:
    """Run with the command line's arguments."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    here = Installed()
    chosen = parser().parse_args()
    if chosen.version:
        say(f"QNN SDK v{here.version} ({MARK})")
        return
    say(f"[ INFO ] {MARK} v{here.version}: qnn-net-run; nothing here runs on a Snapdragon")
    faults = read_faults()
    if lines := faults.get("say"):
        for line in lines:
            sys.stderr.write(f"{line}\n")
        sys.exit(int(faults.get("code", 1)))
    fault = str(faults.get("fault", ""))
    if fault == "silent":
        os._exit(0)
    check_arguments(chosen)
    soc = device_soc()
    backend = open_backend(chosen.backend, here, soc, online=chosen.model is not None)
    output = Path(chosen.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".net-run-", ignore_cleanup_errors=True) as work:
            model = load(chosen, backend, here, soc, Path(work))
            execute(chosen, model, output, fault)
    except OSError as error:
        fail(f"Failed to write to {error.filename or output}: {error.strerror or error}")
    say(f"[ INFO ] {SUCCESS}" if fault != "no-success" else "[ INFO ] done")
    if fault == "bad-code":
        fail("Failed to free the context", 3)


def read_faults() -> dict[str, Any]:
    """How to misbehave; empty normally."""
    if named := os.environ.get("FAKE_NET_RUN_FAULT"):
        return {"fault": named}
    with suppress(OSError, ValueError):
        told = json.loads(FAULT_FILE.read_text(encoding="utf-8"))
        return told if isinstance(told, dict) else {}
    return {}


def check_arguments(chosen: argparse.Namespace) -> None:
    """What the real one refuses before it does anything."""
    if bool(chosen.model) == bool(chosen.retrieve_context):
        fail("Exactly one of --model and --retrieve_context is needed")
    if chosen.debug and chosen.retrieve_context:
        fail("--debug is not allowed with --retrieve_context")
    for flag in ("backend", "input_list"):
        if not getattr(chosen, flag):
            fail(f"Missing option: --{flag}")
    for flag in ("debug", "op_packages"):
        if getattr(chosen, flag):
            fail(f"{MARK}: --{flag} is not modelled")
    if chosen.perf_profile not in PERF_PROFILES:
        say(f"[ WARN ] unknown perf_profile {chosen.perf_profile}: default is used")


def device_soc() -> Soc:
    """The SoC of the device that this runs on."""
    from pytest_qnn.devices.soc import SOCS, named_soc

    with suppress(OSError):
        found = named_soc(Path("/sys/devices/soc0/machine").read_text(encoding="utf-8"))
        if found:
            return found
    with suppress(OSError):
        told = re.search(r"^ro\.soc\.model=(.*)$", Path("/system/build.prop").read_text(encoding="utf-8"), re.M)
        if told and (found := named_soc(told[1])):
            return found
    return SOCS[os.environ.get("QNN_STAND_IN_SOC", "SM8650")]


# --- the backend -------------------------------------------------------------------------------------------------------


def open_backend(name: str, here: Installed, soc: Soc, online: bool) -> str:
    """ "htp", "gpu" or "cpu", once every library that it needs was found where the real one looks for it."""
    library = here.library(name)
    if library is None:
        if "android" in here.target:
            fail(f'Unable to load backend. dlerror(): dlopen failed: library "{name}" not found')
        fail(f"Unable to load backend. dlerror(): {name}: cannot open shared object file: No such file or directory")
    release = stand_in_release(library)
    if library.name in ("libQnnGpu.so", "libQnnCpu.so"):
        kind = "gpu" if "Gpu" in library.name else "cpu"
        real = "an Adreno GPU" if kind == "gpu" else "QNN's CPU backend"
        say(f"[ INFO ] {MARK}: {library.name} is onnxruntime's CPU provider in float32, not {real}")
        return kind
    if library.name != "libQnnHtp.so":
        fail(f"Unable to load backend. dlerror(): {library}: no QNN interface")
    needed = ["libQnnSystem.so"] if not online else ["libQnnHtpPrepare.so"]
    for other in needed:
        if here.library(other) is None:
            fail(f'dlopen failed: library "{other}" not found\nError initializing QNN Function Pointers')
    stub = here.library(f"libQnnHtpV{soc.htp_arch}Stub.so")
    if stub is None:
        fail("QnnDsp <E> loadRemoteSymbols failed with err 4000\n" + DEVICE_FAILED.format(4000))
    skeleton = find_library(f"libQnnHtpV{soc.htp_arch}Skel.so", here.skeletons)
    if skeleton is None:
        fail(
            "QnnDsp <E> DspTransport.openSession qnn_open failed, 0x80000406, prio 100\n"
            "QnnDsp <E> IDspTransport: Unable to load lib 0x80000406\n" + DEVICE_FAILED.format(1002)
        )
    if len({release, stand_in_release(stub), stand_in_release(skeleton)}) > 1:
        fail(
            "QnnDsp <E> DspTransport.openSession qnn_open failed, 0x80000600, prio 100\n"
            "QnnDsp <E> Error in verify skel version\n" + DEVICE_FAILED.format(4000)
        )
    say(f"[ INFO ] {MARK}: libQnnHtp.so is Qualcomm's HTP simulator on this host, as a {soc.name} (v{soc.htp_arch})")
    return "htp"


def stand_in_release(library: Path) -> str:
    """The release that a library of the stand-in SDK belongs to."""
    found = re.match(rf"{MARK} v(\S+): ".encode(), library.read_bytes()[:200])
    if not found:
        fail(f"Unable to load backend. dlerror(): {library}: wrong ELF class or machine for {MARK}")
    return found[1].decode()


# --- the model -----------------------------------------------------------------------------------------------------------


def load(chosen: argparse.Namespace, backend: str, here: Installed, soc: Soc, work: Path) -> Model:
    """Open what is to run."""
    schema_in = wheel_folder() / "libQnnHtpNetRunExtensions.so"
    if chosen.retrieve_context:
        read_config(chosen.config_file, None, here.libraries, schema_in)
        if backend != "htp":
            fail(f"{backend} doesn't support serialized contexts")
        say(f"[ INFO ] Creating context from binary file: {chosen.retrieve_context}")
        return load_context(Path(chosen.retrieve_context), soc, work, chosen.profiling_level)
    library = here.library(chosen.model)
    if library is None:
        fail(
            f"Unable to load model. dlerror(): {chosen.model}: cannot open shared object file: No such file or directory"
        )
    if chosen.dlc_path:
        stand_in_release(library)
    graph, content = open_model(library, chosen.dlc_path, [here.target])
    _, options = read_config(chosen.config_file, graph, here.libraries, schema_in)
    say("[ INFO ] Composing Graphs")
    if backend != "htp":
        return as_converted(load_onnx(content), graph)
    binary = compile_model(content, {"soc_model": soc.soc_id}, options, work)
    (work / "compiled.bin").write_bytes(binary)
    compiled = load_context(work / "compiled.bin", soc, work, chosen.profiling_level)
    return as_converted(compiled, graph, names_before(work))


def names_before(work: Path) -> dict[str, str]:
    """Names of tensors in the compiled model -> in the ONNX model that it was compiled from: the compiler chose others."""
    from pytest_qnn.artifacts.binary import read_context_binary
    from pytest_qnn.artifacts.matching import match_tensors
    from pytest_qnn.model.onnx_file import read_model

    match = match_tensors(read_context_binary(work / "compiled.bin"), read_model(work / "model.onnx"))
    return {edge.tensor.name: edge.spec.name for edge in (*match.inputs, *match.outputs)}


def as_converted(model: Model, graph: str, names: Mapping[str, str] | None = None) -> Model:
    """The model with names as the SDK's converters write them into libraries: its own, and those of its tensors.

    Args:
        names: names of its tensors in the ONNX model, where they differ.
    """
    from pytest_qnn.artifacts.matching import converted_name as converted

    before = names or {}

    def converted_name(name: str) -> str:
        return converted(before.get(name, name))

    inputs = {converted_name(tensor.name): tensor.name for tensor in model.inputs}
    outputs = {tensor.name: converted_name(tensor.name) for tensor in model.outputs}

    def run(feed: Mapping[str, Array]) -> dict[str, Array]:
        results = model.run({inputs[name]: array for name, array in feed.items()})
        return {outputs[name]: array for name, array in results.items()}

    def renamed(tensors: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
        return tuple(replace(tensor, name=converted_name(tensor.name)) for tensor in tensors)

    return Model(graph, renamed(model.inputs), renamed(model.outputs), run, model.nodes)


def load_context(binary: Path, soc: Soc, work: Path, profiling: str | None) -> Model:
    """A context binary in the HTP simulator."""
    from pytest_qnn.artifacts.binary import read_context_binary
    from pytest_qnn.artifacts.wrapper import wrap
    from pytest_qnn.errors import QnnError

    refused = "Could not create context from binary.\nCreate From Binary failure"
    if not binary.is_file():
        fail(f"Error in getting metadata from binary file: {binary}\n{refused}")
    try:
        info = read_context_binary(binary)
    except QnnError as error:
        fail(f"{MARK}: {error}\n{refused}")
    if info.soc_id not in (None, soc.soc_id) or info.htp_arch not in (None, soc.htp_arch):
        fail(
            f"QnnDsp <E> Wrong binary: made for {info.made_for}, the device is {soc.name} (v{soc.htp_arch})\n{refused}"
        )
    if len(info.graphs) > 1:
        fail(f"{MARK}: binaries of several graphs are not modelled\n{refused}")
    try:
        wrapped = wrap(info, work / "wrapped")
    except QnnError as error:
        fail(f"{MARK}: {error}\n{refused}")
    graph = wrapped.match.graph
    events = work / "profile.csv"
    options = {"backend_type": "htp", "soc_model": str(soc.soc_id)}
    if profiling in ("detailed", "backend"):
        options |= {"profiling_level": "detailed", "profiling_file_path": str(events)}
    session = open_session(wrapped.path, options)

    def nodes() -> list[tuple[str, int]]:
        from pytest_qnn.runners.profile import Profile, read_events

        with suppress(OSError, ValueError, KeyError):
            return list(Profile(read_events(events)).nodes.items())
        return []

    return Model(graph.name, graph.inputs, graph.outputs, running(session), nodes)


def load_onnx(content: bytes) -> Model:
    """An ONNX model on onnxruntime's CPU provider, whose tensors are those of the model itself."""
    import onnxruntime as ort

    from pytest_qnn.artifacts.binary import TensorInfo

    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    types = {"float": "float32", "float16": "float16", "double": "float64"}

    def tensors(values: Sequence[Any]) -> tuple[TensorInfo, ...]:
        found = []
        for value in values:
            name = re.sub(r"^tensor\((.*)\)$", r"\1", value.type)
            dtype = types.get(name, name)
            found.append(TensorInfo(value.name, dtype.upper(), dtype, tuple(value.shape)))
        return tuple(found)

    return Model("", tensors(session.get_inputs()), tensors(session.get_outputs()), running(session))


def open_session(model: Path, provider_options: dict[str, str]) -> Any:
    """The simulator with a wrapped context binary; the graph must really be there."""
    import onnxruntime as ort
    import onnxruntime_qnn

    name = "QNNExecutionProvider"
    ort.set_default_logger_severity(3)
    ort.register_execution_provider_library(name, onnxruntime_qnn.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == name][:1]
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices, provider_options)
    try:
        session = ort.InferenceSession(str(model), options)
    except Exception as error:
        fail(f"{MARK}: {str(error).splitlines()[0]}\nCould not create context from binary.\nCreate From Binary failure")
    session.disable_fallback()
    return session


def running(session: Any) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """A function that runs an onnxruntime session."""
    names = [value.name for value in session.get_outputs()]

    def run(feed: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return dict(zip(names, session.run(names, dict(feed)), strict=True))
        except Exception as error:
            fail(f"{MARK}: {str(error).splitlines()[0]}\nGraph Execution failure")

    return run


# --- executing -----------------------------------------------------------------------------------------------------------


def execute(chosen: argparse.Namespace, model: Model, output: Path, fault: str) -> None:
    """All inferences, with their files."""
    native_inputs, native_outputs = native_choice(chosen, model)
    samples = read_input_list(chosen.input_list, model)
    feeds = [read_sample(sample, model, native_inputs) for sample in samples]
    say("[ INFO ] Executing Graphs")
    misbehave_while_executing(fault)
    asked = chosen.num_inferences if chosen.num_inferences else len(feeds)
    keep = chosen.keep_num_outputs if chosen.keep_num_outputs is not None else sys.maxsize
    rows: list[Row] = []
    start = time.perf_counter()
    done = 0
    while done < asked or (chosen.duration and time.perf_counter() - start < chosen.duration):
        before = time.perf_counter()
        results = model.run(feeds[done % len(feeds)])
        after = time.perf_counter()
        rows += inference_rows(int((after - start) * 1e6), model.graph, max(1, int((after - before) * 1e6)))
        if done < keep:
            folder = output / f"Result_{done}"
            write_results(folder, model, results, native_outputs)
        done += 1
    spoil(output, model, min(done, keep), fault)
    (output / "execution_metadata.yaml").write_text(f"# {MARK}\ninferences_completed: {done}\n", encoding="utf-8")
    if chosen.profiling_level and fault != "no-profile":
        if nodes := model.nodes():
            rows += inference_rows(rows[-1][0], model.graph, rows[-1][2], nodes)[2:]
        (output / "qnn-profiling-data_0.log").write_bytes(to_log(rows))


def native_choice(chosen: argparse.Namespace, model: Model) -> tuple[set[str], str]:
    """Inputs whose files hold native elements, and which files are written of outputs."""
    names = {tensor.name for tensor in model.inputs}
    native: set[str] = set()
    if chosen.use_native_input_files or chosen.input_data_type == "native":
        native = names
    elif chosen.native_input_tensor_names:
        for part in chosen.native_input_tensor_names.split(" "):
            graph, _, listed = part.partition(":")
            if graph != model.graph:
                fail(f"Invalid native_input_tensor_names: no graph {graph!r}")
            native |= set(listed.split(","))
        if unknown := native - names:
            fail(f"Invalid native_input_tensor_names: no input tensor {', '.join(sorted(unknown))}")
    return native, "native_only" if chosen.use_native_output_files else chosen.output_data_type


def read_input_list(file: str, model: Model) -> list[dict[str, Path]]:
    """Input files by tensor name, for each inference."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        fail(f"Input list {file}: {error.strerror}")
    names = [tensor.name for tensor in model.inputs]
    samples = []
    for line in text.split("\n"):
        parts = line.split()
        if not parts or line[0] in "#%":
            continue
        if len(parts) != len(names):
            fail(f"Input list {file}: a line has {len(parts)} files, the model has {len(names)} inputs")
        if all(":=" in part for part in parts):
            index: dict[str, int] = {}
            for i, part in enumerate(parts):
                given = part.partition(":=")[0]
                index[given] = i
                index[sanitized(given)] = i
            for name in names:
                if name not in index and sanitized(name) not in index:
                    fail(f"Input list {file}: no file for input tensor {name!r}")
            order = [index.get(name, index.get(sanitized(name), 0)) for name in names]
            samples.append({name: Path(parts[i].partition(":=")[2]) for name, i in zip(names, order, strict=True)})
        else:
            samples.append({name: Path(part) for name, part in zip(names, parts, strict=True)})
    if not samples:
        fail(f"Input list {file} is empty")
    return samples


def read_sample(files: Mapping[str, Path], model: Model, native: set[str]) -> dict[str, Array]:
    """The arrays of one inference, in the model's own types."""
    import numpy as np

    feed = {}
    for tensor in model.inputs:
        file = files[tensor.name]
        dtype = np.dtype(tensor.dtype if tensor.name in native else "float32")
        try:
            content = file.read_bytes()
        except OSError as error:
            fail(f"Could not open file: {file}: {error.strerror}")
        expected = int(np.prod(tensor.shape)) * dtype.itemsize
        if len(content) != expected:
            fail(f"Invalid input file size {file}: {len(content)} bytes, input tensor {tensor.name!r} takes {expected}")
        array = np.frombuffer(content, dtype).reshape(tensor.shape)
        feed[tensor.name] = array if dtype == tensor.dtype else from_float(array, tensor)
    return feed


def from_float(array: Array, tensor: TensorInfo) -> Array:
    """float32 to a tensor's own type: as the SDK's published sample does it, in float64 and rounding halves away from 0."""
    import numpy as np

    if tensor.encoding is None:
        return array.astype(tensor.dtype)
    scale, zero = (np.float64(np.float32(tensor.encoding.scale[0])), tensor.encoding.zero_point[0])
    low, high = tensor.encoding.limits
    q = array.astype(np.float64) / scale + zero
    return np.clip(np.trunc(q + np.copysign(0.5, q)), low, high).astype(tensor.dtype)


def to_float(array: Array, tensor: TensorInfo) -> Array:
    """A tensor's own type to float32."""
    import numpy as np

    if tensor.encoding is None:
        return array.astype(np.float32)
    scale, zero = (np.float64(np.float32(tensor.encoding.scale[0])), tensor.encoding.zero_point[0])
    return ((array.astype(np.float64) - zero) * scale).astype(np.float32)


def write_results(folder: Path, model: Model, results: Mapping[str, Array], kinds: str) -> None:
    """The outputs of one inference; a float32 tensor has one file, whatever is asked for."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for tensor in model.outputs:
        array = np.ascontiguousarray(results[tensor.name])
        if tensor.dtype == "float32" or kinds != "native_only":
            content = array if tensor.dtype == "float32" else to_float(array, tensor)
            write_file(folder, f"{tensor.name}.raw", content.tobytes())
        if tensor.dtype != "float32" and kinds != "float_only":
            write_file(folder, f"{tensor.name}_native.raw", array.tobytes())


def write_file(folder: Path, name: str, content: bytes) -> None:
    """A file called as a tensor is, in a folder below which there is none."""
    try:
        (folder / name).write_bytes(content)
    except (FileNotFoundError, NotADirectoryError):
        fail(f"Failed to open output file for writing: {folder}/{name}")


# --- faults ----------------------------------------------------------------------------------------------------------------


def misbehave_while_executing(fault: str) -> None:
    """Die or hang, if that is the fault."""
    if fault == "crash":
        _die(signal.SIGSEGV)
    if fault == "killed":
        _die(signal.SIGKILL)
    if fault == "hang":
        while True:
            signal.pause()


def _die(number: int) -> NoReturn:
    sys.stdout.flush()
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)
    os._exit(1)


def spoil(output: Path, model: Model, count: int, fault: str) -> None:
    """Change the files of the last inference, if that is the fault."""
    last = output / f"Result_{count - 1}"
    files = sorted(last.glob("*.raw")) if last.is_dir() else []
    if not files:
        return
    content = files[0].read_bytes()
    if fault == "missing-output":
        files[0].unlink()
    elif fault == "short-output":
        files[0].write_bytes(content[:-1])
    elif fault == "long-output":
        files[0].write_bytes(content + b"\0")
    elif fault == "extra-output":
        (last / "another.raw").write_bytes(content)
    elif fault == "stale-output":
        old = output / f"Result_{count + 3}"
        old.mkdir()
        (old / files[0].name).write_bytes(content)


if __name__ == "__main__":
    main()
