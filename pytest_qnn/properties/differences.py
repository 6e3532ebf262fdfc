"""Outputs of one model, compared with outputs of the same or a related one, in steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.session import Session
from pytest_qnn.verdict.metrics import STEP_SLACK

Outputs = Mapping[str, Array]
FLOAT16_UNIT, FLOAT32_UNIT = (
    2.0**-10,
    2.0**-20,
)  # what counts as a step of an unquantised output, relative to its largest value


@dataclass(frozen=True)
class Violation:
    """One sample that breaks an invariant.

    Attributes:
        sample: its number in the batch.
        text: where, and by how much.
        steps: how far off its worst element is; infinite where it isn't finite or shapes differ.
    """

    sample: int
    text: str
    steps: float


def unit_of(spec: TensorSpec, session: Session, expected: Array) -> float:
    """One step of an output as it comes: 1 for integers, the encoding's step for floats; where there is none, a grain of the
    precision that the backend computes in, relative to the largest value."""
    if expected.dtype.kind in "iub":
        return 1.0
    if spec.encoding is not None:
        return spec.encoding.step
    grain = FLOAT16_UNIT if session.unquantized_precision == "float16" else FLOAT32_UNIT
    finite = np.abs(expected[np.isfinite(expected)])
    return grain * float(finite.max(initial=0.0)) or float(np.finfo(np.float32).tiny)


def violations(
    session: Session, expected: Sequence[Outputs], got: Sequence[Outputs], steps: float, names: tuple[str, str]
) -> list[Violation]:
    """Samples whose outputs differ by more than ``steps``; at most one for each sample, its worst element.

    Args:
        session: whose outputs they are.
        names: what to call the two in messages.
    """
    found = []
    for number, (first, second) in enumerate(zip(expected, got, strict=True)):
        worst: Violation | None = None
        for spec in session.outputs:
            one = _difference(spec, session, number, first[spec.name], second[spec.name], steps, names)
            if one is not None and (worst is None or one.steps > worst.steps):
                worst = one
        if worst is not None:
            found.append(worst)
    return found


def _difference(
    spec: TensorSpec, session: Session, number: int, a: Array, b: Array, steps: float, names: tuple[str, str]
) -> Violation | None:
    if a.shape != b.shape:
        text = f"output {spec.name!r}: shape {list(b.shape)} {names[1]}, {list(a.shape)} {names[0]}"
        return Violation(number, text, float("inf"))
    if np.array_equal(a, b) or a.size == 0:
        return None
    unit = unit_of(spec, session, a)
    left, right = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        off = np.abs(right - left) / unit
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    off = np.where(same, 0.0, np.where(np.isnan(off), np.inf, off))
    largest = float(off.max())
    if largest <= (steps + STEP_SLACK if steps else 0.0):
        return None
    where = tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))
    count = int(np.count_nonzero(off > steps))
    text = (
        f"output {spec.name!r} {list(where)}: {_number(a[where])} {names[0]}, {_number(b[where])} {names[1]} "
        f"({largest:.3g} steps off, limit {steps:g}); {count} of {off.size} elements"
    )
    return Violation(number, text, largest)


def _number(value: Any) -> str:
    return f"{float(value):.6g}"
