"""Ranges are those of bare onnxruntime, found without keeping the samples."""

from __future__ import annotations

import contextlib
import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

from pytest_qnn.quantization.ranges import FINE_BINS, CountedValues, RunningRanges, calibrate
from tests.quantizing.conftest import Sample, floats, net

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


class Reader(CalibrationDataReader):
    def __init__(self, samples: list[Sample]) -> None:
        self.rest = iter(samples)

    def get_next(self) -> Sample | None:
        return next(self.rest, None)


def growing_samples(count: int) -> list[Sample]:
    """Some with a wider range than all before."""
    return [{"x": floats(1, 3, 16, 16, seed=i) * np.float32(1 + i % 7)} for i in range(count)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = net(tmp_path_factory.mktemp("prepared") / "net.onnx")
    model = onnx.load(str(path))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, str(path))
    return path


def ours(model: Path, samples: list[Sample], folder: Path, method: str, percentile: float, bins: int) -> dict[str, Any]:
    operators = ["Conv", "BatchNormalization", "Relu", "GlobalAveragePool", "Gemm"]
    found = calibrate(
        model, samples, operators=operators, method=method, percentile=percentile, bins=bins, folder=folder, fixed={}
    )
    return {name: [np.asarray(v).item() for v in t.range_value] for name, t in found.tensors.items()}


def bare(model: Path, samples: list[Sample], folder: Path, method: str, percentile: float, bins: int) -> dict[str, Any]:
    options = {} if method == "minmax" else {"num_bins": bins, "percentile": percentile}
    operators = ["Conv", "BatchNormalization", "Relu", "GlobalAveragePool", "Gemm"]
    with contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator(
            model, operators, str(folder / "bare.onnx"), METHODS[method], extra_options=options
        )
        calibrator.collect_data(Reader(samples))
        return {name: [np.asarray(v).item() for v in t.range_value] for name, t in calibrator.compute_data().items()}


@pytest.mark.parametrize(
    ("method", "percentile", "bins"),
    [("minmax", 100, 0), ("entropy", 100, 128), ("percentile", 99, 2048), ("percentile", 99.9, 2048)],
)
def test_ranges_are_those_of_bare_onnxruntime(
    prepared: Path, tmp_path: Path, method: str, percentile: float, bins: int
) -> None:
    samples = growing_samples(20)
    expected = bare(prepared, samples, tmp_path, method, percentile, bins)
    found = ours(prepared, samples, tmp_path, method, percentile, bins)
    assert found.keys() == expected.keys()
    for name, (low, high) in expected.items():
        bin_width = 0 if method != "percentile" else max(abs(low), abs(high)) / 1000
        assert abs(found[name][0] - low) <= bin_width, name
        assert abs(found[name][1] - high) <= bin_width, name


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_number_of_samples(prepared: Path, tmp_path: Path, method: str) -> None:
    def peak(count: int) -> int:
        def source() -> Iterator[Sample]:
            for i in range(count):
                yield {"x": floats(1, 3, 16, 16, seed=i)}

        tracemalloc.start()
        ours(prepared, source(), tmp_path, method, 99.9, 256)  # type: ignore[arg-type]
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(4)
    few, many = peak(8), peak(200)
    assert many - few < 100_000, "bytes: 192 samples more are 590 kB of input and 3.1 MB of activations"


def test_counted_values_keep_every_value_as_the_range_grows() -> None:
    rng = np.random.default_rng(0)
    counted = CountedValues()
    parts = [rng.normal(size=size).astype(np.float32) * s for size, s in ((1000, 1), (10, 0), (70_000, 3), (5000, 100))]
    for part in parts:
        counted.add(part, float(part.min()), float(part.max()))
    everything = np.concatenate(parts)
    assert counted.total == everything.size
    assert counted.limit < 2 * np.abs(everything).max()
    for low, high in ((-1, 1), (-50, 0.5), (0, 400)):
        exact = np.count_nonzero((everything < low) | (everything > high))
        width = 2 * counted.limit / FINE_BINS
        close = np.count_nonzero((np.abs(everything - low) <= width) | (np.abs(everything - high) <= width))
        assert abs(counted.outside(low, high) - exact) <= close


def test_running_ranges_know_what_the_rest_would_be() -> None:
    ranges = RunningRanges(["t"])
    for low, high in ((-1, 2), (-8, 1), (-2, 9), (0, 3)):
        ranges.add(np.array([low], float), np.array([high], float))
    assert (ranges.low[0], ranges.high[0], ranges.second_low[0], ranges.second_high[0]) == (-8, 9, -2, 3)
    assert (ranges.low_of[0], ranges.high_of[0]) == (1, 2)
