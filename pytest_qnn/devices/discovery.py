"""Which devices there are: those that ADB servers know, or those that were asked for, each with why it can't be used if so."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qnn.devices.lease import NETWORK_SERIAL
from pytest_qnn.errors import AdbServerError, DeviceError, DeviceLostError, DeviceRefusedError, DeviceTimeoutError

if TYPE_CHECKING:
    from pytest_qnn.adb.server import AdbServer
    from pytest_qnn.adb.server import DeviceEntry as Listed
    from pytest_qnn.devices.transport import Transport
    from pytest_qnn.settings import Settings

SERVER_SECONDS = 10.0
SETTLE_SECONDS = 3.0  # a device that was just connected may be offline for a moment
MISSING = "missing"
NO_SERVER = "no server"
_AWAY = ("offline", "connecting")

_STATES: dict[str, tuple[type[DeviceError], str]] = {
    "offline": (
        DeviceLostError,
        "it is known to the ADB server but doesn't answer: wait if it starts, else unplug it and plug it in again, or "
        "'adb reconnect'",
    ),
    "unauthorized": (
        DeviceRefusedError,
        "unlock its screen and allow USB debugging for this host; if it doesn't ask, revoke the authorizations in its "
        "developer options and plug it in again",
    ),
    "authorizing": (DeviceRefusedError, "it is about to ask on its screen whether to trust this host: allow that"),
    "connecting": (DeviceLostError, "the ADB server is connecting to it: try again in a moment"),
    "no permissions": (
        DeviceRefusedError,
        "this host may not open it: add a udev rule for it and the user to the group plugdev, then 'adb kill-server'",
    ),
    "recovery": (DeviceError, "it is in recovery mode: start its system ('adb reboot')"),
    "rescue": (DeviceError, "it is in rescue mode: start its system ('adb reboot')"),
    "sideload": (DeviceError, "it waits for an update (sideload): finish that, or start its system ('adb reboot')"),
    "bootloader": (DeviceError, "it is in its bootloader: start its system ('fastboot reboot')"),
    "host": (DeviceError, "it is no device but an ADB server"),
}


@dataclass(frozen=True)
class DeviceEntry:
    """A device that is attached, or that was asked for.

    Attributes:
        serial: as ``adb devices`` shows it.
        server: the ADB server that knows it.
        state: as ADB names it, "device" if it can be used; "missing" if its server doesn't know it, "no server" if that
            server doesn't answer.
        product, model: as the server shows them; may be empty.
        trouble: why it can't be used, and what to do; empty if it can.
        error: what :meth:`open` raises then.
    """

    serial: str
    server: AdbServer
    state: str
    product: str = ""
    model: str = ""
    trouble: str = ""
    error: type[DeviceError] = DeviceError

    @property
    def address(self) -> str:
        """``adb://SERIAL@HOST:PORT``."""
        return f"adb://{self.serial}@{self.server.address}"

    def open(self) -> Transport:
        """A line to it. Nothing is asked of the device yet.

        Raises:
            DeviceError: it can't be used; of the class that fits.
        """
        from pytest_qnn.adb.transport import AdbTransport

        if self.trouble:
            raise self.error(self.trouble)
        return AdbTransport(self.server, self.serial)


def discover(settings: Settings, timeout: float = SERVER_SECONDS) -> list[DeviceEntry]:
    """The devices of the settings' ADB server; or, where the setting ``device`` names some, just those, in that order.

    A named device on the network that its server doesn't know yet, or to which it lost the connection, is connected. A named one that isn't there is an entry
    too, with state "missing".

    Args:
        timeout: seconds for each request to a server.

    Raises:
        OptionError: a serial, or the address of a device or server, is none.
        AdbServerError, DeviceTimeoutError, DeviceLostError: no device is named, and the server doesn't answer.
    """
    from pytest_qnn.adb.server import find_server, parse_address

    if not settings.device:
        server = find_server(settings.adb_server)
        return [_entry(listed, server) for listed in server.devices(timeout)]
    wanted: dict[tuple[str, AdbServer], None] = {}
    for text in settings.device:
        serial, named = parse_address(text)
        wanted[serial, named or find_server(settings.adb_server)] = None
    servers = list(dict.fromkeys(server for _, server in wanted))
    with ThreadPoolExecutor(min(16, len(wanted)), thread_name_prefix="qnn-adb") as pool:
        lists = dict(zip(servers, pool.map(lambda server: _ask(lambda: server.devices(timeout)), servers), strict=True))
        return list(pool.map(lambda pair: _find(pair[0], pair[1], lists[pair[1]], timeout), wanted))


