"""One pytest process's bench: target, runtime processes, references and records, behind the fixtures."""

from __future__ import annotations

import difflib
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qnn.artifacts.cache_folder import CacheFolder
from pytest_qnn.backend import Backend
from pytest_qnn.errors import BackendUnavailableError, ModelError, UsageError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.runners.ort import LoadedModel, LoadRequest
from pytest_qnn.runners.process import Limits, ProcessPool
from pytest_qnn.runners.reference import Reference, ReferenceRunner
from pytest_qnn.session import Session
from pytest_qnn.settings import Settings
from pytest_qnn.targets import open_target
from pytest_qnn.targets.target import Plan
from pytest_qnn.verdict.latency import LatencyBudget
from pytest_qnn.versions import installed_version
from pytest_qnn.work_folder import temporary_folder

if TYPE_CHECKING:
    from pytest_qnn.devices.attached import AttachedDevice
    from pytest_qnn.precision import FloatPrecision
    from pytest_qnn.records.record import Record
    from pytest_qnn.runners.device_agent import DeviceAgents
    from pytest_qnn.runners.on_device import DeviceModel

KEPT_MODELS = 8  # loaded models kept for the next who asks for the same; older ones are freed, and reload if used


@dataclass
class CurrentTest:
    """The test that is running: its id, its marks' values, and the records it makes."""

    nodeid: str = ""
    worker: str = ""
    tolerance_marks: tuple[Mapping[str, Any], ...] = ()
    budget_marks: tuple[Mapping[str, Any], ...] = ()
    options: tuple[str, ...] = ()
    expected: tuple[BackendRequest, ...] | None = None  # where marks can't reach the fixture: what it must be
    records: list[Record] = field(default_factory=list)
    published: int = 0
    outcome: str = "passed"  # so far
    retries: list[str] = field(default_factory=list)  # what was done once more after a device was lost
    ran: list[str] = field(default_factory=list)

    def check(self, request: BackendRequest) -> None:
        """Refuse a backend that the test's marks don't name: a test would run elsewhere, unnoticed.

        Raises:
            UsageError: it isn't among the expected ones.
        """
        if self.expected is not None and request not in self.expected:
            wanted = " or ".join(f"{r.name}{f' ({r.soc})' if r.soc else ''}" for r in self.expected)
            raise UsageError(
                f"{self.nodeid}: its marks ask for {wanted}, but qnn_backend is {request.name}: a fixture that is asked for with "
                "getfixturevalue can't follow marks. Name qnn_backend among the test's arguments"
            )


