"""What a backend computes float models in. No API tells, and options don't decide it: so it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pytest_qnn.devices.transport import part
from pytest_qnn.errors import BackendUnavailableError, CompileError, PlacementError
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.model.probe import PROBE_INPUT, one_node_model
from pytest_qnn.provisioning import PROBE, Order, provide

if TYPE_CHECKING:
    from pytest_qnn.bench import Bench
    from pytest_qnn.targets.target import Plan

# 1 + 2**-13 has 13 bits after the point: exact in float32 (23), not in float16 (10)
VALUE = np.float32(1 + 2**-13)


@dataclass(frozen=True)
class FloatPrecision:
    """What a backend computes float models in.

    Attributes:
        name: "float32", "float16", or "refused": it doesn't take float models at all.
        note: for records; not empty if it could not be measured.
    """

    name: str
    note: str = ""


def probe_precision(bench: Bench, plan: Plan) -> FloatPrecision:
    """Run a one-node float model (Neg) and see whether its bits survive.

    Where nothing on this host makes what the device's backend takes (a model library for its GPU or CPU, without the SDK),
    ``precision_mode`` is believed, and without it float32, the stricter: a verdict may then be too hard, never too mild.

    Raises:
        TargetError: the runtime died, hung or ran out of memory.
    """
    with one_node_model("Neg") as file:
        order = Order(bench, plan, read_model(file), f"{PROBE} on {plan.backend}", bench.limits)
        if not plan.serial:
            return FloatPrecision(_probe(order))
        from pytest_qnn.device_provisioning import attached

        with part(attached(order).transport, f"what {plan.backend} on {plan.serial} computes float models in"):
            try:
                return FloatPrecision(_probe(order))
            except BackendUnavailableError:
                if plan.backend == "htp" or plan.runner != "net_run":
                    raise
                return _declared(plan)


def _declared(plan: Plan) -> FloatPrecision:
    mode = dict(plan.options).get("precision_mode")
    name = "float16" if mode in ("fp16", "hybrid") else "float32"
    why = f"precision_mode is {mode}" if mode else "precision_mode isn't given"
    return FloatPrecision(
        name,
        f"what {plan.backend} computes float models in was not measured (it takes a model library, and without an SDK nothing here "
        f"makes one): {name} is assumed, since {why}",
    )


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