def _find(serial: str, server: AdbServer, listed: list[Listed] | DeviceError, timeout: float) -> DeviceEntry:
    if isinstance(listed, DeviceError):
        return DeviceEntry(serial, server, NO_SERVER, trouble=f"{serial}: {listed}", error=type(listed))
    found = [entry for entry in listed if entry.serial == serial]
    reason = ""
    if NETWORK_SERIAL.fullmatch(serial) and (not found or found[0].state in _AWAY):
        answer = _ask(lambda: _connect(serial, server, min(timeout, SETTLE_SECONDS) if found else timeout))
        if not isinstance(answer, DeviceError):
            found = answer or found
        elif not found:
            reason = str(answer)
    if found:
        return _entry(found[0], server, doubled=len(found) > 1)
    return _missing(serial, server, [entry.serial for entry in listed], reason)


def _connect(serial: str, server: AdbServer, timeout: float) -> list[Listed]:
    """Connect to a device on the network and wait until it isn't offline any more, for a moment."""
    failed: DeviceLostError | None = None
    try:
        server.disconnect(serial, timeout)  # one that is offline stays so for seconds: it is "already connected"
        server.connect(serial, timeout)
    except DeviceTimeoutError:  # the server waits for the device; a moment ago it answered itself
        failed = DeviceLostError(
            f"it doesn't answer: the ADB server at {server.address} got no connection within {timeout:g} s. Is the device on, "
            "and its ADB listening there (adb tcpip 5555)?"
        )
    except DeviceLostError as error:
        failed = error  # the state of one that refuses this host says more than that
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        found = [entry for entry in server.devices(timeout) if entry.serial == serial]
        if failed and not found:
            raise failed
        if (found and found[0].state not in ("offline", "connecting", "authorizing")) or time.monotonic() > end:
            return found
        time.sleep(0.1)


def _ask(question: Callable[[], list[Listed]]) -> list[Listed] | DeviceError:
    try:
        return question()
    except (AdbServerError, DeviceTimeoutError, DeviceLostError) as error:
        return error


def _entry(listed: Listed, server: AdbServer, doubled: bool = False) -> DeviceEntry:
    state, serial = listed.state, listed.serial
    trouble, error = "", DeviceError
    if not serial:
        trouble = "a device without a serial number can't be addressed: set one, or reach it over the network"
    elif doubled:
        trouble = f"device {serial}: two devices have this serial (server {server.address}): unplug one"
    elif state != "device":
        known = next((key for key in _STATES if state == key or state.startswith(f"{key} ")), "")
        error, advice = _STATES.get(known, (DeviceError, "start its system, and see what 'adb devices' says"))
        trouble = f"device {serial} is {state!r} (server {server.address}): {advice}"
    return DeviceEntry(serial, server, state, listed.product, listed.model, trouble, error)


def _missing(serial: str, server: AdbServer, known: Iterable[str], reason: str) -> DeviceEntry:
    if reason:
        return DeviceEntry(serial, server, MISSING, trouble=f"device {serial!r}: {reason}", error=DeviceLostError)
    known = [name for name in known if name]
    close = difflib.get_close_matches(serial, known, n=1)
    if close:
        advice = f"Did you mean {close[0]!r}?"
    elif known:
        advice = f"Attached: {', '.join(known)}"
    else:
        advice = "No device is attached: plug it in, and see 'adb devices'"
    trouble = f"device {serial!r} is not attached to the ADB server at {server.address}. {advice}"
    return DeviceEntry(serial, server, MISSING, trouble=trouble, error=DeviceLostError)
