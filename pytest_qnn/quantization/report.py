"""What calibration found, tensor by tensor, and where the data can't be what the model will meet."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_qnn.model.encoding import Encoding

if TYPE_CHECKING:
    from pytest_qnn.quantization.calibration import Sample
    from pytest_qnn.quantization.ranges import CalibratedRanges

REPORT_SCHEMA = 1
FEW_SAMPLES = 8
# A tensor's range counts as one sample's doing if it would be less than half as wide without it
ALONE = 0.5
# Inputs of one calibration set are within some powers of two of each other: 1 and 255 are 8 apart
OCTAVES_APART = 6
ABSURD = 1e6
UNUSED = 0.5
CLIPPED = 0.01


@dataclass(frozen=True)
class TensorCalibration:
    """One activation.

    Attributes:
        name: as the prepared float model spells it.
        low, high: smallest and largest value observed.
        encoded_low, encoded_high: range that its encoding can write; None where it isn't quantised.
        bits: bit width of the encoding; None where it isn't quantised.
        clipped: share (0..1) of values outside of the encoded range by more than half a step; None where it isn't known.
        unused: share (0..1) of the encoded range that no value reached.
        low_sample, high_sample: the samples (0-based) that set the observed range.
        alone: share (0..1) of the observed width that goes if the most extreme sample at either end is left out.
    """

    name: str
    low: float
    high: float
    encoded_low: float | None
    encoded_high: float | None
    bits: int | None
    clipped: float | None
    unused: float | None
    low_sample: int
    high_sample: int
    alone: float

    @property
    def excess(self) -> float:
        """By how much the observed range exceeds the encoded one at its worse end, as a share of the encoded width."""
        if self.encoded_low is None or self.encoded_high is None or self.encoded_high <= self.encoded_low:
            return 0.0
        beyond = max(self.encoded_low - self.low, self.high - self.encoded_high)
        return max(0.0, beyond / (self.encoded_high - self.encoded_low))

    @property
    def badness(self) -> float:
        """Order of the table: what is clipped weighs most, then what is unused."""
        return 100 * (self.clipped or 0.0) + (self.unused or 0.0)


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found.

    Attributes:
        samples: number of samples used.
        method: "minmax", "entropy" or "percentile".
        tensors: in the model's order.
        warnings: why the data may not be representative, or a range not be right; each names its tensor or input.
    """

    samples: int
    method: str
    tensors: tuple[TensorCalibration, ...]
    warnings: tuple[str, ...]

    def worst(self, count: int) -> list[TensorCalibration]:
        """The ``count`` quantised tensors that lose most to clipping and unused range."""
        quantized = [t for t in self.tensors if t.bits is not None]
        return sorted(quantized, key=lambda t: -t.badness)[:count]

    def to_json(self) -> str:
        """All of it, with ``schema`` naming the format's version."""
        return json.dumps({"schema": REPORT_SCHEMA, **asdict(self)}, indent=1) + "\n"


