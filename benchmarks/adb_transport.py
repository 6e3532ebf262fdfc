"""Files and commands over ADB on a loopback phone, against the ``adb`` program with the same server and device.

``adb push`` and ``adb pull`` compare nothing; ours include SHA-256 on both sides. Each round does both, so that both see the
same host; medians. With adbutils' own adb (36) and, where it is installed, Debian's (29).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import adbutils

from pytest_qnn.adb.server import AdbServer, start_server
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.testing import LoopbackDevice

ROUNDS = 7
MEBIBYTES = 100
TMP = "/data/local/tmp"


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(name: str, theirs: Callable[[], object], ours: Callable[[], object], mebibytes: float) -> None:
    """Print a row: medians of ROUNDS rounds of both, after one to warm up."""
    rounds = [(seconds(theirs), seconds(ours)) for _ in range(ROUNDS + 1)][1:]
    adb, transport = (statistics.median(times) for times in zip(*rounds, strict=True))
    print(
        f"  {name}: adb {mebibytes / adb:.0f} MiB/s, ours {mebibytes / transport:.0f} MiB/s "
        f"({1e3 * adb:.0f} and {1e3 * transport:.0f} ms): {adb / transport:.2f} of its speed"
    )


def measure(adb: Path, server: AdbServer, device: LoopbackDevice, folder: Path) -> None:
    """Print the rows for one adb."""
    line = AdbTransport(server, device.connect(server))

    def run(*words: str) -> None:
        subprocess.run(
            [str(adb), "-P", str(server.port), "-s", line.serial, *words], check=True, stdout=subprocess.DEVNULL
        )

    large, back = folder / "large", folder / "back"
    large.write_bytes(os.urandom(1 << 20) * MEBIBYTES)
    compare(
        f"push of {MEBIBYTES} MiB",
        lambda: run("push", str(large), f"{TMP}/theirs"),
        lambda: line.push({f"{TMP}/ours": large}, timeout=120),
        MEBIBYTES,
    )
    compare(
        f"pull of {MEBIBYTES} MiB",
        lambda: run("pull", f"{TMP}/ours", str(back)),
        lambda: line.pull({f"{TMP}/ours": back}, timeout=120),
        MEBIBYTES,
    )
    many = {f"{TMP}/many/{number}": folder / f"{number}.raw" for number in range(100)}
    for path in many.values():
        path.write_bytes(os.urandom(1 << 20))
    compare(
        "push of 100 files of 1 MiB",
        lambda: run("push", *map(str, many.values()), f"{TMP}/"),
        lambda: line.push(dict(many), timeout=120),
        100,
    )
    compare(
        "pull of 100 files of 1 MiB",
        lambda: run("pull", f"{TMP}/many", str(folder)),
        lambda: line.pull(many, timeout=120),
        100,
    )
    rounds = [(seconds(lambda: run("shell", "true")), seconds(lambda: line.shell(["true"]))) for _ in range(50)]
    adb_shell, ours = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
    print(f"  shell round trip: adb {adb_shell:.1f} ms, ours {ours:.1f} ms")
    stream = line.start(["cat"], timeout=10)

    def echo() -> None:
        stream.write(b"x" * 64, timeout=10)
        stream.read(64, timeout=10)

    print(f"  round trip of a running program: {1e3 * statistics.median(seconds(echo) for _ in range(200)):.2f} ms")
    line.close()
    device.disconnect(server)


def main() -> None:
    """Print the rows."""
    for adb in (Path(adbutils.__file__).parent / "binaries" / "adb", Path("/usr/bin/adb")):
        if not adb.exists():
            continue
        version = subprocess.run([str(adb), "--version"], capture_output=True, text=True, check=True).stdout
        print(f" {adb.parent.name}/adb {version.split('Version ')[1].split()[0]}")
        with (
            tempfile.TemporaryDirectory() as folder,
            start_server(adb=adb) as server,
            LoopbackDevice(Path(folder, "device")) as device,
        ):
            measure(adb, server, device, Path(folder))
