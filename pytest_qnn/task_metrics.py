"""Metrics of the task: is the model as good at its job on the backend as its reference is?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from pytest_qnn.assertions import not_allowed
from pytest_qnn.errors import InputError, OptionError, PlacementError, QnnError, TaskMetricError, UsageError
from pytest_qnn.model.tensors import digest_of_arrays
from pytest_qnn.records.bundle import store_bundle
from pytest_qnn.records.failure import placement_message, task_metric_message
from pytest_qnn.records.record import make_record
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.session import Run
from pytest_qnn.settings import unknown_name
from pytest_qnn.three_ways import float_outputs, float_source, quantized_outputs, real_values, reference_json
from pytest_qnn.verdict.bootstrap import (
    Difference,
    Indices,
    Parts,
    difference_of_function,
    difference_of_parts,
)
from pytest_qnn.verdict.task_metric import WORST_LOSS, NoWorse, TaskMetricVerdict, TaskOutcome, least_resamples

Outputs = Mapping[str, Array]
CorpusMetric = Callable[[list[dict[str, Array]], list[Any]], float]
ORDER_SHARE = 0.1  # of the margin: what the samples' order may change, as where equal scores are ranked as they come
DISTINCT_SHARE = 0.9  # real test sets have a few duplicates
RESAMPLES, RESAMPLES_OF_FUNCTION = 10_000, 2_000


@dataclass(frozen=True)
class SampleMetric:
    """A metric that adds up over samples: computed once for each of them, however often they are resampled.

    Attributes:
        name: for messages and records.
        parts: (numerator, denominator) of one sample's outputs and label; the metric is the sum of the numerators over the sum
            of the denominators.
        higher_is_better: which way it runs.
    """

    name: str
    parts: Callable[[Outputs, Any], tuple[float, float]]
    higher_is_better: bool = True


def per_sample(score: Callable[[Outputs, Any], float], *, higher_is_better: bool = True) -> SampleMetric:
    """The mean of a score that each sample has by itself.

    Args:
        score: of one sample's outputs (arrays by name) and its label.
    """
    return SampleMetric(_name(score), lambda outputs, label: (score(outputs, label), 1.0), higher_is_better)


def top_k(k: int = 1, *, output: str | None = None) -> SampleMetric:
    """The share of rows (all axes of an output but the last) whose class is among the k best of the last axis.

    A label is a class, or an array of them, one per row. Without labels the class is the reference's best one, which makes it
    the agreement with the reference. Of equal scores the first counts as better, as in ``argmax``; a row with NaN is a miss.

    Args:
        output: its name; needed where the model has several.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise OptionError(f"top_k: k must be a whole number of at least 1, got {k!r}")

    def parts(outputs: Outputs, label: Any) -> tuple[float, float]:
        scores = _only(outputs, output)
        if scores.ndim == 0 or scores.shape[-1] <= k:
            raise InputError(f"an output of shape {list(scores.shape)} has no more than {k} classes on its last axis")
        rows = scores.reshape(-1, scores.shape[-1]).astype(np.float64)
        if isinstance(label, Mapping):
            label = _only(label, output).argmax(-1)
        classes = np.asarray(label).reshape(-1)
        if classes.dtype.kind not in "iu" or classes.size != len(rows):
            raise InputError(
                f"a label must be a class (a whole number), or {len(rows)} of them: one per row of the output; got "
                f"{classes.dtype} of shape {list(np.shape(label))}"
            )
        if classes.min() < 0 or classes.max() >= rows.shape[1]:
            raise InputError(f"a label is {classes.min()} to {classes.max()}, but there are {rows.shape[1]} classes")
        own = np.take_along_axis(rows, classes[:, None], 1)
        earlier = np.arange(rows.shape[1]) < classes[:, None]
        better = ((rows > own) | ((rows == own) & earlier)).sum(1)
        hits = (better < k) & ~np.isnan(rows).any(1)
        return float(hits.sum()), float(len(rows))

    return SampleMetric(f"top_{k}", parts)


