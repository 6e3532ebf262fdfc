"""Whose fault a failure is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pytest_qnn.verdict.judge import AccuracyVerdict
from pytest_qnn.verdict.tolerance import Tolerance
from tests.verdict.samples import failed_tests, quantized_outputs


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


def test_nan_of_the_backend_is_the_backends_fault_even_where_the_quantization_is_lost(healthy):
    q = healthy.f + noise(healthy, 1.0)
    y = q.copy()
    y[0, 0, 0, 0, 0] = np.nan
    assert replace(healthy, q=q, r=q, y=y).judge().blame == "backend"


def test_an_explicit_limit_against_float_blames_the_larger_noise(healthy):
    limit = Tolerance(sqnr_db=60)
    assert replace(healthy, y=healthy.q).judge(limit).blame == "quantization"
    assert healthy.with_y(-healthy.y).judge(limit).blame == "backend"


def test_an_explicit_limit_against_the_quantized_reference_never_blames_the_quantization(healthy):
    q = healthy.f + noise(healthy, 1.0)
    assert replace(healthy, q=q, r=q, y=-q).judge(Tolerance(steps=1)).blame == "backend"


def test_a_run_blames_the_backend_before_the_quantization(healthy):
    q = healthy.f + noise(healthy, 1.0)
    lost, broken = replace(healthy, q=q, r=q, y=q).judge(), healthy.with_y(-healthy.y).judge()
    assert AccuracyVerdict((lost, healthy.judge(), broken), 6).blame == "backend"
