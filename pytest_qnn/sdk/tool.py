"""Running one of the SDK's tools: in a folder of its own, until a deadline, with its log kept and its failure explained."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_qnn.errors import (
    ArtifactError,
    CompileError,
    OptionError,
    RuntimeCrashError,
    TargetError,
    TargetTimeoutError,
)
from pytest_qnn.model.onnx_file import file_digest
from pytest_qnn.sdk.installation import Sdk
from pytest_qnn.work_folder import work_folder

GUARD = Path(__file__).with_name("guard.py")
RECORD_SUFFIX = ".sdk.json"
END_SECONDS = 10
_ERROR_LINE = re.compile(r"\b(error|exception|failed|failure|fatal|invalid|cannot|can't|unable|refused)\b|Error:", re.I)
_HINTS = (
    (
        re.compile(r"ModuleNotFoundError|ImportError|No module named|libPy\w+|Failed to find necessary"),
        "The SDK's Python tools need the Python that they were built for, with the packages that the SDK's "
        "check-python-dependency names: set QNN_SDK_PYTHON (or --python) to it",
    ),
    (re.compile(r"ndk-build"), "Install the Android NDK and set ANDROID_NDK_ROOT to its folder"),
    (re.compile(r"clang\+*: .*not found|clang\+*: command not found"), "Install clang"),
    (
        re.compile(r"cannot open shared object file|libc\+\+"),
        "'pytest-qnn doctor' names the libraries that are missing",
    ),
    (
        re.compile(r"unrecognized arguments|unrecognized option|unknown option", re.I),
        "This release of the SDK lacks that option",
    ),
    (re.compile(r"No space left"), "Free some space on the disk"),
)


@dataclass(frozen=True)
class Step:
    """One tool's run: where it works, what it is about, how long it may take.

    Attributes:
        sdk: whose tool.
        tool: its name.
        subject: for messages, e.g. the model's file name.
        work: its folder, gone when the step is over.
        output: where its results go.
        log: where its log is kept.
        timeout: seconds.
    """

    sdk: Sdk
    tool: str
    subject: str
    work: Path
    output: Path
    log: Path
    timeout: float

    def run(self, arguments: Sequence[str]) -> None:
        """Run the tool with ``arguments``; the current folder is ``work``.

        Raises:
            CompileError: it ended with an error; its last error line is in the message.
            RuntimeCrashError: it died of a signal.
            TargetTimeoutError: it didn't end in time and was killed with everything it had started.
            TargetError: it couldn't be started.
        """
        command = [*self.sdk.command(self.tool), *arguments]
        with self.log.open("wb") as log:
            log.write(f"# QNN SDK {self.sdk.version} in {self.sdk.root}\n# {shlex.join(command)}\n".encode())
            log.flush()
            code = run_guarded(command, self.sdk.environment(), self.work, log.fileno(), self.timeout)
        if code == 0:
            return
        if code is None:
            raise TargetTimeoutError(
                f"{self.tool} on {self.subject}: not done after {self.timeout:g} s, and killed. Last line of its log: "
                f"{self._last_line()}. The log is {self.log}. Give it more time with timeout= (--timeout)"
            )
        where = f"The log is {self.log}"
        if code < 0:
            raise RuntimeCrashError(
                f"{self.tool} on {self.subject}: died of signal {-code} ({signal.Signals(-code).name}). Last line of its log: "
                f"{self._last_line()}. {where}. Try another release of the SDK, or a simpler model"
            )
        line = self._error_line()
        hint = next((text for pattern, text in _HINTS if pattern.search(line)), "Mend what the tool names")
        raise CompileError(f"{self.tool} on {self.subject}: ended with code {code}: {line}. {where}. {hint}")

    def _lines(self) -> list[str]:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in text.splitlines()]
        return [line for line in lines if line and not line.startswith("# ")]

    def _last_line(self) -> str:
        return (self._lines() or ["(it wrote nothing)"])[-1][:300].rstrip(".")

    def _error_line(self) -> str:
        lines = self._lines()
        return next((line for line in reversed(lines) if _ERROR_LINE.search(line)), self._last_line())[:300].rstrip(".")

    def made(self, *files: Path) -> None:
        """Make sure that the tool made these files.

        Raises:
            ArtifactError: one is missing or empty, although the tool reported success.
        """
        for file in files:
            if not file.is_file() or not file.stat().st_size:
                what = "is empty" if file.is_file() else "was not made"
                raise ArtifactError(
                    f"{self.tool} on {self.subject}: it ended as if all were well, but {file.name} {what}. Last line of its "
                    f"log: {self._last_line()}. The log is {self.log}. Try another release of the SDK"
                )

    def hand_over(self, files: Mapping[Path, Path], inputs: Sequence[Path], arguments: Sequence[str]) -> None:
        """Move results from ``work`` to where they belong, and write beside the first what made them from what.

        The record goes first and comes back last: while it is missing, nothing there can be taken for a finished result.
        """
        targets = list(files.values())
        record = record_file(targets[0])
        with suppress(FileNotFoundError):
            record.unlink()
        content = {
            "tool": self.tool,
            "sdk": self.sdk.version,
            "arguments": list(arguments),
            "inputs": {str(file): file_digest(file) for file in inputs},
            "outputs": {target.name: file_digest(made) for made, target in files.items()},
            "log": self.log.name,
        }
        for made, target in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(made, target)
        draft = self.work / record.name
        draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(draft, record)


@contextmanager
def step(sdk: Sdk, tool: str, subject: str, output: Path, log: str, timeout: float) -> Iterator[Step]:
    """A :class:`Step` whose work folder lies beside its results and is gone afterwards, however it ends.

    Raises:
        ArtifactError: ``output`` can't be written.
        BackendUnavailableError: the SDK has no such tool.
        OptionError: ``timeout`` isn't a number of seconds.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
        raise OptionError(f"timeout must be a number of seconds greater than 0, got {timeout!r}")
    sdk.tool(tool)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with work_folder(output) as work:
            yield Step(sdk, tool, subject, work, output, output / log, float(timeout))
    except OSError as error:
        raise ArtifactError(f"{output}: can't be written: {error.strerror or error}") from error