def word_error_rate(decode: Callable[[Outputs], str]) -> SampleMetric:
    """Word error rate: insertions, deletions and substitutions over the number of words that the labels have.

    Words are what ``str.split`` gives: case and punctuation are for ``decode`` and the labels to agree on. Without labels the
    reference's own text is the label.

    Args:
        decode: gives the text of one sample's outputs.
    """

    def parts(outputs: Outputs, label: Any) -> tuple[float, float]:
        spoken = decode(label) if isinstance(label, Mapping) else label
        heard = decode(outputs)
        for what, text in (("a label", spoken), ("what decode returns", heard)):
            if not isinstance(text, str):
                raise InputError(f"{what} must be a text, got {type(text).__name__}")
        return float(edit_distance(spoken.split(), heard.split())), float(len(spoken.split()))

    return SampleMetric("word_error_rate", parts, higher_is_better=False)


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """The least number of insertions, deletions and substitutions that make ``b`` of ``a`` (Levenshtein 1966)."""
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        current = [i]
        for j, right in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (left != right)))
        previous = current
    return previous[-1]


def assert_task_metric(
    run: Run,
    metric: CorpusMetric | SampleMetric,
    *,
    labels: Sequence[Any] | None = None,
    against: str = "float",
    margin: float = 0.5,
    confidence: float = 0.95,
    higher_is_better: bool | None = None,
    points: float = 100.0,
    worst_loss: float | None = None,
    resamples: int | None = None,
    seed: int = 0,
    strict: bool = True,
) -> TaskMetricVerdict:
    """A metric of the task is no worse on the backend than on the reference by more than ``margin``, and that is sure.

    The difference has a confidence interval (paired bootstrap; documentation: "Metrics of the task"). It passes if the whole
    interval is above ``-margin``, and fails if it is below. Else too few samples were given to tell, which isn't a pass.

    Args:
        run: what :meth:`Session.run` returned for the test set.
        metric: :func:`top_k`, :func:`word_error_rate`, :func:`per_sample`, or any function of all outputs (a list of dicts of
            arrays with real values, one dict per sample) and all labels that returns a number.
        labels: one per sample; without them those are the reference's own outputs, so that agreement is measured.
        against: "float": the float original's outputs; "quantized": the QDQ model's, on onnxruntime.
        margin: in points.
        confidence: of the two-sided interval: a metric that is really worse than the margin passes with half the rest at most.
        higher_is_better: which way the metric runs; default: as it says of itself, else up.
        points: how many points a metric of 1 is: 100 for a share of 1 (accuracy, mAP, WER), 1 for one in percent or in dB.
        worst_loss: what one sample can lose at most, in points: what samples that weren't seen may do. Default: 100, all of a
            share of 1, or more if a sample shows more. A smaller one needs fewer samples: give it only where you know.
        resamples: default: 10,000; 2,000 for a function of all outputs, which is called that often, twice.
        strict: whether *undecided* fails; else the verdict that is returned says it.

    Raises:
        TaskMetricError: worse, or undecided. Its ``verdict`` is the one that would have been returned.
        PlacementError: nodes ran on onnxruntime's CPU provider instead of the backend.
        UsageError: the metric raised, returned NaN, or depends on the samples' order or on chance.
        TargetError: the reference could not be computed.
    """
    __tracebackhide__ = True
    if not isinstance(run, Run):
        raise UsageError(f"assert_task_metric takes what session.run(...) returned, got {type(run).__name__}")
    session = run.session
    if resamples is None:
        usual = RESAMPLES if isinstance(metric, SampleMetric) else RESAMPLES_OF_FUNCTION
        resamples = max(usual, least_resamples(confidence))
    up = _direction(metric, higher_is_better)
    asked = NoWorse(against, margin, confidence, up, points, worst_loss, resamples, seed)
    if blocking := not_allowed(session):
        record = make_record(session.bench, session, "placement", "fail", "backend", str(blocking[0]))
        raise PlacementError(placement_message(session, blocking, record), session.placement)
    _check_distinct(run)
    ways = _ways(run, against)
    verdict = _compare(metric, ways, _labels(labels, ways.reference), asked)
    failed = verdict.outcome is TaskOutcome.FAIL or (strict and not verdict.ok)
    kept = store_bundle(run, None, str(verdict)) if verdict.outcome is TaskOutcome.FAIL else None
    record = make_record(
        session.bench,
        session,
        "task metric",
        "fail" if failed else str(verdict.outcome),
        verdict.blame,
        "" if verdict.ok else str(verdict),
        samples=verdict.samples,
        synthetic_inputs=run.synthetic,
        reference=reference_json(session),
        task_metric=verdict.to_json(),
        bundle=None if kept is None or kept.folder is None else str(kept.folder),
    )
    if failed:
        raise TaskMetricError(task_metric_message(session, verdict, record, kept.lines() if kept else ()), verdict)
    return verdict