class Bench:
    """Everything that lives as long as the pytest process.

    Args:
        settings: of the project.
        root: pytest's root folder; paths in commands are relative to it.

    Attributes:
        artifacts: how often a model was "compiled" for a backend, "reused" from the cache, "rebuilt" because its entry was
            damaged, or loaded on a backend that has no compiled form ("in_memory"), since this was last cleared.
    """

    def __init__(self, settings: Settings, root: Path | None = None) -> None:
        self.settings, self.root = settings, root or Path.cwd()
        self.target = open_target(settings, self._may_retry)
        self.pool = ProcessPool()
        self.limits = Limits(settings.load_timeout, settings.run_timeout, settings.memory_limit_mb)
        self._loaded: OrderedDict[tuple[LoadRequest, str, Limits], LoadedModel] = OrderedDict()
        self._on_devices: OrderedDict[Hashable, DeviceModel] = OrderedDict()
        self._agents: dict[str, DeviceAgents] = {}
        self._loading = threading.RLock()
        self.cache = CacheFolder(settings.cache_dir, settings.cache_limit_mb, enabled=not settings.no_cache)
        self.references = ReferenceRunner(self.load_shared, self.cache.references, self.limits)
        self.artifacts: Counter[str] = Counter()
        self.test = CurrentTest()
        self._folders = ExitStack()
        self._precision: dict[tuple[str, str, str | None], FloatPrecision] = {}

    def enter(self, test: CurrentTest) -> None:
        """``test`` is what runs from now on; one without an id stands for the time between tests."""
        self.test = test
        self.target.enter_test(test.nodeid)

    def _may_retry(self, what: str) -> bool:
        """Whether something may be done once more after a device was lost: once per test."""
        if self.test.retries:
            return False
        self.test.retries.append(what)
        return True

    @property
    def versions(self) -> dict[str, str]:
        """Versions that decide results."""
        return {name: installed_version(name) for name in ("onnxruntime", "onnx", "numpy")}

    def backend(self, request: BackendRequest) -> Backend:
        """The backend that a test asked for.

        Raises:
            BackendUnavailableError: it isn't here.
        """
        if request.kind is not None and request.kind != self.target.name:
            raise BackendUnavailableError(
                f"the test wants a target of kind {request.kind!r}, this run has {self.target.name!r}"
            )
        if reason := self.target.missing(request.name, request.soc, request.serial):
            raise BackendUnavailableError(f"backend {request.name!r} is not available: {reason}")
        return Backend(self, request)

    def load_shared(
        self,
        request: LoadRequest,
        subject: str,
        limits: Limits,
        prepare: Callable[[], LoadRequest | None] = lambda: None,
    ) -> LoadedModel:
        """A loaded model for ``request``: the one that is there, or a new one (``prepare``: see :class:`LoadedModel`)."""
        with self._loading:
            loaded = self._loaded.get((request, subject, limits))
            return loaded or LoadedModel(self.pool, request, subject, limits, self._keep, prepare)

    def _keep(self, loaded: LoadedModel) -> None:
        """Remember what was just loaded, also once more after a crash or after it was freed; free the oldest."""
        key = (loaded.request, loaded.subject, loaded.limits)
        self._loaded[key] = loaded
        self._loaded.move_to_end(key)
        while len(self._loaded) > KEPT_MODELS:
            self._loaded.popitem(last=False)[1].close()

    def share_on_device(self, key: Hashable, load: Callable[[], DeviceModel]) -> DeviceModel:
        """A model loaded on a device: the one that is there, or a new one; the oldest goes if there are many."""
        with self._loading:
            loaded = self._on_devices.pop(key, None) or load()
            self._on_devices[key] = loaded
            while len(self._on_devices) > KEPT_MODELS:
                self._on_devices.popitem(last=False)[1].close()
            return loaded

    def agents(self, device: AttachedDevice) -> DeviceAgents:
        """The programs that run onnxruntime on a device."""
        from pytest_qnn.runners.device_agent import DeviceAgents

        serial = device.facts.serial
        if serial not in self._agents:
            self._agents[serial] = DeviceAgents(device, self.pool.faults)
        return self._agents[serial]

    def float_precision(self, plan: Plan) -> FloatPrecision:
        """What a backend computes float models in, found out by running one."""
        where = plan.serial or (plan.soc.name if plan.soc else plan.library)
        key = (plan.backend, where, dict(plan.options).get("precision_mode"))
        if key not in self._precision:
            from pytest_qnn.precision import probe_precision

            self._precision[key] = probe_precision(self, plan)
        return self._precision[key]

    def latency_budget(self, session: Session) -> LatencyBudget | None:
        """The budget that applies to ``session``: marks of the test (nearest value wins), then the configuration."""
        values: dict[str, Any] = {}
        for mark in self.test.budget_marks:
            values = {**mark, **values}
        if not values:
            for rule in self.settings.latency_budgets:
                if rule.matches(session.model.path.name, None, session.backend):
                    values = dict(rule.values)
                    break
        return LatencyBudget.from_values(values, "latency_budget") if values else None

    def reference(self, model: str | os.PathLike[str], dimensions: Mapping[str, int] | None = None) -> Reference:
        """The onnxruntime CPU reference of a model.

        Raises:
            ModelError: the model can't be used.
        """
        return Reference(self.references, read_model(self.locate(model), dimensions))

    def locate(self, path: str | os.PathLike[str]) -> Path:
        """A model file: a relative path starts at the current folder, else at pytest's root folder.

        Raises:
            ModelError: it is in neither.
        """
        if not isinstance(path, str | os.PathLike):
            raise ModelError(f"expected the path of a model file, got {type(path).__name__}")
        try:
            file = Path(path).expanduser()
        except RuntimeError as error:  # ~ of a user that isn't there
            raise ModelError(f"{path}: {error}: correct the path") from None
        if file.is_absolute():
            return file
        for folder in (Path.cwd(), self.root):
            if (folder / file).exists():
                return folder / file
        folders = dict.fromkeys([str(Path.cwd()), str(self.root)])
        beside = [f.name for folder in folders for f in (Path(folder) / file).parent.glob("*.onnx")]
        close = difflib.get_close_matches(file.name, beside, n=1)
        hint = f"Did you mean {str(file.with_name(close[0]))!r}?" if close else "Check the path"
        raise ModelError(f"{file}: there is no such file in {' or '.join(folders)}. {hint}")

    def note_run(self, session: Session) -> None:
        """Remember that the running test used a backend, so that a test that judges nothing can be named."""
        self.test.ran.append(session.subject)

    def folder(self) -> Path:
        """A new folder that is gone when the bench is closed.

        Raises:
            TargetError: none can be made.
        """
        return self._folders.enter_context(temporary_folder())

    def close(self) -> None:
        """End the runtime processes and let go of devices; nothing is left running."""
        self.pool.close()
        for agents in self._agents.values():
            agents.close()
        self.target.close()
        self._folders.close()
        self.references.close()
        self.cache.close()
