"""Graphs with quantisers exactly where a test wants them, flaws included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class QdqGraph:
    """A graph that grows node by node; tensors are named after their operator."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def node(self, operator: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:
        """Add a node; returns its output."""
        output = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=name or output, **attributes))
        return output

    def constant(self, value: Any, name: str = "") -> str:
        """Add an initializer."""
        name = name or f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def quantize(self, tensor: str, low: float, high: float, dtype: Any = np.uint8) -> str:
        """A Quantize/Dequantize pair whose encoding reaches over ``low..high``."""
        limits = np.iinfo(dtype)
        scale = np.float32((high - low) / (int(limits.max) - int(limits.min)))
        zero = np.asarray(np.clip(round(int(limits.min) - low / float(scale)), limits.min, limits.max), dtype)
        parameters = [self.constant(scale), self.constant(zero)]
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [tensor, *parameters]), *parameters])

    def weight(self, value: Any, dtype: Any = np.int8, axis: int | None = None) -> str:
        """Integers in the file, dequantised: symmetric, with one scale or one for each slice along ``axis``."""
        value = np.asarray(value, np.float32)
        others = None if axis is None else tuple(k for k in range(value.ndim) if k != axis)
        largest = int(np.iinfo(dtype).max)
        scale = np.asarray(np.abs(value).max(others) / largest, np.float32)
        shape = [1] * value.ndim
        if axis is not None:
            shape[axis] = -1
        steps = np.rint(value / scale.reshape(shape if axis is not None else []))
        zero = np.zeros_like(scale, dtype)
        if np.iinfo(dtype).min == 0:
            zero[...] = (largest + 1) // 2
            steps = steps / 2 + float(zero.reshape(-1)[0])
            scale = scale * 2
        stored = [self.constant(np.clip(steps, np.iinfo(dtype).min, largest).astype(dtype)), self.constant(scale)]
        attributes = {} if axis is None else {"axis": axis}
        return self.node("DequantizeLinear", [*stored, self.constant(zero)], **attributes)

    def save(
        self,
        path: Path,
        inputs: dict[str, list[Any]],
        output: str,
        shape: list[Any] | None,
        types: dict[str, int] | None = None,
    ) -> Path:
        """Write the graph; its output is renamed to ``y``."""
        for node in self.nodes:
            node.input[:] = ["y" if i == output else i for i in node.input]
            node.output[:] = ["y" if o == output else o for o in node.output]

        def info(name: str, dims: list[Any] | None) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, (types or {}).get(name, TensorProto.FLOAT), dims)

        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [info(name, dims) for name, dims in inputs.items()],
            [info("y", shape)],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
        return path
