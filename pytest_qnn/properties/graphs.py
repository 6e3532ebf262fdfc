"""Small random graphs, described: a chain of steps whose operators HTP takes, with branches; quantised when it is saved.

A description is a few tuples. A step that doesn't fit the tensor it meets (a pooling of 1 x 1, say) is left out, so that taking
steps away always leaves a graph: that is how examples shrink. So is a first step that would not be quantised; without any step left, the graph is one Add.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn.errors import OptionError
from pytest_qnn.settings import unknown_name

OPSET, IR_VERSION = 17, 8
CALIBRATION_SAMPLES = 8
MAX_CHANNELS, MAX_SIZE = 16, 32
Shape = tuple[int, ...]


class Step(NamedTuple):
    """One operator of a random graph.

    Attributes:
        operator: ONNX's name, or "DepthwiseConv".
        choice: says which of the operator's variants: kernel, stride, axis and so on.
        other: says which earlier tensor a second input is, among those that fit; 0: a constant where the operator takes one.
    """

    operator: str
    choice: int = 0
    other: int = 0

    def __repr__(self) -> str:
        shown = [repr(self.operator)] + [str(self.choice)] * bool(self.choice or self.other)
        return f"Step({', '.join(shown + [str(self.other)] * bool(self.other))})"


@dataclass(frozen=True)
class ModelPair:
    """A quantised model and its float original, on disk: ``backend.load(pair.quantized, float_model=pair.float_model)``."""

    quantized: Path
    float_model: Path


@dataclass(frozen=True)
class QdqModel:
    """A random graph and how it is quantised.

    Attributes:
        shape: of its input ``x``.
        steps: operators in order; of those, the ones that fit what they meet.
        activation: bits of activations, 8 or 16.
        weight: bits of weights, 8 or 4.
        per_channel: whether convolutions' weights have a scale for each output channel.
        seed: of weights and calibration data.
    """

    shape: Shape
    steps: tuple[Step, ...]
    activation: int = 8
    weight: int = 8
    per_channel: bool = False
    seed: int = 0

    def __repr__(self) -> str:
        shown = [repr(self.shape), repr(list(self.steps))]
        defaults: dict[str, object] = {"activation": 8, "weight": 8, "per_channel": False, "seed": 0}
        shown += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return f"QdqModel({', '.join(shown)})"

    @property
    def operators(self) -> tuple[str, ...]:
        """ONNX operators of the float graph, in order."""
        return tuple(node.op_type for node in _grow(self).nodes)

    def save(self, folder: str | os.PathLike[str]) -> ModelPair:
        """Write ``model.onnx`` and ``model.qdq.onnx``, calibrated on seeded data, uniform in -1..1.

        Raises:
            ModelError: onnxruntime can't quantise it.
        """
        from pytest_qnn.quantization.quantize import quantize

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        source = self.save_float(target / "model.onnx")
        rng = np.random.default_rng([self.seed, 1])
        data = [{"x": rng.uniform(-1, 1, self.shape).astype(np.float32)} for _ in range(CALIBRATION_SAMPLES)]
        done = quantize(
            source,
            data,
            target / "model.qdq.onnx",
            activations=self.activation,
            weights=self.weight,
            per_channel=self.per_channel,
        )
        return ModelPair(done.path, source)

    def save_float(self, file: Path) -> Path:
        """Write the float graph: input ``x``, output ``y``."""
        grown = _grow(self)
        graph = helper.make_graph(
            grown.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, grown.shapes["y"])],
            [numpy_helper.from_array(value, name) for name, value in grown.constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        onnx.checker.check_model(model)
        onnx.save(model, str(file))
        return file

    @property
    def effective(self) -> QdqModel:
        """The same without the steps that don't fit what they meet."""
        return QdqModel(self.shape, tuple(_grow(self).taken), self.activation, self.weight, self.per_channel, self.seed)


