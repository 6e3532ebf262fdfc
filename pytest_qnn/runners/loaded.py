"""What a session asks of a loaded model, whatever runs it: onnxruntime in a process here or on a device, or qnn-net-run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pytest_qnn.runners.profile import Profile
from pytest_qnn.runners.shared_tensors import Array

if TYPE_CHECKING:
    from pytest_qnn.runners.ort import LoadInfo


@dataclass(frozen=True)
class Inference:
    """One inference.

    Attributes:
        outputs: by name.
        seconds: time in the runtime; NaN where the runner can't tell.
        round_trip_seconds: from the host and back, transfers included, where that is something else: on a device. Of several
            inferences that went together, the mean.
    """

    outputs: dict[str, Array]
    seconds: float
    round_trip_seconds: float | None = None


@dataclass(frozen=True)
class Timing:
    """Times of a series of single inferences.

    Attributes:
        times_ms: of each, in the runtime.
        peak_memory_mib: of the process that hosts the runtime; 0 where that can't be read.
        cpu_share: processor time of that process over elapsed time, 1.0 for one core; None where that can't be read.
        round_trip_ms: of further inferences, each from the host and back, where the runner measures that.
    """

    times_ms: list[float]
    peak_memory_mib: float = 0.0
    cpu_share: float | None = None
    round_trip_ms: list[float] | None = None


class Loaded(Protocol):
    """A model that can be run. If what hosts it is gone, the next use loads it anew.

    Attributes:
        subject: for messages: ``model.onnx on htp (SM8650, simulator)``.
        loads: how often it was loaded.
    """

    @property
    def subject(self) -> str: ...

    @property
    def loads(self) -> int: ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the runner said of itself that belongs into records."""
        ...

    @property
    def versions(self) -> dict[str, str]:
        """What runs it, by names for records, e.g. ``{"device_qnn": "2.51.0"}``; nothing where that is this host's runtime."""
        ...

    def run_many(self, samples: Sequence[Mapping[str, Array]]) -> list[Inference]:
        """One inference for each sample, in order.

        Raises:
            TargetError: the runtime died, hung, ran out of memory or reported an error, or the device is gone.
        """
        ...

    def time(self, inputs: Mapping[str, Array], count: int, seconds: float, reset_peak: bool = False) -> Timing:
        """Time up to ``count`` single inferences within about ``seconds``.

        Raises:
            TargetError: as for :meth:`run_many`; or the runner can't time single inferences.
        """
        ...

    def profile(self, inputs: Mapping[str, Array]) -> Profile:
        """The runtime's own events of one inference.

        Raises:
            TargetError: as for :meth:`run_many`; or the runner has no profile.
        """
        ...

    def clock(self) -> float:
        """Seconds from an arbitrary start."""
        ...

    def close(self) -> None:
        """Free it; it loads again if it is used again."""
        ...


class LoadedOnnx(Loaded, Protocol):
    """A model that onnxruntime has loaded."""

    @property
    def info(self) -> LoadInfo:
        """What loading showed."""
        ...
