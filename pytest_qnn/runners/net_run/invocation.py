"""One run of qnn-net-run on a device: a folder for it, its inputs, its log, what it wrote; and nothing of that afterwards."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_qnn.devices.facts import clean, read_free_bytes
from pytest_qnn.devices.transport import Transport
from pytest_qnn.errors import (
    DeviceError,
    DeviceFileError,
    DeviceLostError,
    DeviceTimeoutError,
    ExecutionError,
    TargetTimeoutError,
)
from pytest_qnn.runners.net_run.log import Surroundings, failure, lines_of, succeeded, tail

SHELL_SECONDS = 30.0
SLOWEST = 2 << 20  # bytes per second that a line and a digest take at the worst
LOG_BYTES = 1 << 16
LISTING_BYTES = 32 << 20
TICKS = 100  # per second, in /proc/PID/stat: what Linux has on all its 64-bit ARM devices
OUTPUT = "output"
_OWN_FILE = re.compile(rf"{OUTPUT}/(execution_metadata\.yaml|qnn-profiling-data[\w.-]*)")

# Words: folder, program, LD_LIBRARY_PATH, ADSP_LIBRARY_PATH, then the program's own. The program takes the place of this shell, so that
# whoever ends the one ends the other; what looks after its memory and processor time ends when it is gone.
_RUN = r"""
cd "$1" || exit 126
program=$2 libraries=$3 skeletons=$4
shift 4
pid=$$
watch() {
  trap '' HUP
  turns=0
  while [ -r /proc/$pid/stat ] && read -r line < /proc/$pid/stat; do
    peak=
    while read -r key value rest; do case $key in VmHWM:) peak=$value;; esac; done < /proc/$pid/status
    read -r up rest < /proc/uptime
    [ "$peak" ] && printf '%s %s %s\n' "$peak" "$up" "${line##*) }" > usage
    case ${line##*) } in Z*|X*) break;; esac
    turns=$((turns + 1))
    if [ $turns -lt 25 ]; then sleep 0.02 || sleep 1; else sleep 0.2 || sleep 1; fi
  done
}
watch < /dev/null > /dev/null 2>&1 &
export LD_LIBRARY_PATH="$libraries" ADSP_LIBRARY_PATH="$skeletons"
exec "$program" "$@" > log 2>&1 < /dev/null
"""
# Words: folder, mark, bytes of the log. What it says: the log's end, the usage, files, what else is there.
_COLLECT = r"""
cd "$1" || exit 3
tail -c "$3" log
printf '\n@@%s' "$2"; cat usage 2>/dev/null
printf '\n@@%s' "$2"; find output -type f -print0 2>/dev/null
printf '\n@@%s' "$2"; find output ! -type f ! -type d -print0 2>/dev/null
printf '\n@@%s' "$2"
exit 0
"""


@dataclass(frozen=True)
class Usage:
    """What the process used, as far as the device told: peak of its memory (MiB), processor time over elapsed time."""

    peak_memory_mib: float = 0.0
    cpu_share: float | None = None


@dataclass(frozen=True)
class Finished:
    """A run that came to its end and reported success.

    Attributes:
        files: what it wrote, below the run's folder.
        log: its lines.
    """

    files: frozenset[str]
    log: tuple[str, ...]
    usage: Usage


class Invocation:
    """A run; see :func:`invocation`.

    Attributes:
        path: its folder on the device.
    """

    def __init__(self, transport: Transport, path: str, near: Surroundings) -> None:
        self.transport, self.path, self.near = transport, path, near

    def send(self, files: Mapping[str, bytes]) -> None:
        """Put files into the folder, by name.

        Raises:
            DeviceError: as for :meth:`Transport.push`.
        """
        size = sum(map(len, files.values()))
        self.transport.push(
            {f"{self.path}/{name}": content for name, content in files.items()}, timeout=SHELL_SECONDS + size / SLOWEST
        )

    def run(self, program: str, arguments: Sequence[str], timeout: float) -> Finished:
        """Run qnn-net-run until it ends, and see that it succeeded.

        Raises:
            TargetTimeoutError: it didn't end in time and was killed.
            DeviceError: the device is gone, mute, or its files are.
            QnnError: it failed; see :func:`~pytest_qnn.runners.net_run.log.failure`.
        """
        words = ["sh", "-c", _RUN, "run", self.path, program, self.near.library_path, self.near.dsp_path, *arguments]
        try:
            done = self.transport.shell(words, timeout=timeout)
        except DeviceTimeoutError as error:
            lines = self._lines_after(error)
            raise TargetTimeoutError(
                f"{self.near.subject}: qnn-net-run did not end within {timeout:g} s with {self.near.what}, and was killed; the "
                f"device answers. Give it more time (run_timeout, load_timeout), or see why. The end of its "
                f"log:{tail(lines) or ' (empty)'}"
            ) from error
        finished = self._collect(SHELL_SECONDS)
        lines = [*finished.log, *lines_of(done.stdout + b"\n" + done.stderr)]
        if done.code != 0 or not succeeded(lines):
            raise failure(done.code, lines, self.near)
        return finished

    def _lines_after(self, error: DeviceTimeoutError) -> list[str]:
        """The log after a timeout; if the device doesn't answer either, the fault is there."""
        try:
            return list(self._collect(5.0).log)
        except DeviceFileError:
            return []
        except DeviceError:
            raise error from None

    def _collect(self, timeout: float) -> Finished:
        mark = self.transport.fresh_name()
        words = ["sh", "-c", _COLLECT, "collect", self.path, mark, str(LOG_BYTES)]
        done = self.transport.shell(words, timeout=timeout, limit=LISTING_BYTES)
        parts = done.stdout.split(f"\n@@{mark}".encode())
        if done.code != 0 or len(parts) != 5:
            raise DeviceFileError(
                f"{self.near.subject}: the folder of the run, {self.path}, can't be read (exit code {done.code}: "
                f"{clean(done.error) or 'nothing said'}): somebody cleans the device. Try again"
            )
        log, usage, files, odd, _ = parts
        if odd:
            raise ExecutionError(
                f"{self.near.subject}: among the outputs there is {clean(_names(odd)[0])!r}, which is no plain file"
            )
        return Finished(frozenset(_names(files)), tuple(lines_of(log)), read_usage(usage.decode("ascii", "replace")))

    def fetch(self, sizes: Mapping[str, int | None], folder: Path) -> dict[str, Path]:
        """Fetch files of the run's folder.

        Args:
            sizes: bytes by name; None where they aren't known before.
            folder: local; files get names of ours there.

        Raises:
            DeviceError, OSError: as for :meth:`Transport.pull`.
        """
        targets = {name: folder / f"{number}.raw" for number, name in enumerate(sizes)}
        known = {f"{self.path}/{name}": size for name, size in sizes.items() if size is not None}
        total = sum(known.values())
        self.transport.pull(
            {f"{self.path}/{name}": target for name, target in targets.items()},
            timeout=SHELL_SECONDS + total / SLOWEST,
            sizes=known,
        )
        return targets


