"""The program on a device that holds onnxruntime (:mod:`pytest_qnn.runners.agent`), seen from the host: started on demand,
asked over one stream, ended at a deadline, replaced when it died. Nothing that it tells is believed to be more than data of the
type that was declared.
"""

from __future__ import annotations

import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pytest_qnn.devices.attached import AttachedDevice
from pytest_qnn.devices.facts import clean
from pytest_qnn.devices.transport import part
from pytest_qnn.errors import (
    BackendUnavailableError,
    DeviceError,
    DeviceFileError,
    DeviceLostError,
    DeviceSpaceError,
    DeviceTimeoutError,
    RuntimeCrashError,
    TargetError,
    TargetMemoryError,
    TargetTimeoutError,
)
from pytest_qnn.runners import agent
from pytest_qnn.runners.agent import Buffer, FrameError, PayloadTooLarge, TensorPlace
from pytest_qnn.runners.device_python import INSTALL
from pytest_qnn.runners.ort import load_error
from pytest_qnn.runners.process import MIB, how_it_ended, last_lines
from pytest_qnn.runners.shared_tensors import Array

START_SECONDS = 60.0  # for Python on a slow board
SLACK_SECONDS = 15.0  # for a slow line, beyond what the device may take
SLOWEST = 2 * MIB  # bytes per second that a line carries at the worst
STRAY_BYTES = 65536
IDLE_SECONDS = 1800.0  # then the program ends by itself; well before that it is started anew
WINDOW_BYTES = 16 * MIB  # that whoever asks lets be on their way


class EndedBetweenError(RuntimeCrashError):
    """The program on a device died while nothing was asked of it, which was found out only by asking: ask once more."""


