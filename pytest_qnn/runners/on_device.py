"""A model on a device that may be lost: it is got back and loaded anew, and what was asked is asked once more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from pytest_qnn.devices.attached import AttachedDevice
from pytest_qnn.errors import DeviceError
from pytest_qnn.runners.loaded import Inference, Loaded, Timing
from pytest_qnn.runners.ort import LoadInfo
from pytest_qnn.runners.profile import Profile
from pytest_qnn.runners.shared_tensors import Array


class DeviceModel:
    """A loaded model on a device.

    Args:
        make: loads it on the device, as it is then.

    Raises:
        TargetError: as for :meth:`AttachedDevice.attempt`.
    """

    def __init__(self, device: AttachedDevice, subject: str, make: Callable[[], Loaded]) -> None:
        self.device, self.subject = device, subject
        self._inner = device.attempt(f"loading {subject}", make)

    @property
    def loads(self) -> int:
        """How often it was loaded."""
        return self._inner.loads

    @property
    def notes(self) -> tuple[str, ...]:
        """What the runner said of itself that belongs into records."""
        return self._inner.notes

    @property
    def versions(self) -> dict[str, str]:
        """What runs it on the device, by names for records."""
        return self._inner.versions

    @property
    def info(self) -> LoadInfo:
        """What loading showed; only of a model in onnxruntime."""
        return self._inner.info  # type: ignore[attr-defined,no-any-return]

    def run_many(self, samples: Sequence[Mapping[str, Array]]) -> list[Inference]:
        """One inference for each sample, in order."""
        return self.device.attempt(f"running {self.subject}", lambda: self._inner.run_many(samples))

    def time(self, inputs: Mapping[str, Array], count: int, seconds: float, reset_peak: bool = False) -> Timing:
        """Time up to ``count`` single inferences within about ``seconds``."""
        return self.device.attempt(
            f"timing {self.subject}", lambda: self._inner.time(inputs, count, seconds, reset_peak)
        )

    def profile(self, inputs: Mapping[str, Array]) -> Profile:
        """The runtime's own events of one inference."""
        return self.device.attempt(f"profiling {self.subject}", lambda: self._inner.profile(inputs))

    def clock(self) -> float:
        """Seconds from an arbitrary start."""
        return self.device.transport.clock()

    def close(self) -> None:
        """Free it, as far as the device answers."""
        with suppress(DeviceError):
            self._inner.close()
