"""The names that pytest must know in every run: markers and settings. Kept as plain as can be, for it is always loaded."""

from __future__ import annotations

from pathlib import Path

MARKERS = (
    "backend(*names, **options): run on these QNN backends (htp, cpu, gpu), with options of the backend",
    "device(soc=, htp_arch=, serial=, kind=): what the target must be",
    "tolerance(steps=, absolute=, relative=, sqnr_db=, cosine=, top_k=, output=): limits for assert_matches_reference",
    "latency_budget(p50_ms=, p95_ms=, p99_ms=, throughput_ips=, peak_memory_mb=, energy_mj=): limits for assert_latency",
)
DEVICE_SETTINGS = ("adb_server", "device_folder", "device_python", "device_runtime")  # how a device is reached and used
MARKER_NAMES = ("backend", "device", "tolerance", "latency_budget")


class Setting:
    """One thing that a project can configure: ``--qnn-<name>``, ``qnn_<name>``, ``[tool.pytest_qnn] <name>``.

    Attributes:
        name, help, metavar: for the command line.
        flag: a switch without a value on the command line.
        alone: what ``--qnn-<name>`` without a value means, where it may stand alone.
        ini: whether it may stand in pytest's ini file and in ``[tool.pytest_qnn]``.
    """

    __slots__ = ("alone", "flag", "help", "ini", "metavar", "name")

    def __init__(
        self, name: str, help: str, metavar: str = "", *, flag: bool = False, alone: str = "", ini: bool = True
    ) -> None:
        self.name, self.help, self.metavar = name, help, metavar
        self.flag, self.alone, self.ini = flag, alone, ini


SETTINGS = (
    Setting("backends", "backends of tests that have no backend mark", "NAMES"),
    Setting("target", "where models run: simulator (this x86-64 Linux host) or adb (attached devices)", "NAME"),
    Setting("device", "devices to use: serials as 'adb devices' shows them, or adb://SERIAL@HOST:PORT", "SERIALS"),
    Setting(
        "adb_server",
        "ADB server (default: ADB_SERVER_SOCKET, ANDROID_ADB_SERVER_PORT, else 127.0.0.1:5037)",
        "HOST:PORT",
    ),
    Setting(
        "runner", "what runs models on a device: net_run, ort, or auto (ort on Linux with Python, else net_run)", "NAME"
    ),
    Setting(
        "device_runtime",
        "folder with the device's QNN runtime (default: QNN_SDK_ROOT, else what the device has)",
        "DIR",
    ),
    Setting("device_python", "Python on the device, e.g. of a virtual environment (default: its python3)", "PATH"),
    Setting("device_folder", "folder on the device (default: the first writable of the usual ones)", "PATH"),
    Setting("device_limit_mb", "size limit of the files kept on a device, in MiB", "MIB"),
    Setting("device_wait", "seconds to wait for a device that somebody else uses", "SECONDS"),
    Setting("recover_timeout", "seconds to wait for a device that was lost", "SECONDS"),
    Setting("cool_down", "seconds that a device may cool down when it throttles while it is measured", "SECONDS"),
    Setting("record", "store everything that is asked of the device, and its answers, in DIR", "DIR", ini=False),
    Setting("replay", "answer from what --qnn-record stored in DIR, without the device", "DIR", ini=False),
    Setting("soc", "SoC to compile for and to simulate (default SM8650)", "SOC"),
    Setting(
        "require",
        "backends that must be there: a missing one is an error and not a skip (alone: whichever a test asks for)",
        "NAMES",
        alone="all",
    ),
    Setting("backend_config", 'JSON file with options of backends: {"htp_config": {...}, "gpu_config": ...}', "FILE"),
    Setting("cpu_library", "QNN's CPU backend library (libQnnCpu.so)", "FILE"),
    Setting("cache_dir", "folder of the cache of compiled models and reference results", "DIR"),
    Setting("cache_limit_mb", "size limit of that cache, in MiB", "MIB"),
    Setting("no_cache", "neither read nor fill that cache", flag=True),
    Setting("load_timeout", "seconds that compiling and loading a model may take", "SECONDS"),
    Setting("run_timeout", "seconds that one inference may take", "SECONDS"),
    Setting("memory_limit_mb", "memory that a runtime process may use, in MiB", "MIB"),
    Setting("strict_latency", "a latency budget that can't be decided fails the test", flag=True),
    Setting("simulated_latency", "compare latencies that were not measured on a Snapdragon with budgets", flag=True),
    Setting("no_layers", "don't judge layers alone to find where a failure starts", flag=True),
    Setting("artifacts", "keep a bundle of each failing case in DIR", "DIR"),
    Setting("artifacts_limit_mb", "size limit of that folder, in MiB", "MIB"),
    Setting("json", "write one record per judged run to FILE", "FILE", ini=False),
)


def project_folder(start: Path) -> Path:
    """The nearest folder from ``start`` upwards, within the repository, that has a ``pyproject.toml``; else ``start``."""
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").is_file():
            return folder
        if (folder / ".git").exists():
            break
    return start


def may_have_table(folder: Path) -> bool:
    """Whether ``folder/pyproject.toml`` may have a table of ours: a cheap look, without parsing."""
    try:
        text = (folder / "pyproject.toml").read_bytes()
    except OSError:
        return False
    return b"tool.pytest_qnn" in text or b"tool.pytest-qnn" in text
