"""Loads models into onnxruntime and runs them on request: the part that a host's runtime process and a device share.

Self-contained, since it also is the program that is pushed to a device and started there with ``python3``: it needs the
standard library, numpy and onnxruntime, and runs on Python 3.9. As a program it takes requests on standard input and
answers on standard output, both as frames:

    4 bytes   b"QnA1"
    u32       bytes of the header, little endian like all that follows
    u64       bytes of the payload
    u32       CRC-32 of header and payload
    header    a JSON object; "tensors" lists [name, dtype, shape] of what the payload consists of, in this order
    payload   each tensor's elements in C order

The program is two processes. One holds the runtime; whatever native code prints there goes into a memory file and is sent with the
answer. The other loads nothing, and ends the first at its deadline, beyond its memory limit, when standard input is closed and
when nobody has asked for anything for long; also in the middle of native code that holds the interpreter.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import platform
import queue
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, Union

FORMAT = 1
QNN = "QNNExecutionProvider"
MIB = 1 << 20

# how the program ends, beside 0 and 128 + the number of a signal; END_BETWEEN: a signal, but while nothing was asked
END_DEADLINE, END_MEMORY, END_IDLE, END_FRAME, END_BETWEEN = 90, 91, 92, 93, 94

SIZES = {
    "bool": 1,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    **{f"{sign}int{bits}": bits // 8 for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # bytes of an element, of each type that travels


class Refused(Exception):
    """A request that failed in a way that the process survives."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# --- frames -----------------------------------------------------------------------------------------------------------

PREFIX = struct.Struct("<4sIQI")
MAGIC = b"QnA1"
HEADER_BYTES = 32 * MIB
PAYLOAD_BYTES = 16 << 30
RANK = 64

Buffer = Union[bytes, bytearray, memoryview]  # noqa: UP007 - this line runs on Python 3.9


class FrameError(Exception):
    """What came is no frame, or not a sound one: nothing after it can be understood either."""


class PayloadTooLarge(Exception):
    """A sound frame with more payload than there is room for; the payload was not read. ``header``, ``size``: of the frame."""

    def __init__(self, header: dict[str, Any], size: int) -> None:
        super().__init__(f"{size} bytes")
        self.header, self.size = header, size


class TensorPlace(NamedTuple):
    """A tensor as a header declares it; ``size`` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def make_frame(header: Mapping[str, Any], arrays: Mapping[str, Any]) -> list[Buffer]:
    """A frame with ``arrays`` (numpy, of types in ``SIZES``) as its payload, in parts that are to be sent one after the other.

    Raises:
        FrameError: the header is beyond what is read.
    """
    tensors: list[Any] = []
    parts: list[memoryview] = []
    for name, array in arrays.items():
        import numpy as np  # not before it is needed: a device may lack it, and must be able to say so

        # ascontiguousarray makes a scalar one-dimensional: the shape is the original's
        tensors.append([name, array.dtype.name, list(array.shape)])
        if array.size:
            data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
            parts.append(data.reshape(-1).view(np.uint8).data)
    text = json.dumps({**header, "tensors": tensors}).encode()
    if len(text) > HEADER_BYTES:
        raise FrameError(f"a header of {len(text)} bytes is more than the {HEADER_BYTES} that are read")
    checksum = zlib.crc32(text)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    prefix = PREFIX.pack(MAGIC, len(text), sum(len(part) for part in parts), checksum)
    return [prefix + text, *parts]


def read_frame(
    read: Callable[[int], Buffer],
    limit: int = PAYLOAD_BYTES,
    check: Callable[[list[TensorPlace]], None] = lambda _: None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The next frame: its header, and its arrays by name (over what was read, not copied).

    Args:
        read: gives exactly as many bytes as it is asked for.
        limit: bytes of payload that there is room for.
        check: told what the payload will be, before any of it is read; may raise.

    Raises:
        FrameError: it isn't sound.
        PayloadTooLarge: as it says.
    """
    magic, header_size, payload_size, checksum = PREFIX.unpack(read(PREFIX.size))
    if magic != MAGIC:
        raise FrameError(f"it begins with {bytes(magic)!r} and not with {MAGIC!r}")
    if header_size > HEADER_BYTES or payload_size > PAYLOAD_BYTES:
        raise FrameError(f"it claims {header_size} bytes of header and {payload_size} of payload")
    text = bytes(read(header_size))
    header = _parse_header(text)
    places = _parse_places(header.pop("tensors", None))
    declared = sum(place.size for place in places)
    if declared != payload_size:
        raise FrameError(f"its tensors have {declared} bytes, its payload {payload_size}")
    if payload_size > limit:
        raise PayloadTooLarge(header, payload_size)
    check(places)
    found = zlib.crc32(text)
    arrays = {}
    for place in places:
        data = read(place.size) if place.size else b""
        found = zlib.crc32(data, found)
        arrays[place.name] = _array(place, data)
    if found != checksum:
        raise FrameError("its checksum is wrong")
    return header, arrays


