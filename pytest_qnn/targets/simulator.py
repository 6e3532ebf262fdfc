"""This x86-64 Linux host: Qualcomm's HTP simulator and the QNN CPU library, both from the onnxruntime-qnn wheels."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from importlib import metadata, util

from pytest_qnn.devices.health import HealthSampler
from pytest_qnn.devices.soc import find_soc
from pytest_qnn.errors import BackendUnavailableError, OptionError
from pytest_qnn.settings import Settings
from pytest_qnn.targets.backend_config import provider_options, run_options
from pytest_qnn.targets.options import check_options
from pytest_qnn.targets.qnn_cpu import CpuLibraryMissing, find_cpu_library
from pytest_qnn.targets.target import Plan

NOT_A_DEVICE = {
    "htp": "simulator: its times follow this host, not a Snapdragon",
    "cpu": "x86-64 host: its times say nothing about a Snapdragon's CPU",
}


class SimulatorTarget:
    """Runs ``htp`` on Qualcomm's own simulator and ``cpu`` on the QNN CPU library of x86-64 Linux."""

    name = "simulator"
    tape = None

    def __init__(self, settings: Settings, may_retry: Callable[[str], bool] | None = None) -> None:
        self.settings = settings

    def missing(self, backend: str, soc: str | None = None, serial: str | None = None) -> str:
        """Why ``backend`` can't be used here and how to change that; empty if it can."""
        if serial is not None:
            return f"device {serial!r} is not attached: target {self.name!r} has no devices with serials"
        if backend == "gpu":
            return (
                "the QNN GPU backend needs an Adreno GPU: on x86-64 its library can only prepare models, not run them"
            )
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
            return (
                f"QNN's {backend} backend runs on x86-64 Linux, this is {platform.system()} {platform.machine()}: use "
                "such a host"
            )
        if util.find_spec("onnxruntime_qnn") is None:
            return "onnxruntime-qnn is not installed: pip install 'pytest-qnn[sim]'"
        if backend == "cpu":
            try:
                find_cpu_library(self.settings.cpu_library)
            except CpuLibraryMissing as error:
                return str(error)
        return ""

    def soc_of(self, backend: str, soc: str | None = None, serial: str | None = None) -> str:
        """Name of the SoC that is simulated."""
        return soc or self.settings.soc

    def sampler(self, serial: str) -> HealthSampler:
        """No plan of this target has a device."""
        raise KeyError(serial)

    def enter_test(self, nodeid: str) -> None:
        """Nothing here is one test's alone."""

    def end_test(self, outcome: str) -> None:
        """Nobody asks here."""

    def close(self) -> None:
        """Nothing is held here."""

    def plan(self, backend: str, soc: str | None, options: Mapping[str, object], serial: str | None = None) -> Plan:
        """How to run ``backend`` here.

        Raises:
            OptionError: unknown option, value or SoC.
            BackendUnavailableError: the backend isn't here.
        """
        checked = check_options(backend, options)
        checked = dict(sorted({**self.settings.backend_options.get(backend, {}), **checked}.items()))
        chosen = find_soc(soc or self.settings.soc)
        if reason := self.missing(backend):
            raise BackendUnavailableError(f"backend {backend!r} is not available: {reason}")
        asked = provider_options(backend, checked)
        if checked.get("device_id", "0") != "0":
            raise OptionError(
                f"backend {backend!r}: option device_id: the simulator has one device, 0, got {checked['device_id']}: "
                "leave the option out"
            )
        wheel = metadata.version("onnxruntime-qnn")
        versions = {"onnxruntime_qnn": wheel}
        if backend == "htp":
            own = {"backend_type": "htp", "soc_model": str(chosen.soc_id)}
            return Plan(
                backend="htp",
                target=self.name,
                # a second SoC in a process changes the precision of the first; with a second size of VTCM, contexts that
                # were loaded before fail with error 1100
                process=f"htp {chosen.name} {wheel} vtcm {checked.get('vtcm_mb', '0')}",
                provider_options=tuple({**asked, **own}.items()),
                options=tuple(checked.items()),
                run_options=tuple(run_options(backend, checked).items()),
                soc=chosen,
                simulated=True,
                has_contexts=True,
                place=f"{chosen.name}, simulator",
                not_a_device=NOT_A_DEVICE["htp"],
                versions=versions,
            )
        library = find_cpu_library(self.settings.cpu_library)
        own = {"backend_path": str(library.path), "skip_qnn_version_check": "1"}
        return Plan(
            backend="cpu",
            target=self.name,
            process=f"cpu {library.path} {wheel}",
            provider_options=tuple({**asked, **own}.items()),
            options=tuple(checked.items()),
            not_a_device=NOT_A_DEVICE["cpu"],
            library=f"{library.path} ({library.origin})",
            float_only=True,
            place="x86-64 host",
            versions=versions,
        )
