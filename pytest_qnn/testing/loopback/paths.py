"""Where a device's paths are: the same in a root of its own, else below a folder of the host, put into what is said to it.

Without a root of its own (:mod:`pytest_qnn.testing.loopback.namespace`), paths in commands are rewritten to where they really are.
What a command writes to its standard output is rewritten back where it names what can only be read there (/sys, /vendor, ...): a
program may print what it read. Paths in folders that can be written keep the host's name, so that whoever was told such a path
can hand it to a program in a way that is not rewritten (in a file, over standard input).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

_READ_ONLY = (
    b"/proc/sys/kernel/random/boot_id",
    b"/proc/device-tree",
    b"/etc/os-release",
    b"/sys",
    b"/run",
    b"/vendor",
    b"/system",
    b"/dsp",
    b"/opt/qcom",
)
_WRITABLE = (b"/data", b"/var/tmp", b"/var/log", b"/tmp", b"/home/root", b"/opt/python")


class DevicePaths:
    """
    Args:
        root: folder of the host that holds the device's files; None if it is "/" for this process.
        leave: paths of the host that programs on the device need as they are.
    """

    def __init__(self, root: str | None, leave: Sequence[str] = ()) -> None:
        self.root = os.fsencode(root) if root is not None else b""
        kept = b"|".join(re.escape(path) for path in [self.root, *map(os.fsencode, leave)] if path)
        device = b"|".join(re.escape(path) for path in _READ_ONLY + _WRITABLE)
        self._in = re.compile(rb"(?<![\w./-])(?:(?:%s)(?=/|[^\w.-]|$)|(%s)(?=/|[^\w.-]|$))" % (kept or b"\0", device))
        self._out = re.compile(re.escape(self.root) + rb"(?=(?:%s)(?:/|[^\w.-]|$))" % b"|".join(_READ_ONLY))

    def local(self, path: bytes) -> bytes:
        """Where this process finds a path of the device's. ".." doesn't lead out of it."""
        path = os.path.normpath(b"/" + path.lstrip(b"/"))
        if not self.root or path == self.root or path.startswith(self.root + b"/"):
            return path
        return self.root + path

    def command(self, command: bytes) -> bytes:
        """A command as it is to be run."""
        if not self.root:
            return command
        return self._in.sub(lambda found: self.root + found[0] if found[1] else found[0], command)

    def output(self, data: bytes) -> bytes:
        """Output as the device would have written it."""
        if not self.root or self.root not in data:
            return data
        return self._out.sub(b"", data)
