"""What a device is and has, asked in one round trip. What it doesn't tell is unknown; nothing that it tells is believed to
be more than text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pytest_qnn.devices.soc import Soc, SocClues, identify
from pytest_qnn.devices.transport import Transport
from pytest_qnn.errors import DeviceFileError

PROBE_SECONDS = 30.0
DEFAULT_FOLDERS = ("/data/local/tmp/pytest-qnn", "/var/tmp/pytest-qnn", "/tmp/pytest-qnn")
RUNTIME_FOLDERS = (
    "/vendor/lib64",
    "/vendor/bin",
    "/vendor/lib64/rfs/dsp",
    "/vendor/lib/rfsa/adsp",
    "/vendor/dsp/cdsp",
    "/system/lib64",
    "/usr/lib",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/lib",
    "/usr/bin",
    "/usr/local/bin",
    "/usr/lib/rfsa/adsp",
    "/usr/lib/dsp/cdsp",
    "/dsp/cdsp",
    "/opt/qcom/lib",
    "/opt/qcom/bin",
    "/opt/qcom/aistack/lib",
    "/opt/qcom/aistack/bin",
)
VERSION = re.compile(r"v(\d{1,3}\.\d{1,4}\.\d{1,6}\.\d{6,16})")  # of a QNN library, as it is written inside
SHOWN = 200  # characters of a value that a device tells
_COLD, _HOT = -40.0, 150.0
_NO_TEMPERATURE = re.compile(r"bcl|ibat|vbat|lvl|socd|step|trip", re.I)  # zones that carry currents, volts or levels
_BAD_PATH = re.compile(r"[\x00-\x1f\x7f]|(^|/)\.\.(/|$)")

# Words: the marker of this probe, Python or "", "own" or "default", candidates for the folder, "--", folders that may have a runtime.
# It runs under mksh with toybox, dash with coreutils, and ash with busybox.
_SCRIPT = r"""
mark=$1 python=$2 chosen=$3
shift 3
exec 2>/dev/null
limits=; timeout -s KILL 9 true && limits=yes
within() { if [ "$limits" ]; then timeout -s KILL "$@"; else shift; "$@"; fi; }
section() { printf '\n@@%s %s\n' "$mark" "$1"; }
prop() { if [ "$getprop" ]; then section "prop $1"; within 3 getprop "$1" | head -c 1000; fi; }
show() { section "file $1"; head -c 2000 "$1"; }
getprop=$(command -v getprop)
for name in ro.build.version.release ro.product.manufacturer ro.product.model ro.soc.model ro.board.platform ro.product.cpu.abi
do prop $name; done
section android
if [ -e /system/build.prop ] || [ -e /system/bin/app_process ] || [ -d /apex ]; then echo yes; fi
section uname; uname -s -r -m
section uid; id -u
section clock; date +%s
show /proc/sys/kernel/random/boot_id
show /sys/devices/soc0/soc_id
show /sys/devices/soc0/machine
show /run/pytest-qnn-stand-in
section 'file /etc/os-release'; head -c 4000 /etc/os-release
section 'file compatible'; head -c 2000 /proc/device-tree/compatible | tr '\000' '\n'
section 'file model'; head -c 500 /proc/device-tree/model | tr '\000' '\n'
section zones
for zone in /sys/class/thermal/thermal_zone*; do
  type= temp=
  read -r type < "$zone/type" && { read -r temp < "$zone/temp"; printf '%s\t%s\n' "$temp" "$type"; }
