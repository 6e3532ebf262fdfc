"""Small ONNX models that the tests make for themselves, each with one property that matters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    types: dict[str, int] | None = None,
) -> Path:
    """Write a model of these nodes; shapes may have names for dynamic dimensions; types default to float32."""

    def info(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, (types or {}).get(name, FLOAT), shape)

    graph = helper.make_graph(
        list(nodes),
        path.stem,
        [info(name, shape) for name, shape in inputs.items()],
        [info(name, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), str(path))
    return path


def conv(path: Path) -> Path:
    """Conv and Relu: x[1, 3, 16, 16] -> y[1, 8, 16, 16]."""
    rng = np.random.default_rng(0)
    return save(
        path,
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1] * 4),
            helper.make_node("Relu", ["c"], ["y"], name="relu"),
        ],
        {"x": [1, 3, 16, 16]},
        {"y": [1, 8, 16, 16]},
        {
            "w": rng.normal(size=(8, 3, 3, 3)).astype(np.float32),
            "b": rng.normal(size=8).astype(np.float32),
        },
    )


def quantized(float_model: Path, path: Path, scale_of_data: float = 1.0, **options: Any) -> Path:
    """``float_model`` quantised by onnxruntime for QNN on normal data times ``scale_of_data``."""
    from onnxruntime.quantization import CalibrationDataReader, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    specs = {
        i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(str(float_model)).graph.input
    }
    rng = np.random.default_rng(1)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.samples: Iterator[dict[str, np.ndarray]] = iter(
                [{n: scale_of_data * rng.normal(size=s).astype(np.float32) for n, s in specs.items()} for _ in range(8)]
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.samples, None)

    quantize(str(float_model), str(path), get_qnn_qdq_config(str(float_model), Reader(), **options))
    return path


def unary(path: Path, *operators: str, shape: Sequence[Any] = (1, 16), opset: int = 17) -> Path:
    """A chain of one-input operators on ``x``, nodes named ``n0``, ``n1``, ..."""
    names = ["x", *(f"t{i}" for i in range(len(operators) - 1)), "y"]
    nodes = [helper.make_node(op, [names[i]], [names[i + 1]], name=f"n{i}") for i, op in enumerate(operators)]
    return save(path, nodes, {"x": list(shape)}, {"y": list(shape)}, opset=opset)


def crashes_while_compiling(path: Path) -> Path:
    """STFT whose frame step and length are inputs: the QNN runtime dies of SIGSEGV while it compiles this."""
    nodes = [helper.make_node("STFT", ["signal", "step", "", "length"], ["y"], name="stft")]
    types = {"step": TensorProto.INT64, "length": TensorProto.INT64}
    inputs: dict[str, list[Any]] = {"signal": [1, 128, 1], "step": [], "length": []}
    return save(path, nodes, inputs, {"y": [1, 15, 9, 2]}, types=types)


def compiles_for_long(path: Path, length: int = 20_000) -> Path:
    """A chain of so many nodes that HTP takes most of a minute to compile it."""
    return unary(path, *(["Relu", "Sigmoid"] * (length // 2)), shape=(1, 64))


def runs_for_long(path: Path) -> Path:
    """One Relu on 64 MiB: about 20 seconds an inference on the simulator, from a file of a hundred bytes."""
    return unary(path, "Relu", shape=(1, 16384, 1024))
