"""What changed between two sets of encodings: ranges in steps, types, tensors that only one of them has."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pytest_qnn.encodings.encoding_set import EncodingSet, TensorEncoding
from pytest_qnn.model.encoding import Encoding


@dataclass(frozen=True)
class Change:
    """A tensor that both sets have, with different encodings.

    Attributes:
        name: of the tensor.
        steps: how far the worse end of its range moved, in steps of the first set's encoding (of a per-channel one: at the worst
            channel); infinite where only one of them has a range.
        before, after: its range in each set; None where the entry is only a precision.
        changed: what else differs, e.g. "8 -> 16 bits", "symmetric -> asymmetric", "per tensor -> per channel".
    """

    name: str
    steps: float
    before: tuple[float, float] | None
    after: tuple[float, float] | None
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """What two sets differ in.

    Attributes:
        only_first, only_second: tensors that one set has alone, sorted.
        changes: tensors that differ, those first that moved by most steps.
        same: how many tensors are the same in both.
    """

    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    changes: tuple[Change, ...]
    same: int

    @property
    def steps(self) -> float:
        """The largest movement of a range, in steps."""
        return max((c.steps for c in self.changes), default=0.0)

    def exceeds(self, steps: float) -> bool:
        """Whether a range moved by more than that many steps, a type changed, or a tensor is in one set alone."""
        return bool(self.only_first or self.only_second) or any(c.steps > steps or c.changed for c in self.changes)


ROUNDING = 1e-6  # steps: less than this is how decimal numbers in files are rounded


def compare_encodings(first: EncodingSet, second: EncodingSet) -> Difference:
    """Compare two sets by tensor."""
    a, b = first.by_name, second.by_name
    changes = [change for name in a if name in b and (change := _change(a[name], b[name])) is not None]
    return Difference(
        only_first=tuple(sorted(a.keys() - b.keys())),
        only_second=tuple(sorted(b.keys() - a.keys())),
        changes=tuple(sorted(changes, key=lambda c: (-c.steps, c.name))),
        same=len(a.keys() & b.keys()) - len(changes),
    )


def _change(a: TensorEncoding, b: TensorEncoding) -> Change | None:
    x, y = a.encoding, b.encoding
    if x is None or y is None:
        if a.value == b.value:
            return None
        words = [t.encoding.dtype if t.encoding else str(t.value) for t in (a, b)]
        before, after = (e.range if e else None for e in (x, y))
        return Change(a.name, math.inf, before, after, (f"{words[0]} -> {words[1]}",))
    steps, changed = _moved(x, y), tuple(_changed(x, y))
    if x.bits == y.bits == 32:  # a bias: its range is that of the accumulator and says nothing, its scale does
        moved = steps > 0 and not all(
            _same(*pair) for pair in zip(x.scale, y.scale, x.zero_point, y.zero_point, strict=False)
        )
        changed += ("bias scale",) if moved else ()
        steps = 0.0
    if a.kind is not None and b.kind is not None and a.kind != b.kind:
        changed += (f"{a.kind} -> {b.kind}",)
    return Change(a.name, steps, x.range, y.range, changed) if steps or changed else None


def _moved(a: Encoding, b: Encoding) -> float:
    """How far the worse end of the range moved, in steps of ``a``."""
    if len(a.scale) == len(b.scale):
        same = [
            a.dtype == b.dtype and _same(*pair)
            for pair in zip(a.scale, b.scale, a.zero_point, b.zero_point, strict=True)
        ]
        channels = [
            c for c, equal in zip(zip(a.scale, a.ranges, b.ranges, strict=True), same, strict=True) if not equal
        ]
    else:
        channels = [(a.step, a.range, b.range)]
    moved = [
        max(abs(was[0] - now[0]), abs(was[1] - now[1])) / scale if scale > 0 else math.inf
        for scale, was, now in channels
        if was != now
    ]
    furthest = max(moved, default=0.0)
    return furthest if furthest > ROUNDING else 0.0


def _same(scale: float, other_scale: float, zero: int, other_zero: int) -> bool:
    """Whether two scales and zero points are applied as the same: that happens in float32, as models store them."""
    return zero == other_zero and bool(np.float32(scale) == np.float32(other_scale))


def _changed(a: Encoding, b: Encoding) -> list[str]:
    found = []
    if a.bits != b.bits:
        found.append(f"{a.bits} -> {b.bits} bits")
    if _sign(a) != _sign(b):
        found.append(f"{_sign(a)} -> {_sign(b)}")
    either_unbound = a.unbound or b.unbound  # a file left the axis to the model: no difference
    if _granularity(a, either_unbound) != _granularity(b, either_unbound):
        found.append(f"{_granularity(a, either_unbound)} -> {_granularity(b, either_unbound)}")
    return found


def _sign(encoding: Encoding) -> str:
    if encoding.symmetric:
        return "symmetric"
    return f"{'signed' if encoding.signed else 'unsigned'} asymmetric"


def _granularity(encoding: Encoding, without_axis: bool) -> str:
    if len(encoding.scale) == 1 and encoding.block_size is None:
        return "per tensor"
    axis = "" if without_axis else f" along axis {encoding.axis}"
    return (f"blocks of {encoding.block_size}" if encoding.block_size else f"{len(encoding.scale)} channels") + axis
