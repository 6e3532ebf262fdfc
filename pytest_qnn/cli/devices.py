"""``pytest-qnn devices``: which devices there are, and what they are."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qnn.cli import write
from pytest_qnn.interface import DEVICE_SETTINGS, project_folder

if TYPE_CHECKING:
    from pytest_qnn.devices.discovery import DeviceEntry
    from pytest_qnn.devices.facts import DeviceFacts
    from pytest_qnn.devices.lease import Holder
    from pytest_qnn.devices.runtime_files import RuntimeFiles
    from pytest_qnn.settings import Settings

PROBE_SECONDS = 15.0


def register(commands: Any) -> None:
    """Add the command to the parser."""
    text = "list attached devices: SoC, runtime, space, temperature, who uses them"
    parser = commands.add_parser("devices", help=text, description=f"{text}. Exit code 1 if none can be used.")
    add_settings(parser)
    parser.add_argument("--device", metavar="SERIALS", help="only these: serials, or adb://SERIAL@HOST:PORT")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the settings that say how devices are reached and what is there."""
    parser.add_argument("--adb-server", metavar="HOST:PORT", help="default: the setting adb_server")
    parser.add_argument("--device-folder", metavar="PATH", help="on the device; default: the setting device_folder")
    parser.add_argument("--device-python", metavar="PATH", help="on the device; default: the setting device_python")
    parser.add_argument("--device-runtime", metavar="DIR", help="default: the setting device_runtime")


def read_settings(chosen: argparse.Namespace, **more: object) -> Settings:
    """The project's settings, and what the command line says."""
    from pytest_qnn.settings import load_settings

    given = {name: getattr(chosen, name) for name in DEVICE_SETTINGS} | more
    return load_settings(project_folder(Path.cwd()), {k: v for k, v in given.items() if v is not None}, flag="--")


@dataclass(frozen=True)
class Row:
    """A device and what was found out about it; ``trouble``: why not more; ``why_none``: why there is no runtime."""

    entry: DeviceEntry
    facts: DeviceFacts | None
    trouble: str
    runtime: str
    holder: Holder | None
    why_none: str = ""


def run(chosen: argparse.Namespace) -> int:
    """List them; 0 if one can be used."""
    from pytest_qnn.devices.discovery import discover

    settings = read_settings(chosen, device=chosen.device)
    entries = discover(settings)
    rows = look_at(entries, settings)
    usable = any(row.facts for row in rows)
    if chosen.json:
        write(json.dumps({"ok": usable, "devices": [_plain(row) for row in rows]}, indent=1))
        return 0 if usable else 1
    if rows:
        _show(rows)
    else:
        write(
            "No device is attached: plug one in, allow USB debugging on it, and see 'adb devices'; or name one on the network: "
            "--device HOST:PORT"
        )
    return 0 if usable else 1


def look_at(entries: list[DeviceEntry], settings: Settings) -> list[Row]:
    """Probe all of them at once, each until its own deadline."""
    if not entries:
        return []
    with ThreadPoolExecutor(min(32, len(entries)), thread_name_prefix="qnn-probe") as pool:
        return list(pool.map(lambda entry: _look(entry, settings), entries))


def _look(entry: DeviceEntry, settings: Settings) -> Row:
    from pytest_qnn.devices.facts import probe
    from pytest_qnn.devices.lease import DeviceLease
    from pytest_qnn.errors import DeviceError

    holder = DeviceLease(entry.serial, entry.address).holder()
    try:
        transport = entry.open()
        try:
            facts = probe(transport, settings.device_folder, settings.device_python, timeout=PROBE_SECONDS)
        finally:
            transport.close()
    except DeviceError as error:
        return Row(entry, None, str(error), "", holder)
    runtime, why_none = _runtime(facts, settings)
    return Row(entry, facts, "", runtime, holder, why_none)


def _runtime(facts: DeviceFacts, settings: Settings) -> tuple[str, str]:
    """What would run models there: version and place; "none" and the reason if nothing would."""
    from pytest_qnn.errors import BackendUnavailableError

    found = python_runtime(facts)
    if found and settings.runner != "net_run":
        return found, ""
    try:
        files = complete_runtime(facts, settings)
    except BackendUnavailableError as error:
        return "none", str(error)
    origin = "on the device" if files.on_device else files.origin.partition(" ")[0]
    return f"{files.version}, {origin}", ""


def python_runtime(facts: DeviceFacts) -> str:
    """Onnxruntime with the QNN execution provider, in Python on the device; empty if it isn't there."""
    packages: Mapping[str, str] = facts.python.packages if facts.python else {}
    if "onnxruntime" in packages and "onnxruntime-qnn" in packages:
        return f"onnxruntime {packages['onnxruntime']} (qnn {packages['onnxruntime-qnn']})"
    return ""


def complete_runtime(facts: DeviceFacts, settings: Settings) -> RuntimeFiles:
    """The files for qnn-net-run on the device: for its HTP if its SoC is known, else for its CPU.

    Raises:
        BackendUnavailableError: they aren't complete.
    """
    from pytest_qnn.devices.runtime_files import find_runtime

    return find_runtime(facts, "htp" if facts.soc else "cpu", settings.device_runtime, tool=True)


def _show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("serial", "state", "SoC", "arch", "system", "runtime", "free", "°C", "used by"):
        table.add_column(
            name,
            justify="right" if name in ("free", "°C") else "left",
            overflow="fold",
            no_wrap=name in ("serial", "state", "free"),
        )
    for row in rows:
        facts = row.facts
        cells = [row.entry.serial or "(none)", row.entry.state, *([""] * 6)]
        if facts:
            cells[2] = f"{facts.soc.name if facts.soc else 'unknown'}{' (stand-in)' if facts.stand_in else ''}"
            cells[3] = f"v{facts.htp_arch}" if facts.htp_arch else "-"
            cells[4] = f"{'Android ' if facts.os == 'android' else ''}{facts.release}"
            cells[5] = row.runtime
            cells[6] = f"{facts.free_bytes / 2**30:.1f} GiB" if facts.free_bytes is not None else "unknown"
            cells[7] = f"{facts.temperature_c:.0f}" if facts.temperature_c is not None else "-"
        cells.append(f"{row.holder.what}, process {row.holder.pid}" if row.holder else "-")
        table.add_row(*map(Text, cells))
    Console(width=shutil.get_terminal_size((140, 24)).columns, highlight=False).print(table)
    notes = [row.trouble for row in rows if row.trouble]
    for row in rows:
        facts = row.facts
        if facts and not facts.soc:
            notes.append(f"device {facts.serial}: its SoC is unknown: {facts.soc_text or 'it tells none'}")
        if facts and not facts.folder:
            notes.append(f"device {facts.serial}: no folder can be used: {facts.folder_text}")
        if facts and row.why_none:
            notes.append(f"device {facts.serial}: nothing there runs models yet: {row.why_none}")
        if facts and facts.stand_in:
            notes.append(f"device {facts.serial} is a stand-in: {facts.stand_in}")
    if notes:
        write()
        for note in notes:
            write(note)


def _plain(row: Row) -> dict[str, Any]:
    entry, holder = row.entry, row.holder
    return {
        "serial": entry.serial,
        "address": entry.address,
        "state": entry.state,
        "product": entry.product,
        "adb_model": entry.model,
        "trouble": row.trouble,
        "runtime": row.runtime,
        "runtime_trouble": row.why_none,
        "facts": row.facts.to_json() if row.facts else None,
        "lease": {"pid": holder.pid, "host": holder.host, "since": holder.since, "what": holder.what}
        if holder
        else None,
    }
