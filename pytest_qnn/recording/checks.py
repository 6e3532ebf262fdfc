"""What can be said before anything runs: whether a session can be recorded or replayed at all, and where."""

from __future__ import annotations

import json
from pathlib import Path

from pytest_qnn.errors import OptionError
from pytest_qnn.recording.log import LOG, DamagedRecordingError, read_lines


def check_possible(record: Path | None, replay: Path | None, parallel: bool) -> None:
    """Refuse what can't be recorded or replayed.

    Args:
        record, replay: the settings.
        parallel: whether tests run in several processes (xdist).

    Raises:
        OptionError: it isn't possible; the message says why.
    """
    if record is None and replay is None:
        return
    flag = "--qnn-record" if record is not None else "--qnn-replay"
    if record is not None and replay is not None:
        raise OptionError(
            "--qnn-record and --qnn-replay were both given: a replay has nothing to record. Leave one out"
        )
    if parallel:
        raise OptionError(
            f"{flag} and -n (xdist) were both given: a recording is one process's session with its devices, in order. Run "
            "without -n (or with -n0)"
        )
    if record is not None:
        check_folder(record)


def check_folder(folder: Path) -> None:
    """Refuse a folder that a recording can't go to: it must be empty, or not there yet.

    Raises:
        OptionError: it has something in it, or is no folder.
    """
    try:
        there = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return
    except OSError as error:
        raise OptionError(f"{folder}: a recording can't go there ({error.strerror}): name a new folder") from None
    if LOG in there:
        raise OptionError(
            f"{folder}: there is a recording{_date(folder)} already: name a new folder, or replace it with "
            f"'pytest-qnn record --replace {folder}'"
        )
    if there:
        raise OptionError(
            f"{folder}: there are other files in it ({', '.join(sorted(there)[:3])}, ...) and no recording: name a new folder"
        )


def is_recording(folder: Path) -> bool:
    """Whether ``folder`` holds a recording, whole or not, and nothing else."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError:
        return False
    return LOG in names and names <= {LOG, "files"} and bool(_date(folder))


def _date(folder: Path) -> str:
    try:
        for line in read_lines(folder):
            if line is not None and line.get("kind", str) == "recording":
                return f" of {line.get('began', str)[:40]}"
            break
    except (DamagedRecordingError, OSError, json.JSONDecodeError):
        pass
    return ""
