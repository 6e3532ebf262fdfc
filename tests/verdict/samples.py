"""Seeded outputs of an imaginary model, for the tests of the verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pytest_qnn.verdict.judge import OutputCase, OutputVerdict
from pytest_qnn.verdict.metrics import Evidence
from pytest_qnn.verdict.tolerance import Tolerance

Array = np.ndarray[Any, Any]
SHAPE = (1, 8, 16, 16)


@dataclass(frozen=True)
class Outputs:
    """(inputs, ...) arrays of one output and its step."""

    f: Array
    q: Array
    r: Array
    y: Array
    step: float | None
    precision: str = "float16"
    bounded: bool = False

    def with_y(self, y: Array) -> Outputs:
        return replace(self, y=y)

    def judge(self, tolerance: Tolerance | None = None) -> OutputVerdict:
        evidence = Evidence(step=self.step)
        case = OutputCase("out", evidence, self.precision, bounded=self.bounded, tolerance=tolerance)
        for q, y, f, r in zip(self.q, self.y, self.f, self.r, strict=True):
            case.add(q, y, f, r)
        return case.judge()


def quantized_outputs(seed: int = 0, *, inputs: int = 6, bits: int = 8, shape: tuple[int, ...] = SHAPE) -> Outputs:
    """A healthy quantised output: q and y are two independent roundings (and 1.5 steps of noise) of the same f."""
    rng = np.random.default_rng(seed)
    f = rng.standard_normal((inputs, *shape)).astype(np.float32)
    step = 9.0 / 2**bits
    noise = 1.5 * step * rng.standard_normal((2, *f.shape))
    q, y = (
        np.float32(step) * np.round((f + n) / step).astype(np.float32)
        for n in (noise[0], noise[0] * 0.6 + noise[1] * 0.3)
    )
    return Outputs(f, q, q.copy(), y, step)


def float_outputs(seed: int = 0, *, relative: float = 0.01, inputs: int = 6, precision: str = "float16") -> Outputs:
    """A healthy output of an unquantised model, computed with a relative rounding of ``relative``."""
    rng = np.random.default_rng(seed)
    f = rng.standard_normal((inputs, *SHAPE)).astype(np.float32)
    y = (f * (1 + relative * rng.standard_normal(f.shape))).astype(np.float32)
    return Outputs(f, f, f, y, None, precision)


def failed_tests(verdict: OutputVerdict) -> set[str]:
    return {failure.split(":")[0] for failure in verdict.failures}
