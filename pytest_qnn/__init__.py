"""Validation of quantised ONNX models on Qualcomm's QNN backends, as a pytest plugin.

Names are loaded on first use: importing this package imports nothing but the standard library, so that the plugin costs
a project that doesn't use it (almost) nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qnn.assertions import (
        assert_fully_offloaded,
        assert_latency,
        assert_layers_match_reference,
        assert_matches_reference,
    )
    from pytest_qnn.backend import (
        Backend,
    )
    from pytest_qnn.bench import (
        Bench,
    )
    from pytest_qnn.errors import (
        AccuracyError,
        AdbServerError,
        ArtifactError,
        BackendUnavailableError,
        BundleError,
        CompileError,
        DeviceBusyError,
        DeviceError,
        DeviceFileError,
        DeviceLostError,
        DeviceRefusedError,
        DeviceSpaceError,
        DeviceTimeoutError,
        DeviceUnstableError,
        EncodingError,
        ExecutionError,
        InputError,
        InvariantError,
        LatencyError,
        LayerError,
        LintError,
        ModelError,
        OptionError,
        PlacementError,
        QnnError,
        RecordingError,
        ReplayError,
        RobustnessError,
        RuntimeCrashError,
        TargetError,
        TargetMemoryError,
        TargetTimeoutError,
        TaskMetricError,
        UsageError,
        VerdictError,
    )
    from pytest_qnn.lint.check import (
        assert_lint_clean,
    )
    from pytest_qnn.lint.findings import (
        LintReport,
    )
    from pytest_qnn.records.bundle import (
        keep_bundle,
    )
    from pytest_qnn.runners.reference import (
        Reference,
    )
    from pytest_qnn.session import (
        Measurement,
        Run,
        Session,
    )
    from pytest_qnn.task_metrics import (
        assert_task_metric,
        per_sample,
        top_k,
        word_error_rate,
    )
    from pytest_qnn.verdict.judge import (
        AccuracyVerdict,
    )
    from pytest_qnn.verdict.latency import (
        LatencyBudget,
        LatencyVerdict,
    )
    from pytest_qnn.verdict.layer_rule import (
        LayersVerdict,
    )
    from pytest_qnn.verdict.task_metric import (
        TaskMetricVerdict,
    )
    from pytest_qnn.verdict.tolerance import (
        Tolerance,
    )

__version__ = "0.1.0"

__all__ = [
    "AccuracyError",
    "AccuracyVerdict",
    "AdbServerError",
    "ArtifactError",
    "Backend",
    "BackendUnavailableError",
    "Bench",
    "BundleError",
    "CompileError",
    "DeviceBusyError",
    "DeviceError",
    "DeviceFileError",
    "DeviceLostError",
    "DeviceRefusedError",
    "DeviceSpaceError",
    "DeviceTimeoutError",
    "DeviceUnstableError",
    "EncodingError",
    "ExecutionError",
    "InputError",
    "InvariantError",
    "LatencyBudget",
    "LatencyError",
    "LatencyVerdict",
    "LayerError",
    "LayersVerdict",
    "LintError",
    "LintReport",
    "Measurement",
    "ModelError",
    "OptionError",
    "PlacementError",
    "QnnError",
    "RecordingError",
    "Reference",
    "ReplayError",
    "RobustnessError",
    "Run",
    "RuntimeCrashError",
    "Session",
    "TargetError",
    "TargetMemoryError",
    "TargetTimeoutError",
    "TaskMetricError",
    "TaskMetricVerdict",
    "Tolerance",
    "UsageError",
    "VerdictError",
    "assert_fully_offloaded",
    "assert_latency",
    "assert_layers_match_reference",
    "assert_lint_clean",
    "assert_matches_reference",
    "assert_task_metric",
    "keep_bundle",
    "per_sample",
    "top_k",
    "word_error_rate",
]

_MODULES = {
    "assertions": (
        "assert_fully_offloaded",
        "assert_latency",
        "assert_layers_match_reference",
        "assert_matches_reference",
    ),
    "backend": ("Backend",),
    "bench": ("Bench",),
    "errors": (
        "AccuracyError",
        "AdbServerError",
        "ArtifactError",
        "BackendUnavailableError",
        "BundleError",
        "CompileError",
        "DeviceBusyError",
        "DeviceError",
        "DeviceFileError",
        "DeviceLostError",
        "DeviceRefusedError",
        "DeviceSpaceError",
        "DeviceTimeoutError",
        "DeviceUnstableError",
        "EncodingError",
        "ExecutionError",
        "InputError",
        "InvariantError",
        "LatencyError",
        "LayerError",
        "LintError",
        "ModelError",
        "OptionError",
        "PlacementError",
        "QnnError",
        "RecordingError",
        "ReplayError",
        "RobustnessError",
        "RuntimeCrashError",
        "TargetError",
        "TargetMemoryError",
        "TargetTimeoutError",
        "TaskMetricError",
        "UsageError",
        "VerdictError",
    ),
    "lint.check": ("assert_lint_clean",),
    "lint.findings": ("LintReport",),
    "records.bundle": ("keep_bundle",),
    "runners.reference": ("Reference",),
    "session": (
        "Measurement",
        "Run",
        "Session",
    ),
    "task_metrics": (
        "assert_task_metric",
        "per_sample",
        "top_k",
        "word_error_rate",
    ),
    "verdict.judge": ("AccuracyVerdict",),
    "verdict.latency": (
        "LatencyBudget",
        "LatencyVerdict",
    ),
    "verdict.layer_rule": ("LayersVerdict",),
    "verdict.task_metric": ("TaskMetricVerdict",),
    "verdict.tolerance": ("Tolerance",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
