"""``pytest-qnn record`` and ``pytest-qnn replay``: pytest with a device session stored, or answered out of one that was."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qnn.cli import write
from pytest_qnn.errors import OptionError

if TYPE_CHECKING:
    from pytest_qnn.recording.stored import StoredSession

_TARGET = "--qnn-target=adb"  # nothing else can be recorded
_CONTROL = re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]")


class _Record:
    """``record DIR [PYTEST ARGUMENTS]`` and ``record show DIR``."""

    @staticmethod
    def register(commands: Any) -> None:
        """Add the command to the parser."""
        parser = commands.add_parser(
            "record",
            help="run pytest and store all that is asked of devices; or show what was stored",
            usage="pytest-qnn record [--replace] DIR [--] [PYTEST ARGUMENTS ...]\n       pytest-qnn record show [--json] DIR",
            description="Runs pytest with --qnn-record DIR; or shows what is in a recording (exit code 1 if it is damaged or incomplete).",
        )
        parser.add_argument(
            "--replace", action="store_true", help="DIR may hold a recording: it goes if a new one is made"
        )
        parser.add_argument("--json", action="store_true", help="show: print JSON")
        parser.add_argument("folder", metavar="DIR", help="a new or empty folder; to show, one with a recording")
        parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="for pytest")
        parser.set_defaults(run=_record)


class _Replay:
    """``replay DIR [PYTEST ARGUMENTS]``."""

    @staticmethod
    def register(commands: Any) -> None:
        """Add the command to the parser."""
        parser = commands.add_parser(
            "replay",
            help="run the tests of a recording without the device",
            usage="pytest-qnn replay DIR [--] [PYTEST ARGUMENTS ...]",
            description="Runs pytest with --qnn-replay DIR: without further arguments, the tests that were recorded.",
        )
        parser.add_argument("folder", metavar="DIR", help="a folder with a recording")
        parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="for pytest")
        parser.set_defaults(run=_replay)


def register(commands: Any) -> None:
    """Add both commands to the parser."""
    _Record.register(commands)
    _Replay.register(commands)


def _record(chosen: argparse.Namespace) -> int:
    arguments = _for_pytest(chosen.arguments)
    if chosen.folder == "show":
        return _show(chosen, arguments)
    if chosen.json:
        raise OptionError("record: --json goes with 'record show'")
    from pytest_qnn.recording.checks import check_folder, is_recording
    from pytest_qnn.recording.log import LOG

    folder = Path(chosen.folder).absolute()
    aside = None
    if chosen.replace and is_recording(folder):
        aside = folder.with_name(f"{folder.name}.{os.getpid()}.replaced")
        os.replace(folder, aside)
    try:
        check_folder(folder)
        code = _pytest([f"--qnn-record={folder}", _TARGET, *arguments])
    finally:
        recorded = (folder / LOG).exists()
        if aside is not None and recorded:
            shutil.rmtree(aside, ignore_errors=True)
        elif aside is not None:
            os.replace(aside, folder)
    if recorded:
        return _told(folder) or code
    kept = ": the former recording was kept" if aside is not None else ""
    write(f"{chosen.folder}: nothing was recorded{kept}. Did a test use a device?")
    return code or 1


def _told(folder: Path) -> int:
    """Say what was recorded; 1 if that can't be read."""
    from pytest_qnn.recording.stored import problems, read_session

    session = read_session(folder)
    write(
        f"{folder}: {_count(len(session.tests), 'test')}, {_count(session.operations, 'operation')}, "
        f"{_mib(_disk(session))} recorded. Replay: pytest-qnn replay {folder}"
    )
    found = problems(session)
    for problem in found:
        write(f"problem: {problem}")
    return 1 if found else 0


def _replay(chosen: argparse.Namespace) -> int:
    from pytest_qnn.recording.stored import read_session

    folder = Path(chosen.folder).absolute()
    session = read_session(folder)
    arguments = _for_pytest(chosen.arguments) or [_node(part.nodeid) for part in session.tests]
    if not arguments:
        raise OptionError(f"replay: {folder} has no tests: name some, or record again")
    return _pytest([f"--qnn-replay={folder}", _TARGET, *dict.fromkeys(arguments)])


def _node(nodeid: str) -> str:
    """A test's id out of a recording, which is somebody else's data, as an argument: no option, and not outside of here.

    Raises:
        OptionError: it may be one.
    """
    file = nodeid.partition("::")[0]
    if not file or file[0] in "-@/" or ".." in file.split("/") or "\0" in nodeid:
        raise OptionError(f"replay: the recording has a test named {_plain(nodeid)!r}: name the tests to run")
    return nodeid


