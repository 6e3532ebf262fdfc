"""Files that appear in one piece or not at all, also when the process is killed while it writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replaced_file(file: Path) -> Iterator[Path]:
    """A draft beside ``file`` to write to; it takes the file's place if the block ends well, and goes if it doesn't.

    A draft that a killed process left is removed by the next one that writes the same file.

    Raises:
        OSError: the draft can't take the file's place.
    """
    for left in file.parent.glob(f".{_escaped(file.name)}.*.part"):
        pid = left.name.rsplit(".", 2)[1]
        import psutil

        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            left.unlink(missing_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        yield draft
        os.replace(draft, file)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _escaped(name: str) -> str:
    """``name`` for a glob pattern."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