class DeviceAgent:
    """The program on a device, and the line to it. Requests are answered one at a time and in order.

    Attributes:
        device: where it runs.
        folder: its working folder on the device.

    Raises:
        BackendUnavailableError: the device's Python can't run it.
        DeviceError: of the transport.
    """

    def __init__(self, device: AttachedDevice, key: str, faults: list[TargetError]) -> None:
        self.device, self.key, self._faults = device, key, faults
        self.lock = threading.RLock()
        self._sent: deque[int] = deque()  # bytes of each request that wasn't answered yet
        self._generation = device.generation
        self._last_use = device.transport.clock()
        workspace = device.workspace
        self.folder = workspace.path
        stored = device.store.put({"agent": Path(agent.__file__)})["agent"]
        program = workspace.link({"agent.py": stored})["agent.py"]
        python = device.facts.python.path if device.facts.python else "python3"
        self._stream = device.transport.start(
            [python, program, str(IDLE_SECONDS)], timeout=START_SECONDS, cwd=self.folder
        )
        self._closed = False
        subject = f"the runtime process on device {device.transport.serial}"
        with self._watched("its start", subject):
            try:
                hello = read_greeting(lambda count: self._stream.read(count, timeout=START_SECONDS))
            except DeviceLostError as error:
                raise self._not_started(error) from error
            if hello.get("agent") != agent.FORMAT:
                raise FrameError(f"its first words are {clean(hello)}")

    def _not_started(self, error: DeviceLostError) -> TargetError:
        code = self._stream.exit_code
        if code is None:
            return error
        facts = self.device.facts
        program = facts.python.path if facts.python else "python3"
        why = last_lines([_plain(line) for line in self._stream.log()])
        return BackendUnavailableError(
            f"device {facts.serial}: {program} could not run the agent (exit code {code}): see that it is Python 3.9 or later, with "
            f"what the runner ort needs: {INSTALL}. Or take the runner net_run{why}"
        )

    @property
    def alive(self) -> bool:
        """Whether it can still take requests, as far as is known."""
        # a stream is one thread's at a time
        with self.lock, part(self.device.transport, f"whether the agent for {self.key} lives", shared=False):
            return (
                not self._closed
                and self._generation == self.device.generation
                and self.device.transport.clock() - self._last_use < IDLE_SECONDS / 2
                and self._stream.exit_code is None
            )

    def ask(
        self,
        op: str,
        subject: str,
        allowed: float,
        memory_mib: float,
        arrays: Mapping[str, Array] | None = None,
        check: Callable[[list[TensorPlace]], None] | None = None,
        **fields: Any,
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Send a request and wait for its answer: see :meth:`send` and :meth:`receive`."""
        with self.lock:
            self.send(op, subject, allowed, memory_mib, arrays or {}, **fields)
            return self.receive(op, subject, allowed, memory_mib, check)

    def send(
        self,
        op: str,
        subject: str,
        allowed: float,
        memory_mib: float,
        arrays: Mapping[str, Array],
        ident: int = 0,
        **fields: Any,
    ) -> None:
        """Send a request; answers come in the order of requests.

        Args:
            op: name of the request.
            subject: what it is about, for errors: model and backend.
            allowed: seconds that the device may take; the program is ended there then.
            memory_mib: resident memory that the runtime's process may have.
            ident: a number that its answer has too. The same requests have the same ones in every run, or a recording of them
                could not be replayed in part.

        Raises:
            TargetError: as for :meth:`receive`.
        """
        with self._watched(op, subject):
            self._last_use = self.device.transport.clock()
            frame = agent.make_frame(
                {"op": op, "id": ident, "limit_seconds": allowed, "limit_mib": memory_mib, **fields}, arrays
            )
            parts = [part if isinstance(part, memoryview) else bytes(part) for part in frame]
            self._sent.append(sum(map(len, parts)))
            self._stream.write(*parts, timeout=SLACK_SECONDS + self._sent[-1] / SLOWEST)

    def receive(
        self,
        op: str,
        subject: str,
        allowed: float,
        memory_mib: float,
        check: Callable[[list[TensorPlace]], None] | None = None,
        ident: int = 0,
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """The answer to a request, and the arrays that came with it (read-only).

        Args:
            check: told what the arrays will be, before they are read; raises FrameError if they must not be. None: there
                must be none.

        Raises:
            RuntimeCrashError: the program died.
            TargetTimeoutError: it took more than ``allowed`` seconds, and was ended.
            TargetMemoryError: it took more than ``memory_mib``, and was ended.
            DeviceTimeoutError: the device doesn't answer at all.
            DeviceLostError: it is gone.
            DeviceError: its answer makes no sense.
        """
        # requests on their way, and outputs of those before: both within the window, but for one that is larger alone
        first = [allowed + SLACK_SECONDS + 2 * sum(self._sent) / SLOWEST]

        def read(count: int) -> bytes:
            return self._stream.read(count, timeout=first.pop() if first else SLACK_SECONDS + count / SLOWEST)

        with self._watched(op, subject):
            try:
                answer, arrays = agent.read_frame(read, int(memory_mib * MIB), check or _nothing)
            except PayloadTooLarge as error:
                raise FrameError(f"{error} of outputs, more than the limit of {memory_mib:.0f} MiB") from None
            told = [
                line for line in self._stream.log() if line.strip()
            ]  # nothing of ours: the agent's own log is in the answer
            if (answer.get("op"), answer.get("id")) != (op, ident) or not isinstance(answer.get("ok"), bool):
                raise FrameError(f"it is no answer to the request: {clean(answer)}")
            if not answer["ok"] and not (
                isinstance(answer.get("kind"), str) and isinstance(answer.get("message"), str)
            ):
                raise FrameError(f"it doesn't say what failed: {clean(answer)}")
            log = answer.get("log", [])
            if not isinstance(log, list) or not all(isinstance(line, str) for line in log):
                raise FrameError("its log is no list of lines")
            answer["log"] = [*told, *(_plain(line) for line in log)]
            self._last_use = self.device.transport.clock()
            self._sent.popleft()
        return answer, arrays

    @contextmanager
    def _watched(self, op: str, subject: str) -> Iterator[None]:
        """What goes wrong inside, as the error that says what happened; the program is ended then."""
        try:
            yield
        except FrameError as error:
            self.kill()
            raise self._noted(
                DeviceError(
                    f"{subject}: what device {self.device.transport.serial} sent during {op} can't be read ({error}); the program "
                    "there was ended. Is its line failing?"
                )
            ) from error
        except DeviceLostError as error:
            found = self._ending(error, op, subject)
            self.kill()
            if not isinstance(found, EndedBetweenError):
                self._faults.append(found)
            raise found from error
        except DeviceTimeoutError as error:
            self.kill()
            raise self._noted(
                DeviceTimeoutError(f"{subject}: {op}: {error} (the connection to the program there was closed)")
            ) from error
        except TargetError as error:
            self.kill()
            if not isinstance(error, BackendUnavailableError):
                self._faults.append(error)
            raise
        except BaseException:  # Ctrl-C and the like: the answer would come to whoever asks next
            self.kill()
            raise

    def _noted(self, error: TargetError) -> TargetError:
        self._faults.append(error)
        return error

    def _ending(self, error: DeviceLostError, op: str, subject: str) -> TargetError:
        code = self._stream.exit_code
        if code is None:
            return DeviceLostError(f"{subject}: {op}: {error}")
        lines = last_lines([line for line in map(_plain, self._stream.log()) if line.strip()])
        if code in (agent.END_BETWEEN, agent.END_IDLE):
            return EndedBetweenError(f"{subject}: the runtime process on the device ended between requests{lines}")
        if code == agent.END_DEADLINE:
            return TargetTimeoutError(
                f"{subject}: {op} did not finish in time; the runtime process on the device was killed. If the model needs longer, "
                f"raise the setting {'load' if op == 'load' else 'run'}_timeout{lines}"
            )
        if code == agent.END_MEMORY:
            return TargetMemoryError(
                f"{subject}: the runtime process on the device grew beyond its limit of memory during {op}, and was killed. If the "
                f"model needs that much, raise the setting memory_limit_mb{lines}"
            )
        how = how_it_ended(128 - code if code > 128 else code)
        return RuntimeCrashError(
            f"{subject}: the runtime process on the device {how} during {op}. Whatever comes next gets a fresh process{lines}"
        )

    def kill(self) -> None:
        """End it; harmless if it is gone."""
        self._closed = True
        with suppress(TargetError):
            self._stream.close()


def read_greeting(read: Callable[[int], Buffer]) -> dict[str, Any]:
    """The first frame, behind whatever a login shell or a preloaded library printed before the program could prevent it.

    Raises:
        FrameError: there is none within 64 KiB.
    """
    seen = b""
    while not seen.endswith(agent.MAGIC):
        if len(seen) > STRAY_BYTES:
            raise FrameError(f"it begins with {clean(seen[:200].decode('utf-8', 'replace'))}")
        seen += bytes(read(1))
    start = [agent.MAGIC]

    def rest(count: int) -> Buffer:
        return bytes(start.pop() + read(count - len(agent.MAGIC))) if start else read(count)

    return agent.read_frame(rest, 0)[0]


def _nothing(places: list[TensorPlace]) -> None:
    if places:
        raise FrameError(f"it has tensors where none are due: {clean([place.name for place in places])}")


def _plain(line: str) -> str:
    """A line of a log without colours and other control characters."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", line[:2000])
    return "".join(c if c.isprintable() or c == "\t" else " " for c in text).rstrip()