# --- the metric of each way -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ways:
    """Outputs of each sample, as real values: the backend's, the reference's, and the QDQ reference's."""

    backend: list[dict[str, Array]]
    reference: list[dict[str, Array]]
    quantized: list[dict[str, Array]]


def _check_distinct(run: Run) -> None:
    """Refuse a test set made long by repeating it: the interval takes each sample for a new one."""
    distinct = len({digest_of_arrays(sample) for sample in run.samples})
    if distinct < DISTINCT_SHARE * len(run.samples):
        raise InputError(
            f"{run.session.subject}: only {distinct} of {len(run.samples)} samples are different: repeated ones prove nothing, "
            "leave them out"
        )


def _ways(run: Run, against: str) -> _Ways:
    session, specs = run.session, run.session.outputs

    def real(outputs: Outputs) -> dict[str, Array]:
        arrays = {spec.name: real_values(outputs[spec.name], spec).view() for spec in specs}
        for array in arrays.values():
            array.flags.writeable = False  # a metric that changes them would change what is judged next
        return arrays

    quantized = [real(quantized_outputs(session, sample)) for sample in run.samples]
    reference = quantized
    if against == "float" and float_source(session) is not None:
        reference = [real(float_outputs(session, sample)) for sample in run.samples]
    return _Ways([real(result) for result in run.results], reference, quantized)


def _labels(labels: Sequence[Any] | None, reference: list[dict[str, Array]]) -> list[Any]:
    if labels is None:
        return list(reference)
    try:
        if isinstance(labels, str | bytes | Mapping):
            raise TypeError
        listed = list(labels)
    except TypeError:
        raise InputError(f"labels must be a list with one label per sample, got {type(labels).__name__}") from None
    if len(listed) != len(reference):
        raise InputError(
            f"there are {len(listed)} labels for {len(reference)} samples: give one for each, in their order"
        )
    return listed


def _direction(metric: object, asked: bool | None) -> bool:
    if not callable(metric) and not isinstance(metric, SampleMetric):
        raise UsageError(
            f"a metric must be top_k(...), word_error_rate(...), per_sample(...) or a function of outputs and labels, got "
            f"{type(metric).__name__}"
        )
    own = metric.higher_is_better if isinstance(metric, SampleMetric) else True
    if isinstance(metric, SampleMetric) and asked is not None and asked is not own:
        raise OptionError(f"higher_is_better={asked} contradicts {metric.name}, where it is {own}: leave it out")
    return own if asked is None else bool(asked)


def _compare(metric: CorpusMetric | SampleMetric, ways: _Ways, labels: list[Any], asked: NoWorse) -> TaskMetricVerdict:
    name = _name(metric)
    found = (
        _compare_parts(metric, name, ways, labels, asked)
        if isinstance(metric, SampleMetric)
        else _compare_function(metric, name, ways, labels, asked)
    )
    scale = asked.points
    difference = Difference(*(scale * value for value in astuple(found.difference)))
    return TaskMetricVerdict(
        name,
        replace(asked, worst_loss=found.worst_loss),
        found.backend,
        found.reference,
        found.quantized,
        difference,
        len(labels),
    )


@dataclass(frozen=True)
class _Found:
    """The metric of each way, in its own unit; ``difference``: how much better the backend is; ``worst_loss``: in points."""

    backend: float
    reference: float
    quantized: float
    difference: Difference
    worst_loss: float


def _compare_parts(metric: SampleMetric, name: str, ways: _Ways, labels: list[Any], asked: NoWorse) -> _Found:
    found = {
        way: _parts(metric, outputs, labels, f"{name} on {told}")
        for way, told, outputs in (
            ("backend", "the backend's outputs", ways.backend),
            ("reference", "the reference's outputs", ways.reference),
            ("quantized", "the QDQ reference's outputs", ways.quantized),
        )
    }
    backend, reference = found["backend"], found["reference"]
    worst_loss = _worst_loss(backend, reference, asked, name)
    new, old = (backend, reference) if asked.higher_is_better else (reference, backend)
    difference = difference_of_parts(new, old, worst_loss / asked.points, asked.confidence, asked.resamples, asked.seed)
    return _Found(backend.value, reference.value, found["quantized"].value, difference, worst_loss)


