"""Files kept on a device by content, in ``FOLDER/store``: what is there is never sent again, by any session or project.

A file's name is its SHA-256, with ".x" behind it where it is executable. A file appears under its name only whole, with its
digest checked on the device (the transport's promise), so processes, also of other hosts, need no lock among themselves.
Before one that was there is used, its size is compared, and its digest once by each store object. What was used least
recently goes first when the size limit or the device's space demands it; what a workspace links to, and what was used within
the last two minutes, stays.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pytest_qnn.devices.facts import read_free_bytes
from pytest_qnn.devices.transport import Transport
from pytest_qnn.devices.workspace import refused, usable_folder
from pytest_qnn.errors import DeviceFileError, DeviceSpaceError

MIB = 1 << 20
GRACE_SECONDS = 120  # between a file's use being said and its link standing in a workspace
MARGIN_BYTES = MIB  # of space left free
SLOWEST = 2 * MIB  # bytes per second that a line and a digest take at the worst
LOOK_SECONDS = 30.0

_STORED = re.compile(r"([0-9a-f]{64})(\.x)?")
_DRAFT = re.compile(r"\.[0-9a-f]{8,64}\.part")  # a folder in which the transport gathers what isn't whole yet

# Words: store. Lines of standard input: name, size, whether to compute its digest. Answers: name and digest, or "-".
_LOOK = r"""
umask 022
mkdir -p "$1" && cd "$1" || exit 1
while read -r name size check; do
  if [ -f "$name" ] && [ ! -L "$name" ]; then
    touch -c "$name"
    if [ "$(stat -c %s "$name")" = "$size" ]; then
      sum=-
      if [ "$check" = 1 ]; then sum=$(sha256sum "$name"); sum=${sum%% *}; fi
      case $name in *.x) [ -x "$name" ] || chmod 755 "$name";; esac
      printf '%s %s\n' "$name" "$sum"
    else
      printf '%s damaged\n' "$name"
    fi
  fi
done
echo @@
df -Pk .
"""
# Words: store, workspaces. Answers: time, then time of last use, size and name of each file, and of each draft the latest
# time of anything in it; then what links point to.
_LIST = r"""
date +%s
if cd "$1"; then
  find . -maxdepth 1 -type f -exec stat -c '%Y %s %n' {} +
  for draft in .*.part; do
    if [ -d "$draft" ] && [ ! -L "$draft" ]; then
      kib=$(du -sk "$draft")
      echo "$(find "$draft" -exec stat -c %Y {} + | sort -n | tail -n 1) $((${kib%%[!0-9]*} * 1024)) ./$draft"
    fi
  done
fi
echo @@
df -Pk .
echo @@
if [ -d "$2" ]; then find "$2/" -type l -exec readlink {} \; ; fi
exit 0
"""
# Words: store, seconds for which a file must not have been used. Lines: names. Answers: names that went.
_EVICT = r"""
cd "$1" || exit 1
now=$(date +%s)
while read -r name; do
  used=$(stat -c %Y "$name") || continue
  if [ $((now - used)) -ge "$2" ]; then rm -rf "./$name" && echo "$name"; fi