done | head -n 200
section folder
found=
while [ "$1" != -- ]; do
  dir=$1; shift
  [ "$found" ] && continue
  if [ "$chosen" = own ]; then mkdir -p "$dir"; else mkdir -m 755 "$dir"; fi
  if [ ! -d "$dir" ]; then printf '%s\tmissing\n' "$dir"; continue; fi
  if [ "$chosen" != own ] && { [ -L "$dir" ] || [ ! -O "$dir" ]; }; then printf '%s\tforeign\n' "$dir"; continue; fi
  try=$dir/try-$mark
  if ! printf '#!/bin/sh\necho runs\n' > "$try"; then rm -f "$try"; printf '%s\tunwritable\n' "$dir"; continue; fi
  chmod 755 "$try"
  [ -x /bin/sh ] || printf '#!/system/bin/sh\necho runs\n' > "$try"
  if [ "$(within 5 "$try")" = runs ]; then found=$dir; printf '%s\tgood\n' "$dir"; else printf '%s\tnoexec\n' "$dir"; fi
  rm -f "$try"
done
shift
section df
[ "$found" ] && df -Pk "$found"
section runtime
for dir in "$@"; do
  for file in "$dir"/libQnn*.so "$dir"/qnn-net-run; do
    if [ -f "$file" ]; then
      case $file in
        */libQnnHtp.so|*/libQnnCpu.so|*/libQnnGpu.so|*/libQnnHtpPrepare.so)
          version=$(within 5 grep -a -o -m 1 -E 'v[0-9]{1,3}\.[0-9]{1,4}\.[0-9]{1,6}\.[0-9]{6,16}' "$file" | head -n 1 | head -c 60);;
        *) version=;;
      esac
      printf '%s\t%s\n' "$version" "$file"
    fi
  done
done | head -c 100000
section python
if [ "$python" ]; then [ -x "$python" ] || python=; else python=$(command -v python3); fi
if [ "$python" ]; then
  printf '%s\n' "$python"
  cd / && within 10 "$python" -I -B -c '
