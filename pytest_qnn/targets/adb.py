"""Devices attached over ADB: phones through qnn-net-run, Linux boards through onnxruntime in an agent there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from pytest_qnn.devices.attached import AttachedDevice
from pytest_qnn.devices.discovery import discover
from pytest_qnn.devices.facts import DeviceFacts, probe
from pytest_qnn.devices.health import HealthSampler
from pytest_qnn.devices.lease import DeviceLease
from pytest_qnn.devices.runtime_files import find_runtime
from pytest_qnn.devices.soc import find_soc
from pytest_qnn.devices.transport import Transport, part
from pytest_qnn.errors import (
    AdbServerError,
    BackendUnavailableError,
    DeviceBusyError,
    DeviceError,
    DeviceLostError,
    DeviceTimeoutError,
    TargetError,
)
from pytest_qnn.recording import Recording, Replay
from pytest_qnn.recording.recorder import RecordingTransport
from pytest_qnn.settings import Settings
from pytest_qnn.targets.backend_config import backend_extensions, run_options
from pytest_qnn.targets.options import check_options
from pytest_qnn.targets.simulator import SimulatorTarget
from pytest_qnn.targets.target import Plan

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Candidate:
    """A device that may be used, and how to open a line to it; ``attached``: its server said that it can be used."""

    serial: str
    address: str
    open: Callable[[], Transport]
    attached: bool = True


class AdbTarget:
    """Runs ``htp``, ``gpu`` and ``cpu`` on attached devices; models are compiled on this host.

    One device is used for each SoC or serial that tests ask for; while a test uses it nobody else does.
    """

    name = "adb"

    def __init__(self, settings: Settings, may_retry: Callable[[str], bool] = lambda what: False) -> None:
        self.settings = settings
        self.host = SimulatorTarget(settings)  # it compiles for the devices
        self._may_retry = may_retry
        self._devices: dict[str, AttachedDevice] = {}
        self._known: dict[str, tuple[Transport, DeviceFacts]] = {}
        self.tape: Recording | Replay | None = None
        if settings.record is not None:
            self.tape = Recording(settings.record)
        elif settings.replay is not None:
            self.tape = Replay(settings.replay)
        self._have: set[tuple[str, str]] = set()  # serials and backends that were found there
        self._unfinished: set[str] = set()
        self._nodeid = ""

    # --- which device -------------------------------------------------------------------------------------------------

    def device(self, soc: str | None = None, serial: str | None = None) -> AttachedDevice:
        """The device that this process uses where a test asks for ``soc`` and ``serial``; chosen on first use.

        Raises:
            BackendUnavailableError: no such device is attached.
            DeviceError: it is attached, but can't be used.
            DeviceBusyError: others hold all such devices for too long.
        """
        for device in self._devices.values():
            if _fits(device.facts, soc, serial):
                return device
        return self._choose(soc, serial)

    def _choose(self, soc: str | None, serial: str | None) -> AttachedDevice:
        fitting: list[tuple[Transport, DeviceFacts, DeviceLease]] = []
        troubles: list[Exception] = []
        others: list[str] = []
        lost: list[tuple[Candidate, Exception]] = []

        def look_at(candidate: Candidate, *, again: bool = False) -> None:
            try:
                transport, facts = self._probe(candidate, again=again)
            except DeviceError as error:
                if isinstance(error, DeviceLostError | DeviceTimeoutError | AdbServerError):
                    lost.append((candidate, error))
                troubles.append(error)
                return
            if _fits(facts, soc, serial):
                fitting.append((transport, facts, DeviceLease(facts.serial, candidate.address)))
            else:
                others.append(f"{candidate.serial} ({facts.soc.name if facts.soc else 'unknown SoC'})")

        for candidate in self._candidates():
            if serial is not None and candidate.serial != serial:
                others.append(candidate.serial)
            else:
                look_at(candidate)
        if not fitting and lost:
            candidate, error = lost[0]
            if candidate.attached and self._may_retry(f"looking at {candidate.serial}: {error}"):
                troubles.clear()
                look_at(candidate, again=True)
        if not fitting and troubles:
            raise troubles[0]
        if not fitting:
            wanted = f"device {serial!r}" if serial is not None else f"a device with {soc}" if soc else "a device"
            there = f"attached: {', '.join(others)}" if others else "none is attached"
            raise BackendUnavailableError(
                f"{wanted} is not attached ({there}): attach one, see it with 'pytest-qnn devices', or run on the simulator"
            )
        transport, facts, lease = self._first_free(fitting)
        settings = self.settings
        self._devices[facts.serial] = device = AttachedDevice(
            transport,
            facts,
            lease,
            limit_mib=settings.device_limit_mb,
            wait_seconds=settings.device_wait,
            recover_seconds=settings.recover_timeout,
            may_retry=self._may_retry,
            python=settings.device_python,
        )
        return device

    def _candidates(self) -> list[Candidate]:
        """Attached devices, or those that were recorded; workers of xdist start at different ones."""
        tape = self.tape
        if isinstance(tape, Replay):
            return [
                Candidate(device.serial, f"{tape.about}, device {number}", partial(tape.transport, number))
                for number, device in enumerate(tape.devices)
            ]
        found = [
            Candidate(entry.serial, entry.address, entry.open, not entry.trouble) for entry in discover(self.settings)
        ]
        worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
        turn = int(worker) % len(found) if worker.isdigit() and found else 0
        return [*found[turn:], *found[:turn]]

    def _probe(self, candidate: Candidate, *, again: bool = False) -> tuple[Transport, DeviceFacts]:
        """A line to a device, and what was found out about it; ``again``: it was lost, and is waited for first."""
        if candidate.address not in self._known:
            transport = candidate.open()
            if isinstance(self.tape, Recording):
                transport = self.tape.transport(transport)
            try:
                with part(transport, f"probe of {candidate.serial}"):
                    if again:
                        transport.reconnect(self.settings.recover_timeout)
                    facts = probe(transport, self.settings.device_folder, self.settings.device_python)
                if isinstance(transport, RecordingTransport):
                    transport.describe(facts.to_json(), facts.stand_in)
            except BaseException:
                transport.close()
                raise
            self._known[candidate.address] = (transport, facts)
        return self._known[candidate.address]

    def _first_free(
        self, fitting: list[tuple[Transport, DeviceFacts, DeviceLease]]
    ) -> tuple[Transport, DeviceFacts, DeviceLease]:
        """The first whose lease is free, which is taken; waits for one if none is."""
        end = time.monotonic() + self.settings.device_wait
        while True:
            for chosen in fitting:
                busy: DeviceBusyError | None = None
                try:
                    chosen[2].acquire(0)
                    return chosen
                except DeviceBusyError as error:
                    busy = error
            if time.monotonic() >= end and busy is not None:
                raise busy
            with suppress(DeviceBusyError):
                fitting[0][2].acquire(min(POLL_SECONDS, max(0.0, end - time.monotonic())))
                return fitting[0]

    # --- what it can do -----------------------------------------------------------------------------------------------

    def missing(self, backend: str, soc: str | None = None, serial: str | None = None) -> str:
        """Why ``backend`` can't be used and how to change that; empty if it can.

        Raises:
            DeviceError: a device is attached, but can't be used.
        """
        try:
            device = self.device(soc, serial)
            self._check(backend, device)
        except BackendUnavailableError as error:
            return str(error)
        return ""

    def _check(self, backend: str, device: AttachedDevice) -> tuple[str, str]:
        """The runner of ``backend`` on a device, and what stands in for Qualcomm's runtime there, if anything does."""
        facts = device.facts
        if backend == "htp" and facts.soc is None:
            raise BackendUnavailableError(
                f"device {facts.serial}: its SoC is unknown ({facts.soc_text or 'it tells none'}), so nothing can be compiled "
                f"for its HTP. Known: {_known_socs()}"
            )
        runner = self._runner(facts)
        if runner == "net_run":
            if isinstance(self.tape, Replay):
                return runner, facts.stand_in
            runtime = find_runtime(facts, backend, self.settings.device_runtime, tool=True)
            return runner, facts.stand_in or (f"stand-in runtime from {runtime.origin}" if runtime.stand_in else "")
        from pytest_qnn.runners.device_python import check_library, check_python

        check_python(facts, self.settings.device_python)
        if backend != "htp" and (facts.serial, backend) not in self._have:
            device.attempt(f"looking for {backend}", lambda: check_library(device.transport, facts, backend))
            self._have.add((facts.serial, backend))
        return runner, facts.stand_in

    def _runner(self, facts: DeviceFacts) -> str:
        if self.settings.runner != "auto":
            return self.settings.runner
        has_python = facts.python is not None or self.settings.device_python is not None
        return "ort" if facts.os == "linux" and has_python else "net_run"

    def soc_of(self, backend: str, soc: str | None = None, serial: str | None = None) -> str:
        """Name of the device's SoC; "unknown" if it tells none that is known."""
        found = self.device(soc, serial).facts.soc
        return found.name if found else "unknown"

    def plan(self, backend: str, soc: str | None, options: Mapping[str, object], serial: str | None = None) -> Plan:
        """How to run ``backend`` on a device.

        Raises:
            OptionError: unknown option, value or SoC.
            BackendUnavailableError: no such device is attached, or the backend isn't there.
            DeviceError: the device can't be used.
        """
        own = check_options(backend, options)
        checked = dict(sorted({**self.settings.backend_options.get(backend, {}), **own}.items()))
        device = self.device(find_soc(soc).name if soc else None, serial)
        facts = device.facts
        runner, stand_in = self._check(backend, device)
        where = f"{facts.soc.name if facts.soc else facts.model or 'device'}, {facts.serial}"
        plan = Plan(
            backend=backend,
            target=self.name,
            process=f"{backend} on {facts.serial}",
            provider_options=(),
            options=tuple(checked.items()),
            soc=facts.soc,
            simulated=bool(stand_in),
            not_a_device=stand_in and f"a stand-in, not a Snapdragon: {stand_in}",
            float_only=backend != "htp",
            place=f"{where}, stand-in" if stand_in else where,
            runner=runner,
            serial=facts.serial,
            device=facts.to_json()
            | {"stand_in": stand_in, "replayed": self.tape.about if isinstance(self.tape, Replay) else ""},
        )
        if runner == "ort":
            from pytest_qnn.runners.device_python import device_provider_options

            plan = replace(
                plan,
                device_options=tuple(device_provider_options(facts, backend, checked).items()),
                run_options=tuple(run_options(backend, checked).items()),
            )
        else:
            _check_extensions(backend, plan, checked)
        return self._compiled_here(plan, checked) if backend == "htp" else plan

    def _compiled_here(self, plan: Plan, options: Mapping[str, str]) -> Plan:
        """The plan with what the host needs to compile for the device, if it can."""
        assert plan.soc is not None
        if isinstance(self.tape, Replay):
            return replace(plan, has_contexts=True)  # what was compiled is recorded
        if self.host.missing("htp"):
            return plan
        host = self.host.plan(
            "htp", plan.soc.name, {**options, "device_id": "0"} if "device_id" in options else options
        )
        return replace(
            plan,
            process=host.process,
            provider_options=host.provider_options,
            has_contexts=True,
            versions=host.versions,
        )

    # --- its life -----------------------------------------------------------------------------------------------------

    def enter_test(self, nodeid: str) -> None:
        """The test that uses devices from now on; between tests others may use them."""
        self._nodeid = nodeid
        if self.tape is not None:
            self.tape.begin_test(nodeid)
        if not nodeid:
            for device in self._devices.values():
                device.let_go()

    def end_test(self, outcome: str) -> None:
        """How the running test ended."""
        if outcome != "passed":
            self._unfinished.add(self._nodeid)
        if self.tape is not None:
            self.tape.end_test(outcome)

    def sampler(self, serial: str) -> HealthSampler:
        """Watches a device while it is measured."""
        return self.attached(serial).health

    def attached(self, serial: str) -> AttachedDevice:
        """The device of a plan."""
        return self._devices[serial]

    def close(self) -> None:
        """Remove what this process left on the devices, as far as they answer, and let go of them.

        Raises:
            RecordingError: not everything could be recorded.
            ReplayError: the tests asked less than was recorded, or something else.
        """
        if isinstance(self.tape, Recording) and self.tape.failure:
            self.tape.let_through()
        for device in self._devices.values():
            device.close()
        for transport, facts in self._known.values():
            if facts.serial not in self._devices:
                with suppress(TargetError):
                    transport.close()
        self._devices.clear()
        self._known.clear()
        tape, self.tape = self.tape, None
        if isinstance(tape, Recording):
            tape.close()
        elif tape is not None:
            tape.finish(self._unfinished)


def _fits(facts: DeviceFacts, soc: str | None, serial: str | None) -> bool:
    return (serial is None or facts.serial == serial) and (
        soc is None or (facts.soc is not None and facts.soc.name == soc)
    )


def _known_socs() -> str:
    from pytest_qnn.devices.soc import SOCS

    return ", ".join(SOCS)


def _check_extensions(backend: str, plan: Plan, options: Mapping[str, str]) -> None:
    """Options that qnn-net-run doesn't have are refused before anything is compiled."""
    from pytest_qnn.targets.options import OPTIONS

    running = {name: value for name, value in options.items() if not OPTIONS[backend][name].compiles}
    backend_extensions(backend, plan.soc, running, ["graph"])
