"""Explicit limits: what they mean, and that none of them can pass without evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pytest_qnn.errors import OptionError
from pytest_qnn.verdict.judge import AccuracyVerdict, OutputCase, judge
from pytest_qnn.verdict.metrics import Evidence
from pytest_qnn.verdict.tolerance import Tolerance
from tests.verdict.samples import failed_tests, quantized_outputs

EVERY_LIMIT = [
    Tolerance(steps=2),
    Tolerance(absolute=0.1),
    Tolerance(relative=0.1),
    Tolerance(sqnr_db=20),
    Tolerance(cosine=0.9),
    Tolerance(top_k=1),
]


def verdict(q, y, f=None, *, tolerance=None, step=None, exact=False):
    case = OutputCase("out", Evidence(step, has_float=f is not None), "float32", exact=exact, tolerance=tolerance)
    q, y = np.asarray(q), np.asarray(y)
    case.add(q, y, None if f is None else np.asarray(f), q)
    return case.judge()


def floats(*values):
    return np.array([values], np.float32)


@pytest.mark.parametrize("steps", [0, 1, 2.5])
def test_steps_bounds_the_largest_difference_from_the_quantized_reference(steps):
    q = floats(0, 0.5, 1)
    assert verdict(q, q + np.float32(steps * 0.25), tolerance=Tolerance(steps=steps), step=0.25).ok
    assert not verdict(q, q + np.float32((steps + 0.1) * 0.25), tolerance=Tolerance(steps=steps), step=0.25).ok


def test_one_step_of_a_16_bit_output_is_one_step_in_spite_of_float32s_rounding():
    step = np.float32(3.3e-4)
    integers = np.arange(65_534, dtype=np.float32)
    assert verdict(integers * step, (integers + 1) * step, tolerance=Tolerance(steps=1), step=float(step)).ok


def test_steps_of_an_output_without_steps_fail():
    assert failed_tests(verdict(floats(1), floats(1), tolerance=Tolerance(steps=1))) == {"steps"}


def test_absolute_and_relative_limits_add_up():
    q = floats(0, 10, -100)
    limit = Tolerance(absolute=0.5, relative=0.1)
    assert verdict(q, q + floats(0.5, 1.5, 10.5), tolerance=limit).ok
    for excess in (floats(0.51, 0, 0), floats(0, 1.52, 0), floats(0, 0, -10.51)):
        assert not verdict(q, q + excess, tolerance=limit).ok


def test_an_absolute_limit_of_zero_asks_for_equality():
    assert verdict(floats(1, 2), floats(1, 2), tolerance=Tolerance(absolute=0)).ok
    assert not verdict(floats(1, 2), floats(1, np.nextafter(np.float32(2), 3)), tolerance=Tolerance(absolute=0)).ok


def test_sqnr_is_measured_against_the_float_reference():
    f = floats(*[1.0] * 100)
    assert verdict(f * 5, f * np.float32(1.01), f, tolerance=Tolerance(sqnr_db=39.9)).ok
    assert not verdict(f * 5, f * np.float32(1.01), f, tolerance=Tolerance(sqnr_db=40.1)).ok


def test_cosine_is_measured_against_the_float_reference():
    f = floats(1, 0)
    assert verdict(floats(0, 1), floats(1, 1), f, tolerance=Tolerance(cosine=0.7)).ok
    assert not verdict(floats(0, 1), floats(1, 1), f, tolerance=Tolerance(cosine=0.71)).ok


def test_top_k_asks_for_the_float_references_best_class_among_the_ks_best():
    f, y = floats(0.1, 0.9, 0.3), floats(0.5, 0.4, 0.3)
    assert not verdict(f, y, f, tolerance=Tolerance(top_k=1)).ok
    assert verdict(f, y, f, tolerance=Tolerance(top_k=2)).ok


@pytest.mark.parametrize("best", range(4))
def test_a_constant_output_fails_top_k_whichever_class_is_best(best):
    f = np.eye(4, dtype=np.float32)[[best]]
    assert failed_tests(verdict(f, 0 * f, f, tolerance=Tolerance(top_k=2))) == {"top_k"}


def test_a_tie_that_the_quantized_reference_has_too_keeps_top_k():
    f, q = floats(0.31, 0.30, 0.1), floats(0.3, 0.3, 0.1)
    assert verdict(q, q, f, tolerance=Tolerance(top_k=1)).ok


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_top_k_fails_where_every_class_would_be_among_the_best(shape):
    same = np.ones(shape, np.float32)
    assert not verdict(same, same, same, tolerance=Tolerance(top_k=3)).ok


@pytest.mark.parametrize("limit", EVERY_LIMIT, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_element_fails_every_limit(limit, value):
    healthy = quantized_outputs(shape=(1, 10))
    broken = healthy.y.copy()
    broken[0, 0, 3] = value
    assert "non-finite" in failed_tests(healthy.with_y(broken).judge(limit))


@pytest.mark.parametrize("limit", [*EVERY_LIMIT, None], ids=str)
def test_outputs_without_any_finite_element_fail(limit):
    nothing = np.full((2, 5), np.nan, np.float32)
    assert not verdict(nothing, nothing, nothing, tolerance=limit, step=0.1).ok


@pytest.mark.parametrize("limit", [*EVERY_LIMIT, None], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_empty_outputs_fail(limit, exact):
    nothing = np.zeros((0, 5), np.float32)
    assert not verdict(nothing, nothing, nothing, tolerance=limit, exact=exact).ok


@pytest.mark.parametrize("limit", [*EVERY_LIMIT, None], ids=str)
def test_another_shape_fails_even_if_it_broadcasts(limit):
    q = np.ones((2, 5), np.float32)
    assert failed_tests(verdict(q, q[:1], q, tolerance=limit)) == {"shape"} or limit is not None
    assert not verdict(q, q[:1], q, tolerance=limit).ok


def test_another_type_fails():
    assert "type" in failed_tests(
        verdict(np.ones(4, np.float32), np.ones(4, np.int32), tolerance=Tolerance(absolute=1))
    )


def test_the_cosine_of_a_zero_output_fails_any_limit():
    assert not verdict(floats(1, 1), floats(0, 0), floats(1, 1), tolerance=Tolerance(cosine=-1)).ok


def test_a_broken_float_reference_fails_a_limit_against_it():
    limit = Tolerance(sqnr_db=-100)
    result = verdict(floats(1, 2), floats(1, 2), floats(1, np.nan), tolerance=limit)
    assert (failed_tests(result), result.blame) == ({"reference"}, "reference")


def test_a_broken_float_reference_doesnt_matter_to_a_limit_against_the_quantized_one():
    assert verdict(floats(1, 2), floats(1, 2), floats(1, np.nan), tolerance=Tolerance(absolute=0)).ok


def test_matching_infinities_pass_with_a_warning():
    masked = floats(1, -np.inf, 2)
    result = verdict(masked, masked, tolerance=Tolerance(absolute=0))
    assert result.ok
    assert any("NaN or infinite" in warning for warning in result.warnings)


# --- integers ---------------------------------------------------------------------------------------------------------


def test_integer_outputs_must_equal_the_reference():
    classes = np.array([3, 1, 4, 1, 5])
    assert verdict(classes, classes, exact=True).ok
    assert not verdict(classes, np.array([3, 1, 4, 1, 6]), exact=True).ok


def test_integers_beyond_float32s_digits_are_compared_exactly():
    large = np.array([2**40], np.int64)
    assert not verdict(large, large + 1, exact=True).ok


def test_the_backend_may_change_as_many_integers_as_quantizing_does():
    q = np.arange(10)
    f = np.where(q < 2, -1, q)
    assert verdict(q, np.where(q >= 8, -1, q), f, exact=True).ok
    assert not verdict(q, np.where(q >= 7, -1, q), f, exact=True).ok


def test_integers_that_quantizing_changes_everywhere_leave_nothing_to_compare():
    q = np.arange(10)
    result = verdict(q, q, q + 1, exact=True)
    assert (result.ok, result.blame) == (False, "quantization")


def test_integers_that_optimising_the_reference_changes_everywhere_are_the_references_fault():
    q = np.arange(10)
    case = OutputCase("out", Evidence(), "float32", exact=True)
    case.add(q, q, q, q + 1)
    result = case.judge()
    assert (result.ok, result.blame) == (False, "reference")
    assert "the references themselves differ in 10 of 10 elements" in result.failures[0]


def test_an_empty_output_is_said_to_be_empty():
    empty = np.zeros((0, 3), np.float32)
    assert verdict(empty, empty).failures == ("nothing: there is no finite element to judge: the output is empty",)


def test_booleans_are_compared():
    mask = np.array([True, False, True])
    assert verdict(mask, mask, exact=True).ok
    assert not verdict(mask, ~mask, exact=True).ok


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_without_outputs_is_refused():
    with pytest.raises(ValueError, match="nothing to judge"):
        judge([], 3)


def test_an_output_that_missed_a_sample_is_refused():
    case = OutputCase("out", Evidence(has_float=False), "float32")
    case.add(floats(1), floats(1), None, floats(1))
    with pytest.raises(ValueError, match="1 of 2 samples"):
        judge([case], 2)


def test_no_output_is_no_pass():
    assert not AccuracyVerdict((), 0).ok


def test_one_output_that_fails_fails_the_run():
    healthy = quantized_outputs()
    run = AccuracyVerdict((healthy.judge(), healthy.with_y(-healthy.y).judge()), 6)
    assert not run.ok
    assert len(run.failed) == 1


# --- what may be written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"steps": -1},
        {"steps": math.inf},
        {"absolute": math.nan},
        {"relative": "1"},
        {"cosine": 1.1},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_k": True},
        {"stepz": 1},
        {},
        {"steps": None},
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_and_names_where_it_was_written(values):
    with pytest.raises(OptionError, match="test_x"):
        Tolerance.from_values(values, "test_x")


def test_a_tolerance_is_written_as_its_limits():
    assert str(Tolerance(steps=2, cosine=0.99)) == "steps=2, cosine=0.99"
