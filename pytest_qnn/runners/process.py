"""A runtime process, seen from pytest: started on demand, watched, killed at a deadline, never waited for in vain.

``SIGKILL`` of pytest, Ctrl-C, a crash of native code, a hang and a memory leak each end with the process gone and, where
somebody is left to be told, with an error that says what happened.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from weakref import WeakSet

import psutil

from pytest_qnn.errors import RuntimeCrashError, TargetError, TargetMemoryError, TargetTimeoutError
from pytest_qnn.runners.shared_tensors import Arena, Array
from pytest_qnn.runners.worker import LOG_MARK

LOG_LINES = 4000
SHOWN_LOG_LINES = 8
POLL_SECONDS = 0.1
MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a request may use: seconds to load, seconds per inference, MiB of resident memory."""

    load_seconds: float
    run_seconds: float
    memory_mib: float


def own_environment() -> dict[str, str]:
    """This process's environment, without folders in LD_LIBRARY_PATH that have QNN libraries.

    The execution provider finds its backend library by name. The QNN SDK's manuals put the SDK's folder into that variable, and
    then the SDK's library would run while records name the installed wheel's release.
    """
    environment = dict(os.environ)
    if folders := environment.get("LD_LIBRARY_PATH"):
        kept = [f for f in re.split("[:;]", folders) if f and not any(Path(f).glob("libQnn*.so"))]
        environment["LD_LIBRARY_PATH"] = ":".join(kept)
    return environment


def how_it_ended(code: int) -> str:
    """What an exit code says; one below 0 is the number of a signal."""
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else "unknown"
    memory = ", as the kernel does when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}){memory}"


def last_lines(lines: Sequence[str]) -> str:
    """The end of a log, to be put behind a message that has no full stop yet."""
    if not lines:
        return ".\nIt logged nothing."
    return ".\nLast log lines:\n" + "\n".join(f"  {line[:300]}" for line in lines[-SHOWN_LOG_LINES:])