import sys
print("python", sys.version.split()[0])
from importlib import metadata
for name in ("onnxruntime", "onnxruntime-qnn", "numpy"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
' | head -c 2000
fi
section end
"""

_MISSING = "can't be made"  # which is as it should be: no device has all of the usual folders
_FOLDER_TROUBLES = {
    "missing": _MISSING,
    "foreign": "belongs to another user of the device",
    "unwritable": "can't be written",
    "noexec": "allows no programs to be run from it (noexec)",
}


@dataclass(frozen=True)
class Python:
    """Python on a Linux device.

    Attributes:
        path: of the interpreter.
        version: e.g. "3.12.3"; None if it didn't tell.
        packages: versions of onnxruntime, onnxruntime-qnn and numpy, as far as they are installed.
    """

    path: str
    version: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceFacts:
    """What a device tells about itself.

    Attributes:
        serial, address: of the transport.
        os: "android" or "linux".
        release: e.g. "15", "Ubuntu 24.04.3 LTS"; "unknown".
        kernel: e.g. "6.6.56-android15"; "unknown".
        model: product, e.g. "Xiaomi 24129PN74C"; "unknown".
        abi: e.g. "arm64-v8a", "aarch64"; "unknown".
        soc: None if it is unknown or the device contradicts itself.
        soc_text: what else there is to say about the SoC: why it is unknown, or its other name; may be empty.
        root: whether commands run as root.
        folder: ours on the device, where files can be kept and programs run; empty if there is none.
        folder_text: why not, for each folder that was tried; with a folder, what is wrong with those that come before it.
        free_bytes: there; None if unknown.
        runtime: files of a QNN runtime on the device, by path, with the version that they tell or "".
        python: None if there is none, or on Android.
        zones: names of thermal zones.
        temperature_c: of the hottest of them, when this was asked; None if unknown.
        boot_id: changes with each start of the device; empty if unknown.
        clock: the device's, in seconds since 1970; None if unknown.
        stand_in: what the device is, if it only stands in for a real one; "" for a real one.
    """

    serial: str
    address: str
    os: str
    release: str = "unknown"
    kernel: str = "unknown"
    model: str = "unknown"
    abi: str = "unknown"
    soc: Soc | None = None
    soc_text: str = ""
    root: bool = False
    folder: str = ""
    folder_text: str = ""
    free_bytes: int | None = None
    runtime: Mapping[str, str] = field(default_factory=dict, hash=False)
    python: Python | None = field(default=None, hash=False)
    zones: tuple[str, ...] = ()
    temperature_c: float | None = None
    boot_id: str = ""
    clock: float | None = None
    stand_in: str = ""

    @property
    def htp_arch(self) -> int | None:
        """Version of its Hexagon tensor processor, e.g. 75; None if the SoC is unknown."""
        return self.soc.htp_arch if self.soc else None

    @property
    def runtime_versions(self) -> tuple[str, ...]:
        """Versions of QNN that the libraries on the device tell."""
        return tuple(sorted({version for version in self.runtime.values() if version}))

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"htp_arch": self.htp_arch, "zones": list(self.zones)}


def probe(
    transport: Transport, folder: str | None = None, python: str | None = None, timeout: float = PROBE_SECONDS
) -> DeviceFacts:
    """Ask a device what it is and has.

    Args:
        folder: on the device; made if it is missing. By default the first usable of :data:`DEFAULT_FOLDERS`. If it can't be
            used no other one is taken.
        python: path of the interpreter on the device, e.g. of a virtual environment; by default its python3.
        timeout: seconds for everything.

    Raises:
        DeviceLostError, DeviceTimeoutError: of the transport. What the device doesn't tell is no error.
        DeviceFileError: it has no shell that answers as one.
    """
    mark = transport.fresh_name()
    folders = [folder] if folder else list(DEFAULT_FOLDERS)
    words = [
        "sh",
        "-c",
        _SCRIPT,
        "probe",
        mark,
        python or "",
        "own" if folder else "default",
        *folders,
        "--",
        *RUNTIME_FOLDERS,
    ]
    done = transport.shell(words, timeout=timeout, limit=1 << 20)
    told = split_sections(done.stdout, mark)
    if "end" not in told:
        raise DeviceFileError(
            f"{transport.address}: its shell did not run the probe to its end (exit code {done.code}: "
            f"{clean(done.error) or 'nothing said'}): see what 'adb -s {clean(transport.serial)} shell echo works' says"
        )
    return read_facts(told, transport.serial, transport.address)


def split_sections(output: bytes, mark: str) -> dict[str, str]:
    """What stands behind each line ``@@MARK NAME``, by name; the first of a name counts."""
    sections: dict[str, str] = {}
    start = f"@@{mark} "
    for part in ("\n" + output.decode("utf-8", "replace").replace("\r\n", "\n")).split("\n" + start)[1:]:
        name, _, text = part.partition("\n")
        sections.setdefault(name.strip(), text.strip("\n"))
    return sections


def clean(text: object, limit: int = SHOWN) -> str:
    """A text from a device for one line of a message: nothing that a terminal obeys, and not long."""
    kept = "".join(c if c.isprintable() else " " for c in str(text))
    kept = " ".join(kept.split())
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def read_facts(told: Mapping[str, str], serial: str, address: str) -> DeviceFacts:
    """The facts in the sections of a probe."""

    def value(name: str) -> str:
        return clean(told.get(name, ""))

    release, system = value("prop ro.build.version.release"), value("uname").split(" ")
    android = bool(release) or bool(value("android"))  # boards with Linux may have a getprop too
    folder, folder_text = _folder(told.get("folder", ""))
    soc, soc_text = identify(
        SocClues(
            model=value("prop ro.soc.model"),
            machine=value("file /sys/devices/soc0/machine"),
            chip_id=_whole(value("file /sys/devices/soc0/soc_id")),
            compatible=tuple(clean(line) for line in told.get("file compatible", "").splitlines()[:50] if line.strip()),
            platform=value("prop ro.board.platform"),
        )
    )
    zones, hottest = _zones(told.get("zones", ""))
    product = [value("prop ro.product.manufacturer"), value("prop ro.product.model")]
    clock = _whole(value("clock"))
    return DeviceFacts(
        serial=serial,
        address=address,
        os="android" if android else "linux",
        release=release or ("" if android else _pretty_name(told.get("file /etc/os-release", ""))) or "unknown",
        kernel=(system[1] if len(system) == 3 else "") or "unknown",
        model=" ".join(filter(None, product)) or value("file model") or "unknown",
        abi=value("prop ro.product.cpu.abi") or (system[2] if len(system) == 3 else "") or "unknown",
        soc=soc,
        soc_text=soc_text,
        root=value("uid") == "0",
        folder=folder,
        folder_text=folder_text,
        free_bytes=read_free_bytes(told.get("df", "")) if folder else None,
        runtime=_runtime(told.get("runtime", "")),
        python=None if android else _python(told.get("python", "")),
        zones=zones,
        temperature_c=hottest,
        boot_id=value("file /proc/sys/kernel/random/boot_id"),
        clock=float(clock) if clock is not None else None,
        stand_in=_stand_in(told.get("file /run/pytest-qnn-stand-in", "")),
    )


def read_free_bytes(text: str) -> int | None:
    """Available bytes in the output of ``df -Pk``; None if it isn't there."""
    found = re.search(r"\s(\d{1,18})\s+(\d{1,18})\s+(-?\d{1,18})\s+\d{1,3}%\s", text + "\n")
    return max(0, int(found[3])) * 1024 if found else None


def plain_path(path: str) -> bool:
    """Whether this is an absolute path without "..", control characters and the like."""
    return path.startswith("/") and len(path) < 1000 and not _BAD_PATH.search(path)


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,12}", text) else None


