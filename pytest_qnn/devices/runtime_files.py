"""Which files of the QNN runtime a device needs for qnn-net-run, and where they are: in a folder that was named, in the SDK,
or on the device itself. All come from one place, for stub, skeleton and libraries of different releases don't fit together.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pytest_qnn.devices.facts import VERSION, DeviceFacts
from pytest_qnn.errors import BackendUnavailableError
from pytest_qnn.sdk.installation import ANDROID, NET_RUN, read_version

LINUX = ("aarch64-oe-linux-gcc", "aarch64-ubuntu-gcc")  # followed by a version, e.g. 11.2
AARCH64, HEXAGON = 183, 164  # e_machine in the ELF specification's registry
_HEAD = 256
_ABOUT = "runtime.json"
_STAND_IN = b"qnn sdk stand-in"  # in the first bytes of a stand-in's files, in any case
_MIXED = re.compile(VERSION.pattern.encode())


@dataclass(frozen=True)
class RuntimeFiles:
    """The files of a runtime, all from one place.

    Attributes:
        local: files of this host that must go to the device, by the name that they must have there.
        on_device: paths of files that are on the device, by that name.
        origin: where they are, for messages and records.
        version: of QNN, as the SDK or its libraries tell; "unknown".
        stand_in: whether these only stand in for Qualcomm's.
    """

    local: Mapping[str, Path]
    on_device: Mapping[str, str]
    origin: str
    version: str
    stand_in: bool = False

    def to_folder(self, folder: Path) -> None:
        """Copy it into a new folder, for a recording.

        Raises:
            OSError: a file can't be read or written.
        """
        folder.mkdir()
        for name, path in self.local.items():
            shutil.copy(path, folder / name)  # with its mode
        about = {"on_device": dict(self.on_device), "version": self.version, "stand_in": self.stand_in}
        (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def from_folder(cls, folder: Path) -> RuntimeFiles:
        """Read it from such a folder.

        Raises:
            OSError, ValueError: the folder isn't one.
        """
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        local = {path.name: path for path in sorted(folder.iterdir()) if path.name != _ABOUT}
        on_device = {str(name): str(path) for name, path in dict(about["on_device"]).items()}
        return cls(local, on_device, "the recording", str(about["version"]), bool(about["stand_in"]))


@dataclass(frozen=True)
class _Place:
    """Where to look: folders for each kind of file."""

    origin: str
    programs: tuple[Path, ...]
    libraries: tuple[Path, ...]
    skeletons: tuple[Path, ...]
    version: str

    def find(self, name: str) -> Path | None:
        return next((folder / name for folder in self.folders(name) if (folder / name).is_file()), None)

    def folders(self, name: str) -> tuple[Path, ...]:
        return self.programs if name == NET_RUN else self.skeletons if name.endswith("Skel.so") else self.libraries


def needed_files(
    facts: DeviceFacts, backend: str, *, tool: bool, dlc: bool = False, extensions: bool = False
) -> list[str]:
    """Names of the files that ``backend`` needs on a device.

    Args:
        tool: qnn-net-run too.
        dlc: the model is a DLC, which it composes itself.
        extensions: there is a configuration of the backend, which a library of its own reads.

    Raises:
        BackendUnavailableError: the device's Hexagon architecture, which is part of the names, is unknown.
    """
    names = [NET_RUN] if tool else []
    if backend == "htp":
        if facts.htp_arch is None:
            raise BackendUnavailableError(
                f"device {facts.serial}: its SoC is unknown ({facts.soc_text or 'it tells none'}), so it can't be said which "
                "libraries its HTP needs"
            )
        arch = facts.htp_arch
        names += ["libQnnHtp.so", "libQnnHtpPrepare.so", "libQnnSystem.so"]
        names += [f"libQnnHtpV{arch}Stub.so", f"libQnnHtpV{arch}Skel.so"]
    else:
        names += [{"gpu": "libQnnGpu.so", "cpu": "libQnnCpu.so"}[backend], "libQnnSystem.so"]
    if dlc:
        names.append("libQnnModelDlc.so")
    if extensions:
        names.append({"htp": "libQnnHtpNetRunExtensions.so", "gpu": "libQnnGpuNetRunExtensions.so"}[backend])
    return names


def find_runtime(
    facts: DeviceFacts,
    backend: str,
    runtime_folder: Path | None,
    *,
    tool: bool,
    dlc: bool = False,
    extensions: bool = False,
) -> RuntimeFiles:
    """The files of the runtime for a backend on a device.

    They are looked for in ``runtime_folder`` (an SDK, or a folder that has them side by side), else in ``QNN_SDK_ROOT``, else
    on the device. Only the first of these that is given is taken, for the rest may be of another release.

    Args:
        tool, dlc, extensions: see :func:`needed_files`.

    Raises:
        BackendUnavailableError: a file is missing, is for another machine, or files are of different releases. The message
            names the file and the folders.
    """
    names = needed_files(facts, backend, tool=tool, dlc=dlc, extensions=extensions)
    place = _local_place(facts, runtime_folder)
    if place is None:
        return _on_device(facts, backend, names)
    found = {name: place.find(name) for name in names}
    local = {name: path for name, path in found.items() if path is not None}
    if missing := [name for name in names if name not in local]:
        folders = dict.fromkeys(str(folder) for name in missing for folder in place.folders(name))
        searched = ", ".join(folders) or f"it has no folder for {_wanted_target(facts)}"
        raise BackendUnavailableError(
            f"{backend} on device {facts.serial}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing in "
            f"{place.origin} (searched: {searched}): name a QNN SDK, or a folder with the device's whole runtime, with "
            "device_runtime or QNN_SDK_ROOT"
        )
    stand_ins = {name for name, path in local.items() if _check_machine(path, facts)}
    version = _one_version(local, place, facts)
    return RuntimeFiles(local, {}, place.origin, version, stand_in=bool(stand_ins))


# --- on this host -----------------------------------------------------------------------------------------------------


def _local_place(facts: DeviceFacts, runtime_folder: Path | None) -> _Place | None:
    if runtime_folder is not None:
        folder, origin = runtime_folder, f"device_runtime {runtime_folder}"
    elif root := os.environ.get("QNN_SDK_ROOT"):
        folder, origin = Path(root).expanduser().absolute(), f"QNN_SDK_ROOT {root}"
    else:
        return None
    if not folder.is_dir():
        raise BackendUnavailableError(
            f"{origin} is no folder: name the QNN SDK's, or one with the device's runtime (device_runtime, QNN_SDK_ROOT)"
        )
    version = read_version(folder)
    if not (folder / "lib").is_dir():
        return _Place(origin, (folder,), (folder,), (folder,), version)
    targets = _targets(folder, facts)
    arch = facts.htp_arch
    return _Place(
        origin,
        tuple(folder / "bin" / target for target in targets),
        tuple(folder / "lib" / target for target in targets),
        (folder / "lib" / f"hexagon-v{arch}" / "unsigned",) if arch is not None else (),
        version,
    )


def _targets(root: Path, facts: DeviceFacts) -> list[str]:
    """The SDK's folders for the device's system; one, for their libraries don't mix."""
    if facts.os == "android":
        return [ANDROID]
    prefixes = LINUX[::-1] if "ubuntu" in facts.release.lower() else LINUX
    for prefix in prefixes:
        found = [path.name for path in (root / "lib").glob(f"{prefix}*") if path.is_dir()]
        if found:
            return [max(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name.removeprefix(prefix))])]
    return []


