"""The assertions. Each returns the verdict that it judged, and leaves a record of it, whatever it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import numpy as np

from pytest_qnn.errors import (
    AccuracyError,
    DeviceUnstableError,
    LatencyError,
    OptionError,
    PlacementError,
    UsageError,
)
from pytest_qnn.model.onnx_file import Model
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.records.failure import accuracy_message, latency_message, placement_message, unstable_message
from pytest_qnn.records.record import make_record
from pytest_qnn.runners.placement import Misplaced, Placement
from pytest_qnn.runners.reference import CHECK_LEVEL, LEVEL
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.session import Measurement, Run, Session
from pytest_qnn.settings import unknown_name
from pytest_qnn.verdict.judge import AccuracyVerdict, OutputCase, judge
from pytest_qnn.verdict.latency import LatencyBudget, LatencyVerdict, Outcome, judge_latency
from pytest_qnn.verdict.metrics import Evidence
from pytest_qnn.verdict.tolerance import Tolerance

Tolerances = Tolerance | Mapping[str, Tolerance]


def assert_matches_reference(run: Run, tolerance: Tolerances | None = None) -> AccuracyVerdict:
    """The outputs are as good as the model's quantisation allows, and the backend computed them.

    They are compared with onnxruntime's CPU results of the QDQ model and of the float model, over all samples together.
    Limits come from ``tolerance``, else from the test's ``tolerance`` marks, else from the project's configuration, else from the
    derived rule (documentation: "How a verdict is reached").

    Args:
        run: what :meth:`Session.run` returned.
        tolerance: limits for all outputs, or by output name; outputs that aren't named keep the next layer's.

    Returns:
        The verdict, one entry per output.

    Raises:
        AccuracyError: an output isn't good enough. Its ``verdict`` is the one that would have been returned.
        PlacementError: nodes ran on onnxruntime's CPU provider instead of the backend (see ``allow_cpu`` of ``load``).
        TargetError: the reference could not be computed.
    """
    __tracebackhide__ = True
    if not isinstance(run, Run):
        hint = ": pass the run itself, not its outputs" if isinstance(run, dict | list | np.ndarray) else ""
        raise UsageError(
            f"assert_matches_reference takes what session.run(...) returned, got {type(run).__name__}{hint}"
        )
    session = run.session
    cases = _cases(session, tolerance)
    require_placement(session)
    verdict = _judge(run, cases)
    failed = verdict.failed
    reason = f"output {failed[0].name!r}: {failed[0].failures[0]}" if failed else ""
    record = make_record(
        session.bench,
        session,
        "accuracy",
        "pass" if verdict.ok else "fail",
        verdict.blame,
        reason,
        samples=len(run.samples),
        synthetic_inputs=run.synthetic,
        reference={
            "runtime": "onnxruntime CPU",
            "version": session.bench.versions["onnxruntime"],
            "level": LEVEL,
            "checked_against": CHECK_LEVEL,
            "float": _float_name(session, _float_source(session)),
            "quantized": session.executed.path.name if session.executed.quantized else None,
        },
        outputs=[o.to_json() for o in verdict.outputs],
    )
    if not verdict.ok:
        raise AccuracyError(accuracy_message(session, verdict, record), verdict)
    return verdict


def judge_run(run: Run, tolerance: Tolerances | None = None) -> AccuracyVerdict:
    """The verdict of :func:`assert_matches_reference`, whatever it is and wherever the nodes ran; no record is left.

    Raises:
        TargetError: the reference could not be computed.
    """
    return _judge(run, _cases(run.session, tolerance))


def _cases(session: Session, tolerance: Tolerances | None) -> list[OutputCase]:
    _check_names(tolerance, session)
    cases = [_case(session, spec, tolerance) for spec in session.outputs]
    unlimited = [case.name for case in cases if case.tolerance is None]
    if session.artifact.quantizes and not session.executed.quantized and unlimited:
        raise UsageError(
            f"{session.subject}: its artifact is quantised and the model is not, so nothing says how much quantising may "
            f"cost output {unlimited[0]!r}: load the QDQ model with float_model= (pytest-qnn encodings apply writes one "
            "from the encodings that were used), or give an explicit limit such as tolerance(sqnr_db=20)"
        )
    return cases


def _judge(run: Run, cases: list[OutputCase]) -> AccuracyVerdict:
    session = run.session
    float_source = _float_source(session)
    references = session.bench.references
    for sample, result in zip(run.samples, run.results, strict=True):
        q = references.run(session.executed, sample, LEVEL, passing=run.passing)
        r = references.run(session.executed, sample, CHECK_LEVEL, passing=run.passing)
        f = None
        if float_source is not None:
            converted = _as_float(sample, session, float_source)
            f = references.run(float_source, converted, LEVEL, passing=run.passing)
        for case, spec in zip(cases, session.outputs, strict=True):
            real = None if f is None else _real(f[spec.name], spec)
            case.add(_real(q[spec.name], spec), _real(result[spec.name], spec), real, _real(r[spec.name], spec))
    return judge(cases, len(run.samples))


def assert_fully_offloaded(session: Session) -> Placement:
    """Every node ran on the asked backend; graph-edge Quantize/DequantizeLinear on the host's CPU is allowed.

    Raises:
        PlacementError: names each node that did not, with the execution provider's reason.
    """
    __tracebackhide__ = True
    if isinstance(session, Run | Measurement):
        session = session.session
    if not isinstance(session, Session):
        raise UsageError(f"assert_fully_offloaded takes a session, got {type(session).__name__}")
    if session.placement.misplaced:
        _placement_failure(session, session.placement.misplaced)
    make_record(session.bench, session, "placement", "pass", "none", session.placement.describe())
    return session.placement


def assert_latency(measurement: Measurement, budget: LatencyBudget | None = None) -> LatencyVerdict:
    """The measured latencies keep their budget.

    A limit that lies inside the confidence interval is undecided: that fails only with ``--qnn-strict-latency``. So is
    everything if the device throttled or its latencies drifted, however plain the figures: that is never a failure, and with
    ``--qnn-strict-latency`` an infrastructure error. What was not measured on a Snapdragon is not judged unless
    ``--qnn-simulated-latency`` asks.

    Args:
        measurement: what :meth:`Session.measure` returned.
        budget: limits; default: the test's ``latency_budget`` marks, else the project's configuration.

    Raises:
        LatencyError: over budget, or undecided with ``--qnn-strict-latency``.
        DeviceUnstableError: undecided because the device throttled or drifted, with ``--qnn-strict-latency``.
        UsageError: there is no budget anywhere.
    """
    __tracebackhide__ = True
    if not isinstance(measurement, Measurement):
        raise UsageError(f"assert_latency takes what session.measure(...) returned, got {type(measurement).__name__}")
    session, stats, conditions = measurement.session, measurement.stats, measurement.conditions
    settings = session.bench.settings
    if budget is not None and not isinstance(budget, LatencyBudget):
        raise UsageError(f"budget must be a LatencyBudget such as LatencyBudget(p95_ms=6), got {budget!r}")
    budget = budget or session.bench.latency_budget(session) or measurement.budget
    if budget is None:
        raise UsageError(
            f"{session.subject}: there is no latency budget: mark the test with latency_budget(p95_ms=...), pass budget=, or "
            "configure [[tool.pytest_qnn.latency_budget]]"
        )
    if measurement.not_a_device and not settings.simulated_latency:
        verdict = LatencyVerdict(Outcome.NOT_JUDGED, (), stats, budget, measurement.not_a_device)
    else:
        verdict = judge_latency(stats, budget, conditions.assessment if conditions else None)
    on_htp = session.backend == "htp"
    unstable = verdict.outcome is Outcome.UNDECIDED and bool(verdict.reason)
    undecided = verdict.outcome is Outcome.UNDECIDED and not unstable
    failed = verdict.outcome is Outcome.OVER or (undecided and settings.strict_latency)
    reason = "; ".join(str(limit) for limit in verdict.limits if limit.outcome is not Outcome.WITHIN)
    if verdict.reason:
        reason = f"{verdict.outcome}: {verdict.reason}"
    names = {Outcome.WITHIN: "pass", Outcome.OVER: "fail"}
    record = make_record(
        session.bench,
        session,
        "latency",
        "fail" if failed else names.get(verdict.outcome, str(verdict.outcome)),
        "latency" if failed else "none",
        reason,
        latency=stats.to_json(),
        round_trip=measurement.round_trip and measurement.round_trip.to_json(),
        conditions=conditions and conditions.to_json(),
        performance_mode=dict(session.plan.options).get("htp_performance_mode", "default") if on_htp else None,
        budget=asdict(budget),
    )
    if unstable and settings.strict_latency:
        raise DeviceUnstableError(unstable_message(session, measurement, record))
    if failed:
        raise LatencyError(latency_message(session, verdict, record), verdict)
    return verdict


# --- limits -----------------------------------------------------------------------------------------------------------


def _case(session: Session, spec: TensorSpec, argument: Tolerances | None) -> OutputCase:
    tolerance, source = _limits(session, spec.name, argument)
    executed = session.executed
    exact = spec.encoding is None and not spec.dtype.startswith(("float", "bfloat"))
    nominal = next((o.encoding.step for o in session.model.outputs if o.name == spec.name and o.encoding), None)
    _check_applies(session, spec, tolerance, nominal)
    return OutputCase(
        name=spec.name,
        evidence=Evidence(
            step=spec.encoding.step if spec.encoding else None, has_float=_float_source(session) is not None
        ),
        precision=session.unquantized_precision,
        bounded=spec.name in executed.bounded_outputs,
        exact=exact,
        tolerance=tolerance,
        limits_from=source,
        nominal_step=nominal,
    )


def _check_applies(session: Session, spec: TensorSpec, tolerance: Tolerance | None, step: float | None) -> None:
    """A limit that can't apply to an output is the test's mistake, not the model's."""
    if tolerance is None:
        return
    what = f"{session.subject}: tolerance: output {spec.name!r}"
    if tolerance.steps is not None and step is None:
        raise OptionError(f"{what} isn't quantised, so it has no steps: give absolute, relative or sqnr_db instead")
    classes = spec.shape[-1] if spec.shape else 1
    if tolerance.top_k is not None and isinstance(classes, int) and classes <= tolerance.top_k:
        raise OptionError(f"{what} has {classes} classes (its last axis), so top_k={tolerance.top_k:g} says nothing")


