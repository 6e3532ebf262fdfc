"""The end of a device's own log: what is kept when it, or a program on it, failed."""

from __future__ import annotations

from pytest_qnn.devices.facts import DeviceFacts
from pytest_qnn.devices.transport import Transport
from pytest_qnn.errors import ReplayError, TargetError

LOG_SECONDS = 8.0
LINES = 200
_BYTES = 4 << 20
_COMMANDS = {
    "android": (("logcat", "-d", "-v", "threadtime", "-t", "{}"),),
    "linux": (("journalctl", "--no-pager", "--quiet", "-o", "short-iso", "-n", "{}"), ("dmesg",)),
}


def log_tail(transport: Transport, facts: DeviceFacts, lines: int = LINES, timeout: float = LOG_SECONDS) -> str:
    """The last ``lines`` lines of logcat (Android), or of the journal, else of the kernel's log (Linux).

    Never an error: empty if the device doesn't answer within about ``timeout`` seconds in all, or doesn't let us read it.
    Control characters are taken out, for it is shown in terminals.
    """
    commands = _COMMANDS[facts.os]
    for command in commands:
        words = [word.format(lines) for word in command]
        try:
            done = transport.shell(words, timeout=timeout / len(commands), limit=_BYTES)
        except ReplayError:
            raise
        except TargetError:
            return ""
        text = done.stdout.decode("utf-8", "replace")
        if done.code == 0 and text.strip():
            return "\n".join(_shown(line) for line in text.splitlines()[-lines:])
    return ""


def _shown(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in line.rstrip())[:2000]
