"""A loopback device as its owner holds it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from pytest_qnn.devices.soc import find_soc
from pytest_qnn.testing.loopback import flavors, namespace, processes, python_environment
from pytest_qnn.testing.loopback.faults import check

ANSWER_SECONDS = 20.0
CONNECT_SECONDS = 20.0
NO_ISOLATION = "PYTEST_QNN_LOOPBACK_NO_ISOLATION"  # set: never use namespaces, as where the host forbids them
_refused: list[str] = []  # why this host allows no namespaces, once that is known


class Server(Protocol):
    """Where an ADB server listens."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...


class LoopbackDevice:
    """The device side of ADB on 127.0.0.1, in a process of its own that ends with this one, however it ends.

    It isn't a Snapdragon: programs run on this host's processor. ``/run/pytest-qnn-stand-in`` on it says so.

    Args:
        folder: for its files; made if it is missing, and emptied of them at the end. One device per folder.
        flavor: "android" (getprop, logcat, no Python on PATH) or "linux" (a board that has Python).
        soc: the chip that it pretends to have, one of :data:`pytest_qnn.devices.soc.SOCS`.
        name: the device's own serial number. (ADB's serial of it is :attr:`address`.)
        isolate: give it a root folder of its own by Linux namespaces; where the host forbids that, :attr:`isolated` is False and
            paths in commands are rewritten (see :mod:`pytest_qnn.testing.loopback.paths`). False: always that.
        python: whether a board has Python.
        without: distributions that its Python lacks, e.g. ["onnxruntime-qnn"]; None: it has no package at all.
        runtime: files named like a QNN runtime's in its vendor folder, which can't be loaded.
        space: bytes that all files on it may have together. Needs isolation; else only :meth:`faults` make it full.
        as_root: whether commands appear to run as root; by default on a board, not on Android.
        properties: values for getprop, besides the usual ones or instead of them.
        files: more files: path on the device -> content, or a file of this host to copy.
        reboot_seconds: how long it is away after "adb reboot".

    Attributes:
        address: "127.0.0.1:PORT", also its serial once a server is connected.
        port: of that.
        root: its root folder, as seen from here.
        isolated: whether it has a root of its own. (While it runs.)
        isolation: why not; empty if it has.
        process: id of the process that is the device.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        flavor: str = "android",
        soc: str = "SM8650",
        name: str | None = None,
        isolate: bool = True,
        python: bool = True,
        without: Iterable[str] | None = (),
        runtime: bool = False,
        space: int | None = None,
        as_root: bool | None = None,
        properties: Mapping[str, str] | None = None,
        files: Mapping[str, bytes | Path] | None = None,
        reboot_seconds: float = 1.0,
    ) -> None:
        if flavor not in ("android", "linux"):
            raise ValueError(f"flavor={flavor!r}: expected 'android' or 'linux'")
        if not sys.platform.startswith("linux"):
            raise OSError("a loopback device needs Linux")
        chip = find_soc(soc)
        self.flavor, self.soc = flavor, chip.name
        self.folder = Path(folder).resolve()
        self.name = name or f"loopback-{self.folder.name[:40]}"
        self.address, self.port, self.process = "", 0, 0
        self.isolated, self.isolation = False, ""
        self._htp_arch, self._isolate, self._space, self._python = chip.htp_arch, isolate, space, python
        self._without = list(without) if without is not None else None
        self._runtime, self._properties, self._files = runtime, dict(properties or {}), dict(files or {})
        self._as_root = as_root if as_root is not None else flavor == "linux"
        self._reboot_seconds = reboot_seconds
        self._guard: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._answers: Any = None

    # --- its life -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> LoopbackDevice:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Begin to exist.

        Raises:
            OSError: it can't; the message has what its process said.
        """
        root = self.folder / "root"
        namespace.remove(root)
        root.mkdir(parents=True)
        settings = self._prepare(root)
        try:
            if self._isolate and not os.environ.get(NO_ISOLATION) and not _refused:
                try:
                    self._launch(settings | {"isolate": True})
                except _NoNamespaceError as error:
                    _refused.append(str(error))
            if not self._control:
                reason = "not wanted" if not self._isolate or os.environ.get(NO_ISOLATION) else _refused[0]
                self.isolation = f"paths in commands are rewritten, for it has no root of its own: {reason}"
                flavors.hide_host_processes(root, self.flavor)
                self._launch(settings | {"isolate": False})
            else:
                self.isolated = True
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop it, with everything that runs on it, and remove its files."""
        if self._control is not None:
            self._answers.close()
            self._control.close()
            self._control = None
        if self._guard is not None:
            try:
                self._guard.wait(ANSWER_SECONDS)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()
            if self._guard.returncode:  # it was killed, and could not see to the rest
                processes.kill_marked(f"{flavors.MARK}={self.folder / 'root'}")
            self._guard = None
        namespace.remove(self.folder / "root")
        with suppress(OSError):
            if not (self.folder / "process.log").stat().st_size:
                (self.folder / "process.log").unlink()

    def _prepare(self, root: Path) -> dict[str, Any]:
        told = flavors.build(
            root,
            flavor=self.flavor,
            soc=self.soc,
            htp_arch=self._htp_arch,
            name=self.name,
            runtime=self._runtime,
            as_root=self._as_root,
            properties=self._properties,
        )
        tools = flavors.tools_folder(self.flavor)
        if self.flavor == "linux" and self._python:
            interpreter = python_environment.make(root, self._without)
            for name in ("python3", "python"):
                (root / tools.lstrip("/") / name).write_text(f'#!/bin/sh\nexec "${{FAKE_ROOT}}{interpreter}" "$@"\n')
                (root / tools.lstrip("/") / name).chmod(0o755)
        for path, content in self._files.items():
            place = root / path.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copy(content, place)
            else:
                place.write_bytes(content)
        environment = {"PATH": f"{{root}}{tools}", "LANG": "C.UTF-8", flavors.MARK: str(root)}
        if self.flavor == "android":
            environment |= {"HOME": "{root}/", "ANDROID_ROOT": "/system", "ANDROID_DATA": "/data"}
            environment |= {"TMPDIR": "{root}/data/local/tmp", "USER": "shell"}
        else:
            environment |= {"HOME": "{root}/home/root", "USER": "root"}
        return {
            "root": str(root),
            "remove": True,
            "serial": self.name,
            "banner": {name: told[name] for name in ("ro.product.name", "ro.product.model", "ro.product.device")},
            "environment": environment,
            "shell": f"{tools}/sh",
            "shown": python_environment.shown(),
            "frozen": ["/system", "/vendor"] if self.flavor == "android" else ["/bin", "/opt"],
            "volatile": ["/tmp", "/dev/shm"],
            "space": self._space,
            "reboot_seconds": self._reboot_seconds,
        }

    def _launch(self, settings: Mapping[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        log = self.folder / "process.log"
        with theirs, open(log, "ab") as errors:
            self._guard = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "pytest_qnn.testing.loopback.process",
                    json.dumps(settings),
                    str(theirs.fileno()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=[theirs.fileno()],
            )
        ours.settimeout(ANSWER_SECONDS)
        answers = ours.makefile("rb")
        told: dict[str, Any] = {}
        while "port" not in told:
            try:
                line = answers.readline()
            except OSError:
                line = b""
            if not line or "refused" in (message := json.loads(line)):
                answers.close()
                ours.close()
                with suppress(subprocess.TimeoutExpired):
                    self._guard.wait(1)
                self._guard.kill()
                self._guard.wait()
                self._guard = None
                if line:
                    raise _NoNamespaceError(message["refused"])
                raise OSError(f"the loopback device did not start: {log.read_text(errors='replace')[-2000:]}")
            told |= message
        self._control, self._answers = ours, answers
        self.port, self.process = told["port"], told["process"]
        self.address = f"127.0.0.1:{self.port}"

    def _ask(self, word: str, **details: Any) -> dict[str, Any]:
        if self._control is None:
            raise OSError(f"loopback device {self.name} is not running")
        try:
            self._control.sendall(json.dumps({"do": word, **details}).encode() + b"\n")
            line = self._answers.readline()
        except OSError as error:
            raise OSError(f"loopback device {self.name} does not answer: {error}") from error
        if not line:
            raise OSError(f"loopback device {self.name} died; see {self.folder / 'process.log'}")
        return json.loads(line)  # type: ignore[no-any-return]

    # --- getting to it ------------------------------------------------------------------------------------------------

    def connect(self, server: Server) -> str:
        """Let an ADB server connect to it, as "adb connect" does; waits until it is usable. Returns :attr:`address`.

        Raises:
            OSError: the server says no, or it isn't usable in time.
        """
        said = _ask_server(server, f"host:connect:{self.address}")
        if not said.startswith(("connected to", "already connected")):
            raise OSError(f"adb connect {self.address}: {said}")
        end = time.monotonic() + CONNECT_SECONDS
        while (state := _ask_server(server, f"host-serial:{self.address}:get-state")) != "device":
            if time.monotonic() > end:
                raise OSError(f"{self.address} is not usable: {state}")
            time.sleep(0.01)
        return self.address

    def disconnect(self, server: Server) -> None:
        """Let an ADB server forget it."""
        if not self.address:
            return  # never started; and without an address a server would forget all that it knows
        _ask_server(server, f"host:disconnect:{self.address}")

    # --- its files ----------------------------------------------------------------------------------------------------

    @property
    def root(self) -> Path:
        """Its root folder, as seen from here."""
        if self.isolated and self._space is not None:  # some of it exists in the device's namespace only
            return Path(f"/proc/{self.process}/root")
        return self.folder / "root"

    def path(self, path: str) -> Path:
        """Where a path of the device's is, as seen from here."""
        inner = os.path.normpath("/" + path.lstrip("/"))
        if inner.startswith(f"{self.folder / 'root'}/"):  # as programs see it that run without a root of their own
            return Path(inner)
        if inner == "/proc/sys/kernel/random/boot_id":
            inner = flavors.BOOT_ID
        return self.root / inner.lstrip("/")

    def write(self, path: str, text: str) -> None:
        """Give a file on the device this content and a line's end."""
        place = self.path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text + "\n")

    def set_temperature(self, celsius: float, zone: str = "") -> None:
        """Set all thermal zones, or those whose name begins like this ("cpu", "gpu", "nsp")."""
        for place in sorted(self.path("/sys/class/thermal").glob("thermal_zone*")):
            if (place / "type").read_text().startswith(zone):
                (place / "temp").write_text(f"{round(celsius * 1000)}\n")

    def set_cooling(self, state: int, device: str = "") -> None:
        """Set how hard all cooling devices work, or those whose name contains this ("cpu", "devfreq", "cdsp"): 0 is not at all."""
        for place in sorted(self.path("/sys/class/thermal").glob("cooling_device*")):
            if device in (place / "type").read_text():
                (place / "cur_state").write_text(f"{state}\n")

    def set_clocks(self, share: float) -> None:
        """Let cores and GPU run at this share of their usual clock, as when they throttle."""
        for place in self.path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"):
            place.write_text(f"{round(flavors.CORE_KHZ * share)}\n")
        for name in ("kgsl/kgsl-3d0/gpuclk", "devfreq/3d00000.qcom,kgsl-3d0/cur_freq"):
            if (place := self.path(f"/sys/class/{name}")).exists():
                place.write_text(f"{round(flavors.GPU_HZ * share)}\n")

    def log(self, line: str, *, kernel: bool = False) -> None:
        """Add a line to its log (logcat), or to the kernel's (dmesg)."""
        with open(self.path(f"/run/log/{'kernel' if kernel else 'logcat'}"), "a") as file:
            file.write(line + "\n")

    # --- what happens to it -------------------------------------------------------------------------------------------

    def faults(self, **faults: Any) -> None:
        """Show these faults from now on (:mod:`pytest_qnn.testing.loopback.faults`), and no others; without any, none.

        Raises:
            ValueError, TypeError: there is no such fault, or its value makes no sense.
        """
        self._ask("faults", faults=check(faults))

    def struck(self) -> list[str]:
        """Names of the faults that showed since this was last asked."""
        return list(self._ask("struck")["struck"])

    def drop(self) -> None:
        """Drop all connections, once. The server will be back."""
        self._ask("drop")

    def unplug(self) -> None:
        """Be gone until :meth:`plug`."""
        self._ask("unplug")

    def plug(self) -> None:
        """Be there again."""
        self._ask("plug")

    def reboot(self, down: float = 1.0) -> None:
        """Begin to reboot: all that runs on it ends, /tmp is emptied, and it is away for ``down`` seconds."""
        self._ask("reboot", down=down)

    def requests(self) -> list[str]:
        """What it was asked since this was last asked: "shell COMMAND", "SEND PATH,MODE", "RECV PATH", "STAT PATH", ..."""
        return list(self._ask("requests")["requests"])

    def traffic(self) -> tuple[int, int]:
        """Bytes of files that were pushed to it and pulled from it so far."""
        told = self._ask("traffic")
        return told["pushed"], told["pulled"]

    def processes(self) -> int:
        """How many processes run on it."""
        return int(self._ask("processes")["processes"])

    def __repr__(self) -> str:
        return f"<LoopbackDevice {self.flavor} {self.address or 'not started'}>"


class _NoNamespaceError(Exception):
    pass


def _ask_server(server: Server, service: str) -> str:
    """One request to an ADB server, and its answer or complaint (AOSP, ``OVERVIEW.TXT``: lengths are four hex digits)."""
    with socket.create_connection((server.host, server.port), CONNECT_SECONDS) as line, line.makefile("rb") as answer:
        request = service.encode()
        line.sendall(b"%04x" % len(request) + request)
        answer.read(4)  # OKAY or FAIL
        size = answer.read(4)
        return answer.read(int(size, 16)).decode() if size else ""
