"""The rounding envelope: how far noise of the backend's own size carries a model, and where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from pytest_qnn.backend import Backend
from pytest_qnn.layers.envelope import DRAW, draws_each, spread, write_envelope
from pytest_qnn.model.onnx_file import read_model
from tests.qdq_graph import QdqGraph

X = np.random.default_rng(3).normal(size=(1, 4, 8, 8)).astype(np.float32)


def chain(folder: Path, dtype: type = np.uint8, **shape: object) -> Path:
    g = QdqGraph()
    x = g.quantize("x", -4, 4, dtype)
    w = g.weight(np.random.default_rng(0).normal(size=(4, 4, 3, 3)))
    c = g.quantize(g.node("Conv", [x, w], name="conv", pads=[1] * 4), -20, 20, dtype)
    s = g.quantize(g.node("Relu", [c], name="relu"), 0, 20, dtype)
    return g.save(folder / "chain.onnx", {"x": [1, 4, 8, 8]}, s, [1, 4, 8, 8])


def run(file: Path, draw: int | None = None) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    more = {} if draw is None else {DRAW: np.array([draw**0.5], np.float32)}
    return session.run(None, {"x": X, **more})[0]


def test_noise_is_of_the_size_that_a_backend_may_have(tmp_path: Path) -> None:
    source = chain(tmp_path)
    assert write_envelope(source, tmp_path / "envelope.onnx")
    q, b = run(source), run(tmp_path / "envelope.onnx", 2)
    steps = np.abs(b - q) / (20 / 255)
    assert steps.max() < 6  # the Conv's step is twice the output's
    assert 0.05 < np.mean(steps > 0.5) < 0.95


def test_sixteen_bits_get_the_noise_of_what_the_accumulator_loses(tmp_path: Path) -> None:
    source = chain(tmp_path, np.uint16)
    write_envelope(source, tmp_path / "envelope.onnx")
    q, b = run(source), run(tmp_path / "envelope.onnx", 2)
    steps = np.abs(b - q) / (20 / 65535)
    assert 2 < np.sqrt(np.mean(np.square(steps[q > 1]))) < 20
    write_envelope(source, tmp_path / "older.onnx", coarse=True)
    older = np.abs(run(tmp_path / "older.onnx", 2) - q) / (20 / 65535)
    assert 20 < np.sqrt(np.mean(np.square(older[q > 1]))) < 80


def test_a_draw_can_be_repeated_and_differs_from_the_next(tmp_path: Path) -> None:
    write_envelope(chain(tmp_path), tmp_path / "envelope.onnx")
    first, again, second = (run(tmp_path / "envelope.onnx", k) for k in (2, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert (first != second).mean() > 0.1


def test_the_noise_is_shifted_a_little_and_neighbours_have_their_own(tmp_path: Path) -> None:
    write_envelope(chain(tmp_path, np.uint16), tmp_path / "envelope.onnx")
    q = run(chain(tmp_path, np.uint16))
    d = np.concatenate([run(tmp_path / "envelope.onnx", k) - q for k in (2, 3, 5, 6, 7, 10, 11, 13)])
    free = q[0] > 2  # elsewhere the Relu may cut something off
    offset, spread = d[:, free].mean(), d[:, free].std()
    assert -spread < offset < -0.3 * spread, "16 bits cut off, they don't round"
    d = np.where(free, d - offset, 0)
    for axis in (0, 1, 2, 3):
        ahead, behind = (np.moveaxis(d, axis, 0)[part] for part in (slice(1, None), slice(None, -1)))
        assert abs((ahead * behind).sum() / np.square(d).sum()) < 0.15


def test_a_model_that_computes_partly_in_float_has_none(tmp_path: Path) -> None:
    g = QdqGraph()
    x = g.quantize("x", -4, 4)
    free = g.node("Sigmoid", [g.node("Exp", [g.node("Neg", [x])])])
    file = g.save(tmp_path / "mixed.onnx", {"x": [1, 4]}, g.quantize(free, 0, 1), [1, 4])
    assert not write_envelope(file, tmp_path / "envelope.onnx")
    assert not (tmp_path / "envelope.onnx").exists()


def test_nor_has_one_whose_end_is_float(tmp_path: Path) -> None:
    g = QdqGraph()
    y = g.node("Softmax", [g.quantize(g.node("Relu", [g.quantize("x", -4, 4)]), 0, 4)])
    file = g.save(tmp_path / "end.onnx", {"x": [1, 4]}, y, [1, 4])
    assert not write_envelope(file, tmp_path / "envelope.onnx")


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 7, 8, 9, 32, 1000])
def test_a_few_draws_are_made_over_all_samples(samples: int) -> None:
    chosen = spread(samples)
    assert {0, samples - 1} <= set(chosen) <= set(range(samples))
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= 8
    assert len(chosen) * draws_each(samples) >= 4


def test_references_keep_it_for_a_model(htp: Backend, models: Path) -> None:
    references = htp.bench.references
    model = read_model(models / "conv.qdq.onnx")
    envelope = references.envelope(model)
    assert envelope is not None
    assert references.envelope(model) is envelope
    assert [spec.name for spec in envelope.inputs] == ["x", DRAW]
