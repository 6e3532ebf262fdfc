"""Lint: every rule finds its flaw, leaves the healthy twin alone, and the flaw makes a difference on the simulated HTP."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from pytest_qnn import (
    CompileError,
    InputError,
    LintError,
    ModelError,
    OptionError,
    PlacementError,
    RuntimeCrashError,
    UsageError,
    assert_lint_clean,
)
from pytest_qnn.backend import Backend
from pytest_qnn.bench import Bench
from pytest_qnn.cli import main
from pytest_qnn.lint.check import lint
from pytest_qnn.lint.findings import RULES
from tests import small_models
from tests.qdq_graph import QdqGraph

SHAPE = [1, 8, 8, 8]
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(8, 8, 3, 3)).astype(np.float32) / 8
IDENTITY = np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1)
SPREAD = np.geomspace(1, 1 / 300, 8).astype(np.float32)


def data(count: int = 2, low: float = -12, high: float = 12) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(i).uniform(low, high, SHAPE).astype(np.float32)} for i in range(count)]


# --- models with a flaw, and their twins without it ---------------------------------------------------------------------------


def conv(g: QdqGraph, tensor: str, weight: np.ndarray = IDENTITY, dtype: Any = np.int8, axis: int | None = None) -> str:
    pads = [weight.shape[-1] // 2] * 4
    return g.node("Conv", [tensor, g.weight(weight, dtype, axis)], "conv", pads=pads)


def save(g: QdqGraph, path: Path, output: str, shape: list[Any] | None = None) -> Path:
    return g.save(path, {"x": SHAPE}, output, SHAPE if shape is None else shape)


def ranked(path: Path, flawed: bool) -> Path:
    return small_models.unary(path, "Relu", shape=(1, 2, 2, 2, 2, 2) if flawed else (1, 4, 2, 2, 2))


def signed(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    x = g.quantize("x", -12, 12, np.int16)
    return save(g, path, g.quantize(conv(g, x, dtype=np.uint8 if flawed else np.int8), -12, 12, np.int16))


def wide_weights(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    dtype = np.uint8 if flawed else np.uint16
    return save(g, path, g.quantize(conv(g, g.quantize("x", -12, 12, dtype), dtype=np.int16), -12, 12, dtype))


def encoded_sigmoid(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    y = g.node("Sigmoid", [g.quantize("x", -12, 12, np.uint16)], "sigmoid")
    return save(g, path, g.quantize(y, 0, 0.9 if flawed else 1.0, np.uint16))


def encoded_tanh(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    y = g.node("Tanh", [g.quantize("x", -12, 12, np.uint16)], "tanh")
    return save(g, path, g.quantize(y, *((-2, 2) if flawed else (-1, 1)), np.uint16))


def clipped(path: Path, flawed: bool, dtype: Any = np.uint8) -> Path:
    g = QdqGraph()
    t = conv(g, g.quantize("x", -12, 12, dtype))
    if flawed:
        t = g.quantize(t, -12, 12, dtype)
    limits = [g.constant(np.float32(value)) for value in (0, 6)]
    return save(g, path, g.quantize(g.node("Clip", [t, *limits], "clip"), 0, 12 if flawed else 6, dtype))


def clipped_16bit(path: Path, flawed: bool) -> Path:
    return clipped(path, flawed, np.uint16)


def added_bias(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    bias = np.array([0.6, -0.2, 3, 1.4] * 2)
    inputs = [g.quantize("x", -12, 12), g.weight(IDENTITY)]
    if not flawed:
        scale = np.float32(24 / 255 * g.constants[g.nodes[-1].input[1]])
        stored = [np.rint(bias / scale).astype(np.int32), scale, np.int32(0)]
        inputs.append(g.node("DequantizeLinear", [g.constant(value) for value in stored]))
    t = g.node("ConvTranspose", inputs, "up")
    if flawed:
        constant = g.weight(bias.reshape(1, 8, 1, 1), np.uint8)
        t = g.node("Add", [g.quantize(t, -12, 12), constant], "bias")
    return save(g, path, g.quantize(t, -12, 14))


def gated(path: Path, flawed: bool) -> Path:
    """SiLU over 10 columns and rows, and over 8."""
    g = QdqGraph()
    pads = [1 if flawed else 0] * 4
    t = g.node("Conv", [g.quantize("x", -12, 12, np.uint16), g.weight(IDENTITY)], "conv", pads=pads)
    t = g.quantize(t, -12, 12, np.uint16)
    s = g.quantize(g.node("Sigmoid", [t], "sigmoid"), 0, 1, np.uint16)
    y = g.quantize(g.node("Mul", [t, s], "silu"), -0.3, 12, np.uint16)
    return save(g, path, y, [1, 8, 10, 10] if flawed else SHAPE)


def uneven_weights(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    weight = KERNEL * SPREAD[:, None, None, None]
    t = conv(g, g.quantize("x", -12, 12, np.uint16), weight, axis=None if flawed else 0)
    return save(g, path, g.quantize(t, -40, 40, np.uint16))


def symmetric_sigmoid(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    y = g.node("Sigmoid", [g.quantize("x", -12, 12)], "sigmoid")
    return save(g, path, g.quantize(y, -1 if flawed else 0, 1))


def concatenated(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    x = g.quantize("x", -12, 12)
    small = 0.1 if flawed else 12.0
    scaled = g.node("Mul", [x, g.quantize(g.constant(np.float32(small / 12)), 0, small / 12)], "mul")
    y = g.node("Concat", [g.quantize(scaled, -small, small), x], "concat", axis=1)
    return save(g, path, g.quantize(y, -12, 12), [1, 16, 8, 8])


def island(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    t = g.node("Sigmoid", [g.quantize("x", -12, 12)], "sigmoid")
    if not flawed:
        t = g.quantize(t, 0, 1)
    return save(g, path, g.quantize(conv(g, t), 0, 1))


def relu_beyond_its_range(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    t = g.node("Relu", [conv(g, g.quantize("x", -12, 12))], "relu")
    return save(g, path, g.quantize(t, -12 if flawed else 0, 12))


def float_operand(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    factor = g.constant(np.linspace(0.5, 1.5, 8, dtype=np.float32).reshape(1, 8, 1, 1))
    y = g.node("Mul", [g.quantize("x", -12, 12), factor if flawed else g.quantize(factor, 0, 2)], "mul")
    return save(g, path, g.quantize(y, -18, 18))


def float_weights(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    weight = g.constant(np.eye(8, dtype=np.float32)) if flawed else g.weight(np.eye(8))
    return save(g, path, g.quantize(g.node("MatMul", [g.quantize("x", -12, 12), weight], "matmul"), -12, 12))


def batchnorm(path: Path, flawed: bool) -> Path:
    """Conv, BatchNormalization and Relu; the flaw is that the quantiser was given them unfolded.

    At 16 bits HTP gets a BatchNormalization wrong that amplifies some channels a lot (these by up to ten).
    """
    from onnxruntime.quantization import QuantType

    rng = np.random.default_rng(5)
    w, b = 0.2 * rng.normal(size=(16, 8, 3, 3)), 0.1 * rng.normal(size=16)
    gamma, beta, mean = rng.uniform(0.1, 3, 16), rng.normal(size=16), 0.1 * rng.normal(size=16)
    variance = rng.uniform(0.05, 2, 16)
    factor = gamma / np.sqrt(variance)
    g = QdqGraph()
    if flawed:
        t = g.node("Conv", ["x", *(g.constant(v.astype(np.float32)) for v in (w, b))], "conv", pads=[1] * 4)
        parameters = (gamma, beta, mean, variance)
        t = g.node("BatchNormalization", [t, *(g.constant(v.astype(np.float32)) for v in parameters)], "bn")
    else:
        folded = (w * factor[:, None, None, None], (b - mean) * factor + beta)
        t = g.node("Conv", ["x", *(g.constant(v.astype(np.float32)) for v in folded)], "conv", pads=[1] * 4)
    source = save(g, path.with_suffix(".float.onnx"), g.node("Relu", [t], "relu"), [1, 16, 8, 8])
    return small_models.quantized(source, path, activation_type=QuantType.QUInt16)


def separate_relu(path: Path, flawed: bool) -> Path:
    g = QdqGraph()
    t = conv(g, g.quantize("x", -12, 12))
    if flawed:
        t = g.quantize(t, -12, 12)
    return save(g, path, g.quantize(g.node("Relu", [t], "relu"), 0, 12))


# --- how a flaw shows -------------------------------------------------------------------------------------------------------


def decibels(reference: np.ndarray, other: np.ndarray) -> float:
    noise = float(((reference - other) ** 2).sum())
    return 10 * math.log10(float((reference**2).sum()) / noise) if noise else 200.0


def refused(htp: Backend, file: Path) -> bool:
    """Whether a model doesn't compile, or nodes leave the backend."""
    try:
        return bool(htp.load(file).placement.misplaced)
    except (CompileError, PlacementError):
        return True