class RuntimeProcess:
    """One runtime process and the line to it.

    Requests are answered one at a time; calls from several threads wait for each other.
    """

    def __init__(self, name: str, faults: list[TargetError] | None = None) -> None:
        self.name = name
        self.faults = [] if faults is None else faults  # what went wrong, also if whoever asked keeps it to itself
        self.owner = os.getpid()
        self._lock = threading.RLock()
        self._ids = itertools.count(1)
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._log_grew = threading.Condition()
        self._log_seen = 0
        with ExitStack() as undo:
            self._start(undo)
            undo.pop_all()  # all went well: nothing to undo
        _living.add(self)

    def _start(self, undo: ExitStack) -> None:
        self.inputs = Arena.create("qnn-inputs")
        undo.callback(self.inputs.close)
        self.outputs = Arena.create("qnn-outputs")
        undo.callback(self.outputs.close)
        ours, theirs = socket.socketpair()
        undo.callback(ours.close)
        undo.callback(theirs.close)
        lifeline_read, self._lifeline = os.pipe()
        undo.callback(os.close, self._lifeline)
        log_read, log_write = os.pipe()
        undo.callback(os.close, log_read)
        fds = (theirs.fileno(), lifeline_read, self.inputs.fd, self.outputs.fd)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pytest_qnn.runners.worker", *map(str, fds)],
                env=own_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log_write,
                stderr=log_write,
                pass_fds=fds,
                start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
            )
        finally:
            theirs.close()
            os.close(lifeline_read)
            os.close(log_write)
        self._connection = Connection(ours.detach())
        self._watch = psutil.Process(self._process.pid)
        self._reader = threading.Thread(target=self._read_log, args=(log_read,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can still take requests."""
        return self._process.poll() is None and not self._connection.closed

    # --- requests -----------------------------------------------------------------------------------------------------

    def request(self, op: str, subject: str, timeout: float, memory_mib: float, **fields: Any) -> dict[str, Any]:
        """Send a request and wait for its answer, for at most ``timeout`` seconds.

        Args:
            op: name of the request.
            subject: what it is about, for errors: model and backend.

        Returns:
            The answer; ``answer["ok"]`` tells whether it worked. ``answer["log"]`` has the lines logged meanwhile.

        Raises:
            RuntimeCrashError: the process died.
            TargetTimeoutError: the deadline passed; the process was killed.
            TargetMemoryError: it used more than ``memory_mib``; it was killed.
        """
        with self._lock:
            ident = next(self._ids)
            self._log.clear()
            try:
                self._connection.send_bytes(json.dumps({"op": op, "id": ident, **fields}).encode())
                answer = self._wait(op, subject, timeout, memory_mib)
            except (EOFError, OSError):
                self.faults.append(crash := self._crash(op, subject))
                raise crash from None
            except TargetError as error:  # a deadline or the memory limit: it is dead already
                self.faults.append(error)
                raise
            except BaseException:  # Ctrl-C and the like: the answer would come to whoever asks next
                self.kill()
                raise
            answer["log"] = self._log_of(ident)
            return answer

    def run(
        self,
        op: str,
        subject: str,
        inputs: Mapping[str, Array],
        timeout: float,
        memory_mib: float,
        **fields: Any,
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """A request that takes tensors and may bring some back (copied out of the shared memory)."""
        with self._lock:  # the arenas are one call's at a time
            try:
                layout = self.inputs.write(inputs)
            except OSError as error:
                raise TargetMemoryError(
                    f"{subject}: no shared memory for the inputs ({error.strerror}): free some memory on this host"
                ) from error
            answer = self.request(op, subject, timeout, memory_mib, inputs=layout, **fields)
            views = self.outputs.views(answer["outputs"]) if answer.get("outputs") else {}
            return answer, {name: view.copy() for name, view in views.items()}

    def _wait(self, op: str, subject: str, timeout: float, memory_mib: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if self._connection.poll(max(0.0, min(POLL_SECONDS, left))):
                answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
                return answer
            if self._process.poll() is not None:
                raise EOFError
            if (used := self._memory_mib()) > memory_mib:
                self.kill()
                raise TargetMemoryError(
                    f"{subject}: the runtime process used {used:.0f} MiB of memory during {op}, more than its limit "
                    f"of {memory_mib:.0f} MiB, and was killed. If the model needs that much, raise the setting "
                    f"memory_limit_mb{self._last_lines()}"
                )
            if left <= 0:
                self.kill()
                raise TargetTimeoutError(
                    f"{subject}: {op} did not finish within {timeout:g} s; the runtime process was killed. If the "
                    f"model needs longer, raise the setting {'load' if op == 'load' else 'run'}_timeout"
                    f"{self._last_lines()}"
                )

    def _memory_mib(self) -> float:
        try:
            return float(self._watch.memory_info().rss) / MIB
        except psutil.Error:
            return 0.0

    def _crash(self, op: str, subject: str) -> RuntimeCrashError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self.kill()
        how = how_it_ended(self._process.returncode)
        return RuntimeCrashError(
            f"{subject}: the runtime process {how} during {op}. Whatever comes next gets a fresh process{self._last_lines()}"
        )

    # --- the log ------------------------------------------------------------------------------------------------------

    def _read_log(self, fd: int) -> None:
        with open(fd, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                text = re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip()
                mark = re.search(rf"{LOG_MARK}(\d+)$", text)
                text = text[: mark.start()] if mark else text
                if text:
                    self._log.append(text[:2000])
                if mark:
                    with self._log_grew:
                        self._log_seen = int(mark[1])
                        self._log_grew.notify_all()

    def _log_of(self, ident: int) -> list[str]:
        with self._log_grew:
            self._log_grew.wait_for(lambda: self._log_seen >= ident, timeout=2)
        return list(self._log)

    def _last_lines(self) -> str:
        self._reader.join(2)
        return last_lines(list(self._log))

    # --- the end ------------------------------------------------------------------------------------------------------

    def let_go(self) -> None:
        """Close the line to the process without ending it."""
        with suppress(OSError):
            self._connection.close()
            if self._lifeline >= 0:
                os.close(self._lifeline)
                self._lifeline = -1

    def kill(self) -> None:
        """End the process and everything it started; harmless if it is gone already."""
        if self.owner != os.getpid():  # a fork of pytest: not ours to end
            return
        if self._process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.let_go()
        self.inputs.close()
        self.outputs.close()


_living: WeakSet[RuntimeProcess] = WeakSet()


def _let_go_after_fork() -> None:
    """A forked child must not keep the runtime processes of its parent alive."""
    for process in _living:
        process.let_go()


os.register_at_fork(after_in_child=_let_go_after_fork)


class ProcessPool:
    """Runtime processes by what may not share one; a dead one is replaced on the next use."""

    def __init__(self) -> None:
        self._processes: dict[str, RuntimeProcess] = {}
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self.faults: list[TargetError] = []

    def get(self, key: str) -> RuntimeProcess:
        """The live process for ``key``."""
        if self._owner != os.getpid():  # after a fork the parent's processes must not be talked to
            self._processes, self._owner, self._lock = {}, os.getpid(), threading.Lock()
        with self._lock:
            process = self._processes.get(key)
            if process is None or not process.alive:
                if process is not None:
                    process.kill()
                try:
                    process = self._processes[key] = RuntimeProcess(key, self.faults)
                except OSError as error:
                    raise TargetError(
                        f"no runtime process could be started ({error.strerror or error}): free some memory, processes or "
                        "file descriptors on this host"
                    ) from error
            return process

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.kill()
        self._processes.clear()
