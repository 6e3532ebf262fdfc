"""Whether an installed SDK can be used: its tools, its libraries, its release. For ``pytest-qnn doctor``."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pytest_qnn.artifacts.binary import runtime_release
from pytest_qnn.errors import QnnError
from pytest_qnn.sdk.installation import HOST, TOOLS, Sdk, is_python
from pytest_qnn.sdk.tool import ask

ANSWER_SECONDS = 60
LDD_SECONDS = 20
LIBRARIES = (
    "libQnnHtp.so",
    "libQnnHtpPrepare.so",
    "libQnnHtpNetRunExtensions.so",
    "libQnnCpu.so",
    "libQnnSystem.so",
    "libQnnModelDlc.so",
)
ELF = b"\x7fELF"


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. ``ok`` is None where it is neither good nor bad."""

    name: str
    ok: bool | None
    detail: str


def check_sdk(sdk: Sdk, seconds: float = ANSWER_SECONDS) -> Iterator[Finding]:
    """Check an SDK, thing by thing.

    Args:
        seconds: that a tool may take to answer.
    """
    yield Finding("QNN SDK", True, f"{sdk.root}, release {sdk.version}")
    here = runtime_release()
    if here is None or sdk.release is None:
        yield Finding(
            "SDK release", None, "can't be compared with onnxruntime-qnn: one of them doesn't tell its release"
        )
    elif sdk.release == here:
        yield Finding("SDK release", True, f"{here[0]}.{here[1]}, as in the installed onnxruntime-qnn")
    else:
        yield Finding(
            "SDK release",
            None,
            f"{sdk.release[0]}.{sdk.release[1]}, but the installed onnxruntime-qnn has {here[0]}.{here[1]}: context binaries "
            "of one may not load in the other, so make and run them with one release",
        )
    for name in TOOLS:
        yield _tool(sdk, name, seconds)
    yield _libraries(sdk)


def _tool(sdk: Sdk, name: str, seconds: float) -> Finding:
    try:
        path = sdk.tool(name)
        if missing := missing_libraries(sdk, path):
            return Finding(
                name, False, f"needs {', '.join(missing)}, which this host doesn't have: install the library"
            )
        question = "--help" if is_python(path) else "--version"
        code, text = ask(sdk, name, question, seconds)
    except QnnError as error:
        return Finding(name, False, str(error).removeprefix(f"{name}: "))
    except OSError as error:
        return Finding(name, False, f"can't be read: {error.strerror or error}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code is None:
        return Finding(name, False, f"didn't answer {question} within {seconds:g} s")
    if code:
        how = f"ended with code {code}" if code > 0 else f"died of signal {-code}"
        hint = ""
        if re.search(r"ModuleNotFoundError|ImportError|No module named", text):
            hint = ": it needs the Python that it was built for, set QNN_SDK_PYTHON to that"
        return Finding(name, False, f"{how} when asked {question}: {lines[-1][:200] if lines else 'no message'}{hint}")
    told = next((line for line in lines if re.search(r"v?\d+\.\d+\.\d+", line)), "")
    return Finding(name, True, told[:120] if question == "--version" and told else f"answers {question}")


def _libraries(sdk: Sdk) -> Finding:
    absent = [name for name in LIBRARIES if not (sdk.libraries / name).is_file()]
    if absent:
        return Finding("SDK libraries", False, f"lib/{HOST} has no {', '.join(absent)}: install the whole SDK")
    if shutil.which("ldd") is None:
        return Finding("SDK libraries", None, "not checked: this host has no ldd")
    for name in LIBRARIES:
        if missing := missing_libraries(sdk, sdk.libraries / name):
            return Finding(
                "SDK libraries", False, f"{name} needs {', '.join(missing)}, which this host doesn't have: install that"
            )
    return Finding("SDK libraries", True, f"{', '.join(LIBRARIES)}: nothing missing")


def missing_libraries(sdk: Sdk, file: Path) -> list[str]:
    """Names of the libraries that a program or library needs and this host doesn't find (ldd); none for a script.

    Raises:
        OSError: it can't be read.
    """
    with file.open("rb") as f:
        if f.read(4) != ELF:
            return []
    if (ldd := shutil.which("ldd")) is None:
        return []
    try:
        done = subprocess.run(
            [ldd, str(file)],
            env=sdk.environment() | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LDD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return []
    return list(dict.fromkeys(re.findall(r"^\s*(\S+) => not found", done.stdout, re.M)))