def run_guarded(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, log: int, timeout: float
) -> int | None:
    """Run a command in ``folder`` until it ends; None if that was not before ``timeout`` seconds.

    Whatever ends this call, an interrupt too, ends the command and what it started; so does the death of this process,
    which also removes ``folder``.

    Args:
        log: descriptor that gets its output.

    Returns:
        Exit code; negative: the signal that it died of.
    """
    lifeline, ours = os.pipe()
    try:
        guarded = [sys.executable, "-I", "-S", str(GUARD), str(lifeline), str(folder), *command]
        try:
            process = subprocess.Popen(
                guarded,
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lifeline,),
                start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
            )
        except OSError as error:
            raise TargetError(
                f"{command[0]} can't be started: {error.strerror or error}: free some processes"
            ) from error
        finally:
            os.close(lifeline)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            os.close(ours)
            ours = -1
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        if ours >= 0:
            os.close(ours)


def ask(sdk: Sdk, tool: str, argument: str, timeout: float) -> tuple[int | None, str]:
    """Exit code and output of a tool's ``--help`` or ``--version``; code None if it didn't answer in time.

    Raises:
        BackendUnavailableError: the SDK has no such tool.
        TargetError: it couldn't be started.
    """
    command = [*sdk.command(tool), argument]
    with work_folder() as work, tempfile.TemporaryFile() as log:
        code = run_guarded(command, sdk.environment(), work, log.fileno(), timeout)
        log.seek(0)
        return code, log.read().decode(errors="replace")


def record_file(result: Path) -> Path:
    """Where the record of how a result was made lies."""
    return result.with_name(result.name + RECORD_SUFFIX)


def check_record(result: Path) -> str:
    """Make sure that the files which one step made together still are what it made; without a record nothing is known.

    Returns:
        Which tool of which release made it; empty without a record.

    Raises:
        ArtifactError: one is missing or was altered since, or the record is broken.
    """
    record = record_file(result)
    if not record.is_file():
        return ""
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
        outputs, maker = told["outputs"].items(), f"{told['tool']} of the QNN SDK {told['sdk']}"
        if any(Path(name).name != name or not name for name, _ in outputs):
            raise ValueError("not a file name")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ArtifactError(
            f"{record}: not a record of the SDK's tools: run the step again, or remove the file"
        ) from None
    for name, digest in outputs:
        file = result.with_name(name)
        if not file.is_file():
            raise ArtifactError(f"{file}: missing, although {record.name} names it: run the step again")
        if file_digest(file) != digest:
            raise ArtifactError(
                f"{file}: altered since the SDK's tool made it (its SHA-256 differs): run the step again"
            )
    return maker
