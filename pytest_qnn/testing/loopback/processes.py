"""The processes of a device: all that descend from this one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Collection

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
_PATIENCE = 5.0  # seconds for killed processes to go


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ended, as a device's init does."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Be killed when the thread ends that started this process."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_all() -> None:
    """Kill every descendant, and theirs, until none is left."""
    if os.getpid() == 1:  # of a namespace of its own, not of the host: see namespace.py
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        return
    end = time.monotonic() + _PATIENCE
    while (found := descendants()) and time.monotonic() < end:
        for process in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.005)


def kill_marked(setting: str) -> None:
    """Kill the processes of this user that have this setting (``NAME=VALUE``) in their environment."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if os.fsencode(setting) in file.read().split(b"\0"):
                    os.kill(int(name), signal.SIGKILL)


def reap_orphans(own: Collection[int]) -> None:
    """Take leave of ended children that nobody waits for: all but ``own``."""
    for process in _children_of(os.getpid()):
        if process not in own:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)


def descendants(of: int | None = None) -> list[int]:
    """Living processes that descend from ``of`` (default: this one)."""
    children: dict[int, list[int]] = {}
    dead = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                children.setdefault(int(parent), []).append(int(name))
                if state in (b"Z", b"X"):
                    dead.add(int(name))
    found, queue = [], [os.getpid() if of is None else of]
    while queue:
        for child in children.get(queue.pop(), []):
            queue.append(child)
            if child not in dead:
                found.append(child)
    return found


def _children_of(process: int) -> list[int]:
    try:
        with open(f"/proc/{process}/task/{process}/children", "rb") as file:
            return [int(word) for word in file.read().split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN: they stay until the device ends
        return []


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
