"""QNN context binaries as data: graphs, tensors, encodings, and what they were made for, read from the ``.bin`` itself.

Qualcomm's libQnnSystem reads them, in a process of its own (:mod:`pytest_qnn.runners.context_info`). What it describes is
the binary's head: bytes altered in the compiled code or in the weights go unnoticed, there is no checksum in the format.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from pytest_qnn.devices.soc import SOCS, Soc
from pytest_qnn.errors import ArtifactError, BackendUnavailableError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.onnx_file import file_digest

HTP = 6  # QNN_BACKEND_ID_HTP
READ_SECONDS = 120.0

# Qnn_DataType_t -> its name without QNN_DATATYPE_, numpy's name of the type that holds it ("" where there is none)
DATA_TYPES = {
    0x0008: ("INT_8", "int8"),
    0x0016: ("INT_16", "int16"),
    0x0032: ("INT_32", "int32"),
    0x0064: ("INT_64", "int64"),
    0x0108: ("UINT_8", "uint8"),
    0x0116: ("UINT_16", "uint16"),
    0x0132: ("UINT_32", "uint32"),
    0x0164: ("UINT_64", "uint64"),
    0x0216: ("FLOAT_16", "float16"),
    0x0232: ("FLOAT_32", "float32"),
    0x0264: ("FLOAT_64", "float64"),
    0x0304: ("SFIXED_POINT_4", ""),  # two to a byte
    0x0308: ("SFIXED_POINT_8", "int8"),
    0x0316: ("SFIXED_POINT_16", "int16"),
    0x0332: ("SFIXED_POINT_32", "int32"),
    0x0404: ("UFIXED_POINT_4", ""),
    0x0408: ("UFIXED_POINT_8", "uint8"),
    0x0416: ("UFIXED_POINT_16", "uint16"),
    0x0432: ("UFIXED_POINT_32", "uint32"),
    0x0508: ("BOOL_8", "bool"),
    0x0608: ("STRING", ""),
}
_OTHER_FILES = (
    (b"\x7fELF", "a shared library: a model library becomes a context binary through qnn-context-binary-generator"),
    (b"PK\x03\x04", "a zip archive, perhaps a DLC: it becomes a context binary through qnn-context-binary-generator"),
)


@dataclass(frozen=True)
class TensorInfo:
    """A graph input or output of a context binary.

    Attributes:
        name: as the binary spells it.
        data_type: QNN's name of the type, e.g. "UFIXED_POINT_8".
        dtype: numpy name of what holds an element, e.g. "uint8"; empty for types that numpy doesn't have.
        shape: sizes, in the binary's own layout.
        encoding: of quantised values; None for others, and where it has a form that ONNX can't express.
        bits: bits that are used of each element, where the encoding says so.
        note: why the tensor can't be fed or read, if so.
    """

    name: str
    data_type: str
    dtype: str
    shape: tuple[int, ...]
    encoding: Encoding | None = None
    bits: int | None = None
    note: str = ""

    @property
    def size(self) -> int:
        """Bytes of one ``.raw`` file in the native type; 0 where numpy has no such type."""
        width = int(re.sub(r"\D", "", self.dtype) or 8) // 8
        return math.prod(self.shape) * width if self.dtype else 0

    def describe(self) -> str:
        """``x: UFIXED_POINT_8[1, 224, 224, 3]``"""
        return f"{self.name}: {self.data_type}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class GraphInfo:
    """One graph of a context binary.

    Attributes:
        memory: sizes (bytes) that the HTP tells of it, e.g. ``vtcm_bytes``, ``io_bytes``, ``constant_bytes``.
    """

    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    memory: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class ContextInfo:
    """What a context binary tells of itself.

    Attributes:
        path, sha256, size: the file.
        backend_id: QNN's number of the backend that made it; 6 is the HTP.
        build_id: release that made it, e.g. "v2.51.0.260929181845".
        core_api, backend_api, blob_version: versions of QNN's interfaces and of the format.
        blob_bytes: size of the compiled content, behind the head.
        soc_id: Qualcomm's number of the SoC; None where the binary doesn't say (older releases).
        htp_arch: Hexagon architecture, e.g. 75; None where the binary doesn't say.
    """

    path: Path
    sha256: str
    size: int
    backend_id: int
    build_id: str
    core_api: str
    backend_api: str
    blob_version: str
    blob_bytes: int
    soc_id: int | None
    htp_arch: int | None
    graphs: tuple[GraphInfo, ...]

    @property
    def soc(self) -> Soc | None:
        """The SoC that it was made for; None if it is unknown or not told."""
        return next((s for s in SOCS.values() if s.soc_id == self.soc_id), None)

    @property
    def shares_weights(self) -> bool:
        """Whether its graphs share weights, which the HTP tells and the simulator can't load."""
        return any(dict(g.memory).get("shared_weight_bytes") for g in self.graphs)

    @property
    def release(self) -> tuple[int, int] | None:
        """Release of the QNN SDK that made it, e.g. (2, 51)."""
        return release_of(self.build_id)

    @property
    def made_for(self) -> str:
        """``SM8650 (v75)``, as far as it is known."""
        name = self.soc.name if self.soc else f"SoC {self.soc_id}" if self.soc_id else "an unnamed SoC"
        return f"{name} (v{self.htp_arch})" if self.htp_arch else name

    def graph(self, name: str | None = None) -> GraphInfo:
        """The graph called ``name``, or the only one.

        Raises:
            ArtifactError: there are several and none is named, or none has that name.
        """
        names = ", ".join(repr(g.name) for g in self.graphs)
        if name is None:
            if len(self.graphs) > 1:
                raise ArtifactError(f"{self.path}: it has {len(self.graphs)} graphs ({names}): name one with graph=")
            return self.graphs[0]
        found = next((g for g in self.graphs if g.name == name), None)
        if found is None:
            raise ArtifactError(f"{self.path}: it has no graph {name!r}; it has {names}")
        return found


