"""The ``.raw`` files of qnn-net-run: which elements they hold, and how a model's arrays become them and back.

A raw file has no head, so everything follows from what is declared: the model's tensor, the binary's, and the
:class:`~pytest_qnn.artifacts.matching.Edge` between the two. Elements are little-endian, in the order of the binary's axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pytest_qnn.artifacts.matching import FLOATS, Edge
from pytest_qnn.errors import ArtifactError, ExecutionError, InputError
from pytest_qnn.runners.shared_tensors import Array


@dataclass(frozen=True)
class RawFile:
    """How one tensor stands in a file.

    Attributes:
        edge: the model's tensor and the binary's.
        native: whether the file has the binary's own elements; else float32, which qnn-net-run converts by itself.
    """

    edge: Edge
    native: bool = True

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the elements in the file."""
        return np.dtype(self.edge.tensor.dtype if self.native else "float32").newbyteorder("<")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return math.prod(self.edge.tensor.shape) * self.dtype.itemsize

    @property
    def suffix(self) -> str:
        """What qnn-net-run appends to the tensor's name for an output: float32 tensors have no native file of their own."""
        return "_native.raw" if self.native and self.edge.tensor.dtype != "float32" else ".raw"

    def encode(self, array: Array, subject: str) -> bytes:
        """Content of the file for an array of the model's type and shape.

        Floats of the model are quantised as ONNX's QuantizeLinear does, bit for bit.

        Raises:
            InputError: a value that the binary's type doesn't have.
        """
        edge = self.edge
        laid = array.transpose(edge.permutation) if edge.permutation is not None else array.reshape(edge.tensor.shape)
        if edge.quantized and self.native:
            assert edge.tensor.encoding is not None
            try:
                laid = edge.tensor.encoding.quantize(laid)
            except InputError as error:
                raise InputError(f"{subject}: input {edge.spec.name!r}: {error}") from None
        elif laid.dtype.kind in "iu" and self.dtype.kind in "iu":
            limits = np.iinfo(np.dtype(self.dtype.name))
            bad = (laid < limits.min) | (laid > limits.max)
            if bad.any():
                at = [int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape)]
                value = laid[tuple(at)]
                raise InputError(
                    f"{subject}: input {edge.spec.name!r} has {value}, which {edge.tensor.data_type} of the binary can't hold: "
                    f"its values go from {limits.min} to {limits.max}"
                )
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(laid, self.dtype).tobytes()

    def decode(self, content: bytes, subject: str) -> Array:
        """The model's array in a file.

        Raises:
            ExecutionError: the file has another size than declared.
        """
        edge = self.edge
        if len(content) != self.size:
            raise ExecutionError(
                f"{subject}: output {edge.spec.name!r} has {len(content)} bytes, {edge.tensor.describe()} has {self.size}: "
                "nothing in it can be trusted"
            )
        array: Array = np.frombuffer(content, np.uint8 if self.dtype == np.bool_ else self.dtype)
        array = array.reshape(edge.tensor.shape)
        if self.dtype == np.bool_:
            array = array != 0
        if edge.quantized and self.native:
            assert edge.tensor.encoding is not None
            array = edge.tensor.encoding.dequantize(array)
        if edge.permutation is not None:
            array = array.transpose(np.argsort(edge.permutation))
        else:
            array = array.reshape(tuple(int(size) for size in edge.spec.shape))
        return np.array(array, np.dtype(edge.spec.dtype), order="C")


def raw_files(edges: tuple[Edge, ...], io: str, path: object) -> tuple[RawFile, ...]:
    """How these tensors stand in files.

    Args:
        io: "native", or "float": then qnn-net-run quantises and dequantises. Integers that aren't quantised floats stay
            native even so, because not all of them are floats.
        path: for messages.

    Raises:
        ArtifactError: a tensor that no array stands for.
    """
    for edge in edges:
        if edge.tensor.note or not edge.tensor.dtype:
            why = edge.tensor.note or "numpy has no such type"
            raise ArtifactError(f"{path}: {edge.tensor.describe()} can't be handed over: {why}")
    return tuple(RawFile(edge, native=io == "native" or not _as_float(edge)) for edge in edges)


def _as_float(edge: Edge) -> bool:
    """Whether qnn-net-run can read and write it as float32 without loss beyond what quantising loses."""
    return edge.quantized or (edge.spec.dtype in FLOATS and edge.tensor.dtype in ("float16", "float32"))
