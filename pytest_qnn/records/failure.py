"""What a failed assertion says, on one screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_qnn.verdict.judge import AccuracyVerdict, OutputVerdict
from pytest_qnn.verdict.latency import LatencyVerdict
from pytest_qnn.verdict.task_metric import TaskMetricVerdict, TaskOutcome

if TYPE_CHECKING:
    from pytest_qnn.measuring import Attempt
    from pytest_qnn.records.record import Record
    from pytest_qnn.runners.placement import Misplaced
    from pytest_qnn.session import Measurement, Session
    from pytest_qnn.verdict.layer_rule import LayerFinding, LayersVerdict

SHOWN_OUTPUTS = 3
SHOWN_NODES = 12
SHOWN_LAYERS = 3
SHOWN_TESTS = 2  # of a layer

BLAME = {
    "quantization": "the quantisation: the QDQ model has lost the float model's result on onnxruntime already, before "
    "{backend} came in. Look at calibration data and bit widths",
    "graph-edge quantizer": "the graph-edge quantiser: all elements are off by about a step, as when the input or output is "
    "quantised or rounded another way. Compare with offload_graph_io_quantization=0",
    "backend": "the backend: {backend} departs from the QDQ reference by more than rounding explains",
    "backend of a float model": "the backend: {backend} computed in {precision}, and departs from the float reference by "
    "more than that precision explains",
    "limit": "the limit that was set: it is tighter than what quantising explains, and the derived rule would pass",
    "reference": "the reference: onnxruntime's own results differ between its optimisation levels as much as from "
    "{backend}; it can't decide this",
}


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def accuracy_message(
    session: Session,
    verdict: AccuracyVerdict,
    record: Record,
    starts_at: Sequence[str] = (),
    bundle_lines: Sequence[str] = (),
) -> str:
    """Which output, which limit, by how much, the worst element, where it starts, who is to blame, how to see it again."""
    failed = verdict.failed
    samples = f"{verdict.samples} sample{'s' if verdict.samples > 1 else ''}"
    lines = [
        f"{verdict.blame} to blame: {session.subject}: {len(failed)} of {len(verdict.outputs)} outputs fail, {samples}"
    ]
    for output in failed[:SHOWN_OUTPUTS]:
        lines += _output_lines(session, output)
    if len(failed) > SHOWN_OUTPUTS:
        lines.append(
            f"  and {len(failed) - SHOWN_OUTPUTS} more: {', '.join(o.name for o in failed[SHOWN_OUTPUTS:][:8])}"
        )
    lines += starts_at
    blame = verdict.blame
    if blame == "backend" and not session.executed.quantized:
        blame = "backend of a float model"
    if blame in BLAME:
        lines.append("  blame: " + BLAME[blame].format(backend=session.backend, precision=session.precision))
    reference = record["reference"]
    lines.append(
        f"  reference: onnxruntime {reference['version']} CPU, {reference['level']}, checked against "
        f"{reference['checked_against']}; float: {reference['float']}"
    )
    if record["synthetic_inputs"]:
        lines.append("  note: the inputs were made up; real data may fare better or worse")
    lines += [f"  note: {note}" for note in session.notes]
    return "\n".join([*lines, *_again(record), *bundle_lines])


def layers_lines(verdict: LayersVerdict, backend: str) -> list[str]:
    """Where it starts: the first layers that depart from the reference although their inputs are exact, or that none does."""
    total, failed = len(verdict.layers), verdict.failed
    if not total:
        return ["  layers: none of them ran on the backend once the model was cut: nothing is known of them"]
    if not failed:
        worst = max(verdict.layers, key=lambda layer: layer.excess)
        return [
            f"  layers: each of the {total} alone is as it should be (worst: {worst.name}, rms {worst.rms_steps:.2g} steps): what fails "
            f"comes from the whole: how {backend} fuses layers, its graph compiler, or small errors that add up"
        ]
    lines = [
        f"  layers: {len(failed)} of {total} depart from the reference although their inputs are exact; it starts at"
    ]
    lines += [f"    {layer_line(layer)}" for layer in failed[:SHOWN_LAYERS]]
    if len(failed) > SHOWN_LAYERS:
        lines.append(
            f"    and {len(failed) - SHOWN_LAYERS} more: {', '.join(f.name for f in failed[SHOWN_LAYERS:][:8])}"
        )
    return lines


def layer_line(layer: LayerFinding) -> str:
    """One layer: operator, name, tensor and what failed."""
    return f"{layer.kind} {layer.name!r} (tensor {layer.tensor!r}, {layer.bits} bits): {'; '.join(layer.failures[:SHOWN_TESTS])}"


def layers_message(session: Session, verdict: LayersVerdict, record: Record) -> str:
    """Which layers, by how much, how to see it again."""
    samples = f"{verdict.samples} sample{'s' if verdict.samples > 1 else ''}"
    lines = [
        f"backend to blame: {session.subject}: {len(verdict.failed)} of {len(verdict.layers)} layers fail, {samples}"
    ]
    lines += layers_lines(verdict, session.backend)
    lines.append(
        f"  reference: onnxruntime {session.bench.versions['onnxruntime']} CPU, each layer computed from its tensors: the QDQ model's"
    )
    return "\n".join(lines + _again(record))


def _output_lines(session: Session, output: OutputVerdict) -> list[str]:
    f = output.figures
    unit = f", step {output.step:.4g}" if output.step else ""
    limits = f"limits: {output.limits_from}" + (f" ({output.tolerance})" if output.tolerance else "")
    lines = [f"  output {output.name!r}{unit}, {limits}"]
    lines += [f"    {failure}" for failure in output.failures]
    if (worst := output.worst) is not None:
        steps = f" ({(worst.y - worst.q) / output.step:+.1f} steps)" if output.step else ""
        real = f"float {worst.f:.6g}, " if worst.f is not None else ""
        name = "QDQ" if session.executed.quantized else "reference"
        lines.append(
            f"    worst element: sample {worst.sample} {list(worst.index)}: {real}{name} {worst.q:.6g}, "
            f"{session.backend} {worst.y:.6g}{steps}"
        )
    if f.get("sqnr_quantized_db") is not None:
        lines.append(
            f"    SQNR: QDQ against float {f['sqnr_quantized_db']:.1f} dB, {session.backend} against float "
            f"{f['sqnr_db']:.1f} dB, {session.backend} against QDQ {f['sqnr_against_quantized_db']:.1f} dB"
        )
    else:
        lines.append(f"    SQNR: {session.backend} against the reference {f['sqnr_db']:.1f} dB")
    if f.get("mean_steps") is not None:
        lines.append(
            f"    y-q: mean {f['mean_steps']:+.3g}, rms {f['rms_steps']:.3g}, max {f['max_steps']:.3g} steps; "
            f"{_percent(f['beyond_one_step'] or 0)} beyond one step; gain {f['gain']:.4f}; cosine {f['cosine']:.5f}"
        )
    lines += [f"    note: {warning}" for warning in output.warnings]
    return lines


def placement_message(session: Session, misplaced: Sequence[Misplaced], record: Record) -> str:
    """Each node that did not run where it was asked to, and why."""
    lines = [
        f"{session.subject}: {len(misplaced)} of {session.placement.total} nodes did not run on {session.backend}:"
    ]
    lines += [f"  {node}" for node in misplaced[:SHOWN_NODES]]
    if len(misplaced) > SHOWN_NODES:
        lines.append(f"  and {len(misplaced) - SHOWN_NODES} more")
    operators = sorted({node.op_type for node in misplaced})
    lines.append(
        f"  They ran on onnxruntime's CPU provider. Replace these operators, or, if that is meant, load the model with "
        f"allow_cpu={operators!r} to judge its accuracy all the same"
    )
    return "\n".join(lines + _again(record))


def latency_message(session: Session, verdict: LatencyVerdict, record: Record) -> str:
    """Each limit with the interval that was measured."""
    stats = verdict.stats
    lines = [
        f"{session.subject}: latency {verdict.outcome} budget, {stats.samples} samples after {stats.warmup} warm-up runs"
    ]
    lines += [f"  {limit}" for limit in verdict.limits]
    if abs(stats.drift - 1) > 0.1:
        lines.append(
            f"  the second half of the samples took {stats.drift:.2f} times as long as the first: the host was not at rest"
        )
    if session.plan.not_a_device:
        lines.append(f"  {session.plan.not_a_device}; judged because of --qnn-simulated-latency")
    return "\n".join(lines + _again(record))


def task_metric_message(
    session: Session, verdict: TaskMetricVerdict, record: Record, bundle_lines: Sequence[str] = ()
) -> str:
    """How much worse, how sure that is, whose fault, or how many samples would tell."""
    d, asked = verdict.difference, verdict.asked
    samples = f"{verdict.samples} sample{'s' if verdict.samples > 1 else ''}"
    if verdict.outcome is TaskOutcome.UNDECIDED:
        head = f"too few samples: {session.subject}: {verdict.metric} is undecided, {samples}"
    else:
        head = f"{verdict.blame} to blame: {session.subject}: {verdict.metric} is worse by more than {asked.margin:g} points, {samples}"
    name = "QDQ" if session.executed.quantized else "reference"
    real = f"float {verdict.reference:.6g}, " if asked.against == "float" and session.executed.quantized else ""
    lines = [
        head,
        f"  {verdict.metric}: {real}{name} {verdict.quantized:.6g}, {session.backend} {verdict.value:.6g} "
        f"({'higher' if asked.higher_is_better else 'lower'} is better; 1 is {asked.points:g} points)",
        f"  against {asked.against}: {d.value:+.4g} points, {100 * asked.confidence:g}% interval [{d.low:+.4g}, {d.high:+.4g}], must "
        f"lie above -{asked.margin:g}",
        f"  bootstrap of pairs (BCa), {asked.resamples} resamples, seed {asked.seed}, worst loss of a sample "
        f"{asked.worst_loss:g} points",
    ]
    if verdict.outcome is TaskOutcome.UNDECIDED:
        needed = verdict.needed
        lines.append(
            f"  about {needed:,} samples like these would decide it; else ask for a wider margin"
            if needed is not None
            else "  no number of samples would decide it: the difference is as good as the margin"
        )
    if record["synthetic_inputs"]:
        lines.append("  note: the inputs came from qnn_inputs; a metric of the task says nothing on them")
    lines += [f"  note: {note}" for note in session.notes]
    return "\n".join([*lines, *_again(record), *bundle_lines])


def unstable_message(session: Session, measurement: Measurement, record: Record) -> str:
    """What the device did instead of being steady, attempt by attempt, and what to do."""
    conditions = measurement.conditions
    assert conditions is not None
    attempts = conditions.attempts
    tried = "one attempt" if len(attempts) == 1 else f"each of {len(attempts)} attempts"
    lines = [
        f"{session.subject}: the device {conditions.assessment.stability} in {tried}, so its latency says nothing:"
    ]
    lines += [_attempt_line(number, attempt) for number, attempt in enumerate(attempts, 1)]
    lines.append(
        "  Let it cool, keep other programs and its charger away from it, raise the setting cool_down, or ask for less with "
        "htp_performance_mode=sustained_high_performance; with a lower max_seconds it heats up less"
    )
    return "\n".join(lines + _again(record))


def _attempt_line(number: int, attempt: Attempt) -> str:
    cooled = f" after {attempt.cooled_seconds:.0f} s of cooling down" if attempt.cooled_seconds >= 1 else ""
    return (
        f"  attempt {number}{cooled}: {attempt.samples} samples, p50 {attempt.p50_ms:.3f} ms: "
        f"{'; '.join(attempt.assessment.reasons)}"
    )


def conditions_line(conditions: Mapping[str, Any]) -> str:
    """One line about a latency that could not be decided, or was decided on latencies alone; empty where all was well.

    Args:
        conditions: of a record.
    """
    attempts = len(conditions["attempts"])
    reasons = "; ".join(conditions["reasons"][:2])
    if conditions["stability"] in ("throttled", "drifted"):
        tried = "" if attempts == 1 else f" in the last of {attempts} attempts"
        return f"latency undecided, the device {conditions['stability']}{tried}: {reasons}"
    if conditions["stability"] == "unknown":
        return f"latency judged by its steadiness alone: {reasons}"
    return ""


def _again(record: Record) -> list[str]:
    return [f"  again: {record['repeat']}"] if record["repeat"] else []
