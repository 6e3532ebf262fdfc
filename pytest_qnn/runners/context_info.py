"""A program that asks libQnnSystem what a QNN context binary contains, and prints that as one JSON object.

``python -P -m pytest_qnn.runners.context_info LIBRARY FILE``: a process of its own, because Qualcomm's library is native
code that may crash or run away on a damaged file. :mod:`pytest_qnn.artifacts.binary` is the caller.

The layouts below are those of the public headers ``QnnTypes.h``, ``QnnCommon.h``, ``System/QnnSystemInterface.h``,
``System/QnnSystemContext.h`` and ``HTP/QnnHtpSystemContext.h`` (QNN API 2.40, QAIRT 2.51), for x86-64 Linux. The library
describes older binaries too: versions 1 and 2 of its binary information carry no SoC and no architecture.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import resource
import sys
from ctypes import POINTER, Structure, Union, byref, c_char_p, c_float, c_int32, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Any

CPU_SECONDS = 60
SPARE_BYTES = 2 << 30  # address space beside the file itself
MOST_RANK, MOST_TENSORS, MOST_GRAPHS, MOST_CHANNELS = 16, 65_536, 4_096, 1 << 20
GRAPH_BLOB_V1_BYTES, GRAPH_BLOB_V2_BYTES = 40, 72


class DamagedError(Exception):
    """What the library returned can't be true."""


class _Version(Structure):
    _fields_ = (("major", c_uint32), ("minor", c_uint32), ("patch", c_uint32))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


class _Interface(Structure):
    _fields_ = (
        ("backend_id", c_uint32),
        ("provider", c_char_p),
        ("api", _Version),
        ("context_create", c_void_p),
        ("context_get_binary_info", c_void_p),
        ("context_get_metadata", c_void_p),
        ("context_free", c_void_p),
    )


class _ScaleOffset(Structure):
    _fields_ = (("scale", c_float), ("offset", c_int32))


class _AxisScaleOffset(Structure):
    _fields_ = (("axis", c_int32), ("count", c_uint32), ("pairs", POINTER(_ScaleOffset)))


class _WidthScaleOffset(Structure):
    _fields_ = (("bits", c_uint32), ("scale", c_float), ("offset", c_int32))


class _WidthAxisScaleOffset(Structure):
    _fields_ = (
        ("bits", c_uint32),
        ("axis", c_int32),
        ("count", c_uint32),
        ("scales", POINTER(c_float)),
        ("offsets", POINTER(c_int32)),
    )


class _Quantization(Union):
    _fields_ = (
        ("tensor", _ScaleOffset),
        ("axis", _AxisScaleOffset),
        ("width", _WidthScaleOffset),
        ("width_axis", _WidthAxisScaleOffset),
    )


class _QuantizeParams(Structure):
    _fields_ = (("definition", c_uint32), ("kind", c_uint32), ("values", _Quantization))


class _Buffer(Structure):
    _fields_ = (("data", c_void_p), ("size", c_uint32))


class _TensorV2(Structure):  # version 1 is the same without the last three fields
    _fields_ = (
        ("id", c_uint32),
        ("name", c_char_p),
        ("type", c_uint32),
        ("data_format", c_uint32),
        ("data_type", c_uint32),
        ("quantization", _QuantizeParams),
        ("rank", c_uint32),
        ("dimensions", POINTER(c_uint32)),
        ("memory_type", c_uint32),
        ("buffer", _Buffer),
        ("dynamic", POINTER(c_uint8)),
        ("sparse", c_uint32 * 3),
        ("produced", c_uint8),
    )


class _Tensor(Structure):
    _fields_ = (("version", c_uint32), ("value", _TensorV2))


class _GraphV3(Structure):  # version 1 ends after the outputs, version 2 after the updatable tensors
    _fields_ = (
        ("name", c_char_p),
        ("input_count", c_uint32),
        ("inputs", POINTER(_Tensor)),
        ("output_count", c_uint32),
        ("outputs", POINTER(_Tensor)),
        ("updatable_count", c_uint32),
        ("updatable", POINTER(_Tensor)),
        ("blob_size", c_uint32),
        ("blob", c_void_p),
        ("start_op", c_uint32),
        ("end_op", c_uint32),
    )


class _Graph(Structure):
    _fields_ = (("version", c_uint32), ("value", _GraphV3))


_HEAD = (
    ("backend_id", c_uint32),
    ("build_id", c_char_p),
    ("core_api", _Version),
    ("backend_api", _Version),
    ("soc_version", c_char_p),
)
_CONTENT = (
    ("blob_bytes", c_uint64),
    ("context_tensor_count", c_uint32),
    ("context_tensors", POINTER(_Tensor)),
    ("graph_count", c_uint32),
    ("graphs", POINTER(_Graph)),
)


