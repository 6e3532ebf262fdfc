"""onnxruntime on a device: :mod:`pytest_qnn.runners.agent` is pushed there, stays alive, and takes inputs over one stream.

Never run against a real board: what differs there from the x86-64 stand-in (``backend_path``, the DSP's skeleton libraries)
follows the documentation of onnxruntime's QNN execution provider.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pytest_qnn.devices.attached import AttachedDevice
from pytest_qnn.devices.facts import DeviceFacts, clean
from pytest_qnn.devices.transport import Transport, part
from pytest_qnn.errors import (
    BackendUnavailableError,
    DeviceError,
    DeviceFileError,
    DeviceLostError,
    DeviceSpaceError,
    DeviceTimeoutError,
    ExecutionError,
    ModelError,
    RuntimeCrashError,
    TargetError,
    TargetMemoryError,
    TargetTimeoutError,
)
from pytest_qnn.model.onnx_file import Model, is_unchanged, read_model
from pytest_qnn.runners import agent
from pytest_qnn.runners.agent import Buffer, FrameError, PayloadTooLarge, TensorPlace
from pytest_qnn.runners.loaded import Inference, Timing
from pytest_qnn.runners.ort import LoadInfo, LoadRequest, check_ran, load_error
from pytest_qnn.runners.process import MIB, Limits, how_it_ended, last_lines
from pytest_qnn.runners.profile import Profile, parse_events
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.targets.backend_config import provider_options

T = TypeVar("T")

OLDEST_ONNXRUNTIME = (1, 24)  # the first that tells where a model's nodes ran
INSTALL = "python3 -m pip install 'onnxruntime>=1.24' onnxruntime-qnn"
BACKEND_LIBRARIES = {"htp": "libQnnHtp.so", "cpu": "libQnnCpu.so", "gpu": "libQnnGpu.so"}

START_SECONDS = 60.0  # for Python on a slow board
SLACK_SECONDS = 15.0  # for a slow line, beyond what the device may take
SLOWEST = 2 * MIB  # bytes per second that a line carries at the worst
CLOSE_SECONDS = 10.0
STRAY_BYTES = 65536
IDLE_SECONDS = 1800.0  # then the program ends by itself; well before that it is started anew
WINDOW_BYTES = 16 * MIB  # of inputs and outputs on their way
WINDOW_COUNT = 16
ROUND_TRIP_SHARE = 0.2  # of the time for measuring
ROUND_TRIPS = 10

_TENSOR = re.compile(r"tensor\((\w+)\)")
_DTYPES = {"float": "float32", "double": "float64"}


# --- what a device must have ------------------------------------------------------------------------------------------


def check_python(facts: DeviceFacts) -> None:
    """Make sure, from what is known of it, that a device can run models in onnxruntime.

    Raises:
        BackendUnavailableError: Python, onnxruntime or onnxruntime-qnn is missing there or too old; with what to do.
    """
    where = f"device {facts.serial}"
    python = facts.python
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
        answer = transport.shell(words, timeout=START_SECONDS, limit=1 << 16)
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


class EndedBetweenError(RuntimeCrashError):
    """The program on a device died while nothing was asked of it, which was found out only by asking: ask once more."""


# --- the program on the device ----------------------------------------------------------------------------------------


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
            self._stream.write(*parts, timeout=SLACK_SECONDS + sum(map(len, parts)) / SLOWEST)

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
        first = [allowed + SLACK_SECONDS + 2 * WINDOW_BYTES / SLOWEST]

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
                DeviceTimeoutError(f"{subject}: {op}: {error}. The connection to the program there was closed")
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
            raise _refusal(f"device {serial}", answer, "")
        return _read_versions(answer)

    def close(self) -> None:
        """End them all."""
        for found in (self._spare, *self._agents.values()):
            if found is not None:
                found.kill()
        self._spare = None
        self._agents.clear()


def _refusal(subject: str, answer: Mapping[str, Any], provider: str) -> Exception:
    if answer["kind"] == "space":
        return DeviceSpaceError(f"{subject}: no space left on the device: {answer['message']}: free some there")
    if answer["kind"] == "file":
        return DeviceFileError(f"{subject}: {answer['message']}. Try again")
    return load_error(subject, answer, provider)


# --- a model in it ----------------------------------------------------------------------------------------------------


class DeviceOrtModel:
    """A model in onnxruntime on a device. If the program there is gone, the next use loads it into a fresh one.

    Args:
        agents: the device's programs.
        request: what to load: ``model`` and its files lie on this host, and are put on the device unless they are there.
        subject: for messages.
        prepare: called before it is loaded, each time: puts back files that may have gone since, or says what to load
            instead.

    Attributes:
        info: what loading showed, with the placement as onnxruntime on the device assigned it.
        libraries: QNN's libraries in the process there, by path.
        versions: of what runs there, as :meth:`DeviceAgents.versions` tells them.
        notes: the same, for records.
        loads: how often it was loaded.

    Raises:
        CompileError, ModelError: the runtime refused the model, or its files changed since they were read.
        TargetError: as for :meth:`DeviceAgent.receive`, or the files can't be put on the device.
    """

    def __init__(
        self,
        agents: DeviceAgents,
        request: LoadRequest,
        subject: str,
        limits: Limits,
        prepare: Callable[[], LoadRequest | None] = lambda: None,
    ) -> None:
        self.agents, self.request, self.subject, self.limits = agents, request, subject, limits
        self._prepare = prepare
        self._session = ""
        self._agent: DeviceAgent | None = None
        self._loading = threading.Lock()
        self._fields: dict[str, Any] = {}
        self.libraries: tuple[str, ...] = ()
        self.versions: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()
        self.loads = 0
        try:
            self.info = self._load()
        except EndedBetweenError:
            self.info = self._load()

    # --- loading ------------------------------------------------------------------------------------------------------

    def _load(self) -> LoadInfo:
        request = self._prepare() or self.request
        model = read_model(request.model)
        program = self.agents.get(request.process)
        if not self._session:
            what = [digest for _, digest in model.files], request.provider_options, request.config, request.run_options
            self._session = self.agents.name(hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16])
        with part(self.agents.device.transport, f"loading {self.subject}, {self._session}"):
            return self._load_into(program, request, model)

    def _load_into(self, program: DeviceAgent, request: LoadRequest, model: Model) -> LoadInfo:
        self._fields = {
            "folder": f"models/{self._session}",
            "files": self._provide(request, model),
            "provider": request.provider,
            "provider_options": request.provider_options,
            "dimensions": request.dimensions,
            "level": request.level,
            "config": request.config,
            "run_options": request.run_options,
            "log_severity": request.log_severity,
        }
        limits = self.limits
        answer, _ = program.ask(
            "load", self.subject, limits.load_seconds, limits.memory_mib, session=self._session, **self._fields
        )
        if not answer["ok"]:
            raise _refusal(self.subject, answer, request.provider)
        try:
            info, libraries = _read_info(answer, model)
            versions = _read_versions(answer.get("versions"))
        except FrameError as error:
            program.kill()
            raise DeviceError(
                f"{self.subject}: what the device tells of the loaded model makes no sense: {error}"
            ) from error
        if self.loads and (info.inputs, info.outputs, info.placement) != (
            self.info.inputs,
            self.info.outputs,
            self.info.placement,
        ):
            raise ExecutionError(
                f"{self.subject}: loaded anew, the model is not what it was: its nodes are placed elsewhere, or its inputs or "
                "outputs changed. Was the device's software updated meanwhile? Run the tests again"
            )
        self._agent, self.libraries, self.versions = program, libraries, versions
        qnn = f", onnxruntime-qnn {versions['onnxruntime_qnn']} (QNN {versions['qnn'] or 'unknown'})"
        self.notes = (
            f"computed on the device by onnxruntime {versions['onnxruntime']}{qnn if versions['onnxruntime_qnn'] else ''}, "
            f"Python {versions['python']}, {versions['machine']}",
        )
        self.loads += 1
        return info

    def _provide(self, request: LoadRequest, model: Model) -> list[tuple[str, str]]:
        """Put the model's files on the device: name in the model's folder, and path in the workspace; the model comes first."""
        device = self.agents.device
        again = "changed on disk since the model was first read: load it again"
        if changed := [path for path, digest in request.files if not is_unchanged(path, digest)]:
            raise ModelError(f"{self.subject}: {', '.join(changed)} {again}")
        folder = Path(request.model).parent
        names: dict[str, str] = {}  # local path -> name in the model's folder
        for path, _ in model.files[1:]:
            if not Path(path).is_relative_to(folder):
                raise ModelError(f"{self.subject}: {path} lies outside of the model's folder: copy it beside the model")
            names[path] = str(Path(path).relative_to(folder))
        own = "model.onnx"
        while own in names.values():
            own = f"_{own}"
        names = {str(model.path): own, **names}
        try:
            stored = device.store.put({path: Path(path) for path in names})
        except OSError as error:
            raise ModelError(f"{self.subject}: {error.filename or folder} can't be read ({error.strerror})") from error
        for path, digest in model.files:
            if digest not in stored[path]:
                raise ModelError(f"{self.subject}: {path} {again}")
        # links keep the files in the store; the names that the model knows them by may be anything, and are the agent's to make
        links = {path: f"models/{self._session}-{index}" for index, path in enumerate(names)}
        device.workspace.link({links[path]: stored[path] for path in names})
        return [(name, links[path]) for path, name in names.items()]

    def _ask(self, action: Callable[[DeviceAgent], T]) -> T:
        try:
            return action(self._live())
        except EndedBetweenError:  # a moment ago it seemed to live
            return action(self._live())

    def _live(self) -> DeviceAgent:
        with self._loading:
            if self._agent is None or not self._agent.alive:
                self._agent = None
                self._load()
            assert self._agent is not None
            return self._agent

    # --- running ------------------------------------------------------------------------------------------------------

    def run_many(self, samples: Sequence[Mapping[str, Array]]) -> list[Inference]:
        """One inference for each sample, in order. While one is computed the next ones are on their way.

        Raises:
            InputError, ModelError: onnxruntime refused the inputs, or has outputs that can't be handed over.
            TargetError: as for :meth:`DeviceAgent.receive`.
        """
        return self._ask(lambda program: self._run_many(program, samples))

    def _run_many(self, program: DeviceAgent, samples: Sequence[Mapping[str, Array]]) -> list[Inference]:
        waiting: deque[tuple[int, int]] = deque()  # number of the request, bytes
        done: list[tuple[dict[str, Any], dict[str, Array]]] = []
        clock = self.agents.device.transport.clock
        with program.lock:
            start = clock()
            for sample in samples:
                size = sum(array.nbytes for array in sample.values()) + self._output_bytes()
                while waiting and (len(waiting) >= WINDOW_COUNT or sum(n for _, n in waiting) + size > WINDOW_BYTES):
                    done.append(self._receive(program, waiting.popleft()[0]))
                if any(not answer["ok"] for answer, _ in done[-1:]):
                    break
                ident = len(done) + len(waiting)
                self._send(program, sample, ident)
                waiting.append((ident, size))
            while waiting:  # also after a failure: the stream must be in step
                done.append(self._receive(program, waiting.popleft()[0]))
            spent = (clock() - start) / max(len(done), 1)
        for answer, _ in done:
            check_ran(self.subject, answer)
        return [Inference(outputs, self._number(answer.get("seconds")), spent) for answer, outputs in done]

    def _send(self, program: DeviceAgent, sample: Mapping[str, Array], ident: int = 0) -> None:
        limits = self.limits
        program.send("run", self.subject, limits.run_seconds, limits.memory_mib, sample, ident, session=self._session)

    def _receive(self, program: DeviceAgent, ident: int = 0) -> tuple[dict[str, Any], dict[str, Array]]:
        limits = self.limits
        answer, arrays = program.receive(
            "run", self.subject, limits.run_seconds, limits.memory_mib, self._check_outputs, ident
        )
        if answer["ok"] and list(arrays) != [name for name, _, _ in self.info.outputs]:
            program.kill()
            raise DeviceError(f"{self.subject}: the device sent no outputs: {clean(answer)}")
        return answer, arrays

    def _output_bytes(self) -> int:
        """Bytes of an inference's outputs; dimensions that aren't known count as 1."""
        total = 0
        for _, dtype, shape in self.info.outputs:
            size = agent.SIZES.get(_dtype_name(dtype), 0)
            for extent in shape:
                size *= extent if isinstance(extent, int) and extent > 0 else 1
            total += size
        return total

    def _check_outputs(self, places: list[TensorPlace]) -> None:
        """Refuse outputs that aren't what was declared when the model was loaded."""
        if not places:
            return  # a refusal; otherwise :meth:`_receive` tells
        declared = self.info.outputs
        if [place.name for place in places] != [name for name, _, _ in declared]:
            raise FrameError(f"its outputs are called {clean([place.name for place in places])}")
        for place, (name, kind, shape) in zip(places, declared, strict=True):
            if place.dtype != _dtype_name(kind) or not _fits(place.shape, shape):
                raise FrameError(
                    f"output {clean(name)!r} has type {place.dtype} and shape {list(place.shape)}, and was declared as {clean(kind)} "
                    f"{clean(list(shape))}"
                )

    def time(self, inputs: Mapping[str, Array], count: int, seconds: float, reset_peak: bool = False) -> Timing:
        """Time up to ``count`` single inferences within about ``seconds``, by the device's clock; and a few of them from here
        and back, by the host's, one after the other.

        Raises:
            InputError, TargetError: as for :meth:`run_many`.
        """
        return self._ask(lambda program: self._time(program, inputs, count, seconds, reset_peak))

    def _time(
        self, program: DeviceAgent, inputs: Mapping[str, Array], count: int, seconds: float, reset_peak: bool
    ) -> Timing:
        limits, clock = self.limits, self.agents.device.transport.clock
        with program.lock:
            answer, _ = program.ask(
                "time",
                self.subject,
                limits.run_seconds + seconds,
                limits.memory_mib,
                inputs,
                session=self._session,
                count=count,
                seconds=seconds * (1 - ROUND_TRIP_SHARE),
                reset_peak=reset_peak,
            )
            check_ran(self.subject, answer)
            trips: list[float] = []
            end = clock() + seconds * ROUND_TRIP_SHARE
            while not trips or (len(trips) < min(count, ROUND_TRIPS) and clock() < end):
                start = clock()
                self._send(program, inputs)
                ran, _ = self._receive(program)
                trips.append(1e3 * (clock() - start))
                check_ran(self.subject, ran)
        times = answer.get("times_ms")
        if not isinstance(times, list) or not 1 <= len(times) <= max(count, 1):
            raise DeviceError(f"{self.subject}: the device sent no times: {clean(answer)}")
        return Timing(
            [self._number(t) for t in times],
            self._number(answer.get("peak_memory_mib")),
            self._number(answer.get("cpu_share")),
            trips,
        )

    def profile(self, inputs: Mapping[str, Array]) -> Profile:
        """Load the model again with profiling on, run it once and read what the runtime wrote.

        Raises:
            CompileError, InputError, TargetError: as for loading and running; also if the runtime wrote nothing readable.
        """
        return self._ask(lambda program: self._profile(program, inputs))

    def _profile(self, program: DeviceAgent, inputs: Mapping[str, Array]) -> Profile:
        limits = self.limits

        def check(places: list[TensorPlace]) -> None:
            if places and [(place.name, place.dtype, len(place.shape)) for place in places] != [
                ("profile", "uint8", 1)
            ]:
                raise FrameError("it is no profile")

        answer, arrays = program.ask(
            "profile",
            self.subject,
            limits.load_seconds + limits.run_seconds,
            limits.memory_mib,
            inputs,
            check,
            **self._fields,
        )
        if not answer["ok"] and answer["kind"] not in ("execute", "memory", "dtype"):
            raise _refusal(self.subject, answer, self.request.provider)
        check_ran(self.subject, answer)
        try:
            text = arrays["profile"].tobytes().decode("utf-8", "replace")
            return Profile(parse_events(text.splitlines(keepends=True)))
        except (ValueError, KeyError) as error:
            raise ExecutionError(f"{self.subject}: the runtime wrote no readable profile: {error!r}") from error

    def _number(self, value: object) -> float:
        try:
            return _number(value)
        except FrameError as error:
            raise DeviceError(
                f"{self.subject}: what the device told of the inference makes no sense: {error}"
            ) from error

    def clock(self) -> float:
        """Seconds from an arbitrary start."""
        return self.agents.device.transport.clock()

    def close(self) -> None:
        """Free it on the device; it loads again if it is used again. A device that is gone has freed it."""
        program, self._agent = self._agent, None
        if program is not None and program.alive:
            with suppress(TargetError):
                program.ask("close", self.subject, CLOSE_SECONDS, self.limits.memory_mib, session=self._session)


