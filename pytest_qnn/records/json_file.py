"""``--qnn-json FILE``: the report as JSON.

While the run goes on, what is known lies in ``FILE.partial``, one JSON object per line, so that a killed run loses
nothing; at the end FILE appears in one piece and the partial file goes.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qnn.records.record import SCHEMA_VERSION

if TYPE_CHECKING:
    from pytest_qnn.records.collector import Collector


def partial_file(file: Path) -> Path:
    """Where the report lies until the run is over."""
    return file.with_name(file.name + ".partial")


def check_writable(file: Path | None) -> None:
    """Make the folder, start the partial file and remove an older report.

    Raises:
        OSError: that isn't possible.
    """
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir():
        raise IsADirectoryError(21, "this is a folder, name a file", str(file))
    partial_file(file).write_text("", encoding="utf-8")
    file.unlink(missing_ok=True)  # an older report must not be taken for this run's


def append(file: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines to the partial file; a full disk doesn't stop the run (the end will say so)."""
    with suppress(OSError), partial_file(file).open("a", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def write(file: Path, collector: Collector, exit_status: int, outcomes: dict[str, int]) -> None:
    """Write the report in one piece.

    Args:
        exit_status: pytest's.
        outcomes: number of tests by outcome.

    Raises:
        OSError: it can't be written; the partial file stays.
    """
    artifacts = {name: collector.artifacts[name] for name in ("compiled", "reused", "rebuilt", "in_memory")}
    run = {"exit_status": exit_status, "interrupted": exit_status == 2, "outcomes": outcomes, "artifacts": artifacts}
    report = {"schema": SCHEMA_VERSION, "run": run, "records": collector.records, "errors": collector.errors}
    report["retries"] = collector.retries
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    with suppress(OSError):
        partial_file(file).unlink()
