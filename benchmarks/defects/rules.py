"""The rules that are compared: pytest-qnn's own, and the defaults of what people use today, each as its sources have it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from benchmarks.defects.runs import Outcome
from pytest_qnn.layers.envelope import draws_each, spread
from pytest_qnn.verdict.judge import OutputCase
from pytest_qnn.verdict.metrics import Evidence

Array = npt.NDArray[np.float32]
Rule = Callable[[Outcome, Array], bool]  # whether it accepts the results


def own(o: Outcome, y: Array) -> bool:
    """The derived rule, as ``assert_matches_reference`` applies it."""
    return not own_failures(o, y)


def own_failures(o: Outcome, y: Array) -> tuple[str, ...]:
    """What the derived rule says of an output over all inputs."""
    case = OutputCase(o.output, Evidence(step=o.step), "float16", o.bounded, envelope=_envelope(o))
    for index in range(len(y)):
        case.add(o.q[index], y[index], o.f[index], o.r[index])
    return case.judge().failures


_envelopes: dict[tuple[str, str], Evidence] = {}


def _envelope(o: Outcome) -> Evidence:
    """The same for every defect of a run, and every SoC."""
    key = (f"{o.pair.name} {o.seed} {len(o.y)}", o.output)
    if key not in _envelopes:
        case = OutputCase(o.output, Evidence(step=o.step), "float16")
        for index in spread(len(o.q)):
            for draw in o.b[: draws_each(len(o.q))]:
                case.add_envelope(o.q[index], draw[index])
        assert case.envelope is not None
        _envelopes[key] = case.envelope
    return _envelopes[key]


def onnxruntime_qdq(o: Outcome, y: Array) -> bool:
    """onnxruntime's QNN tests: no element is further from float than the CPU is by more than 0.4% of the output's range."""
    span = float(o.f.max() - o.f.min())
    cpu, qnn = np.abs(o.q - o.f), np.abs(y - o.f)
    return bool(((qnn <= cpu) | (np.abs(qnn - cpu) <= 0.004 * span)).all())


def close(rtol: float, atol: float, against: str) -> Rule:
    """``numpy.allclose`` against the float or the QDQ reference."""
    return lambda o, y: bool(np.allclose(y, getattr(o, against), rtol=rtol, atol=atol))


def cosine(least: float, against: str = "f") -> Rule:
    """Cosine similarity with a reference, for each input."""

    def accepts(o: Outcome, y: Array) -> bool:
        a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (getattr(o, against), y))
        norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return bool(((a * b).sum(1) >= least * norm).all() and (norm > 0).all())

    return accepts


def psnr(least: float) -> Rule:
    """Peak signal to noise ratio against the float reference, for each input: 20 log10(max |f| / rms)."""

    def accepts(o: Outcome, y: Array) -> bool:
        a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (o.f, y))
        rms = np.sqrt(np.square(a - b).mean(1))
        with np.errstate(divide="ignore", invalid="ignore"):
            return bool((20 * np.log10(np.abs(a).max(1) / rms) >= least).all())

    return accepts


def polygraphy_simple(o: Outcome, y: Array) -> bool:
    """Polygraphy's default: every element within 1e-5 absolute or 1e-5 relative of the other runner's."""
    difference = np.abs(y - o.q)
    return bool(((difference <= 1e-5) | (difference <= 1e-5 * np.abs(o.q))).all())


def polygraphy_l2(o: Outcome, y: Array) -> bool:
    """Polygraphy's L2 comparison: the norm of the difference from the other runner's result is at most 1e-5, for each input."""
    difference = (y - o.q).reshape(len(y), -1).astype(np.float64)
    return bool((np.linalg.norm(difference, axis=1) <= 1e-5).all())


RULES: dict[str, Rule] = {
    "pytest-qnn": own,
    "onnxruntime QDQ": onnxruntime_qdq,
    "rtol 1e-3 atol 1e-5": close(1e-3, 1e-5, "q"),
    "rtol 1 atol 0.1": close(1.0, 0.1, "f"),
    "cosine 0.95": cosine(0.95),
    "cosine 0.99": cosine(0.99),
    "PSNR 30 dB": psnr(30),
    "Polygraphy simple": polygraphy_simple,
    "Polygraphy L2": polygraphy_l2,
    "chipwright": cosine(0.99, "q"),
}
