"""The quantiser of a backend, by itself: a model that does nothing but quantise, loaded where the tested model is.

A Quantize/Dequantize pair alone is no test: HTP's compiler takes it for nothing but a clip (its outputs aren't on the steps).
Between two pairs stands a Concat, which moves integers without changing them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn.errors import ExecutionError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.tensors import digest_of_arrays
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.session import Session

MAX_VALUES = 4096  # that one inference tries
FLOAT16_BITS = 11  # of its significand
SLACK = 2.0**-7  # steps: float32's rounding of numbers of up to 65,535 steps


@dataclass
class Quantizer:
    """An encoding's quantiser on the backend of a session.

    Attributes:
        encoding: what it quantises to; one scale.
        session: of the model that does only that.
    """

    encoding: Encoding
    session: Session
    _kept: dict[str, Array] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, session: Session, encoding: Encoding) -> Quantizer:
        """The quantiser for ``encoding`` on the backend, SoC and options of ``session``.

        Raises:
            CompileError, PlacementError, TargetError: as for ``load``.
        """
        file = session.bench.folder() / "quantizer.onnx"
        _write(file, encoding)
        plan = session.plan
        options: dict[str, Any] = dict(plan.options)
        if plan.backend == "htp":
            options["offload_graph_io_quantization"] = "0"  # else onnxruntime's CPU quantises, and HTP is never asked
        soc = plan.soc.name if plan.soc else None
        backend = session.bench.backend(BackendRequest(plan.backend, soc=soc, serial=plan.serial or None))
        loaded = backend.load(file, **options)
        if loaded.placement.misplaced:
            raise ExecutionError(
                f"{loaded.subject}: the quantiser did not get onto the backend: {loaded.placement.misplaced[0]}"
            )
        return cls(encoding, loaded)

    def knows(self, values: Array) -> bool:
        """Whether these values were tried already."""
        return digest_of_arrays({"x": values}) in self._kept

    def run(self, values: Array) -> Array:
        """What becomes of real numbers: quantised and dequantised.

        Args:
            values: float32, exactly :data:`MAX_VALUES`.

        Raises:
            TargetError: the runtime failed.
        """
        key = digest_of_arrays({"x": values})
        if key not in self._kept:
            result = self.session.run({"x": values.reshape(1, -1)})
            self._kept[key] = result.results[0]["y"][0]
        return self._kept[key]

    def allowed(self, values: Array) -> Array:
        """How far off a value within the range may come out: half a step, and what float16 costs where floats arrive as such.

        HTP takes floats in as float16, on all architectures, also on those whose simulator computes float models in float32: a value
        moves by up to half a unit of its last place before it is quantised.
        """
        half = self.encoding.step * (0.5 + SLACK)
        if self.session.backend != "htp":
            return np.full(values.shape, half)
        return np.asarray(half + np.maximum(np.abs(values) * 2.0**-FLOAT16_BITS, 2.0**-25))


def ladder(encoding: Encoding, count: int) -> Array:
    """At most ``count`` values, ascending: steps, ties and the floats beside them, evenly over the range, and some beyond it."""
    low, high = encoding.limits
    integers = np.unique(np.linspace(low, high, min(high - low + 1, count // 4 - 8)).astype(np.int64))
    steps = encoding.dequantize(integers)
    ties = (steps + np.float32(encoding.step / 2)).astype(np.float32)
    first, last = encoding.range
    width = last - first
    beyond = np.array(
        [first - width * r for r in (0.01, 1, 100)] + [last + width * r for r in (0.01, 1, 100)], np.float32
    )
    top = np.float32(np.finfo(np.float16).max)  # beyond it float16 is infinite
    beyond = np.clip(beyond, -top, top)
    beside = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.unique(np.concatenate([steps, ties, *beside, beyond]).astype(np.float32))


def _write(file: object, encoding: Encoding) -> None:
    kind = getattr(TensorProto, encoding.dtype.upper())
    zero = helper.make_tensor("zero", kind, [], [encoding.zero_point[0]])
    pair = ["scale", "zero"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *pair], ["q1"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q1", *pair], ["d1"], name="dequantize"),
        helper.make_node("Concat", ["d1", "d1"], ["c"], name="twice", axis=0),
        helper.make_node("QuantizeLinear", ["c", *pair], ["q2"], name="quantize_result"),
        helper.make_node("DequantizeLinear", ["q2", *pair], ["y"], name="dequantize_result"),
    ]
    graph = helper.make_graph(
        nodes,
        "quantizer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, MAX_VALUES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, MAX_VALUES])],
        [numpy_helper.from_array(np.array(encoding.scale[0], np.float32), "scale"), zero],
    )
    opset = helper.make_opsetid("", 21)  # the first with quantisers of 16 bits
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), str(file))