class InputWatch:
    """Looks at calibration inputs while they pass: are they varied, and of one scale?"""

    def __init__(self) -> None:
        self.samples = 0
        self.all_equal = True
        self.constant: dict[str, float | None] = {}
        self.octaves: dict[str, Counter[int]] = {}
        self.first_of: dict[tuple[str, int], int] = {}
        self.largest: dict[str, float] = {}
        self._first: Sample = {}

    def watch(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The same samples."""
        for sample in samples:
            if not self.samples:
                self._first = {name: array.copy() for name, array in sample.items()}
            elif self.all_equal:
                self.all_equal = all(np.array_equal(self._first[name], array) for name, array in sample.items())
            for name, array in sample.items():
                self._look(name, array)
            self.samples += 1
            yield sample

    def _look(self, name: str, array: Any) -> None:
        low, high = float(array.min()), float(array.max())
        seen = self.constant.setdefault(name, low)
        if low != high or seen != low:
            self.constant[name] = None
        if array.dtype.kind == "f":
            largest = max(abs(low), abs(high))
            octave = math.frexp(largest)[1]
            self.octaves.setdefault(name, Counter())[octave] += 1
            self.first_of.setdefault((name, octave), self.samples)
            self.largest[name] = max(self.largest.get(name, 0.0), largest)

    def warnings(self) -> list[str]:
        """Why these inputs may not be what the model will meet."""
        found = []
        if self.samples == 1:
            found.append("calibrated on one sample only: ranges hold for that one. Use some tens to hundreds")
        elif self.all_equal:
            found.append(f"all {self.samples} samples are equal: ranges hold for that one. Use varied data")
        elif self.samples < FEW_SAMPLES:
            found.append(f"calibrated on {self.samples} samples only: use some tens to hundreds")
        for name, value in self.constant.items():
            if value is not None and not (self._first[name].size == 1 and self.samples == 1):
                found.append(f"input {name!r} is {value:g} in every element of every sample: real data isn't constant")
        for name, counter in self.octaves.items():
            usual = _median(counter)
            for far in (max(counter), min(counter)):
                if abs(far - usual) >= OCTAVES_APART and (far > usual or counter[far] > 1):
                    where = self.first_of[name, far]
                    found.append(
                        f"input {name!r}: sample {where} reaches {_octave(far)}, most samples {_octave(usual)}: do all of "
                        "them have the same preprocessing?"
                    )
            if self.largest[name] >= ABSURD:
                found.append(f"input {name!r} reaches {self.largest[name]:g}: is that what the model expects?")
        return found


def _median(counter: Counter[int]) -> int:
    half = sum(counter.values()) / 2
    for octave in sorted(counter):
        half -= counter[octave]
        if half <= 0:
            return octave
    return 0


def _octave(exponent: int) -> str:
    return f"about {2.0 ** (exponent - 1):.3g}"


def build_report(
    ranges: CalibratedRanges, encodings: Mapping[str, Encoding], inputs: InputWatch, method: str, asked: float = 0.0
) -> CalibrationReport:
    """Put together what calibration found and what was encoded.

    Args:
        ranges: observed and chosen ranges.
        encodings: of the quantised model's activations, by the name that they have in the float model.
        inputs: what was seen of the inputs.
        method: "minmax", "entropy" or "percentile".
        asked: share (0..1) of each tensor's values that the method may clip without a warning.
    """
    s = ranges.statistics
    tensors = []
    for i, name in enumerate(s.tensors):
        low, high = float(s.low[i]), float(s.high[i])
        encoding = encodings.get(name)
        shrunk = max(0.0, float(s.second_high[i]) - float(s.second_low[i])) if s.samples > 1 else high - low
        alone = 1 - shrunk / (high - low) if high > low else 0.0
        if encoding is None:
            tensors.append(
                TensorCalibration(
                    name, low, high, None, None, None, None, None, int(s.low_of[i]), int(s.high_of[i]), alone
                )
            )
            continue
        bottom, top = encoding.range
        half = encoding.step / 2
        # zero is always in an encoding's range, whatever the data: that part isn't the calibration's fault
        reached = max(0.0, min(max(high, 0.0), top) - max(min(low, 0.0), bottom))
        tensors.append(
            TensorCalibration(
                name,
                low,
                high,
                bottom,
                top,
                encoding.bits,
                ranges.clipped(name, bottom - half, top + half),
                max(0.0, 1 - reached / (top - bottom)) if top > bottom else 0.0,
                int(s.low_of[i]),
                int(s.high_of[i]),
                alone,
            )
        )
    return CalibrationReport(
        s.samples, method, tuple(tensors), (*inputs.warnings(), *_range_warnings(tensors, s.samples, asked))
    )


def _range_warnings(tensors: list[TensorCalibration], samples: int, asked: float) -> Iterator[str]:
    if samples >= FEW_SAMPLES:
        by_sample: dict[int, list[TensorCalibration]] = {}
        for t in tensors:
            if t.alone > ALONE:
                sample = t.high_sample if abs(t.high) >= abs(t.low) else t.low_sample
                by_sample.setdefault(sample, []).append(t)
        for sample, alone in sorted(by_sample.items()):
            worst = max(alone, key=lambda t: t.alone)
            more = f" (and of {len(alone) - 1} more tensors)" if len(alone) > 1 else ""
            yield (
                f"sample {sample} alone makes the range of {worst.name!r}{more} {1 / max(1e-9, 1 - worst.alone):.1f} times "
                "as wide: look at it, or use --method percentile"
            )
    for t in tensors:
        if t.bits is None:
            continue
        if t.low == t.high and samples > 1:
            yield f"tensor {t.name!r} is {t.low:g} in every element of every sample: its range says nothing"
        if (t.clipped or 0) >= CLIPPED + 1.5 * asked and t.excess >= CLIPPED:
            yield f"tensor {t.name!r}: {100 * (t.clipped or 0):.1f} % of its values are clipped to {t.encoded_low:g} .. {t.encoded_high:g}"


def write_report(report: CalibrationReport, file: Path) -> None:
    """Write the report as JSON, in one piece.

    Raises:
        OSError: it can't be written.
    """
    from pytest_qnn.model.replaced_file import replaced_file

    with replaced_file(file) as temporary:
        temporary.write_text(report.to_json(), encoding="utf-8")
