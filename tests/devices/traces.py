"""What operations leave behind: files in a folder, programs that still run."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import psutil

_numbers = itertools.count(1)


def tree(folder: Path) -> set[str]:
    """Everything in ``folder``, as paths relative to it."""
    return {os.path.relpath(path, folder) for path in folder.rglob("*")}


def marked_sleep() -> list[str]:
    """A command that runs for long and that no other test runs."""
    return ["sleep", f"{100_000 + next(_numbers)}.{os.getpid()}"]


def gone(command: list[str], seconds: float = 15.0) -> bool:
    """Whether ``command`` runs no more, or ends within ``seconds``."""
    end = time.monotonic() + seconds
    while running := [p for p in psutil.process_iter(["cmdline", "status"]) if _is(p, command)]:
        if time.monotonic() > end:
            return False
        psutil.wait_procs(running, timeout=0.05)
    return True


def _is(process: psutil.Process, command: list[str]) -> bool:
    return process.info["cmdline"] == command and process.info["status"] != psutil.STATUS_ZOMBIE
