"""The interval of a metric's difference: it must hold the truth as often as it says, also where few samples showed anything."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from pytest_qnn.verdict.bootstrap import (
    Difference,
    Parts,
    difference_of_function,
    difference_of_parts,
    samples_needed,
)

TRIALS, RESAMPLES = 300, 1000
Draw = Callable[[np.random.Generator], tuple[Parts, Parts]]


def mean_of(scores: np.ndarray) -> Parts:
    return Parts(scores.astype(np.float64), np.ones(len(scores)))


def accuracy(n: int, lost: float, won: float) -> tuple[Draw, float]:
    """Right or wrong answers of two models: the new one loses and wins some; and the true difference."""

    def draw(rng: np.random.Generator) -> tuple[Parts, Parts]:
        u = rng.random(n)
        change = np.where(u < lost, -1, np.where(u < lost + won, 1, 0))
        old = np.where(change == 0, rng.random(n) < 0.8, change < 0)
        return mean_of(old + change), mean_of(old)

    return draw, won - lost


def word_errors(n: int) -> tuple[Draw, float]:
    """Errors per word in utterances of 3 to 29 words: a ratio of sums. 2% more errors; fewer is better."""

    def draw(rng: np.random.Generator) -> tuple[Parts, Parts]:
        words = rng.integers(3, 30, n)
        old = rng.binomial(words, 0.1)
        new = old + rng.binomial(words, 0.02)
        return Parts(-new.astype(float), words.astype(float)), Parts(-old.astype(float), words.astype(float))

    return draw, -0.02


def rare_large_losses(n: int) -> tuple[Draw, float]:
    """A score that keeps steady in 7 of 10 samples and else loses a squared exponential's worth: heavily skewed."""

    def draw(rng: np.random.Generator) -> tuple[Parts, Parts]:
        loss = 0.02 * rng.exponential(1.0, n) ** 2 * (rng.random(n) < 0.3)
        return mean_of(1 - loss), mean_of(np.ones(n))

    return draw, -0.02 * 2 * 0.3


CASES = {
    "five in a thousand lost, 200 samples": accuracy(200, 0.005, 0.0),
    "one percent lost, some won, 500 samples": accuracy(500, 0.01, 0.002),
    "many lost and won, 400 samples": accuracy(400, 0.08, 0.06),
    "word errors, 80 samples": word_errors(80),
    "rare large losses, 120 samples": rare_large_losses(120),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_truth_lies_below_the_interval_as_seldom_as_it_says(case: str) -> None:
    """Two-sided 95%: 2.5% of 300 trials are 7.5; 16 of them or more happen by chance once in 300."""
    draw, truth = CASES[case]
    rng = np.random.default_rng(7)
    found = [difference_of_parts(*draw(rng), 1.0, 0.95, RESAMPLES, seed) for seed in range(TRIALS)]
    assert sum(f.low > truth for f in found) < 16
    assert sum(f.high < truth for f in found) < 16


def test_where_much_differs_the_interval_is_the_usual_one() -> None:
    """Coverage alone would be easy: an interval must not be wider than it has to."""
    draw, _ = accuracy(2000, 0.08, 0.06)
    new, old = draw(np.random.default_rng(0))
    found = difference_of_parts(new, old, 1.0, 0.95, 10_000, 0)
    normal = 1.96 * float(np.std(new.numerator - old.numerator)) / math.sqrt(2000)
    assert 0.95 < (found.high - found.low) / (2 * normal) < 1.1


@pytest.mark.parametrize("n", [5, 50, 800, 5000])
def test_equal_samples_prove_no_more_than_the_exact_binomial_bound(n: int) -> None:
    """All of n pairs are equal: the chance of a loss may still be 1 - 0.025 ** (1 / n)."""
    scores = mean_of(np.ones(n))
    found = difference_of_parts(scores, scores, 1.0, 0.95, 10_000, 0)
    exact = 1 - 0.025 ** (1 / n)
    assert found.value == 0
    assert exact * 0.6 < -found.low < exact * 1.4
    if n > 5:
        assert -found.low > exact * 0.95


def test_a_function_of_all_samples_gives_the_interval_of_its_parts() -> None:
    new, old = word_errors(120)[0](np.random.default_rng(3))

    def difference(indices: np.ndarray) -> float:
        chosen = [Parts(p.numerator[indices], p.denominator[indices]) for p in (new, old)]
        return chosen[0].value - chosen[1].value

    by_parts = difference_of_parts(new, old, 0.1, 0.95, 4000, 1)
    by_function = difference_of_function(difference, 120, 0.1, 0.95, 4000, 1)
    assert by_function.value == pytest.approx(by_parts.value)
    width = by_parts.high - by_parts.low
    assert by_function.low == pytest.approx(by_parts.low, abs=0.08 * width)
    assert by_function.high == pytest.approx(by_parts.high, abs=0.08 * width)
    assert by_function.spread == pytest.approx(by_parts.spread, rel=0.1)


def test_the_same_seed_gives_the_same_interval() -> None:
    new, old = rare_large_losses(100)[0](np.random.default_rng(0))
    first, again, other = (difference_of_parts(new, old, 1.0, 0.95, RESAMPLES, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_as_many_samples_as_are_said_to_be_needed_decide() -> None:
    few = mean_of(np.ones(100))
    found = difference_of_parts(few, few, 1.0, 0.95, 10_000, 0)
    needed = samples_needed(found, 0.005, 1.0, 0.95)
    assert needed is not None
    assert 600 < needed < 1000
    enough, short = mean_of(np.ones(int(1.15 * needed))), mean_of(np.ones(int(0.8 * needed)))
    assert difference_of_parts(enough, enough, 1.0, 0.95, 10_000, 0).low > -0.005
    assert difference_of_parts(short, short, 1.0, 0.95, 10_000, 0).low < -0.005


def test_a_difference_as_large_as_the_margin_is_never_decided() -> None:
    assert samples_needed(Difference(-0.5, -1.0, 0.0, 5.0), 0.5, 100.0, 0.95) is None
