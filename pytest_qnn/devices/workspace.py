"""A process's own folder on a device, ``FOLDER/work/NAME``: links to files of the store, and what programs there write.

It is removed at the end. If its owner dies first, the next one who comes sweeps it: an owner of the same host is looked up
among the processes; of another host only the heartbeat is known, the time of the owner's note by the device's own clock.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_qnn.devices.facts import clean, plain_path, split_sections
from pytest_qnn.devices.lease import process_start, same_process
from pytest_qnn.devices.transport import Completed, OfThisHost, Transport, decided, part
from pytest_qnn.errors import DeviceError, DeviceFileError, DeviceSpaceError

CLOSE_SECONDS = 10.0
SWEEP_SECONDS = 30.0
BEAT_SECONDS = 600.0
LINKS_AT_ONCE = 40  # a command has at most 60,000 bytes, a path 1000
FOREIGN_SECONDS = 6 * 3600.0  # without a heartbeat an owner on another host counts as dead
DRAFT_MINUTES = 60  # unfinished files that nobody has written to for so long are nobody's

# Workspaces that this process closed. If the device didn't take that they are still there, and their owner, this process, lives.
_done_with: set[str] = set()

_NAME = re.compile(r"[0-9a-f]{16}")
_PART = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9._+-]{0,99}")
_OWNER = "owner.json"

_MAKE = r"""
umask 022
mkdir -p "$1" && mkdir "$1/$2" || exit 1
cat > "$1/$2/owner.json" && exit 0
rm -rf "$1/$2"; exit 1
"""
_LINK = r"""
cd "$1" || exit 3
shift
while [ $# -gt 1 ]; do
  name=$1 target=$2
  shift 2
  case $name in */*) mkdir -p "${name%/*}" || exit 1;; esac
  ln -sfn "$target" "$name" || exit 1
  [ -e "$name" ] || { printf '%s\n' "$target"; exit 4; }
done
touch -c owner.json
"""
_SWEEP = r"""
mark=$1 work=$2 store=$3 minutes=$4
exec 2>/dev/null
printf '\n@@%s clock\n' "$mark"; date +%s
for dir in "$work"/*; do
  name=${dir##*/}
  case $name in *[!0-9a-f]*) continue;; esac
  if [ ${#name} = 16 ] && [ -d "$dir" ] && [ ! -L "$dir" ]; then
    printf '\n@@%s work %s %s\n' "$mark" "$name" "$(stat -c %Y "$dir/owner.json" || stat -c %Y "$dir")"
    head -c 2000 "$dir/owner.json"
  fi
done
printf '\n@@%s drafts\n' "$mark"
for draft in "$store"/.*.part; do
  if [ -d "$draft" ] && [ ! -L "$draft" ] && [ -z "$(find "$draft/" -mmin "-$minutes" | head -n 1)" ]; then
    rm -rf "$draft" && echo gone
  fi
done
printf '\n@@%s end\n' "$mark"
"""
_REMOVE = r"""
cd "$1" || exit 0
while read -r name; do rm -rf "./$name" && echo "$name"; done
"""


class Workspace:
    """A folder on a device that is this process's own. It isn't there before :meth:`create`; see also :meth:`make`.

    Args:
        folder: of the device, where workspaces are (:attr:`DeviceFacts.folder`).

    Attributes:
        path: on the device.

    Raises:
        DeviceFileError: ``folder`` can't be ours.
    """

    def __init__(self, transport: Transport, folder: str) -> None:
        name = transport.fresh_name()
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a workspace")
        self.transport, self.path = transport, f"{usable_folder(transport, folder)}/work/{name}"
        self._beat = transport.clock()
        self.closed = False

    @classmethod
    def make(cls, transport: Transport, folder: str, what: str = "pytest") -> Workspace:
        """A new workspace in ``folder``, created.

        Raises:
            DeviceError: as :meth:`create`.
        """
        workspace = cls(transport, folder)
        workspace.create(what)
        return workspace

    def create(self, what: str = "pytest") -> None:
        """Make the folder, with a note of its owner, this process. If the answer is lost it may be there all the same: its
        owner closes it in any case, for a sweep spares what belongs to a living process.

        Raises:
            DeviceFileError: it can't be made.
            DeviceSpaceError: no space left on the device.
        """
        work, _, name = self.path.rpartition("/")
        done = self.transport.shell(
            ["sh", "-c", _MAKE, "make", work, name], stdin=OfThisHost(json.dumps(_owner(what)).encode())
        )
        if done.code != 0:
            raise refused(done, self.transport, f"the workspace {self.path} can't be made")

    def link(self, files: Mapping[str, str]) -> dict[str, str]:
        """Put links to files of the device into the workspace.

        Args:
            files: name in the workspace, which may have folders ("lib/libQnnHtp.so") -> path on the device.

        Returns:
            Paths of the links on the device, by name.

        Raises:
            ValueError: a name that could leave the workspace, or that a shell or list would not take as it is.
            DeviceFileError: a file isn't there, or the workspace is gone.
        """
        for name, target in files.items():
            if not _safe_name(name):
                raise ValueError(f"{name!r} is no name for a file in a workspace")
            if not plain_path(target):
                raise ValueError(f"{target!r} is no path of a file on a device")
        words = [word for pair in files.items() for word in pair]
        for start in range(0, len(words), 2 * LINKS_AT_ONCE):
            part = words[start : start + 2 * LINKS_AT_ONCE]
            done = self.transport.shell(["sh", "-c", _LINK, "link", self.path, *part])
            if done.code == 4:
                raise DeviceFileError(
                    f"{self.transport.address}: {clean(done.text)} is not there any more: somebody removed it. Try again"
                )
            if done.code == 3:
                raise DeviceFileError(
                    f"{self.transport.address}: the workspace {self.path} is gone: somebody removed it. Try again"
                )
            if done.code != 0:
                raise refused(done, self.transport, f"files can't be linked into {self.path}")
            self._beat = self.transport.clock()
        return {name: f"{self.path}/{name}" for name in files}

    def beat(self) -> None:
        """Say that the owner lives; does something only once in ten minutes. To be called when the device is used."""
        with part(self.transport, "heartbeat", shared=False):
            if self.transport.clock() - self._beat >= BEAT_SECONDS:
                self.transport.shell(["touch", "-c", f"{self.path}/{_OWNER}"])
                self._beat = self.transport.clock()

    def close(self) -> None:
        """Remove it. A device that is gone by now, or doesn't answer, is no error: it is swept later."""
        close_all([self])


def close_all(workspaces: Sequence[Workspace], *, answers: bool = True) -> None:
    """Remove workspaces of one device, with one command: a device that doesn't answer is waited for once, and not at all if
    that is known (``answers``)."""
    left = [workspace for workspace in workspaces if not workspace.closed]
    for workspace in left:
        workspace.closed = True
        _done_with.add(workspace.path.rpartition("/")[2])
    if left and answers:
        with suppress(DeviceError):
            left[0].transport.shell(["rm", "-rf", *(workspace.path for workspace in left)], timeout=CLOSE_SECONDS)


@dataclass(frozen=True)
class Swept:
    """What a sweep removed: names of workspaces, and how many unfinished files; and which workspaces live."""

    workspaces: tuple[str, ...] = ()
    drafts: int = 0
    living: tuple[str, ...] = ()


def sweep(transport: Transport, folder: str, *, all_owners: bool = False) -> Swept:
    """Remove workspaces whose owner is dead, and unfinished files of pushes that were broken off; never a living one's.

    Args:
        all_owners: remove workspaces of living owners too.

    Raises:
        DeviceError: of the transport.
    """
    base, mark = usable_folder(transport, folder), transport.fresh_name()
    words = ["sh", "-c", _SWEEP, "sweep", mark, f"{base}/work", f"{base}/store", str(DRAFT_MINUTES)]
    told = split_sections(transport.shell(words, timeout=SWEEP_SECONDS).stdout, mark)
    drafts = len(told.get("drafts", "").split())
    now = told.get("clock", "").strip()
    notes: dict[str, tuple[str, float]] = {}
    for section, text in told.items():
        kind, _, rest = section.partition(" ")
        name, _, changed = rest.partition(" ")
        if kind != "work" or not _NAME.fullmatch(name):
            continue
        known = re.fullmatch(r"\d{1,12}", now) and re.fullmatch(r"\d{1,12}", changed)
        notes[name] = text, float(now) - float(changed) if known else 0.0
    dead = list(notes)
    if notes and not all_owners:
        dead = decided(
            transport,
            "workspaces whose owners are dead",
            lambda: [name for name, note in notes.items() if name in _done_with or _is_dead(*note)],
        )
    living = [name for name in notes if name not in dead]
    removed: tuple[str, ...] = ()
    if dead:
        lines = "".join(f"{name}\n" for name in dead)
        done = transport.shell(
            ["sh", "-c", _REMOVE, "remove", f"{base}/work"], stdin=lines.encode(), timeout=SWEEP_SECONDS
        )
        removed = tuple(name for name in done.text.split() if name in dead)
    return Swept(removed, drafts, tuple(living))


def _is_dead(text: str, age: float) -> bool:
    """Whether the owner with this note, last touched ``age`` seconds ago by the device's clock, is dead."""
    try:
        note = json.loads(text)
        host, pid, started = str(note["host"]), int(note["pid"]), float(note["started"])
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return age > FOREIGN_SECONDS
    if host == _host_identity():
        return not same_process(pid, started)
    return age > FOREIGN_SECONDS


def _owner(what: str) -> dict[str, object]:
    return {
        "host": _host_identity(),
        "name": socket.gethostname()[:100],
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "what": what[:100],
    }


def _host_identity() -> str:
    """What hosts have in common only if a process id means the same process on both: machine, start of it, and namespace of
    processes (containers have their own)."""
    told = [socket.gethostname(), str(os.getuid())]
    for file in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        with suppress(OSError):
            told.append(Path(file).read_text("utf-8", "replace").strip())
    with suppress(OSError):
        told.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]


def usable_folder(transport: Transport, folder: str) -> str:
    """``folder``, if it can be ours.

    Raises:
        DeviceFileError: it is empty, the device's root, or no plain path.
    """
    if not plain_path(folder) or not folder.strip("/"):
        raise DeviceFileError(
            f"{transport.address}: it has no folder where files can be kept and run: name one with device_folder. See: "
            f"pytest-qnn device {clean(transport.serial)} diagnose"
        )
    return folder.rstrip("/")


def refused(done: Completed, transport: Transport, what: str) -> DeviceError:
    """The error for a command that made something and failed."""
    reason = clean(done.error or done.text) or f"exit code {done.code}"
    text = f"{transport.address}: {what}: {reason}"
    if "no space left" in reason.lower():
        return DeviceSpaceError(
            f"{text}. Free some space there: pytest-qnn device {clean(transport.serial)} clean --all"
        )
    return DeviceFileError(f"{text}. See: pytest-qnn device {clean(transport.serial)} diagnose")


def _safe_name(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 4 and name != _OWNER and all(_PART.fullmatch(part) for part in parts)
