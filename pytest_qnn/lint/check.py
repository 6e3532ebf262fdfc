"""Running the rules: ``lint`` as data, ``assert_lint_clean`` for tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from pytest_qnn.errors import CompileError, LintError, PlacementError, TargetError, UsageError
from pytest_qnn.lint import encodings, observed, structure
from pytest_qnn.lint.findings import BACKEND, DATA, RULES, Finding, LintReport, check_ignores, describe, sort_out
from pytest_qnn.lint.graph import Graph
from pytest_qnn.model.graph_encodings import QUANTIZERS
from pytest_qnn.model.onnx_file import Model, read_model
from pytest_qnn.quantization.calibration import open_calibration_data
from pytest_qnn.runners.placement import NO_REASON, Misplaced, Placement
from pytest_qnn.runners.process import Limits, ProcessPool
from pytest_qnn.session import Session
from pytest_qnn.settings import Settings

if TYPE_CHECKING:
    from pytest_qnn.backend import Backend
    from pytest_qnn.bench import Bench

MOST_SAMPLES = 32  # that data rules look at: they are kept in memory

OF_MODEL: tuple[Callable[[Graph], Iterator[Finding]], ...] = (
    structure.dynamic_shape,
    structure.rank,
    encodings.signed_16bit,
    encodings.weight_type,
    encodings.fixed_encoding,
    structure.clip_lost,
    structure.bias_rounded,
    structure.silu_fused,
    encodings.weight_range,
    encodings.unused_range,
    encodings.concat_range,
    structure.float_island,
    structure.float_constant,
    structure.unfused_batchnorm,
    structure.unfused_activation,
)
OF_DATA: tuple[Callable[[Graph, observed.Observations], Iterator[Finding]], ...] = (
    observed.activation_clipped,
    observed.unused_range_on_data,
    observed.activation_noise,
    observed.float16_overflow,
)

FilePath = str | os.PathLike[str]


def assert_lint_clean(
    model: FilePath | Session,
    ignore: Iterable[str] = (),
    data: object = None,
    *,
    backend: Backend | None = None,
    dimensions: Mapping[str, int] | None = None,
) -> LintReport:
    """Lint finds nothing in the model but what is ignored; see :func:`lint` for the arguments.

    Raises:
        LintError: names each finding with node, reason, remedy and how to ignore it.
        ModelError, InputError, OptionError: as for :func:`lint`; also an ignore that fits no finding.
        TargetError: the runtime died, hung or ran out of memory.
    """
    __tracebackhide__ = True
    report = lint(model, ignore=ignore, data=data, backend=backend, dimensions=dimensions)
    if report.fault is not None:
        raise report.fault
    if not report.ok:
        raise LintError("\n".join(describe(report)), report)
    return report


def lint(
    model: FilePath | Session,
    *,
    ignore: Iterable[str] = (),
    data: object = None,
    backend: Backend | None = None,
    dimensions: Mapping[str, int] | None = None,
    without_backend: str = "needs a backend to compile on",
) -> LintReport:
    """What makes a model quantise or run badly on HTP.

    Args:
        model: an ONNX file, or a session that has it loaded on htp: its placement is known already.
        ignore: what not to report: ``"rule"`` or ``"rule:node"``.
        data: samples for the rules that need some, as for :func:`~pytest_qnn.quantization.calibration.open_calibration_data`: a
            folder or file, a list of dicts of arrays, ``"module:function"``. The first 32 are looked at.
        backend: an htp backend to compile the model on, for the rules about what really happens there.
        dimensions: sizes for named dynamic dimensions, e.g. ``{"batch": 1}``.
        without_backend: what the report says of rules that need a backend where there is none.

    Returns:
        The report. Its ``fault`` is set if the runtime failed while the model was compiled.

    Raises:
        ModelError: the model can't be read.
        OptionError: an unknown rule, or an ignore that fits nothing.
        InputError: data that doesn't fit the model.
        TargetError: the runtime died, hung or ran out of memory while the model ran on data.
    """
    ignored = check_ignores(ignore)
    source, bench = _source(model, backend, dimensions)
    graph = Graph(source)
    found = [finding for rule in OF_MODEL for finding in rule(graph)]
    not_checked: dict[str, str] = {}
    if graph.has_subgraphs:
        not_checked |= {"(subgraphs)": "nodes inside of If, Loop and Scan are not looked at"}
    if data is None:
        not_checked |= _needing(DATA, "needs data")
    elif any(spec.unbound for spec in source.inputs):
        not_checked |= _needing(DATA, "needs fixed shapes")
    else:
        found += _on_data(graph, data, bench)
    fault = None
    if isinstance(model, Session):
        found += _misplaced(model.placement)
    elif backend is None:
        not_checked |= _needing(BACKEND, without_backend)
    elif any(spec.unbound for spec in source.inputs):
        not_checked |= _needing(BACKEND, "needs fixed shapes")
    else:
        try:
            found += _compiled(source, backend)
        except TargetError as error:
            fault = error
            not_checked |= _needing(BACKEND, str(error).splitlines()[0])
    return sort_out(source.path.name, found, ignored, not_checked, fault)


def _source(
    model: FilePath | Session, backend: Backend | None, dimensions: Mapping[str, int] | None
) -> tuple[Model, Bench | None]:
    if isinstance(model, Session):
        if backend is not None or dimensions is not None:
            raise UsageError(
                "lint: a session brings its own backend and dimensions: leave them out, or pass the model's path"
            )
        if model.backend != "htp":
            raise UsageError(f"lint is about htp, this session is on {model.backend}: pass the model's path")
        return model.model, model.bench
    if not isinstance(model, str | os.PathLike):
        raise UsageError(f"lint takes the path of a model or a session, got {type(model).__name__}")
    if backend is None:
        return read_model(model, dimensions), None
    if backend.name != "htp":
        raise UsageError(f"lint is about htp, this backend is {backend.name}: leave it out, or pass an htp one")
    return read_model(backend.bench.locate(model), dimensions), backend.bench


def _needing(what: str, reason: str) -> dict[str, str]:
    return {name: reason for name, rule in RULES.items() if rule.needs == what}


def _on_data(graph: Graph, data: object, bench: Bench | None) -> list[Finding]:
    samples = list(open_calibration_data(data, graph.model.inputs, MOST_SAMPLES))
    with ExitStack() as stack:
        pool = stack.enter_context(closing(ProcessPool())) if bench is None else bench.pool
        defaults = Settings()
        limits = Limits(defaults.load_timeout, defaults.run_timeout, defaults.memory_limit_mb)
        seen = observed.observe(graph, samples, pool, limits if bench is None else bench.limits)
    found = [finding for rule in OF_DATA for finding in rule(graph, seen)]
    return found + list(observed.int64_overflow(graph, samples))


def _compiled(model: Model, backend: Backend) -> list[Finding]:
    """What a compile shows.

    Raises:
        TargetError: the runtime died, hung or ran out of memory.
    """
    try:
        return _misplaced(backend.load(model.path, dimensions=dict(model.dimensions)).placement)
    except PlacementError as error:
        if error.verdict is not None:
            return _misplaced(error.verdict)
        reason = str(error)
    except CompileError as error:
        reason = str(error)
    remedy = "see the other findings, and cut the model down to the node that is named (onnx.utils.extract_model)"
    return [Finding("refused", model.path.name, "model", " ".join(reason.split())[:600], remedy)]


def _misplaced(placement: Placement) -> list[Finding]:
    """A finding for each node off the backend. Quantisers that merely went with their operator aren't named."""
    told = [m.reason for m in placement.misplaced if m.reason != NO_REASON]
    nodes = [m for m in placement.misplaced if m.op_type not in QUANTIZERS] or list(placement.misplaced)
    return [
        Finding(
            "falls-back",
            node.name or node.op_type,
            node.op_type,
            "it runs on the CPU: " + next((r for r in (node.reason, *told) if _is_about(r, node)), node.reason),
            "replace the operator by ones that HTP takes, or see to it that it needn't: the reason is QNN's own",
        )
        for node in nodes
    ]


def _is_about(reason: str, node: Misplaced) -> bool:
    return reason != NO_REASON and (reason == node.reason or f"`{node.name}`" in reason)
