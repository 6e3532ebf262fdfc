"""What lint found, and what of it a user chose to ignore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_qnn.errors import OptionError, TargetError
from pytest_qnn.settings import unknown_name

ERROR, WARNING = "error", "warning"
MODEL, DATA, BACKEND = "the model", "data", "a backend"


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        severity: "error": nodes are refused, leave the backend or compute something wrong; "warning": it costs accuracy or
            time.
        summary: what it finds.
        needs: what it looks at: MODEL (the file alone), DATA (samples too), or BACKEND (a compile too).
    """

    severity: str
    summary: str
    needs: str = MODEL


RULES: Mapping[str, Rule] = {
    "dynamic-shape": Rule(ERROR, "an input without fixed shape"),
    "rank": Rule(ERROR, "tensors of more than five dimensions"),
    "signed-16bit": Rule(ERROR, "signed 16-bit activations where HTP takes none"),
    "weight-type": Rule(ERROR, "weights of a bit width that the operator doesn't take with these activations"),
    "fixed-encoding": Rule(ERROR, "16-bit Sigmoid, HardSigmoid or Tanh whose encoding isn't the one that HTP writes"),
    "clip-lost": Rule(ERROR, "a Clip that HTP fuses into the operator before it, and whose bounds get lost"),
    "bias-rounded": Rule(ERROR, "a bias added after a ConvTranspose, which HTP rounds to whole numbers"),
    "silu-fused": Rule(ERROR, "a 16-bit Conv and SiLU that HTP fuses and computes wrong at this size"),
    "weight-range": Rule(WARNING, "per-tensor weights whose scale is too coarse for some channels"),
    "unused-range": Rule(WARNING, "encodings much wider than the values"),
    "concat-range": Rule(WARNING, "a Concat whose output encoding is too coarse for one of its inputs"),
    "float-island": Rule(WARNING, "nodes between quantised ones that run in float"),
    "float-constant": Rule(WARNING, "constants stored as float beside quantised activations"),
    "unfused-batchnorm": Rule(WARNING, "a BatchNormalization quantised apart from the Conv before it"),
    "unfused-activation": Rule(WARNING, "a Relu or Clip quantised apart from the operator before it"),
    "activation-clipped": Rule(WARNING, "activations beyond the range of their encoding", DATA),
    "activation-noise": Rule(WARNING, "activations that eight bits are too few for", DATA),
    "float16-overflow": Rule(ERROR, "activations of a float model beyond float16's range", DATA),
    "int64-overflow": Rule(ERROR, "64-bit inputs beyond the range of 32 bits", DATA),
    "refused": Rule(ERROR, "a model that the backend's compiler refuses", BACKEND),
    "falls-back": Rule(ERROR, "nodes that don't run on the backend", BACKEND),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        rule: id of the rule.
        node: name of the node; of a nameless one its first output; of a graph input its name.
        op_type: operator; "input" for a graph input, "model" for the model as a whole.
        reason: what is wrong, with its figures.
        remedy: what to do.
    """

    rule: str
    node: str
    op_type: str
    reason: str
    remedy: str

    @property
    def severity(self) -> str:
        """ "error" or "warning"; see :class:`Rule`."""
        return RULES[self.rule].severity

    @property
    def key(self) -> str:
        """What ignores this finding and no other."""
        return f"{self.rule}:{self.node}"

    def to_json(self) -> dict[str, str]:
        """As JSON data."""
        return {
            "rule": self.rule,
            "severity": self.severity,
            "node": self.node,
            "op_type": self.op_type,
            "reason": self.reason,
            "remedy": self.remedy,
            "ignore": self.key,
        }


@dataclass(frozen=True)
class LintReport:
    """What lint says of a model.

    Attributes:
        model: name of its file.
        findings: those that weren't ignored, errors first.
        ignored: the others.
        not_checked: rule -> why it could not be checked.
        fault: what went wrong with the runtime while it compiled the model.
    """

    model: str
    findings: tuple[Finding, ...]
    ignored: tuple[Finding, ...]
    not_checked: Mapping[str, str]
    fault: TargetError | None = None

    def __repr__(self) -> str:
        return f"<LintReport of {self.model}: {len(self.findings)} findings, {len(self.ignored)} ignored>"

    @property
    def ok(self) -> bool:
        """Whether nothing was found but what was ignored, and the runtime did not fail."""
        return not self.findings and self.fault is None

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "model": self.model,
            "ok": self.ok,
            "findings": [f.to_json() for f in self.findings],
            "ignored": [f.to_json() for f in self.ignored],
            "not_checked": dict(self.not_checked),
            "fault": None if self.fault is None else str(self.fault),
        }


def check_ignores(ignore: Iterable[str]) -> tuple[str, ...]:
    """``ignore`` as a tuple of ``rule`` or ``rule:node``.

    Raises:
        OptionError: not a list of texts, or an unknown rule.
    """
    if isinstance(ignore, str) or not isinstance(ignore, Iterable):
        raise OptionError(
            f"ignore takes a list such as ['rank', 'weight-range:conv1'], got {ignore!r}: put it in a list"
        )
    checked = tuple(dict.fromkeys(ignore))
    for entry in checked:
        if not isinstance(entry, str):
            raise OptionError(f"ignore: {entry!r} is no text: write 'rule' or 'rule:node'")
        rule = entry.partition(":")[0]
        if rule not in RULES:
            raise OptionError(f"ignore: {unknown_name('rule', rule, RULES)}")
    return checked


def sort_out(
    model: str,
    found: Sequence[Finding],
    ignore: Sequence[str],
    not_checked: Mapping[str, str],
    fault: TargetError | None = None,
) -> LintReport:
    """The report, with ignored findings apart.

    Raises:
        OptionError: an ignore that fits no finding although its rule was checked: it is stale or misspelt, and would hide
            the next finding of that name.
    """
    for entry in ignore:
        rule, _, node = entry.partition(":")
        fitting = [f for f in found if f.rule == rule and (not node or f.node == node)]
        if fitting or rule in not_checked:
            continue
        nodes = [f.node for f in found if f.rule == rule]
        if node and nodes:
            raise OptionError(f"{model}: ignore {entry!r}: {unknown_name(f'node of a {rule} finding', node, nodes)}")
        raise OptionError(
            f"{model}: ignore {entry!r} fits no finding: the model has no such flaw (any more): remove it"
        )
    ignored = [f for f in found if f.rule in ignore or f.key in ignore]
    rest = [f for f in found if f not in ignored]
    rest.sort(key=lambda f: f.severity != ERROR)  # stable: in each severity the model's own order
    return LintReport(model, tuple(rest), tuple(ignored), not_checked, fault)


def headline(report: LintReport) -> str:
    """A report's first line."""
    if report.ok:
        return f"{report.model}: clean"
    if not report.findings:
        return f"{report.model}: nothing found, but the runtime failed"
    count, errors = len(report.findings), sum(f.severity == ERROR for f in report.findings)
    return f"{report.model}: {count} finding{'s' if count > 1 else ''}, {errors} error{'' if errors == 1 else 's'}"


def notes(report: LintReport) -> list[str]:
    """What was ignored, and what could not be checked and why."""
    lines = [f"ignored: {', '.join(f.key for f in report.ignored)}"] if report.ignored else []
    reasons: dict[str, list[str]] = {}
    for rule, reason in report.not_checked.items():
        reasons.setdefault(reason, []).append(rule)
    return lines + [f"not checked: {', '.join(rules)}: {reason}" for reason, rules in reasons.items()]


def describe(report: LintReport) -> list[str]:
    """A report as lines of text: node, reason, remedy and how to ignore it."""
    lines = [headline(report)]
    for f in report.findings:
        lines += [
            f"  {f.severity}: {f.rule}: {f.node} ({f.op_type}): {f.reason}",
            f"    remedy: {f.remedy}",
            f"    ignore: {f.key!r}",
        ]
    return lines + [f"  {note}" for note in notes(report)]
