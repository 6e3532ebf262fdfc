"""Faults that a loopback device shows on demand, each by its name.

The whole device, until it is told otherwise:

==================  =====  =============================================================================================
mute                bool   frozen: TCP connections stay and new ones are taken, but nothing is answered or taken
offline             bool   a server that connects gets no answer: ``adb devices`` says "offline"
unauthorized        bool   it knows no server's key: ``adb devices`` says "unauthorized"
no_shell_v2         bool   it doesn't have the feature shell_v2 (servers learn that when they connect)
open_hang           bool   a service that is asked for is never opened and never refused
push_delay          float  seconds that it takes for each 64 KiB that it is sent
==================  =====  =============================================================================================

In mid work, at byte N of one request: of a file, or of what a command writes. A command is not even started at byte 0, and
one that writes less than N bytes is hit at its end, before its exit code; a file of less than N bytes is not hit:

==================  =====  =============================================================================================
push_drop           int    the connection drops
push_mute           int    mute from then on, on this connection
push_no_space       int    "No space left on device"
push_corrupt        int    the byte arrives flipped
pull_drop           int    the connection drops
pull_mute           int    mute from then on, on this connection
pull_cut            int    the stream ends amid a block
pull_done           int    the file is said to be complete
pull_corrupt        int    the byte arrives flipped
shell_drop          int    the connection drops
shell_mute          int    mute from then on, on this connection
shell_close         int    the stream ends, without an exit code
shell_hang          bool   the command is never started, and nothing is said
==================  =====  =============================================================================================

With any of them:

==================  =====  =============================================================================================
times               int    so often, then not any more (requests that don't get to byte N don't count)
only                str    only for requests that contain this text: a command, "SEND /path" or "RECV /path"
==================  =====  =============================================================================================

By chance: ``random=0.02, seed=1, kinds=["push_drop", "reboot", ...]`` gives each request that probability of one fault of these
kinds, at a random byte of the first 256 KiB. "reboot" is a kind too. Kinds that end by the client's deadline only (mute, hang) are
drawn only if they are named.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

WHOLE_DEVICE: dict[str, type] = {
    "mute": bool,
    "offline": bool,
    "unauthorized": bool,
    "no_shell_v2": bool,
    "open_hang": bool,
    "push_delay": float,
}
IN_MID_WORK: dict[str, type] = {
    "push_drop": int,
    "push_mute": int,
    "push_no_space": int,
    "push_corrupt": int,
    "pull_drop": int,
    "pull_mute": int,
    "pull_cut": int,
    "pull_done": int,
    "pull_corrupt": int,
    "shell_drop": int,
    "shell_mute": int,
    "shell_close": int,
    "shell_hang": bool,
}
OPTIONS: dict[str, type] = {"times": int, "only": str, "random": float, "seed": int, "kinds": list}
QUICK_KINDS = (
    "push_drop",
    "push_no_space",
    "push_corrupt",
    "pull_drop",
    "pull_cut",
    "pull_done",
    "pull_corrupt",
    "shell_drop",
    "shell_close",
    "reboot",
)
RANDOM_BYTES = 256 << 10


def check(faults: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with kinds as a list.

    Raises:
        ValueError: a name isn't known.
        TypeError: a value is of another type.
    """
    checked = {}
    known = WHOLE_DEVICE | IN_MID_WORK | OPTIONS
    for name, value in faults.items():
        if name not in known:
            raise ValueError(f"a loopback device has no fault {name!r}; it has {', '.join(known)}")
        wanted = known[name]
        if wanted is list:
            value = list(value)
            for kind in value:
                if kind != "reboot" and kind not in IN_MID_WORK:
                    raise ValueError(f"no kind of random fault: {kind!r}; there are reboot, {', '.join(IN_MID_WORK)}")
        elif wanted is float:
            value = float(value)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value!r}: expected a number of 0 or more")
        elif type(value) is not wanted:
            raise TypeError(f"{name}={value!r}: expected {wanted.__name__}")
        elif isinstance(value, int) and value < 0:
            raise ValueError(f"{name}={value!r}: expected 0 or more")
        checked[name] = value
    return checked


class Request:
    """The faults of one request, chosen when it begins."""

    def __init__(self, faults: Faults, chosen: Mapping[str, Any], random_reboot: bool = False) -> None:
        self._faults, self._chosen = faults, chosen
        self.reboot = random_reboot

    def at(self, name: str) -> int | None:
        """The byte at which fault ``name`` comes; None if it doesn't."""
        value = self._chosen.get(name)
        return None if value is None or value is False else int(value)

    def strikes(self, name: str, start: int, end: int) -> int | None:
        """The byte in ``start`` <= byte < ``end`` at which it comes, counted as having come; None if it doesn't."""
        byte = self.at(name)
        if byte is None or not start <= byte < end:
            return None
        self._faults.came(name)
        return byte


class Faults:
    """What is to go wrong, and what did."""

    def __init__(self) -> None:
        self._active: dict[str, Any] = {}
        self._left: float = math.inf
        self._chance = random.Random(0)
        self._log: list[str] = []

    def set(self, faults: Mapping[str, Any]) -> None:
        """These, and no others any more."""
        self._active = dict(faults)
        self._left = self._active.get("times", math.inf)
        self._chance = random.Random(self._active.get("seed", 0))

    def has(self, name: str) -> Any:
        """Value of a fault of the whole device."""
        return self._active.get(name)

    def hangs(self, subject: str) -> bool:
        """Whether this request is neither opened nor refused."""
        if self._active.get("open_hang") and self._left > 0 and self._active.get("only", "") in subject:
            self.came("open_hang")
            return True
        return False

    def request(self, work: str, subject: str) -> Request:
        """Choose the faults of a request that begins: ``work`` is "push", "pull" or "shell"."""
        if self._active.get("only", "") not in subject:
            return Request(self, {})
        chosen = {}
        if self._left > 0:
            chosen = {name: value for name, value in self._active.items() if name.startswith(work + "_")}
        reboot = False
        if self._chance.random() < self._active.get("random", 0.0):
            kinds = self._active.get("kinds") or QUICK_KINDS
            fitting = [kind for kind in kinds if kind == "reboot" or kind.startswith(work + "_")]
            if fitting:
                kind = self._chance.choice(fitting)
                reboot = kind == "reboot"
                if not reboot:
                    # Most files and outputs are short: half of the faults come early.
                    limit = self._chance.choice((64, RANDOM_BYTES))
                    chosen[kind] = True if IN_MID_WORK[kind] is bool else self._chance.randrange(limit)
        return Request(self, chosen, reboot)

    def came(self, name: str) -> None:
        """Note that a fault showed."""
        self._log.append(name)
        self._left -= 1

    def take_log(self) -> list[str]:
        """Faults that showed since this was last asked."""
        log, self._log = self._log, []
        return log