def read_context_binary(path: str | os.PathLike[str], timeout: float = READ_SECONDS) -> ContextInfo:
    """Read what a context binary contains, whoever made it.

    Args:
        timeout: seconds after which reading is given up.

    Raises:
        ArtifactError: missing, empty, truncated, damaged, or not a context binary. Bytes altered beyond the head of the
            file are not noticed: the format has no checksum.
        BackendUnavailableError: there is no libQnnSystem here that could read it.
    """
    file = Path(path).expanduser().absolute()
    size = _check_file(file)
    digest = file_digest(file)
    library = find_system_library()
    answer = _ask(library, file, size, timeout)
    if "unusable" in answer:
        raise BackendUnavailableError(
            f"{file}: it can't be read, because {library} doesn't work here ({answer['unusable']}): install "
            "'pytest-qnn[sim]' on x86-64 Linux"
        )
    if "damaged" in answer:
        raise _not_a_binary(file, size, answer["damaged"])
    graphs = tuple(_graph(g) for g in answer.pop("graphs"))
    return ContextInfo(path=file, sha256=digest, size=size, graphs=graphs, **answer)


def check_runs_on(info: ContextInfo, soc: Soc, simulated: bool = False) -> tuple[str, ...]:
    """Make sure that a context binary was made for the HTP of ``soc`` and by a QNN release that the one here can load.

    The runtime checks neither: on x86-64 a binary for one SoC loads under any other.

    Args:
        simulated: whether it is to run on the simulator, which dies of binaries whose graphs share weights.

    Returns:
        What couldn't be checked, because the binary doesn't tell.

    Raises:
        ArtifactError: it was made for another backend, SoC or architecture, or by a newer release; or the simulator can't
            load it.
    """
    again = "Make it again for this SoC, or ask for the SoC that it was made for"
    if info.backend_id != HTP:
        raise ArtifactError(
            f"{info.path}: made for another QNN backend (number {info.backend_id}), not for the HTP ({HTP}). Make it with "
            "the HTP's library"
        )
    made = info.htp_arch or (info.soc.htp_arch if info.soc else None)
    if info.soc_id not in (None, soc.soc_id) or made not in (None, soc.htp_arch):
        raise ArtifactError(
            f"{info.path}: made for {info.made_for}, but {soc.name} (v{soc.htp_arch}) is asked for. {again}"
        )
    here = runtime_release()
    if info.release and here and info.release > here:
        raise ArtifactError(
            f"{info.path}: made by QNN {info.build_id}, newer than the runtime here ({here[0]}.{here[1]}): install a newer "
            "onnxruntime-qnn, or make the binary with an older SDK"
        )
    if simulated and info.shares_weights:
        raise ArtifactError(
            f"{info.path}: its graphs share weights, and the simulator can't load such binaries: run it on a device, or make "
            "one binary per graph"
        )
    if made is None:
        return (f"{info.path.name} doesn't tell which SoC it was made for: taken as one for {soc.name}",)
    return ()


def find_system_library() -> Path:
    """libQnnSystem.so: the installed onnxruntime-qnn's, else that of the SDK in ``QNN_SDK_ROOT``.

    Raises:
        BackendUnavailableError: there is none.
    """
    spec = util.find_spec("onnxruntime_qnn")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    if root := os.environ.get("QNN_SDK_ROOT"):
        folders.append(Path(root) / "lib" / "x86_64-linux-clang")
    for folder in folders:
        if (folder / "libQnnSystem.so").is_file():
            return folder / "libQnnSystem.so"
    raise BackendUnavailableError(
        "libQnnSystem.so, which reads context binaries, is not here: pip install 'pytest-qnn[sim]' (x86-64 Linux), or set "
        "QNN_SDK_ROOT to an installed QNN SDK"
    )