def operations(htp: Backend, file: Path) -> int:
    """How many operations HTP compiled the model to."""
    return len(htp.load(file).profile(data(1)[0]).nodes)


def sqnr(htp: Backend, file: Path) -> float:
    """Of HTP's results against onnxruntime's of the same quantised model."""
    run = htp.load(file).run(data())
    expected = htp.bench.reference(file).run(list(run.samples))
    return decibels(np.stack([e["y"] for e in expected]), np.asarray(run.output()))


def worst_channel(htp: Backend, file: Path) -> float:
    """SQNR of the channel that fares worst, against exact arithmetic on the weights before they were quantised."""
    x = data(1)[0]["x"]
    y = np.asarray(htp.load(file).run(x).output())
    exact = htp.bench.reference(file.parent / "exact.onnx").run({"x": x})["y"]
    return min(decibels(exact[:, c], y[:, c]) for c in range(exact.shape[1]))


def exact_of(make: Callable[[QdqGraph], str], folder: Path, shape: list[int]) -> None:
    g = QdqGraph()
    save(g, folder / "exact.onnx", make(g), shape)


def exact_conv(g: QdqGraph) -> str:
    return g.node("Conv", ["x", g.constant(KERNEL * SPREAD[:, None, None, None])], pads=[1] * 4)


