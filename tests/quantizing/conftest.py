"""A small classifier and data for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests import small_models

Sample = dict[str, np.ndarray]


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def net(path: Path, opset: int = 17) -> Path:
    """Conv, BatchNormalization, Relu, pooling, Gemm: x[batch, 3, 16, 16] -> y[batch, 4], with metadata."""
    small_models.save(
        path,
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1] * 4),
            helper.make_node("BatchNormalization", ["c", "s", "o", "m", "v"], ["n"], name="bn"),
            helper.make_node("Relu", ["n"], ["r"], name="relu"),
            helper.make_node("GlobalAveragePool", ["r"], ["g"], name="pool"),
            helper.make_node("Flatten", ["g"], ["f"], name="flatten"),
            helper.make_node("Gemm", ["f", "fw", "fb"], ["y"], name="gemm"),
        ],
        {"x": ["batch", 3, 16, 16]},
        {"y": ["batch", 4]},
        {
            "w": floats(8, 3, 3, 3),
            "b": floats(8),
            "s": 1 + 0.1 * floats(8, seed=1),
            "o": floats(8, seed=2),
            "m": floats(8, seed=3),
            "v": np.abs(floats(8, seed=4)) + 0.5,
            "fw": floats(8, 4),
            "fb": floats(4),
        },
        opset=opset,
    )
    model = onnx.load(str(path))
    helper.set_model_props(model, {"author": "somebody"})
    onnx.save(model, str(path))
    return path


def samples(count: int = 12, seed: int = 5) -> list[Sample]:
    return [{"x": floats(1, 3, 16, 16, seed=seed + i)} for i in range(count)]


@pytest.fixture(scope="session")
def float_net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return net(tmp_path_factory.mktemp("float") / "net.onnx")


@pytest.fixture
def quantize_net(float_net: Path, tmp_path: Path) -> Callable[..., Any]:
    """``quantize_net(data, **options)``: quantise the classifier to ``net.qdq.onnx`` in the test's folder."""
    from pytest_qnn.model import quantize

    def run(data: object = None, **options: Any) -> Any:
        options.setdefault("dimensions", {"batch": 1})
        return quantize(float_net, samples() if data is None else data, tmp_path / "net.qdq.onnx", **options)

    return run
