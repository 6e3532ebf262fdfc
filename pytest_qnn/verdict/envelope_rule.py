"""The part of the derived rule that knows how far legitimate rounding carries this very model.

Where the quantisation is poor, a limit that grows with its noise sleeps: the backend may follow the QDQ reference closely, and a gain of 5%
or an offset is plain to see, yet far below what quantising has cost. The *rounding envelope* gives a limit that doesn't depend on
the quantisation: b is the QDQ reference run with noise of the backend's own size before every quantiser, and d = b - q is measured as
e = y - q is (notation of :mod:`pytest_qnn.verdict.metrics`). Constants: documentation, "How a verdict is reached".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pytest_qnn.verdict.metrics import Evidence

TINY = 1e-300


@dataclass(frozen=True)
class EnvelopeConstants:
    """Constants of these tests; N is the number of samples."""

    rounding_steps: float = 0.6  # rms rounding granted to every element, in steps
    prior_count: float = 8.0  # pseudo elements of prior noise, at -17 dB, so that a few elements don't cry wolf
    prior_power: float = 0.02
    power: float = 2.0  # |e|^2 over |d|^2 and grain, times 1 + few / N; healthy maxima: documentation
    power_few: float = 4.0
    gain: float = 0.01
    gain_envelope: float = 2.0  # times the slope that the envelope has
    gain_share: float = 0.1  # part of |e|^2 that the gain must explain
    gain_count: float = 8.0  # elements that must carry the signal
    sigmas: float = 6.0
    bias_steps: float = 0.35
    bias_wide: float = 2.5  # the same for 16 bits, where HTP's sums are off by up to 2 steps throughout
    wide: float = 300.0  # steps that only 16 bits reach
    bias_noise: float = 0.15  # in rms of d
    sigmas_bias: float = 4.0
    tail: float = 3.0  # largest |e| over largest |d|
    channel: float = 4.0  # |e|^2 of a channel over the envelope's there and in the noisiest one
    few: float = 1.0  # the other limits grow by 1 + few / N


DEFAULT = EnvelopeConstants()


@dataclass(frozen=True)
class _Case:
    e: Evidence
    d: Evidence
    c: EnvelopeConstants

    @property
    def step(self) -> float:
        return self.e.step or 0.0

    @property
    def floor(self) -> float:
        """Power that is granted to each element: rounding, and prior noise."""
        s = self.e.sums
        return (self.c.rounding_steps * self.step) ** 2 + self.c.prior_count * self.c.prior_power * s.q2 / s.n**2

    @property
    def few(self) -> float:
        return 1 + self.c.few / max(self.e.samples, 1)

    @property
    def spread(self) -> float:
        """Mean power of d."""
        return self.d.sums.e2 / max(self.d.sums.n, 1)


def envelope_failures(evidence: Evidence, envelope: Evidence, constants: EnvelopeConstants = DEFAULT) -> list[str]:
    """A line for each test that fails; none for an output without an encoding.

    Args:
        evidence: of the backend's output.
        envelope: the same sums over draws of the envelope in the backend's place, for the same samples.
    """
    if not evidence.step or not evidence.sums.n or not envelope.sums.n:
        return []
    case = _Case(evidence, envelope, constants)
    return [text for test in (_power, _gain, _bias, _tail, _channel) if (text := test(case))]


@dataclass(frozen=True)
class Resolution:
    """How finely the samples at hand resolve.

    Attributes:
        gain: the smallest error of the gain that would be red; 0.05 is 5%. None where the signal is carried by too few elements.
        samples: about how many samples like these it takes until a gain of 5% is red; None if no number of them does.
    """

    gain: float | None
    samples: int | None


WANTED_GAIN = 0.05
MOST_SAMPLES = 1_000_000


def resolution(evidence: Evidence, envelope: Evidence, constants: EnvelopeConstants = DEFAULT) -> Resolution:
    """What a run's samples can show, and how many would show a gain of 5%: standard errors fall with the root of their number."""
    x = _Case(evidence, envelope, constants)
    have, error = max(evidence.samples, 1), _standard_error(evidence)
    carried = _carriers(evidence) / have
    enough = _carriers(evidence) >= constants.gain_count
    now = _gain_limit(x, have, error) if enough else None
    samples = 1
    while samples <= MOST_SAMPLES:
        resolved = _gain_limit(x, samples, error * math.sqrt(have / samples)) <= WANTED_GAIN
        if resolved and samples * carried >= constants.gain_count:
            return Resolution(now, samples)
        samples = max(samples + 1, math.ceil(1.1 * samples))
    return Resolution(now, None)


