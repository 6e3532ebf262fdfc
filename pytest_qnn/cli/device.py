"""``pytest-qnn device SERIAL``: clean it, read its log, find out why it can't be used."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qnn.cli import write
from pytest_qnn.cli.devices import add_settings, complete_runtime, python_runtime, read_settings

if TYPE_CHECKING:
    from pytest_qnn.devices.discovery import DeviceEntry
    from pytest_qnn.devices.facts import DeviceFacts
    from pytest_qnn.devices.transport import Transport
    from pytest_qnn.settings import Settings

ENOUGH_BYTES = 512 << 20  # a runtime and a few models
PROBE_SECONDS = 15.0


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("device", help="clean a device, read its log, or find out why it can't be used")
    parser.add_argument("serial", metavar="SERIAL", help="as 'adb devices' shows it, or adb://SERIAL@HOST:PORT")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    texts = {
        "clean": "remove workspaces of sessions that died, and the files kept for later ones",
        "logs": "print the end of the device's own log",
        "diagnose": "check step by step whether models can run there; exit code 1 if not",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text)
        add_settings(action)
        if name == "clean":
            action.add_argument(
                "--all", action="store_true", help="also workspaces of sessions that live, or may, on other hosts"
            )
        if name == "logs":
            action.add_argument("--lines", type=int, default=200, metavar="N", help="default 200")
        if name == "diagnose":
            action.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    settings = read_settings(chosen, device=chosen.serial)
    return {"clean": _clean, "logs": _logs, "diagnose": _diagnose}[chosen.action](settings, chosen)


# --- clean ------------------------------------------------------------------------------------------------------------


def _clean(settings: Settings, chosen: argparse.Namespace) -> int:
    from pytest_qnn.devices.facts import probe
    from pytest_qnn.devices.lease import DeviceLease
    from pytest_qnn.devices.store import MIB, DeviceStore
    from pytest_qnn.devices.workspace import sweep

    entry, transport = _open(settings)
    try:
        with DeviceLease(entry.serial, entry.address, "pytest-qnn device clean") as lease:
            lease.acquire(0)
            facts = probe(transport, settings.device_folder, settings.device_python, timeout=PROBE_SECONDS)
            swept = sweep(transport, facts.folder, all_owners=chosen.all)
            store = DeviceStore(transport, facts.folder, settings.device_limit_mb)
            gone = store.clear()
            left = store.files()
        size = sum(file.size for file in gone) / MIB
        write(
            f"{facts.folder}: {_count(len(swept.workspaces), 'workspace')} and {_count(len(gone), 'file')} removed, {size:.1f} MiB"
        )
        if swept.living or left:
            write(
                f"{_count(len(swept.living), 'workspace')} in use, with {_count(len(left), 'file')}, "
                f"{sum(file.size for file in left) / MIB:.1f} MiB: left alone; --all removes them too"
            )
    finally:
        transport.close()
    return 0


# --- logs -------------------------------------------------------------------------------------------------------------


def _logs(settings: Settings, chosen: argparse.Namespace) -> int:
    from pytest_qnn.devices.device_log import log_tail
    from pytest_qnn.devices.facts import probe
    from pytest_qnn.errors import OptionError

    if not 0 < chosen.lines <= 100_000:
        raise OptionError(f"--lines: expected a number from 1 to 100000, got {chosen.lines}")
    _, transport = _open(settings)
    try:
        facts = probe(transport, settings.device_folder, settings.device_python, timeout=PROBE_SECONDS)
        text = log_tail(transport, facts, chosen.lines)
    finally:
        transport.close()
    if not text:
        tool = "logcat" if facts.os == "android" else "journalctl and dmesg"
        write(f"device {facts.serial} gives no log: {tool} said nothing, or may not be read by this user")
        return 1
    write(text)
    return 0


# --- diagnose ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One check: ``ok`` is None where it doesn't matter."""

    name: str
    ok: bool | None
    text: str


def _diagnose(settings: Settings, chosen: argparse.Namespace) -> int:
    steps = _steps(settings)
    good = all(step.ok is not False for step in steps)
    if chosen.json:
        write(json.dumps({"ok": good, "steps": [step.__dict__ for step in steps]}, indent=1))
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        marks = {True: "ok", False: "problem", None: "-"}
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for step in steps:
            table.add_row(step.name, marks[step.ok], Text(step.text))
        Console(width=shutil.get_terminal_size((120, 24)).columns, highlight=False).print(table)
        write()
        write(
            "Models can run on this device." if good else "Models can't run on this device yet: see the problems above."
        )
    return 0 if good else 1


