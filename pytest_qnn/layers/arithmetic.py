"""How exactly HTP computes a layer: measured, and explained where it could be.

What is below was measured on Qualcomm's simulator (QAIRT 2.51; SM8350, SM8650, SM8850) by running layers alone:
``python -m benchmarks operators``, and the layers of eleven real nets; sums of products by output channel, 160,000 of six. In steps of
the layer's own encoding:

- 8 bits: to half a step. Operators of one variable are tables.
- 16-bit activations, 8-bit weights: sums of products lose about nine bits of the accumulator, whose unit is scale of the input times
  scale of the weights. What that is in steps depends on the three scales alone. v68 and v69 are off by up to 26 steps more.
- 16-bit activations times 16-bit activations (MatMul): the second factor is rounded to 8 bits. Its root mean square is predicted
  to 5% in all 16 products of the two nets that have some.
- 8-bit weights that lie more than 127 steps from their zero point don't fit into signed 8 bits: the output channels that have such
  weights are rounded once more, symmetrically, each with a scale of its own.
- Other operators: :data:`OF_16_BITS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import numpy_helper

from pytest_qnn.devices.soc import Soc
from pytest_qnn.layers.cut import WEIGHTED, Layer
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.graph_encodings import MOVES_ONLY, GraphEncodings
from pytest_qnn.model.graph_tensors import tensor_shapes

F64 = npt.NDArray[np.float64]

HALF_STEP = 0.5  # rounding another way
LARGEST = 127  # of signed 8 bits
LOST = 1024.0  # units of the accumulator, and of a depthwise convolution: healthy maxima 510 and 1030, where that is over a step
LOST_DEPTHWISE = 2048.0
WEIGHTED_STEPS = 2.0  # where nothing is lost
COARSE = 32.0  # steps; v68 and v69
EXACT_ARCH = 73  # the first that is better
OFFSET = -0.4  # of the amplitude of 16-bit layers: what is lost is cut off, not rounded
UNKNOWN_PRODUCT = 192.0  # steps: sums of products that none of this explains; healthy maximum of their rms 187
SOFTMAX_ERROR = 0.02  # of the value; a probability near 1 comes out up to 2.5% off
COPIES = frozenset(
    ("MaxPool", "Pad", "Slice", "Concat", "Split", "Resize", "Gather", "DepthToSpace", "SpaceToDepth", "Max", "Min", "Relu", "Clip")
)  # fmt: skip
OTHER_OF_16_BITS = 4.0  # as long as nobody has measured them
OF_16_BITS = {  # largest error of most elements, in steps; rms and largest that were measured
    "Softmax": 4.0,  # 3.2; 540, with SOFTMAX_ERROR
    "LogSoftmax": 8.0,  # 2.9; 6, its mean too
    "BatchNormalization": 128.0,  # 17; 73 where it isn't wrong throughout
    "Sqrt": 32.0,  # 28; 70
    "Gelu": 20.0,  # 13; 51
    "Div": 16.0,  # 2.1; 10
    "Reciprocal": 12.0,  # 5.0; 38
    "Atan": 4.0,  # 3.7; 9
    "Add": 3.0,  # 2.0; 2: some are off by 2 throughout
    "Sub": 3.0,
    "Sum": 3.0,
    "Sin": 2.5,  # 2.1; 6
    "Cos": 2.5,
    "LeakyRelu": 2.0,  # 1.1; 4
    "Elu": 2.0,  # 1.6; 4
    "Sigmoid": 2.5,  # 1.9; 5
    "Tanh": 2.0,  # 1.2; 4
    "HardSigmoid": 2.0,  # 0.8; 1
} | dict.fromkeys(  # all under 0.9; 2
    (
        *("Mul", "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum", "ReduceMax", "Pow", "LayerNormalization"),
        *("InstanceNormalization", "LpNormalization", "HardSwish", "Abs", "Neg", "Floor", "Sign", *COPIES),
    ),
    1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Exactness:
    """How far legitimate arithmetic may put the elements of a layer that is computed alone, in its own steps.

    Attributes:
        amplitude: the largest error of most elements, whatever the input.
        offset: by which all elements are off alike, roughly.
        relative: error that grows with the element itself.
        spread: whether single elements may be much further off: sums of products and exponentials.
        per_input: rms error that an input of rms 1, in real units, adds: one number, or one for each channel along ``axis``; None: no such
            error.
        operand: the float tensor that is that input; ``source``: the quantised tensor that it comes from.
        input_limit: the largest that the input can be, in real units.
        divisor: the quantised tensor that the layer divides by, as it is: what comes of dividing by 0 nobody says.
    """

    amplitude: float
    offset: float = 0.0
    relative: float = 0.0
    spread: bool = False
    per_input: F64 | None = None
    axis: int = 1
    operand: str = ""
    source: str = ""
    input_limit: float = 0.0
    divisor: str = ""


def exactness_of(
    proto: Any,
    folder: Path,
    layers: Sequence[Layer],
    coarse: bool = False,
    shapes: Mapping[str, tuple[int | None, ...]] | None = None,
) -> dict[str, Exactness]:
    """By layer tensor: how exactly HTP computes it.

    Args:
        proto: the QDQ model; ``folder``: where its external data lies.
        coarse: for an HTP that :func:`is_coarse`.
        shapes: of its tensors, where they are known; default: by shape inference.
    """
    encodings = GraphEncodings(proto, folder)
    nodes = {name: node for node in proto.graph.node for name in (node.name, *node.output) if name}
    known = tensor_shapes(proto) if shapes is None else shapes
    return {layer.tensor: _Weighing(encodings, nodes, known, coarse, layer).exactness() for layer in layers}


def is_coarse(soc: Soc | None) -> bool:
    """Whether a SoC's HTP is one of those that err most; one that isn't known is taken for such."""
    return soc is None or soc.htp_arch < EXACT_ARCH


@dataclass(frozen=True)
class _Weighing:
    encodings: GraphEncodings
    nodes: Mapping[str, Any]
    shapes: Mapping[str, tuple[int | None, ...]]
    coarse: bool
    layer: Layer

    @property
    def step(self) -> float:
        return float(self.layer.encoding.step)

    def exactness(self) -> Exactness:
        kinds = set(self.layer.operators)
        if not kinds or kinds <= COPIES:
            return Exactness(0.0)
        products = [kind for kind in self.layer.operators if kind in WEIGHTED]
        node = self.nodes.get(self.layer.name)
        wide = self.layer.encoding.bits > 8
        if not products:
            relative = SOFTMAX_ERROR if "Softmax" in kinds else 0.0
            steps = max(OF_16_BITS.get(kind, OTHER_OF_16_BITS) for kind in kinds) if wide else HALF_STEP
            spread = bool(relative) or bool(kinds & {"LogSoftmax", "Exp"})
            offset = OFFSET * min(steps, OTHER_OF_16_BITS) if wide else 0.0
            return Exactness(steps, offset=offset, relative=relative, spread=spread, divisor=self._divisor(node))
        found = None
        if len(products) == 1 and node is not None and node.op_type in ("Conv", "Gemm", "MatMul"):
            found = self._product(node)
        return found or Exactness(UNKNOWN_PRODUCT if wide else HALF_STEP, spread=True)

    def _product(self, node: Any) -> Exactness | None:
        """One sum of products; None where nothing is known of it."""
        first, second = self._operand(node.input[0]), self._operand(node.input[1])
        if first is None or second is None:
            return None
        (encoding, source), (other, constant) = first, second
        if source in self.encodings.constants or len(encoding.scale) != 1:
            return None
        if constant in self.encodings.constants:
            return self._weighted(node, encoding, source, other, constant)
        count = (self.shapes.get(node.input[0]) or (None,))[-1]  # of products in a sum
        if node.op_type != "MatMul" or count is None or len(other.scale) != 1 or min(encoding.bits, other.bits) <= 8:
            return None
        rounding = 2.0 ** (other.bits - 8) / math.sqrt(12) * float(other.step)
        exact = Exactness(self._least(), spread=True)
        return _with_input(exact, np.array([math.sqrt(count) * rounding / self.step]), -1, node, source, encoding)

    def _weighted(
        self, node: Any, encoding: Encoding, source: str, weights: Encoding, constant: str
    ) -> Exactness | None:
        stored = numpy_helper.to_array(self.encodings.constants[constant], str(self.encodings.folder)).astype(
            np.float64
        )
        attributes = {a.name: a.i for a in node.attribute if a.name in ("group", "transB")}
        axis = 0 if node.op_type == "Conv" or attributes.get("transB") else stored.ndim - 1
        if weights.bits != 8 or weights.block_size or stored.ndim < 2 or (node.op_type == "MatMul" and stored.ndim > 2):
            return None
        if weights.axis is not None and weights.axis % stored.ndim != axis:
            return None
        rows = np.moveaxis(stored, axis, 0).reshape(stored.shape[axis], -1)
        rows = np.abs(rows - np.reshape(weights.zero_point, (-1, 1)))
        scale = np.broadcast_to(np.asarray(weights.scale), len(rows)) / self.step
        reach = rows.max(1)
        amplitude = self._least()
        if encoding.bits > 8 and self.layer.encoding.bits > 8:
            depthwise = attributes.get("group", 1) > 1
            amplitude += float(encoding.step) * float(scale.max()) * (LOST_DEPTHWISE if depthwise else LOST)
        offset = OFFSET * amplitude if self.layer.encoding.bits > 8 else 0.0
        exact = Exactness(amplitude, offset=offset, spread=True)
        if (reach <= LARGEST).all():
            return exact
        rounding = np.where(reach > LARGEST, reach / LARGEST / math.sqrt(12), 0.0)  # rms, in steps of the weights
        per_input = rounding * math.sqrt(rows.shape[1]) * scale
        return _with_input(exact, per_input, 1 if node.op_type == "Conv" else -1, node, source, encoding)

    def _divisor(self, node: Any) -> str:
        """Of a quotient that is quantised as it is: where it or the divisor is moved, nobody knows which elements are meant."""
        end = self.encodings.producer[self.layer.tensor]
        if node is None or node.op_type not in ("Div", "Reciprocal") or end.input[0] != node.output[0]:
            return ""
        made = self.encodings.producer.get(node.input[-1])
        return str(made.input[0]) if made is not None and made.op_type == "DequantizeLinear" else ""

    def _least(self) -> float:
        if self.layer.encoding.bits <= 8:
            return HALF_STEP
        return WEIGHTED_STEPS + (COARSE if self.coarse else 0.0)

    def _operand(self, tensor: str) -> tuple[Encoding, str] | None:
        """Encoding and name of the quantised tensor that a float one comes from, whose elements may have been moved."""
        node = self.encodings.producer.get(tensor)
        moved = False
        while node is not None and node.op_type in MOVES_ONLY:
            node, moved = self.encodings.producer.get(node.input[0]), True
        if node is None or node.op_type != "DequantizeLinear":
            return None
        encoding = self.encodings.read(node)
        if encoding is None or (moved and (encoding.axis is not None or node.input[0] in self.encodings.constants)):
            return None
        return encoding, str(node.input[0])


def _with_input(exact: Exactness, per_input: F64, axis: int, node: Any, source: str, encoding: Encoding) -> Exactness:
    limit = max(abs(end) for end in encoding.range)
    return replace(exact, per_input=per_input, axis=axis, operand=node.input[0], source=source, input_limit=limit)
