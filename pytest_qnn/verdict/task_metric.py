"""Is a metric of the task no worse on the backend than on the reference, by more than a margin, and how sure is that?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from pytest_qnn.errors import OptionError
from pytest_qnn.settings import unknown_name
from pytest_qnn.verdict.bootstrap import Difference, samples_needed

AGAINST = ("float", "quantized")
LEAST_BEYOND = 20  # resamples beyond each end of the interval
WORST_LOSS = 100.0  # points


@dataclass(frozen=True)
class NoWorse:
    """What is to be shown: no worse than the reference, by more than a margin.

    Attributes:
        against: which reference: "float" or "quantized".
        margin: in points.
        confidence: of the two-sided interval.
        higher_is_better: which way the metric runs.
        points: how many points a metric of 1 is.
        worst_loss: what one sample can lose at most, in points; None: 100, or what was seen if that is more.
        resamples, seed: of the bootstrap.

    Raises:
        OptionError: a bad value.
    """

    against: str
    margin: float
    confidence: float
    higher_is_better: bool
    points: float
    worst_loss: float | None
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        if self.against not in AGAINST:
            raise OptionError(f"assert_task_metric: {unknown_name('reference', self.against, AGAINST)}")
        for name, low, high in (("margin", 0.0, math.inf), ("confidence", 0.8, 0.9999), ("points", 0.0, math.inf)):
            value = getattr(self, name)
            if (
                not _is_number(value)
                or not low <= value <= high
                or math.isinf(value)
                or (name == "points" and not value)
            ):
                raise OptionError(
                    f"assert_task_metric: {name} must be a number from {low:g} to {high:g}, got {value!r}"
                )
        if self.worst_loss is not None and not (_is_number(self.worst_loss) and 0 < self.worst_loss < math.inf):
            raise OptionError(
                f"assert_task_metric: worst_loss must be a number of points above 0, got {self.worst_loss!r}"
            )
        least = least_resamples(self.confidence)
        if not isinstance(self.resamples, int) or isinstance(self.resamples, bool) or self.resamples < least:
            raise OptionError(
                f"assert_task_metric: resamples must be a whole number of at least {least} for a confidence of "
                f"{self.confidence:g}, got {self.resamples!r}"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise OptionError(f"assert_task_metric: seed must be a whole number of at least 0, got {self.seed!r}")


def least_resamples(confidence: float) -> int:
    """How many resamples it takes for the interval's ends to rest on a few; 1 for what is no confidence."""
    if not _is_number(confidence) or not 0 < confidence < 1:
        return 1
    return math.ceil(2 * LEAST_BEYOND / (1 - confidence) - 1e-6)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


class TaskOutcome(StrEnum):
    """What the interval says of the margin."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class TaskMetricVerdict:
    """A metric of the task, compared.

    Attributes:
        metric: its name.
        asked: what was to be shown; ``worst_loss`` is the one that was used.
        value, reference, quantized: the metric of the backend's outputs, of the reference's, and of the QDQ reference's, in the
            metric's own unit.
        difference: how much better the backend is, in points, with its interval; negative is worse, whichever way the metric
            runs.
        samples: how many were compared.
    """

    metric: str
    asked: NoWorse
    value: float
    reference: float
    quantized: float
    difference: Difference
    samples: int

    def __str__(self) -> str:
        d = self.difference
        return (
            f"{self.metric}: {self.value:.6g}, {self.asked.against} reference {self.reference:.6g}: {d.value:+.3g} points "
            f"[{d.low:+.3g}, {d.high:+.3g}], margin -{self.asked.margin:g}: {self.outcome}"
        )

    @property
    def outcome(self) -> TaskOutcome:
        """Pass: the interval lies above ``-margin``; fail: below it; undecided: neither."""
        if self.difference.low > -self.asked.margin:
            return TaskOutcome.PASS
        return TaskOutcome.FAIL if self.difference.high < -self.asked.margin else TaskOutcome.UNDECIDED

    @property
    def ok(self) -> bool:
        """Whether it is shown that the metric is no worse."""
        return self.outcome is TaskOutcome.PASS

    @property
    def blame(self) -> str:
        """Whose fault a fail is: whoever lost more of the float model's metric, "quantization" or "backend"."""
        if self.outcome is TaskOutcome.PASS:
            return "none"
        if self.outcome is TaskOutcome.UNDECIDED:
            return "too few samples"
        sign = 1 if self.asked.higher_is_better else -1
        lost_before, lost_after = sign * (self.reference - self.quantized), sign * (self.quantized - self.value)
        return "quantization" if self.asked.against == "float" and lost_before > lost_after else "backend"

    @property
    def needed(self) -> int | None:
        """About how many samples would decide; None where it is decided, or where no number would."""
        if self.outcome is not TaskOutcome.UNDECIDED:
            return None
        return samples_needed(
            self.difference, self.asked.margin, self.asked.worst_loss or WORST_LOSS, self.asked.confidence
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        d = self.difference
        return {
            "metric": self.metric,
            "outcome": str(self.outcome),
            "value": self.value,
            "reference": self.reference,
            "quantized": self.quantized,
            "difference_points": {"value": d.value, "low": d.low, "high": d.high},
            "samples_needed": self.needed,
            **asdict(self.asked),
        }