class _Growing:
    """A graph that grows; ``current`` is the tensor at its end."""

    def __init__(self, shape: Shape, seed: int, per_channel: bool) -> None:
        self.per_channel = per_channel
        self.shapes: dict[str, Shape] = {"x": shape}
        self.nodes: list[Any] = []
        self.constants: dict[str, npt.NDArray[Any]] = {}
        self.taken: list[Step] = []
        self.current = "x"
        self.seed = seed

    @property
    def shape(self) -> Shape:
        return self.shapes[self.current]

    def weight(self, *shape: int, fan_in: int = 1, low: float = -1.0, high: float = 1.0) -> str:
        """Weights that keep the size of values about as it is; those of one node don't depend on the others'."""
        rng = np.random.default_rng([self.seed, 2, len(self.nodes), len(self.constants)])
        return self.constant((rng.uniform(low, high, shape) * math.sqrt(3 / fan_in)).astype(np.float32))

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value)
        return name

    def add(self, operator: str, inputs: list[str], shape: Shape, **attributes: Any) -> str:
        """A node with one output, which becomes the current tensor."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(operator, inputs, [name], name=f"{operator}_{len(self.nodes)}", **attributes)
        )
        self.shapes[name] = shape
        self.current = name
        return name

    def earlier(self, number: int, fits: Callable[[Shape], bool]) -> str | None:
        """The ``number``-th of the activations that fit, counted from the newest; None for 0 or where there is none."""
        found = [name for name, shape in self.shapes.items() if fits(shape) and name != self.current][::-1]
        return found[(number - 1) % len(found)] if number and found else None


def _grow(model: QdqModel) -> _Growing:
    growing = _Growing(model.shape, model.seed, model.per_channel or model.weight < 8)
    for step in model.steps:
        if step.operator not in OPERATORS:
            raise OptionError(unknown_name("operator", step.operator, OPERATORS))
        if not growing.nodes and step.operator in MOVERS:
            continue
        if OPERATORS[step.operator](growing, step):
            growing.taken.append(step)
    if not growing.nodes:  # a graph must have a node
        _binary("Add")(growing, Step("Add"))
        growing.taken.append(Step("Add"))
    last = growing.current
    for node in growing.nodes:
        for names in (node.input, node.output):
            names[:] = ["y" if name == last else name for name in names]
    growing.shapes["y"] = growing.shapes.pop(last)
    return growing


# --- operators: each adds its node and says whether it fitted ---------------------------------------------------------

_Adder = Callable[[_Growing, Step], bool]


def _is_image(g: _Growing) -> bool:
    return len(g.shape) == 4


def _conv(g: _Growing, step: Step, depthwise: bool = False) -> bool:
    # no depthwise kernel of 1 x 1: with 4-bit weights and 16-bit activations QNN crashes while it compiles that (QAIRT 2.51)
    if not _is_image(g):
        return False
    _, channels, *sides = g.shape
    small, large = (3, 5) if depthwise else (1, 3)
    kernel, stride, padded = large if step.choice % 2 else small, 2 if step.choice % 4 >= 2 else 1, step.choice % 8 < 4
    pad = kernel // 2 if padded else 0
    out = [(side + 2 * pad - kernel) // stride + 1 for side in sides]
    if min(out) < 1:
        return False
    wanted = channels if depthwise else (4, 8, 3, 16)[step.choice // 8 % 4]
    inner = 1 if depthwise else channels
    weights = g.weight(wanted, inner, kernel, kernel, fan_in=inner * kernel**2)
    inputs = [g.current, weights, g.weight(wanted, fan_in=12)]
    attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
    g.add("Conv", inputs, (1, wanted, *out), group=channels if depthwise else 1, **attributes)
    return True


def _depthwise(g: _Growing, step: Step) -> bool:
    return _conv(g, step, depthwise=True)


def _matmul(g: _Growing, step: Step) -> bool:
    width, wanted = g.shape[-1], (8, 4, 16, 5)[step.choice % 4]
    g.add("MatMul", [g.current, g.weight(width, wanted, fan_in=width)], (*g.shape[:-1], wanted))
    return True


def _gemm(g: _Growing, step: Step) -> bool:
    if len(g.shape) != 2:
        return False
    width, wanted = g.shape[-1], (8, 4, 16, 5)[step.choice % 4]
    inputs = [g.current, g.weight(width, wanted, fan_in=width), g.weight(wanted, fan_in=12)]
    g.add("Gemm", inputs, (g.shape[0], wanted))
    return True


def _binary(operator: str) -> _Adder:
    def add(g: _Growing, step: Step) -> bool:
        second = g.earlier(step.other, lambda shape: shape == g.shape)
        if second is None:
            axis = 1 if len(g.shape) > 1 else 0
            second = g.weight(*[n if i == axis else 1 for i, n in enumerate(g.shape)], low=0.2)
        g.add(operator, [g.current, second], g.shape)
        return True

    return add


def _unary(operator: str, **attributes: Any) -> _Adder:
    def add(g: _Growing, step: Step) -> bool:
        g.add(operator, [g.current], g.shape, **attributes)
        return True

    return add


def _clip(g: _Growing, step: Step) -> bool:
    low, high = ((0.0, 6.0), (-0.5, 0.5), (0.0, 1.0))[step.choice % 3]
    bounds = [g.constant(np.float32(bound)) for bound in (low, high)]
    g.add("Clip", [g.current, *bounds], g.shape)
    return True


def _pool(operator: str) -> _Adder:
    def add(g: _Growing, step: Step) -> bool:
        if not _is_image(g) or min(g.shape[2:]) < 4:
            return False
        kernel, stride = 3 if step.choice % 2 else 2, 1 if step.choice % 4 >= 2 else 2
        out = tuple((side - kernel) // stride + 1 for side in g.shape[2:])
        g.add(operator, [g.current], (*g.shape[:2], *out), kernel_shape=[kernel] * 2, strides=[stride] * 2)
        return True

    return add


def _global_pool(g: _Growing, step: Step) -> bool:
    if not _is_image(g) or max(g.shape[2:]) == 1:
        return False
    g.add("GlobalAveragePool", [g.current], (*g.shape[:2], 1, 1))
    return True


def _concat(g: _Growing, step: Step) -> bool:
    rank = len(g.shape)
    second = g.earlier(
        step.other, lambda shape: len(shape) == rank and (shape[0], *shape[2:]) == (g.shape[0], *g.shape[2:])
    )
    if second is None or g.shape[1] + g.shapes[second][1] > MAX_CHANNELS:
        return False
    channels = g.shape[1] + g.shapes[second][1]
    g.add("Concat", [g.current, second], (g.shape[0], channels, *g.shape[2:]), axis=1)
    return True


def _reshape(g: _Growing, step: Step) -> bool:
    if len(g.shape) == 2:
        return False
    target = (1, math.prod(g.shape)) if step.choice % 2 else (1, g.shape[1], math.prod(g.shape[2:]))
    if target == g.shape or target[-1] > MAX_SIZE**2:
        return False
    g.add("Reshape", [g.current, g.constant(np.array(target, np.int64))], target)
    return True


def _transpose(g: _Growing, step: Step) -> bool:
    rank = len(g.shape)
    if rank < 3:
        return False
    orders = {3: ((0, 2, 1),), 4: ((0, 1, 3, 2), (0, 2, 3, 1), (0, 3, 1, 2))}[rank]
    order = orders[step.choice % len(orders)]
    g.add("Transpose", [g.current], tuple(g.shape[i] for i in order), perm=list(order))
    return True


def _pad(g: _Growing, step: Step) -> bool:
    if not _is_image(g) or max(g.shape[2:]) + 2 > MAX_SIZE:
        return False
    before, after = ((1, 1), (0, 2), (2, 0))[step.choice % 3]
    pads = np.array([0, 0, before, before, 0, 0, after, after], np.int64)
    sides = tuple(side + before + after for side in g.shape[2:])
    g.add("Pad", [g.current, g.constant(pads)], (*g.shape[:2], *sides))
    return True


def _slice(g: _Growing, step: Step) -> bool:
    axis = len(g.shape) - 1 - step.choice % 2
    size = g.shape[axis]
    if axis == 0 or size < 3:
        return False
    bounds = [g.constant(np.array([v], np.int64)) for v in (1, size, axis)]
    g.add("Slice", [g.current, *bounds], tuple(n - 1 if i == axis else n for i, n in enumerate(g.shape)))
    return True


def _resize(g: _Growing, step: Step) -> bool:
    if not _is_image(g) or max(g.shape[2:]) * 2 > MAX_SIZE:
        return False
    scales = g.constant(np.array([1, 1, 2, 2], np.float32))
    attributes = (
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    )[step.choice % 2]
    g.add("Resize", [g.current, "", scales], (*g.shape[:2], *(2 * side for side in g.shape[2:])), **attributes)
    return True


def _layer_norm(g: _Growing, step: Step) -> bool:
    if g.shape[-1] < 4 or g.per_channel:  # QNN refuses its scale with one encoding for each element
        return False
    inputs = [g.current, g.weight(g.shape[-1], low=0.5), g.weight(g.shape[-1], fan_in=12)]
    g.add("LayerNormalization", inputs, g.shape, axis=-1)
    return True


# onnxruntime quantises these only if what they read is quantised already: none can be the first
MOVERS = frozenset({"Relu", "Clip", "MaxPool", "AveragePool", "Reshape", "Transpose", "Slice", "Resize"})

OPERATORS: dict[str, _Adder] = {
    "Add": _binary("Add"),
    "Relu": _unary("Relu"),
    "Conv": _conv,
    "Mul": _binary("Mul"),
    "Sub": _binary("Sub"),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "DepthwiseConv": _depthwise,
    "Clip": _clip,
    "MaxPool": _pool("MaxPool"),
    "AveragePool": _pool("AveragePool"),
    "GlobalAveragePool": _global_pool,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Concat": _concat,
    "Pad": _pad,
    "Slice": _slice,
    "Resize": _resize,
    "LeakyRelu": _unary("LeakyRelu", alpha=0.1),
    "Sigmoid": _unary("Sigmoid"),
    "Tanh": _unary("Tanh"),
    "HardSwish": _unary("HardSwish"),
    "Softmax": _unary("Softmax", axis=-1),
    "LayerNormalization": _layer_norm,
}
