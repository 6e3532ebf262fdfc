"""The rule for a layer that was computed alone, from exact inputs: its error is its own, in steps, and small if it is healthy.

Notation as in :mod:`pytest_qnn.verdict.metrics`, in steps of the layer's encoding: q the reference's integers less the zero point,
y the backend's, e = y - q, h = r - q. ``a`` is the layer's amplitude: how far legitimate rounding may put an element, in steps. Every
constant's origin is in the documentation ("Layer by layer").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pytest_qnn.verdict.metrics import Evidence

TINY = 1e-300
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerConstants:
    """Constants of the rule. Multiples of a, but for ``gain`` and ``sigmas``."""

    rms: float = 1.5  # healthy maximum 0.99 where a layer has 100 elements or more
    bias: float = 0.8  # healthy maximum 0.34, likewise
    gain: float = 0.01  # healthy maximum 0.009, likewise
    gain_worth: float = 0.12  # what the gain must move elements by, rms
    sigmas: float = 6.0  # standard errors granted to the gain
    gain_count: float = 30.0  # elements that must carry the signal
    channel: float = 3.0  # rms of a channel; healthy maximum 1.9
    peak: float = 4.0  # the largest |e|
    peak_spread: float = 64.0  # likewise: single elements are far off; healthy maximum 42
    again: float = 3.0  # in rms of what rounding weights once more costs a channel
    saturated: int = 4  # elements at an end of the range
    saturation: float = 4.0  # by how much the reference's must lie beyond all others
    grid: int = (
        16  # steps; results that are all a multiple of it apart were computed in fewer bits. Healthy: not even of 2
    )
    grid_count: int = 64  # elements that it takes to tell
    grid_share: float = 0.99
    few: float = 2.0  # limits grow by this over the root of the number of elements


DEFAULT = LayerConstants()


@dataclass
class LayerCase:
    """A layer while its samples come in.

    Attributes:
        tensor: the quantised tensor at its end.
        name, kind: the node that it is called after, and its operators.
        amplitude: the largest error that legitimate rounding makes, in steps.
        spread: whether single elements may be far off: sums of products and exponentials.
        relative: error of the operator that grows with the value: of Softmax on HTP 0.02, else 0.
        bits: of its encoding.
        axis: along which ``again`` has a number for each channel: 1 or the last, -1.
        again: rms error, in steps, that follows from the sizes of this layer's weights and inputs: one number, or one for each channel;
            None where there is no such error.
    """

    tensor: str
    name: str
    kind: str
    amplitude: float
    spread: bool
    bits: int
    relative: float = 0.0
    axis: int = 1
    again: npt.NDArray[np.float64] | None = None
    evidence: Evidence = field(default_factory=lambda: Evidence(step=1.0, has_float=False))
    grids: tuple[F64, F64] = field(
        default_factory=lambda: (np.zeros(DEFAULT.grid), np.zeros(DEFAULT.grid))
    )  # of q and y

    def add(self, q: Any, y: Any, r: Any, zero_point: int) -> None:
        """Add one sample: integer arrays of one shape."""
        if self.bits > 8:
            for counts, values in zip(self.grids, (q, y), strict=True):
                inside = values[(values != zero_point) & (values > values.min()) & (values < values.max())]
                counts += np.bincount(inside % DEFAULT.grid, minlength=DEFAULT.grid)
        q, y, r = (np.asarray(a.astype(np.int32) - zero_point, np.float32) for a in (q, y, r))
        self.evidence.add(q, y, None, r)

    def grant(self, again: npt.NDArray[np.float64]) -> None:
        """Add what rounding once more costs each channel with a sample's inputs: rms, in steps; the largest counts."""
        self.again = again if self.again is None else np.maximum(self.again, again)

    def judge(self, constants: LayerConstants = DEFAULT) -> LayerFinding:
        """The verdict on this layer."""
        s = self.evidence.sums
        n = max(s.n, 1)
        rms, peak = math.sqrt(s.e2 / n), s.max_e
        failures = [text for text in _tests(self, constants) if text]
        return LayerFinding(
            tensor=self.tensor,
            name=self.name,
            kind=self.kind,
            bits=self.bits,
            failures=tuple(failures),
            rms_steps=rms,
            max_steps=peak,
            mean_steps=self.evidence.bias,
            gain=self.evidence.gain,
            excess=rms / (_limit(constants.rms, self, n, constants) + _again(self, constants)),
        )


