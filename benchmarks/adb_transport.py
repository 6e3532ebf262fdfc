"""Files and commands over ADB on loopback devices, against the ``adb`` program with the same server and device.

``adb push`` and ``adb pull`` compare nothing; ours include SHA-256 on both sides. Each round does both, so that both see the
same host; medians. With adbutils' own adb (36) and, where it is installed, Debian's (29).

What the device needs for its digests depends on its ``sha256sum``. A phone's (toybox, with BoringSSL) uses the processor's SHA
instructions; coreutils', which stands in for it on the loopback phone, doesn't, nor does a board's, so there ``openssl`` is
used if the board has it. Hence two devices: a board with ``openssl``, and a phone without.
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


def measure(adb: Path, server: AdbServer, device: LoopbackDevice, folder: Path, tmp: str) -> None:
    """Print the rows for one adb."""
    line = AdbTransport(server, device.connect(server))

    def run(*words: str) -> None:
        subprocess.run([str(adb), "-P", str(server.port), "-s", line.serial, *words], check=True, capture_output=True)

    large, back = folder / "large", folder / "back"
    large.write_bytes(os.urandom(1 << 20) * MEBIBYTES)
    compare(
        f"push of {MEBIBYTES} MiB",
        lambda: run("push", str(large), f"{tmp}/theirs"),
        lambda: line.push({f"{tmp}/ours": large}, timeout=120),
        MEBIBYTES,
    )
    compare(
        f"pull of {MEBIBYTES} MiB",
        lambda: run("pull", f"{tmp}/ours", str(back)),
        lambda: line.pull({f"{tmp}/ours": back}, timeout=120),
        MEBIBYTES,
    )
    many = {f"{tmp}/many/{number}": folder / f"{number}.raw" for number in range(100)}
    for path in many.values():
        path.write_bytes(os.urandom(1 << 20))
    compare(
        "push of 100 files of 1 MiB",
        lambda: run("push", *map(str, many.values()), f"{tmp}/"),
        lambda: line.push(dict(many), timeout=120),
        100,
    )
    compare(
        "pull of 100 files of 1 MiB",
        lambda: run("pull", f"{tmp}/many", str(folder)),
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
        print(f"adb {version.split('Version ')[1].split()[0]}")
        for flavor in ("linux", "android"):
            with (
                tempfile.TemporaryDirectory() as folder,
                start_server(adb=adb) as server,
                LoopbackDevice(Path(folder, "device"), flavor=flavor, python=False) as device,
            ):
                if flavor == "linux":
                    device.path("/bin/openssl").symlink_to("/usr/bin/openssl")
                print(" board, with openssl" if flavor == "linux" else " phone, with coreutils' sha256sum")
                measure(adb, server, device, Path(folder), "/tmp" if flavor == "linux" else "/data/local/tmp")
