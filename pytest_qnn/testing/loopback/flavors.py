"""What is on a device before anybody used it: folders, tools, and the files of /sys that tell of its chip, heat and clocks.

All are plain files below the device's root folder; a test rewrites or removes them as it likes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

STAND_IN = "/run/pytest-qnn-stand-in"
MARK = "PYTEST_QNN_LOOPBACK"  # variable in the environment of every program on a device: the device's folder
BOOT_ID = "/run/boot_id"
LOGS = ("/run/log/logcat", "/run/log/kernel")

# The number in /sys/devices/soc0/soc_id (Linux: include/dt-bindings/arm/qcom,ids.h) and ro.board.platform. What isn't
# listed isn't known, and the device then lacks the file or the property.
CHIP_IDS = {
    "SM8350": 439,
    "SM8450": 457,
    "QCS6490": 498,
    "SM8550": 519,
    "SM8475": 530,
    "SC8380XP": 555,
    "SM8650": 557,
    "SM8635": 614,
    "SM8750": 618,
    "SM8850": 660,
}
PLATFORMS = {
    "SM8350": "lahaina",
    "SM8450": "taro",
    "SM8475": "taro",
    "SM8550": "kalama",
    "SM8650": "pineapple",
    "SM8750": "sun",
    "SM8850": "canoe",
}
ZONES = {"cpu-0-0-0": 41.0, "cpu-1-0-0": 42.5, "gpuss-0": 39.0, "nsphvx-0": 40.0, "nsphmx-0": 40.5, "battery": 30.0}
COOLING = {"thermal-cpufreq-0": 10, "thermal-devfreq-0": 6, "cdsp": 5}  # highest state
CORES, CORE_KHZ, GPU_HZ, DDR_HZ = 8, 2_265_600, 680_000_000, 2_092_000_000

# The tools of a device, as far as this host has them: toybox's on a phone, coreutils' and friends' on a board.
TOOLS = """
[ awk base64 basename cat chgrp chmod chown cksum clear cmp comm cp cut date dd df diff dirname du echo env expand
expr false file find flock fold free getconf grep groups gunzip gzip head hostname iconv ionice kill ln ls md5sum
mkdir mkfifo mktemp mv nice nl nohup nproc od paste patch pgrep pidof pkill printenv printf ps pwd readlink realpath
renice rev rm rmdir sed seq setsid sh sha1sum sha224sum sha256sum sha384sum sha512sum sleep sort split stat strings
stty sync tac tail tar taskset tee test time timeout top touch tr true truncate tty ulimit uniq unlink uptime uudecode
uuencode vmstat wc which who whoami xargs xxd yes zcat
"""

_GETPROP = """\
file=${FAKE_ROOT}/system/build.prop
if [ $# -eq 0 ]; then exec sed 's/^\\([^=]*\\)=\\(.*\\)$/[\\1]: [\\2]/' "$file"; fi
while IFS= read -r line; do
  case $line in "$1"=*) printf '%s\\n' "${line#"$1"=}"; exit 0;; esac
done < "$file"
printf '%s\\n' "$2"
"""
_LOGCAT = """\
file=${FAKE_ROOT}/run/log/logcat
follow=1 lines=
while [ $# -gt 0 ]; do
  case $1 in
    -d) follow=;;
    -c) : > "$file"; exit 0;;
    -t) follow= lines=$2; shift;;
    -t*) follow= lines=${1#-t};;
    -T) lines=$2; shift;;
    -v|-b|-s|-e|-m) shift;;
    -*) ;;
  esac
  shift
done
if [ "$follow" ]; then exec tail -n "${lines:-+1}" -f "$file"; fi
if [ "$lines" ]; then exec tail -n "$lines" "$file"; fi
exec cat "$file"
"""
_DMESG = 'exec cat "${FAKE_ROOT}/run/log/kernel"\n'
_DMESG_REFUSED = 'echo "dmesg: klogctl: Permission denied" >&2\nexit 1\n'
_DUMPSYS = """\
if [ "$1" != battery ]; then echo "Can't find service: $1" >&2; exit 20; fi
at=${FAKE_ROOT}/sys/class/power_supply/battery
get() { cat "$at/$1" 2>/dev/null || echo 0; }
echo 'Current Battery Service state:'
echo '  AC powered: false'
echo '  USB powered: true'
echo "  level: $(get capacity)"
echo '  scale: 100'
echo "  voltage: $(($(get voltage_now) / 1000))"
echo "  temperature: $(get temp)"
"""
_UNAME = """\
real=@REAL@
case $* in
  -m|-p|-i) echo aarch64; exit 0;;
