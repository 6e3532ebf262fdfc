"""The three ways of computing an output: in float, quantised on onnxruntime, quantised on the backend; and how to compare them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_qnn.layers.arithmetic import is_coarse
from pytest_qnn.layers.envelope import DRAW, DRAWS
from pytest_qnn.model.onnx_file import Model
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.runners.reference import CHECK_LEVEL, LEVEL
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.session import Run, Session
from pytest_qnn.verdict.judge import OutputCase
from pytest_qnn.verdict.metrics import Evidence
from pytest_qnn.verdict.tolerance import Tolerance


@dataclass(frozen=True)
class References:
    """What onnxruntime computed from one sample: outputs by name, as the models give them.

    Attributes:
        quantized: of the model that the backend runs.
        check: the same at another optimisation level.
        real: of its float original; None where the model is float itself.
        drawn: what legitimate rounding makes of ``quantized``: draws of the rounding envelope, where they were asked for and there is one.
    """

    quantized: Mapping[str, Array]
    check: Mapping[str, Array]
    real: Mapping[str, Array] | None
    drawn: tuple[Mapping[str, Array], ...] = ()


def references_of(session: Session, sample: Mapping[str, Array], drawn: int = 0, passing: bool = False) -> References:
    """The references of one sample of a run, with so many draws of the rounding envelope.

    Args:
        passing: whether the sample was drawn at random, to be used once (see ``ReferenceRunner.run``).

    Raises:
        ModelError: onnxruntime can't load a model.
        TargetError: the reference process died, hung or ran out of memory.
    """
    check = session.bench.references.run(session.executed, sample, CHECK_LEVEL, passing=passing)
    real = None if float_source(session) is None else float_outputs(session, sample, passing)
    return References(quantized_outputs(session, sample, passing), check, real, _drawn(session, sample, drawn, passing))


def envelope_of(session: Session) -> Model | None:
    """The model that tells how far rounding carries another: of HTP alone, whose arithmetic is known, and of quantised models."""
    if session.backend != "htp" or session.executed.context or not session.executed.quantized:
        return None
    return session.bench.references.envelope(session.executed, is_coarse(session.plan.soc))


def _drawn(
    session: Session, sample: Mapping[str, Array], number: int, passing: bool
) -> tuple[Mapping[str, Array], ...]:
    envelope = envelope_of(session) if number else None
    if envelope is None:
        return ()
    run = session.bench.references.run
    return tuple(run(envelope, {**sample, DRAW: value}, LEVEL, passing=passing) for value in DRAWS[:number])


def quantized_outputs(session: Session, sample: Mapping[str, Array], passing: bool = False) -> dict[str, Array]:
    """What onnxruntime gives for the model that the backend runs.

    Raises:
        ModelError, TargetError: as for :func:`references_of`.
    """
    return session.bench.references.run(session.executed, sample, LEVEL, passing=passing)


def float_outputs(session: Session, sample: Mapping[str, Array], passing: bool = False) -> dict[str, Array]:
    """What onnxruntime gives for the model that is the float reference.

    Raises:
        ModelError, TargetError: as for :func:`references_of`.
    """
    source = float_source(session)
    if source is None:
        return quantized_outputs(session, sample, passing)
    return session.bench.references.run(source, _as_float(sample, session, source), LEVEL, passing=passing)


def reference_values(run: Run) -> Iterator[tuple[dict[str, Array], dict[str, Array] | None]]:
    """The QDQ model's and the float reference's outputs (None: there is none) for each sample of a run, as real values.

    Raises:
        ModelError, TargetError: as for :func:`references_of`.
    """
    session = run.session
    for sample in run.samples:
        q = quantized_outputs(session, sample, run.passing)
        f = None if float_source(session) is None else float_outputs(session, sample, run.passing)
        yield (
            {spec.name: real_values(q[spec.name], spec) for spec in session.outputs},
            None if f is None else {spec.name: real_values(f[spec.name], spec) for spec in session.outputs},
        )


def float_source(session: Session) -> Model | None:
    """The model that gives f: the float original, else the QDQ model without its rounding; None where q itself is f."""
    if not session.executed.quantized or session.executed.context:
        return None
    return session.float_model or session.bench.references.without_rounding(session.executed)


def float_name(session: Session) -> str:
    """What gives f, for messages."""
    source = float_source(session)
    if source is None:
        return session.executed.path.name
    return source.path.name if source is session.float_model else f"{session.model.path.name} without its rounding"


def reference_json(session: Session) -> dict[str, Any]:
    """What the reference was, for a record."""
    return {
        "runtime": "onnxruntime CPU",
        "version": session.bench.versions["onnxruntime"],
        "level": LEVEL,
        "checked_against": CHECK_LEVEL,
        "float": float_name(session),
        "quantized": session.executed.path.name if session.executed.quantized else None,
    }


def _as_float(sample: Mapping[str, Array], session: Session, source: Model) -> dict[str, Array]:
    """The sample as the float model takes it: integers of a quantised input become the real values they stand for."""
    wanted = {spec.name: spec.dtype for spec in source.inputs}
    converted = {}
    for spec in session.inputs:
        array = sample[spec.name]
        if array.dtype.name != wanted.get(spec.name, array.dtype.name):
            array = real_values(array, spec).astype(wanted[spec.name])
        converted[spec.name] = array
    return converted


def real_values(array: Array, spec: TensorSpec) -> Array:
    """Real values: integers with an encoding are dequantised, ``scale * (q - zero_point)``; the rest stays as it is."""
    if spec.encoding is None or array.dtype.kind not in "iu":
        return array
    return spec.encoding.dequantize(array)


# --- judging ----------------------------------------------------------------------------------------------------------


def output_case(session: Session, spec: TensorSpec, tolerance: Tolerance | None, limits_from: str) -> OutputCase:
    """An output of a session, ready for samples."""
    executed = session.executed
    return OutputCase(
        name=spec.name,
        evidence=Evidence(
            step=spec.encoding.step if spec.encoding else None, has_float=float_source(session) is not None
        ),
        precision=session.unquantized_precision,
        bounded=spec.name in executed.bounded_outputs,
        exact=spec.encoding is None and not spec.dtype.startswith(("float", "bfloat")),
        tolerance=tolerance,
        limits_from=limits_from,
        nominal_step=next((o.encoding.step for o in session.model.outputs if o.name == spec.name and o.encoding), None),
    )


def add_sample(
    cases: Sequence[OutputCase], specs: Sequence[TensorSpec], references: References, outputs: Mapping[str, Array]
) -> None:
    """Add one sample to the case of each output; ``outputs`` are the backend's."""
    q, r, f = references.quantized, references.check, references.real
    for case, spec in zip(cases, specs, strict=True):
        name = spec.name
        real = None if f is None else real_values(f[name], spec)
        case.add(real_values(q[name], spec), real_values(outputs[name], spec), real, real_values(r[name], spec))
        if case.evidence.step and not case.structure:
            for draw in references.drawn:
                case.add_envelope(real_values(q[name], spec), real_values(draw[name], spec))
