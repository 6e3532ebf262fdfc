"""The blocked metrics are those of the float64 formulas over whole arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qnn.verdict.channels import Layout
from pytest_qnn.verdict.metrics import BLOCK, Evidence, decibels
from tests.verdict.samples import Array


def data(shape, seed=0, scale=1.0, noise=0.01):
    rng = np.random.default_rng(seed)
    f = (scale * rng.standard_normal(shape)).astype(np.float32)
    q, y, r = ((f + scale * noise * rng.standard_normal(shape)).astype(np.float32) for _ in range(3))
    return q, y, f, r


def evidence(*samples, step=None):
    found = Evidence(step=step, has_float=len(samples[0]) > 2, has_check=len(samples[0]) > 3)
    for sample in samples:
        found.add(*sample)
    return found


def exact(q: Array, y: Array, f: Array, r: Array) -> dict[str, float]:
    q, y, f, r = (a.astype(np.float64).reshape(-1) for a in (q, y, f, r))
    e, g, h = y - q, q - f, r - q
    return {
        "n": q.size,
        "q1": q.sum(),
        "q2": q @ q,
        "q4": (q**4).sum(),
        "y2": y @ y,
        "f2": f @ f,
        "e1": e.sum(),
        "e2": e @ e,
        "e4": (e**4).sum(),
        "eq": e @ q,
        "q2e2": (q**2 * e**2).sum(),
        "q3e": (q**3 * e).sum(),
        "g1": g.sum(),
        "g2": g @ g,
        "g4": (g**4).sum(),
        "gf": g @ f,
        "yf2": (y - f) @ (y - f),
        "h2": h @ h,
        "variance": q.var(),
        "max_q": abs(q).max(),
        "max_e": abs(e).max(),
        "max_f": abs(f).max(),
        "max_g": abs(g).max(),
        "max_h": abs(h).max(),
        "far": np.minimum(abs(e), abs(y - f)).max(),
    }


def assert_sums(found: Evidence, wanted: dict[str, float], scale: float = 1.0) -> None:
    powers = {"q4": 4, "e4": 4, "q2e2": 4, "q3e": 4, "g4": 4, "n": 0, "q1": 1, "e1": 1, "g1": 1}
    for name, value in wanted.items():
        power = powers.get(name, 1 if name.startswith(("max", "far")) else 2)
        near_zero = 1e-6 * wanted["n"] * scale**power  # for sums whose terms cancel
        assert getattr(found.sums, name) == pytest.approx(value, rel=2e-5, abs=near_zero if value else 0), name


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (1,),
        (7,),
        (3, 5),
        (1, 4, 6),
        (2, 3, 5, 7),
        (1, 3, 200, 201),
        (2, BLOCK + 3),
        (1, 2, BLOCK + 1),
        (1, 3, 70000, 1),
    ],
)
def test_sums_are_those_of_the_formulas_for_every_rank_and_across_blocks(shape):
    sample = data(shape)
    assert_sums(evidence(sample), exact(*sample))


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1])
def test_no_element_is_lost_at_a_block_boundary(size):
    q, y, f, r = data((size,))
    y[-1] += 50
    found = evidence((q, y, f, r))
    assert found.sums.n == size
    assert found.worst.index == (size - 1,)
    assert_sums(found, exact(q, y, f, r))


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e8, 1e20])
def test_tiny_and_huge_values_keep_their_fourth_powers(scale):
    sample = data((1, 3, 400), scale=scale)
    assert_sums(evidence(sample), exact(*sample), scale)


def test_one_huge_element_leaves_the_others_sums_alone():
    q, y, f, r = data((100,))
    y[3] = 1e20
    found = evidence((q, y, f, r))
    assert found.sums.q4 == pytest.approx(exact(q, y, f, r)["q4"])
    assert found.sums.max_e == pytest.approx(1e20)


def test_variance_survives_a_large_mean():
    q = data((1, 4, 50_000))[0]
    moved = q + np.float32(30_000)
    assert evidence((moved, moved, moved, moved)).sums.variance == pytest.approx(moved.astype(float).var(), rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    samples=st.integers(1, 3),
)
def test_samples_add_up(seed, shape, samples):
    given = [data(shape, seed + i) for i in range(samples)]
    together = exact(*(np.stack(arrays) for arrays in zip(*given, strict=True)))
    assert_sums(evidence(*given), together)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 400), exponent=st.integers(-20, 20))
def test_ratios_dont_change_when_everything_is_scaled(seed, size, exponent):
    sample = data((size,), seed)
    scaled = tuple(a * np.float32(2.0**exponent) for a in sample)
    before, after = evidence(sample, step=0.1).figures(), evidence(scaled, step=0.1 * 2.0**exponent).figures()
    for name in ("max_steps", "rms_steps", "beyond_one_step", "sqnr_db", "cosine", "gain"):
        assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-4), name


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 400))
def test_order_of_elements_doesnt_matter(seed, size):
    sample = data((size,), seed)
    order = np.random.default_rng(seed).permutation(size)
    before, after = (
        evidence(sample, step=0.01).figures(),
        evidence(tuple(a[order] for a in sample), step=0.01).figures(),
    )
    assert after == pytest.approx(before, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "shape",
    [(5, 7), (2, 3, 4), (2, 6, 5, 8), (1, 5, 3, BLOCK // 2), (3, 4, BLOCK + 5), (1, 2, 3, 4, 5), (2, 3, 300, 500)],
)
def test_channel_totals_are_those_of_each_axis(shape):
    q, y, f, r = data(shape)
    found = evidence((q, y, f, r))
    assert {axis for axis, _ in found.channels} == {a for a in (1, len(shape) - 1) if shape[a] <= 4096}
    for (axis, count), totals in found.channels.items():
        others = tuple(a for a in range(len(shape)) if a != axis)
        wide = [a.astype(np.float64) for a in (q, y, f, r)]
        assert totals.elements == q.size // count
        np.testing.assert_allclose(totals.e2, ((wide[1] - wide[0]) ** 2).sum(others), rtol=1e-5)
        np.testing.assert_allclose(totals.g2, ((wide[0] - wide[2]) ** 2).sum(others), rtol=1e-5)
        np.testing.assert_allclose(totals.h2, ((wide[3] - wide[0]) ** 2).sum(others), rtol=1e-5)
        np.testing.assert_allclose(totals.q1, wide[0].sum(others), atol=1e-2)
        np.testing.assert_allclose(totals.y2, (wide[1] ** 2).sum(others), rtol=1e-5)


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.integers(0, 12), max_size=4).map(tuple), largest=st.integers(1, 40))
def test_blocks_cover_every_element_once(shape, largest):
    layout = Layout(shape, largest)
    covered = [i for part in layout.blocks() for i in range(part.start, part.stop)]
    assert covered == list(range(math.prod(shape)))
    assert all(part.stop - part.start <= max(largest, layout.row) for part in layout.blocks())


def cuts(shape, largest):
    return [(part.start, part.stop) for part in Layout(shape, largest).blocks()]


def test_blocks_are_whole_rows_of_channels():
    assert cuts((5, 3), 7) == [(0, 6), (6, 12), (12, 15)]
    assert cuts((2, 5), 3) == [(0, 5), (5, 10)]


def test_long_runs_of_a_channel_are_cut_into_equal_blocks():
    assert cuts((1, 2, 10), 8) == [(0, 10), (10, 20)]  # the last axis has channels too, and isn't split
    assert cuts((1, 2, 9, 1), 8) == [(0, 5), (5, 9), (9, 14), (14, 18)]
    assert cuts((1, 2, 5, 2), 8) == [(0, 6), (6, 10), (10, 16), (16, 20)]


def test_short_runs_of_a_channel_share_a_block():
    assert cuts((1, 7, 2, 2), 40) == [(0, 28)]
    assert cuts((1, 12, 2, 2), 40) == [(0, 40), (40, 48)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=5).map(tuple),
    largest=st.integers(16, 200),
)
def test_channel_totals_dont_depend_on_where_blocks_are_cut(seed, shape, largest):
    q, y, f, r = data(shape, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytest_qnn.verdict.metrics.BLOCK", largest)
        found = evidence((q, y, f, r))
    for (axis, _), totals in found.channels.items():
        others = tuple(a for a in range(len(shape)) if a != axis)
        wide_q, wide_y, wide_f, wide_r = (a.astype(np.float64) for a in (q, y, f, r))
        for name, values in {
            "q1": wide_q,
            "y1": wide_y,
            "q2": wide_q**2,
            "y2": wide_y**2,
            "f2": wide_f**2,
            "e2": (wide_y - wide_q) ** 2,
            "g2": (wide_q - wide_f) ** 2,
            "h2": (wide_r - wide_q) ** 2,
        }.items():
            np.testing.assert_allclose(getattr(totals, name), values.sum(others), rtol=1e-5, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("sign", [1, -1])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 300), largest=st.integers(1, 60))
def test_the_ends_of_the_range_are_the_extreme_elements_of_all_blocks(sign, seed, size, largest):
    q, y, f, r = data((size,), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytest_qnn.verdict.metrics.BLOCK", largest)
        end = evidence((q, y, f, r)).ends[0 if sign > 0 else 1]
    order = np.argsort(-sign * q)[:16]
    np.testing.assert_array_equal(end.q, sign * q[order])
    np.testing.assert_array_equal(end.y, sign * y[order])
    assert end.limit == (sign * y).max()


def test_strided_arrays_are_read_in_their_own_order():
    sample = data((6, 10, 4))
    strided = tuple(a.transpose(2, 0, 1)[::-1] for a in sample)
    copied = tuple(np.ascontiguousarray(a) for a in strided)
    assert evidence(strided).figures() == evidence(copied).figures()


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int8, np.int64, np.uint8, np.bool_])
def test_every_real_type_is_compared_as_float32(dtype):
    q = np.array([0, 1, 1, 0, 1]).astype(dtype)
    y = np.array([0, 1, 0, 1, 1]).astype(dtype)
    found = evidence((q, y))
    assert (found.sums.e2, found.sums.max_e, found.sums.n) == (2, 1, 5)


def test_the_worst_element_is_named_with_its_values():
    q, y, f, r = data((2, 3, 5))
    y[1, 2, 4] += 9
    worst = evidence((q, q, f, r), (q, y, f, r)).worst
    assert (worst.sample, worst.index) == (1, (1, 2, 4))
    assert (worst.f, worst.q, worst.y) == (f[1, 2, 4], q[1, 2, 4], y[1, 2, 4])


def test_the_worst_element_is_found_when_samples_differ_in_shape():
    q, y = np.zeros((3, 8), np.float32), np.zeros((3, 8), np.float32)
    y[2, 7] = 1
    assert evidence((q, y), (q[:1], q[:1])).worst.index == (2, 7)


def test_elements_of_exactly_one_16_bit_step_arent_beyond_it():
    step = np.float32(3.3e-4)
    integers = np.arange(1000, 65_000, dtype=np.float32)
    assert evidence((integers * step, (integers + 1) * step), step=float(step)).sums.beyond == 0
    assert evidence((integers * step, (integers + 2) * step), step=float(step)).sums.beyond == 64_000


def test_matching_non_finite_elements_are_left_out_of_the_sums():
    q, y, f, r = data((50,))
    for a in (q, y, f, r):
        a[3], a[4] = np.nan, -np.inf
    found = evidence((q, y, f, r))
    keep = np.isfinite(q)
    assert (found.non_finite.mismatched, found.non_finite.nan, found.non_finite.inf) == (0, 1, 1)
    assert_sums(found, exact(*(a[keep] for a in (q, y, f, r))))


@pytest.mark.parametrize(
    ("reference", "got"), [(1.0, np.nan), (np.nan, 1.0), (np.inf, -np.inf), (np.inf, np.nan), (2.0, np.inf)]
)
def test_non_finite_elements_that_dont_match_are_counted_and_located(reference, got):
    q = np.ones((4, 5), np.float32)
    y = q.copy()
    q[2, 1], y[2, 1] = reference, got
    bad = evidence((q, y)).non_finite
    assert (bad.mismatched, bad.first) == (1, (0, (2, 1)))


def test_a_non_finite_float_reference_doesnt_hide_the_elements_error():
    q, y, f, r = data((50,))
    f[7], y[7] = np.nan, q[7] + 100
    found = evidence((q, y, f, r))
    assert found.non_finite.float_mismatched == 1
    assert found.sums.max_e == pytest.approx(100)


def test_empty_arrays_count_nothing():
    empty = np.zeros((0, 4), np.float32)
    assert evidence((empty, empty)).sums.n == 0


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        Evidence(has_float=False, has_check=False).add(np.zeros(3), np.zeros((3, 1)))


def test_a_missing_float_reference_is_refused():
    with pytest.raises(ValueError, match="all samples or for none"):
        Evidence().add(np.zeros(3), np.zeros(3))


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_a_step_that_is_no_step_is_refused(step):
    with pytest.raises(ValueError, match="positive and finite"):
        Evidence(step=step)


def test_cosine_of_a_zero_vector_isnt_a_number():
    q = np.ones(5, np.float32)
    assert math.isnan(evidence((q, 0 * q)).figures()["cosine"])


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100, 1, 20), (1, 0, math.inf), (0, 1, -math.inf), (1, math.inf, -math.inf), (0, 0, math.inf)],
)
def test_decibels(signal, noise, expected):
    assert decibels(signal, noise) == expected


def test_decibels_of_nan_are_nan():
    assert math.isnan(decibels(1.0, math.nan))