def exact_concat(small: float) -> Callable[[QdqGraph], str]:
    return lambda g: g.node("Concat", [g.node("Mul", ["x", g.constant(np.float32(small / 12))]), "x"], axis=1)


def exact_sigmoid(g: QdqGraph) -> str:
    return g.node("Sigmoid", ["x"])


@dataclass(frozen=True)
class Flaw:
    """A rule, a model with its flaw (and without), the node that must be named, and how the flaw shows."""

    rule: str
    make: Callable[[Path, bool], Path]
    node: str
    shows: Callable[[Backend, Path], Any]
    exact: tuple[Callable[[QdqGraph], str], Callable[[QdqGraph], str], list[int]] | None = None
    also: tuple[str, ...] = ()


FLAWS = {
    "rank": Flaw("rank", ranked, "n0", refused, also=("falls-back",)),
    "signed-16bit": Flaw("signed-16bit", signed, "conv", refused, also=("refused",)),
    "weight-type": Flaw("weight-type", wide_weights, "conv", refused, also=("refused",)),
    "sigmoid": Flaw("fixed-encoding", encoded_sigmoid, "sigmoid", sqnr),
    "tanh": Flaw("fixed-encoding", encoded_tanh, "tanh", sqnr),
    "clip": Flaw("clip-lost", clipped, "clip", sqnr, also=("unused-range",)),
    "clip, 16 bits": Flaw("clip-lost", clipped_16bit, "clip", sqnr),
    "bias": Flaw("bias-rounded", added_bias, "bias", sqnr),
    "silu": Flaw("silu-fused", gated, "silu", sqnr),
    "weight-range": Flaw("weight-range", uneven_weights, "conv", worst_channel, (exact_conv, exact_conv, SHAPE)),
    "unused-range": Flaw("unused-range", symmetric_sigmoid, "sigmoid", worst_channel, (exact_sigmoid,) * 2 + (SHAPE,)),
    "concat-range": Flaw(
        "concat-range", concatenated, "concat", worst_channel, (exact_concat(0.1), exact_concat(12.0), [1, 16, 8, 8])
    ),
    "island": Flaw("float-island", island, "sigmoid", operations),
    "relu": Flaw("float-island", relu_beyond_its_range, "relu", operations, also=("unused-range",)),
    "operand": Flaw("float-constant", float_operand, "mul", operations),
    "weights": Flaw("float-constant", float_weights, "matmul", operations),
    "batchnorm": Flaw("unfused-batchnorm", batchnorm, "bn", sqnr),
    "separate relu": Flaw("unfused-activation", separate_relu, "relu", operations),
}