esac
"$real" "$@" | sed 's/x86_64/aarch64/g'
"""
_ID = """\
case "$*" in
  "") echo 'uid=2000(shell) gid=2000(shell) groups=2000(shell),1007(log),3003(inet) context=u:r:shell:s0';;
  -u|-g|-G) echo 2000;;
  -un|-gn|"-u -n"|"-g -n") echo shell;;
  *) exec @REAL@ "$@";;
esac
"""
_WHOAMI = "echo shell\n"


def hide_host_processes(root: Path, flavor: str) -> None:
    """Take away the tools that end or list processes by name: without namespaces they would find this host's."""
    for tool in ("pkill", "pgrep", "pidof", "top"):
        (root / tools_folder(flavor).lstrip("/") / tool).unlink(missing_ok=True)


def tools_folder(flavor: str) -> str:
    """Where programs are on a device of this flavour."""
    return "/system/bin" if flavor == "android" else "/bin"


def build(
    root: Path,
    *,
    flavor: str,
    soc: str,
    htp_arch: int,
    name: str,
    runtime: bool,
    as_root: bool,
    properties: Mapping[str, str],
) -> dict[str, str]:
    """Make the device's files; returns its properties."""
    folders = ["dev/shm", "proc", "run/log", "tmp", "etc", "sys"]
    folders += ["data/local/tmp", "system/bin", "system/lib64", "vendor/lib64"] if flavor == "android" else []
    folders += ["bin", "home/root", "var/tmp", "var/log", "opt"] if flavor == "linux" else []
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("tmp", "var/tmp", "dev/shm"):
        if (root / folder).is_dir():
            (root / folder).chmod(0o1777)
    _write(root, STAND_IN, json.dumps({"stand_in": f"loopback device {name} ({flavor}) of pytest-qnn", "soc": soc}))
    _write(root, BOOT_ID, "")
    boot_id = root / "proc/sys/kernel/random/boot_id"  # without a root of its own: else the kernel's /proc is there
    boot_id.parent.mkdir(parents=True)
    boot_id.symlink_to("../../../../run/boot_id")
    _write(root, "/etc/passwd", "root:x:0:0:root:/:/bin/sh\nshell:x:2000:2000:shell:/:/bin/sh")
    _write(root, "/etc/group", "root:x:0:\nshell:x:2000:")
    _write(root, "/etc/hosts", "127.0.0.1 localhost")
    told = _properties(flavor, soc, name) | dict(properties)
    _tools(root, flavor, as_root)
    _chip(root, flavor, soc)
    _heat(root)
    _clocks(root)
    if flavor == "android":
        (root / "bin").symlink_to("system/bin")
        _write(root, "/system/build.prop", "\n".join(f"{key}={value}" for key, value in told.items()))
        _battery(root)
    else:
        release = ["ID=pytest-qnn-loopback", "NAME=Loopback", 'PRETTY_NAME="pytest-qnn loopback board"', "VERSION_ID=1"]
        _write(root, "/etc/os-release", "\n".join(release))
    if runtime:
        _runtime(root, flavor, htp_arch)
    return told


def _properties(flavor: str, soc: str, name: str) -> dict[str, str]:
    told = {
        "ro.product.name": "loopback",
        "ro.product.model": "pytest-qnn loopback",
        "ro.product.device": "loopback",
    }
    if flavor == "linux":
        return told
    told |= {
        "ro.product.manufacturer": "stand-in",
        "ro.product.cpu.abi": "arm64-v8a",
        "ro.product.cpu.abilist": "arm64-v8a",
        "ro.soc.manufacturer": "QTI",
        "ro.soc.model": soc,
        "ro.build.version.release": "15",
        "ro.build.version.sdk": "35",
        "ro.build.type": "user",
        "ro.debuggable": "0",
        "ro.serialno": name,
        "sys.boot_completed": "1",
    }
    if soc in PLATFORMS:
        told["ro.board.platform"] = PLATFORMS[soc]
    return told


