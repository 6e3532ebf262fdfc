"""The process of a loopback device: ``python -P -m pytest_qnn.testing.loopback.process SETTINGS CONTROL``.

It is two: a guard, and the daemon that it forks, which is the first process of the device's namespaces where there are any.
``CONTROL`` is a socket whose other end the owner holds: JSON requests, one a line, one answer each. When it closes, however the owner ended, the
daemon stops, all processes of the device are killed, and the guard removes the device's files.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_qnn.testing.loopback import namespace, processes
from pytest_qnn.testing.loopback.daemon import Daemon
from pytest_qnn.testing.loopback.flavors import BOOT_ID, LOGS
from pytest_qnn.testing.loopback.paths import DevicePaths

NOT_ALLOWED = 77  # exit code: the host allows no namespaces


def main() -> None:
    """Serve until the owner is gone."""
    settings, control = json.loads(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    # A terminal's Ctrl-C is the owner's, who will close CONTROL. Not SIG_IGN, which programs on the device would inherit.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    try:
        if settings["isolate"]:
            namespace.unshare()
    except namespace.NotAllowed as error:
        _refuse(control, str(error))
    processes.adopt_orphans()
    waiting, ready = os.pipe()
    daemon = os.fork()
    if daemon == 0:
        os.close(ready)
        processes.die_with_parent()
        if os.read(waiting, 1):  # else the guard died before it could be noticed
            _serve(settings, control)
        os._exit(0)
    control.sendall(json.dumps({"process": daemon}).encode() + b"\n")
    control.close()
    os.write(ready, b"!")
    code = os.waitstatus_to_exitcode(os.waitpid(daemon, 0)[1])
    processes.kill_all()
    if settings["remove"] and code != NOT_ALLOWED:
        namespace.remove(Path(settings["root"]))
    sys.exit(code)


def _refuse(control: socket.socket, reason: str) -> None:
    control.sendall(json.dumps({"refused": reason}).encode() + b"\n")
    os._exit(NOT_ALLOWED)


def _serve(settings: Mapping[str, Any], control: socket.socket) -> None:
    root: str | None = settings["root"]
    if settings["isolate"]:
        try:
            namespace.enter(
                Path(settings["root"]),
                shown=settings["shown"],
                frozen=settings["frozen"],
                boot_id=BOOT_ID,
                space=settings["space"],
            )
        except namespace.NotAllowed as error:
            _refuse(control, str(error))
        root = None
    else:
        processes.adopt_orphans()
    try:
        asyncio.run(_run(settings, root, control))
    except BaseException as error:  # nobody else would say it
        sys.stderr.write(f"loopback device: {error!r}\n")
        sys.stderr.flush()
        raise


async def _run(settings: Mapping[str, Any], root: str | None, control: socket.socket) -> None:
    here = root or ""
    environment = {name: value.replace("{root}", here) for name, value in settings["environment"].items()} | (
        {"FAKE_ROOT": here} if here else {}
    )
    daemon = Daemon(
        settings["serial"],
        DevicePaths(root, settings["shown"]),
        banner=settings["banner"],
        environment=environment,
        shell=here + settings["shell"],
        folders=tuple(here + folder for folder in settings["volatile"]),
        boot_id=here + BOOT_ID,
        logs=tuple(here + log for log in LOGS),
        reboot_seconds=settings["reboot_seconds"],
    )
    await daemon.listen()
    reader, writer = await asyncio.open_connection(sock=control)
    try:
        writer.write(json.dumps({"port": daemon.port}).encode() + b"\n")
        while line := await reader.readline():
            answer = await _obey(daemon, json.loads(line))
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        await daemon.stop()
        with contextlib.suppress(ConnectionError):
            writer.close()


async def _obey(daemon: Daemon, request: Mapping[str, Any]) -> dict[str, Any]:
    word = request["do"]
    if word == "faults":
        daemon.set_faults(request["faults"])
    elif word == "drop":
        daemon.drop()
    elif word == "unplug":
        daemon.unplug()
    elif word == "plug":
        await daemon.listen()
    elif word == "reboot":
        daemon.start_reboot(request["down"])
    elif word == "requests":
        return {"requests": daemon.take_requests()}
    elif word == "struck":
        return {"struck": daemon.faults.take_log()}
    elif word == "traffic":
        return {"pushed": daemon.pushed, "pulled": daemon.pulled}
    elif word == "processes":
        return {"processes": daemon.programs()}
    return {}


if __name__ == "__main__":
    main()