class _InfoV2(Structure):  # version 1 is the same without the last field
    _fields_ = (
        *_HEAD,
        ("hardware_version", _Version),
        ("blob_version", _Version),
        ("hardware_bytes", c_uint32),
        ("hardware", c_void_p),
        *_CONTENT,
        ("platform", c_void_p),
    )


class _InfoV3(Structure):
    _fields_ = (
        *_HEAD,
        ("blob_version", _Version),
        *_CONTENT,
        ("platform", c_void_p),
        ("metadata_bytes", c_uint32),
        ("metadata", c_void_p),
        ("soc_id", c_uint32),
    )


class _Infos(Union):
    _fields_ = (("v2", _InfoV2), ("v3", _InfoV3))


class _Info(Structure):
    _fields_ = (("version", c_uint32), ("value", _Infos))


class _GraphBlobV1(Structure):
    _fields_ = (
        ("spill_fill_bytes", c_uint64),
        ("vtcm", c_uint32),
        ("optimization_level", c_uint32),
        ("dlbc", c_uint8),
        ("hvx_threads", c_uint64),
    )


class _GraphBlobV2(Structure):
    _fields_ = (
        ("version", c_uint32),
        ("native_k_bytes", c_uint64),
        ("native_v_bytes", c_uint64),
        ("shares_io", c_uint32),
        ("io_bytes", c_uint64),
        ("op_data_bytes", c_uint64),
        ("constant_bytes", c_uint64),
        ("ddr_bytes", c_uint64),
        ("shared_weight_bytes", c_uint64),
    )


def describe(library: str, file: str) -> dict[str, Any]:
    """What ``library`` (libQnnSystem.so) says of the context binary ``file``.

    Raises:
        DamagedError: the library refuses the file, or what it says can't be true.
        OSError: the library or the file can't be opened.
    """
    interface = _interface(library)
    with open(file, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        content = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY)
    create = ctypes.CFUNCTYPE(c_uint64, POINTER(c_void_p))(interface.context_create)
    read = ctypes.CFUNCTYPE(c_uint64, c_void_p, c_void_p, c_uint64, POINTER(POINTER(_Info)))(
        interface.context_get_metadata
    )
    handle, found = c_void_p(), POINTER(_Info)()
    if code := create(byref(handle)):
        raise OSError(f"{library}: systemContextCreate failed with error {code}")
    start = ctypes.addressof(ctypes.c_char.from_buffer(content))
    if code := read(handle, start, size, byref(found)):
        raise DamagedError(f"QNN error {code}")
    if not found:
        raise DamagedError("libQnnSystem says nothing of it")
    return _info(found.contents, size)


def _interface(library: str) -> _Interface:
    providers, count = POINTER(POINTER(_Interface))(), c_uint32()
    loaded = ctypes.CDLL(library)
    if loaded.QnnSystemInterface_getProviders(byref(providers), byref(count)) or not count.value:
        raise OSError(f"{library}: it offers no system interface")
    interface: _Interface = providers[0].contents
    if interface.api.major != 1 or not interface.context_get_metadata:
        raise OSError(f"{library}: its system interface {interface.api} can't be used here")
    return interface


def _info(info: _Info, size: int) -> dict[str, Any]:
    if info.version not in (1, 2, 3):
        raise DamagedError(f"binary information of version {info.version}")
    value = info.value.v3 if info.version == 3 else info.value.v2
    if value.blob_bytes > size:
        raise DamagedError(f"{value.blob_bytes} bytes of content in a file of {size}")
    if not 0 < value.graph_count <= MOST_GRAPHS or not value.graphs:
        raise DamagedError(f"{value.graph_count} graphs")
    arch = None
    if info.version == 3 and value.metadata and value.metadata_bytes >= 8:
        version, number = (c_uint32 * 2).from_address(value.metadata)
        arch = number if version == 1 and number else None
    return {
        "backend_id": value.backend_id,
        "build_id": _text(value.build_id),
        "core_api": str(value.core_api),
        "backend_api": str(value.backend_api),
        "blob_version": str(value.blob_version),
        "blob_bytes": value.blob_bytes,
        "soc_id": (value.soc_id or None) if info.version == 3 else None,
        "htp_arch": arch,
        "graphs": [_graph(value.graphs[i]) for i in range(value.graph_count)],
    }


def _graph(graph: _Graph) -> dict[str, Any]:
    if graph.version not in (1, 2, 3):
        raise DamagedError(f"graph information of version {graph.version}")
    value = graph.value
    return {
        "name": _text(value.name),
        "inputs": _tensors(value.inputs, value.input_count),
        "outputs": _tensors(value.outputs, value.output_count),
        **(_memory(value.blob, value.blob_size) if graph.version == 3 and value.blob else {}),
    }


