"""The assertions. Each returns the verdict that it judged, and leaves a record of it, whatever it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from pytest_qnn.errors import (
    AccuracyError,
    CompileError,
    DeviceUnstableError,
    InputError,
    LatencyError,
    LayerError,
    ModelError,
    OptionError,
    PlacementError,
    TargetError,
    UsageError,
)
from pytest_qnn.layers.envelope import draws_each, spread
from pytest_qnn.layers.judge import judge_layers
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.records.bundle import store_bundle
from pytest_qnn.records.failure import (
    accuracy_message,
    latency_message,
    layer_line,
    layers_lines,
    layers_message,
    placement_message,
    unstable_message,
)
from pytest_qnn.records.record import make_record
from pytest_qnn.runners.placement import Misplaced, Placement
from pytest_qnn.session import Inputs, Measurement, Run, Session
from pytest_qnn.settings import unknown_name
from pytest_qnn.three_ways import add_sample, output_case, reference_json, references_of
from pytest_qnn.verdict.judge import AccuracyVerdict, OutputCase, judge
from pytest_qnn.verdict.latency import LatencyBudget, LatencyVerdict, Outcome, judge_latency
from pytest_qnn.verdict.layer_rule import LayersVerdict
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
    verdict = _judge(run, cases, not run.passing)
    failed = verdict.failed
    layers, starts_at = _where_it_starts(run, verdict)
    reason = f"output {failed[0].name!r}: {failed[0].failures[0]}" if failed else ""
    kept = None if verdict.ok else store_bundle(run, verdict, reason)
    record = make_record(
        session.bench,
        session,
        "accuracy",
        "pass" if verdict.ok else "fail",
        verdict.blame,
        reason,
        samples=len(run.samples),
        synthetic_inputs=run.synthetic,
        reference=reference_json(session),
        outputs=[o.to_json() for o in verdict.outputs],
        layers=layers and [layer.to_json() for layer in layers.layers],
        bundle=None if kept is None or kept.folder is None else str(kept.folder),
    )
    if not verdict.ok:
        raise AccuracyError(
            accuracy_message(session, verdict, record, starts_at, kept.lines() if kept else ()), verdict
        )
    return verdict


def assert_layers_match_reference(session: Session, inputs: Inputs | Sequence[Inputs]) -> LayersVerdict:
    """Every layer of a quantised model, computed alone from the reference's own tensors, is as exact as its operator can be.

    The model is cut at each quantised activation and compiled once more: one inference judges all layers, and none inherits anything
    from those before it. So a wrong layer shows however noisy the outputs are, and the first one is where it starts. The
    compiled model itself isn't what is run: what is wrong with how layers work together doesn't show here.

    Args:
        session: a model on a backend.
        inputs: as for :meth:`Session.run`; two to four inputs are enough.

    Returns:
        The verdict, one entry per layer.

    Raises:
        LayerError: a layer departs from the reference. Its ``verdict`` is the one that would have been returned.
        UsageError: what runs isn't quantised, or the inputs don't fit.
        TargetError: the backend could not compile or run the cut model, or the reference could not be computed.
    """
    __tracebackhide__ = True
    if isinstance(session, Run | Measurement):
        session = session.session
    if not isinstance(session, Session):
        raise UsageError(f"assert_layers_match_reference takes a session and inputs, got {type(session).__name__}")
    samples = session.check_samples(inputs)
    verdict = judge_layers(session.layered, samples)
    session.bench.note_run(session)
    record = make_record(
        session.bench,
        session,
        "layers",
        "pass" if verdict.ok else "fail",
        "none" if verdict.ok else "backend",
        "" if verdict.ok else layer_line(verdict.failed[0]),
        samples=verdict.samples,
        layers=[layer.to_json() for layer in verdict.layers],
    )
    if not verdict.ok:
        raise LayerError(layers_message(session, verdict, record), verdict)
    return verdict


def _where_it_starts(run: Run, verdict: AccuracyVerdict) -> tuple[LayersVerdict | None, list[str]]:
    """For a failure that the backend is blamed for: its layers alone, on one or two samples; whatever goes wrong is told."""
    session = run.session
    blamed = (
        not verdict.ok and verdict.blame == "backend" and session.executed.quantized and not session.executed.context
    )
    if not blamed or session.bench.settings.no_layers:
        return None, []
    worst = next((o.worst.sample for o in verdict.failed if o.worst is not None), 0)
    samples = [run.samples[k] for k in dict.fromkeys([worst, 0])]
    known_faults = len(session.bench.pool.faults)
    try:
        layers = judge_layers(session.layered, samples)
    except (CompileError, TargetError, ModelError, InputError, UsageError, PlacementError) as error:
        del session.bench.pool.faults[known_faults:]  # it has a verdict: what only explains it is no fault of the bench
        return None, [f"  layers: could not be judged alone: {str(error).partition(chr(10))[0][:300]}"]
    lines = layers_lines(layers, session.backend)
    if session.artifact.source == "given":
        lines.append(
            "  note: layers are compiled from the model, not taken from the artifact: where they are right, it isn't"
        )
    return layers, lines


def judge_run(run: Run, tolerance: Tolerances | None = None, *, envelope: bool | None = None) -> AccuracyVerdict:
    """The verdict of :func:`assert_matches_reference`, whatever it is and wherever the nodes ran; no record is left.

    Args:
        envelope: whether the rounding envelope is drawn, where there is one. Default: not for inputs that were drawn at random.

    Raises:
        TargetError: the reference could not be computed.
    """
    # a drawn sample is judged once and alone: the envelope would cost more than all the rest
    return _judge(run, _cases(run.session, tolerance), not run.passing if envelope is None else envelope)


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


def _judge(run: Run, cases: list[OutputCase], envelope: bool) -> AccuracyVerdict:
    derived = any(case.tolerance is None and case.evidence.step for case in cases)
    count = len(run.samples)
    chosen, each = set(spread(count)) if derived and envelope else set(), draws_each(count)
    for index, (sample, result) in enumerate(zip(run.samples, run.results, strict=True)):
        drawn = each if index in chosen else 0
        add_sample(cases, run.session.outputs, references_of(run.session, sample, drawn, run.passing), result)
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
    case = output_case(session, spec, tolerance, source)
    _check_applies(session, spec, tolerance, case.nominal_step)
    return case


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


def require_placement(session: Session) -> None:
    """Refuse to judge what a backend computed where it did not compute all that it may be asked for.

    Raises:
        PlacementError: nodes ran on onnxruntime's CPU provider that ``allow_cpu`` of ``load`` doesn't name.
    """
    __tracebackhide__ = True
    if blocking := not_allowed(session):
        _placement_failure(session, blocking)


# --- placement --------------------------------------------------------------------------------------------------------


def not_allowed(session: Session) -> tuple[Misplaced, ...]:
    """Nodes that ran on onnxruntime's CPU provider without being allowed to."""
    allowed = session.allow_cpu
    if isinstance(allowed, bool):
        return () if allowed else session.placement.misplaced
    return tuple(m for m in session.placement.misplaced if m.name not in allowed and m.op_type not in allowed)


def _placement_failure(session: Session, misplaced: tuple[Misplaced, ...]) -> None:
    __tracebackhide__ = True
    record = make_record(session.bench, session, "placement", "fail", "backend", str(misplaced[0]))
    raise PlacementError(placement_message(session, misplaced, record), session.placement)