@pytest.mark.parametrize("flaw", FLAWS.values(), ids=FLAWS.keys())
def test_a_flaw_is_found_and_makes_a_difference(htp: Backend, tmp_path: Path, flaw: Flaw) -> None:
    bad, good = (tmp_path / name for name in ("bad", "good"))
    shown = {}
    for folder, flawed in ((bad, True), (good, False)):
        folder.mkdir()
        file = flaw.make(folder / "model.onnx", flawed)
        report = lint(file, backend=htp)
        found = {f.rule for f in report.findings}
        assert found == ({flaw.rule, *flaw.also} if flawed else set()), report
        if flawed:
            assert {f.node for f in report.findings if f.rule == flaw.rule} == {flaw.node}
        if flaw.exact is not None:
            exact_of(flaw.exact[0 if flawed else 1], folder, flaw.exact[2])
        shown[flawed] = flaw.shows(htp, file)
    if flaw.shows is refused:
        assert shown == {True: True, False: False}
    elif flaw.shows is operations:
        assert shown[True] > shown[False]
    else:
        assert shown[True] < shown[False] - 3, f"{shown} dB"


def test_every_rule_of_the_file_has_a_flaw_above() -> None:
    rules = {name for name, rule in RULES.items() if rule.needs == "the model"}
    assert rules - {f.rule for f in FLAWS.values()} == {"dynamic-shape"}  # which the next test is about


def test_dynamic_shapes_are_found_until_sizes_are_given(htp: Backend, tmp_path: Path) -> None:
    file = small_models.unary(tmp_path / "m.onnx", "Relu", shape=("batch", 16))
    report = lint(file, backend=htp)
    assert [(f.rule, f.node) for f in report.findings] == [("dynamic-shape", "x")]
    assert "dimensions={'batch': 1}" in report.findings[0].remedy
    assert report.not_checked["falls-back"] == "needs fixed shapes"
    assert lint(file, backend=htp, dimensions={"batch": 2}).ok


# --- rules on data ----------------------------------------------------------------------------------------------------------


def calibrated(path: Path, low: float, high: float, dtype: Any = np.uint8) -> Path:
    g = QdqGraph()
    return save(g, path, g.quantize(conv(g, g.quantize("x", low, high, dtype)), low, high, dtype))


@pytest.mark.parametrize(
    ("rule", "samples"),
    [("activation-clipped", data(2, -100, 100)), ("unused-range", data(2, -0.5, 0.5))],
)
def test_data_that_an_encoding_does_not_fit(htp: Backend, tmp_path: Path, rule: str, samples: list[Any]) -> None:
    file = calibrated(tmp_path / "m.onnx", -12, 12)
    report = lint(file, data=samples)
    assert {f.rule for f in report.findings} == {rule}
    assert "x" in {f.node for f in report.findings}
    assert lint(file, data=data()).ok

    def kept(inputs: list[Any]) -> float:
        return decibels(np.stack([s["x"] for s in inputs]), np.asarray(htp.load(file).run(inputs).output()))

    assert kept(samples) < 25 < 35 < kept(data())


def test_values_that_eight_bits_are_too_few_for(htp: Backend, tmp_path: Path) -> None:
    """One large element among thousands of small ones takes all the range, as in a Softmax over many classes."""
    shape = [1, 8, 64, 64]
    x = np.random.default_rng(0).uniform(-0.1, 0.1, shape).astype(np.float32)
    x[0, 0, 0, 0] = 12

    def loss(dtype: Any) -> tuple[set[str], float]:
        g = QdqGraph()
        y = g.quantize(g.node("Relu", [g.quantize("x", -12, 12, dtype)], "relu"), 0, 12, dtype)
        file = g.save(tmp_path / f"{np.dtype(dtype)}.onnx", {"x": shape}, y, shape)
        run = htp.load(file).run(x)
        return {f.key for f in lint(file, data=[{"x": x}]).findings}, decibels(x.clip(0), np.asarray(run.output()))

    (found, bad), (nothing, good) = loss(np.uint8), loss(np.uint16)
    assert found == {"activation-noise:x"}
    assert not nothing
    assert bad < 20 < 50 < good


