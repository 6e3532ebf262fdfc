"""The program inside a runtime process: loads models into onnxruntime and runs them on request.

Started by :mod:`pytest_qnn.runners.process` as ``python -m pytest_qnn.runners.worker CONTROL LIFELINE INPUTS OUTPUTS``,
four file descriptors: a socket for JSON messages, a pipe that closes when the parent dies, two arenas for tensors.
Everything of QNN is loaded here and nowhere else. Whatever the native code logs goes to standard error.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pytest_qnn.model.tensors import DTYPES
from pytest_qnn.runners.shared_tensors import Arena

LOG_MARK = "\x1e"  # ends the log of one request
MIB = 1 << 20


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


class Refused(Exception):
    """A request that failed in a way that the process survives."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """Serves requests, one at a time."""

    def __init__(self, inputs: Arena, outputs: Arena) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.sessions: dict[int, Any] = {}
        self.run_options: dict[int, Any] = {}  # by session, where it has any
        self.qnn_registered = False

    def handle(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        return getattr(self, f"do_{message['op']}")(message)  # type: ignore[no-any-return]

    def do_load(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Compile and load a model."""
        import onnxruntime as ort

        start = time.perf_counter()
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, message["level"])
        options.log_severity_level = message["log_severity"]
        for name, size in message["dimensions"]:
            options.add_free_dimension_override_by_name(name, size)
        for key, value in message["config"]:
            options.add_session_config_entry(key, value)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if message["provider"] == "QNNExecutionProvider":
            self._add_qnn(options, dict(message["provider_options"]))
            providers = None
        else:
            providers = ["CPUExecutionProvider"]
        try:
            session = ort.InferenceSession(message["model"], options, providers=providers)
        except Exception as error:
            raise Refused("load", _first_lines(error)) from error
        session.disable_fallback()
        if message["provider"] == "QNNExecutionProvider":
            _check_libraries(dict(message["provider_options"]))
        self.sessions[message["session"]] = session
        if message["run_options"]:
            self.run_options[message["session"]] = run_options = ort.RunOptions()
            run_options.log_severity_level = message["log_severity"]
            for key, value in message["run_options"]:
                run_options.add_run_config_entry(key, value)
        return {
            "inputs": [[v.name, v.type, v.shape] for v in session.get_inputs()],
            "outputs": [[v.name, v.type, v.shape] for v in session.get_outputs()],
            "placement": [
                [group.ep_name, node.name, node.op_type]
                for group in session.get_provider_graph_assignment_info()
                for node in group.get_nodes()
            ],
            "seconds": time.perf_counter() - start,
        }

    def _add_qnn(self, options: Any, provider_options: dict[str, str]) -> None:
        import onnxruntime as ort
        import onnxruntime_qnn

        if not self.qnn_registered:
            ort.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
            self.qnn_registered = True
        devices = [d for d in ort.get_ep_devices() if d.ep_name == "QNNExecutionProvider"]
        if not devices:
            raise Refused("unavailable", "the QNN execution provider found no device on this host")
        options.add_provider_for_devices(devices[:1], provider_options)

    def do_run(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """One inference."""
        session, run_options = self.sessions[message["session"]], self.run_options.get(message["session"])
        feed = self.inputs.views(message["inputs"])
        names = [o.name for o in session.get_outputs()]
        start = time.perf_counter()
        try:
            results = session.run(names, feed, run_options)
        except Exception as error:
            raise Refused("execute", _first_lines(error)) from error
        seconds = time.perf_counter() - start
        arrays = {}
        for name, result in zip(names, results, strict=True):
            array = np.asarray(result)
            if array.dtype.name not in DTYPES:
                raise Refused("dtype", f"output {name!r} has type {array.dtype}, which can't be handed over")
            arrays[name] = array
        return {"outputs": self.outputs.write(arrays), "seconds": seconds}

    def do_time(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Time single inferences, until there are ``count`` of them or ``seconds`` are over."""
        session, run_options = self.sessions[message["session"]], self.run_options.get(message["session"])
        feed = self.inputs.views(message["inputs"])
        names = [o.name for o in session.get_outputs()]
        if message["reset_peak"]:
            reset_peak_memory()
        times: list[float] = []
        clock = time.perf_counter
        end = clock() + message["seconds"]
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
        return {"times_ms": times, "peak_memory_mib": peak_memory_mib()}

    def do_close(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Forget a model."""
        self.sessions.pop(message["session"], None)
        self.run_options.pop(message["session"], None)
        return {}

    def do_versions(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """What runs here."""
        import onnxruntime as ort

        return {"onnxruntime": ort.__version__, "build": ort.get_build_info(), "pid": os.getpid()}


def _check_libraries(provider_options: Mapping[str, str]) -> None:
    """Refuse a runtime that isn't the one that records name: the loader may have found QNN's libraries elsewhere."""
    import onnxruntime_qnn

    allowed = [os.path.realpath(os.path.dirname(onnxruntime_qnn.get_library_path()))]
    if backend := provider_options.get("backend_path"):
        allowed.append(os.path.realpath(os.path.dirname(backend)))
    with suppress(OSError), open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if "/lib" in line}
        for library in sorted(mapped):
            folder, name = os.path.split(library)
            if name.startswith(("libQnn", "libHtpPrepare")) and os.path.realpath(folder) not in allowed:
                raise Refused(
                    "library",
                    f"the runtime loaded {library} in place of the installed onnxruntime-qnn's: take its folder out of "
                    "LD_LIBRARY_PATH and LD_PRELOAD",
                )


def _first_lines(error: Exception) -> str:
    return "\n".join(str(error).strip().splitlines()[:12]) or type(error).__name__


def main() -> None:
    """Serve until the parent hangs up."""
    control, lifeline, inputs, outputs = map(int, sys.argv[1:5])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    die_with_parent(lifeline)
    connection = Connection(control)
    worker = Worker(Arena(inputs), Arena(outputs))
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            reply: dict[str, Any] = {"ok": True, **worker.handle(message)}
        except Refused as error:
            reply = {"ok": False, "kind": error.kind, "message": str(error)}
        except MemoryError as error:
            reply = {"ok": False, "kind": "memory", "message": str(error) or "out of memory"}
        except Exception as error:
            reply = {"ok": False, "kind": "internal", "message": f"{type(error).__name__}: {error}"}
        with suppress(OSError):
            os.write(2, f"{LOG_MARK}{message['id']}\n".encode())
        try:
            connection.send_bytes(json.dumps(reply).encode())
        except OSError:
            return


if __name__ == "__main__":
    main()
