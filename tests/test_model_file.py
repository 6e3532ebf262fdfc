"""What is read off an ONNX file: encodings, precisions, digests; and the model without its rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from pytest_qnn.bench import Bench
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.model.rounding import without_rounding
from tests import small_models


def test_encodings_of_the_graphs_ends(models: Path) -> None:
    model = read_model(models / "conv.qdq.onnx")
    x, y = model.inputs[0].encoding, model.outputs[0].encoding
    assert x is not None
    assert y is not None
    assert (x.bits, y.bits, y.zero_point) == (8, 8, (0,))
    assert x.range[0] < -3 < 3 < x.range[1]
    assert y.range == (0.0, pytest.approx(255 * y.step))


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, "A8W8"),
        ({"activation_type": "uint16"}, "A16W8"),
        ({"weight_type": "int4", "per_channel": True}, "A8W4"),
        ({"per_channel": True}, "A8W8"),
    ],
)
def test_the_precision_is_named(models: Path, tmp_path: Path, options: dict[str, object], precision: str) -> None:
    from onnxruntime.quantization import QuantType

    types = {"uint16": QuantType.QUInt16, "int4": QuantType.QInt4}
    chosen = {k: types.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
    file = small_models.quantized(models / "conv.onnx", tmp_path / "m.onnx", **chosen)
    assert read_model(file).precision == precision
    assert read_model(models / "conv.onnx").precision == "f32"


def test_an_encoding_passes_through_operators_that_only_move_elements(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"),
        helper.make_node("Transpose", ["d"], ["t"], name="t", perm=[1, 0]),
        helper.make_node("Flatten", ["t"], ["y"], name="f"),
    ]
    constants = {"s": np.array(0.5, np.float32), "z": np.array(3, np.uint8)}
    model = read_model(small_models.save(tmp_path / "m.onnx", nodes, {"x": [2, 4]}, {"y": [4, 2]}, constants))
    assert model.outputs[0].encoding == Encoding((0.5,), (3,), "uint8")


@pytest.mark.parametrize(
    ("dtype", "zero", "low", "high"),
    [
        ("uint8", 128, -128, 127),
        ("int8", 0, -128, 127),
        ("uint16", 0, 0, 65535),
        ("int4", 0, -8, 7),
        ("uint4", 5, -5, 10),
    ],
)
def test_the_range_of_an_encoding(dtype: str, zero: int, low: int, high: int) -> None:
    assert Encoding((0.5,), (zero,), dtype).range == (0.5 * low, 0.5 * high)


def test_the_digest_follows_the_content_and_the_external_data(models: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(models / "conv.onnx"))
    file = tmp_path / "m.onnx"
    onnx.save(proto, str(file), save_as_external_data=True, location="w.bin", size_threshold=0)
    before = read_model(file).digest
    assert read_model(file).digest == before
    data = bytearray((tmp_path / "w.bin").read_bytes())
    data[5] ^= 1
    (tmp_path / "w.bin").write_bytes(data)
    assert read_model(file).digest != before
    assert read_model(models / "conv.onnx").digest != read_model(models / "conv.qdq.onnx").digest


def test_without_rounding_only_the_rounding_is_gone(bench: Bench, models: Path, tmp_path: Path) -> None:
    """The twin is close to the QDQ model, saturates where it saturates, and has no steps."""
    twin = tmp_path / "twin.onnx"
    without_rounding(models / "conv.qdq.onnx", twin)
    assert not {"QuantizeLinear"} & {n.op_type for n in onnx.load(str(twin)).graph.node}
    model = read_model(models / "conv.qdq.onnx")
    step, (_, high) = model.outputs[0].encoding.step, model.outputs[0].encoding.range  # type: ignore[union-attr]
    (x,) = seeded_inputs(model, 1)
    loud = {"x": 3 * x["x"]}
    for sample in (x, loud):
        q = bench.reference(models / "conv.qdq.onnx").run(sample)["y"]
        f = bench.reference(twin).run(sample)["y"]
        assert np.abs(q - f).max() < 8 * step
        assert f.max() <= high * (1 + 1e-6)
    assert len(np.unique(f)) > 2 * len(np.unique(q))


def test_seeded_inputs_repeat_and_fill_the_encodings_range(models: Path) -> None:
    first, again = seeded_inputs(models / "conv.qdq.onnx", 3), seeded_inputs(models / "conv.qdq.onnx", 3)
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0]["x"], seeded_inputs(models / "conv.qdq.onnx", 1, seed=1)[0]["x"])
    low, high = read_model(models / "conv.qdq.onnx").inputs[0].encoding.range  # type: ignore[union-attr]
    values = np.stack([s["x"] for s in first])
    assert low <= values.min() < 0.95 * low
    assert 0.95 * high < values.max() <= high
