"""A root of the device's own: Linux namespaces of mounts and processes, and a chroot, where the host allows them.

It works as root and, through a user namespace, as anybody; not in most containers, and not where the kernel forbids
unprivileged user namespaces. Nothing of it is seen outside, and all of it is gone with its last process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000  # <linux/sched.h>
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18  # <linux/mount.h>
_KEPT = {os.ST_NOSUID: 2, os.ST_NODEV: 4, os.ST_NOEXEC: 8, os.ST_NOATIME: 1024, os.ST_RELATIME: 1 << 21}
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_SYSTEM = ("lib", "lib32", "lib64", "libx32", "sbin", "bin")


class NotAllowed(Exception):
    """The host doesn't allow a namespace, or is laid out in a way that this can't deal with."""


def unshare() -> None:
    """Let the next process that this one forks be the first of a process namespace, and be allowed to :func:`enter` a root.

    This process itself stays where it is among the mounts: it removes the device's files at the end, and would else find
    the host's folders among them.

    Raises:
        NotAllowed: the host doesn't allow it. Nothing was changed.
    """
    user, group = os.geteuid(), os.getegid()
    if not (Path("/usr").is_dir() and (not Path("/bin").exists() or Path("/bin").is_symlink())):
        raise NotAllowed("/bin of this host is not a link into /usr")
    if user == 0 and _call("unshare", _CLONE_NEWPID) is None:
        return
    if refused := _call("unshare", _CLONE_NEWPID | _CLONE_NEWUSER):
        raise NotAllowed(f"unshare: {refused}")
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError as error:
        raise NotAllowed(f"user namespace: {error}") from error


def enter(root: Path, *, shown: Sequence[str], frozen: Sequence[str], boot_id: str, space: int | None) -> None:
    """Make ``root`` the root folder of this process, the first in its namespaces.

    Args:
        shown: folders of the host that are seen in it, under their own names, read-only.
        frozen: folders in it that can't be written from inside.
        boot_id: file in it that is seen as the kernel's boot id.
        space: size of /data, /tmp and /var together, in bytes; None for what the host has.

    Raises:
        NotAllowed: the host forbids a step of it. This process is of no use any more.
    """
    if refused := _call("unshare", _CLONE_NEWNS):
        raise NotAllowed(f"unshare: {refused}")
    _mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    _bind(str(root), root)
    if space is not None:
        _limit(root, space)  # before the host's folders come, which may lie in one of these
    for name in ("usr", *shown):
        _show(Path("/", name), root)
    for name in _SYSTEM:
        place = root / name
        if Path("/", name).is_symlink() and not os.path.lexists(place):
            place.symlink_to(os.readlink(f"/{name}"))
    for name in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        if Path(name).exists() and not Path(name).is_symlink():
            _show(Path(name), root)
    for name in _DEVICES:
        if Path("/dev", name).exists():
            _bind(f"/dev/{name}", _place(root / "dev" / name, like=Path("/dev", name)), recursive=True)
    _terminals(root / "dev")
    (root / "proc").mkdir(exist_ok=True)
    _mount("proc", str(root / "proc"), kind="proc")
    _bind(f"{root}{boot_id}", root / "proc/sys/kernel/random/boot_id")
    for name in frozen:
        if (root / name.lstrip("/")).is_dir():
            _bind(f"{root}{name}", root / name.lstrip("/"), recursive=True)
            _read_only(root / name.lstrip("/"))
    try:
        os.chroot(root)
        os.chdir("/")
    except OSError as error:
        raise NotAllowed(f"chroot: {error}") from error


def _terminals(devices: Path) -> None:
    (devices / "pts").mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(NotAllowed):  # then there are none
        _mount("devpts", str(devices / "pts"), kind="devpts", data="newinstance,ptmxmode=0666,mode=0620")
        (devices / "ptmx").symlink_to("pts/ptmx")


def remove(root: Path) -> None:
    """Remove a device's files; not while anything is mounted among them that this process sees."""
    if not _mounts(root.resolve()):
        shutil.rmtree(root, ignore_errors=True)


def _limit(root: Path, space: int) -> None:
    """Put what was in the writable folders on a file system of its own, of that size."""
    whole = root / ".space"
    whole.mkdir(exist_ok=True)
    _mount("tmpfs", str(whole), kind="tmpfs", data=f"size={space},mode=755")
    for name in ("data", "tmp", "var"):
        if (root / name).is_dir():
            for folder, _, files in os.walk(root / name):
                copy = whole / Path(folder).relative_to(root)
                copy.mkdir()
                copy.chmod(os.stat(folder).st_mode & 0o7777)
                for file in files:
                    (copy / file).write_bytes(Path(folder, file).read_bytes())
            _bind(str(whole / name), root / name)


def _show(path: Path, root: Path) -> None:
    place = _place(root / path.relative_to("/"), like=path)
    _bind(str(path), place, recursive=True)
    for mounted in _mounts(place):
        _read_only(mounted)


def _mounts(below: Path) -> list[Path]:
    """Where something is mounted that this process sees: at this path and below it."""
    prefix, found = os.fsencode(below), []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            place = re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), line.split()[4])  # proc(5)
            if place == prefix or place.startswith(prefix + b"/"):
                found.append(Path(os.fsdecode(place)))
    return found


def _place(place: Path, like: Path) -> Path:
    """A mount point; it stays behind in the device's folder, which is removed as a whole."""
    if like.is_dir():
        place.mkdir(parents=True, exist_ok=True)
    elif not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    return place


def _bind(source: str, place: Path, recursive: bool = False) -> None:
    _mount(source, str(place), flags=_MS_BIND | (_MS_REC if recursive else 0))


def _read_only(place: Path) -> None:
    status = os.statvfs(place).f_flag
    kept = sum(flag for bit, flag in _KEPT.items() if status & bit)  # locked ones may not be taken away
    _mount("none", str(place), flags=_MS_REMOUNT | _MS_BIND | _MS_RDONLY | kept)


def _mount(source: str, place: str, *, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    words = [os.fsencode(word) if word is not None else None for word in (source, place, kind)]
    if refused := _call("mount", *words, ctypes.c_ulong(flags), os.fsencode(data) if data else None):
        raise NotAllowed(f"mount of {source} at {place}: {refused}")


def _call(name: str, *arguments: object) -> str | None:
    """Call a function of the C library: None, or why it failed."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) == 0:
        return None
    return os.strerror(ctypes.get_errno())