def test_floats_beyond_float16(htp: Backend, tmp_path: Path) -> None:
    def scaled(path: Path, factor: float) -> Path:
        g = QdqGraph()
        t = g.node("Mul", ["x", g.constant(np.float32(factor))], "up")
        return save(g, path, g.node("Mul", [t, g.constant(np.float32(1 / factor))], "down"))

    bad, good = scaled(tmp_path / "bad.onnx", 1e5), scaled(tmp_path / "good.onnx", 1e3)
    report = lint(bad, data=data())
    assert [(f.rule, f.node) for f in report.findings] == [("float16-overflow", "up")]
    assert lint(good, data=data()).ok
    assert sqnr(htp, bad) < 10 < 50 < sqnr(htp, good)


def test_sums_that_htp_keeps_wider_are_no_overflow(htp: Backend, tmp_path: Path) -> None:
    """A Conv's 288,000 does no harm, and a product keeps twice float16's range until it is stored."""
    g = QdqGraph()
    t = g.node("Mul", ["x", g.constant(np.float32(3000))])
    t = g.node("Conv", [t, g.constant(np.ones((8, 8, 1, 1), np.float32))])
    t = g.node("Mul", [t, g.constant(np.float32(7000 / 3000 / 8))])
    file = save(g, tmp_path / "m.onnx", g.node("Mul", [t, g.constant(np.float32(1 / 7000))]))
    assert lint(file, data=data(2, 6, 12)).ok
    run = htp.load(file).run(data(2, 6, 12))
    expected = htp.bench.reference(file).run(list(run.samples))
    assert decibels(np.stack([e["y"] for e in expected]), np.asarray(run.output())) > 50


def test_masks_before_a_softmax_are_no_overflow(tmp_path: Path) -> None:
    g = QdqGraph()
    mask = np.where(np.arange(8) < 6, 0, -3e38).astype(np.float32)
    y = g.node("Softmax", [g.node("Add", [g.node("Relu", ["x"]), g.constant(mask)], "masked")], axis=-1)
    assert lint(save(g, tmp_path / "m.onnx", y), data=data()).ok


def test_integers_beyond_32_bits(htp: Backend, tmp_path: Path) -> None:
    g = QdqGraph()
    y = g.node("Add", ["x", g.constant(np.array([1, 2, 3, 4], np.int64))], "add")
    types = {"x": TensorProto.INT64, "y": TensorProto.INT64}
    file = g.save(tmp_path / "m.onnx", {"x": [4]}, y, [4], types)
    large, small = np.array([5, 6, 7, 2**33], np.int64), np.array([5, 6, 7, 8], np.int64)
    assert [f.rule for f in lint(file, data=[{"x": large}]).findings] == ["int64-overflow"]
    assert lint(file, data=[{"x": small}]).ok
    session = htp.load(file)
    assert session.run(large).output().tolist() != [6, 8, 10, 2**33 + 4]
    assert session.run(small).output().tolist() == [6, 8, 10, 12]


# --- rules on a backend ---------------------------------------------------------------------------------------------------------


def test_nodes_that_fall_back_come_with_the_reason(htp: Backend, tmp_path: Path) -> None:
    file = small_models.unary(tmp_path / "m.onnx", "Relu", "Erf", "Relu")
    findings = lint(file, backend=htp).findings
    assert [(f.rule, f.node, f.op_type) for f in findings] == [("falls-back", "n1", "Erf")]
    assert "Operators of type `Erf` are not supported" in findings[0].reason
    assert [f.node for f in lint(htp.load(file)).findings] == ["n1"], "a session brings its placement along"
    unchecked = lint(file)
    assert unchecked.ok
    assert unchecked.not_checked["falls-back"] == "needs a backend to compile on"


def test_quantizers_that_went_with_their_operator_are_not_named(htp: Backend, tmp_path: Path) -> None:
    g = QdqGraph()
    t = g.quantize(g.node("Relu", [g.quantize("x", -12, 12)], "relu"), 0, 12)
    file = save(g, tmp_path / "m.onnx", g.quantize(g.node("Erf", [t], "erf"), 0, 1))
    findings = lint(file, backend=htp).findings
    assert [(f.rule, f.node) for f in findings] == [("falls-back", "erf")]
    assert "`Erf` are not supported" in findings[0].reason


