"""The derived default rule: is the backend's output within what legitimate rounding carries?

No single threshold separates healthy backends from broken ones on real nets: deep nets accumulate steps, so what a healthy
backend keeps is the *noise power*, not each element. The rule compares the backend's own noise e = y - q with the noise
g = q - f that quantising the model made, and adds tests for what hides in a mean: gain, bias, single elements, channels,
saturation, exchanged rows. Notation as in :mod:`pytest_qnn.verdict.metrics`; every constant's origin is in the
documentation ("How a verdict is reached").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pytest_qnn.verdict.metrics import Evidence, decibels

TINY = 1e-300


@dataclass(frozen=True)
class Constants:
    """Constants of the rule. Powers are ratios, counts are elements or samples, steps are steps of the output."""

    rounding_steps: float = 0.6  # rms rounding granted to every element of a quantised output
    float16: float = 0.04  # the same for float16, relative to rms f
    float32: float = 6e-4  # the same for float32
    float16_grain: float = 2.0**-9  # absolute grain of HTP's float16 sigmoid, softmax and tanh
    prior_count: float = 8.0  # pseudo elements of prior noise, so that a few elements don't cry wolf
    prior_power: float = 0.02  # power of one of them, relative to the mean power of q
    power: float = 3.0  # |e|^2 over the quantisation's noise; two independent draws of it give 2
    loss: float = 4.0  # |y - f|^2 over |q - f|^2: 6 dB
    likeness: float = 0.5  # |e|^2 over q's own variation: 3 dB
    likeness_count: float = 4.0
    few_samples: int = 4  # below it, or with few elements in all, limits are wider
    few_elements: int = 32
    gain: float = 0.03
    gain_share: float = 0.25  # part of |e|^2 that the gain must explain
    gain_count: float = 8.0  # elements that must carry the signal
    bias_steps: float = 0.35
    bias_noise: float = 0.15  # in rms of g
    bias_noise_few: float = 0.25
    sigmas: float = 6.0  # standard errors granted to the gain, and to the bias of few samples
    sigmas_bias: float = 4.0
    tail: float = 3.0  # largest min(|y - q|, |y - f|) over largest |g|
    spikes: float = 20.0  # kurtosis of e over that of g
    spikes_count: int = 100
    channel: float = 6.0  # |e|^2 of a channel over its own noise plus the noisiest channel's
    swap: float = 4.0  # how much nearer (squared) another row's reference must be
    ruined_db: float = 3.0  # SQNR of the quantisation below which it leaves nothing to compare
    poor_db: float = 10.0  # SQNR of the quantisation below which to warn
    informative_steps: float = 2.0  # standard deviation of q below which the output says nothing


DEFAULT = Constants()


@dataclass(frozen=True)
class Finding:
    """What the rule says of one output.

    Attributes:
        failures: a line for each test that failed: name, what was found, limit.
        warnings: what a reader should know although nothing failed.
        blame: "none", "quantization", "graph-edge quantizer", "backend" or "reference".
    """

    failures: tuple[str, ...]
    warnings: tuple[str, ...]
    blame: str


def apply_rule(evidence: Evidence, *, precision: str, bounded: bool = False, constants: Constants = DEFAULT) -> Finding:
    """Judge one output by the derived rule.

    Args:
        evidence: all samples of the output. Without a float reference (``has_float`` False) q itself is taken for f.
        precision: what unquantised arithmetic is computed in: "float16" or "float32".
        bounded: whether the output comes from a sigmoid, softmax or tanh.
    """
    c, s = constants, evidence.sums
    if not s.n:
        return Finding(("there is no finite element to judge",), (), "reference")
    n, step = s.n, evidence.step or 0.0
    quantized = evidence.step is not None
    f2 = s.f2 if evidence.has_float else s.q2
    max_f = s.max_f if evidence.has_float else math.sqrt(s.q2)
    noise, own, err, err_f = s.g2, s.h2, s.e2, s.yf2 if evidence.has_float else s.e2
    few = evidence.samples < c.few_samples or n < c.few_elements
    spread = 1 + 2 / n  # of a power that was estimated from n numbers
    variance = max(s.q2 / n - (s.q1 / n) ** 2, 0.0)
    relative, grain = 0.0, c.rounding_steps * step
    if not quantized:
        relative = c.float16 if precision == "float16" else c.float32
        absolute = c.float16_grain if precision == "float16" and bounded else 0.0
        grain = math.sqrt(relative**2 * f2 / n + absolute**2)
    prior = c.prior_count * c.prior_power * s.q2 / n if quantized else 0.0
    allowed = noise + 2 * own + n * grain**2 + prior + TINY
    failures: list[str] = []

    def test(failed: bool, text: str) -> None:
        if failed:
            failures.append(text)

    power, loss = err / allowed, (err_f + n * grain**2) / allowed
    test(
        power > c.power * spread,
        f"power: the backend's own noise |y-q|^2 is {power:.3g} times what quantising allows (limit {c.power * spread:.3g})",
    )
    test(
        loss > c.loss * spread,
        f"loss: the noise against float |y-f|^2 is {loss:.3g} times what quantising allows (limit {c.loss * spread:.3g})",
    )

    informative = math.sqrt(variance) >= c.informative_steps * step and variance > 0
    scale = c.prior_count * s.q2 / n + noise if few else c.likeness_count * variance
    likeness = err / (n * variance + 4 * n * grain**2 + scale + TINY)
    test(
        likeness > c.likeness and informative,
        f"likeness: |y-q|^2 is {likeness:.3g} of the reference's own variation (limit {c.likeness:g})",
    )

    # slope of y on q through the origin; White's (1980) heteroscedasticity-robust standard error, expanded into sums
    carriers = s.q2**2 / (s.q4 + TINY)
    slope = s.eq / (s.q2 + TINY)
    white = max(s.q2e2 - 2 * slope * s.q3e + slope**2 * s.q4, 0.0)
    own_gain = abs(s.gf / (f2 + TINY)) if evidence.has_float else 0.0
    gain_limit = c.gain + c.sigmas * math.sqrt(white) / (s.q2 + TINY) + (2 * own_gain if few else 0.0)
    share = slope**2 * s.q2 / (err + 0.5 * n * grain**2 + TINY)
    test(
        abs(slope) > gain_limit and share > c.gain_share and carriers >= c.gain_count,
        f"gain: the slope of y on q is {1 + slope:.4f} (limit 1 +- {gain_limit:.4f})",
    )

    bias = s.e1 / n
    bias_limit = c.bias_steps * step if quantized else grain / 2
    bias_limit += (c.bias_noise_few if few else c.bias_noise) * math.sqrt(noise / n)
    bias_limit += abs(s.g1) / n if few else 0.0
    bias_limit += (c.sigmas if few else c.sigmas_bias) * math.sqrt(err) / n
    test(
        abs(bias) > bias_limit,
        f"bias: the mean of y-q is {_steps(bias, step)} (limit {_steps(bias_limit, step)})",
    )

    unit = s.max_g + s.max_h + 2 * grain + math.sqrt(c.prior_power * s.q2 / n * min(1.0, c.prior_count / n))
    unit += 0.0 if quantized else 1.25 * relative * max_f
    tail, tail_limit = s.far / (unit + TINY), c.tail * math.sqrt(spread)
    test(
        tail > tail_limit,
        f"tail: one element is {tail:.3g} times as far off as quantising puts any (limit {tail_limit:.3g})",
    )

    kurtosis_e = n * s.e4 / (err + n * grain**2 + TINY) ** 2
    kurtosis_g = n * s.g4 / (noise + n * grain**2 + TINY) ** 2
    spikes = kurtosis_e / max(kurtosis_g, 3.0)
    test(
        quantized and n >= c.spikes_count and spikes > c.spikes,
        f"spikes: a few elements stand out: the kurtosis of y-q is {spikes:.3g} times that of q-f (limit {c.spikes:g})",
    )
    test(
        evidence.saturated > 0,
        f"saturation: {evidence.saturated} elements at the end of the range all have one value, in the reference not",
    )
    failures += _channel_failures(evidence, c, grain, relative, prior)
    failures += _row_failures(evidence, c, allowed)

    sqnr = decibels(f2, noise)
    ruined = evidence.has_float and sqnr < c.ruined_db and noise > n * grain**2
    test(
        ruined,
        f"quantization: its SQNR against float is {sqnr:.1f} dB (limit {c.ruined_db:g} dB): it leaves nothing to compare",
    )
    warnings: list[str] = []
    if evidence.has_float and not ruined and sqnr < c.poor_db:
        warnings.append(f"the quantisation is poor: its SQNR against float is {sqnr:.1f} dB")
    if not informative:
        warnings.append("the reference hardly varies, so this output proves little: use inputs that make it vary")
    if own > 0.25 * err and own > 0.5 * noise and own > 0:
        warnings.append("the reference moves with its optimisation level as much as with the quantisation")
    return Finding(tuple(failures), tuple(warnings), attribute(evidence, ruined) if failures else "none")


def attribute(evidence: Evidence, ruined: bool | None = None) -> str:
    """Whose fault a failure is, from where the noise arises.

    In this order: "quantization" where q has lost f already; "reference" where the reference differs from itself (at
    another optimisation level) as much as from the backend; "graph-edge quantizer" where every element is within a step
    and a half, or all are off by the same one or two steps; else "backend".
    """
    s, step = evidence.sums, evidence.step
    if ruined is None:
        floor = s.n * (DEFAULT.rounding_steps * (step or 0.0)) ** 2
        ruined = evidence.has_float and decibels(s.f2, s.g2) < DEFAULT.ruined_db and s.g2 > floor
    if evidence.non_finite.mismatched:
        return "backend"
    if ruined:
        return "quantization"
    if s.h2 > 0.5 * s.e2 and s.h2 > 0:
        return "reference"
    if step and s.n:
        bias = abs(s.e1) / s.n
        centred = max(s.e2 / s.n - bias**2, 0.0)
        if s.max_e < 1.5 * step or (0.7 * step < bias < 2.3 * step and centred < (0.6 * step) ** 2):
            return "graph-edge quantizer"
    return "backend"


def _channel_failures(evidence: Evidence, c: Constants, grain: float, relative: float, prior: float) -> list[str]:
    failures, worst, where = [], 0.0, ""
    for sums in evidence.channels:
        m = sums.elements
        noise = sums.g2 + 2 * sums.h2 + relative**2 * (sums.f2 if evidence.has_float else sums.q2)
        ratio = sums.e2 / (noise + noise.max() + m * grain**2 + prior + TINY)
        if float(ratio.max()) > worst:
            worst, where = float(ratio.max()), f"channel {int(ratio.argmax())} of axis {sums.axis}"
        varies = np.maximum(sums.q2 - sums.q1**2 / m, 0.0)
        varies_y = np.maximum(sums.y2 - sums.y1**2 / m, 0.0)
        dead = (varies_y <= 0.01 * varies) & (varies > noise + 16 * m * grain**2) & (m > 3)
        if dead.any():
            first = int(np.argmax(dead))
            failures.append(
                f"dead: {int(dead.sum())} of {dead.size} channels on axis {sums.axis} are constant, in the reference they "
                f"vary; the first is {first}"
            )
    if worst > c.channel:
        failures.append(f"channel: |y-q|^2 of {where} is {worst:.3g} times its noise (limit {c.channel:g})")
    return failures


def _row_failures(evidence: Evidence, c: Constants, allowed: float) -> list[str]:
    rows = len(evidence.rows_q)
    if rows < 2 or len({r.size for r in evidence.rows_q}) != 1:
        return []
    q = np.stack(evidence.rows_q).astype(np.float64)
    y = np.stack(evidence.rows_y).astype(np.float64)
    distance = np.maximum((y * y).sum(1)[:, None] + (q * q).sum(1)[None, :] - 2 * y @ q.T, 0.0)
    own = np.diag(distance).copy()
    np.fill_diagonal(distance, np.inf)
    swapped = int((own > c.swap * (distance.min(1) + allowed * evidence.row_share / rows)).sum())
    if swapped > (0 if q.shape[1] >= 8 else 1):
        return [
            f"samples: {swapped} of {rows} outputs match another input's reference better than their own: stale or "
            "exchanged results"
        ]
    return []


def _steps(value: float, step: float) -> str:
    return f"{value / step:+.3g} steps" if step else f"{value:+.3g}"
