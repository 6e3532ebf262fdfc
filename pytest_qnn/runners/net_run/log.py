"""What qnn-net-run logs: the line of success, the ways in which it fails that are known, and what to do about each.

The words are those that real logs have in public issues and guides (QAIRT 2.20 to 2.50). "AEE" codes such as 0x80000406 come
from the DSP's own loader.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from dataclasses import dataclass

from pytest_qnn.errors import (
    ArtifactError,
    BackendUnavailableError,
    CompileError,
    DeviceFileError,
    DeviceSpaceError,
    ExecutionError,
    QnnError,
    RuntimeCrashError,
)

SUCCESS = "Finished Executing Graphs"
STAND_IN_MARK = "QNN SDK STAND-IN"  # in each log line with which a stand-in of Qualcomm's tools names itself
TAIL_LINES = 8
_COLOR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Surroundings:
    """What the program was given, for messages.

    Attributes:
        subject: model and place.
        what: file that it was to run, e.g. "conv.bin".
        library_path, dsp_path: LD_LIBRARY_PATH and ADSP_LIBRARY_PATH.
        htp_arch: of the device, e.g. 75; None if that is unknown or doesn't matter.
    """

    subject: str
    what: str
    library_path: str
    dsp_path: str
    htp_arch: int | None = None

    @property
    def stub(self) -> str:
        """The library that talks to the DSP, and where it is looked for."""
        return f"libQnnHtpV{self.htp_arch or 'NN'}Stub.so along LD_LIBRARY_PATH={self.library_path}"

    @property
    def skeleton(self) -> str:
        """The library that the DSP loads, and where it is looked for."""
        return f"libQnnHtpV{self.htp_arch or 'NN'}Skel.so along ADSP_LIBRARY_PATH={self.dsp_path}"


def lines_of(log: bytes) -> list[str]:
    """Lines of a log, without colors and control characters."""
    text = _COLOR.sub("", log.decode("utf-8", "replace"))
    lines = ["".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def succeeded(lines: list[str]) -> bool:
    """Whether the program says that it executed everything."""
    return any(line.rstrip(" .").endswith(SUCCESS) for line in lines)


def stand_in_notes(lines: list[str]) -> tuple[str, ...]:
    """What a stand-in says of itself; empty for the real program."""
    return tuple(dict.fromkeys(line[line.index(STAND_IN_MARK) :][:300] for line in lines if STAND_IN_MARK in line))


def tail(lines: list[str]) -> str:
    """The end of the log for a message: each line on one of its own."""
    return "".join(f"\n  {line[:300]}" for line in lines[-TAIL_LINES:])


def failure(code: int, lines: list[str], near: Surroundings) -> QnnError:
    """The error for a run that failed, by what its log says.

    Args:
        code: exit code; 128 + N if signal N ended it.
    """
    for pattern, make in _KNOWN:
        found = next((match for line in lines if (match := pattern.search(line))), None)
        if found:
            kind, text = make(found, near)
            return kind(f"{near.subject}: {text}. qnn-net-run ended with code {code}:{tail(lines)}")
    if code > 128:
        name = _signal_name(code - 128)
        hint = "the device's low-memory killer does that" if name == "SIGKILL" else "the runtime itself crashed"
        return RuntimeCrashError(
            f"{near.subject}: qnn-net-run died of {name} ({hint}) while it ran {near.what}. Try a smaller model or another "
            f"release of the runtime. The end of its log:{tail(lines) or ' (empty)'}"
        )
    if code in (126, 127) and not lines:
        lines = ["(it was not started)"]
    if code == 0:
        return ExecutionError(
            f"{near.subject}: qnn-net-run ended as if all were well, but never said {SUCCESS!r}, so nothing that it wrote can "
            f"be trusted. The end of its log:{tail(lines) or ' (empty)'}"
        )
    return ExecutionError(
        f"{near.subject}: qnn-net-run failed with code {code} on {near.what}. The end of its log:{tail(lines) or ' (empty)'}"
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# --- known failures, the most telling first -----------------------------------------------------------------------------

Found = re.Match[str]
Answer = tuple[type[QnnError], str]


def _space(found: Found, near: Surroundings) -> Answer:
    return DeviceSpaceError, "no space left on the device for what it writes: free some"


def _wrong_machine(found: Found, near: Surroundings) -> Answer:
    return BackendUnavailableError, (
        f"the runtime was built for another kind of device ({found[0].strip()}): take qnn-net-run and libraries of "
        "aarch64-android for Android and of aarch64-oe-linux for Linux"
    )


def _missing_library(found: Found, near: Surroundings) -> Answer:
    return BackendUnavailableError, (
        f"{found['name'].rpartition('/')[2]} is missing on the device or can't be loaded (LD_LIBRARY_PATH={near.library_path}): take the whole "
        "runtime of one release, see QNN_SDK_ROOT and --qnn-device-runtime"
    )


def _backend(found: Found, near: Surroundings) -> Answer:
    return BackendUnavailableError, (
        f"the device's linker could not load the backend ({found[1].strip()[:200] or 'no reason given'}; "
        f"LD_LIBRARY_PATH={near.library_path}): take the whole runtime of one release"
    )


def _skeleton_missing(found: Found, near: Surroundings) -> Answer:
    return BackendUnavailableError, (
        f"the DSP did not find or load its skeleton ({found[0].strip()}): it looked for {near.skeleton}, separated by ';'. "
        "Put the one of hexagon-vNN/unsigned of the same release there. If it is there, this device may refuse "
        "unsigned ones"
    )


def _skeleton_refused(found: Found, near: Surroundings) -> Answer:
    return BackendUnavailableError, (
        f"the DSP refused its skeleton ({found[0].strip()}): {near.skeleton} must be of the same release as "
        f"{near.stub}, for this device's Hexagon version"
    )


def _stub(found: Found, near: Surroundings) -> Answer:
    return BackendUnavailableError, (
        f"the HTP's stub or the device's own libcdsprpc.so could not be loaded ({found[0].strip()}): it looked for "
        f"{near.stub}, and {near.skeleton}. All must be of one release"
    )


def _transport(found: Found, near: Surroundings) -> Answer:
    return BackendUnavailableError, (
        f"the HTP could not be opened ({found[0].strip()}): stub, skeleton and libQnnHtp.so must be of one release and for "
        f"this device. It looked for {near.stub}, and {near.skeleton}"
    )


def _other_release(found: Found, near: Surroundings) -> Answer:
    return ArtifactError, (
        f"the device's runtime did not take {near.what} ({found[0].strip()}): it was made by a newer release than the "
        "runtime's. Use one release for both"
    )


def _dsp_memory(found: Found, near: Surroundings) -> Answer:
    return ExecutionError, (
        f"the DSP has no memory left for {near.what} ({found[0].strip()}): close what else uses the HTP, or take a smaller "
        "model"
    )


def _context(found: Found, near: Surroundings) -> Answer:
    return ArtifactError, (
        f"the device's runtime did not take {near.what}: it was made for another SoC, by a newer release, or is damaged. "
        "Compile it again for this device"
    )


def _compile(found: Found, near: Surroundings) -> Answer:
    return CompileError, f"the device's runtime could not prepare {near.what} ({found[0].strip()[:200]})"


def _options(found: Found, near: Surroundings) -> Answer:
    return ExecutionError, (
        f"qnn-net-run did not take its configuration ({found[0].strip()[:200]}): this release of the runtime may lack an "
        "option that was asked for; leave it out"
    )


def _execution(found: Found, near: Surroundings) -> Answer:
    return ExecutionError, f"the backend failed while it executed {near.what}"


def _denied(found: Found, near: Surroundings) -> Answer:
    return BackendUnavailableError, (
        "the device doesn't let qnn-net-run run (permission denied): its folder may be mounted noexec; choose another one "
        "with --qnn-device-folder"
    )


def _not_found(found: Found, near: Surroundings) -> Answer:
    return DeviceFileError, (
        "qnn-net-run is not on the device, or was built for another system, whose program loader is missing here"
    )


def _inputs(found: Found, near: Surroundings) -> Answer:
    return ExecutionError, (
        f"qnn-net-run did not take its inputs ({found[0].strip()[:200]}): this release may read input lists in another way"
    )


_KNOWN: tuple[tuple[re.Pattern[str], Callable[[Found, Surroundings], Answer]], ...] = (
    (re.compile(r"No space left on device"), _space),
    (re.compile(r"wrong ELF class|bad ELF magic|Exec format error|has unexpected e_machine", re.I), _wrong_machine),
    (re.compile(r"CANNOT LINK EXECUTABLE.*library \"(?P<name>[^\"]{1,400})\""), _missing_library),
    (re.compile(r"dlopen failed: library \"(?P<name>[^\"]{1,400})\""), _missing_library),
    (re.compile(r"(?P<name>[\w.+-]{1,60}\.so[\w.]{0,10}): cannot open shared object file"), _missing_library),
    (re.compile(r"Unable to load backend\.?(.*)"), _backend),
    (re.compile(r"(qnn_open failed, |Unable to load lib )0x80000406"), _skeleton_missing),
    (re.compile(r"0x80000600|verify skel version|Skel version.*mismatch", re.I), _skeleton_refused),
    (re.compile(r"load ?Remote ?symbols.*4000|Failed to load skel, error: 4000", re.I), _stub),
    (re.compile(r"\b14001\b|error: 4000\b|Device Creation failure", re.I), _transport),
    (re.compile(r"err(or)?:? 5000\b"), _other_release),
    (re.compile(r"Could not create context from binary.*err(or)?:? 1002\b"), _dsp_memory),
    (re.compile(r"Could not create context from binary|Create From Binary failure", re.I), _context),
    (
        re.compile(r"backend config file schema.*|config file .* can't be parsed.*|[Bb]ackend [Ee]xtensions?.*fail.*"),
        _options,
    ),
    (
        re.compile(
            r"(Graph (Prepare|Finalize) failure|compos(e|ing) (the )?[Gg]raphs?|composeGraphs|not a DLC).*", re.I
        ),
        _compile,
    ),
    (re.compile(r"Graph Execution failure|Failed to execute|execute.*failed", re.I), _execution),
    (re.compile(r"((input (list|file)|Input list|Invalid input|input tensor).*|Could not open file.*)", re.I), _inputs),
    (re.compile(r"Permission denied|can't execute", re.I), _denied),
    (re.compile(r"qnn-net-run: (inaccessible or )?not found|qnn-net-run.*No such file or directory"), _not_found),
)
