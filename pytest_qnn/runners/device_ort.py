"""A model in onnxruntime on a device: its files are put there, and inputs and outputs go over the stream of a
:class:`~pytest_qnn.runners.device_agent.DeviceAgent`, so that an inference costs a round trip.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pytest_qnn.devices.facts import clean
from pytest_qnn.devices.transport import part
from pytest_qnn.errors import DeviceError, ExecutionError, ModelError, TargetError
from pytest_qnn.model.onnx_file import Model, is_unchanged, read_model
from pytest_qnn.runners import agent
from pytest_qnn.runners.agent import FrameError, TensorPlace
from pytest_qnn.runners.device_agent import (
    WINDOW_BYTES,
    DeviceAgent,
    DeviceAgents,
    EndedBetweenError,
    read_versions,
    refusal_of,
)
from pytest_qnn.runners.loaded import Inference, Timing
from pytest_qnn.runners.ort import LoadInfo, LoadRequest, check_ran
from pytest_qnn.runners.process import Limits
from pytest_qnn.runners.profile import Profile, parse_events
from pytest_qnn.runners.shared_tensors import Array

T = TypeVar("T")

CLOSE_SECONDS = 10.0
WINDOW_COUNT = 16  # inferences that are asked for before the first is answered
ROUND_TRIP_SHARE = 0.2  # of the time for measuring
ROUND_TRIPS = 10

_TENSOR = re.compile(r"tensor\((\w+)\)")
_DTYPES = {"float": "float32", "double": "float64"}


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
        self._versions: dict[str, str] = {}
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
            raise refusal_of(self.subject, answer, request.provider)
        try:
            info, libraries = _read_info(answer, model)
            versions = read_versions(answer.get("versions"))
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
        self._agent, self.libraries, self._versions = program, libraries, versions
        qnn = f", onnxruntime-qnn {versions['onnxruntime_qnn']} (QNN {versions['qnn'] or 'unknown'})"
        self.notes = (
            f"computed on the device by onnxruntime {versions['onnxruntime']}{qnn if versions['onnxruntime_qnn'] else ''}, "
            f"Python {versions['python']}, {versions['machine']}",
        )
        self.loads += 1
        return info

    @property
    def versions(self) -> dict[str, str]:
        """Of what runs there, by names for records."""
        names = ("python", "onnxruntime", "onnxruntime_qnn", "qnn", "numpy")
        return {f"device_{name}": self._versions[name] for name in names if self._versions.get(name)}

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
            raise refusal_of(self.subject, answer, self.request.provider)
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
