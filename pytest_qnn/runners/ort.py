"""onnxruntime in a runtime process: loading, running and timing one model."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_qnn.errors import (
    BackendUnavailableError,
    CompileError,
    ExecutionError,
    InputError,
    ModelError,
    TargetError,
    TargetMemoryError,
)
from pytest_qnn.model.onnx_file import is_unchanged
from pytest_qnn.runners.loaded import Inference, Timing
from pytest_qnn.runners.process import Limits, ProcessPool, RuntimeProcess
from pytest_qnn.runners.profile import Profile, read_events
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.work_folder import temporary_folder

QNN = "QNNExecutionProvider"
CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class LoadRequest:
    """Everything that decides what a loaded model is: equal requests may share one.

    Attributes:
        model: path of the ONNX file.
        files: paths and SHA-256 of everything that is read: the model, external data, a context binary.
        process: which runtime process may host it.
        provider: execution provider, with ``provider_options``.
        level: onnxruntime's graph optimisation level, e.g. "ORT_ENABLE_ALL".
        config: further session configuration entries.
        run_options: configuration entries of each run.
    """

    model: str
    files: tuple[tuple[str, str], ...]
    process: str
    provider: str
    provider_options: tuple[tuple[str, str], ...] = ()
    dimensions: tuple[tuple[str, int], ...] = ()
    level: str = "ORT_ENABLE_ALL"
    config: tuple[tuple[str, str], ...] = ()
    run_options: tuple[tuple[str, str], ...] = ()
    log_severity: int = 2


@dataclass(frozen=True)
class LoadInfo:
    """What loading showed.

    Attributes:
        inputs, outputs: (name, onnxruntime type such as "tensor(float)", shape) of each.
        placement: (execution provider, node, operator) of each node, as onnxruntime assigned them.
        seconds: time it took in the runtime process.
        log: lines that the runtime logged meanwhile.
    """

    inputs: tuple[tuple[str, str, tuple[int | str | None, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int | str | None, ...]], ...]
    placement: tuple[tuple[str, str, str], ...]
    seconds: float
    log: tuple[str, ...] = field(default=(), repr=False)


_session_ids = itertools.count(1)


class LoadedModel:
    """A model in a runtime process. If the process is gone, the next use loads it into a fresh one.

    Args:
        on_load: told whenever it was loaded.
        prepare: called before it is loaded, each time: puts back files that may have gone since, or says what to load
            instead.

    Attributes:
        loads: how often it was loaded.
    """

    notes: tuple[str, ...] = ()

    @property
    def versions(self) -> dict[str, str]:
        """None: what is installed on this host, which records tell already."""
        return {}

    def __init__(
        self,
        pool: ProcessPool,
        request: LoadRequest,
        subject: str,
        limits: Limits,
        on_load: Callable[[LoadedModel], None] = lambda loaded: None,
        prepare: Callable[[], LoadRequest | None] = lambda: None,
    ) -> None:
        self.pool, self.request, self.subject, self.limits = pool, request, subject, limits
        self._on_load, self._prepare = on_load, prepare
        self._session = next(_session_ids)
        self._process: RuntimeProcess | None = None
        self._loading = threading.Lock()
        self.loads = 0
        self.info = self._load()

    def _load(self, again: bool = True) -> LoadInfo:
        r = self._prepare() or self.request
        process = self.pool.get(r.process)
        answer = process.request(
            "load",
            self.subject,
            self.limits.load_seconds,
            self.limits.memory_mib,
            session=self._session,
            model=r.model,
            provider=r.provider,
            provider_options=r.provider_options,
            dimensions=r.dimensions,
            level=r.level,
            config=r.config,
            run_options=r.run_options,
            log_severity=r.log_severity,
        )
        if not answer["ok"] and again and not Path(r.model).parent.exists():  # pruned at this very moment
            return self._load(again=False)
        if not answer["ok"]:
            raise load_error(self.subject, answer, r.provider)
        changed = [path for path, digest in r.files if not is_unchanged(path, digest)]
        if changed:
            process.request(
                "close", self.subject, self.limits.run_seconds, self.limits.memory_mib, session=self._session
            )
            raise ModelError(
                f"{self.subject}: {', '.join(changed)} changed on disk since the model was first read: load it again, and "
                "don't rewrite models while they are tested"
            )
        self._process = process
        self.loads += 1
        self._on_load(self)
        return LoadInfo(
            tuple((n, t, tuple(s)) for n, t, s in answer["inputs"]),
            tuple((n, t, tuple(s)) for n, t, s in answer["outputs"]),
            tuple((ep, name, op) for ep, name, op in answer["placement"]),
            answer["seconds"],
            tuple(answer["log"]),
        )

    def _live(self) -> RuntimeProcess:
        with self._loading:
            if self._process is None or not self._process.alive:
                self._load()
            assert self._process is not None
            return self._process

    def run(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], float]:
        """One inference: the outputs by name, and the seconds it took inside the runtime process.

        Raises:
            TargetError: the process died, hung, ran out of memory, or the runtime reported an error.
        """
        process = self._live()
        answer, outputs = process.run(
            "run",
            self.subject,
            inputs,
            self.limits.run_seconds,
            self.limits.memory_mib,
            session=self._session,
        )
        check_ran(self.subject, answer)
        return outputs, answer["seconds"]

    def run_many(self, samples: Sequence[Mapping[str, Array]]) -> list[Inference]:
        """One inference for each sample, in order.

        Raises:
            TargetError: as for :meth:`run`.
        """
        return [Inference(*self.run(sample)) for sample in samples]

    def time(self, inputs: Mapping[str, Array], count: int, seconds: float, reset_peak: bool = False) -> Timing:
        """Time up to ``count`` single inferences within about ``seconds``.

        Raises:
            TargetError: as for :meth:`run`.
        """
        process = self._live()
        answer, _ = process.run(
            "time",
            self.subject,
            inputs,
            self.limits.run_seconds + seconds,
            self.limits.memory_mib,
            session=self._session,
            count=count,
            seconds=seconds,
            reset_peak=reset_peak,
        )
        check_ran(self.subject, answer)
        return Timing(list(answer["times_ms"]), float(answer["peak_memory_mib"]), answer.get("cpu_share"))

    def profile(self, inputs: Mapping[str, Array]) -> Profile:
        """Load the model again with profiling on, run it once and read what the runtime wrote.

        Raises:
            TargetError: as for loading and running; also if the runtime wrote nothing readable.
        """
        with temporary_folder() as folder:
            file = folder / "profile.csv"
            options = (("profiling_level", "detailed"), ("profiling_file_path", str(file)))
            request = replace(self.request, provider_options=self.request.provider_options + options)
            profiled = LoadedModel(self.pool, request, self.subject, self.limits)
            try:
                profiled.run(inputs)
            finally:
                profiled.close()
            try:
                return Profile(read_events(file))
            except (OSError, ValueError, KeyError) as error:
                raise ExecutionError(f"{self.subject}: the runtime wrote no readable profile: {error!r}") from error

    def clock(self) -> float:
        """Seconds from an arbitrary start."""
        return time.monotonic()

    def end_process(self) -> None:
        """End the process that hosts it; whatever is used again loads again, into a fresh one."""
        if self._process is not None:
            self._process.kill()
        self._process = None

    def close(self) -> None:
        """Free it in the runtime process; it loads again if it is used again."""
        if self._process is not None and self._process.alive:
            self._process.request(
                "close", self.subject, self.limits.run_seconds, self.limits.memory_mib, session=self._session
            )
        self._process = None


def check_ran(subject: str, answer: Mapping[str, Any]) -> None:
    """Raise the error for an inference that the runtime did not do.

    Raises:
        ModelError, InputError, TargetError: whosever fault it was.
    """
    if answer["ok"]:
        return
    if answer["kind"] == "dtype":
        raise ModelError(f"{subject}: {answer['message']}: cast it in the model")
    if answer["kind"] == "execute" and "INVALID_ARGUMENT" in answer["message"]:
        raise InputError(f"{subject}: onnxruntime refused the inputs: {answer['message']}")
    kind = TargetMemoryError if answer["kind"] == "memory" else ExecutionError
    raise kind(f"{subject}: the runtime failed to run the model: {answer['message']}{_log_tail(answer)}")


def load_error(subject: str, answer: Mapping[str, Any], provider: str) -> Exception:
    """The error for a model that the runtime did not load."""
    message = f"{subject}: {answer['message']}{_log_tail(answer)}"
    if answer["kind"] == "unavailable":
        return BackendUnavailableError(message)
    if answer["kind"] == "load":
        return CompileError(message) if provider == QNN else ModelError(message)
    return TargetError(message)


def _log_tail(answer: Mapping[str, Any], lines: int = 6) -> str:
    tail = [line for line in answer.get("log", []) if line.strip()][-lines:]
    return "".join(f"\n  {line[:300]}" for line in tail)
