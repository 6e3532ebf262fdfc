"""Every error that the project raises, by whose problem it is.

* :class:`TargetError`: the bench. A test that raises it is an *error* in pytest's words, whatever phase it came from.
* :class:`UsageError`: what was asked for makes no sense (a wrong option, model or input). Fix the test.
* :class:`VerdictError`: the model or the backend was judged and found wanting. A test that raises it is a *failure*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qnn.lint.findings import LintReport
    from pytest_qnn.properties.invariants import InvariantVerdict
    from pytest_qnn.properties.robust import RobustnessReport
    from pytest_qnn.runners.placement import Placement
    from pytest_qnn.verdict.judge import AccuracyVerdict
    from pytest_qnn.verdict.latency import LatencyVerdict
    from pytest_qnn.verdict.layer_rule import LayersVerdict
    from pytest_qnn.verdict.task_metric import TaskMetricVerdict


class QnnError(Exception):
    """Base class of all errors of pytest-qnn."""


# --- the bench -------------------------------------------------------------------------------------------------------


class TargetError(QnnError):
    """Something is wrong with the bench: never a verdict about the model, never a pass.

    Attributes:
        log: the end of the device's own log, where one was involved and could be read.
    """

    log: str = ""


class BackendUnavailableError(TargetError):
    """The backend isn't there. The message says what is missing and how to get it."""


class RuntimeCrashError(TargetError):
    """The process that hosts the QNN runtime died."""


class TargetTimeoutError(TargetError):
    """The runtime did not answer before its deadline; its process was killed."""


class TargetMemoryError(TargetError):
    """The runtime's process grew beyond its memory limit and was killed."""


class ExecutionError(TargetError):
    """The runtime reported an error while it executed a model."""


class DeviceError(TargetError):
    """Base class of what is wrong with a device or the way to it."""


class DeviceLostError(DeviceError):
    """The device, or the way to it, is gone: unplugged, rebooting, its ADB server dead, the connection closed."""


class DeviceTimeoutError(DeviceError):
    """The device, or its ADB server, did not answer before the deadline."""


class DeviceSpaceError(DeviceError):
    """No space left on the device."""


class DeviceFileError(DeviceError):
    """The device refused a file, or a file on it is missing, short, or not the one that it should be."""


class DeviceBusyError(DeviceError):
    """Somebody else holds the device."""


class DeviceRefusedError(DeviceError):
    """The device doesn't let this host in: unauthorized, or without permission to open it."""


class AdbServerError(DeviceError):
    """There is no ADB server where one was expected, or it isn't one."""


class RecordingError(TargetError):
    """A device session can't be recorded any more (the disk is full), or was interrupted; nothing runs unrecorded."""


class DeviceUnstableError(DeviceError):
    """The device throttled, or its latencies drifted, while it was measured: they could not be judged."""


class ReplayError(TargetError):
    """What was asked of a recorded device differs from what was recorded, or the recording is damaged."""


def bench_fault(error: BaseException) -> TargetError | None:
    """The TargetError that ``error`` is, was raised from or while handling, or carries as an exception group."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, TargetError):
            return current
        if isinstance(current, BaseExceptionGroup):
            for inner in current.exceptions:
                if fault := bench_fault(inner):
                    return fault
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return None


# --- what was asked for -----------------------------------------------------------------------------------------------


class UsageError(QnnError):
    """What was asked for makes no sense; the message says what to change."""


class OptionError(UsageError, ValueError):
    """A backend option, marker argument or setting has an unknown name or a bad value."""


class ModelError(UsageError, ValueError):
    """A model file is missing, broken, or doesn't fit what it is used for."""


class EncodingError(ModelError):
    """Encodings are broken, contradict themselves, or don't fit the model. ``problems`` lists each by tensor and field."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class InputError(UsageError, ValueError):
    """Inputs don't fit the model: names, shapes, dtypes or values."""


class ArtifactError(UsageError):
    """A compiled artifact can't be trusted: altered, truncated, or made for something else."""


class BundleError(UsageError):
    """A bundle of a failing case can't be used: damaged, altered, or without the model that it needs."""


class CompileError(QnnError):
    """The backend refused the model; the message carries the backend's own reason."""


# --- verdicts ---------------------------------------------------------------------------------------------------------


class VerdictError(QnnError, AssertionError):
    """Base class of failed assertions. ``verdict`` holds what was judged."""

    def __init__(self, message: str, verdict: Any = None) -> None:
        super().__init__(message)
        self.verdict = verdict


class AccuracyError(VerdictError):
    """Outputs are not as good as they must be."""

    verdict: AccuracyVerdict


class LayerError(VerdictError):
    """Layers depart from the reference, each computed alone from exact inputs."""

    verdict: LayersVerdict


class LatencyError(VerdictError):
    """A latency budget was exceeded (or, with ``--qnn-strict-latency``, could not be decided)."""

    verdict: LatencyVerdict


class TaskMetricError(VerdictError):
    """A metric of the task is worse than it may be, or it isn't shown that it isn't."""

    verdict: TaskMetricVerdict


class PlacementError(VerdictError):
    """Nodes did not run on the backend that was asked for."""

    verdict: Placement | None


class InvariantError(VerdictError):
    """A property that a backend must have does not hold for some inputs."""

    verdict: InvariantVerdict


class RobustnessError(VerdictError):
    """A search for inputs that break an invariant found some."""

    verdict: RobustnessReport


class LintError(VerdictError):
    """A model has what makes it quantise or run badly."""

    verdict: LintReport


for _error in [value for value in globals().values() if isinstance(value, type) and issubclass(value, Exception)]:
    _error.__module__ = "pytest_qnn"  # where users import them from; pytest's summaries have little room
