"""qnn-net-run's profiling log, which only the SDK's own qnn-profile-viewer can read, as events."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pytest_qnn.errors import (
    ArtifactError,
    BackendUnavailableError,
    CompileError,
    ExecutionError,
    RuntimeCrashError,
)
from pytest_qnn.runners.profile import Event, read_events
from pytest_qnn.sdk.installation import Sdk, find_sdk
from pytest_qnn.sdk.tool import step

VIEWER = "qnn-profile-viewer"
VIEWER_SECONDS = 300.0
_GRAPH = re.compile(r"Graph \d+")


def find_viewer(subject: str) -> Sdk:
    """The SDK whose viewer reads the log.

    Raises:
        BackendUnavailableError: there is none.
    """
    try:
        sdk = find_sdk()
        sdk.tool(VIEWER)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(
            f"{subject}: qnn-net-run's times and events stand in a log that only {VIEWER} of the QNN SDK reads: {error}"
        ) from error
    return sdk


def read_log(sdk: Sdk, log: Path, subject: str) -> tuple[Event, ...]:
    """The events of a profiling log.

    Raises:
        ExecutionError: the viewer can't read it.
        TargetError: the viewer died or hung.
    """
    with step(sdk, VIEWER, subject, log.parent, f"{log.stem}.viewer.log", VIEWER_SECONDS) as run:
        made = run.work / "profile.csv"
        try:
            run.run(["--input_log", str(log), "--output", str(made)])
            run.made(made)
            return read_events(made)
        except (CompileError, ArtifactError, RuntimeCrashError, OSError, ValueError, KeyError) as error:
            raise ExecutionError(f"{subject}: the profile of the run can't be read: {error}") from error


def times_ms(events: Sequence[Event]) -> list[float]:
    """Time of each inference (ms), in order: what qnn-net-run measured around the execution of the graph, else what the backend
    did; empty if the profile has neither."""
    executions = [e for e in events if e.message == "EXECUTE" and e.level == "ROOT" and e.unit == "US"]
    around = [e.time / 1e3 for e in executions if _GRAPH.match(e.identifier)]
    return around or [e.time / 1e3 for e in executions if e.identifier == "QNN (execute) time"]
