"""Models that HTP itself computes wrong, each as small as it was found to show it, with what was seen and on which release.

Found by the defect bench's healthy part, which runs the ONNX backend node tests and real networks through the derived rule, and by
judging layers alone. A fixed one shows, because its test fails: then it belongs out of here, and limits that were widened for it
tightened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.properties import QdqModel, Step
from tests import small_models
from tests.qdq_graph import QdqGraph

Inputs = dict[str, np.ndarray]
SEEN_WITH = "2.7"  # onnxruntime-qnn, with QAIRT 2.51
ALL = ("SM8350", "SM8650", "SM8850")


@dataclass(frozen=True)
class Issue:
    """One fault of the backend.

    Attributes:
        name: in words.
        build: writes the model, and gives inputs on which the fault shows.
        status: "wrong", or "crash" where the runtime's process dies.
        also: what it may be as well, where chance decides.
        socs: on which it was seen.
        steps: call it wrong beyond so many steps, where the derived rule has to be patient.
    """

    name: str
    build: Callable[[Path], Inputs]
    status: str = "wrong"
    also: tuple[str, ...] = ()
    socs: tuple[str, ...] = ("SM8650",)
    steps: float | None = None


def _float(
    operator: str,
    x: np.ndarray,
    output: list[int],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 19,
    types: dict[str, int] | None = None,
    fed: bool = False,
    **attributes: Any,
) -> Callable[[Path], Inputs]:
    """A float model of one operator: its first input is x, the others are constants, or inputs too where they are ``fed``."""

    def build(file: Path) -> Inputs:
        others = constants or {}
        node = helper.make_node(operator, ["x", *others], ["y"], name=operator.lower(), **attributes)
        given = {"x": x, **(others if fed else {})}
        kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in given.items()} | (types or {})
        shapes = {name: list(array.shape) for name, array in given.items()}
        small_models.save(file, [node], shapes, {"y": output}, {} if fed else others, opset, kinds)
        return given

    return build


def _floats(*shape: int, scale: float = 1.0) -> np.ndarray:
    return np.asarray(scale * np.random.default_rng(7).normal(size=shape), np.float32)


def _unary_16_bits(
    operator: str,
    low: float,
    high: float,
    within: tuple[float, float] = (-3, 3),
    encoded: tuple[float, float] = (-4, 4),
) -> Callable[[Path], Inputs]:
    """One operator: its output encoded from ``low`` to ``high``, its input as ``encoded``, and drawn from ``within``."""

    def build(file: Path) -> Inputs:
        g = QdqGraph()
        y = g.quantize(g.node(operator, [g.quantize("x", *encoded, np.uint16)]), low, high, np.uint16)
        g.save(file, {"x": [1, 64]}, y, [1, 64])
        return {"x": np.linspace(*within, 64, dtype=np.float32)[np.newaxis]}

    return build


def _conv_and_silu(file: Path) -> Inputs:
    """A 1x1 convolution over 10 rows, and x * sigmoid(x), 16 bits: each alone is right."""
    g = QdqGraph()
    w = g.weight(np.random.default_rng(0).normal(size=(8, 4, 1, 1)))
    c = g.quantize(g.node("Conv", [g.quantize("x", -4, 4, np.uint16), w], name="conv"), -8, 8, np.uint16)
    s = g.quantize(g.node("Sigmoid", [c], name="sigmoid"), 0, 1, np.uint16)
    y = g.quantize(g.node("Mul", [c, s], name="silu"), -0.3, 8, np.uint16)
    g.save(file, {"x": [1, 4, 10, 10]}, y, [1, 8, 10, 10])
    return {"x": np.random.default_rng(7).normal(size=(1, 4, 10, 10)).astype(np.float32)}


def _bias_after_conv_transpose(dtype: type) -> Callable[[Path], Inputs]:
    """A bias that is added after a transposed convolution, as Paddle exports it: what comes out has 1, 0, 3 and 1 of it."""

    def build(file: Path) -> Inputs:
        g = QdqGraph()
        w = g.weight(np.random.default_rng(0).normal(size=(4, 4, 2, 2)))
        x = g.quantize("x", -4, 4, dtype)
        c = g.quantize(g.node("ConvTranspose", [x, w], name="up", strides=[2, 2]), -8, 8, dtype)
        b = g.weight(np.array([0.6, -0.2, 3, 1.4]).reshape(1, 4, 1, 1), dtype)
        y = g.quantize(g.node("Add", [c, b], name="bias"), -8, 8, dtype)
        g.save(file, {"x": [1, 4, 4, 4]}, y, [1, 4, 8, 8])
        return {"x": np.random.default_rng(7).normal(size=(1, 4, 4, 4)).astype(np.float32)}

    return build


def _far_weight(file: Path) -> Inputs:
    """A 1x1 convolution with 8-bit asymmetric weights: one of a channel is 235 steps from the zero point, the others a few."""
    g = QdqGraph()
    x = g.quantize("x", 0, 4)
    stored = np.random.default_rng(1).integers(14, 26, (4, 32, 1, 1)).astype(np.uint8)
    stored[2, 5] = 255
    scale, zero = g.constant(np.float32(0.02)), g.constant(np.uint8(20))
    w = g.node("DequantizeLinear", [g.constant(stored), scale, zero])
    y = g.quantize(g.node("Conv", [x, w], name="conv"), -4, 4)
    g.save(file, {"x": [1, 32, 8, 8]}, y, [1, 4, 8, 8])
    data = np.random.default_rng(2).uniform(0, 4, (1, 32, 8, 8)).astype(np.float32)
    data[:, 5] = 0.0  # the far weight has nothing to do: what is wrong is what its neighbours became
    return {"x": data}


def _padded_product(file: Path) -> Inputs:
    """Padding before a matrix product: each alone is right, together the padded elements aren't what they should be."""
    made = QdqModel((1, 1, 12, 12), [Step("Pad", 16), Step("MatMul")], seed=1).save(file.parent)
    made.quantized.replace(file)
    return dict(seeded_inputs(file, 1)[0])


