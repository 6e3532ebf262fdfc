"""Validation of quantised ONNX models on Qualcomm's QNN backends, as a pytest plugin.

Names are loaded on first use: importing this package imports nothing but the standard library, so that the plugin costs
a project that doesn't use it (almost) nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qnn.assertions import assert_fully_offloaded, assert_latency, assert_matches_reference
    from pytest_qnn.backend import Backend
    from pytest_qnn.bench import Bench
    from pytest_qnn.errors import (
        AccuracyError,
        ArtifactError,
        BackendUnavailableError,
        CompileError,
        ExecutionError,
        InputError,
        LatencyError,
        ModelError,
        OptionError,
        PlacementError,
        QnnError,
        RuntimeCrashError,
        TargetError,
        TargetMemoryError,
        TargetTimeoutError,
        UsageError,
        VerdictError,
    )
    from pytest_qnn.session import Run, Session
    from pytest_qnn.verdict.latency import LatencyBudget
    from pytest_qnn.verdict.tolerance import Tolerance

__version__ = "0.1.0"

_HOME = {
    "assert_fully_offloaded": "assertions",
    "assert_latency": "assertions",
    "assert_matches_reference": "assertions",
    "Backend": "backend",
    "Bench": "bench",
    "Run": "session",
    "Session": "session",
    "LatencyBudget": "verdict.latency",
    "Tolerance": "verdict.tolerance",
    **dict.fromkeys(
        [
            "AccuracyError",
            "ArtifactError",
            "BackendUnavailableError",
            "CompileError",
            "ExecutionError",
            "InputError",
            "LatencyError",
            "ModelError",
            "OptionError",
            "PlacementError",
            "QnnError",
            "RuntimeCrashError",
            "TargetError",
            "TargetMemoryError",
            "TargetTimeoutError",
            "UsageError",
            "VerdictError",
        ],
        "errors",
    ),
}

__all__ = [  # noqa: PLE0604 - the names above, loaded lazily
    *_HOME
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