@dataclass(frozen=True)
class LayerFinding:
    """What the rule says of one layer.

    Attributes:
        failures: a line for each test that failed.
        rms_steps, max_steps, mean_steps: of y - q, in steps of the layer's encoding.
        gain: slope of y on q through the zero point.
        excess: rms over its limit; what layers are ranked by.
    """

    tensor: str
    name: str
    kind: str
    bits: int
    failures: tuple[str, ...]
    rms_steps: float
    max_steps: float
    mean_steps: float
    gain: float
    excess: float

    @property
    def ok(self) -> bool:
        """Whether it passes."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "tensor": self.tensor,
            "name": self.name,
            "operators": self.kind,
            "bits": self.bits,
            "ok": self.ok,
            "failures": list(self.failures),
            "rms_steps": self.rms_steps,
            "max_steps": self.max_steps,
            "mean_steps": self.mean_steps,
            "gain": self.gain,
        }


def _limit(factor: float, case: LayerCase, n: int, c: LayerConstants) -> float:
    """``factor`` amplitudes, more where there are few elements, and what the reference itself is unsure of."""
    s = case.evidence.sums
    own, signal = (math.sqrt(total / max(s.n, 1)) for total in (s.h2, s.q2))
    return factor * (max(case.amplitude, 0.5) + case.relative * signal) * (1 + c.few / math.sqrt(n)) + 2 * own


def _again(case: LayerCase, c: LayerConstants) -> float:
    """What rounding once more costs the layer as a whole: rms, in steps."""
    return 0.0 if case.again is None else c.again * math.sqrt(float(np.square(case.again).mean()))


def _tests(case: LayerCase, c: LayerConstants) -> list[str | None]:
    evidence, s = case.evidence, case.evidence.sums
    n = s.n
    if not n:
        return ["nothing: there is no finite element to judge"]
    if not s.e2:
        return []
    return [
        _over("rms", math.sqrt(s.e2 / n), _limit(c.rms, case, n, c) + _again(case, c)),
        _over("mean", abs(evidence.bias), _limit(c.bias, case, n, c) + _again(case, c)),
        _over("largest error", s.max_e, _peak(case, c) + s.max_h),
        _gain(case, c),
        _channel(case, c),
        _saturation(case, c),
        _grid(case, c),
    ]


def _peak(case: LayerCase, c: LayerConstants) -> float:
    again = 0.0 if case.again is None else 2 * c.again * float(case.again.max())
    own = 2 * case.relative * case.evidence.sums.max_q
    return (c.peak_spread if case.spread else c.peak) * max(case.amplitude, 0.5) + own + again


def _over(name: str, value: float, limit: float) -> str | None:
    return f"{name}: {value:.3g} steps (limit {limit:.3g})" if value > limit else None


def _gain(case: LayerCase, c: LayerConstants) -> str | None:
    """Slope of the regression of y on q; the ordinary standard error, for errors of layers alone don't grow with q."""
    s = case.evidence.sums
    varies = s.spread
    slope = (s.eq - s.e1 * s.q1 / s.n) / (varies + TINY)
    residual = max(s.e2 - s.e1**2 / s.n - slope**2 * varies, 0.0)
    limit = c.gain + case.relative + c.sigmas * math.sqrt(residual / s.n / (varies + TINY))
    carriers = s.q2 * (s.q2 / (s.q4 + TINY))
    moved = abs(slope) * math.sqrt(varies / s.n)
    if carriers < c.gain_count or abs(slope) <= limit or moved <= c.gain_worth * max(case.amplitude, 0.5):
        return None
    return f"gain: the slope is {1 + slope:.4f} (limit 1 +- {limit:.4f})"


def _saturation(case: LayerCase, c: LayerConstants) -> str | None:
    beyond = c.saturation * max(case.amplitude, 0.5) + case.relative * case.evidence.sums.max_q
    count = max(end.saturated(beyond) for end in case.evidence.ends)
    if count < c.saturated:
        return None
    return f"saturation: {count} elements at the end of the range all have one value, in the reference not"


def _grid(case: LayerCase, c: LayerConstants) -> str | None:
    """Whether all results lie on a coarse grid, and the reference's don't: fewer bits than the encoding has."""
    q, y = (float(counts.max()) / max(float(counts.sum()), 1.0) for counts in case.grids)
    if min(counts.sum() for counts in case.grids) < c.grid_count or y < c.grid_share or q > 0.5:
        return None
    return (
        f"bits: all results lie on a grid of {c.grid} steps or more: they were computed in fewer than {case.bits} bits"
    )


def _channel(case: LayerCase, c: LayerConstants) -> str | None:
    worst, text = 1.0, None
    last = max((sums.axis for sums in case.evidence.channels.values()), default=1)
    for sums in case.evidence.channels.values():
        m = max(sums.elements, 1)
        own = case.relative * case.evidence.sums.max_q  # one channel may have all that is large
        limits = np.full(sums.count, _limit(c.channel, case, m, c) + own)
        along = sums.axis == (case.axis if case.axis > 0 else last)
        if case.again is not None and case.again.size in (1, sums.count) and (along or case.again.size == 1):
            limits = limits + c.again * case.again
        else:
            limits = limits + 2 * _again(case, c)
        ratio = sums.e2 / (m * limits**2 + 4 * sums.h2)
        if float(ratio.max()) > worst:
            worst, at = float(ratio.max()), int(ratio.argmax())
            rms = math.sqrt(float(sums.e2[at]) / m)
            text = f"channel {at} of axis {sums.axis}: rms {rms:.3g} steps (limit {limits[at]:.3g})"
    return text


@dataclass(frozen=True)
class LayersVerdict:
    """All layers of a model, judged alone.

    Attributes:
        layers: in the graph's order.
        samples: how many inputs there were.
        elsewhere: names of layers that onnxruntime's CPU provider computed once the model was cut: they aren't judged.
    """

    layers: tuple[LayerFinding, ...]
    samples: int
    elsewhere: tuple[str, ...] = ()

    def __repr__(self) -> str:
        found = (
            f"{len(self.failed)} of {len(self.layers)} layers fail"
            if self.failed
            else f"all {len(self.layers)} layers pass"
        )
        return f"<LayersVerdict over {self.samples} samples: {found}>"

    @property
    def ok(self) -> bool:
        """Whether there are layers and every one passes."""
        return bool(self.layers) and not self.failed

    @property
    def failed(self) -> tuple[LayerFinding, ...]:
        """The layers that don't pass, in the graph's order: the first is where it starts."""
        return tuple(layer for layer in self.layers if not layer.ok)