done
"""


@dataclass(frozen=True)
class StoredFile:
    """A file in a store, finished or not.

    Attributes:
        name: its digest, and ".x" if it is executable; more where it isn't finished.
        size: bytes.
        idle: seconds since it was used or written to, by the device's clock.
        linked: whether a workspace links to it.
    """

    name: str
    size: int
    idle: float
    linked: bool


class DeviceStore:
    """The store of one device.

    Args:
        transport: the line to it.
        folder: :attr:`DeviceFacts.folder`.
        limit_mib: size of all files together. What is needed at once, and what workspaces link to, may go beyond what others
            left; more than the limit alone is refused.

    Attributes:
        sent_files, sent_bytes: sent since this object was made.
        reused_files: asked for and there.
        damaged_files: there, but not with the content of their name; sent again.
    """

    def __init__(self, transport: Transport, folder: str, limit_mib: float) -> None:
        self.transport = transport
        self.path = f"{usable_folder(transport, folder)}/store"
        self._work = f"{usable_folder(transport, folder)}/work"
        self.limit = int(limit_mib * MIB)
        self.sent_files = self.sent_bytes = self.reused_files = self.damaged_files = 0
        self._checked: set[str] = set()

    def put(self, files: Mapping[str, Path], executable: Collection[str] = ()) -> dict[str, str]:
        """See that files are on the device; sends those that aren't.

        Args:
            files: local files, by any label.
            executable: labels of those that must be executable; others are if they are here.

        Returns:
            Paths on the device, by label. They stay for at least two minutes, and as long as a workspace links to them.

        Raises:
            DeviceSpaceError: they don't fit, also after what can go is gone; with numbers.
            DeviceFileError: the device refuses a file, or a local one changed while it was sent.
            OSError: a local file can't be read.
        """
        wanted = {label: _Local.of(path, label in executable) for label, path in files.items()}
        by_name = {local.name: local for local in wanted.values()}
        if by_name:
            self._look(by_name, trusted=frozenset(self._checked))
            missing = [local for name, local in by_name.items() if name not in self._checked]
            self.reused_files += len(by_name) - len(missing)
            if missing:
                self._send(missing, by_name.keys())
        return {label: f"{self.path}/{local.name}" for label, local in wanted.items()}

    def files(self) -> list[StoredFile]:
        """What is there, finished or not."""
        return self._list()[0]

    def clear(self) -> list[StoredFile]:
        """Remove everything that no workspace links to; what was removed."""
        files = {file.name: file for file in self.files() if not file.linked}
        return [files[name] for name in self._remove(files, 0)]

    # --- sending ------------------------------------------------------------------------------------------------------

    def _look(self, by_name: Mapping[str, _Local], *, trusted: Collection[str]) -> int | None:
        """Bring ``_checked`` up to date for these, computing digests of those that aren't ``trusted``, and note that they are
        in use; returns the free bytes."""
        lines = "".join(f"{name} {local.size} {int(name not in trusted)}\n" for name, local in by_name.items())
        seconds = LOOK_SECONDS + sum(local.size for local in by_name.values()) / SLOWEST
        done = self.transport.shell(["sh", "-c", _LOOK, "look", self.path], stdin=lines.encode(), timeout=seconds)
        if done.code != 0:
            raise refused(done, self.transport, f"{self.path} can't be made")
        answers, _, df = done.text.partition("@@")
        told = dict(line.split(" ", 1) for line in answers.splitlines() if " " in line)
        damaged = []
        for name in by_name:
            digest = told.get(name)
            if digest == name[:64] or (digest == "-" and name in trusted):
                self._checked.add(name)
                continue
            self._checked.discard(name)
            if digest is not None:
                damaged.append(name)
        if damaged:  # not left under a name that others trust
            self.damaged_files += len(damaged)
            self._remove(damaged, 0)
        return read_free_bytes(df)

    def _send(self, missing: list[_Local], keep: Collection[str]) -> None:
        needed = sum(local.size for local in missing)
        if needed > self.limit:
            raise DeviceSpaceError(
                f"{self.transport.address}: {_mib(needed)} are needed there at once, and the limit of the files kept on a "
                f"device is {_mib(self.limit)}: raise device_limit_mb"
            )
        free = self._make_room(needed, keep)
        if free is not None and free < needed:
            raise self._no_room(needed, free)
        try:
            self._push(missing)
        except DeviceSpaceError as error:
            self._remove([file.name for file in self._evictable(keep, self.files())], GRACE_SECONDS)
            left = [local for local in missing if local.name not in self._checked]
            try:
                self._push(left)
            except DeviceSpaceError:
                raise self._no_room(sum(local.size for local in left), self._list()[1]) from error

    def _push(self, missing: Iterable[_Local]) -> None:
        for mode in (0o644, 0o755):
            group = {local.name: local for local in missing if local.mode == mode}
            if not group:
                continue
            size = sum(local.size for local in group.values())
            files: dict[str, Path | bytes] = {f"{self.path}/{name}": local.path for name, local in group.items()}
            sent = self.transport.push(files, mode=mode, timeout=LOOK_SECONDS + size / SLOWEST)
            for name, local in group.items():
                if sent.get(f"{self.path}/{name}") != name[:64]:
                    self._remove([name], 0)
                    raise DeviceFileError(
                        f"{local.path} changed while it was sent to {self.transport.address}. Try again"
                    )
            self.sent_files += len(group)
            self.sent_bytes += size
            self._look(group, trusted=group)  # says by the device's own clock that they are in use
            if gone := group.keys() - self._checked:
                raise DeviceFileError(
                    f"{self.transport.address}: {len(gone)} of {len(group)} files were removed from {self.path} as soon as "
                    "they were there: somebody cleans the device. Try again"
                )

    # --- making room --------------------------------------------------------------------------------------------------

    def _make_room(self, needed: int, keep: Collection[str]) -> int | None:
        """Let go what was used least recently until ``needed`` bytes fit both limit and device; returns the free bytes."""
        files, free = self._list()
        over = sum(file.size for file in files) + needed - self.limit
        short = needed + MARGIN_BYTES - free if free is not None else 0
        goal, going = max(over, short), []
        for file in self._evictable(keep, files):
            if goal <= 0:
                break
            going.append(file)
            goal -= file.size
        gone = set(self._remove([file.name for file in going], GRACE_SECONDS))
        freed = sum(file.size for file in going if file.name in gone)
        return None if free is None else free + freed

    def _evictable(self, keep: Collection[str], files: list[StoredFile]) -> list[StoredFile]:
        """What may go, the first to go first: what was never finished, then by last use."""
        able = [f for f in files if not f.linked and f.name not in keep and f.idle >= GRACE_SECONDS]
        return sorted(able, key=lambda f: (_STORED.fullmatch(f.name) is not None, -f.idle))

    def _remove(self, names: Iterable[str], idle_seconds: int) -> list[str]:
        names = list(names)
        if not names:
            return []
        lines = "".join(f"{name}\n" for name in names)
        words = ["sh", "-c", _EVICT, "evict", self.path, str(idle_seconds)]
        done = self.transport.shell(words, stdin=lines.encode(), timeout=LOOK_SECONDS)
        gone = [name for name in done.text.split() if name in set(names)]
        self._checked.difference_update(gone)
        return gone

    def _list(self) -> tuple[list[StoredFile], int | None]:
        words = ["sh", "-c", _LIST, "list", self.path, self._work]
        done = self.transport.shell(words, timeout=LOOK_SECONDS)
        listing, _, rest = done.text.partition("@@")
        df, _, links = rest.partition("@@")
        linked = {link.removeprefix(f"{self.path}/") for link in links.splitlines() if link.startswith(f"{self.path}/")}
        clock, *lines = listing.splitlines() or [""]
        files = []
        for line in lines:
            found = re.fullmatch(r"(\d{1,12}) (\d{1,15}) \./(\S+)", line.strip())
            if found and clock.isdecimal() and (_STORED.fullmatch(found[3]) or _DRAFT.fullmatch(found[3])):
                files.append(
                    StoredFile(found[3], int(found[2]), float(clock) - float(found[1]), linked=found[3] in linked)
                )
        return files, read_free_bytes(df)

    def _no_room(self, needed: int, free: int | None) -> DeviceSpaceError:
        files = self.files()
        kept = sum(file.size for file in files)
        linked = sum(file.size for file in files if file.linked)
        return DeviceSpaceError(
            f"{self.transport.address}: no space left: {_mib(needed)} more are needed in {self.path}, "
            f"{_mib(free) if free is not None else 'an unknown number of bytes'} are free; our files there take {_mib(kept)}, of "
            f"which sessions use {_mib(linked)}. The rest is others': free some space on the device, or name another "
            "device_folder"
        )


@dataclass(frozen=True)
class _Local:
    """A local file as the store would keep it."""

    path: Path
    name: str
    size: int
    mode: int

    @classmethod
    def of(cls, path: Path, executable: bool) -> _Local:
        stat = path.stat()
        executable = executable or bool(stat.st_mode & 0o111)
        digest = _digest(path, (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return cls(path, digest + ".x" * executable, stat.st_size, 0o755 if executable else 0o644)


_digests: dict[tuple[str, tuple[int, ...]], str] = {}


def _digest(path: Path, stamp: tuple[int, ...]) -> str:
    """SHA-256 of a local file, computed once as long as its stamp stays the same."""
    key = (os.fspath(path), stamp)
    if key not in _digests:
        with path.open("rb") as f:
            _digests[key] = hashlib.file_digest(f, "sha256").hexdigest()
    return _digests[key]


def _mib(count: int) -> str:
    return f"{count / MIB:.1f} MiB"