# --- what a device tells ----------------------------------------------------------------------------------------------


def _read_info(answer: Mapping[str, Any], model: Model) -> tuple[LoadInfo, tuple[str, ...]]:
    """What loading showed, and the libraries.

    Raises:
        FrameError: it isn't of the types that it should be, or not about this model.
    """
    inputs, outputs = _values(answer.get("inputs")), _values(answer.get("outputs"))
    if {name for name, _, _ in inputs} != {spec.name for spec in model.inputs}:
        raise FrameError(f"its inputs are {clean([name for name, _, _ in inputs])}")
    if [name for name, _, _ in outputs] != [spec.name for spec in model.outputs]:
        raise FrameError(f"its outputs are {clean([name for name, _, _ in outputs])}")
    placement = answer.get("placement")
    if not isinstance(placement, list):
        raise FrameError("no placement")
    rows = []
    for row in placement:
        if not (isinstance(row, list) and len(row) == 3 and all(isinstance(text, str) for text in row)):
            raise FrameError(f"a node's placement is {clean(row)}")
        rows.append((row[0], row[1], row[2]))
    libraries = answer.get("libraries")
    if not isinstance(libraries, list) or not all(isinstance(path, str) for path in libraries):
        raise FrameError("no list of libraries")
    info = LoadInfo(inputs, outputs, tuple(rows), _number(answer.get("seconds")), tuple(answer["log"]))
    return info, tuple(clean(path, 1000) for path in libraries)