def _power(x: _Case) -> str | None:
    ratio = x.e.sums.e2 / x.e.sums.n / (x.spread + x.floor)
    limit = x.c.power * (1 + x.c.power_few / max(x.e.samples, 1))
    if ratio <= limit:
        return None
    return f"envelope: the backend's own noise |y-q|^2 is {ratio:.3g} times what rounding carries this model to (limit {limit:.3g})"


def _slope(evidence: Evidence) -> float:
    return evidence.sums.eq / (evidence.sums.q2 + TINY)


def _standard_error(evidence: Evidence) -> float:
    """Of the slope of y on q through the origin: White's (1980) robust one, as in :mod:`pytest_qnn.verdict.rule`."""
    s, slope = evidence.sums, _slope(evidence)
    residual = max(s.q2e2 - 2 * slope * s.q3e + slope**2 * s.q4, 0.0)
    return math.sqrt(residual) / (s.q2 + TINY)


def _carriers(evidence: Evidence) -> float:
    """How many elements carry the signal."""
    s = evidence.sums
    return s.q2 * (s.q2 / (s.q4 + TINY))


def _gain_limit(x: _Case, samples: float, error: float) -> float:
    """What the slope may differ from 1 by, with so many samples and such a standard error."""
    return (x.c.gain + x.c.gain_envelope * abs(_slope(x.d))) * (1 + x.c.few / samples) + x.c.sigmas * error


def _gain(x: _Case) -> str | None:
    s = x.e.sums
    slope = _slope(x.e)
    limit = _gain_limit(x, max(x.e.samples, 1), _standard_error(x.e))
    share = slope**2 * s.q2 / (s.e2 + 0.5 * s.n * (x.c.rounding_steps * x.step) ** 2 + TINY)
    if abs(slope) <= limit or share <= x.c.gain_share or _carriers(x.e) < x.c.gain_count:
        return None
    return f"envelope gain: the slope of y on q is {1 + slope:.4f} (limit 1 +- {limit:.4f})"


def _bias(x: _Case) -> str | None:
    s = x.e.sums
    steps = x.c.bias_wide if s.max_q > x.c.wide * x.step else x.c.bias_steps
    limit = steps * x.step + x.few * (x.c.bias_noise * math.sqrt(x.spread) + abs(x.d.bias))
    limit += x.c.sigmas_bias * math.sqrt(s.e2) / s.n
    if abs(x.e.bias) <= limit:
        return None
    return f"envelope bias: the mean of y-q is {x.e.bias / x.step:.3g} steps (limit {limit / x.step:.3g})"


def _tail(x: _Case) -> str | None:
    s = x.e.sums
    prior = math.sqrt(x.c.prior_power * s.q2 / s.n * min(1.0, x.c.prior_count / s.n))
    ratio = s.far / (x.d.sums.max_e + 2 * x.c.rounding_steps * x.step + prior + TINY)
    limit = x.c.tail * x.few
    if ratio <= limit:
        return None
    return f"envelope tail: one element is {ratio:.3g} times as far off as rounding puts any (limit {limit:.3g})"


def _channel(x: _Case) -> str | None:
    worst, where = 0.0, ""
    for key, sums in x.e.channels.items():
        drawn = x.d.channels.get(key)
        if drawn is None or not drawn.elements:
            continue
        m = sums.elements
        spread = drawn.e2 / drawn.elements
        prior = x.c.prior_count * x.c.prior_power * x.e.sums.q2 / x.e.sums.n / m
        ratio = sums.e2 / m / (spread + spread.max() + (x.c.rounding_steps * x.step) ** 2 + prior + TINY)
        if float(ratio.max()) > worst:
            worst, where = float(np.max(ratio)), f"channel {int(ratio.argmax())} of axis {sums.axis}"
    limit = x.c.channel * (1 + x.c.power_few / max(x.e.samples, 1))
    return (
        f"envelope channel: |y-q|^2 of {where} is {worst:.3g} times its share (limit {limit:.3g})"
        if worst > limit
        else None
    )