def _memory(blob: int, size: int) -> dict[str, Any]:
    """Sizes (bytes) from the HTP's own information about a graph; absent where a release doesn't tell."""
    found: dict[str, Any] = {}
    if size < GRAPH_BLOB_V1_BYTES or c_uint32.from_address(blob).value != 1:
        return found
    first = _GraphBlobV1.from_address(blob + 8)
    # the header says MB, current releases write bytes
    found["vtcm_bytes"] = first.vtcm << 20 if first.vtcm < 1024 else first.vtcm
    found["spill_fill_bytes"] = first.spill_fill_bytes
    if size >= GRAPH_BLOB_V1_BYTES + GRAPH_BLOB_V2_BYTES:
        second = _GraphBlobV2.from_address(blob + GRAPH_BLOB_V1_BYTES)
        if second.version == 2:
            for name in ("io_bytes", "op_data_bytes", "constant_bytes", "ddr_bytes", "shared_weight_bytes"):
                found[name] = getattr(second, name)
    return found


def _tensors(tensors: Any, count: int) -> list[dict[str, Any]]:
    if count > MOST_TENSORS or (count and not tensors):
        raise DamagedError(f"{count} tensors")
    return [_tensor(tensors[i]) for i in range(count)]


def _tensor(tensor: _Tensor) -> dict[str, Any]:
    if tensor.version not in (1, 2):
        raise DamagedError(f"a tensor of version {tensor.version}")
    value = tensor.value
    if value.rank > MOST_RANK or (value.rank and not value.dimensions):
        raise DamagedError(f"a tensor of rank {value.rank}")
    shape = value.dimensions[: value.rank] if value.rank else []
    if not all(0 < size < 1 << 31 for size in shape):
        raise DamagedError(f"a tensor of shape {shape}")
    return {
        "name": _text(value.name),
        "data_type": value.data_type,
        "data_format": value.data_format,
        "shape": shape,
        "dynamic": bool(tensor.version == 2 and value.dynamic and any(value.dynamic[: value.rank])),
        "encoding": _encoding(value.quantization),
    }


def _encoding(params: _QuantizeParams) -> dict[str, Any] | None:
    """Scales and offsets: ``real = scale * (q + offset)``."""
    if params.definition != 1:
        return None
    values, axis, bits = params.values, None, None
    if params.kind == 0:
        scales, offsets = [values.tensor.scale], [values.tensor.offset]
    elif params.kind == 1:
        pairs = values.axis.pairs[: _channels(values.axis.count, values.axis.pairs)]
        axis, scales, offsets = values.axis.axis, [p.scale for p in pairs], [p.offset for p in pairs]
    elif params.kind == 2:
        bits, scales, offsets = values.width.bits, [values.width.scale], [values.width.offset]
    elif params.kind == 3:
        count = _channels(values.width_axis.count, values.width_axis.scales)
        bits, axis, scales = values.width_axis.bits, values.width_axis.axis, values.width_axis.scales[:count]
        offsets = values.width_axis.offsets[:count] if values.width_axis.offsets else [0] * count
    else:
        return {"kind": params.kind}
    if not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise DamagedError("a scale that isn't a positive number")
    return {"kind": params.kind, "scale": scales, "offset": offsets, "axis": axis, "bits": bits}


def _channels(count: int, pointer: Any) -> int:
    if not 0 < count <= MOST_CHANNELS or not pointer:
        raise DamagedError(f"an encoding of {count} channels")
    return count


def _text(value: bytes | None) -> str:
    try:
        return (value or b"").decode()
    except UnicodeDecodeError:
        raise DamagedError("a name that isn't UTF-8") from None


def main() -> None:
    """Print the description of a file, or ``{"damaged": why}``, or ``{"unusable": why}`` about the library."""
    library, file = sys.argv[1:3]
    output = os.dup(1)
    os.dup2(2, 1)  # what native code prints must not get between
    space = os.stat(file).st_size + SPARE_BYTES
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, space),
    ):
        resource.setrlimit(limit, (value, value))
    try:
        answer = describe(library, file)
    except DamagedError as error:
        answer = {"damaged": str(error)}
    except (OSError, AttributeError, MemoryError) as error:
        answer = {"unusable": str(error) or type(error).__name__}
    with open(output, "w", encoding="utf-8") as stream:
        json.dump(answer, stream)
    os._exit(0)  # the answer is out: what the library does while it is unloaded is of no interest


if __name__ == "__main__":
    main()
