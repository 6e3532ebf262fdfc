"""The ONNX file as data: tensors, digests; and, to be imported from here, what quantises models and what reads encodings."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qnn.encodings.apply import AppliedEncodings, apply_encodings
    from pytest_qnn.encodings.checks import check_encodings
    from pytest_qnn.encodings.compare import compare_encodings
    from pytest_qnn.encodings.encoding_set import EncodingSet, Precision, TensorEncoding
    from pytest_qnn.encodings.files import read_encodings, write_encodings
    from pytest_qnn.model.encoding import Encoding
    from pytest_qnn.model.graph_tensors import read_graph
    from pytest_qnn.quantization.options import QuantizationOptions
    from pytest_qnn.quantization.quantize import QuantizationResult, quantize
    from pytest_qnn.quantization.report import CalibrationReport, TensorCalibration

__all__ = [
    "AppliedEncodings",
    "CalibrationReport",
    "Encoding",
    "EncodingSet",
    "Precision",
    "QuantizationOptions",
    "QuantizationResult",
    "TensorCalibration",
    "TensorEncoding",
    "apply_encodings",
    "check_encodings",
    "compare_encodings",
    "quantize",
    "read_encodings",
    "read_graph",
    "write_encodings",
]
_HOME = {
    "AppliedEncodings": "encodings.apply",
    "CalibrationReport": "quantization.report",
    "Encoding": "model.encoding",
    "EncodingSet": "encodings.encoding_set",
    "Precision": "encodings.encoding_set",
    "QuantizationOptions": "quantization.options",
    "QuantizationResult": "quantization.quantize",
    "TensorCalibration": "quantization.report",
    "TensorEncoding": "encodings.encoding_set",
    "apply_encodings": "encodings.apply",
    "check_encodings": "encodings.checks",
    "compare_encodings": "encodings.compare",
    "quantize": "quantization.quantize",
    "read_encodings": "encodings.files",
    "read_graph": "model.graph_tensors",
    "write_encodings": "encodings.files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"pytest_qnn.{_HOME[name]}"), name)  # onnx and onnxruntime only when they are used
