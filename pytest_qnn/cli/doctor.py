"""``pytest-qnn doctor``: what works on this host, proved by running it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pytest_qnn.cli import write
from pytest_qnn.errors import DeviceError, OptionError, QnnError
from pytest_qnn.interface import project_folder
from pytest_qnn.settings import BACKENDS, Settings, load_settings, unknown_name

Check = dict[str, Any]


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("doctor", help="check what works on this host, by running it")
    parser.add_argument("--require", default="", metavar="NAMES", help="backends that must work, e.g. htp,cpu")
    parser.add_argument("--soc", help="SoC to simulate")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Check everything; 0 only if what was required works."""
    required = [name for name in chosen.require.replace(",", " ").split() if name]
    for name in required:
        if name not in BACKENDS:
            raise OptionError(f"--require: {unknown_name('backend', name, BACKENDS)}")
    settings = load_settings(project_folder(Path.cwd()), {"soc": chosen.soc} if chosen.soc else None, flag="--")
    checks = [_python(), *_packages(), *_backends(settings), *_sdk(), _adb(), _devices(settings)]
    works = {c["name"]: c["ok"] for c in checks if c["kind"] == "backend"}
    missing = [name for name in required if not works[name]]
    if chosen.json:
        write(json.dumps({"ok": not missing, "required": required, "missing": missing, "checks": checks}, indent=1))
    else:
        marks = {True: "ok", False: "no", None: "-"}
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for check in checks:
            table.add_row(check["name"], marks[check["ok"]], Text(check["detail"]))
        Console(width=shutil.get_terminal_size((120, 24)).columns, highlight=False).print(table)
        if missing:
            write(f"\nrequired, but doesn't work: {', '.join(missing)}")
    return 1 if missing else 0


def _check(kind: str, name: str, ok: bool | None, detail: str, **more: object) -> Check:
    return {"kind": kind, "name": name, "ok": ok, "detail": detail, **more}


def _python() -> Check:
    return _check("host", "python", True, f"{platform.python_version()}, {platform.system()} {platform.machine()}")


def _packages() -> list[Check]:
    checks = []
    for name in ("onnxruntime", "onnxruntime-qnn", "onnx", "pytest", "pytest-xdist"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            hint = "not installed: pip install 'pytest-qnn[sim]'" if name == "onnxruntime-qnn" else "not installed"
            checks.append(_check("package", name, False, hint))
        else:
            checks.append(_check("package", name, True, version, version=version))
    return checks


def _backends(settings: Any) -> list[Check]:
    from pytest_qnn.bench import Bench

    bench = Bench(replace(settings.on_this_host(), no_cache=True))  # proved by doing it, not by what was kept
    try:
        return [_backend(bench, name) for name in BACKENDS]
    finally:
        bench.close()


def _backend(bench: Any, name: str) -> Check:
    """Compile and run a one-node model on a backend, and compare it with what must come out."""
    from pytest_qnn.model.probe import PROBE_INPUT, one_node_model

    if reason := bench.target.missing(name):
        return _check("backend", name, False, reason)
    start = time.perf_counter()
    try:
        with one_node_model("Relu") as file:
            from pytest_qnn.markers import BackendRequest

            session = bench.backend(BackendRequest(name)).load(file)
            loaded = time.perf_counter()
            y = session.run(PROBE_INPUT).output()
            ran = time.perf_counter()
    except QnnError as error:
        return _check("backend", name, False, str(error))
    if not (abs(y - PROBE_INPUT.clip(0)) <= 0.01).all():
        return _check("backend", name, False, f"Relu({PROBE_INPUT.tolist()}) gave {y.tolist()}: the runtime is broken")
    plan = session.plan
    where = f"simulated {plan.soc.name} (v{plan.soc.htp_arch})" if plan.simulated and plan.soc else plan.library
    return _check(
        "backend",
        name,
        True,
        f"{where}, float models in {session.precision}; one node: loaded in {1e3 * (loaded - start):.0f} ms, ran in "
        f"{1e3 * (ran - loaded):.1f} ms",
        load_ms=1e3 * (loaded - start),
        run_ms=1e3 * (ran - loaded),
        simulated=plan.simulated,
        precision=session.precision,
    )


def _sdk() -> list[Check]:
    """The SDK in QNN_SDK_ROOT: its release, its tools, its libraries."""
    if not os.environ.get("QNN_SDK_ROOT"):
        return [_check("sdk", "QNN SDK", None, "QNN_SDK_ROOT is not set: not needed for the simulator")]
    from pytest_qnn.sdk.check import check_sdk
    from pytest_qnn.sdk.installation import find_sdk

    try:
        found = find_sdk()
    except QnnError as error:
        return [_check("sdk", "QNN SDK", False, str(error).removeprefix("QNN SDK: "))]
    return [_check("sdk", finding.name, finding.ok, finding.detail) for finding in check_sdk(found)]


def _adb() -> Check:
    try:
        import adbutils

        path = adbutils.adb_path()
    except Exception as error:  # a missing binary is reported in several ways by different releases
        return _check("adb", "adb", None, f"not found ({error}): needed for devices only")
    return _check("adb", "adb", True, str(path))


def _devices(settings: Settings) -> Check:
    """Devices that a running ADB server knows; a server is never started for this."""
    from pytest_qnn.adb.server import find_server

    try:
        server = find_server(settings.adb_server)
        entries = server.devices(timeout=3.0)
    except (DeviceError, OptionError) as error:
        return _check("adb", "devices", None, f"none asked: {error}")
    return _check("adb", "devices", None, ", ".join(f"{e.serial} {e.state}" for e in entries) or "none attached")
