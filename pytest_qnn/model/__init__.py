"""The ONNX file as data: tensors, encodings, digests; and :func:`quantize`, which makes a QDQ model from a float one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qnn.model.calibration_report import CalibrationReport, TensorCalibration
    from pytest_qnn.model.encoding import Encoding
    from pytest_qnn.model.encoding_apply import AppliedEncodings, apply_encodings
    from pytest_qnn.model.encoding_checks import check_encodings
    from pytest_qnn.model.encoding_diff import compare_encodings
    from pytest_qnn.model.encoding_files import read_encodings, write_encodings
    from pytest_qnn.model.encoding_set import EncodingSet, Precision, TensorEncoding
    from pytest_qnn.model.graph_tensors import read_graph
    from pytest_qnn.model.quantization import QuantizationOptions, QuantizationResult, quantize

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
    "AppliedEncodings": "encoding_apply",
    "CalibrationReport": "calibration_report",
    "Encoding": "encoding",
    "EncodingSet": "encoding_set",
    "Precision": "encoding_set",
    "QuantizationOptions": "quantization",
    "QuantizationResult": "quantization",
    "TensorCalibration": "calibration_report",
    "TensorEncoding": "encoding_set",
    "apply_encodings": "encoding_apply",
    "check_encodings": "encoding_checks",
    "compare_encodings": "encoding_diff",
    "quantize": "quantization",
    "read_encodings": "encoding_files",
    "read_graph": "graph_tensors",
    "write_encodings": "encoding_files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)  # onnx and onnxruntime only when they are used
