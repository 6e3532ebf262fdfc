"""What every target can be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pytest_qnn.devices.soc import Soc


@dataclass(frozen=True)
class Plan:
    """How to run one backend on one target.

    Attributes:
        backend: "htp", "cpu" or "gpu".
        target: the target's name.
        process: what may share a runtime process: sessions with the same text here.
        provider_options: for the QNN execution provider, complete and validated.
        options: what the user asked for: in the project's configuration, in marks and at ``load``.
        run_options: onnxruntime's run options, for each run.
        soc: what is simulated or driven; None where the backend doesn't know SoCs.
        simulated: whether a simulator computes the results.
        not_a_device: why latencies measured here say nothing about a Snapdragon device; empty if they do.
        library: the runtime library, where it isn't the installed wheel's own.
        float_only: whether the backend computes in float only.
        has_contexts: whether a model can be compiled to a context binary for it.
        place: for messages, e.g. "SM8650, simulator".
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
    versions: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)


class Target(Protocol):
    """A place with a QNN runtime."""

    name: str

    def missing(self, backend: str) -> str:
        """Why ``backend`` can't be used here and how to change that; empty if it can."""
        ...

    def plan(self, backend: str, soc: str | None, options: Mapping[str, object]) -> Plan:
        """How to run ``backend`` here.

        Raises:
            OptionError: unknown option, value or SoC.
            BackendUnavailableError: the backend isn't here.
        """
        ...