def _parse_header(text: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        header = json.loads(text.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"its header is not JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise FrameError(f"its header is {type(header).__name__} and not an object")
    return header


def _parse_places(tensors: Any) -> list[TensorPlace]:
    if not isinstance(tensors, list):
        raise FrameError("its header doesn't list its tensors")
    places, names = [], set()
    for row in tensors:
        if not (isinstance(row, list) and len(row) == 3):
            raise FrameError(f"a tensor is declared as {str(row)[:200]}")
        name, dtype, shape = row
        if not isinstance(name, str) or name in names:
            raise FrameError(f"a tensor is called {str(name)[:200]!r}, or two are")
        if not isinstance(dtype, str) or dtype not in SIZES:
            raise FrameError(f"tensor {name[:200]!r} has type {str(dtype)[:200]!r}")
        if not isinstance(shape, list) or len(shape) > RANK or any(type(d) is not int or d < 0 for d in shape):
            raise FrameError(f"tensor {name[:200]!r} has shape {str(shape)[:200]}")
        extent = count = SIZES[dtype]
        for size in shape:
            extent, count = extent * max(size, 1), count * size
            if extent > PAYLOAD_BYTES:  # of an empty tensor too: numpy would refuse it
                raise FrameError(f"tensor {name[:200]!r} has shape {str(shape)[:200]}")
        names.add(name)
        places.append(TensorPlace(name, dtype, tuple(shape), count))
    return places


def _array(place: TensorPlace, data: Buffer) -> Any:
    import numpy as np

    if len(data) != place.size:
        raise FrameError(f"tensor {place.name[:200]!r} has {len(data)} bytes and not {place.size}")
    if place.dtype == "bool" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise FrameError(f"tensor {place.name[:200]!r} has truth values that are neither 0 nor 1")
    return np.frombuffer(data, np.dtype(place.dtype).newbyteorder("<")).reshape(place.shape)


# --- what both processes of a program, and a host's runtime process, need ---------------------------------------------


def die_with_parent(lifeline: int) -> None:
    """Die when the other end of the pipe ``lifeline`` closes, even in the middle of native code.

    The kernel sends SIGIO, whose default action ends the process, when the last writer is gone. (A parent-death signal
    would fire when the *thread* that started this process ends, which may be long before its process does.)
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)

    def wait() -> None:  # for a parent that died before the lines above ran
        os.read(lifeline, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def peak_memory_mib() -> float:
    """Peak resident memory since :func:`reset_peak_memory`, in MiB."""
    with suppress(OSError, ValueError), open("/proc/self/status") as f:
        for line in f:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak_memory() -> None:
    """Start measuring the peak anew (Linux: proc(5), clear_refs)."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def cpu_seconds() -> float:
    """Processor time of this process and its threads."""
    times = os.times()
    return times.user + times.system


# --- the runtime ------------------------------------------------------------------------------------------------------


class Runtime:
    """Serves requests, one at a time. Tensors come as arrays and go as arrays: how they travel is the caller's."""

    def __init__(self) -> None:
        self.sessions: dict[int, Any] = {}
        self.run_options: dict[int, Any] = {}  # by session, where it has any
        self.qnn_registered = False

    def handle(self, message: Mapping[str, Any], feed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Answer one request: the answer, and arrays by name.

        Raises:
            Refused: it failed, and why.
        """
        return getattr(self, f"do_{message['op']}")(message, feed)  # type: ignore[no-any-return]

    def do_load(self, message: Mapping[str, Any], feed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compile and load a model."""
        ort = import_onnxruntime()
        start = time.perf_counter()
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, message["level"])
        options.log_severity_level = message["log_severity"]
        for name, size in message["dimensions"]:
            options.add_free_dimension_override_by_name(name, size)
        for key, value in message["config"]:
            options.add_session_config_entry(key, value)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        provider_options = dict(message["provider_options"])
        if message["provider"] == QNN:
            self._add_qnn(options, provider_options)
            providers = None
        else:
            providers = ["CPUExecutionProvider"]
        try:
            session = ort.InferenceSession(message["model"], options, providers=providers)
        except Exception as error:
            raise Refused("load", _first_lines(error)) from error
        session.disable_fallback()
        libraries = check_libraries(provider_options) if message["provider"] == QNN else []
        self.sessions[message["session"]] = session
        if message["run_options"]:
            self.run_options[message["session"]] = run_options = ort.RunOptions()
            run_options.log_severity_level = message["log_severity"]
            for key, value in message["run_options"]:
                run_options.add_run_config_entry(key, value)
        answer = {
            "inputs": [[v.name, v.type, v.shape] for v in session.get_inputs()],
            "outputs": [[v.name, v.type, v.shape] for v in session.get_outputs()],
            "placement": [
                [group.ep_name, node.name, node.op_type]
                for group in session.get_provider_graph_assignment_info()
                for node in group.get_nodes()
            ],
            "libraries": libraries,
            "seconds": time.perf_counter() - start,
        }
        return answer, {}

    def _add_qnn(self, options: Any, provider_options: dict[str, str]) -> None:
        ort = import_onnxruntime()
        library = import_onnxruntime_qnn().get_library_path()
        backend = provider_options.get("backend_path", "")
        if backend and "/" not in backend:  # a device's own folder isn't known elsewhere
            provider_options["backend_path"] = os.path.join(os.path.dirname(library), backend)
            if not os.path.isfile(provider_options["backend_path"]):
                raise Refused(
                    "unavailable",
                    f"the installed onnxruntime-qnn has no {backend}, which this backend needs: install a release that has it",
                )
        if not self.qnn_registered:
            ort.register_execution_provider_library(QNN, library)
            self.qnn_registered = True
        devices = [d for d in ort.get_ep_devices() if d.ep_name == QNN]
        if not devices:
            raise Refused(
                "unavailable", f"the QNN execution provider found no device on this {platform.machine()} host"
            )
        options.add_provider_for_devices(devices[:1], provider_options)

    def do_run(self, message: Mapping[str, Any], feed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """One inference."""
        import numpy as np

        session, run_options = self.sessions[message["session"]], self.run_options.get(message["session"])
        names = [o.name for o in session.get_outputs()]
        start = time.perf_counter()
        try:
            results = session.run(names, feed, run_options)
        except Exception as error:
            raise Refused("execute", _first_lines(error)) from error
        seconds = time.perf_counter() - start
        arrays = {}
        for index, name in enumerate(names):
            array = np.asarray(results[index])
            if array.dtype.name not in SIZES:
                raise Refused("dtype", f"output {name!r} has type {array.dtype}, which can't be handed over")
            arrays[name] = array
        return {"seconds": seconds}, arrays

    def do_time(self, message: Mapping[str, Any], feed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Time single inferences, until there are ``count`` of them or ``seconds`` are over."""
        session, run_options = self.sessions[message["session"]], self.run_options.get(message["session"])
        names = [o.name for o in session.get_outputs()]
        if message["reset_peak"]:
            reset_peak_memory()
        times: list[float] = []
        clock = time.perf_counter
        spent, begin = cpu_seconds(), clock()
        end = begin + message["seconds"]
        try:
            while len(times) < message["count"]:
                start = clock()
                session.run(names, feed, run_options)
                stop = clock()
                times.append((stop - start) * 1e3)
                if stop > end:
                    break
        except Exception as error:
            raise Refused("execute", _first_lines(error)) from error
        share = (cpu_seconds() - spent) / max(clock() - begin, 1e-9)
        return {"times_ms": times, "peak_memory_mib": peak_memory_mib(), "cpu_share": share}, {}

    def do_close(self, message: Mapping[str, Any], feed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Forget a model."""
        self.sessions.pop(message["session"], None)
        self.run_options.pop(message["session"], None)
        return {}, {}

    def do_versions(self, message: Mapping[str, Any], feed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What runs here."""
        ort = import_onnxruntime()
        return {"onnxruntime": ort.__version__, "build": ort.get_build_info(), "pid": os.getpid()}, {}


def answer(serve: Callable[[], tuple[dict[str, Any], dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``serve`` answers, or why it doesn't."""
    try:
        reply, arrays = serve()
        return {"ok": True, **reply}, arrays
    except Refused as error:
        return {"ok": False, "kind": error.kind, "message": str(error)}, {}
    except MemoryError as error:
        return {"ok": False, "kind": "memory", "message": str(error) or "out of memory"}, {}
    except Exception as error:
        return {"ok": False, "kind": "internal", "message": f"{type(error).__name__}: {error}"}, {}


def import_onnxruntime() -> Any:
    """onnxruntime, of a release that can be used.

    Raises:
        Refused: it isn't there, can't be loaded, or is too old to say where a model's nodes ran.
    """
    try:
        import onnxruntime
    except Exception as error:  # ImportError, and what broken installations raise
        raise _not_importable("onnxruntime", error) from None
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        raise Refused(
            "unavailable",
            f"onnxruntime {getattr(onnxruntime, '__version__', '')} is too old: only 1.24 and later tell where a model's nodes ran: "
            f"{_install('onnxruntime>=1.24')}",
        )
    return onnxruntime


def import_onnxruntime_qnn() -> Any:
    """onnxruntime-qnn.

    Raises:
        Refused: it isn't there, or is of the kind that replaced onnxruntime itself.
    """
    try:
        import onnxruntime_qnn
    except Exception as error:
        raise _not_importable("onnxruntime-qnn", error) from None
    if not hasattr(onnxruntime_qnn, "get_library_path"):
        raise Refused("unavailable", f"onnxruntime-qnn is too old: {_install('onnxruntime-qnn>=2')}")
    return onnxruntime_qnn


def _not_importable(package: str, error: BaseException) -> Refused:
    if isinstance(error, ModuleNotFoundError) and error.name == package.replace("-", "_"):
        return Refused("unavailable", f"{package} is not installed: {_install(package)}")
    return Refused("unavailable", f"{package} can't be imported ({_first_lines(error)}): {_install(package)}")


def _install(package: str) -> str:
    return f"{sys.executable} -m pip install '{package}' (this is Python {platform.python_version()}, {platform.machine()})"


def mapped_libraries() -> list[str]:
    """QNN's libraries in this process, by path."""
    found = set()
    with suppress(OSError), open("/proc/self/maps", errors="surrogateescape") as maps:
        for line in maps:
            if "/lib" in line:
                path = line.split(maxsplit=5)[5].strip()
                if os.path.basename(path).startswith(("libQnn", "libHtpPrepare")):
                    found.add(path)
    return sorted(found)


def check_libraries(provider_options: Mapping[str, str]) -> list[str]:
    """Refuse a runtime that isn't the one that records name: the loader may have found QNN's libraries elsewhere.

    Returns:
        QNN's libraries in this process.

    Raises:
        Refused: one is not of the installed onnxruntime-qnn, nor beside ``backend_path``.
    """
    allowed = [os.path.realpath(os.path.dirname(import_onnxruntime_qnn().get_library_path()))]
    if backend := provider_options.get("backend_path"):
        allowed.append(os.path.realpath(os.path.dirname(backend)))
    libraries = mapped_libraries()
    for library in libraries:
        if os.path.realpath(os.path.dirname(library)) not in allowed:
            raise Refused(
                "library",
                f"the runtime loaded {library} in place of the installed onnxruntime-qnn's: take its folder out of "
                "LD_LIBRARY_PATH and LD_PRELOAD",
            )
    return libraries


def _first_lines(error: BaseException) -> str:
    return "\n".join(str(error).strip().splitlines()[:12]) or type(error).__name__


# --- the program on a device ------------------------------------------------------------------------------------------

LOG_LINES, LOG_LINE = 4000, 2000
LOG_BYTES = 64 * MIB  # of the memory file; beyond that its beginning is lost
TAIL_BYTES = 16384
QUEUED_FRAMES = 64
WATCH_MS = 100
HANG_UP = select.POLLHUP | select.POLLERR | select.POLLNVAL | getattr(select, "POLLRDHUP", 0x2000)
LIMITS = struct.Struct("<dd")  # memory limit in MiB, deadline on the monotonic clock; 0: nothing is asked


class DeviceRuntime(Runtime):
    """What the program on a device serves."""

    def do_load(self, message: Mapping[str, Any], feed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compile and load a model whose files lie elsewhere on the device, each under any name.

        They are put into the new folder ``folder`` under the names in ``files``, which other files of the model know them by.
        """
        folder = os.path.abspath(message["folder"])
        for name, source in message["files"]:
            put_file(source, folder, name)
        model = os.path.join(folder, message["files"][0][0])
        options = dict(message["provider_options"])
        simulator = message["provider"] == QNN and platform.machine() == "x86_64"
        simulator = simulator and (options.get("backend_type") == "htp" or "Htp" in options.get("backend_path", ""))
        if simulator and not options.get("soc_model"):  # it would be one of its own choice, that nobody asked for
            raise Refused("unavailable", "this is x86-64, where a simulator computes: it must be told which SoC to be")
        reply, _ = super().do_load({**message, "model": model}, feed)
        reply["versions"], _ = self.do_versions({"qnn": message["provider"] == QNN}, {})
        return reply, {}

    def do_versions(self, message: Mapping[str, Any], feed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What runs here; with ``qnn``, QNN must be there too."""
        reply, _ = super().do_versions(message, feed)
        import numpy as np

        reply.update(
            python=platform.python_version(),
            executable=sys.executable,
            machine=platform.machine(),
            system=platform.platform(),
            numpy=np.__version__,
        )
        if message.get("qnn"):
            qnn = import_onnxruntime_qnn()
            package = getattr(qnn, "build_and_package_info", None)
            reply.update(
                onnxruntime_qnn=str(getattr(qnn, "__version__", "")),
                qnn=str(getattr(package, "qnn_version", "")),  # empty where the package doesn't tell
                folder=os.path.dirname(qnn.get_library_path()),
            )
        return reply, {}

    def do_profile(self, message: Mapping[str, Any], feed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load a model with profiling on and run it once: the array "profile" has the bytes of what the runtime wrote."""
        import numpy as np

        with tempfile.TemporaryDirectory(dir=os.getcwd(), prefix="profile-") as folder:
            file = os.path.join(folder, "profile.csv")
            options = [*message["provider_options"], ["profiling_level", "detailed"], ["profiling_file_path", file]]
            session = {"session": -1, "provider_options": options, "folder": os.path.join(folder, "model")}
            try:
                self.do_load({**message, **session}, {})
                self.do_run({**message, **session}, feed)
            finally:
                self.do_close(session, {})
            try:
                with open(file, "rb") as f:
                    content = f.read()
            except OSError as error:
                raise Refused("execute", f"the runtime wrote no profile ({error.strerror})") from None
        return {}, {"profile": np.frombuffer(content, np.uint8)}


def put_file(source: str, folder: str, name: str) -> None:
    """Put the file ``source`` into ``folder`` as ``name``, a relative path: a hard link where that can be, else a copy.

    A symbolic link would not do: what it leads to may be removed while the model is loaded.

    Raises:
        Refused: the name leaves the folder, or the file can't be put there.
    """
    path = os.path.normpath(os.path.join(folder, name))
    if "\0" in name or not path.startswith(folder + os.sep):
        raise Refused("file", f"{name!r} is no name for a file in a model's folder")
    source = os.path.realpath(source)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with suppress(FileNotFoundError):
            os.unlink(path)
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)
    except OSError as error:
        kind = "space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "file"
        raise Refused(kind, f"{name!r} can't be put into {folder} ({error.strerror})") from None


class Server:
    """Takes requests from one descriptor and writes answers to another, in order, until the first is closed."""

    def __init__(self, requests: int, answers: int, log: int, errors: int, limits: mmap.mmap) -> None:
        self.requests, self.answers, self.log, self.errors, self.limits = requests, answers, log, errors, limits
        self.runtime = DeviceRuntime()
        self.frames: queue.Queue[tuple[dict[str, Any], Any]] = queue.Queue(QUEUED_FRAMES)

    def serve(self) -> None:
        """Serve; doesn't return."""
        self._send({"agent": FORMAT, "python": platform.python_version(), "pid": os.getpid()}, {})
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            message, feed = self.frames.get()
            LIMITS.pack_into(
                self.limits, 0, float(message["limit_mib"]), time.monotonic() + float(message["limit_seconds"])
            )
            if isinstance(feed, PayloadTooLarge):
                refusal = f"{feed.size / MIB:.0f} MiB of inputs are more than the device has room for"
                reply, arrays = answer(lambda: _refuse("memory", refusal))  # noqa: B023
            else:
                reply, arrays = answer(lambda: self.runtime.handle(message, feed))  # noqa: B023
            reply.update(op=message.get("op"), id=message.get("id"), log=read_log(self.log))
            os.ftruncate(self.log, 0)
            LIMITS.pack_into(self.limits, 0, 0.0, 0.0)  # a slow line is the host's to judge
            del feed
            try:
                self._send(reply, arrays)
            except FrameError as error:  # a graph of a million nodes, say
                self._send(
                    {**reply, "ok": False, "kind": "internal", "message": str(error), "log": [], "placement": []}, {}
                )

    def _read(self) -> None:
        """Read frames ahead, so that transfers and inferences overlap."""
        try:
            while True:
                try:
                    self.frames.put(read_frame(self._exactly, _room()))
                except PayloadTooLarge as error:
                    left = error.size
                    while left:
                        left -= len(self._exactly(min(left, MIB)))
                    self.frames.put((error.header, error))
        except EOFError:
            os._exit(0)
        except BaseException as error:
            os.write(self.errors, f"a request can't be read: {type(error).__name__}: {error}\n".encode())
            os._exit(END_FRAME)

    def _exactly(self, count: int) -> Buffer:
        buffer = bytearray(count)
        view, done = memoryview(buffer), 0
        while done < count:
            got = os.readv(self.requests, [view[done:]])
            if not got:
                raise EOFError
            done += got
        return buffer

    def _send(self, header: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
        parts = [memoryview(part) for part in make_frame(header, arrays)]
        try:
            while parts:
                sent = os.writev(self.answers, parts[:64])
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][sent:]
        except OSError:  # nobody reads it any more
            os._exit(0)


def _refuse(kind: str, message: str) -> NoReturn:
    raise Refused(kind, message)


def _room() -> int:
    """Bytes that a request may have: half of what is available."""
    with suppress(OSError, ValueError), open("/proc/meminfo") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 2
    return PAYLOAD_BYTES


def read_log(log: int) -> list[str]:
    """The last lines of the memory file."""
    size = os.fstat(log).st_size
    if not size:
        return []
    most = 4 * MIB
    text = os.pread(log, most, max(0, size - most)).decode("utf-8", "replace")
    return [line[:LOG_LINE] for line in text.splitlines()[-LOG_LINES:] if line.strip()]


def watch(child: int, alive: int, log: int, errors: int, limits: mmap.mmap, idle_seconds: float) -> int:
    """Look after the process that holds the runtime, until it ends or must be ended; returns the program's exit code.

    Args:
        alive: a pipe that closes when it ends.
        log: where its native code logs; the end of that goes to ``errors`` unless it ended in peace.
    """
    poll = select.poll()
    poll.register(0, HANG_UP)
    poll.register(alive, HANG_UP)
    idle_since = time.monotonic()
    end, said = 0, ""
    while True:
        events = [fd for fd, _ in poll.poll(WATCH_MS)]
        memory_mib, deadline = LIMITS.unpack_from(limits, 0)
        now = time.monotonic()
        if alive in events:
            break
        if 0 in events:
            end, said = 0, "nobody is there any more"
        elif deadline:
            idle_since = now
            if now > deadline:
                end, said = END_DEADLINE, "it took too long"
            elif (used := resident_mib(child)) > memory_mib:
                end, said = END_MEMORY, f"it used {used:.0f} MiB of memory"
        elif now - idle_since > idle_seconds:
            end, said = END_IDLE, "nothing was asked for long"
        if os.fstat(log).st_size > LOG_BYTES:
            os.ftruncate(log, 0)
        if said:
            break
    if said:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not said:
        _, asked = LIMITS.unpack_from(limits, 0)
        if not os.WIFSIGNALED(status):
            end = os.WEXITSTATUS(status)
        elif asked:
            end = 128 + os.WTERMSIG(status)
        else:
            end, said = END_BETWEEN, f"it was killed by signal {os.WTERMSIG(status)} between requests"
    if end not in (0, END_IDLE):
        with suppress(OSError):
            size = os.fstat(log).st_size
            os.write(errors, os.pread(log, TAIL_BYTES, max(0, size - TAIL_BYTES)) + b"\n")
            if said:
                os.write(errors, f"{said}\n".encode())
    return end


def resident_mib(pid: int) -> float:
    """Resident memory of a process; 0 if that can't be read."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize() / MIB
    return 0.0


def library_environment(folder: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with which the loader, and FastRPC for what runs on the DSP, find QNN's libraries in ``folder`` first.

    ``LD_LIBRARY_PATH`` is split by ":", ``ADSP_LIBRARY_PATH`` by ";" (manual of qnn-net-run).
    """
    changed = {}
    for name, separator in (("LD_LIBRARY_PATH", ":"), ("ADSP_LIBRARY_PATH", ";")):
        folders = [f for f in environment.get(name, "").split(separator) if f]
        if folders[:1] != [folder]:
            changed[name] = separator.join([folder, *folders])
    return changed


def _restart_with_libraries(answers: int, arguments: Sequence[str]) -> None:
    """Start this program anew with QNN's libraries first on the loader's path, which it reads only at the start."""
    try:
        folder = os.path.dirname(import_onnxruntime_qnn().get_library_path())
    except Refused:
        return  # told when it is asked for
    changed = library_environment(folder, os.environ)
    if changed:
        os.dup2(answers, 1)
        os.execve(sys.executable, [sys.executable, *arguments], {**os.environ, **changed})


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("log")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
    return descriptor


def main() -> None:
    """``python3 agent.py IDLE_SECONDS``"""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever prints must not disturb the answers
    del sys.path[0]  # the folder that this file lies in has nothing to import
    if len(sys.argv) < 3:
        _restart_with_libraries(answers, [sys.argv[0], sys.argv[1], "restarted"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for descriptor in (0, answers):  # fewer turns for large tensors; fcntl(2), F_SETPIPE_SZ
        with suppress(OSError):
            fcntl.fcntl(descriptor, 1031, MIB)
    errors, log = os.dup(2), _memory_file()
    limits = mmap.mmap(-1, mmap.PAGESIZE)
    lifeline_read, lifeline_write = os.pipe()
    alive_read, alive_write = os.pipe()
    child = os.fork()
    if child:
        os.close(lifeline_read)
        os.close(alive_write)
        os.close(answers)
        os._exit(watch(child, alive_read, log, errors, limits, float(sys.argv[1])))
    os.close(lifeline_write)
    os.close(alive_read)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # where memory runs out, this is what to end
    os.dup2(log, 1)
    os.dup2(log, 2)
    die_with_parent(lifeline_read)
    Server(0, answers, log, errors, limits).serve()


if __name__ == "__main__":
    main()
