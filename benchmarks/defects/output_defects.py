"""Defects put into outputs: each takes a healthy run's results and gives what a broken backend would have returned."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from benchmarks.defects.runs import Outcome

Array = npt.NDArray[np.float32]
Defect = Callable[[Outcome, np.random.Generator], "Array | None"]


def _on_grid(outcome: Outcome, y: Array) -> Array:
    """``y`` as the output's encoding can write it."""
    encoding = outcome.encoding
    return y if encoding is None else np.asarray(encoding.dequantize(encoding.quantize(y)), np.float32)


def _gain(factor: float) -> Defect:
    return lambda o, rng: _on_grid(o, o.y * np.float32(factor))


def _offset(o: Outcome, rng: np.random.Generator) -> Array | None:
    return None if o.step is None else _on_grid(o, o.y + np.float32(o.step))


def _constant(o: Outcome, rng: np.random.Generator) -> Array:
    return np.full_like(o.y, o.y.reshape(-1)[0])


def _channel_axis(o: Outcome) -> int | None:
    """The axis of channels, behind those of samples and batch: of NCHW the first, else the last."""
    shape = o.y.shape
    axis = 2 if len(shape) == 5 else len(shape) - 1
    return axis if axis >= 2 and shape[axis] > 1 else None


def _permuted(o: Outcome, rng: np.random.Generator) -> Array | None:
    axis = _channel_axis(o)
    return None if axis is None else np.roll(o.y, 1, axis)


def _layout(o: Outcome, rng: np.random.Generator) -> Array | None:
    """NHWC values read as NCHW; of [rows, columns] the transposed."""
    shape = o.y.shape[2:]
    if len(shape) == 3 and shape[0] > 1:
        return np.moveaxis(o.y, 2, -1).reshape(o.y.shape)
    if len(shape) == 3 and min(shape[1:]) > 1:  # one channel: height and width exchanged
        return np.swapaxes(o.y, -1, -2).reshape(o.y.shape)
    if len(shape) == 2 and min(shape) > 1:
        return np.swapaxes(o.y, -1, -2).reshape(o.y.shape)
    return None


def _rows(o: Outcome, rng: np.random.Generator) -> Array:
    """Results of two inputs of a batch exchanged, pair by pair."""
    order = np.arange(len(o.y))
    even = len(order) // 2 * 2
    order[:even] = order[:even].reshape(-1, 2)[:, ::-1].reshape(-1)
    return o.y[order]


def _stale(o: Outcome, rng: np.random.Generator) -> Array:
    """Each result is the one of the input before; the first is right."""
    return np.concatenate([o.y[:1], o.y[:-1]])


def _dead_channel(o: Outcome, rng: np.random.Generator) -> Array | None:
    axis = _channel_axis(o)
    if axis is None:
        return None
    y = np.moveaxis(o.y.copy(), axis, 0)
    y[int(rng.integers(len(y)))] = 0
    return np.moveaxis(y, 0, axis)


def _random(share: float) -> Defect:
    def inject(o: Outcome, rng: np.random.Generator) -> Array | None:
        count = round(share * o.y.size)
        if count < 1:
            return None
        y = o.y.copy().reshape(-1)
        at = rng.choice(y.size, count, replace=False)
        y[at] = rng.choice(o.y.reshape(-1), count)  # values of the output's own distribution
        return y.reshape(o.y.shape)

    return inject


def _saturated(o: Outcome, rng: np.random.Generator) -> Array:
    """Cut off at 90% of the range that the results reach."""
    low, high = min(float(o.y.min()), 0.0), float(o.y.max())
    return np.clip(o.y, np.float32(0.9 * low), np.float32(0.9 * high))


def _non_finite(value: float) -> Defect:
    def inject(o: Outcome, rng: np.random.Generator) -> Array:
        y = o.y.copy()
        y.reshape(-1)[int(rng.integers(y.size))] = value
        return y

    return inject


def _reinterpreted(o: Outcome, rng: np.random.Generator) -> Array | None:
    """The output's integers read as signed ones."""
    encoding = o.encoding
    if encoding is None or encoding.signed:
        return None
    stored = encoding.quantize(o.y)
    signed = stored.view(stored.dtype.str.replace("u", "i"))
    return np.asarray(np.float32(o.step) * (signed.astype(np.float32) - np.float32(encoding.zero_point[0])))


def _truncated(o: Outcome, rng: np.random.Generator) -> Array:
    """The last tenth of each result was never written."""
    y = o.y.copy().reshape(len(o.y), -1)
    y[:, -max(1, y.shape[1] // 10) :] = 0
    return y.reshape(o.y.shape)


DEFECTS: dict[str, Defect] = {
    "zeros": lambda o, rng: np.zeros_like(o.y),
    "constant": _constant,
    "sign": lambda o, rng: -o.y,
    "gain 0.95": _gain(0.95),
    "gain 1.05": _gain(1.05),
    "gain 2": _gain(2.0),
    "offset of one step": _offset,
    "permuted channels": _permuted,
    "NHWC read as NCHW": _layout,
    "exchanged batch rows": _rows,
    "previous input's output": _stale,
    "one channel dead": _dead_channel,
    "0.1% random": _random(0.001),
    "1% random": _random(0.01),
    "saturated at 90%": _saturated,
    "one NaN": _non_finite(np.nan),
    "one Inf": _non_finite(np.inf),
    "wrong dtype": _reinterpreted,
    "truncated tail": _truncated,
}


def visible(o: Outcome, broken: Array) -> bool:
    """Whether a defect is there to be seen: it moves the results by at least a quarter of the power of legitimate noise.

    ``4 |y' - y|^2 > max(|y - q|^2, mean |b - q|^2) + n (0.3 s)^2``, with b the draws of the rounding envelope: what is below that is declared
    invisible, by this and not by hand. The quantisation's own noise ``|q - f|^2`` is left out on purpose: it is often far larger.
    """
    if not np.isfinite(broken).all():
        return True
    return noise_ratio(o, broken) > 0.25


def noise_ratio(o: Outcome, broken: Array) -> float:
    """The power that a defect moves the results by, over that of legitimate noise."""
    moved, healthy = (float(np.square(a.astype(np.float64) - b).sum()) for a, b in ((broken, o.y), (o.y, o.q)))
    carried = float(np.mean([np.square(draw.astype(np.float64) - o.q).sum() for draw in o.b]))
    return moved / (max(healthy, carried) + o.y.size * (0.3 * (o.step or 0.0)) ** 2 + 1e-30)
