"""``python -m pytest_qnn.testing.loopback``: loopback devices behind a private ADB server, for as long as it or a command runs.

The server and the devices end with this process, whatever ends it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pytest_qnn.adb.server import start_server
from pytest_qnn.errors import QnnError
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.testing.device_runtime import make_device_runtime


def main(arguments: Sequence[str] | None = None) -> int:
    """Start devices, and run a command with them or wait for Ctrl-C; returns the command's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pytest_qnn.testing.loopback",
        description="Loopback devices: stand-ins for phones and boards, whose HTP is Qualcomm's simulator on this host.",
    )
    parser.add_argument(
        "--flavor", choices=("android", "linux"), default="linux", help="what they are (default: linux)"
    )
    parser.add_argument("--soc", default="SM8650", help="their SoC (default: SM8650)")
    parser.add_argument("--count", type=int, default=1, help="how many")
    parser.add_argument(
        "command", nargs="*", help="run this, with PYTEST_ADDOPTS and ADB_SERVER_SOCKET set for the devices"
    )
    chosen = parser.parse_args(arguments)
    if not 1 <= chosen.count <= 64:
        parser.error(f"--count: expected a number from 1 to 64, got {chosen.count}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with ExitStack() as life:
            return _serve(chosen, life)
    except KeyboardInterrupt:
        return 130
    except QnnError as error:
        sys.stderr.write(f"loopback: {error}\n")
        return 1


def _serve(chosen: argparse.Namespace, life: ExitStack) -> int:
    folder = Path(
        life.enter_context(tempfile.TemporaryDirectory(prefix="pytest-qnn-loopback-", ignore_cleanup_errors=True))
    )
    life.enter_context(_removed_afterwards(folder))
    vendors = _vendors_files(make_device_runtime(folder / "runtime", chosen.soc)) if chosen.flavor == "android" else {}
    server = life.enter_context(start_server())
    addresses = []
    for number in range(chosen.count):
        device = LoopbackDevice(folder / f"device{number}", flavor=chosen.flavor, soc=chosen.soc, files=vendors)
        life.enter_context(device)
        device.connect(server)
        addresses.append(f"adb://{device.address}@{server.address}")
    options = f"--qnn-target=adb --qnn-adb-server={server.address}"
    if chosen.command:
        added = f"{os.environ.get('PYTEST_ADDOPTS', '')} {options}".strip()
        told = {
            "PYTEST_ADDOPTS": added,
            "ADB_SERVER_SOCKET": f"tcp:{server.address}",
        }  # that of adb, and of pytest-qnn devices
        return _run(chosen.command, os.environ | told)
    sys.stdout.write(
        f"{chosen.count} loopback devices ({chosen.flavor}, {chosen.soc}); Ctrl-C ends them. Use them with:\n"
    )
    sys.stdout.write(f"  python -m pytest {options}\n")
    sys.stdout.write(f"  adb -P {server.port} devices\n")
    sys.stdout.write("One of several is chosen by --qnn-device:\n")
    sys.stdout.writelines(f"  --qnn-device={address}\n" for address in addresses)
    sys.stdout.flush()
    while True:
        signal.pause()


def _vendors_files(sdk: Path) -> dict[str, Path]:
    """Where a phone has the stand-in of qnn-net-run and its libraries: so that it is complete, whoever looks at it."""
    places = {"bin/aarch64-android": "/vendor/bin", "lib/aarch64-android": "/vendor/lib64"}
    files = {f"{there}/{file.name}": file for here, there in places.items() for file in (sdk / here).iterdir()}
    return files | {f"/vendor/lib/rfsa/adsp/{file.name}": file for file in sdk.glob("lib/hexagon-*/unsigned/*")}


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command and wait for it, also after Ctrl-C: it tidies up, and needs the devices for that."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # came while the command was being started

    def pass_on(number: int, frame: object) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    # Before the command starts, for it may be faster than this process; functions, since a command inherits SIG_IGN.
    signal.signal(signal.SIGINT, lambda number, frame: None)  # the terminal sends it to the command too
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    try:
        child = subprocess.Popen(command, env=environment)
    except OSError as error:
        sys.stderr.write(f"loopback: {command[0]}: {error.strerror or error}\n")
        return 127
    for came in early:
        child.send_signal(came)
    code = child.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _removed_afterwards(folder: Path) -> Iterator[None]:
    """Have a folder removed also if this process is killed: by a shell whose standard input ends with it."""
    script = 'trap "" INT HUP TERM; cat >/dev/null; rm -rf -- "$1"'
    with subprocess.Popen(["/bin/sh", "-c", script, "sh", folder], stdin=subprocess.PIPE, start_new_session=True):
        yield


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
