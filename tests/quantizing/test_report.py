"""The calibration report says what is clipped, what is unused, and where the data can't be representative."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_qnn.quantization.report import write_report
from tests.quantizing.conftest import floats, samples


def scaled(factors: list[float]) -> list[dict[str, np.ndarray]]:
    return [{"x": floats(1, 3, 16, 16, seed=i) * np.float32(f)} for i, f in enumerate(factors)]


def test_good_data_gives_no_warning(quantize_net: Callable[..., Any]) -> None:
    assert quantize_net(samples(20)).report.warnings == ()


@pytest.mark.parametrize(
    ("data", "warning"),
    [
        (samples(1), "calibrated on one sample only"),
        (samples(3), "calibrated on 3 samples only"),
        (samples(1) * 10, "all 10 samples are equal"),
        ([{"x": np.ones((1, 3, 16, 16), np.float32)}] * 10, "input 'x' is 1 in every element of every sample"),
        (
            scaled([1] * 15 + [255] * 5),
            "input 'x': sample 15 reaches about 512, most samples about 2: do all of them have",
        ),
        (scaled([255] * 15 + [1] * 5), "input 'x': sample 15 reaches about 2, most samples about 512"),
        (scaled([1e7] * 9), "input 'x' reaches 3.8"),
        (scaled([1] * 15 + [10]), "sample 15 alone makes the range of"),
    ],
    ids=range(8),
)
def test_data_that_cannot_be_representative_is_warned_of(
    quantize_net: Callable[..., Any], data: object, warning: str
) -> None:
    assert any(w.startswith(warning) for w in quantize_net(data).report.warnings), quantize_net(data).report.warnings


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_a_range_that_the_user_gives_is_encoded_and_what_it_clips_is_counted(
    quantize_net: Callable[..., Any], float_net: Path, method: str
) -> None:
    import onnxruntime as ort

    report = quantize_net(samples(10), ranges={"x": (-1, 1), "r": (0, 2)}, method=method).report
    tensors = {t.name: t for t in report.tensors}
    import onnx

    model = onnx.load(str(float_net))
    model.graph.output.append(onnx.helper.make_tensor_value_info("r", 1, None))
    session = ort.InferenceSession(model.SerializeToString())
    for name in ("x", "r"):
        values = np.concatenate([{"x": s["x"], "r": session.run(["r"], s)[0]}[name] for s in samples(10)])
        low, high = (-1, 1) if name == "x" else (0, 2)
        share = np.mean((values < low) | (values > high))
        assert tensors[name].clipped == pytest.approx(share, rel=0.03)
        assert tensors[name].encoded_high == pytest.approx(high, rel=0.01)
        assert tensors[name].high == pytest.approx(values.max(), rel=1e-5)
    assert {t.name for t in report.worst(2)} == {"x", "r"}
    assert any("'x'" in w and "are clipped to -1" in w for w in report.warnings)


def test_the_unused_part_of_a_symmetric_range_shows(quantize_net: Callable[..., Any]) -> None:
    tensors = {t.name: t for t in quantize_net(symmetric_activations=True).report.tensors}
    assert tensors["r"].unused == pytest.approx(0.5, abs=0.01)  # a Relu's output has no negative half
    assert tensors["x"].unused < 0.2


def test_what_a_relu_cuts_off_is_not_called_clipped(quantize_net: Callable[..., Any]) -> None:
    report = quantize_net(
        overrides={"r": 16}, method="percentile"
    ).report  # mixed precision keeps the Relu and what it reads
    before = next(t for t in report.tensors if t.name == "n")
    assert before.low < -1
    assert before.bits is None
    assert not any("clipped" in w for w in report.warnings)


def test_the_json_has_every_tensor(quantize_net: Callable[..., Any], tmp_path: Path) -> None:
    report = quantize_net().report
    write_report(report, tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["schema"] == 1
    assert [t["name"] for t in stored["tensors"]] == [t.name for t in report.tensors]
    assert stored["samples"] == 12