@contextmanager
def invocation(transport: Transport, workspace: str, near: Surroundings) -> Iterator[Invocation]:
    """A run in a fresh folder of the workspace on the device; the folder is removed at the end.

    A device that was lost isn't asked for that, which would take another deadline: it gets a new workspace, and the old one is
    removed when the session ends.
    """
    path = f"{workspace}/run-{transport.fresh_name()}"
    try:
        yield Invocation(transport, path, near)
    except (DeviceLostError, DeviceTimeoutError):
        raise
    except BaseException:
        _remove(transport, path)
        raise
    _remove(transport, path)


def _remove(transport: Transport, path: str) -> None:
    with suppress(DeviceError):
        transport.shell(["rm", "-rf", path], timeout=SHELL_SECONDS)


def check_outputs(files: frozenset[str], wanted: Sequence[str], allowed: Sequence[str], subject: str) -> None:
    """Make sure that a run wrote exactly what it should have.

    Args:
        wanted: names that must be there.
        allowed: further ones that may.

    Raises:
        ExecutionError: some are missing, or there are others, which may be of another run or model.
    """
    missing = [name for name in wanted if name not in files]
    if missing:
        raise ExecutionError(
            f"{subject}: qnn-net-run reported success, but did not write {len(missing)} of {len(wanted)} output files: "
            f"{', '.join(map(repr, missing[:3]))}. There is {_some(files) or 'nothing'}"
        )
    known = {*wanted, *allowed}
    sidecars = {name.removesuffix(".raw") + ".json" for name in known}
    extra = [n for n in files if n not in known and n not in sidecars and not _OWN_FILE.fullmatch(n)]
    if extra:
        raise ExecutionError(
            f"{subject}: qnn-net-run wrote files that nobody asked for ({_some(extra)}), so it is not certain that the others are "
            "of this model and these inputs"
        )


def read_usage(text: str) -> Usage:
    """Peak memory (kB), seconds since the device's start, and /proc/PID/stat from its third field on (proc(5))."""
    fields = text.split()
    if not fields or not re.fullmatch(r"\d{1,12}", fields[0]):
        return Usage()
    peak = int(fields[0]) / 1024
    try:
        up, ticks, start = float(fields[1]), int(fields[2 + 11]) + int(fields[2 + 12]), int(fields[2 + 19])
    except (IndexError, ValueError):
        return Usage(peak)
    elapsed = up - start / TICKS
    share = ticks / TICKS / elapsed if elapsed > 0 else math.nan
    return Usage(peak, round(share, 3) if math.isfinite(share) else None)


def free_bytes(transport: Transport, path: str) -> int | None:
    """Free space where ``path`` on the device lies; None if it doesn't tell."""
    return read_free_bytes(transport.shell(["df", "-Pk", path]).text)


def _names(listing: bytes) -> list[str]:
    return [name.decode("utf-8", "backslashreplace") for name in listing.split(b"\0") if name]


def _some(names: Sequence[str] | frozenset[str]) -> str:
    shown = sorted(names)[:4]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(repr(clean(name, 80)) for name in shown) + more
