"""One-node models to ask a runtime simple questions with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from pytest_qnn.work_folder import temporary_folder

PROBE_INPUT = np.array([[-1.0, 0.0, 0.5, 2.0]], np.float32)


@contextmanager
def one_node_model(operator: str) -> Iterator[Path]:
    """A float32[1, 4] -> float32[1, 4] model of one operator, as a file that is gone afterwards."""
    shape = list(PROBE_INPUT.shape)
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], name=operator.lower())],
        operator.lower(),
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with temporary_folder() as folder:
        file = folder / f"pytest-qnn-probe-{operator.lower()}.onnx"
        onnx.save(model, str(file))
        yield file
