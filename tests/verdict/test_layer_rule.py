"""The rule for layers computed alone: what is rounding, and what isn't."""

from __future__ import annotations

import numpy as np
import pytest

from pytest_qnn.verdict.layer_rule import LayerCase, LayerFinding, LayersVerdict

RNG = np.random.default_rng(0)
ZERO = 100
Q = np.clip(np.rint(RNG.normal(0, 30, (1, 16, 12, 12))) + ZERO, 0, 255).astype(np.uint8)


def judged(y: np.ndarray, q: np.ndarray = Q, r: np.ndarray | None = None, **fields: object) -> LayerFinding:
    named = {"amplitude": 0.5, "spread": False, "bits": 8, **fields}
    case = LayerCase("t_quantized", "conv", "Conv", **named)  # type: ignore[arg-type]
    case.add(q, y, q if r is None else r, ZERO)
    return case.judge()


def moved(amount: np.ndarray | float) -> np.ndarray:
    return np.clip(np.rint(Q.astype(np.float64) + amount), 0, 255).astype(np.uint8)


def test_rounding_another_way_passes() -> None:
    rounded = moved(RNG.choice([-1, 0, 1], Q.shape, p=[0.05, 0.9, 0.05]))
    finding = judged(rounded)
    assert finding.ok
    assert 0 < finding.rms_steps < 0.5
    assert finding.max_steps == 1


@pytest.mark.parametrize(
    ("y", "test"),
    [
        (moved(1), "mean"),
        (moved(RNG.normal(0, 3, Q.shape)), "rms"),
        (moved(0.02 * (Q.astype(float) - ZERO)), "gain"),
        (np.roll(Q, 1, 1), "channel"),
        (moved(np.where(np.arange(Q.size).reshape(Q.shape) == 7, 40, 0)), "largest error"),
        (np.zeros_like(Q), "rms"),
        (moved(np.where(np.arange(16)[:, None, None] == 3, 6, 0)), "channel 3 of axis 1"),
    ],
    ids=["zero point", "noise", "gain 2%", "rolled", "one element", "zeros", "one channel"],
)
def test_a_defect_of_a_layer_is_seen(y: np.ndarray, test: str) -> None:
    assert any(failure.startswith(test) for failure in judged(y).failures), judged(y).failures


def test_what_a_kind_of_layer_may_be_off_by_widens_its_limits() -> None:
    noisy = moved(RNG.normal(0, 3, Q.shape))
    assert not judged(noisy).ok
    assert judged(noisy, amplitude=4.0).ok


def test_what_the_reference_itself_is_unsure_of_is_granted() -> None:
    off = moved(RNG.choice([-2, 2], Q.shape))
    assert not judged(off).ok
    assert judged(off, r=moved(RNG.choice([-2, 2], Q.shape))).ok


def test_single_elements_of_sums_of_products_may_be_far_off() -> None:
    one = moved(np.where(np.arange(Q.size).reshape(Q.shape) == 7, 20, 0))
    assert not judged(one).ok
    assert judged(one, spread=True).ok


def test_a_channel_whose_weights_are_rounded_again_is_granted_that_and_no_other() -> None:
    again = np.where(np.arange(16) == 3, 8.0, 0.0)
    third, fifth = (moved(np.where(np.arange(16)[:, None, None] == k, RNG.normal(0, 8, Q.shape), 0)) for k in (3, 5))
    assert not judged(third).ok
    for y, ok in ((third, True), (fifth, False)):
        case = LayerCase("t", "conv", "Conv", amplitude=0.5, spread=True, bits=8)
        case.add(Q, y, Q, ZERO)
        case.grant(again)
        assert case.judge().ok == ok


def test_no_layer_is_no_pass() -> None:
    assert not LayersVerdict((), 1).ok
    assert LayersVerdict((judged(Q),), 1).ok
    assert not LayersVerdict((judged(Q), judged(moved(1))), 1).ok


def test_the_first_failure_in_the_graphs_order_comes_first() -> None:
    good, bad, worse = judged(Q), judged(moved(1)), judged(np.zeros_like(Q))
    assert LayersVerdict((good, bad, worse), 1).failed == (bad, worse)


def test_results_of_fewer_bits_are_seen_however_small_their_error() -> None:
    q = np.clip(np.rint(RNG.normal(30_000, 5_000, (1, 8, 12, 12))), 0, 65535).astype(np.uint16)
    coarse = ((q.astype(np.int64) + 128) // 256 * 256).astype(np.uint16)
    fine = np.clip(q + np.rint(RNG.normal(0, 74, q.shape)), 0, 65535).astype(np.uint16)  # as far off, on no grid

    def judged_wide(y: np.ndarray) -> LayerFinding:
        case = LayerCase("t", "conv", "Conv", amplitude=128.0, spread=True, bits=16)
        case.add(q, y, q, 30_000)
        return case.judge()

    assert [text.partition(":")[0] for text in judged_wide(coarse).failures] == ["bits"]
    assert judged_wide(fine).ok


def test_a_range_that_is_cut_off_is_seen() -> None:
    q = np.arange(256, dtype=np.uint8).repeat(8).reshape(1, 1, 32, 64)
    finding = judged(np.minimum(q, 247), q, spread=True)
    assert any(text.startswith("saturation") for text in finding.failures)
