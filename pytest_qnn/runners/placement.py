"""Where the nodes of a session ran: on the asked backend, or on onnxruntime's own CPU provider, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pytest_qnn.runners.ort import QNN


@dataclass(frozen=True)
class Misplaced:
    """A node that did not run where it was asked to: its name, operator, and why, as far as the runtime says."""

    name: str
    op_type: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(unnamed)'} ({self.op_type}): {self.reason}"


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a session ran.

    Attributes:
        backend: how many nodes the asked backend took.
        nodes: node name -> the backend's name or "CPU" (onnxruntime's own CPU provider).
        edges: graph-edge Quantize/DequantizeLinear nodes on onnxruntime's CPU provider: allowed.
        misplaced: every other node that ran there: not allowed.
    """

    backend: int
    nodes: Mapping[str, str]
    edges: tuple[str, ...]
    misplaced: tuple[Misplaced, ...]

    @property
    def total(self) -> int:
        """All nodes, after onnxruntime's own optimisation."""
        return self.backend + len(self.edges) + len(self.misplaced)

    def describe(self) -> str:
        """``12 of 14 nodes on the backend, 2 graph-edge Quantize/Dequantize on the host's CPU``"""
        text = f"{self.backend} of {self.total} nodes on the backend"
        if self.edges:
            text += f", {len(self.edges)} graph-edge Quantize/Dequantize on the host's CPU"
        if self.misplaced:
            text += f", {len(self.misplaced)} fell back to onnxruntime's CPU provider"
        return text


def read_placement(
    backend: str,
    assignment: Iterable[tuple[str, str, str]],
    edge_nodes: Sequence[tuple[str, str]],
    model_nodes: Iterable[str],
    reasons: Mapping[str, str],
) -> Placement:
    """Sort a session's nodes by where they ran.

    Args:
        backend: name of the asked backend.
        assignment: (execution provider, node, operator), from the session.
        edge_nodes: (name, operator) of the model's graph-edge Quantize/DequantizeLinear nodes.
        model_nodes: names of all nodes of the model; nodes that aren't among them were made by onnxruntime's optimiser.
        reasons: why the backend refused nodes, by name (see :func:`refusal_reasons`).
    """
    known, edge_names = set(model_nodes), {name for name, _ in edge_nodes if name}  # nodes may have no names
    left = Counter(op for _, op in edge_nodes)  # no more than the model has: generated and missing names prove little
    rows = list(assignment)
    off_backend = [(name, op) for ep, name, op in rows if ep != QNN]
    only_quantizers = all(op in ("QuantizeLinear", "DequantizeLinear") for _, op in off_backend)
    nodes, edges, misplaced, placed = {}, [], [], 0
    for index, (ep, name, op) in enumerate(rows):
        key = name if name and name not in nodes else f"{name or op}#{index}"
        nodes[key] = backend if ep == QNN else "CPU"
        if ep == QNN:
            placed += 1
        elif left[op] > 0 and (name in edge_names or (only_quantizers and (not name or name not in known))):
            edges.append(key)
            left[op] -= 1
        else:
            misplaced.append(Misplaced(name, op, reasons.get(name) or NO_REASON))
    return Placement(placed, nodes, tuple(edges), tuple(misplaced))


NO_REASON = "the execution provider gave no reason"
_REFUSAL = re.compile(
    r"Operator type: (?P<op>\S+) Node name: (?P<name>.*?) Node index: \d+\s+REASON : (?P<reason>.+?)\s*$",
    re.M,
)
_VALIDATION = re.compile(r"(?P<text>QNN\.backendValidateOpConfig\(\) failed for node `(?P<name>.+?)` .*?)\s*$", re.M)


def refusal_reasons(log: Sequence[str]) -> dict[str, str]:
    """Reasons by node name, from the execution provider's verbose log (lines of LogNodeSupport and CreateQnnNode)."""
    text = "\n".join(log)
    reasons: dict[str, str] = {}
    for match in _REFUSAL.finditer(text):
        reason = match["reason"].partition(f"{match['op']} node `{match['name']}` will not be assigned")[0]
        reasons.setdefault(match["name"], reason.strip())
    for match in _VALIDATION.finditer(text):
        for name, reason in reasons.items():
            if name and re.fullmatch(rf"{re.escape(name)}(_\d+)?", match["name"]) and "(" not in reason:
                reasons[name] = f"{reason} ({match['text']})"
    return reasons