def _limits(session: Session, output: str, argument: Tolerances | None) -> tuple[Tolerance | None, str]:
    """The nearest layer that says something about an output wins entirely."""
    if isinstance(argument, Tolerance):
        return argument, "argument"
    if argument is not None and output in argument:
        return argument[output], "argument"
    for mark in session.bench.test.tolerance_marks:
        if mark.get("output") in (None, output):
            return Tolerance.from_values({k: v for k, v in mark.items() if k != "output"}, "tolerance"), "marker"
    for rule in session.bench.settings.tolerances:
        if rule.matches(session.model.path.name, output, session.backend):
            return Tolerance.from_values(rule.values, "[[tool.pytest_qnn.tolerance]]"), "project configuration"
    return None, "derived"


def _check_names(argument: Tolerances | None, session: Session) -> None:
    known = [spec.name for spec in session.outputs]
    if argument is not None and not isinstance(argument, Tolerance):
        if not isinstance(argument, Mapping):
            raise UsageError(f"tolerance must be a Tolerance or a dict of them, got {argument!r}")
        for name, value in argument.items():
            if name not in known:
                raise OptionError(f"tolerance: {unknown_name('output', name, known)}")
            if not isinstance(value, Tolerance):
                raise UsageError(f"tolerance[{name!r}] must be a Tolerance, got {value!r}")
    for mark in session.bench.test.tolerance_marks:
        if mark.get("output") not in (None, *known):
            raise OptionError(f"tolerance mark: {unknown_name('output', mark['output'], known)}")
    name = session.model.path.name
    for rule in session.bench.settings.tolerances:
        fits = [output for output in known if rule.matches(name, output, session.backend)]
        if rule.matches(name, None, session.backend) and not fits:
            raise OptionError(f"[[tool.pytest_qnn.tolerance]]: {unknown_name('output', rule.output, known)} in {name}")


