"""The runtime's own events of one inference.

The QNN execution provider writes them as CSV (``profiling_level``, ``profiling_file_path``), with the columns of
Qualcomm's qnn-profile-viewer: message, time, unit, source, level, identifier.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


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
    not_a_device: str = ""

    @property
    def nodes(self) -> dict[str, int]:
        """Cycles per node of the compiled graph, the most expensive first."""
        found: dict[str, int] = {}
        for event in self.events:
            of_node = (event.message, event.level) == ("EXECUTE", "SUB-EVENT")  # qnn-net-run's
            if (event.message == "NODE" or of_node) and event.unit == "CYCLES":
                name = event.identifier.removesuffix(" (cycles)")
                found[name] = found.get(name, 0) + event.time
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def read_events(file: Path) -> tuple[Event, ...]:
    """Events of a profile in CSV.

    Raises:
        OSError, ValueError, KeyError: missing, or not such a file.
    """
    with file.open(newline="", encoding="utf-8", errors="replace") as lines:
        return parse_events(lines)


def parse_events(lines: Iterable[str]) -> tuple[Event, ...]:
    """Events of the lines of a profile in CSV.

    Raises:
        ValueError, KeyError: they aren't of such a file.
    """
    return tuple(
        Event(
            row["Message"],
            int(row["Time"] or ""),
            row["Unit of Measurement"],
            row["Event Level"],
            row["Event Identifier"],
        )
        for row in csv.DictReader(lines)
    )