def _steps(settings: Settings) -> list[_Step]:
    """The checks, up to the first after which the others make no sense."""
    from pytest_qnn.adb.server import find_server, parse_address
    from pytest_qnn.devices.discovery import discover
    from pytest_qnn.devices.facts import probe
    from pytest_qnn.errors import DeviceError

    server = parse_address(settings.device[0])[1] or find_server(settings.adb_server)
    try:
        steps = [_Step("ADB server", True, f"{server.address}, protocol version {server.version()}")]
    except DeviceError as error:
        return [_Step("ADB server", False, str(error))]
    entry = discover(settings)[0]
    steps.append(_Step("state", not entry.trouble, entry.trouble or f"{entry.serial}: {entry.state}"))
    if entry.trouble:
        return steps
    transport = entry.open()
    try:
        facts = probe(transport, settings.device_folder, settings.device_python, timeout=PROBE_SECONDS)
        start = time.perf_counter()
        transport.shell(["true"], timeout=PROBE_SECONDS)
        took = 1e3 * (time.perf_counter() - start)
    except DeviceError as error:
        return [*steps, _Step("shell", False, str(error))]
    finally:
        transport.close()
    return [*steps, _Step("shell", True, f"answers in {took:.0f} ms"), *_of_facts(facts, settings), _lease(entry)]


def _of_facts(facts: DeviceFacts, settings: Settings) -> list[_Step]:
    system = f"{'Android ' if facts.os == 'android' else ''}{facts.release}, kernel {facts.kernel}, {facts.abi}"
    what = f"{facts.model}, {system}{', root' if facts.root else ''}"
    steps = [_Step("device", True, what)]
    if facts.stand_in:
        steps.append(_Step("stand-in", None, f"not a real device: {facts.stand_in}"))
    why_not = f" ({facts.folder_text})" if facts.folder_text else ""
    steps.append(
        _Step("folder", True, f"{facts.folder}: can be written, programs run there{why_not}")
        if facts.folder
        else _Step("folder", False, f"{facts.folder_text}: name another one with device_folder (--device-folder)")
    )
    if facts.free_bytes is not None:
        free = f"{facts.free_bytes / 2**30:.1f} GiB free there"
        enough = facts.free_bytes >= ENOUGH_BYTES
        clean = f"pytest-qnn device {facts.serial} clean"
        steps.append(_Step("space", enough, free if enough else f"{free}: free some more: {clean}"))
    if facts.soc:
        note = f" ({facts.soc_text})" if facts.soc_text else ""
        steps.append(_Step("SoC", True, f"{facts.soc.name}, Hexagon v{facts.soc.htp_arch}{note}"))
    else:
        from pytest_qnn.devices.soc import SOCS

        text = f"{facts.soc_text}: its HTP can't be used. Known: {', '.join(SOCS)}"
        steps.append(_Step("SoC", False, text))
    steps += _runtime(facts, settings)
    zones = f"{len(facts.zones)} thermal zones" if len(facts.zones) != 1 else "1 thermal zone"
    if facts.temperature_c is not None:
        steps.append(_Step("temperature", None, f"{facts.temperature_c:.0f} °C, the hottest of {zones}"))
    else:
        steps.append(_Step("temperature", None, f"{zones}, none that can be read: throttling can't be seen"))
    return steps


def _runtime(facts: DeviceFacts, settings: Settings) -> list[_Step]:
    """Either onnxruntime in Python or qnn-net-run is enough."""
    from pytest_qnn.errors import BackendUnavailableError

    python = python_runtime(facts)
    steps = []
    try:
        files = complete_runtime(facts, settings)
        listed = [f"  {name}: {path}" for name, path in {**files.local, **files.on_device}.items()]
        text = "\n".join([f"release {files.version}, from {files.origin}", *listed])
        steps.append(_Step("qnn-net-run", True, text))
    except BackendUnavailableError as error:
        needed = not python or settings.runner == "net_run"
        steps.append(_Step("qnn-net-run", False if needed else None, str(error)))
    if facts.os == "linux":
        missing = (
            f"{facts.python.path} {facts.python.version or ''} without onnxruntime and onnxruntime-qnn: install both there"
            if facts.python
            else "no python3 on the device"
        )
        enough = bool(steps[0].ok) and settings.runner != "ort"
        where = f"{facts.python.path} {facts.python.version}: {python}" if facts.python and python else missing
        steps.append(_Step("Python", True if python else None if enough else False, where))
    return steps


def _lease(entry: DeviceEntry) -> _Step:
    from pytest_qnn.devices.lease import DeviceLease

    holder = DeviceLease(entry.serial, entry.address).holder()
    return _Step("lease", None, f"used by {holder.describe()}" if holder else "free")


def _open(settings: Settings) -> tuple[DeviceEntry, Transport]:
    from pytest_qnn.devices.discovery import discover

    entry = discover(settings)[0]
    return entry, entry.open()


def _count(number: int, one: str) -> str:
    return f"{number} {one if number == 1 else one + 's'}"
