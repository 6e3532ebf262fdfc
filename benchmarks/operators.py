"""How exactly HTP computes single operators with 16-bit activations: what ``pytest_qnn.layers.arithmetic`` goes by."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn.bench import Bench
from pytest_qnn.errors import QnnError
from pytest_qnn.layers.arithmetic import OF_16_BITS, OTHER_OF_16_BITS
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model import quantize
from pytest_qnn.settings import Settings
from pytest_qnn.three_ways import quantized_outputs

SOCS = ("SM8350", "SM8650", "SM8850")
SHAPE = (1, 16, 12, 20)
RANGES = (1.0, 4.0, 20.0)  # of the inputs
JUDGED, CALIBRATED = 4, 16


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        second: its further inputs: "input" for one like the first, or constants by name.
        low: smallest input, in ranges.
    """

    name: str
    second: str | dict[str, Any] = ""
    low: float = -1.0
    attributes: dict[str, Any] = field(default_factory=dict)


def _constants(*names: str) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {name: rng.uniform(0.5, 1.5, SHAPE[1]).astype(np.float32) for name in names}


OPERATORS = (
    *(Operator(name) for name in ("Sigmoid", "Tanh", "Gelu", "Exp", "Softplus", "Mish", "Elu", "LeakyRelu", "HardSigmoid", "HardSwish")),
    *(Operator(name) for name in ("Sin", "Cos", "Atan", "Floor", "Sign", "Neg", "Abs", "GlobalAveragePool")),
    *(Operator(name, low=0.05) for name in ("Log", "Sqrt", "Reciprocal")),
    *(Operator(name, attributes={"axis": -1}) for name in ("Softmax", "LogSoftmax")),
    Operator("LpNormalization", attributes={"axis": -1, "p": 2}),
    *(Operator(name, {"axes": np.array([2, 3], np.int64)}) for name in ("ReduceMean", "ReduceSum", "ReduceMax")),
    Operator("InstanceNormalization", _constants("scale", "shift")),
    Operator("LayerNormalization", {"scale": np.linspace(0.5, 1.5, 20, dtype=np.float32)}, attributes={"axis": -1}),
    Operator("BatchNormalization", _constants("scale", "shift", "mean", "variance")),
    *(Operator(name, "input") for name in ("Add", "Sub", "Mul", "Max", "Min")),
    Operator("Div", "input", low=0.2),
    Operator("Pow", {"exponent": np.float32(2)}),
)  # fmt: skip


def main() -> None:
    """Print a line for each operator: largest rms; error; mean, in steps, over three ranges of inputs, on each SoC."""
    print("operator", "assumed", *SOCS, sep=" | ")
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Settings(cache_dir=Path(name, "cache")))
        try:
            for operator in OPERATORS:
                found = [_worst(bench, operator, soc, Path(name)) for soc in SOCS]
                print(
                    operator.name, f"{OF_16_BITS.get(operator.name, OTHER_OF_16_BITS):g}", *found, sep=" | ", flush=True
                )
        finally:
            bench.close()


def _worst(bench: Bench, operator: Operator, soc: str, folder: Path) -> str:
    found = []
    for largest in RANGES:
        samples = list(_samples(operator, largest))
        _save(operator, folder / "float.onnx")
        quantize(folder / "float.onnx", samples, folder / "quantized.onnx", activations=16)
        try:
            session = bench.backend(BackendRequest("htp", soc=soc)).load(folder / "quantized.onnx")
            errors = []
            for sample, result in zip(samples[:JUDGED], session.run_many(samples[:JUDGED]).results, strict=True):
                (spec,) = session.outputs
                assert spec.encoding is not None
                q = quantized_outputs(session, sample)[spec.name].astype(np.float64)
                errors.append((result[spec.name] - q).ravel() / spec.encoding.step)
        except QnnError as error:
            return f"not: {type(error).__name__}"
        e = np.concatenate(errors)
        found.append((float(np.sqrt(np.square(e).mean())), float(np.abs(e).max()), float(e.mean())))
    return "; ".join(f"{max(values, key=abs):.2f}" for values in zip(*found, strict=True))


def _samples(operator: Operator, largest: float) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(2)
    for number in range(CALIBRATED):
        x = rng.normal(size=SHAPE) / 3 if number % 2 else rng.uniform(-1, 1, SHAPE)
        if operator.low > 0:
            x = np.abs(x) + operator.low
        sample = {"x": (largest * x).astype(np.float32)}
        if operator.second == "input":
            z = rng.normal(size=SHAPE) / 5
            sample["z"] = (largest * (np.abs(z) + operator.low if operator.low > 0 else z)).astype(np.float32)
        yield sample


def _save(operator: Operator, file: Path) -> None:
    constants = operator.second if isinstance(operator.second, dict) else {}
    inputs = ["x", "z"] if operator.second == "input" else ["x"]
    node = helper.make_node(operator.name, [*inputs, *constants], ["y"], name=operator.name, **operator.attributes)
    graph = helper.make_graph(
        [node],
        operator.name,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(file))
