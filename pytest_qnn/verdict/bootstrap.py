"""Confidence intervals of how much a metric differs between two sets of outputs for the same samples.

Samples are resampled in pairs (a sample's two results stay together), and the metric's difference is computed on each resample:
Efron's bootstrap. The interval is the bias-corrected and accelerated one, BCa (Efron 1987, "Better bootstrap confidence intervals";
DiCiccio and Efron 1996, "Bootstrap confidence intervals", eq. 2.3 and 6.6): differences of a metric are skewed, since losses are
seldom and large, and the plain percentile interval then ends too early on the side of the losses.

No resample contains what no sample showed: of samples that all agree, every resample agrees, and the interval would have no width
however few they are. So two total losses and two total gains, as large as one sample can make them, are added to the samples:
what Agresti and Coull 1998 ("Approximate is better than 'exact'") do for proportions, and Agresti and Min 2005 ("Simple improved
confidence intervals for comparing matched proportions") for pairs. Without any difference in n samples the interval then ends
at about 4 / n of a total loss, as the exact binomial bound does (3.7 / n); beside a hundred differences the four don't matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

ADDED = 2  # losses, and as many gains
GROUPS = 100  # a jackknife of an expensive metric leaves out one of so many groups at a time
CHUNK = 1 << 22  # elements that are resampled at a time
MANY = 10_000_000  # samples: nobody has so many
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Difference:
    """How much better a metric is: the difference with its confidence interval, in the metric's own unit.

    Attributes:
        value: found on the samples; negative is worse.
        low, high: of the interval; a true difference below ``low`` has a probability of ``(1 - confidence) / 2``.
        spread: standard deviation of the difference that a single sample makes.
    """

    value: float
    low: float
    high: float
    spread: float


@dataclass(frozen=True)
class Parts:
    """A metric that is a sum over samples over a sum over samples, such as a mean, or errors per word.

    Attributes:
        numerator, denominator: float64, shape (samples,).
    """

    numerator: Array
    denominator: Array

    @property
    def value(self) -> float:
        """The metric; NaN where the denominators sum to 0."""
        total = float(self.denominator.sum())
        return float(self.numerator.sum()) / total if total else math.nan


def difference_of_parts(
    new: Parts, old: Parts, worst_loss: float, confidence: float, resamples: int, seed: int
) -> Difference:
    """Of ``new`` minus ``old``, for a metric that is given by its parts.

    Args:
        worst_loss: what one sample can lose at most, in the metric's unit.
    """
    n = new.numerator.size
    rows = np.stack([new.numerator, new.denominator, old.numerator, old.denominator], axis=1)
    new_weight, old_weight = float(new.denominator.mean()), float(old.denominator.mean())
    gain = [worst_loss * new_weight, new_weight, 0.0, old_weight]
    loss = [0.0, new_weight, worst_loss * old_weight, old_weight]
    rows = np.concatenate([rows, *[[gain, loss]] * ADDED])
    drawn = _resampled_sums(rows, resamples, np.random.default_rng(seed))
    theta = _ratio_difference(drawn)
    whole = rows.sum(axis=0)
    estimate = float(_ratio_difference(whole[None])[0])
    effects = estimate - _ratio_difference(whole - rows)
    low, high = _bca(theta, estimate, effects, confidence)
    value = new.value - old.value
    own = value - _ratio_difference(rows[:n].sum(axis=0) - rows[:n]) if n > 1 else np.zeros(1)
    return _difference(value, low, high, float(np.sqrt(np.square(own).sum() * n)))


def difference_of_function(
    difference: Callable[[Indices], float], n: int, worst_loss: float, confidence: float, resamples: int, seed: int
) -> Difference:
    """The same for a metric that only its function knows.

    The added losses and gains shift the difference by what they would shift a mean.

    Args:
        difference: of the metric on the samples of these indices, new minus old; at least one index, repeated ones allowed.
        n: number of samples.
    """
    rng, size = np.random.default_rng(seed), n + 2 * ADDED
    everything = np.arange(n)
    value = difference(everything)
    theta = np.empty(resamples)
    plain = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(0, size, size)
        own = drawn[drawn < n]
        balance = np.count_nonzero(drawn >= n + ADDED) - np.count_nonzero((drawn >= n) & (drawn < n + ADDED))
        plain[i] = difference(own) if own.size else value
        theta[i] = (own.size * plain[i] + balance * worst_loss) / size
    estimate = n * value / size
    effects = [
        estimate - left.size * difference(left) / (left.size + 2 * ADDED)
        for group in np.array_split(rng.permutation(n), min(n, GROUPS))
        if (left := np.setdiff1d(everything, group)).size
    ]
    effects += ADDED * [estimate - (n * value + sign * worst_loss) / (size - 1) for sign in (1, -1)]
    low, high = _bca(theta, estimate, np.array(effects), confidence)
    return _difference(value, low, high, float(plain.std() * math.sqrt(n)))


def samples_needed(found: Difference, margin: float, worst_loss: float, confidence: float) -> int | None:
    """About how many samples would decide whether the difference is above ``-margin``, if they are like those that were seen.

    From the normal interval with the added losses and gains; None where nothing would: the difference is the margin itself.
    """
    z = _NORMAL.inv_cdf((1 + confidence) / 2)
    above = found.value > -margin

    def decided(n: int) -> bool:
        size = n + 2 * ADDED
        center = found.value * n / size
        half = z * math.sqrt(n * found.spread**2 + 2 * ADDED * worst_loss**2) / size
        return center - half > -margin if above else center + half < -margin

    low, high = 1, 1
    while not decided(high):
        low, high = high, 2 * high
        if high > MANY:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high


def _difference(value: float, low: float, high: float, spread: float) -> Difference:
    return Difference(value, min(low, value), max(high, value), spread)


def _ratio_difference(sums: Array) -> Array:
    """Differences of rows of (numerator, denominator, numerator, denominator); NaN where there is nothing to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3])


