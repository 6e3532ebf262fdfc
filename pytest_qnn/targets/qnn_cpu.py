"""Finding QNN's CPU backend library, and fetching it from the last wheel that has it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from pytest_qnn.errors import TargetError
from pytest_qnn.work_folder import work_folder

LIBRARY = "libQnnCpu.so"
WHEEL_VERSION = "2.3.0"  # the last release of onnxruntime-qnn whose wheels carry the CPU backend
WHEEL_TAGS = ("cp311", "manylinux_2_35_x86_64")
WHEEL_SHA256 = "087bb672ca0cabd3c7fed07084478fe78658cfa09fae1cb013099d7b2289dc72"
LIBRARY_SHA256 = "e9e83a4fb78163a276c679a3087ce680cad7f42fb5b561c08958a3e6ae7d6ccb"
FETCH_SECONDS = 900


class CpuLibraryMissing(TargetError):
    """There is no CPU library; the message says where it was looked for and how to get it."""


@dataclass(frozen=True)
class CpuLibrary:
    """A found library and where it came from."""

    path: Path
    origin: str


def cache_folder() -> Path:
    """Where ``pytest-qnn fetch cpu-backend`` puts the library."""
    from platformdirs import user_cache_path

    return user_cache_path("pytest-qnn") / f"onnxruntime-qnn-{WHEEL_VERSION}"


def find_cpu_library(configured: Path | None) -> CpuLibrary:
    """The library to use: configured path, then ``QNN_SDK_ROOT``, then the installed wheel, then the user's cache.

    Raises:
        CpuLibraryMissing: none of them has it, or the configured one doesn't exist.
    """
    if configured is not None:
        path = configured / LIBRARY if configured.is_dir() else configured
        if not path.is_file():
            raise CpuLibraryMissing(f"the configured cpu_library {configured} doesn't exist: correct the setting")
        return CpuLibrary(path.absolute(), "configured")
    sdk = os.environ.get("QNN_SDK_ROOT")
    if sdk and (path := Path(sdk, "lib", "x86_64-linux-clang", LIBRARY)).is_file():
        return CpuLibrary(path.absolute(), "QNN_SDK_ROOT")
    spec = util.find_spec("onnxruntime_qnn")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, LIBRARY)).is_file():
            return CpuLibrary(path, "installed wheel")
    cached = cache_folder() / "onnxruntime_qnn" / LIBRARY
    if cached.is_file():
        if _sha256(cached) != LIBRARY_SHA256:
            raise CpuLibraryMissing(f"{cached} was altered: run 'pytest-qnn fetch cpu-backend --force'")
        return CpuLibrary(cached, "fetched from the onnxruntime-qnn " + WHEEL_VERSION + " wheel")
    raise CpuLibraryMissing(
        f"{LIBRARY} was found neither in QNN_SDK_ROOT nor in the installed onnxruntime-qnn wheel (releases from 2.4 on "
        "lack it) nor in the cache: run 'pytest-qnn fetch cpu-backend'"
    )


def is_fetched() -> bool:
    """Whether the cache has the library, unaltered."""
    library = cache_folder() / "onnxruntime_qnn" / LIBRARY
    return library.is_file() and _sha256(library) == LIBRARY_SHA256


def fetch_cpu_library(force: bool = False) -> Path:
    """Download the wheel with pip, check it against its pinned SHA-256, and unpack the library into the cache.

    Two fetches at once don't disturb each other, and an interrupted one leaves nothing that could be taken for a result.

    Raises:
        TargetError: pip failed, or the folder can't be written.
    """
    from filelock import FileLock

    target = cache_folder()
    library = target / "onnxruntime_qnn" / LIBRARY
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f"{target.name}.lock"):
            if not force and is_fetched():
                return library
            with work_folder(target.parent) as work:
                _unpack(_download(work), work / "unpacked")
                if target.exists():
                    shutil.rmtree(target)
                (work / "unpacked").rename(target)
    except OSError as error:
        raise TargetError(f"{target}: can't be written: {error.strerror or error}") from error
    return library


def _download(work: Path) -> Path:
    requirements = work / "requirements.txt"
    requirements.write_text(f"onnxruntime-qnn=={WHEEL_VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    python, abi = "3.11", WHEEL_TAGS[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [
        "--only-binary=:all:",
        "--require-hashes",
        "--platform",
        WHEEL_TAGS[1],
        "--python-version",
        python,
    ]
    command += ["--implementation", "cp", "--abi", abi, "--dest", str(work), "-r", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise TargetError(f"pip did not finish within {FETCH_SECONDS} s; check the connection and try again") from error
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()[-3:]
        raise TargetError("pip could not download onnxruntime-qnn " + WHEEL_VERSION + ": " + " ".join(lines))
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> None:
    wanted = (
        "onnxruntime_qnn.libs/",
        "onnxruntime_qnn/" + LIBRARY,
        "onnxruntime_qnn/LICENSE",
        "onnxruntime_qnn/Qualcomm",
    )
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(wanted):
                archive.extract(name, folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