def runtime_release() -> tuple[int, int] | None:
    """Release of the QNN SDK inside the installed onnxruntime-qnn, e.g. (2, 51); None where it doesn't say."""
    spec = util.find_spec("onnxruntime_qnn")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "build_and_package_info.py"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if found := re.search(r"^qnn_version\s*=\s*(.+)$", text, re.M):
            return release_of(str(ast.literal_eval(found[1])))
    return None


def release_of(text: str) -> tuple[int, int] | None:
    """Release as numbers, e.g. (2, 51), from a text such as "v2.51.0.260929"; None from any other."""
    found = re.match(r"v?(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _check_file(file: Path) -> int:
    """Size of a file that may be a context binary."""
    try:
        if file.is_dir():
            raise ArtifactError(f"{file}: this is a folder; name the context binary (.bin) in it")
        if file.exists() and not file.is_file():  # a pipe or a device could be waited for without end
            raise ArtifactError(f"{file}: this is not a regular file; name a context binary (.bin)")
        with file.open("rb") as f:
            head = f.read(4)
            size = os.fstat(f.fileno()).st_size
    except OSError as error:
        raise ArtifactError(f"{file}: the context binary can't be read: {error.strerror}. Check the path") from None
    if not size:
        raise ArtifactError(f"{file}: the context binary is empty (0 bytes). Make or copy it again")
    if file.suffix == ".onnx":
        raise ArtifactError(f"{file}: this is an ONNX file, not a context binary; name the .bin beside it")
    for magic, what in _OTHER_FILES:
        if head == magic:
            raise ArtifactError(f"{file}: not a context binary but {what}")
    return size


def _not_a_binary(file: Path, size: int, why: str) -> ArtifactError:
    return ArtifactError(
        f"{file}: not a QNN context binary, or truncated or damaged ({size} bytes; {why}). Make or copy it again"
    )


def _ask(library: Path, file: Path, size: int, timeout: float) -> dict[str, Any]:
    """The answer of the program that loads ``library``."""
    command = [sys.executable, "-P", "-m", "pytest_qnn.runners.context_info", str(library), str(file)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False, start_new_session=True
        )
    except subprocess.TimeoutExpired:
        raise _not_a_binary(file, size, f"libQnnSystem did not come to an end with it within {timeout:g} s") from None
    except OSError as error:
        raise BackendUnavailableError(
            f"{file}: no process could be started to read it ({error.strerror or error}): free some memory or processes "
            "on this host"
        ) from error
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise _not_a_binary(file, size, f"libQnnSystem {_ending(done)} on it") from None
    return answer  # type: ignore[no-any-return]


def _ending(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        return f"died of {signal.Signals(-done.returncode).name}"
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return f"ended with code {done.returncode} ({lines[-1][:200] if lines else 'no message'})"


def _graph(graph: dict[str, Any]) -> GraphInfo:
    name, inputs, outputs = graph.pop("name"), graph.pop("inputs"), graph.pop("outputs")
    return GraphInfo(name, tuple(map(_tensor, inputs)), tuple(map(_tensor, outputs)), tuple(graph.items()))


def _tensor(tensor: dict[str, Any]) -> TensorInfo:
    number = tensor["data_type"]
    data_type, dtype = DATA_TYPES.get(number, (f"type {number:#06x}", ""))
    notes = [] if dtype else [f"numpy and ONNX runtimes have no array of {data_type}"]
    if tensor["data_format"]:
        notes.append(f"its memory has QNN's format {tensor['data_format']}, not a plain array")
    if tensor["dynamic"]:
        notes.append("it has dynamic dimensions")
    encoding, bits = None, None
    if raw := tensor["encoding"]:
        bits = raw.get("bits")
        if "scale" not in raw:
            notes.append(f"its encoding has QNN's form {raw['kind']}, which ONNX can't express")
        elif dtype in ("int8", "uint8", "int16", "uint16", "int32"):
            zero_points = tuple(-offset for offset in raw["offset"])  # QNN: scale * (q + offset)
            encoding = Encoding(tuple(raw["scale"]), zero_points, dtype, raw["axis"])
            if bits and bits != encoding.bits:
                notes.append(f"only {bits} of its {encoding.bits} bits are used")
    return TensorInfo(tensor["name"], data_type, dtype, tuple(tensor["shape"]), encoding, bits, "; ".join(notes))