def _pretty_name(text: str) -> str:
    found = re.search(r"^PRETTY_NAME=\"?([^\"\n]*)", text, re.M)
    return clean(found[1]) if found else ""


def _folder(text: str) -> tuple[str, str]:
    troubles: list[str] = []
    for line in text.splitlines():
        path, _, verdict = line.rpartition("\t")
        if verdict == "good" and plain_path(path):
            return path.rstrip("/") or "/", "; ".join(text for text in troubles if not text.endswith(_MISSING))
        troubles.append(f"{clean(path)} {_FOLDER_TROUBLES.get(verdict, 'can not be used')}")
    return "", "; ".join(troubles)


def _zones(text: str) -> tuple[tuple[str, ...], float | None]:
    """Names of thermal zones, and the highest plausible temperature in °C: the kernel writes thousandths, some drivers °C."""
    names, hottest = [], -math.inf
    for line in text.splitlines():
        raw, tab, name = line.partition("\t")
        if not tab or not name.strip():
            continue
        names.append(clean(name))
        if re.fullmatch(r"-?\d{1,9}", raw) and not _NO_TEMPERATURE.search(name):
            degrees = int(raw) / 1000 if abs(int(raw)) >= 1000 else float(raw)
            if _COLD < degrees < _HOT:
                hottest = max(hottest, degrees)
    return tuple(names), hottest if hottest > -math.inf else None


def _runtime(text: str) -> dict[str, str]:
    files = {}
    for line in text.splitlines()[:500]:
        version, tab, path = line.partition("\t")
        if tab and plain_path(path):
            found = VERSION.fullmatch(version.strip())
            files[path] = found[1] if found else ""
    return files


def _python(text: str) -> Python | None:
    lines = text.splitlines()
    if not lines or not plain_path(lines[0]):
        return None
    told: dict[str, str] = {}
    for line in lines[1:20]:
        found = re.fullmatch(r"(python|onnxruntime|onnxruntime-qnn|numpy) ([0-9A-Za-z.+!-]{1,60})", line.strip())
        if found:
            told[found[1]] = found[2]
    return Python(lines[0], told.pop("python", None), told)


def _stand_in(text: str) -> str:
    """What a stand-in says about itself. Whatever stands there: a device that has this file is none."""
    if not text.strip():
        return ""
    try:
        told = json.loads(text)
    except ValueError:
        told = text
    if isinstance(told, dict):
        told = told.get("stand_in") or told.get("name") or ", ".join(f"{key}: {value}" for key, value in told.items())
    return clean(told) or "a stand-in"
