"""From measured rows to a recommendation: which way to run, for each SoC, and what it rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_qnn.advice.measure import RAN, Row
from pytest_qnn.verdict.rule import DEFAULT

POOR_DB = DEFAULT.poor_db
EQUALLY_GOOD_DB = 1.0  # differences below say nothing: deep nets vary by as much from input to input


@dataclass(frozen=True)
class Choice:
    """The recommended way for one or more SoCs.

    Attributes:
        socs: their names; empty where no backend that was tried knows SoCs.
        rows: the recommended ones, one for each SoC; empty if none is right.
        reasons: what speaks for it, with figures.
        rejected: why each other one isn't it.
    """

    socs: tuple[str, ...]
    rows: tuple[Row, ...]
    reasons: tuple[str, ...]
    rejected: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        choice = None
        if self.rows:
            row = self.rows[0]
            choice = {"backend": row.backend, "model": row.executed, "precision": row.precision}
        return {
            "socs": list(self.socs),
            "choice": choice,
            "reasons": list(self.reasons),
            "rejected": list(self.rejected),
        }


@dataclass(frozen=True)
class Recommendation:
    """What to do.

    Attributes:
        choices: SoCs with the same one stand together.
        not_measured: what the recommendation doesn't rest on.
        hints: what else to try.
    """

    prefer: str
    choices: tuple[Choice, ...]
    not_measured: tuple[str, ...]
    hints: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there is a way to run for every SoC."""
        return bool(self.choices) and all(c.rows for c in self.choices)

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "prefer": self.prefer,
            "choices": [c.to_json() for c in self.choices],
            "not_measured": list(self.not_measured),
            "hints": list(self.hints),
        }


def recommend(rows: Sequence[Row], prefer: str, synthetic: bool = False) -> Recommendation:
    """The best of ``rows`` for each SoC; only those that ran, and whose outputs are right, are eligible.

    Args:
        prefer: "accuracy": SQNR against the float reference, measured. "latency" and "power": nothing of them can be
            measured on a simulator; they are inferred from what the host's CPU must do, how often control changes
            between it and the backend, the precision of the arithmetic and the bytes to move.
        synthetic: whether the inputs were made up.
    """
    socs: list[str | None] = list(dict.fromkeys(r.soc for r in rows if r.soc is not None))
    groups: dict[tuple[str, ...], list[tuple[str | None, Row | None]]] = {}
    for soc in socs or [None]:
        best = _best(_of(rows, soc), prefer, synthetic)
        groups.setdefault(() if best is None else _way(best), []).append((soc, best))
    choices = tuple(_choice(group, rows, prefer) for group in groups.values())
    return Recommendation(prefer, choices, _not_measured(rows, prefer, synthetic), _hints(rows))


def _of(rows: Sequence[Row], soc: str | None) -> list[Row]:
    return [r for r in rows if r.soc in (None, soc)]


def _way(row: Row) -> tuple[str, ...]:
    return row.backend, row.executed, row.precision


def _best(rows: Sequence[Row], prefer: str, synthetic: bool) -> Row | None:
    eligible = [r for r in rows if r.state == RAN and r.accurate and not _is_beyond_hardware(r)]
    if not eligible:
        return None
    if not synthetic:  # what random inputs leave of a quantised model says little
        eligible = [r for r in eligible if not _is_poor(r)] or eligible
    best = min(eligible, key=_KEYS[prefer])
    if prefer == "accuracy":
        best = min((r for r in eligible if _sqnr(r) >= _sqnr(best) - EQUALLY_GOOD_DB), key=_KEYS["latency"])
    return best


def _choice(group: Sequence[tuple[str | None, Row | None]], rows: Sequence[Row], prefer: str) -> Choice:
    socs = tuple(soc for soc, _ in group if soc is not None)
    best = tuple(row for _, row in group if row is not None)
    rejected: dict[str, list[str]] = {}
    for soc, row in group:
        for other in _of(rows, soc):
            if other is not row and other.state != "not here":
                rejected.setdefault(f"{name(other)}: {_why_not(other, row, prefer)}", []).append(soc or "")
    lines = (text + (f" ({', '.join(where)})" if len(where) < len(group) else "") for text, where in rejected.items())
    return Choice(socs, best, _reasons(best, prefer) if best else (), tuple(lines))


def name(row: Row) -> str:
    """A row in words: ``htp with m.onnx (A8W8)``."""
    return f"{row.backend} with {row.executed}" + (f" ({row.precision})" if row.precision else "")


# --- order ------------------------------------------------------------------------------------------------------------


def arithmetic(precision: str) -> int:
    """Bits of the arithmetic on activations: 8 or 16 for integers, 16.5 in effect for float16, 32; less is cheaper."""
    if precision.startswith("A8"):
        return 0
    if precision.startswith("A16"):
        return 1
    return {"float16": 2, "float32": 3}.get(precision, 3 if not precision.startswith("A") else 1)


def crossings(row: Row) -> int:
    """How many graphs the backend has to be called for, at least one more for each stretch on the host's CPU."""
    return (row.partitions or 1) + (1 if row.misplaced else 0)


def _is_beyond_hardware(row: Row) -> bool:
    """The simulator computes small float models in float32 for SoCs whose HTP has no float16; no HTP has float32."""
    return row.backend == "htp" and row.precision == "float32"


def _is_poor(row: Row) -> bool:
    return row.sqnr_db is not None and row.sqnr_db < POOR_DB