def _wanted_target(facts: DeviceFacts) -> str:
    return ANDROID if facts.os == "android" else " or ".join(f"{prefix}*" for prefix in LINUX)


def _check_machine(path: Path, facts: DeviceFacts) -> bool:
    """Whether a file is a stand-in's.

    Raises:
        BackendUnavailableError: it isn't for this device.
    """
    with path.open("rb") as f:
        head = f.read(_HEAD)
    if _STAND_IN in head.lower():
        if facts.stand_in:
            return True
        raise BackendUnavailableError(
            f"{path} only stands in for Qualcomm's: device {facts.serial} is real, so name a real QNN SDK with device_runtime "
            "or QNN_SDK_ROOT"
        )
    if facts.stand_in:
        raise BackendUnavailableError(
            f"{path} is not for device {facts.serial}, which is {facts.stand_in}: name the stand-in's runtime with "
            "device_runtime, and unset QNN_SDK_ROOT"
        )
    wanted = HEXAGON if path.name.endswith("Skel.so") else AARCH64
    found = int.from_bytes(head[18:20], "little") if head[:4] == b"\x7fELF" else None
    if found != wanted or (wanted == AARCH64 and head[4] != 2):
        machines = {3: "x86", 40: "32-bit ARM", 62: "x86-64", AARCH64: "AArch64", HEXAGON: "Hexagon"}
        what = "no ELF file" if found is None else f"for {machines.get(found, f'machine {found}')}"
        raise BackendUnavailableError(
            f"{path} is {what}, but {machines[wanted]} is needed for device {facts.serial}: take the file from the SDK's folder "
            f"{f'lib/hexagon-v{facts.htp_arch}/unsigned' if wanted == HEXAGON else _wanted_target(facts)}"
        )
    return False