def test_a_compiler_that_dies_is_the_benchs_fault_and_never_clean(htp: Backend, tmp_path: Path) -> None:
    file = small_models.crashes_while_compiling(tmp_path / "m.onnx")
    report = lint(file, backend=htp)
    assert isinstance(report.fault, RuntimeCrashError)
    assert not report.ok
    with pytest.raises(RuntimeCrashError, match="SIGSEGV"):
        assert_lint_clean(file, backend=htp)
    assert lint(file).ok, "the file alone shows nothing"


# --- healthy models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"activation_symmetric": False}], ids=str)
@pytest.mark.parametrize("activations", ["QUInt8", "QUInt16"])
def test_what_onnxruntime_quantizes_well_is_clean(
    htp: Backend, models: Path, tmp_path: Path, activations: str, options: dict[str, Any]
) -> None:
    from onnxruntime.quantization import QuantType

    file = small_models.quantized(
        models / "conv.onnx",
        tmp_path / "m.onnx",
        activation_type=getattr(QuantType, activations),
        weight_type=QuantType.QInt8,
        **options,
    )
    samples = [{"x": np.random.default_rng(i).normal(size=(1, 3, 16, 16)).astype(np.float32)} for i in range(4)]
    report = assert_lint_clean(file, data=samples, backend=htp)
    assert report.not_checked == {}


def test_a_float_model_is_clean(htp: Backend, models: Path) -> None:
    assert_lint_clean(models / "conv.onnx", backend=htp)


def test_values_that_lead_to_shapes_and_indices_are_no_islands(tmp_path: Path) -> None:
    g = QdqGraph()
    x = g.quantize("x", -12, 12)
    shape = g.node("Shape", [x])
    y = g.quantize(g.node("Sigmoid", [g.node("Reshape", [x, shape])], "sigmoid"), 0, 1)
    assert lint(save(g, tmp_path / "m.onnx", y)).ok


def test_a_float_tail_is_no_island(tmp_path: Path) -> None:
    g = QdqGraph()
    t = g.quantize(conv(g, g.quantize("x", -12, 12)), -12, 12)
    assert lint(save(g, tmp_path / "m.onnx", g.node("Softmax", [t], "softmax"))).ok


# --- ignoring -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    return symmetric_sigmoid(tmp_path / "m.onnx", True)


@pytest.mark.parametrize("ignore", [["unused-range"], ["unused-range:sigmoid"], ("unused-range:sigmoid", "falls-back")])
def test_findings_can_be_ignored_by_rule_and_by_node(flawed: Path, ignore: Any) -> None:
    report = assert_lint_clean(flawed, ignore=ignore)
    assert [f.key for f in report.ignored] == ["unused-range:sigmoid"]


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        (["unused-rnage"], "unknown rule 'unused-rnage'. Did you mean 'unused-range'?"),
        (["unused-range:sigmiod"], "unknown node of a unused-range finding 'sigmiod'. Did you mean 'sigmoid'?"),
        (["rank"], "ignore 'rank' fits no finding: the model has no such flaw .any more.: remove it"),
        (["rank:sigmoid"], "ignore 'rank:sigmoid' fits no finding"),
        ("unused-range", "ignore takes a list such as .*: put it in a list"),
        ([3], "ignore: 3 is no text"),
    ],
)
def test_an_ignore_that_fits_nothing_is_a_mistake(flawed: Path, ignore: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        lint(flawed, ignore=ignore)


def test_a_failure_says_node_reason_remedy_and_how_to_ignore_it(flawed: Path) -> None:
    with pytest.raises(LintError) as caught:
        assert_lint_clean(flawed)
    text = str(caught.value)
    assert text.startswith("m.onnx: 1 finding, 0 errors")
    assert "warning: unused-range: sigmoid (Sigmoid): its output is encoded for -0.9961..1.004" in text
    assert "50% can't occur" in text
    assert "remedy: quantise its output over the range that it has" in text
    assert "ignore: 'unused-range:sigmoid'" in text
    assert "not checked: refused, falls-back: needs a backend to compile on" in text
    assert caught.value.verdict.findings[0].rule == "unused-range"


# --- bad input ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ("nowhere", "nowhere: there is no such file or folder"),
        ([], "there are no samples in it"),
        ([{"z": np.zeros(SHAPE, np.float32)}], "unknown input 'z'"),
        ([{"x": np.zeros([1, 8, 8], np.float32)}], "got shape"),
    ],
)
def test_data_that_does_not_fit_the_model(flawed: Path, samples: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lint(flawed, data=samples)


def test_what_lint_does_not_take(htp: Backend, cpu: Backend, bench: Bench, flawed: Path, models: Path) -> None:
    with pytest.raises(UsageError, match="takes the path of a model or a session, got int"):
        lint(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="lint is about htp, this backend is cpu"):
        lint(flawed, backend=cpu)
    with pytest.raises(UsageError, match="a session brings its own backend"):
        lint(htp.load(flawed), backend=htp)
    with pytest.raises(ModelError, match="not an ONNX model"):
        (flawed.parent / "text.onnx").write_text("no model" * 50)
        lint(flawed.parent / "text.onnx")


def test_weights_in_external_data_are_looked_at(tmp_path: Path) -> None:
    file = uneven_weights(tmp_path / "m.onnx", True)
    proto = onnx.load(str(file))
    onnx.save(proto, str(file), save_as_external_data=True, location="weights.bin", size_threshold=0)
    report = lint(file, data=data())
    assert {f.rule for f in report.findings} == {"weight-range"}


def test_graphs_inside_of_nodes_are_said_not_to_be_looked_at(tmp_path: Path) -> None:
    from onnx import helper

    def branch(name: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4])
        return helper.make_graph([helper.make_node("Relu", ["x"], [name])], name, [], [value])

    node = helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch("a"), else_branch=branch("b"))
    file = small_models.save(
        tmp_path / "m.onnx", [node], {"x": [1, 4], "c": []}, {"y": [1, 4]}, types={"c": TensorProto.BOOL}
    )
    assert "nodes inside of If, Loop and Scan are not looked at" in lint(file).not_checked.values()