def _sqnr(row: Row) -> float:
    return float("inf") if row.sqnr_db is None else row.sqnr_db


_KEYS: dict[str, Callable[[Row], tuple[float, ...]]] = {
    "accuracy": lambda r: (-_sqnr(r), len(r.misplaced)),
    # a stretch on the CPU and a change between processors cost most, then the arithmetic, then what must be moved
    "latency": lambda r: (r.backend != "htp", bool(r.misplaced), crossings(r), arithmetic(r.precision), r.size or 0),
    # the host's CPU is the hungriest, then wide arithmetic; changing between processors costs less
    "power": lambda r: (r.backend != "htp", -round(r.share, 2), arithmetic(r.precision), crossings(r), r.size or 0),
}


# --- reasons ------------------------------------------------------------------------------------------------------------


def _reasons(best: Sequence[Row], prefer: str) -> tuple[str, ...]:
    inner = sorted({r.nodes - r.edges for r in best})
    off = max(len(r.misplaced) for r in best)
    graphs = sorted({r.partitions for r in best if r.partitions})
    reasons = [
        (f"{inner[-1] - off} of" if off else "all")
        + f" {inner[-1]} nodes run on {best[0].backend}"
        + (f", {off} on the host's CPU" if off else "")
        + (f", in {graphs[-1]} graph{'s' if graphs[-1] > 1 else ''}" if graphs else "")
    ]
    figures = [r.sqnr_db for r in best if r.sqnr_db is not None]
    reasons.append(
        f"measured: right, SQNR against the float reference {_db(min(figures))}" if figures else "measured: right"
    )
    reasons += dict.fromkeys(warning for r in best for warning in r.warnings)
    if prefer != "accuracy":
        size = max(r.size or 0 for r in best)
        moved = f", {size / 2**20:.2f} MiB of compiled model" if size else ""
        reasons.append(
            f"inferred, not timed: {best[0].precision} arithmetic{moved}, {_bytes(best[0].io_bytes)} in and out"
        )
    return tuple(reasons)


def _why_not(row: Row, best: Row | None, prefer: str) -> str:
    if row.state != RAN:
        return row.state  # the reason stands with the row
    if not row.accurate:
        return f"wrong results, {row.blame} to blame: {row.reason}"
    if _is_beyond_hardware(row):
        return "the simulator computed it in float32, which no HTP does: a device won't run it so"
    assert best is not None
    if prefer == "accuracy":
        if _sqnr(row) < _sqnr(best) - EQUALLY_GOOD_DB:
            return f"right, but {_db(row.sqnr_db)} against {_db(best.sqnr_db)}"
        return f"right and as good ({_db(row.sqnr_db)}), but costs more"
    if row.backend != best.backend:
        return "right, but computed on the CPU" if row.backend == "cpu" else f"right, but not on {best.backend}"
    if _is_poor(row) and not _is_poor(best):
        return f"right as far as its quantisation goes, but that leaves {_db(row.sqnr_db)} only"
    if len(row.misplaced) > len(best.misplaced):
        return f"right, but {len(row.misplaced)} nodes run on the host's CPU"
    if arithmetic(row.precision) > arithmetic(best.precision):
        return f"right ({_db(row.sqnr_db)}), but {row.precision} arithmetic costs more than {best.precision}"
    return "right, but in more graphs or larger"


def _not_measured(rows: Sequence[Row], prefer: str, synthetic: bool) -> tuple[str, ...]:
    found = ["latency and power: the simulator's times follow this host. Measure them on a device before you decide"]
    if prefer != "accuracy":
        found[0] = f"{prefer}, which you prefer: the order is inferred. " + found[0]
    found += [f"{r.backend}: {r.reason}" for r in rows if r.state == "not here"]
    if synthetic:
        poor = any(_is_poor(r) for r in rows if r.state == RAN)
        found.append(
            "accuracy on real data: the inputs were seeded random numbers"
            + (", of which the quantised model leaves little" if poor else "")
            + ". Give real ones with --data"
        )
    return tuple(found)


def _hints(rows: Sequence[Row]) -> tuple[str, ...]:
    hints = []
    on_htp = [r for r in rows if r.backend == "htp"]
    ran = [r for r in on_htp if r.state == RAN]
    float_only = on_htp and not any(r.precision.startswith("A") for r in on_htp if r.precision)
    if float_only and any(r.precision in ("float16", "float32") for r in ran):
        hints.append(
            "htp ran the float model in float16: pytest-qnn quantize MODEL --data DIR --output FILE makes an integer one; "
            "what that gains and loses isn't known until it is made and advised on with --float-model"
        )
    if any(r.misplaced for r in on_htp):
        operators = sorted({m.op_type for r in on_htp for m in r.misplaced})
        hints.append(f"nodes fell back ({', '.join(operators)}): pytest-qnn lint MODEL says which and what to do")
    if any(r.state in ("refused", "crashed", "failed") for r in on_htp):
        hints.append("pytest-qnn lint MODEL may name what the compiler stumbles over")
    if any(r.state == RAN and r.accurate is False and r.blame == "quantization" for r in on_htp):
        hints.append(
            "the quantisation itself loses the result: try 16-bit activations, scales per channel or other calibration data"
        )
    return tuple(hints)


def _db(value: float | None) -> str:
    return "-" if value is None else "no difference" if value == float("inf") else f"{value:.1f} dB"


def _bytes(count: int) -> str:
    return (
        f"{count} bytes" if count < 1024 else f"{count / 1024:.1f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"
    )