# --- references -------------------------------------------------------------------------------------------------------


def _float_source(session: Session) -> Model | None:
    """The model that gives f: the float original, else the QDQ model without its rounding; None where q itself is f."""
    if not session.executed.quantized or session.executed.context:
        return None
    return session.float_model or session.bench.references.without_rounding(session.executed)


def _float_name(session: Session, source: Model | None) -> str | None:
    if source is None:
        return session.executed.path.name
    return source.path.name if source is session.float_model else f"{session.model.path.name} without its rounding"


def references_of(run: Run) -> Iterator[tuple[dict[str, Array], dict[str, Array] | None]]:
    """The QDQ model's and the float reference's outputs (None: there is none) for each sample of a run, as real values.

    Raises:
        TargetError: a reference could not be computed.
    """
    session, references, float_source = run.session, run.session.bench.references, _float_source(run.session)
    for sample in run.samples:
        q, f = references.run(session.executed, sample, LEVEL, passing=run.passing), None
        if float_source is not None:
            converted = _as_float(sample, session, float_source)
            f = references.run(float_source, converted, LEVEL, passing=run.passing)
        yield (
            {spec.name: _real(q[spec.name], spec) for spec in session.outputs},
            None if f is None else {spec.name: _real(f[spec.name], spec) for spec in session.outputs},
        )


