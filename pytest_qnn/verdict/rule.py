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

from pytest_qnn.verdict.envelope_rule import envelope_failures
from pytest_qnn.verdict.metrics import Evidence, decibels

TINY = 1e-300
RESOLVED = 1e-4  # variance over mean square of a channel that float32 sums still tell from rounding


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
    dead: float = 0.01  # variance of a channel over the reference's, below which it is constant
    saturated: int = 4  # elements at an end of the range
    swap: float = 4.0  # how much nearer (squared) another row's reference must be
    own: float = 4.0  # the reference's own |h|^2 over the quantisation's noise, above which it can't decide
    ruined_db: float = 3.0  # SQNR of the quantisation below which it leaves nothing to compare
    ruined_few_db: float = 0.0  # the same with fewer than ``few_elements``, which get below 3 dB by bad luck
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


@dataclass(frozen=True)
class _Scales:
    """What an output's figures are measured in.

    Attributes:
        step: one quantisation step; 0 where the output isn't quantised.
        relative: rms rounding of unquantised arithmetic, relative to f; 0 for a quantised output.
        grain: rms rounding granted to every element.
        prior: noise power of the pseudo elements, in all.
        noise: |g|^2.
        allowed: the noise power that quantising, the reference's own uncertainty and rounding explain.
        few: whether there is too little to estimate spreads from.
        spread: how much a power that was estimated from n numbers varies.
        f2: |f|^2.
    """

    step: float
    relative: float
    grain: float
    prior: float
    noise: float
    allowed: float
    few: bool
    spread: float
    f2: float


def _scales(evidence: Evidence, c: Constants, precision: str, bounded: bool) -> _Scales:
    s, n = evidence.sums, evidence.sums.n
    f2 = s.f2 if evidence.has_float else s.q2
    if evidence.step is not None:
        relative, grain = 0.0, c.rounding_steps * evidence.step
        prior = c.prior_count * c.prior_power * s.q2 / n
    else:
        relative = c.float16 if precision == "float16" else c.float32
        absolute = c.float16_grain if precision == "float16" and bounded else 0.0
        grain, prior = math.sqrt(relative**2 * f2 / n + absolute**2), 0.0
    return _Scales(
        step=evidence.step or 0.0,
        relative=relative,
        grain=grain,
        prior=prior,
        noise=s.g2,
        allowed=s.g2 + 2 * s.h2 + n * grain**2 + prior + TINY,
        few=evidence.samples < c.few_samples or n < c.few_elements,
        spread=1 + 2 / n,
        f2=f2,
    )


def apply_rule(
    evidence: Evidence,
    *,
    precision: str,
    bounded: bool = False,
    envelope: Evidence | None = None,
    constants: Constants = DEFAULT,
) -> Finding:
    """Judge one output by the derived rule.

    Args:
        evidence: all samples of the output. Without a float reference (``has_float`` False) q itself is taken for f.
        precision: what unquantised arithmetic is computed in: "float16" or "float32".
        bounded: whether the output comes from a sigmoid, softmax or tanh.
        envelope: what legitimate rounding makes of q, over the same samples; None: not computed.
    """
    c = constants
    if not evidence.sums.n:
        return Finding(("nothing: there is no finite element to judge",), (), "reference")
    x = _scales(evidence, c, precision, bounded)
    found = [test(evidence, x, c) for test in TESTS]
    failures = [failure for failure in found if failure] + _channel_failures(evidence, x, c)
    noted: tuple[str, ...] = ()
    if envelope is not None and evidence.step:
        failures, noted = _with_envelope(failures, envelope_failures(evidence, envelope))
    ruined = _ruined(evidence, c)
    if ruined:
        failures.append(
            f"quantization: its SQNR against float is {decibels(x.f2, x.noise):.1f} dB (limit {_ruined_db(evidence, c):g} dB): "
            "it leaves nothing to compare. If this output is next to zero on these inputs, use some that make it vary"
        )
    undecidable = _reference_failures(evidence, x, c)
    blame = "none"
    if failures or undecidable:
        blame = "reference" if undecidable else attribute(evidence)
    return Finding((*undecidable, *failures), (*_warnings(evidence, x, c, ruined), *noted), blame)