# --- in a test, and on the command line ---------------------------------------------------------------------------------------------------


def test_lint_in_a_test(project: Callable[..., pytest.RunResult], models: Path) -> None:
    result = project(
        """
def test_clean(qnn_backend):
    assert_lint_clean("conv.qdq.onnx", backend=qnn_backend)
def test_session(qnn_backend):
    assert_lint_clean(qnn_backend.load("conv.onnx"))
def test_stale():
    assert_lint_clean("conv.onnx", ignore=["rank"])
"""
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*ignore 'rank' fits no finding*"])


def test_lint_on_the_command_line(
    flawed: Path, models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(flawed.parent)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["lint", str(models / "conv.qdq.onnx"), "--no-compile"]) == 0
    assert "conv.qdq.onnx: clean" in capsys.readouterr().out
    assert main(["lint", "m.onnx"]) == 1
    printed = capsys.readouterr().out
    assert "warning unused-range  sigmoid (Sigmoid)" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert main(["lint", "m.onnx", "--ignore", "unused-range:sigmoid", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert [f["ignore"] for f in report["ignored"]] == ["unused-range:sigmoid"]
    assert report["not_checked"].keys() == {
        "activation-clipped",
        "activation-noise",
        "float16-overflow",
        "int64-overflow",
    }
    np.save("sample.npy", data(1)[0]["x"])
    assert main(["lint", "m.onnx", "--data", "sample.npy", "--json", "--no-compile"]) == 1
    assert json.loads(capsys.readouterr().out)["not_checked"] == {
        "refused": "--no-compile was given",
        "falls-back": "--no-compile was given",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.onx"], "Did you mean 'm.onnx'?"),
        (["m.onnx", "--ignore", "rnak"], "unknown rule 'rnak'. Did you mean 'rank'?"),
        (["m.onnx", "--ignore", "rank"], "ignore 'rank' fits no finding"),
        (["m.onnx", "--data", "nowhere"], "there is no such file or folder"),
        (["m.onnx", "--dimensions", "batch=1"], "no dynamic dimension 'batch'"),
        (["m.onnx", "--soc", "SM1"], "unknown SoC 'SM1'"),
        ([], "name the model, or ask for --rules"),
    ],
)
def test_mistakes_on_the_command_line(
    flawed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(flawed.parent)
    assert main(["lint", *arguments, "--no-compile"]) == 2
    assert message in capsys.readouterr().err


def test_the_page_lists_every_rule() -> None:
    page = (Path(__file__).parent.parent / "docs" / "lint.md").read_text(encoding="utf-8")
    assert [rule for rule in RULES if f"`{rule}`" not in page] == []