def _as_float(sample: dict[str, Array], session: Session, source: Model) -> dict[str, Array]:
    """The sample as the float model takes it: integers of a quantised input become the real values they stand for."""
    wanted = {spec.name: spec.dtype for spec in source.inputs}
    converted = {}
    for spec in session.inputs:
        array = sample[spec.name]
        if array.dtype.name != wanted.get(spec.name, array.dtype.name):
            array = _real(array, spec).astype(wanted[spec.name])
        converted[spec.name] = array
    return converted


def _real(array: Array, spec: TensorSpec) -> Array:
    """Real values: integers with an encoding are dequantised, ``scale * (q - zero_point)``; the rest stays as it is."""
    if spec.encoding is None or array.dtype.kind not in "iu":
        return array
    return spec.encoding.dequantize(array)


def require_placement(session: Session) -> None:
    """Refuse to judge what a backend computed where it did not compute all that it may be asked for.

    Raises:
        PlacementError: nodes ran on onnxruntime's CPU provider that ``allow_cpu`` of ``load`` doesn't name.
    """
    __tracebackhide__ = True
    if blocking := _not_allowed(session):
        _placement_failure(session, blocking)


# --- placement --------------------------------------------------------------------------------------------------------


def _not_allowed(session: Session) -> tuple[Misplaced, ...]:
    allowed = session.allow_cpu
    if isinstance(allowed, bool):
        return () if allowed else session.placement.misplaced
    return tuple(m for m in session.placement.misplaced if m.name not in allowed and m.op_type not in allowed)


def _placement_failure(session: Session, misplaced: tuple[Misplaced, ...]) -> None:
    __tracebackhide__ = True
    record = make_record(session.bench, session, "placement", "fail", "backend", str(misplaced[0]))
    raise PlacementError(placement_message(session, misplaced, record), session.placement)
