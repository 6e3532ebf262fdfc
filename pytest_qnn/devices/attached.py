"""A device that this process uses: its facts, its files, the workspace there; and getting it back when it is lost."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

from pytest_qnn.devices.device_log import log_tail
from pytest_qnn.devices.facts import DeviceFacts, probe
from pytest_qnn.devices.health import HealthSampler
from pytest_qnn.devices.lease import DeviceLease
from pytest_qnn.devices.store import DeviceStore
from pytest_qnn.devices.transport import Transport, part
from pytest_qnn.devices.workspace import Workspace, close_all, sweep
from pytest_qnn.errors import (
    AdbServerError,
    DeviceError,
    DeviceLostError,
    DeviceTimeoutError,
    ReplayError,
    RuntimeCrashError,
    TargetError,
)
from pytest_qnn.work_folder import work_folder

T = TypeVar("T")
GONE_SECONDS = 3.0  # for a device that did not come back when it was waited for


class AttachedDevice:
    """A device in use.

    Args:
        transport: the line to it.
        facts: what was found out about it.
        lease: this process's right to it; taken when it is used, given back by :meth:`let_go`.
        limit_mib: size of the files kept on it.
        wait_seconds: how long to wait while somebody else uses it.
        recover_seconds: how long to wait for it after it was lost.
        may_retry: asked before something is done once more after the device was lost, with what and why; notes it.
        python: its Python, for :func:`~pytest_qnn.devices.facts.probe`.

    Attributes:
        health: watches it while it is measured.
        generation: grows with each recovery: what ran on the device before is gone, and so is the old workspace.
    """

    def __init__(
        self,
        transport: Transport,
        facts: DeviceFacts,
        lease: DeviceLease,
        *,
        limit_mib: float,
        wait_seconds: float,
        recover_seconds: float,
        may_retry: Callable[[str], bool] = lambda what: False,
        python: str | None = None,
    ) -> None:
        self.transport, self.facts, self.lease = transport, facts, lease
        self._limit_mib, self._wait_seconds, self._recover_seconds = limit_mib, wait_seconds, recover_seconds
        self._may_retry, self._python = may_retry, python
        self.health = HealthSampler(transport)
        self._local = ExitStack()
        self._workspace: Workspace | None = None
        self._workspaces: list[Workspace] = []  # that and those of before recoveries: removed at the end
        self._store: DeviceStore | None = None
        self._gone = ""  # why it could not be got back
        self.generation = 0

    @property
    def store(self) -> DeviceStore:
        """Files kept on it, by content."""
        if self._store is None:
            self._store = DeviceStore(self.transport, self.facts.folder, self._limit_mib)
        return self._store

    @property
    def workspace(self) -> Workspace:
        """This process's own folder on it; leftovers of processes that died are swept first."""
        if self._workspace is None:
            with part(self.transport, f"workspace {self.generation}"):
                sweep(self.transport, self.facts.folder)
                workspace = Workspace(self.transport, self.facts.folder)
                self._workspaces.append(workspace)
                workspace.create()
                self._workspace = workspace
        return self._workspace

    def folder(self) -> Path:
        """A new folder on this host, for files on their way; gone when the device is closed."""
        return self._local.enter_context(work_folder())

    # --- using it -----------------------------------------------------------------------------------------------------

    def attempt(self, what: str, action: Callable[[], T]) -> T:
        """Do something with the device; if it is lost meanwhile, get it back and do it once more, if that is allowed.

        Args:
            what: for messages and records, e.g. "running model.onnx".

        Raises:
            DeviceBusyError: somebody else holds it for too long.
            TargetError: of ``action``, or that the device didn't come back; with the end of the device's log.
        """
        try:
            self._take()
            if self._workspace is not None:
                self._workspace.beat()
            return action()
        except (DeviceLostError, DeviceTimeoutError, AdbServerError, RuntimeCrashError) as error:
            if isinstance(error, RuntimeCrashError) and not self._has_restarted():
                self._add_log(error)
                raise
            if not self._may_retry(f"{what}: {_first_line(error)}"):
                self._add_log(error)
                raise
            self._recover_from(error)
        except ReplayError:
            raise
        except TargetError as error:
            self._add_log(error)
            raise
        try:
            return action()
        except TargetError as error:
            self._add_log(error)
            raise

    def _take(self) -> None:
        self.lease.acquire(self._wait_seconds)
        if self._gone:
            self._recover(GONE_SECONDS)

    def let_go(self) -> None:
        """Let others use the device; files and programs of ours stay there."""
        self.lease.release()

    # --- getting it back ----------------------------------------------------------------------------------------------

    def _has_restarted(self) -> bool:
        """Whether a program that died there was ended by a restart of the device."""
        try:
            return probe(self.transport, self.facts.folder, self._python).boot_id != self.facts.boot_id
        except (DeviceLostError, DeviceTimeoutError, AdbServerError):
            return True
        except DeviceError:
            return False

    def _recover_from(self, error: TargetError) -> None:
        try:
            self._recover(self._recover_seconds)
        except DeviceError as gone:
            said = _first_line(error)
            lost = DeviceLostError(f"{said}{'' if said.endswith('?') else '.'} {gone}")
            raise lost from error

    def _recover(self, seconds: float) -> None:
        """Wait until the device answers, and look whether it still is the one that it was.

        Raises:
            DeviceLostError: it doesn't answer, or another one does.
        """
        known = self.facts
        try:
            self.transport.reconnect(seconds)
            facts = probe(self.transport, known.folder, self._python)
        except (DeviceLostError, DeviceTimeoutError, AdbServerError) as error:
            self._gone = str(error)
            why = _first_line(error)
            if "did not come back" not in why:
                why = f"the device did not come back within {seconds:g} s ({why})"
            raise DeviceLostError(
                f"{self.transport.address}: {why}: look after it, then see: pytest-qnn device {self.transport.serial} diagnose"
            ) from error
        if (facts.soc, facts.model) != (known.soc, known.model):
            self._gone = "another device answers"
            raise DeviceLostError(
                f"{self.transport.address}: another device answers there now ({facts.model or 'unknown'} instead of "
                f"{known.model or 'unknown'}): attach the right one again"
            )
        self._gone = ""
        self.facts = facts
        self._store, self._workspace = None, None  # a device that was away may have lost any part of it
        self.generation += 1

    def _add_log(self, error: TargetError) -> None:
        """Keep the end of the device's log with an error, if the device still answers."""
        if not error.log and not self._gone and not isinstance(error, ReplayError):
            with suppress(TargetError):
                error.log = log_tail(self.transport, self.facts)

    def close(self) -> None:
        """Remove the workspace and let go of the device, as far as it answers."""
        try:
            with suppress(TargetError):
                close_all(self._workspaces, answers=not self._gone)
        finally:
            self._workspace, self._workspaces = None, []
            with suppress(TargetError):
                self.transport.close()
            self.lease.release()
            self._local.close()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".: ")
