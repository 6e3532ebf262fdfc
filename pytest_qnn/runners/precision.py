"""What a backend computes float models in. No API tells, and options don't decide it: so it is measured."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper

from pytest_qnn.runners.ort import QNN, LoadedModel, LoadRequest

if TYPE_CHECKING:
    from pytest_qnn.bench import Bench
    from pytest_qnn.targets.target import Plan

# 1 + 2**-13 has 13 bits after the point: exact in float32 (23), not in float16 (10)
PROBE_VALUE = np.float32(1 + 2**-13)


def probe_precision(bench: Bench, plan: Plan) -> str:
    """Run a one-node float model (Neg) and see whether its bits survive: "float32", "float16", or "refused".

    "refused" means that the backend doesn't take float models at all.

    Raises:
        TargetError: the runtime died, hung or ran out of memory.
    """
    shape = [1, 4]
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"], name="neg")],
        "precision",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content = model.SerializeToString()
    with tempfile.TemporaryDirectory(prefix="pytest-qnn-") as folder:
        file = Path(folder, "precision.onnx")
        onnx.save(model, str(file))
        request = LoadRequest(
            model=str(file),
            digest=hashlib.sha256(content).hexdigest(),
            process=plan.process,
            provider=QNN,
            provider_options=plan.provider_options,
        )
        loaded = LoadedModel(bench.pool, request, f"precision probe on {plan.backend}", bench.limits)
        try:
            if any(provider != QNN for provider, _, _ in loaded.info.placement):
                return "refused"
            outputs, _ = loaded.run({"x": np.full(shape, PROBE_VALUE, np.float32)})
        finally:
            loaded.close()
    return "float32" if np.all(-outputs["y"] == PROBE_VALUE) else "float16"
