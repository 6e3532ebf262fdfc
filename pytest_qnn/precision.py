"""What a backend computes float models in. No API tells, and options don't decide it: so it is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_qnn.devices.transport import part
from pytest_qnn.errors import CompileError, PlacementError
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.model.probe import PROBE_INPUT, one_node_model
from pytest_qnn.provisioning import PROBE, Order, provide

if TYPE_CHECKING:
    from pytest_qnn.bench import Bench
    from pytest_qnn.targets.target import Plan

# 1 + 2**-13 has 13 bits after the point: exact in float32 (23), not in float16 (10)
VALUE = np.float32(1 + 2**-13)


def probe_precision(bench: Bench, plan: Plan) -> str:
    """Run a one-node float model (Neg) and see whether its bits survive: "float32", "float16", or "refused".

    "refused" means that the backend doesn't take float models at all.

    Raises:
        TargetError: the runtime died, hung or ran out of memory.
    """
    with one_node_model("Neg") as file:
        order = Order(bench, plan, read_model(file), f"{PROBE} on {plan.backend}", bench.limits)
        if not plan.serial:
            return _probe(order)
        from pytest_qnn.device_provisioning import attached

        with part(attached(order).transport, f"what {plan.backend} on {plan.serial} computes float models in"):
            return _probe(order)


def _probe(order: Order) -> str:
    try:
        loaded = provide(order).loaded
    except (PlacementError, CompileError):
        return "refused"
    try:
        outputs = loaded.run_many([{"x": np.full(PROBE_INPUT.shape, VALUE, np.float32)}])[0].outputs
    finally:
        loaded.close()
    return "float32" if np.all(-outputs["y"] == VALUE) else "float16"