def _for_pytest(arguments: list[str]) -> list[str]:
    return arguments[1:] if arguments[:1] == ["--"] else arguments


def _pytest(arguments: list[str]) -> int:
    """Run pytest as its own command does, in a process of its own, and wait for it, also after Ctrl-C: it tidies up."""
    child = subprocess.Popen([sys.executable, "-P", "-m", "pytest", *arguments])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to pytest too
    signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


# --- show -------------------------------------------------------------------------------------------------------------


def _show(chosen: argparse.Namespace, arguments: list[str]) -> int:
    chosen.json = chosen.json or "--json" in arguments
    folders = [argument for argument in arguments if argument != "--json"]
    if len(folders) != 1 or chosen.replace:
        raise OptionError(
            "record show: name one folder with a recording, and nothing else but --json (to record into a folder named show: ./show)"
        )
    from pytest_qnn.recording.stored import problems, read_session

    session = read_session(Path(folders[0]))
    found = problems(session)
    summary = _summary(session, found)
    if chosen.json:
        write(json.dumps(summary, indent=1))
    else:
        _print(summary)
    return 1 if found else 0


def _summary(session: StoredSession, found: list[str]) -> dict[str, Any]:
    from pytest_qnn.recording.answers import contents
    from pytest_qnn.recording.content import size_of
    from pytest_qnn.recording.stored import bytes_asked

    asked = [one for part in session.parts for one in part.asked]
    answered = [one for one in asked if one.error is None]
    kinds = Counter(one.question["op"] for one in asked)
    return {
        "folder": str(session.folder),
        "began": session.began,
        "pytest_qnn": session.version,
        "complete": session.ended,
        "outcome": session.outcome,
        "devices": [{"serial": d.serial, "stand_in": d.stand_in, "facts": d.facts} for d in session.devices],
        "tests": [
            {
                "nodeid": part.nodeid,
                "outcome": part.outcome,
                "operations": len(part.asked),
                "seconds": round(sum(one.took for one in part.asked), 3),
            }
            for part in session.tests
        ],
        "parts": [
            {"name": part.name, "occurrence": part.occurrence, "operations": len(part.asked)}
            for part in session.parts
            if not part.nodeid
        ],
        "operations": dict(sorted(kinds.items())),
        "errors": dict(sorted(Counter(one.error["class"] for one in asked if one.error is not None).items())),
        "bytes_to_devices": sum(bytes_asked(one.question) for one in answered),
        "bytes_from_devices": sum(size_of(c) for one in answered for c in contents(one.answer, one.question)),
        "bytes_on_disk": _disk(session),
        "artifacts": sorted(session.artifacts),
        "problems": found,
    }


def _disk(session: StoredSession) -> int:
    return sum(path.stat().st_size for path in session.folder.rglob("*") if path.is_file() and not path.is_symlink())


def _print(summary: dict[str, Any]) -> None:
    state = "" if summary["complete"] else ", incomplete"
    write(_plain(f"recording of {summary['began']} by pytest-qnn {summary['pytest_qnn']}{state}"))
    for device in summary["devices"]:
        facts = device["facts"]
        known = [str(facts[name]) for name in ("model", "soc", "os", "abi") if isinstance(facts.get(name), str | int)]
        stand_in = f" (stand-in: {device['stand_in']})" if device["stand_in"] else ""
        write(_plain(f"device {device['serial']}{stand_in}{': ' if known else ''}{', '.join(known)}"))
    if summary["tests"]:
        width = max(len(test["nodeid"]) for test in summary["tests"])
        for test in summary["tests"]:
            nodeid, outcome = test["nodeid"], test["outcome"] or "no outcome"
            write(
                _plain(
                    f"  {nodeid:{min(width, 80)}}  {outcome:10} {test['operations']:5} operations {test['seconds']:8.3f} s"
                )
            )
    shared = sum(part["operations"] for part in summary["parts"])
    total = sum(summary["operations"].values())
    write(
        f"{total} operations ({shared} outside of tests), {_mib(summary['bytes_to_devices'])} to devices, "
        f"{_mib(summary['bytes_from_devices'])} from devices, {_mib(summary['bytes_on_disk'])} on disk, "
        f"{_count(len(summary['artifacts']), 'compiled model')}"
    )
    if summary["errors"]:
        write("recorded errors: " + _plain(", ".join(f"{n} {name}" for name, n in summary["errors"].items())))
    for problem in summary["problems"]:
        write(_plain(f"problem: {problem}"))


def _plain(text: str) -> str:
    """``text`` without characters that steer a terminal."""
    return _CONTROL.sub("?", text)


def _count(number: int, one: str) -> str:
    return f"{number} {one if number == 1 else one + 's'}"


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
