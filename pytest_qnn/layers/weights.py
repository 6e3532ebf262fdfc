"""What HTP does to asymmetric weights: a channel that reaches beyond 127 steps from the zero point is rounded again.

Measured (SM8650, QAIRT 2.51): an output channel of 8-bit weights whose integers less the zero point don't fit into signed 8 bits is
computed as if it had been quantised once more, symmetrically, with a scale of its own: this gives the backend's results to a
step, the model's own weights don't. ``tests/known_backend_issues`` keeps the smallest model that shows it. It is not what
the model says, but it is no fault of the layer's kernel either: the rule grants such channels what it costs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import numpy_helper

from pytest_qnn.layers.cut import Layer
from pytest_qnn.model.graph_encodings import GraphEncodings

LARGEST = 127  # of signed 8 bits
F64 = npt.NDArray[np.float64]


def rounded_again(proto: Any, folder: Path, layers: tuple[Layer, ...]) -> dict[str, F64]:
    """By layer tensor: what an input of rms 1 (real units) costs each output channel at most, as rms in steps of the layer.

    Only layers with a Conv that has such a channel are in it.
    """
    encodings = GraphEncodings(proto, folder)
    nodes = {name: node for node in proto.graph.node for name in (node.name, *node.output)}
    found = {}
    for layer in layers:
        node = nodes.get(layer.name)
        if node is None or node.op_type != "Conv":
            continue
        weights = encodings.producer.get(node.input[1])
        if weights is None or weights.op_type != "DequantizeLinear":
            continue
        encoding = encodings.read(weights)
        if (
            encoding is None
            or encoding.bits != 8
            or len(encoding.scale) != 1
            or weights.input[0] not in encodings.constants
        ):
            continue
        stored = numpy_helper.to_array(encodings.constants[weights.input[0]], str(folder)).astype(np.float64)
        rows = np.abs(stored - encoding.zero_point[0]).reshape(len(stored), -1)
        reach = rows.max(1)
        if (reach <= LARGEST).all():
            continue
        rounding = np.where(reach > LARGEST, reach / LARGEST / np.sqrt(12), 0.0)  # rms, in steps of the weights
        found[layer.tensor] = rounding * np.sqrt(rows.shape[1]) * encoding.scale[0] / layer.encoding.step
    return found