def _tools(root: Path, flavor: str, as_root: bool) -> None:
    folder = root / tools_folder(flavor).lstrip("/")
    for tool in TOOLS.split():
        if path := _on_host(tool):
            (folder / tool).symlink_to(path)
    if real := _on_host("uname"):
        _script(folder / "uname", _UNAME.replace("@REAL@", real))
    real_id = _on_host("id")
    if real_id and as_root:
        (folder / "id").symlink_to(real_id)
    elif real_id:
        _script(folder / "id", _ID.replace("@REAL@", real_id))
        (folder / "whoami").unlink(missing_ok=True)
        _script(folder / "whoami", _WHOAMI)
    if flavor == "android":
        _script(folder / "getprop", _GETPROP)
        _script(folder / "logcat", _LOGCAT)
        _script(folder / "dumpsys", _DUMPSYS)
    _script(folder / "dmesg", _DMESG if as_root else _DMESG_REFUSED)


def _on_host(tool: str) -> str | None:
    path = shutil.which(tool, path="/usr/bin:/bin:/usr/sbin:/sbin")
    return os.path.realpath(path) if path else None


def _script(path: Path, body: str) -> None:
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)


def _chip(root: Path, flavor: str, soc: str) -> None:
    """As socinfo.c of mainline Linux tells it; phones' own kernels tell the platform for the machine."""
    if soc in CHIP_IDS:
        _write(root, "/sys/devices/soc0/soc_id", str(CHIP_IDS[soc]))
    _write(root, "/sys/devices/soc0/family", "Snapdragon")
    machine = PLATFORMS.get(soc, soc).upper() if flavor == "android" else soc
    _write(root, "/sys/devices/soc0/machine", machine)


def _heat(root: Path) -> None:
    for number, (kind, celsius) in enumerate(ZONES.items()):
        _write(root, f"/sys/class/thermal/thermal_zone{number}/type", kind)
        _write(root, f"/sys/class/thermal/thermal_zone{number}/temp", str(round(celsius * 1000)))
    for number, (kind, highest) in enumerate(COOLING.items()):
        _write(root, f"/sys/class/thermal/cooling_device{number}/type", kind)
        _write(root, f"/sys/class/thermal/cooling_device{number}/cur_state", "0")
        _write(root, f"/sys/class/thermal/cooling_device{number}/max_state", str(highest))


def _clocks(root: Path) -> None:
    for core in range(CORES):
        folder = f"/sys/devices/system/cpu/cpu{core}/cpufreq"
        _write(root, f"{folder}/scaling_cur_freq", str(CORE_KHZ))
        _write(root, f"{folder}/cpuinfo_max_freq", str(CORE_KHZ))
        _write(root, f"{folder}/scaling_max_freq", str(CORE_KHZ))
        _write(root, f"{folder}/scaling_min_freq", "364800")
        _write(root, f"{folder}/scaling_governor", "walt")
        _write(root, f"{folder}/scaling_available_governors", "performance powersave schedutil walt")
    for name in ("possible", "present", "online"):
        _write(root, f"/sys/devices/system/cpu/{name}", f"0-{CORES - 1}")
    _write(root, "/sys/class/kgsl/kgsl-3d0/gpuclk", str(GPU_HZ))
    _write(root, "/sys/class/devfreq/3d00000.qcom,kgsl-3d0/cur_freq", str(GPU_HZ))
    _write(root, "/sys/class/devfreq/soc:qcom,cpubw/cur_freq", str(DDR_HZ))


def _battery(root: Path) -> None:
    # µA (negative or positive while it discharges: makers differ), µV, %, tenths of °C
    facts: Sequence[tuple[str, str]] = (
        ("current_now", "-350000"),
        ("voltage_now", "4100000"),
        ("capacity", "87"),
        ("status", "Discharging"),
        ("temp", "300"),
    )
    for name, value in facts:
        _write(root, f"/sys/class/power_supply/battery/{name}", value)


def _runtime(root: Path, flavor: str, htp_arch: int) -> None:
    """Names of a QNN runtime's files; there is nothing in them that could be loaded."""
    folder = "/vendor/lib64" if flavor == "android" else "/opt/qcom/lib"
    skeletons = "/vendor/lib/rfsa/adsp" if flavor == "android" else "/dsp/cdsp"
    for name in ("libQnnHtp.so", "libQnnSystem.so", "libQnnCpu.so", f"libQnnHtpV{htp_arch}Stub.so"):
        _write(root, f"{folder}/{name}", f"stand-in for {name} v2.31.0.250130151446")
    name = f"libQnnHtpV{htp_arch}Skel.so"
    _write(root, f"{skeletons}/{name}", f"stand-in for {name}")


def _write(root: Path, path: str, text: str) -> None:
    place = root / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text + "\n")