def _one_version(local: Mapping[str, Path], place: _Place, facts: DeviceFacts) -> str:
    """The release of the files, as they tell it, else as the SDK does.

    Raises:
        BackendUnavailableError: they tell different ones.
    """
    told = {name: version for name, path in local.items() if (version := library_version(path))}
    if len(set(told.values())) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in told.items())
        raise BackendUnavailableError(
            f"device {facts.serial}: the runtime in {place.origin} mixes releases ({listed}): take all files from one SDK"
        )
    return next(iter(told.values()), place.version)


_versions: dict[tuple[str, int, int], str] = {}


def library_version(path: Path) -> str:
    """The release that a library of QNN has written in it ("2.51.0.260929181845"); empty if it tells none, or several."""
    stat = path.stat()
    key = (os.fspath(path), stat.st_size, stat.st_mtime_ns)
    if key not in _versions:
        found = set(_release_texts(path)) if stat.st_size else set()
        _versions[key] = found.pop() if len(found) == 1 else ""
    return _versions[key]


def _release_texts(path: Path) -> Iterator[str]:
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for match in _MIXED.finditer(content):
            yield match[1].decode()


# --- on the device ----------------------------------------------------------------------------------------------------


def _on_device(facts: DeviceFacts, backend: str, names: list[str]) -> RuntimeFiles:
    there: dict[str, str] = {}
    for path in facts.runtime:
        there.setdefault(PurePosixPath(path).name, path)
    missing = [name for name in names if name not in there]
    if missing:
        has = f"it has {', '.join(sorted(there))}" if there else "it has none of QNN's libraries where they usually are"
        raise BackendUnavailableError(
            f"{backend} on device {facts.serial}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing on the "
            f"device ({has}): install the QNN SDK here and set QNN_SDK_ROOT, or name a folder with the device's runtime with "
            "device_runtime; it is sent from there"
        )
    on_device = {name: there[name] for name in names}
    versions = {path: facts.runtime[path] for path in on_device.values() if facts.runtime[path]}
    if len(set(versions.values())) > 1:
        listed = ", ".join(f"{path} {version}" for path, version in versions.items())
        raise BackendUnavailableError(
            f"device {facts.serial}: the runtime on the device mixes releases ({listed}): send one with device_runtime or "
            "QNN_SDK_ROOT"
        )
    version = next(iter(versions.values()), "unknown")
    return RuntimeFiles({}, on_device, f"device {facts.serial}", version, stand_in=bool(facts.stand_in))
