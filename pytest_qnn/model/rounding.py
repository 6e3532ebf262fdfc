"""A QDQ model with the rounding taken out: the float reference of a model that came without its float original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from pytest_qnn.errors import ModelError
from pytest_qnn.model.graph_encodings import GraphEncodings
from pytest_qnn.model.onnx_file import load_proto


def without_rounding(file: Path, output: Path) -> None:
    """Write to ``output`` the QDQ model ``file`` with every activation's Quantize/Dequantize pair replaced by a Clip.

    The Clip keeps the saturation at the ends of the encoding's range, which quantised models use in place of their
    Relus; what is gone is the rounding to steps. Weights stay dequantised from their integers. So what the QDQ model
    loses against this one is the rounding of its activations, and nothing else.

    Raises:
        ModelError: the model can't be read or written.
    """
    proto = load_proto(file)
    onnx.load_external_data_for_model(proto, str(file.parent))
    graph = proto.graph
    encodings = GraphEncodings(proto, file.parent)
    source_of_quantized = {
        n.output[0]: n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in encodings.constants
    }
    kept_outputs = {v.name for v in graph.output}
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=1)
    replaced, used = [], set()
    for node in graph.node:
        quantize = source_of_quantized.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        encoding = encodings.read(node) if quantize is not None else None
        if quantize is None or encoding is None or len(encoding.scale) != 1 or opset < 11:
            replaced.append(node)
            continue
        low, high = encoding.range
        bounds = [f"{node.output[0]}__low", f"{node.output[0]}__high"]
        for name, value in zip(bounds, (low, high), strict=True):
            graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
        replaced.append(helper.make_node("Clip", [quantize.input[0], *bounds], list(node.output), name=node.name))
    used = {i for n in replaced for i in n.input} | kept_outputs
    del graph.node[:]
    graph.node.extend(n for n in replaced if n.op_type != "QuantizeLinear" or n.output[0] in used)
    del graph.value_info[:]
    try:
        onnx.save(proto, str(output))
    except ValueError as error:  # protobuf's own limit of 2 GiB
        raise ModelError(
            f"{file}: too large to derive a float reference from: pass float_model= with the original model"
        ) from error