def _read_versions(told: object) -> dict[str, str]:
    """Versions and places, as text for one line each; empty where they aren't told.

    Raises:
        FrameError: it is no object.
    """
    if not isinstance(told, Mapping):
        raise FrameError(f"no versions: {clean(told)}")
    versions = ("python", "onnxruntime", "onnxruntime_qnn", "qnn", "numpy")
    return {name: clean(told.get(name, "")) for name in (*versions, "machine", "system", "executable", "folder")}


def _values(rows: object) -> tuple[tuple[str, str, tuple[int | str | None, ...]], ...]:
    if not isinstance(rows, list):
        raise FrameError(f"no list of inputs or outputs: {clean(rows)}")
    values = []
    for row in rows:
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and isinstance(row[1], str)):
            raise FrameError(f"an input or output is {clean(row)}")
        shape = row[2]
        if not isinstance(shape, list) or any(
            isinstance(d, bool) or not isinstance(d, int | str | None) for d in shape
        ):
            raise FrameError(f"an input or output has the shape {clean(shape)}")
        values.append((row[0], row[1], tuple(shape)))
    return tuple(values)


def _dtype_name(kind: str) -> str:
    """numpy's name of onnxruntime's ``tensor(float)``."""
    found = _TENSOR.fullmatch(kind)
    name = found[1] if found else kind
    return _DTYPES.get(name, name)


def _fits(shape: Sequence[int], declared: Sequence[int | str | None]) -> bool:
    """Whether a shape is what was declared, where that is known."""
    if len(shape) != len(declared):
        return False
    return all(
        not isinstance(wanted, int) or wanted < 0 or size == wanted
        for size, wanted in zip(shape, declared, strict=True)
    )


def _number(value: object) -> float:
    """A number that can't be below 0.

    Raises:
        FrameError: it isn't one.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise FrameError(f"{clean(value)} stands where a number is due")
    return float(value)
