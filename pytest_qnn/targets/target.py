"""What every target can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pytest_qnn.devices.health import HealthSampler
from pytest_qnn.devices.soc import Soc


@dataclass(frozen=True)
class Plan:
    """How to run one backend on one target.

    Attributes:
        backend: "htp", "cpu" or "gpu".
        target: the target's name.
        process: what may share a runtime process: sessions with the same text here.
        provider_options: for the QNN execution provider of this host, complete and validated.
        options: what the user asked for: in the project's configuration, in marks and at ``load``.
        run_options: onnxruntime's run options, for each run.
        soc: what is simulated or driven; None where the backend doesn't know SoCs.
        simulated: whether a simulator computes the results.
        not_a_device: why latencies measured here say nothing about a Snapdragon device; empty if they do.
        library: the runtime library, where it isn't the installed wheel's own.
        float_only: whether the backend computes in float only.
        has_contexts: whether a model can be compiled to a context binary for it, on this host.
        place: for messages, e.g. "SM8650, simulator".
        runner: "ort" or "net_run".
        serial: of the device that it runs on; empty on this host.
        device_options: for the QNN execution provider on the device, where the runner is ``ort``.
        device: what is known of the device (JSON-able); None on this host.
    """

    backend: str
    target: str
    process: str
    provider_options: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, str], ...] = ()
    run_options: tuple[tuple[str, str], ...] = ()
    soc: Soc | None = None
    simulated: bool = False
    not_a_device: str = ""
    library: str = ""
    float_only: bool = False
    has_contexts: bool = False
    place: str = ""
    runner: str = "ort"
    serial: str = ""
    device_options: tuple[tuple[str, str], ...] = ()
    device: Mapping[str, Any] | None = field(default=None, hash=False, compare=False)
    versions: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)


class Target(Protocol):
    """A place with a QNN runtime."""

    name: str
    tape: object  # the recording that is made, or replayed; None for neither

    def missing(self, backend: str, soc: str | None = None, serial: str | None = None) -> str:
        """Why ``backend`` can't be used here and how to change that; empty if it can.

        Args:
            soc, serial: what a device must be, where a test says so.

        Raises:
            TargetError: it should be there, but something is wrong with it.
        """
        ...

    def soc_of(self, backend: str, soc: str | None = None, serial: str | None = None) -> str:
        """Name of the SoC that :meth:`plan` would take."""
        ...

    def plan(self, backend: str, soc: str | None, options: Mapping[str, object], serial: str | None = None) -> Plan:
        """How to run ``backend`` here.

        Raises:
            OptionError: unknown option, value or SoC.
            BackendUnavailableError: the backend isn't here.
            TargetError: as for :meth:`missing`.
        """
        ...

    def sampler(self, serial: str) -> HealthSampler:
        """Watches a device of a plan while it is measured."""
        ...

    def enter_test(self, nodeid: str) -> None:
        """The test that uses it from now on; empty between tests: then others may have what only one can use at a time."""
        ...

    def end_test(self, outcome: str) -> None:
        """How the running test ended."""
        ...

    def close(self) -> None:
        """Let go of everything.

        Raises:
            TargetError: what was recorded, or replayed, isn't complete.
        """
        ...
