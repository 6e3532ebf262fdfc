"""Two models that must agree: one of another batch size, of a larger input, of the other layout; and one model on several SoCs.

Each is a :class:`Relation`: how the first model's inputs become the second's, and how the second's outputs become those that
the first should have given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pytest_qnn.backend import Backend
from pytest_qnn.devices.soc import SOCS, find_soc
from pytest_qnn.errors import OptionError, UsageError
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.properties.differences import violations
from pytest_qnn.properties.invariants import InvariantVerdict, Samples, as_list, conclude
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.session import Session

Arrays = dict[str, Array]
# Architectures whose simulated results are bit-identical; measured with QAIRT 2.51, tests/properties/test_relations.py
ARCH_GROUPS = ((68, 69), (73, 75, 79, 81))


@dataclass(frozen=True)
class Relation:
    """What one model's inputs and outputs have to do with another's.

    Attributes:
        name: for messages and records.
        inputs: the second model's input sets for the first's.
        outputs: from the second model's results to one for each of the first's, by the first's names and in its shapes.
    """

    name: str
    inputs: Callable[[Sequence[Mapping[str, Array]]], Sequence[Mapping[str, Array]]]
    outputs: Callable[[Sequence[Mapping[str, Array]]], Sequence[Mapping[str, Array]]]


def assert_related(
    first: Session, second: Session, samples: Samples, relation: Relation, steps: float = 1.0
) -> InvariantVerdict:
    """The second model gives what the first gives, as ``relation`` says, within ``steps`` of the first's outputs.

    Raises:
        InvariantError: it doesn't. UsageError: the relation doesn't fit the models. TargetError: the runtime failed.
    """
    __tracebackhide__ = True
    for session in (first, second):
        if not isinstance(session, Session):
            raise UsageError(f"{relation.name}: takes two sessions, got {type(session).__name__}")
    listed = as_list(samples)
    run = first.run_many(listed)
    other = second.run_many(list(relation.inputs(run.samples)))
    got = list(relation.outputs(other.results))[: len(listed)]
    if len(got) != len(listed):
        raise UsageError(f"{relation.name}: the relation made {len(got)} results of {len(listed)} samples")
    found = violations(first, run.results, got, steps, (f"in {first.model.path.name}", f"in {second.model.path.name}"))
    return conclude(run, InvariantVerdict(relation.name, len(listed), tuple(found)), listed)


def assert_batch_invariant(one: Session, many: Session, samples: Samples, steps: float = 1.0) -> InvariantVerdict:
    """A model with a larger batch (axis 0 of every input and output) gives each sample what the smaller one gives it.

    Args:
        one: the model with the smaller batch, whose inputs the samples are.
        many: the same with a batch that is a multiple of it.

    Raises:
        InvariantError, UsageError, TargetError: as for :func:`assert_related`.
    """
    __tracebackhide__ = True
    _check_same_names(one, many, "batch_invariant")
    times = {_ratio(spec, other, "batch_invariant") for spec, other in zip(_by_name(one), _by_name(many), strict=True)}
    if len(times) != 1:
        raise UsageError(f"batch_invariant: the batch of {many.subject} is not the same multiple for every tensor")
    (count,) = times
    names = [spec.name for spec in one.inputs]

    def inputs(given: Sequence[Mapping[str, Array]]) -> list[Arrays]:
        padded = [*given, *[given[-1]] * (-len(given) % count)]
        groups = [padded[i : i + count] for i in range(0, len(padded), count)]
        return [{name: np.concatenate([sample[name] for sample in group]) for name in names} for group in groups]

    def outputs(results: Sequence[Mapping[str, Array]]) -> list[Arrays]:
        return [
            {spec.name: np.split(result[spec.name], count)[i] for spec in one.outputs}
            for result in results
            for i in range(count)
        ]

    return assert_related(one, many, samples, Relation("batch_invariant", inputs, outputs), steps)


def assert_padding_invariant(
    small: Session, large: Session, samples: Samples, value: float = 0.0, border: int = 0, steps: float = 1.0
) -> InvariantVerdict:
    """A model with a larger input gives the same where the smaller one's output lies, whatever was padded at the ends.

    Args:
        small: whose inputs the samples are.
        large: the same model for larger inputs.
        value: what is padded, as a real number.
        border: elements at the padded end of each axis of an output that may feel the padding, and aren't compared.

    Raises:
        InvariantError, UsageError, TargetError: as for :func:`assert_related`.
    """
    __tracebackhide__ = True
    _check_same_names(small, large, "padding_invariant")
    for spec, other in zip(_by_name(small), _by_name(large), strict=True):
        if len(spec.shape) != len(other.shape) or any(a > b for a, b in zip(_sizes(spec), _sizes(other), strict=True)):
            raise UsageError(f"padding_invariant: {spec.describe()} doesn't fit into {other.describe()}")
    larger = {spec.name: spec for spec in large.inputs + large.outputs}

    def pad(spec: TensorSpec, array: Array) -> Array:
        filler: Any = value
        if spec.encoding is not None and array.dtype.kind in "iu":
            filler = int(spec.encoding.quantize(np.array(value, np.float32)))
        ends = [(0, b - a) for a, b in zip(array.shape, _sizes(larger[spec.name]), strict=True)]
        return np.pad(array, ends, constant_values=filler)

    def inputs(given: Sequence[Mapping[str, Array]]) -> list[Arrays]:
        return [{spec.name: pad(spec, sample[spec.name]) for spec in small.inputs} for sample in given]

    def outputs(results: Sequence[Mapping[str, Array]]) -> list[Arrays]:
        return [
            {spec.name: result[spec.name][tuple(slice(0, size) for size in _sizes(spec))] for spec in small.outputs}
            for result in results
        ]

    if not border:
        return assert_related(small, large, samples, Relation("padding_invariant", inputs, outputs), steps)
    listed = as_list(samples)
    run = small.run_many(listed)
    cropped = outputs(large.run_many(inputs(run.samples)).results)

    def inner(result: Mapping[str, Array]) -> Arrays:
        return {spec.name: _inner(spec, larger[spec.name], result[spec.name], border) for spec in small.outputs}

    kept, got = [inner(result) for result in run.results], [inner(result) for result in cropped]
    found = violations(small, kept, got, steps, (f"in {small.model.path.name}", f"in {large.model.path.name}"))
    return conclude(run, InvariantVerdict("padding_invariant", len(listed), tuple(found)), listed)


def _inner(spec: TensorSpec, larger: TensorSpec, array: Array, border: int) -> Array:
    """The array without ``border`` elements at the end of the axes that are longer in the larger model."""
    grown = [a != b for a, b in zip(_sizes(spec), _sizes(larger), strict=True)]
    return array[tuple(slice(0, max(n - border, 0) if g else n) for n, g in zip(array.shape, grown, strict=True))]


def assert_layout_invariant(
    first: Session, second: Session, samples: Samples, order: Sequence[int] = (0, 2, 3, 1), steps: float = 1.0
) -> InvariantVerdict:
    """A model of another layout gives the same. Inputs and outputs are matched by their order, so names may differ.

    Args:
        first: whose inputs the samples are.
        second: the same model with the axes of its tensors in another order.
        order: axes of the first's tensors as the second has them, e.g. NCHW to NHWC; tensors of another rank stay as they are.

    Raises:
        InvariantError, UsageError, TargetError: as for :func:`assert_related`.
    """
    __tracebackhide__ = True
    axes = tuple(order)
    if sorted(axes) != list(range(len(axes))):
        raise OptionError(f"order must have each axis once, got {axes}")
    back = tuple(int(i) for i in np.argsort(axes))
    if len(first.inputs) != len(second.inputs) or len(first.outputs) != len(second.outputs):
        raise UsageError(
            f"layout_invariant: {second.subject} has another number of inputs or outputs than {first.subject}"
        )
    for spec, other in zip(first.inputs + first.outputs, second.inputs + second.outputs, strict=True):
        sizes = _sizes(spec)
        if (tuple(sizes[i] for i in axes) if len(sizes) == len(axes) else sizes) != _sizes(other):
            raise UsageError(
                f"layout_invariant: {other.describe()} is not {spec.describe()} with its axes in order {axes}"
            )

    def turned(array: Array, by: tuple[int, ...]) -> Array:
        return np.ascontiguousarray(array.transpose(by)) if array.ndim == len(by) else array

    def inputs(given: Sequence[Mapping[str, Array]]) -> list[Arrays]:
        pairs = list(zip(first.inputs, second.inputs, strict=True))
        return [{other.name: turned(sample[spec.name], axes) for spec, other in pairs} for sample in given]

    def outputs(results: Sequence[Mapping[str, Array]]) -> list[Arrays]:
        pairs = list(zip(first.outputs, second.outputs, strict=True))
        return [{spec.name: turned(result[other.name], back) for spec, other in pairs} for result in results]

    return assert_related(first, second, samples, Relation("layout_invariant", inputs, outputs), steps)


def assert_equal_across_socs(
    backend: Backend,
    model: str | os.PathLike[str],
    samples: Samples,
    socs: Sequence[str] | None = None,
    steps: float = 0.0,
    **load: Any,
) -> tuple[InvariantVerdict, ...]:
    """SoCs of one group of architectures give the same: v68 and v69, and those from v73 on.

    Args:
        socs: names; default: one for each architecture.
        steps: by how much outputs may differ; 0: not in a bit.
        **load: for ``backend.load``.

    Returns:
        A verdict for each SoC but the first of each group, which the others are compared with.

    Raises:
        InvariantError: they don't. UsageError: no two SoCs belong to one group. TargetError: the runtime failed.
    """
    __tracebackhide__ = True
    chosen = (
        [find_soc(name) for name in socs]
        if socs is not None
        else list({soc.htp_arch: soc for soc in reversed(SOCS.values())}.values())
    )
    groups = [[soc for soc in chosen if soc.htp_arch in archs] for archs in ARCH_GROUPS]
    if all(len(group) < 2 for group in groups):
        raise UsageError(
            f"equal_across_socs: no two of {', '.join(soc.name for soc in chosen)} belong to one group of architectures: "
            "name others"
        )
    listed = as_list(samples)
    verdicts = []
    for group in groups:
        runs = []
        for soc in group if len(group) > 1 else []:
            session = backend.load(model, soc=soc.name, **load)
            runs.append(session.run_many(listed))
            session.close()
        for soc, run in zip(group[1:], runs[1:], strict=False):
            found = violations(
                run.session, runs[0].results, run.results, steps, (f"on {group[0].name}", f"on {soc.name}")
            )
            verdicts.append(conclude(run, InvariantVerdict("equal_across_socs", len(listed), tuple(found)), listed))
    return tuple(verdicts)


# --- parts ------------------------------------------------------------------------------------------------------------


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(int(size) for size in spec.shape)


def _by_name(session: Session) -> list[TensorSpec]:
    return sorted(session.inputs + session.outputs, key=lambda spec: spec.name)


def _check_same_names(first: Session, second: Session, name: str) -> None:
    ours, theirs = ([spec.name for spec in _by_name(session)] for session in (first, second))
    if ours != theirs:
        raise UsageError(
            f"{name}: {second.subject} has tensors {theirs}, {first.subject} has {ours}: they aren't one model"
        )


def _ratio(spec: TensorSpec, other: TensorSpec, name: str) -> int:
    ours, theirs = _sizes(spec), _sizes(other)
    if not ours or ours[1:] != theirs[1:] or theirs[0] % ours[0]:
        raise UsageError(f"{name}: {other.describe()} is not a batch of several {spec.describe()}")
    return theirs[0] // ours[0]