def _stft(file: Path) -> Inputs:
    small_models.crashes_while_compiling(file)
    return {"signal": np.zeros((1, 128, 1), np.float32), "step": np.int64(8), "length": np.int64(16)}


def _grid() -> np.ndarray:
    """Points of which several lie half way between two elements."""
    return np.array([-1, -0.5, -0.2, 0, 0, -0.2, 0.5, 1], np.float32).reshape(1, 2, 4, 1).repeat(2, -1)


ISSUES = (
    Issue(
        "average pooling counts padded elements although it must not",
        _float("AveragePool", _floats(1, 3, 28, 28), [1, 3, 30, 30], kernel_shape=[3, 3], pads=[2, 2, 2, 2]),
    ),
    Issue(
        "average pooling with SAME_LOWER pads on the other side",
        _float("AveragePool", _floats(1, 3, 32, 32), [1, 3, 32, 32], kernel_shape=[2, 2], auto_pad="SAME_LOWER"),
    ),
    Issue(
        "average pooling with SAME_UPPER reads memory that isn't its own",
        _float("AveragePool", _floats(1, 3, 32, 32), [1, 3, 32, 32], kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
        status="wrong",  # whatever lies there: garbage, other garbage the next time, or the end of the process
        also=("unstable", "crash"),
    ),
    Issue(
        "average pooling with ceil_mode",
        _float("AveragePool", _floats(1, 1, 4, 4), [1, 1, 2, 2], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    ),
    Issue(
        "resizing down to the nearest, by a factor",
        _float(
            "Resize",
            _floats(1, 1, 2, 4),
            [1, 1, 1, 2],
            {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 0.6, 0.6], np.float32)},
            mode="nearest",
        ),
    ),
    Issue(
        "resizing down linearly, by a factor",
        _float(
            "Resize",
            _floats(1, 1, 2, 4),
            [1, 1, 1, 2],
            {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 0.6, 0.6], np.float32)},
            mode="linear",
        ),
    ),
    Issue(
        "gathering elements by negative indices that are an input",
        _float(
            "GatherElements",
            _floats(3, 3),
            [2, 3],
            {"i": np.array([[-1, -2, 0], [-2, 0, 0]], np.int64)},
            fed=True,
            axis=0,
        ),
    ),
    Issue(
        "scattering elements by negative indices that are an input",
        _float(
            "ScatterElements",
            _floats(1, 5),
            [1, 5],
            {"i": np.array([[1, -3]], np.int64), "u": np.array([[1.1, 2.1]], np.float32)},
            fed=True,
            axis=1,
        ),
    ),
    Issue(
        "sampling a grid to the nearest, half way between two",
        _float(
            "GridSample",
            np.arange(6, dtype=np.float32).reshape(1, 1, 3, 2),
            [1, 1, 2, 4],
            {"g": _grid()},
            opset=20,
            fed=True,
            mode="nearest",
        ),
    ),
    Issue(
        "resizing up to the nearest, to a size",
        _float(
            "Resize",
            np.arange(1, 5, dtype=np.float32).reshape(1, 1, 2, 2),
            [1, 1, 7, 8],
            {
                "roi": np.zeros(0, np.float32),
                "scales": np.zeros(0, np.float32),
                "sizes": np.array([1, 1, 7, 8], np.int64),
            },
            mode="nearest",
        ),
    ),
    Issue(
        "Lp pooling with SAME_UPPER",
        _float("LpPool", _floats(1, 3, 32, 32), [1, 3, 32, 32], kernel_shape=[2, 2], auto_pad="SAME_UPPER"),
        status="crash",
        also=("unstable", "wrong"),
    ),
    Issue(
        "log-softmax of differences that float16 can't hold",
        _float("LogSoftmax", np.array([[0, 1, 2, 3], [1e4, 1e4 + 1, 1e4 + 2, 1e4 + 3]], np.float32), [2, 4]),
    ),
    Issue(
        "infinity is not a number, it says",
        _float(
            "IsNaN",
            np.array([-1.2, np.nan, np.inf, 2.8, -np.inf, np.inf], np.float32),
            [6],
            opset=20,
            types={"y": TensorProto.BOOL},
        ),
    ),
    Issue(
        "softmax of differences that float16 can't hold",
        _float("Softmax", np.array([[0, 1, 2, 3], [1e4, 1e4 + 1, 1e4 + 2, 1e4 + 3]], np.float32), [2, 4]),
    ),
    Issue(
        "remainder of unsigned 8-bit integers",
        _float(
            "Mod",
            np.array([4, 7, 5], np.uint8),
            [3],
            {"d": np.array([2, 3, 8], np.uint8)},
            types={"x": TensorProto.UINT8, "y": TensorProto.UINT8},
        ),
    ),
    Issue("short-time Fourier transform whose frame is an input", _stft, status="crash"),
    Issue("padding that is fused into a matrix product", _padded_product),
    Issue("16-bit HardSigmoid at a graph's output ignores its encoding", _unary_16_bits("HardSigmoid", 0, 0.7)),
    Issue("16-bit Tanh at a graph's output ignores its encoding", _unary_16_bits("Tanh", -0.8, 0.8)),
    Issue("16-bit logarithm of a range that begins at 0", _unary_16_bits("Log", -1.0, 1.4, (0.4, 4), (0, 4)), socs=ALL),
    Issue("Softplus with 16 bits has the accuracy of 8", _unary_16_bits("Softplus", 0, 4), socs=ALL, steps=16),
    Issue(
        "16-bit convolution and SiLU, fused, over 9 to 12 rows",
        _conv_and_silu,
        also=("unstable",),  # in a real net it was seen to differ from process to process
        socs=ALL,
    ),
    Issue(
        "8-bit bias after a transposed convolution is rounded to whole numbers",
        _bias_after_conv_transpose(np.uint8),
        socs=ALL,
    ),
    Issue(
        "16-bit bias after a transposed convolution is rounded to whole numbers",
        _bias_after_conv_transpose(np.uint16),
        socs=ALL,
    ),
    Issue("8-bit weights further than 127 steps from the zero point are rounded again", _far_weight, steps=2),
)
