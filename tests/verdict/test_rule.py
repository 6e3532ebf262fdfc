"""What the derived rule catches, and what it lets pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pytest_qnn.verdict.metrics import Evidence
from pytest_qnn.verdict.rule import apply_rule
from tests.verdict.samples import Outputs, failed_tests, float_outputs, quantized_outputs

TRIPLES = sorted((Path(__file__).parent / "data").glob("*.npz"))


def triple(path: Path) -> Outputs:
    stored = np.load(path)
    step = float(stored["step"])
    f, q, r, y = (stored[name][:, None] for name in "fqry")
    return Outputs(f, q, r, y, None if np.isnan(step) else step, str(stored["precision"]), bool(stored["bounded"]))


def dead_channel(y):
    return np.where(np.arange(y.shape[2]).reshape(-1, 1, 1) == 3, np.float32(0.25), y)


def few_wrong_elements(y):
    broken = y.copy().reshape(-1)
    broken[::4000] = 3.5 * np.sign(-broken[::4000])
    return broken.reshape(y.shape)


def saturated(y):
    return np.clip(y, 0.6 * y.min(), 0.6 * y.max())


def nan_element(y):
    broken = y.copy()
    broken[1, 0, 2, 3, 4] = np.nan
    return broken


DEFECTS = {
    "zeros": (np.zeros_like, "power"),
    "one constant": (lambda y: np.full_like(y, y.mean()), "likeness"),
    "opposite sign": (np.negative, "gain"),
    "a gain of 1.05": (lambda y: y * np.float32(1.05), "gain"),
    "a gain of 0.95": (lambda y: y * np.float32(0.95), "gain"),
    "another input's result": (lambda y: np.roll(y, 1, axis=0), "samples"),
    "reversed elements": (lambda y: y[..., ::-1], "power"),
    "a rolled axis": (lambda y: np.roll(y, 1, axis=-1), "power"),
    "a dead channel": (dead_channel, "dead"),
    "a few wrong elements": (few_wrong_elements, "tail"),
    "a saturated range": (saturated, "saturation"),
    "one NaN": (nan_element, "non-finite"),
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_defect_of_a_quantized_output_is_caught_by_its_own_test(defect, bits):
    healthy = quantized_outputs(bits=bits)
    breaking, test = DEFECTS[defect]
    assert test in failed_tests(healthy.with_y(breaking(healthy.y)).judge())


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_of_a_float16_output_is_caught(defect):
    healthy = float_outputs()
    assert not healthy.with_y(DEFECTS[defect][0](healthy.y)).judge().ok


def test_an_offset_of_a_step_is_caught_as_bias():
    healthy = quantized_outputs()
    assert "bias" in failed_tests(healthy.with_y(healthy.y + np.float32(healthy.step)).judge())


def test_a_single_far_element_is_caught_in_a_large_output():
    healthy = quantized_outputs()
    broken = healthy.y.copy()
    broken[2, 0, 1, 5, 5] += 40 * healthy.step
    assert failed_tests(healthy.with_y(broken).judge()) >= {"tail", "spikes"}


def test_one_noisy_channel_is_named():
    healthy = quantized_outputs()
    broken = healthy.y.copy()
    broken[:, :, 5] += (
        12 * healthy.step * np.where(np.indices(broken[:, :, 5].shape).sum(0) % 2, 1, -1).astype(np.float32)
    )
    (failure,) = [f for f in healthy.with_y(broken).judge().failures if f.startswith("channel")]
    assert "channel 5 of axis 1" in failure


def test_loss_against_float_is_caught():
    healthy = quantized_outputs()
    noise = 8 * healthy.step * np.random.default_rng(1).standard_normal(healthy.y.shape)
    assert "loss" in failed_tests(healthy.with_y((healthy.y + noise).astype(np.float32)).judge())


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("inputs", [1, 2, 6])
def test_independent_rounding_of_the_same_size_passes(seed, bits, inputs):
    assert quantized_outputs(seed, bits=bits, inputs=inputs).judge().failures == ()


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 10), (12,), (), (4, 10), (1, 7, 30)])
@pytest.mark.parametrize("seed", range(5))
def test_small_outputs_of_any_rank_pass(shape, seed):
    assert quantized_outputs(seed, shape=shape).judge().failures == ()


def test_an_output_equal_to_its_references_passes():
    healthy = quantized_outputs()
    assert replace(healthy, f=healthy.q, y=healthy.q).judge().failures == ()


@pytest.mark.parametrize(("relative", "precision"), [(0.01, "float16"), (2e-4, "float32")])
def test_rounding_of_the_precision_that_was_computed_in_passes(relative, precision):
    assert float_outputs(relative=relative, precision=precision).judge().failures == ()


def test_float16_errors_fail_an_output_that_was_computed_in_float32():
    assert not float_outputs(relative=0.01, precision="float32").judge().ok


def test_small_absolute_errors_of_a_float16_sigmoid_pass_only_where_the_output_is_bounded():
    f = np.full((6, 1, 50), 1e-3, np.float32) * np.linspace(0.5, 1.5, 50, dtype=np.float32)
    y = f + np.float32(1.5e-3) * np.where(np.arange(50) % 2, 1, -1).astype(np.float32)
    outputs = Outputs(f, f, f, y, None)
    assert replace(outputs, bounded=True).judge().ok
    assert not outputs.judge().ok


@pytest.mark.parametrize("path", TRIPLES, ids=lambda path: path.stem)
def test_a_healthy_run_that_was_measured_passes(path):
    assert triple(path).judge().failures == ()


@pytest.mark.parametrize("path", TRIPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("sample", range(6))
def test_a_single_input_of_a_healthy_run_is_never_blamed_on_the_backend(path, sample):
    run, one = triple(path), slice(sample, sample + 1)
    single = replace(run, f=run.f[one], q=run.q[one], r=run.r[one], y=run.y[one])
    assert failed_tests(single.judge()) <= {"quantization"}  # of one input, weak calibration may have lost everything


@pytest.mark.parametrize("path", TRIPLES, ids=lambda path: path.stem)
def test_zeros_instead_of_a_measured_run_fail(path):
    run = triple(path)
    assert not run.with_y(np.zeros_like(run.y)).judge().ok


@pytest.mark.parametrize("path", TRIPLES, ids=lambda path: path.stem)
def test_a_measured_run_with_its_sign_changed_fails(path):
    run = triple(path)
    assert not run.with_y(-run.y).judge().ok


def test_a_channel_that_only_seems_to_vary_by_rounding_isnt_called_dead():
    healthy = quantized_outputs(bits=16)
    raised = [a.copy() for a in (healthy.f, healthy.q, healthy.r, healthy.y)]
    for a in raised:
        a[:, :, 2] = 4.0
    f, q, r, y = raised
    assert replace(healthy, f=f, q=q, r=r, y=y).judge().failures == ()


def test_an_output_that_hardly_varies_carries_a_warning():
    flat = np.full((6, 1, 40), 0.5, np.float32)
    assert any("hardly varies" in w for w in Outputs(flat, flat, flat, flat, 0.01).judge().warnings)


def test_a_poor_quantization_carries_a_warning():
    healthy = quantized_outputs()
    noise = 0.45 * np.random.default_rng(3).standard_normal(healthy.f.shape).astype(np.float32)
    verdict = replace(healthy, q=healthy.f + noise, r=healthy.f + noise, y=healthy.f + noise).judge()
    assert verdict.ok
    assert any("poor" in w for w in verdict.warnings)


def test_outputs_too_large_to_keep_whole_are_still_recognised_as_exchanged():
    healthy = quantized_outputs(shape=(1, 4, 160, 160))
    assert "samples" in failed_tests(healthy.with_y(np.roll(healthy.y, 1, axis=0)).judge())


def test_sparse_outputs_too_large_to_keep_whole_arent_called_exchanged():
    healthy = quantized_outputs(shape=(1, 100, 700))
    mask = np.arange(700) == 350
    f, q, r, y = (np.where(mask, a, a * np.float32(1e-3)) for a in (healthy.f, healthy.q, healthy.r, healthy.y))
    assert replace(healthy, f=f, q=q, r=r, y=y).judge().failures == ()


def test_an_output_of_zeros_without_an_encoding_is_judged_like_any_other() -> None:
    evidence = Evidence(step=None, has_float=False, has_check=False)
    evidence.add(np.zeros(256, np.float32), np.zeros(256, np.float32))
    assert apply_rule(evidence, precision="float16").failures == ()
