"""Ranges of activations over calibration data, in memory that doesn't grow with the number of samples.

onnxruntime's own calibrators keep something of every sample until the end: the min/max one a pair of arrays per tensor, the
histogram ones every activation. These are subclasses that fold each sample into running statistics and leave the rest to
onnxruntime: which tensors are calibrated, how the model is augmented, and how thresholds follow from a histogram.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationMethod, MinMaxCalibrater, TensorData, TensorsData
from onnxruntime.quantization.calibrate import EntropyCalibrater, HistogramCollector, PercentileCalibrater

from pytest_qnn.errors import InputError
from pytest_qnn.quantization.calibration import Sample

# Bins in which activations are counted, over the symmetric range seen so far; when it grows, neighbours are merged, so that
# between half of them and all are in use. onnxruntime's at most 2048 bins are filled from these.
FINE_BINS = 16384
_BLOCK = 1 << 16  # elements counted at a time: stays in the processor's cache


class RunningRanges:
    """Minimum and maximum of each tensor over all samples, and what they would be without the most extreme sample.

    Attributes:
        low, high: float64[tensors].
        low_of, high_of: int64[tensors]: the sample (0-based) that set each.
        second_low, second_high: float64[tensors]: over the other samples; the same as ``low``/``high`` after one sample.
        samples: number of samples.
    """

    def __init__(self, tensors: list[str]) -> None:
        n = len(tensors)
        self.tensors = tensors
        self.low = np.full(n, np.inf)
        self.high = np.full(n, -np.inf)
        self.second_low = np.full(n, np.inf)
        self.second_high = np.full(n, -np.inf)
        self.low_of = np.zeros(n, np.int64)
        self.high_of = np.zeros(n, np.int64)
        self.samples = 0

    def add(self, low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> None:
        """One sample's minima and maxima, one for each tensor.

        Raises:
            InputError: NaN or infinity among them: the float model computes nothing that could be quantised.
        """
        finite = np.isfinite(low) & np.isfinite(high)
        if not finite.all():
            tensor = self.tensors[int(np.argmin(finite))]
            raise InputError(
                f"calibration: tensor {tensor!r} has NaN or infinite elements for sample {self.samples}: it has no range that "
                "could be quantised. Look at the float model with this sample first"
            )
        smaller = low < self.low
        self.second_low = np.where(smaller, self.low, np.minimum(self.second_low, low))
        self.low = np.where(smaller, low, self.low)
        self.low_of[smaller] = self.samples
        larger = high > self.high
        self.second_high = np.where(larger, self.high, np.maximum(self.second_high, high))
        self.high = np.where(larger, high, self.high)
        self.high_of[larger] = self.samples
        self.samples += 1


@dataclass
class CountedValues:
    """How often each value of a tensor occurred, in bins of equal width over ``-limit .. limit``."""

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(FINE_BINS, np.int64))
    limit: float = 0.0
    smallest_absolute: float = np.inf
    dtype: Any = np.float32

    def add(self, values: npt.NDArray[Any], low: float, high: float) -> None:
        """Count ``values``, whose minimum and maximum are ``low`` and ``high``."""
        self.dtype = values.dtype
        self._cover(max(abs(low), abs(high)))
        smallest = low if low >= 0 else -high if high <= 0 else float(np.abs(values).min())
        self.smallest_absolute = min(self.smallest_absolute, smallest)
        if self.limit == 0:
            self.counts[FINE_BINS // 2] += values.size
            return
        flat = values.reshape(-1)
        factor, middle = np.float32(FINE_BINS / 2 / self.limit), np.float32(FINE_BINS // 2)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK].astype(np.float32, copy=False)
            index = (block * factor + middle).astype(np.int32)
            np.minimum(index, FINE_BINS - 1, out=index)
            if block.size < FINE_BINS // 4:
                np.add.at(self.counts, index, 1)
            else:
                self.counts += np.bincount(index, minlength=FINE_BINS)

    def _cover(self, largest: float) -> None:
        if largest <= self.limit:
            return
        if self.limit == 0:
            self.limit = largest
            return
        while self.limit < largest:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros(FINE_BINS, np.int64)
            self.counts[FINE_BINS // 4 : FINE_BINS // 4 * 3] = merged
            self.limit *= 2

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def centers(self) -> npt.NDArray[np.float64]:
        """The value that each bin stands for."""
        return (np.arange(FINE_BINS, dtype=np.float64) - FINE_BINS / 2 + 0.5) * (2 * self.limit / FINE_BINS)

    def outside(self, low: float, high: float) -> int:
        """Number of values below ``low`` or above ``high``, to one bin."""
        half = self.limit / FINE_BINS
        centers = self.centers
        return int(self.counts[(centers + half < low) | (centers - half > high)].sum())


class StreamingMinMax(MinMaxCalibrater):  # type: ignore[misc]
    """onnxruntime's min/max calibrator, one sample at a time; ranges are bit for bit the same."""

    def __init__(self, *arguments: Any, fixed: Mapping[str, tuple[float, float]] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fixed = dict(fixed or {})
        self.outside: dict[str, list[int]] = {name: [0, 0] for name in self.fixed}
        self.statistics = RunningRanges([])
        self._dtypes: list[Any] = []

    def augment_graph(self) -> None:
        """As onnxruntime does it; tensors whose range is given are outputs too, so that what it clips can be counted."""
        _, infos = self.select_tensors_to_calibrate(self.model)
        inputs = {value.name for value in self.model.graph.input}
        super().augment_graph()
        extra = [n for n in self.fixed if n in infos and n not in self.model_original_outputs and n not in inputs]
        if extra:
            self.model.graph.output.extend(infos[name] for name in extra)
            onnx.save(self.model, self.augmented_model_path, save_as_external_data=self.use_external_data_format)

    def collect_data(self, data_reader: Iterable[Sample]) -> None:
        """Fold every sample of an iterable (onnxruntime's readers are iterable as well) into the ranges."""
        all_names = [output.name for output in self.infer_session.get_outputs()]
        reduced = [n for n in all_names[self.num_model_outputs :] if n not in self.fixed]
        names = [name.rpartition("_")[0] for name in reduced[::2]]
        if not self.statistics.tensors:
            self.statistics = RunningRanges(names)
        watched = [name for name in self.fixed if name in all_names]
        for sample in data_reader:
            values = self.infer_session.run([*reduced, *watched], sample)
            self._dtypes = [value.dtype for value in values[: len(reduced) : 2]]
            flat = np.array([v[0] if v.size else 0 for v in values[: len(reduced)]], np.float64)
            self.statistics.add(flat[::2], flat[1::2])
            for name, (low, high) in self.fixed.items():
                tensor = sample[name] if name in sample else values[len(reduced) + watched.index(name)]
                self.outside[name][0] += int(np.count_nonzero((tensor < low) | (tensor > high)))
                self.outside[name][1] += tensor.size

    def compute_data(self) -> TensorsData:
        """The ranges, in the types and shapes that onnxruntime gives them."""
        s = self.statistics
        rows = zip(s.tensors, s.low, s.high, self._dtypes, strict=True)
        return TensorsData(
            CalibrationMethod.MinMax,
            {n: TensorData(lowest=np.array([a], dtype=d), highest=np.array([b], dtype=d)) for n, a, b, d in rows},
        )


class StreamingHistograms(HistogramCollector):  # type: ignore[misc]
    """onnxruntime's collector, but it counts each sample's values and keeps none of them.

    The thresholds are onnxruntime's own search over a histogram that is filled from finer bins at the end, when the range
    is known: they differ from what onnxruntime finds with all samples in memory by at most one of its bins, mostly by none.
    """

    def __init__(self, tensors: list[str], **options: Any) -> None:
        super().__init__(scenario="same", **options)
        self.statistics = RunningRanges(tensors)
        self.counted = {name: CountedValues() for name in tensors}

    def collect(self, name_to_arr: Mapping[str, npt.NDArray[Any]]) -> None:
        """Count one sample's values: an array for each tensor."""
        arrays = [name_to_arr[name] for name in self.statistics.tensors]
        low = np.array([a.min() if a.size else 0 for a in arrays], np.float64)
        high = np.array([a.max() if a.size else 0 for a in arrays], np.float64)
        self.statistics.add(low, high)
        for name, array, a, b in zip(self.statistics.tensors, arrays, low.tolist(), high.tolist(), strict=True):
            if array.size:
                self.counted[name].add(array, a, b)

    def compute_collection_result(self) -> Any:
        """Fill onnxruntime's histograms and let it find the thresholds."""
        for i, name in enumerate(self.statistics.tensors):
            self.histogram_dict[name] = self._histogram(
                self.counted[name], float(self.statistics.low[i]), float(self.statistics.high[i])
            )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how many tensors and bins there are
            return super().compute_collection_result()

    def _histogram(self, counted: CountedValues, low: float, high: float) -> tuple[Any, ...]:
        dtype = counted.dtype
        largest = max(abs(low), abs(high))
        absolute = self.method == "percentile" and self.symmetric
        used = np.flatnonzero(counted.counts)
        centers, counts = counted.centers[used], counted.counts[used]
        # in the tensor's own type, in which numpy would compute the edges if it had the values themselves
        bounds = np.array([counted.smallest_absolute if absolute else -largest, largest], dtype)
        centers = np.clip((np.abs(centers) if absolute else centers).astype(dtype), *bounds)
        hist, edges = np.histogram(centers, self.num_bins, range=(bounds[0], bounds[1]), weights=counts)
        edges = edges.astype(dtype)
        limits = np.array(low, dtype)[()], np.array(high, dtype)[()]
        filled = hist.astype(np.int64)
        return (filled, edges, *limits) if absolute else (filled, edges, *limits, np.array(largest, dtype))


class _StreamingCollection:
    """What the two histogram calibrators share: run the model on a sample, hand its activations over, forget them."""

    infer_session: Any
    collector: Any
    tensors_to_calibrate: set[str]
    method: str
    symmetric: bool
    num_bins: int
    num_quantized_bins: int
    percentile: float

    def collect_data(self, data_reader: Iterable[Sample]) -> None:
        """Fold every sample of an iterable into the histograms."""
        names = [output.name for output in self.infer_session.get_outputs()]
        wanted = [name for name in names if name in self.tensors_to_calibrate]
        if self.collector is None:
            self.collector = StreamingHistograms(
                wanted,
                method=self.method,
                symmetric=self.symmetric,
                num_bins=self.num_bins,
                num_quantized_bins=self.num_quantized_bins,
                percentile=self.percentile,
            )
        for sample in data_reader:
            values = self.infer_session.run(wanted, sample)
            self.collector.collect(dict(zip(wanted, values, strict=True)))

    @property
    def statistics(self) -> RunningRanges:
        """Observed ranges."""
        found: RunningRanges = self.collector.statistics
        return found


class StreamingEntropy(_StreamingCollection, EntropyCalibrater):  # type: ignore[misc]
    """onnxruntime's entropy calibrator, one sample at a time."""


class StreamingPercentile(_StreamingCollection, PercentileCalibrater):  # type: ignore[misc]
    """onnxruntime's percentile calibrator, one sample at a time."""


@dataclass(frozen=True)
class CalibratedRanges:
    """What calibration found.

    Attributes:
        tensors: the ranges that are to be encoded, in onnxruntime's type.
        statistics: the ranges that were observed.
        clipped: share of a tensor's values (0..1) outside of a range, a function of (name, low, high); None where it isn't
            known.
    """

    tensors: TensorsData
    statistics: RunningRanges
    _counted: Mapping[str, CountedValues]
    _outside: Mapping[str, list[int]]

    def clipped(self, name: str, low: float, high: float) -> float | None:
        """Share of the tensor's values (0..1) below ``low`` or above ``high``; None where only the extremes are known."""
        if name in self._counted:
            counted = self._counted[name]
            return counted.outside(low, high) / total if (total := counted.total) else 0.0
        if name in self._outside and self._outside[name][1]:
            return self._outside[name][0] / self._outside[name][1]
        i = self.statistics.tensors.index(name)
        inside = low <= self.statistics.low[i] and self.statistics.high[i] <= high
        return 0.0 if inside else None


def calibrate(
    model: Path,
    samples: Iterable[Sample],
    *,
    operators: list[str],
    method: str,
    percentile: float,
    bins: int,
    folder: Path,
    fixed: Mapping[str, tuple[float, float]],
) -> CalibratedRanges:
    """Run ``samples`` through the float model on onnxruntime's CPU and find a range for each activation.

    Args:
        model: prepared float model.
        operators: operator types whose inputs and outputs are calibrated.
        method: "minmax", "entropy" or "percentile".
        percentile: share of values, in percent, that the range of a tensor must cover ("percentile" only).
        bins: of onnxruntime's histogram ("entropy" and "percentile" only).
        folder: for the augmented model.
        fixed: ranges that the user gives, for which clipped values are counted.
    """
    augmented = str(folder / "augmented.onnx")
    calibrator: Any
    if method == "minmax":
        calibrator = StreamingMinMax(model, operators, augmented, fixed=fixed)
    elif method == "entropy":
        calibrator = StreamingEntropy(model, operators, augmented, num_bins=bins)
    else:
        calibrator = StreamingPercentile(
            model, operators, augmented, symmetric=True, num_bins=bins, percentile=percentile
        )
    _leave_weights_outside(calibrator.model, model)
    calibrator.augment_graph()
    calibrator.create_inference_session()
    calibrator.collect_data(samples)
    found = calibrator.compute_data()
    # quantize_static compares the method of the ranges it is given with its own: only the ranges matter from here on
    ranges = {n: TensorData(lowest=np.asarray(t.lowest), highest=np.asarray(t.highest)) for n, t in found.items()}
    return CalibratedRanges(
        TensorsData(CalibrationMethod.MinMax, ranges),
        calibrator.statistics,
        {} if method == "minmax" else calibrator.collector.counted,
        calibrator.outside if method == "minmax" else {},
    )


def _leave_weights_outside(model: Any, file: Path) -> None:
    """Have ``model``, read from ``file``, refer to the file's external data again, in place of a copy of its weights.

    The augmented model is written beside it, then, and needs no weights of its own.
    """
    outside = {t.name: t for t in onnx.load(str(file), load_external_data=False).graph.initializer if t.external_data}
    for tensor in model.graph.initializer:
        if tensor.name in outside:
            tensor.CopyFrom(outside[tensor.name])