YIELDING = ("power:", "loss:", "gain:", "bias:", "tail:", "channel:")  # tests that guess what the envelope knows


def _with_envelope(failures: list[str], by_envelope: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """What is left of the failures where it is known how far rounding carries the model, and a warning.

    A backend that stays within that is healthy, however little noise quantising made: with 16 bits that may be next to none, and HTP's own
    arithmetic is what counts.
    """
    if by_envelope:
        said = any(failure.startswith(YIELDING) for failure in failures)
        return (failures if said else [*failures, *by_envelope]), ()  # those of the envelope would say the same again
    excused = [failure for failure in failures if failure.startswith(YIELDING)]
    kept = [failure for failure in failures if failure not in excused]
    loss = next((failure for failure in excused if failure.startswith("loss:")), None)
    if loss is None:
        return kept, ()
    text = loss.partition(" (")[0].removeprefix("loss: ")
    return kept, (
        f"{text}: more than its quantisation costs, but within what the backend's arithmetic carries this model to",
    )


def _power(evidence: Evidence, x: _Scales, c: Constants) -> str | None:
    power, limit = evidence.sums.e2 / x.allowed, c.power * x.spread
    if power <= limit:
        return None
    return f"power: the backend's own noise |y-q|^2 is {power:.3g} times what quantising allows (limit {limit:.3g})"


def _loss(evidence: Evidence, x: _Scales, c: Constants) -> str | None:
    s = evidence.sums
    loss = ((s.yf2 if evidence.has_float else s.e2) + s.n * x.grain**2) / x.allowed
    limit = c.loss * x.spread
    if loss <= limit:
        return None
    return f"loss: the noise against float |y-f|^2 is {loss:.3g} times what quantising allows (limit {limit:.3g})"


def _likeness(evidence: Evidence, x: _Scales, c: Constants) -> str | None:
    s = evidence.sums
    slack = c.prior_count * s.q2 / s.n + x.noise if x.few else c.likeness_count * s.variance
    likeness = s.e2 / (s.n * s.variance + 4 * s.n * x.grain**2 + slack + TINY)
    if likeness <= c.likeness or not _informative(evidence, c):
        return None
    return f"likeness: |y-q|^2 is {likeness:.3g} of the reference's own variation (limit {c.likeness:g})"


def _gain(evidence: Evidence, x: _Scales, c: Constants) -> str | None:
    """Slope of y on q through the origin, with White's (1980) heteroscedasticity-robust standard error."""
    s = evidence.sums
    carriers = s.q2 * (s.q2 / (s.q4 + TINY))
    slope = s.eq / (s.q2 + TINY)
    residual = max(s.q2e2 - 2 * slope * s.q3e + slope**2 * s.q4, 0.0)  # sum of q^2 (e - slope q)^2
    limit = c.gain + c.sigmas * math.sqrt(residual) / (s.q2 + TINY)
    if x.few and evidence.has_float:
        limit += 2 * abs(s.gf / (x.f2 + TINY))
    share = slope**2 * s.q2 / (s.e2 + 0.5 * s.n * x.grain**2 + TINY)
    if abs(slope) <= limit or share <= c.gain_share or carriers < c.gain_count:
        return None
    return f"gain: the slope of y on q is {1 + slope:.4f} (limit 1 +- {limit:.4f})"


def _bias(evidence: Evidence, x: _Scales, c: Constants) -> str | None:
    s = evidence.sums
    limit = c.bias_steps * x.step if x.step else x.grain / 2
    limit += (c.bias_noise_few if x.few else c.bias_noise) * math.sqrt(x.noise / s.n)
    limit += (c.sigmas if x.few else c.sigmas_bias) * math.sqrt(s.e2) / s.n
    limit += abs(s.g1) / s.n if x.few else 0.0
    if abs(evidence.bias) <= limit:
        return None
    return f"bias: the mean of y-q is {_steps(evidence.bias, x.step)} (limit {_steps(limit, x.step)})"


def _tail(evidence: Evidence, x: _Scales, c: Constants) -> str | None:
    s = evidence.sums
    unit = s.max_g + s.max_h + 2 * x.grain + math.sqrt(c.prior_power * s.q2 / s.n * min(1.0, c.prior_count / s.n))
    unit += 1.25 * x.relative * (s.max_f if evidence.has_float else s.max_q)
    tail, limit = s.far / (unit + TINY), c.tail * math.sqrt(x.spread)
    if tail <= limit:
        return None
    return f"tail: one element is {tail:.3g} times as far off as quantising puts any (limit {limit:.3g})"


def _spikes(evidence: Evidence, x: _Scales, c: Constants) -> str | None:
    s = evidence.sums
    if not x.step or s.n < c.spikes_count:
        return None
    kurtosis_e = s.n * s.e4 / (s.e2 + s.n * x.grain**2 + TINY) ** 2
    kurtosis_g = s.n * s.g4 / (x.noise + s.n * x.grain**2 + TINY) ** 2
    spikes = kurtosis_e / max(kurtosis_g, 3.0)
    if spikes <= c.spikes:
        return None
    return (
        f"spikes: a few elements stand out: the kurtosis of y-q is {spikes:.3g} times that of q-f (limit {c.spikes:g})"
    )


def _saturation(evidence: Evidence, x: _Scales, c: Constants) -> str | None:
    count = max(end.saturated(2 * max(x.step, x.grain)) for end in evidence.ends)
    if count < c.saturated:
        return None
    return f"saturation: {count} elements at the end of the range all have one value, in the reference not"


def _samples(evidence: Evidence, x: _Scales, c: Constants) -> str | None:
    """Rows that look like another row's reference: all pairs' distances from one Gram matrix."""
    rows = evidence.rows
    count = len(rows.q)
    if count < 2 or len({row.size for row in rows.q}) != 1:
        return None
    q, y = (np.stack(kept).astype(np.float64) for kept in (rows.q, rows.y))
    if not 0.5 < float((q * q).sum()) / (rows.share * evidence.sums.q2 + TINY) < 2 and rows.share < 1:
        return None  # a sparse output, of which the thinned rows say nothing
    distance = np.maximum((y * y).sum(1)[:, None] + (q * q).sum(1)[None, :] - 2 * y @ q.T, 0.0)
    own = np.diag(distance).copy()
    np.fill_diagonal(distance, np.inf)
    swapped = int((own > c.swap * (distance.min(1) + x.allowed * rows.share / count)).sum())
    # rows of a few numbers come near to another row's by chance: the more rows, the oftener
    if swapped <= (0 if q.shape[1] >= 8 else max(1, count // 10)):
        return None
    return (
        f"samples: {swapped} of {count} outputs match another input's reference better than their own: stale or "
        "exchanged results"
    )


TESTS = (_power, _loss, _likeness, _gain, _bias, _tail, _spikes, _saturation, _samples)


def _channel_failures(evidence: Evidence, x: _Scales, c: Constants) -> list[str]:
    failures, worst, where = [], 0.0, ""
    for sums in evidence.channels.values():
        m = sums.elements
        noise = sums.g2 + 2 * sums.h2 + x.relative**2 * (sums.f2 if evidence.has_float else sums.q2)
        ratio = sums.e2 / (noise + noise.max() + m * x.grain**2 + x.prior + TINY)
        if float(ratio.max()) > worst:
            worst, where = float(ratio.max()), f"channel {int(ratio.argmax())} of axis {sums.axis}"
        varies, varies_y = sums.q2 - sums.q1**2 / m, sums.y2 - sums.y1**2 / m
        resolved = varies > RESOLVED * sums.q2
        dead = resolved & (varies_y <= c.dead * varies) & (varies > noise + 16 * m * x.grain**2) & (m > 3)
        if dead.any():
            failures.append(
                f"dead: {int(dead.sum())} of {dead.size} channels on axis {sums.axis} are constant, in the reference they "
                f"vary; the first is {int(np.argmax(dead))}"
            )
    if worst > c.channel:
        failures.append(f"channel: |y-q|^2 of {where} is {worst:.3g} times its noise (limit {c.channel:g})")
    return failures


def _reference_failures(evidence: Evidence, x: _Scales, c: Constants) -> list[str]:
    """Why the references can't decide, if they can't."""
    bad, failures = evidence.non_finite, []
    if bad.float_mismatched:
        failures.append(
            f"reference: {bad.float_mismatched} elements are finite in only one of the float and the QDQ reference"
        )
    if bad.check_mismatched:
        failures.append(
            f"reference: {bad.check_mismatched} elements are finite at only one of the reference's optimisation levels"
        )
    own, limit = evidence.sums.h2 / (x.allowed - 2 * evidence.sums.h2), c.own * x.spread
    if own > limit:
        failures.append(
            f"reference: between its optimisation levels it moves by {own:.3g} times what quantising allows (limit "
            f"{limit:.3g}): it can't decide"
        )
    return failures


def _warnings(evidence: Evidence, x: _Scales, c: Constants, ruined: bool) -> tuple[str, ...]:
    s, warnings = evidence.sums, []
    sqnr = decibels(x.f2, x.noise)
    if evidence.has_float and not ruined and sqnr < c.poor_db:
        warning = f"the quantisation is poor: its SQNR against float is {sqnr:.1f} dB"
        if sqnr < c.ruined_db and s.n < c.few_elements:
            warning += f"; {s.n} numbers may get there by bad luck, but a pass proves little: give more inputs"
        warnings.append(warning)
    if not _informative(evidence, c):
        warnings.append("the reference hardly varies, so this output proves little: use inputs that make it vary")
    if evidence.has_float and s.h2 > 0.25 * s.e2 and s.h2 > 0.5 * x.noise and s.h2 > 0:
        warnings.append("the reference moves with its optimisation level as much as with the quantisation")
    return tuple(warnings)


def _informative(evidence: Evidence, c: Constants) -> bool:
    variance = evidence.sums.variance
    return variance > 0 and math.sqrt(variance) >= c.informative_steps * (evidence.step or 0.0)


def _ruined(evidence: Evidence, c: Constants) -> bool:
    """Whether q has lost f; without an encoding there is no quantisation to blame."""
    s, floor = evidence.sums, 0.0
    if s.n < c.few_elements:  # a few small numbers may all be rounded to zero without any harm
        floor = s.n * (c.rounding_steps * (evidence.step or 0.0)) ** 2
    return evidence.has_float and decibels(s.f2, s.g2) < _ruined_db(evidence, c) and s.g2 > floor


def _ruined_db(evidence: Evidence, c: Constants) -> float:
    return c.ruined_few_db if evidence.sums.n < c.few_elements else c.ruined_db


def attribute(evidence: Evidence, *, against_float: bool = True) -> str:
    """Whose fault a failure is, from where the noise arises.

    In this order: "backend" where it isn't finite although q is, "reference" where q itself isn't finite and the backend
    differs; "quantization" where q has lost f already (only asked for a limit against float);
    "reference" where the reference differs from itself (at another optimisation level) as much as from the backend;
    "graph-edge quantizer" where every element is within a step and a half, or all are off by the same one or two steps; else
    "backend".
    """
    s, step, bad = evidence.sums, evidence.step, evidence.non_finite
    if bad.mismatched:
        return "reference" if bad.by_reference == bad.mismatched else "backend"
    if against_float and _ruined(evidence, DEFAULT):
        return "quantization"
    if s.h2 > 0.5 * s.e2 and s.h2 > 0:
        return "reference"
    if step and s.n:
        bias = abs(evidence.bias)
        centered = max(s.e2 / s.n - bias**2, 0.0)
        if s.max_e < 1.5 * step or (0.7 * step < bias < 2.3 * step and centered < (0.6 * step) ** 2):
            return "graph-edge quantizer"
    return "backend"


def _steps(value: float, step: float) -> str:
    return f"{value / step:+.3g} steps" if step else f"{value:+.3g}"