def _parts(metric: SampleMetric, outputs: list[dict[str, Array]], labels: list[Any], what: str) -> Parts:
    rows = []
    for i, (one, label) in enumerate(zip(outputs, labels, strict=True)):
        try:
            numerator, denominator = metric.parts(one, label)
            row = float(numerator), float(denominator)
        except QnnError as error:
            raise type(error)(f"{what}, sample {i}: {error}") from error
        except Exception as error:
            raise UsageError(f"{what}, sample {i}: it raised {type(error).__name__}: {error}") from error
        if not all(map(math.isfinite, row)) or row[1] < 0:
            raise UsageError(
                f"{what}, sample {i}: it gave {row[0]:g}{'' if row[1] == 1 else f' of {row[1]:g}'}, which is no score: let it "
                "return a finite number for every output, also for one with NaN"
            )
        rows.append(row)
    columns = np.array(rows, np.float64)
    if not columns[:, 1].sum() > 0:
        raise UsageError(f"{what}: there is nothing to divide by: all labels are empty")
    return Parts(columns[:, 0], columns[:, 1])


def _worst_loss(backend: Parts, reference: Parts, asked: NoWorse, name: str) -> float:
    """What one sample can lose, in points; at least what one did."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = [np.where(p.denominator > 0, p.numerator / p.denominator, 0.0) for p in (backend, reference)]
    moved = asked.points * np.abs(scores[0] - scores[1])
    seen = float(moved.max())
    if asked.worst_loss is None:
        return max(WORST_LOSS, seen)
    if seen > asked.worst_loss * (1 + 1e-9):
        raise OptionError(
            f"{name}: sample {int(moved.argmax())} differs by {seen:g} points, more than worst_loss={asked.worst_loss:g} says is "
            "possible: raise it, or leave it out"
        )
    return asked.worst_loss


def _compare_function(metric: CorpusMetric, name: str, ways: _Ways, labels: list[Any], asked: NoWorse) -> _Found:
    everything = np.arange(len(labels))

    def value(outputs: list[dict[str, Array]], indices: Indices, what: str) -> float:
        try:
            returned = metric([outputs[i] for i in indices], [labels[i] for i in indices])
        except QnnError:
            raise
        except Exception as error:
            raise UsageError(f"{name} on {what}: it raised {type(error).__name__}: {error}") from error
        try:
            number = float(returned)
        except (TypeError, ValueError):
            raise UsageError(f"{name} on {what}: it returned {type(returned).__name__}, not a number") from None
        if not math.isfinite(number):
            raise UsageError(
                f"{name} on {what}: it returned {number}: let it give a finite number for any samples, also for a few of "
                "them, some more than once"
            )
        return number

    backend, reference, quantized = (
        value(outputs, everything, what)
        for outputs, what in (
            (ways.backend, "the backend's outputs"),
            (ways.reference, "the reference's outputs"),
            (ways.quantized, "the QDQ reference's outputs"),
        )
    )
    other = value(ways.backend, everything[::-1], "the backend's outputs in another order")
    if abs(backend - other) > max(ORDER_SHARE * asked.margin / asked.points, 1e-6 * abs(backend), 1e-9):
        raise UsageError(
            f"{name} gave {backend:.9g}, and {other:.9g} for the same samples in another order: a metric that depends on order "
            "or chance can't be resampled. Make each sequence one sample, and seed what is random"
        )
    sign = 1.0 if asked.higher_is_better else -1.0

    def difference(indices: Indices) -> float:
        resample = f"a resample of {len(indices)} of the"
        new = value(ways.backend, indices, f"{resample} backend's outputs")
        return sign * (new - value(ways.reference, indices, f"{resample} reference's outputs"))

    worst_loss = WORST_LOSS if asked.worst_loss is None else asked.worst_loss
    found = difference_of_function(
        difference, len(labels), worst_loss / asked.points, asked.confidence, asked.resamples, asked.seed
    )
    return _Found(backend, reference, quantized, found, worst_loss)


def _only(outputs: Outputs, name: str | None) -> Array:
    if name is not None:
        if name not in outputs:
            raise OptionError(unknown_name("output", name, outputs))
        return outputs[name]
    if len(outputs) != 1:
        raise OptionError(f"name one of the outputs with output=: {', '.join(outputs)}")
    return next(iter(outputs.values()))


def _name(metric: object) -> str:
    return str(getattr(metric, "name", None) or getattr(metric, "__name__", None) or type(metric).__name__)
