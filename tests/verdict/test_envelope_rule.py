"""The tests of the derived rule that know how far rounding carries the model: they see what poor quantisation would hide."""

from __future__ import annotations

import numpy as np
import pytest

from pytest_qnn.verdict.envelope_rule import Resolution, envelope_failures, resolution
from pytest_qnn.verdict.judge import OutputCase
from pytest_qnn.verdict.metrics import Evidence

RNG = np.random.default_rng(0)
STEP = 0.02
SHAPE = (1, 16, 20)
F = [RNG.normal(0, 1, SHAPE).astype(np.float32) for _ in range(8)]
Q = [(f + RNG.normal(0, 0.4, SHAPE)).astype(np.float32) for f in F]  # 8 dB: a poor quantisation


def noisy(scale: float, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.asarray(np.rint((q + rng.normal(0, scale, SHAPE)) / STEP) * STEP, np.float32) for q in Q]


ENVELOPE = noisy(0.03, 1)
HEALTHY = noisy(0.02, 2)


def case_of(y: list[np.ndarray], envelope: bool = True) -> OutputCase:
    case = OutputCase("y", Evidence(step=STEP, has_check=False), "float16")
    for q, result, f in zip(Q, y, F, strict=True):
        case.add(q, result, f, None)
    if envelope:
        for q, draw in zip(Q, ENVELOPE, strict=True):
            case.add_envelope(q, draw)
    return case


def failures(y: list[np.ndarray], envelope: bool = True) -> tuple[str, ...]:
    return case_of(y, envelope).judge().failures


def test_what_rounding_may_do_passes() -> None:
    assert failures(HEALTHY) == ()
    assert failures(ENVELOPE) == ()


@pytest.mark.parametrize(
    ("change", "test"),
    [
        (lambda y: 1.03 * y, "envelope gain"),
        (lambda y: y + 2 * STEP, "envelope bias"),
        (lambda y: y + np.random.default_rng(5).normal(0, 0.1, SHAPE), "envelope: "),
        (lambda y: np.where(np.arange(320).reshape(SHAPE) == 5, y + 0.7, y), "envelope tail"),
        (lambda y: np.where(np.arange(16)[:, None] == 5, 0.8 * y, y), "envelope channel"),
    ],
    ids=["gain 3%", "two steps", "noise", "one element", "one channel"],
)
def test_defects_far_below_the_quantisations_noise_are_seen(change: object, test: str) -> None:
    broken = [np.asarray(change(y), np.float32) for y in HEALTHY]  # type: ignore[operator]
    case = case_of(broken)
    assert case.envelope is not None
    assert any(text.startswith(test) for text in envelope_failures(case.evidence, case.envelope))
    assert failures(broken)
    if test != "envelope tail":  # a single element's is seen by the kurtosis, too
        assert failures(broken, envelope=False) == ()  # what the other tests make of it


def test_nothing_is_said_twice() -> None:
    """Where the other tests fail already, those of the envelope add nothing."""
    assert failures([3 * y for y in HEALTHY]) == failures([3 * y for y in HEALTHY], envelope=False)


def test_an_output_without_encoding_has_no_such_tests() -> None:
    evidence, envelope = Evidence(step=None, has_check=False), Evidence(step=None, has_float=False, has_check=False)
    evidence.add(Q[0], 3 * Q[0], F[0])
    envelope.add(Q[0], Q[0])
    assert envelope_failures(evidence, envelope) == []


def test_few_samples_are_granted_more() -> None:
    def ratio(samples: int) -> bool:
        evidence = Evidence(step=STEP, has_float=False, has_check=False)
        envelope = Evidence(step=STEP, has_float=False, has_check=False)
        for k in range(samples):
            evidence.add(Q[k], (Q[k] + np.float32(0.06) * np.sign(RNG.normal(size=SHAPE))).astype(np.float32))
            envelope.add(Q[k], ENVELOPE[k])
        return any(text.startswith("envelope: ") for text in envelope_failures(evidence, envelope))

    assert not ratio(1)
    assert ratio(8)


def test_more_samples_resolve_more_and_the_number_that_is_needed_is_told() -> None:
    def resolved(samples: int) -> Resolution:
        evidence = Evidence(step=STEP, has_float=False, has_check=False)
        envelope = Evidence(step=STEP, has_float=False, has_check=False)
        for k in range(samples):
            evidence.add(Q[k], HEALTHY[k])
            envelope.add(Q[k], ENVELOPE[k])
        return resolution(evidence, envelope)

    one, eight = resolved(1), resolved(8)
    assert one.gain is not None
    assert eight.gain is not None
    assert eight.gain < one.gain
    assert one.samples == eight.samples == 1  # this little noise lets one sample show 5%
    loud = [np.asarray(q + np.random.default_rng(k).normal(0, 0.5, SHAPE), np.float32) for k, q in enumerate(Q)]
    evidence = Evidence(step=STEP, has_float=False, has_check=False)
    envelope = Evidence(step=STEP, has_float=False, has_check=False)
    for k in range(2):
        evidence.add(Q[k], loud[k])
        envelope.add(Q[k], ENVELOPE[k])
    needed = resolution(evidence, envelope).samples
    assert needed is not None
    assert 4 < needed < 400


def test_no_number_of_samples_shows_what_the_envelope_itself_does() -> None:
    evidence = Evidence(step=STEP, has_float=False, has_check=False)
    envelope = Evidence(step=STEP, has_float=False, has_check=False)
    evidence.add(Q[0], HEALTHY[0])
    envelope.add(Q[0], np.asarray(1.1 * Q[0], np.float32))
    assert resolution(evidence, envelope).samples is None


def test_what_rounding_carries_a_model_to_is_no_failure_however_little_quantising_made() -> None:
    """16 bits: next to no noise of the quantisation, and all that of HTP's arithmetic."""
    step = 1e-4
    f = [np.asarray(x, np.float32) for x in F]
    q = [np.asarray(np.rint(x / step) * step, np.float32) for x in f]

    def finding(noise: float, drawn: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
        rng = np.random.default_rng(3)
        case = OutputCase("y", Evidence(step=step, has_check=False), "float16")
        for real, quantized in zip(f, q, strict=True):
            case.add(quantized, np.asarray(quantized + rng.normal(0, noise, SHAPE), np.float32), real, None)
            if drawn:
                case.add_envelope(quantized, np.asarray(quantized + rng.normal(0, drawn, SHAPE), np.float32))
        verdict = case.judge()
        return verdict.failures, verdict.warnings

    assert any(text.startswith("power") for text in finding(0.03, 0)[0])  # all that is known without it
    failures, warnings = finding(0.03, 0.04)
    assert failures == ()
    assert any("more than its quantisation costs" in text for text in warnings)
    assert any(text.startswith("power") for text in finding(0.2, 0.04)[0])
