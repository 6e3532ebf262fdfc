"""The runtime's own events of one inference.

The QNN execution provider writes them as CSV (``profiling_level``, ``profiling_file_path``), with the columns of
Qualcomm's qnn-profile-viewer: message, time, unit, source, level, identifier.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_qnn.errors import ExecutionError
from pytest_qnn.model.probe import temporary_folder
from pytest_qnn.runners.ort import LoadedModel
from pytest_qnn.runners.shared_tensors import Array


@dataclass(frozen=True)
class Event:
    """One event.

    Attributes:
        message: its kind, e.g. "NODE", "EXECUTE", "FINALIZE".
        time: how much, in ``unit``.
        unit: "US" (microseconds), "CYCLES" or "COUNT".
        level: "ROOT" or "SUB-EVENT".
        identifier: what it is about, e.g. "conv:OpId_23 (cycles)".
    """

    message: str
    time: int
    unit: str
    level: str
    identifier: str


@dataclass(frozen=True)
class Profile:
    """The events of loading a model and running it once.

    Attributes:
        not_a_device: why the figures say nothing about a Snapdragon; empty if they do. A simulator's cycles follow the
            host's time.
    """

    events: tuple[Event, ...]
    not_a_device: str

    @property
    def nodes(self) -> dict[str, int]:
        """Cycles per node of the compiled graph, the most expensive first."""
        found: dict[str, int] = {}
        for event in self.events:
            if event.message == "NODE" and event.unit == "CYCLES":
                name = event.identifier.removesuffix(" (cycles)")
                found[name] = found.get(name, 0) + event.time
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def profile(loaded: LoadedModel, sample: Mapping[str, Array], not_a_device: str) -> Profile:
    """Load the model again with profiling on, run it once and read what the runtime wrote.

    Raises:
        TargetError: as for loading and running; also if the runtime wrote nothing readable.
    """
    with temporary_folder() as folder:
        file = folder / "profile.csv"
        options = (("profiling_level", "detailed"), ("profiling_file_path", str(file)))
        request = replace(loaded.request, provider_options=loaded.request.provider_options + options)
        profiled = LoadedModel(loaded.pool, request, loaded.subject, loaded.limits)
        try:
            profiled.run(sample)
        finally:
            profiled.close()
        try:
            events = read_events(file)
        except (OSError, ValueError, KeyError) as error:
            raise ExecutionError(f"{loaded.subject}: the runtime wrote no readable profile: {error!r}") from error
    return Profile(events, not_a_device)


def read_events(file: Path) -> tuple[Event, ...]:
    """Events of a profile in CSV.

    Raises:
        OSError, ValueError, KeyError: missing, or not such a file.
    """
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        return tuple(
            Event(
                row["Message"],
                int(row["Time"]),
                row["Unit of Measurement"],
                row["Event Level"],
                row["Event Identifier"],
            )
            for row in csv.DictReader(lines)
        )
