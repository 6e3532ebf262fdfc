"""What happens to a model on each backend and SoC: placement, precision, accuracy, size; one row each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_qnn.artifacts.context import read_artifact
from pytest_qnn.assertions import judge_run
from pytest_qnn.errors import (
    BackendUnavailableError,
    CompileError,
    PlacementError,
    QnnError,
    RuntimeCrashError,
    TargetMemoryError,
    TargetTimeoutError,
)
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.onnx_file import Model
from pytest_qnn.runners.placement import Misplaced, Placement
from pytest_qnn.session import Session

if TYPE_CHECKING:
    from pytest_qnn.bench import Bench

Samples = Sequence[Mapping[str, Any]]

RAN = "ran"
_STATES: tuple[tuple[type[QnnError], str], ...] = (
    (BackendUnavailableError, "not here"),
    (PlacementError, "not taken"),
    (CompileError, "refused"),
    (RuntimeCrashError, "crashed"),
    (TargetTimeoutError, "timed out"),
    (TargetMemoryError, "out of memory"),
)


@dataclass(frozen=True)
class Candidate:
    """One way to run: a backend, a SoC where the backend knows any, and which of the two models.

    Attributes:
        uses_float: whether the float original is compiled for the backend in place of the quantised model.
        dimensions: sizes for the model's dynamic dimensions.
    """

    backend: str
    soc: str | None
    model: Path
    float_model: Path | None
    uses_float: bool = False
    dimensions: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Row:
    """What happened to one candidate.

    Attributes:
        state: "ran", "not here", "not taken" (no node runs there), "refused" (by the compiler), "crashed", "timed out", "out
            of memory" or "failed".
        reason: why it didn't run; or the accuracy verdict's first failure.
        htp_arch: Hexagon architecture of the SoC.
        executed: file name of the model that ran.
        nodes, placed, edges: how many there are after onnxruntime's optimisation, how many the backend took, how many are
            graph-edge quantisers on the host's CPU.
        misplaced: the others, each with the execution provider's reason.
        partitions: how many graphs the backend's nodes fall into; None where it isn't known.
        precision: what it computed in, e.g. "A8W8" or "float16".
        accurate: whether the derived rule passes; None if nothing was judged.
        blame: whose fault it is that it doesn't.
        sqnr_db: of the worst output, against the float reference; None where it has none (integers).
        noise_db: SQNR of the worst output against onnxruntime's result of the very same model: the backend's own noise.
        samples: how many were run.
        warnings: what the verdict says of outputs that pass.
        size: of the context binary, in bytes.
        io_bytes: inputs and outputs of one inference.
        compile_seconds: on this host.
    """

    backend: str
    soc: str | None
    htp_arch: int | None
    executed: str
    state: str
    reason: str = ""
    nodes: int = 0
    placed: int = 0
    edges: int = 0
    misplaced: tuple[Misplaced, ...] = ()
    partitions: int | None = None
    precision: str = ""
    accurate: bool | None = None
    blame: str = "none"
    sqnr_db: float | None = None
    noise_db: float | None = None
    samples: int = 0
    warnings: tuple[str, ...] = ()
    size: int | None = None
    io_bytes: int = 0
    compile_seconds: float | None = None
    uses_float: bool = False

    @property
    def share(self) -> float:
        """Part of the nodes, graph-edge quantisers aside, that the backend took."""
        inner = self.nodes - self.edges
        return self.placed / inner if inner else 0.0

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["misplaced"] = [{"node": m.name, "op_type": m.op_type, "reason": m.reason} for m in self.misplaced]
        for name in ("sqnr_db", "noise_db"):
            if values[name] is not None and not math.isfinite(values[name]):
                values[name] = None
        return values


def candidates(
    bench: Bench,
    model: Model,
    float_model: Model | None,
    backends: Sequence[str],
    socs: Sequence[str],
    dimensions: Mapping[str, int],
) -> list[Candidate]:
    """What to try: htp on each SoC, with the float original too where there is one; the other backends once."""
    original = float_model.path if float_model else None
    sizes = tuple(dimensions.items())
    found = []
    for name in backends:
        if name != "htp" or bench.target.missing(name):
            found.append(Candidate(name, None, model.path, original, dimensions=sizes))
            continue
        for soc in socs:
            found.append(Candidate(name, soc, model.path, original, dimensions=sizes))
            if float_model is not None:
                found.append(Candidate(name, soc, float_model.path, None, True, float_model.dimensions))
    return found


def measure(
    bench: Bench,
    found: Sequence[Candidate],
    samples: Samples,
    tell: Callable[[Candidate], object] = lambda candidate: None,
) -> Iterator[Row]:
    """A row for each candidate, as it comes; one that fails doesn't keep the others from running.

    Args:
        samples: inputs of the model that was asked for.
        tell: called before each candidate.
    """
    for candidate in found:
        tell(candidate)
        row = Row(
            candidate.backend, candidate.soc, None, candidate.model.name, "failed", uses_float=candidate.uses_float
        )
        try:
            session = bench.backend(BackendRequest(candidate.backend, soc=candidate.soc)).load(
                candidate.model,
                float_model=candidate.float_model,
                dimensions=dict(candidate.dimensions),
                allow_cpu=True,
            )
        except QnnError as error:
            yield _failed(row, error)
            continue
        try:
            yield _ran(_loaded(row, session), session, samples)
        except QnnError as error:
            yield _failed(_loaded(row, session), error)
        finally:
            session.close()


def _failed(row: Row, error: QnnError) -> Row:
    state = next((state for kind, state in _STATES if isinstance(error, kind)), "failed")
    placement = error.verdict if isinstance(error, PlacementError) else None
    if placement is not None:
        row = _placed(row, placement)
    reason = str(error).splitlines()[0]
    return replace(row, state=state, reason=reason)


def _placed(row: Row, placement: Placement) -> Row:
    return replace(
        row,
        nodes=placement.total,
        placed=placement.backend,
        edges=len(placement.edges),
        misplaced=placement.misplaced,
    )


def _loaded(row: Row, session: Session) -> Row:
    artifact, plan = session.artifact, session.plan
    seconds = None
    if artifact.kind == "context binary" and artifact.path is not None:
        seconds = read_artifact(Path(artifact.path)).compile_seconds
    return replace(
        _placed(row, session.placement),
        htp_arch=plan.soc.htp_arch if plan.soc else None,
        executed=session.executed.path.name,
        partitions=artifact.partitions,
        precision=session.precision,
        size=artifact.size,
        io_bytes=sum(
            math.prod(int(n) for n in spec.shape) * np.dtype(spec.dtype).itemsize
            for spec in (*session.inputs, *session.outputs)
            if not spec.unbound and spec.dtype != "string"
        ),
        compile_seconds=seconds,
        uses_float=row.uses_float or session.executed is session.float_model,
    )


def _ran(row: Row, session: Session, samples: Samples) -> Row:
    run = session.run_many([dict(sample) for sample in samples])
    verdict = judge_run(run)
    failed = verdict.failed
    return replace(
        row,
        state=RAN,
        reason=f"output {failed[0].name!r}: {failed[0].failures[0]}" if failed else "",
        accurate=verdict.ok,
        blame=verdict.blame,
        sqnr_db=_worst([o.figures.get("sqnr_db") for o in verdict.outputs]),
        noise_db=_worst([o.figures.get("sqnr_against_quantized_db") for o in verdict.outputs]),
        samples=len(run.samples),
        warnings=tuple(f"output {o.name!r}: {warning}" for o in verdict.outputs for warning in o.warnings),
    )


def _worst(figures: Sequence[float | int | None]) -> float | None:
    known = [float(f) for f in figures if f is not None and not math.isnan(f)]
    return min(known) if known else None
