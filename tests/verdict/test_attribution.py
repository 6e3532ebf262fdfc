"""Whose fault a failure is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pytest_qnn.verdict.judge import AccuracyVerdict
from pytest_qnn.verdict.tolerance import Tolerance
from tests.verdict.samples import Outputs, failed_tests, quantized_outputs


@pytest.fixture
def healthy():
    return quantized_outputs()


def noise(outputs, rms, seed=9):
    return (rms * np.random.default_rng(seed).standard_normal(outputs.f.shape)).astype(np.float32)


def test_nobody_is_blamed_for_a_pass(healthy):
    assert healthy.judge().blame == "none"


def test_the_backend_is_blamed_where_only_it_departs(healthy):
    assert healthy.with_y(-healthy.y).judge().blame == "backend"


def test_the_quantization_is_blamed_where_it_has_lost_the_float_result(healthy):
    q = healthy.f + noise(healthy, 1.0)
    verdict = replace(healthy, q=q, r=q, y=q).judge()
    assert (verdict.blame, failed_tests(verdict)) == ("quantization", {"quantization"})


def test_the_reference_is_blamed_where_its_optimization_levels_differ_more_than_quantizing_allows(healthy):
    verdict = replace(healthy, r=healthy.q + noise(healthy, 0.5)).judge()
    assert (verdict.blame, failed_tests(verdict)) == ("reference", {"reference"})


def test_a_reference_that_moves_doesnt_widen_the_limits_into_a_pass(healthy):
    assert not replace(healthy, r=-10 * healthy.q, y=np.zeros_like(healthy.y)).judge().ok


def test_the_reference_is_blamed_where_its_own_levels_differ_as_much_as_the_backend(healthy):
    bent = healthy.q + noise(healthy, 2.6 * healthy.step)
    bent[2, 0, 0, 0, 0] += 60 * healthy.step
    verdict = replace(healthy, r=healthy.q + noise(healthy, 2.6 * healthy.step, 4), y=bent).judge()
    assert verdict.blame == "reference"


def test_a_common_offset_of_a_step_is_the_graph_edge_quantizers(healthy):
    y = healthy.q + np.float32(healthy.step)
    assert replace(healthy, y=y).judge().blame == "graph-edge quantizer"


def test_a_float_reference_that_isnt_finite_where_the_quantized_one_is_is_the_references_fault(healthy):
    f = healthy.f.copy()
    f[0, 0, 0, 0, 0] = np.nan
    verdict = replace(healthy, f=f).judge()
    assert (verdict.blame, failed_tests(verdict)) == ("reference", {"reference"})


def test_a_self_check_that_isnt_finite_is_the_references_fault(healthy):
    r = healthy.r.copy()
    r[0, 0, 0, 0, 0] = np.inf
    assert replace(healthy, r=r).judge().blame == "reference"


def test_nan_of_the_reference_alone_is_the_references_fault(healthy):
    q = healthy.q.copy()
    q[0, 0, 0, 0, 0] = np.nan
    assert replace(healthy, q=q, r=q).judge().blame == "reference"


@pytest.mark.parametrize("backend", [np.nan, -np.inf, 0.5])
def test_an_infinite_reference_that_the_backend_doesnt_share_cant_decide(healthy, backend):
    q, y = healthy.q.copy(), healthy.y.copy()
    q[1, 0, 2, 3, 4], y[1, 0, 2, 3, 4] = np.inf, backend
    verdict = replace(healthy, q=q, r=q, y=y).judge()
    assert verdict.blame == "reference"
    assert "in 1 of them the reference itself is NaN or infinite, so it can't decide" in verdict.failures[0]


def test_nan_of_the_backend_is_its_fault_even_where_the_reference_has_its_own(healthy):
    q, y = healthy.q.copy(), healthy.y.copy()
    q[0, 0, 0, 0, 0] = y[0, 0, 0, 0, 1] = np.nan
    assert replace(healthy, q=q, r=q, y=y).judge().blame == "backend"


@pytest.mark.parametrize("tolerance", [None, Tolerance(steps=1), Tolerance(sqnr_db=20)])
def test_a_reference_without_a_finite_element_is_blamed_and_said_to_be_so(healthy, tolerance):
    nothing = np.full_like(healthy.q, np.nan)
    for y in (nothing, healthy.y):
        verdict = replace(healthy, q=nothing, r=nothing, y=y).judge(tolerance)
        assert verdict.blame == "reference"
        assert any("12288 are NaN or infinite in the reference" in failure for failure in verdict.failures)


def few(sqnr_db, count=6):
    """``count`` numbers, one per input, of which quantising left ``sqnr_db``; the backend reproduces q."""
    f = np.linspace(-1, 1, count, dtype=np.float32).reshape(count, 1, 1)
    noise = np.where(np.arange(count) % 2, 1, -1).reshape(f.shape) * np.sqrt((f**2).mean() / 10 ** (sqnr_db / 10))
    q = (f + noise).astype(np.float32)
    return Outputs(f, q, q, q, 0.001)


@pytest.mark.parametrize("sqnr_db", [0.5, 2.9])
def test_a_few_numbers_may_lose_much_to_the_quantization_with_a_warning(sqnr_db):
    verdict = few(sqnr_db).judge()
    assert (verdict.failures, verdict.blame) == ((), "none")
    assert any(f"poor: its SQNR against float is {sqnr_db} dB; 6 numbers" in warning for warning in verdict.warnings)


def test_a_few_numbers_that_quantizing_made_worse_than_zeros_leave_nothing_to_compare():
    verdict = few(-0.5).judge()
    assert (verdict.blame, failed_tests(verdict)) == ("quantization", {"quantization"})
    assert "limit 0 dB" in verdict.failures[0]


def test_from_32_numbers_on_bad_luck_is_no_excuse():
    assert few(2.9, 31).judge().failures == ()
    assert failed_tests(few(2.9, 32).judge()) == {"quantization"}


def test_nan_of_the_backend_is_the_backends_fault_even_where_the_quantization_is_lost(healthy):
    q = healthy.f + noise(healthy, 1.0)
    y = q.copy()
    y[0, 0, 0, 0, 0] = np.nan
    assert replace(healthy, q=q, r=q, y=y).judge().blame == "backend"


def test_an_explicit_limit_against_float_blames_the_larger_noise(healthy):
    limit = Tolerance(sqnr_db=60)
    assert replace(healthy, y=healthy.q).judge(limit).blame == "limit", "the derived rule would pass"
    lossy = healthy.f + noise(healthy, 1.0)
    assert replace(healthy, q=lossy, r=lossy, y=lossy).judge(limit).blame == "quantization"
    assert healthy.with_y(-healthy.y).judge(limit).blame == "backend"


def test_an_explicit_limit_against_the_quantized_reference_never_blames_the_quantization(healthy):
    q = healthy.f + noise(healthy, 1.0)
    assert replace(healthy, q=q, r=q, y=-q).judge(Tolerance(steps=1)).blame == "backend"


def test_a_run_blames_the_backend_before_the_quantization(healthy):
    q = healthy.f + noise(healthy, 1.0)
    lost, broken = replace(healthy, q=q, r=q, y=q).judge(), healthy.with_y(-healthy.y).judge()
    assert AccuracyVerdict((lost, healthy.judge(), broken), 6).blame == "backend"