class DeviceAgents:
    """The programs of one device, by what may not share one; a dead one is replaced on the next use.

    Attributes:
        faults: what went wrong, also if whoever asked keeps it to itself.
    """

    def __init__(self, device: AttachedDevice, faults: list[TargetError] | None = None) -> None:
        self.device = device
        self.faults: list[TargetError] = [] if faults is None else faults
        self._agents: dict[str, DeviceAgent] = {}
        self._spare: DeviceAgent | None = None  # started to be asked what is there; the first who needs one gets it
        self._lock = threading.Lock()
        self._names: Counter[str] = Counter()

    def get(self, key: str) -> DeviceAgent:
        """The live program for ``key``.

        Raises:
            BackendUnavailableError: the device's Python can't run it.
            DeviceError: of the transport.
        """
        with self._lock:
            found = self._agents.get(key)
            if found is None or not found.alive:
                if found is not None:
                    found.kill()
                found, self._spare = self._spare, None
                if found is None or not found.alive:
                    found = self._start(key)
                self._agents[key] = found
            return found

    def _start(self, key: str) -> DeviceAgent:
        with part(self.device.transport, f"start of the agent for {key}"):
            return DeviceAgent(self.device, key, self.faults)

    def name(self, content: str) -> str:
        """A name for a model with this content (a digest), that no other has: the same in every run of the same tests."""
        with self._lock:
            self._names[content] += 1
            return f"{content}-{self._names[content]}"

    def versions(self) -> dict[str, str]:
        """What runs there: versions of python, onnxruntime, onnxruntime_qnn, qnn (empty if it doesn't tell) and numpy, machine,
        system, the interpreter (executable), and the folder of onnxruntime-qnn.

        Raises:
            BackendUnavailableError: something is missing there, or too old.
            TargetError: as for :meth:`DeviceAgent.receive`.
        """
        with self._lock:
            living = [a for a in (self._spare, *self._agents.values()) if a is not None and a.alive]
            if not living:
                self._spare = self._start("any")
                living = [self._spare]
        serial = self.device.transport.serial
        subject = f"the runtime on device {serial}"
        with part(self.device.transport, "versions of the runtime"):
            answer, _ = living[0].ask("versions", subject, START_SECONDS, 1e6, qnn=True)
        if not answer["ok"]:
            raise refusal_of(f"device {serial}", answer, "")
        return read_versions(answer)

    def close(self) -> None:
        """End them all."""
        for found in (self._spare, *self._agents.values()):
            if found is not None:
                found.kill()
        self._spare = None
        self._agents.clear()


def refusal_of(subject: str, answer: Mapping[str, Any], provider: str) -> Exception:
    """The error for a model that the device did not load."""
    if answer["kind"] == "space":
        return DeviceSpaceError(f"{subject}: no space left on the device: {answer['message']}: free some there")
    if answer["kind"] == "file":
        return DeviceFileError(f"{subject}: {answer['message']}. Try again")
    return load_error(subject, answer, provider)


def read_versions(told: object) -> dict[str, str]:
    """Versions and places, as text for one line each; empty where they aren't told.

    Raises:
        FrameError: it is no object.
    """
    if not isinstance(told, Mapping):
        raise FrameError(f"no versions: {clean(told)}")
    versions = ("python", "onnxruntime", "onnxruntime_qnn", "qnn", "numpy")
    return {name: clean(told.get(name, "")) for name in (*versions, "machine", "system", "executable", "folder")}