def _resampled_sums(rows: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Sums over as many rows as there are, drawn with replacement; shape (resamples, columns)."""
    n = len(rows)
    distinct, counts = np.unique(rows, axis=0, return_counts=True)
    if len(distinct) <= 64:  # as in agreement: how often each is drawn says all
        return np.asarray(rng.multinomial(n, counts / n, size=resamples) @ distinct)
    sums = np.empty((resamples, rows.shape[1]))
    step = max(1, CHUNK // n)
    for start in range(0, resamples, step):
        drawn = rng.integers(0, n, (min(step, resamples - start), n))
        for column in range(rows.shape[1]):
            sums[start : start + step, column] = rows[:, column][drawn].sum(axis=1)
    return sums


def _bca(theta: Array, estimate: float, effects: Array, confidence: float) -> tuple[float, float]:
    """The BCa interval.

    Args:
        theta: the statistic of each resample; NaN where it had none.
        estimate: of the samples.
        effects: what leaving out each sample, or group of them, takes from the statistic.
    """
    theta = np.sort(theta[np.isfinite(theta)])
    effects = effects[np.isfinite(effects)]
    b = theta.size
    below = (np.count_nonzero(theta < estimate) + np.count_nonzero(theta <= estimate)) / (2 * b)
    bias = _NORMAL.inv_cdf(min(max(below, 0.5 / b), 1 - 0.5 / b))
    centered = effects - effects.mean()
    squares = float(np.square(centered).sum())
    acceleration = float((centered**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    ends = []
    for tail, round_ in (((1 - confidence) / 2, math.floor), ((1 + confidence) / 2, math.ceil)):
        shifted = bias + _NORMAL.inv_cdf(tail)
        scale = 1 - acceleration * shifted
        level = _NORMAL.cdf(bias + shifted / scale) if scale > 0 else tail
        ends.append(float(theta[min(max(round_(level * (b - 1)), 0), b - 1)]))
    return ends[0], ends[1]
