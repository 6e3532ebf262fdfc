"""What is inside an ONNX wrapper around a context binary: the binary, and what the model's tensors are called in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_qnn.artifacts.binary import ContextInfo, read_context_binary
from pytest_qnn.artifacts.matching import Match, match_tensors
from pytest_qnn.artifacts.wrapper import EDGE_OPERATORS
from pytest_qnn.errors import ArtifactError
from pytest_qnn.model.onnx_file import Model, load_proto


def unwrap(wrapper: Path, model: Model, work: Path) -> tuple[ContextInfo, Match]:
    """The binary inside ``wrapper``, which was compiled from ``model``, and its tensors matched with the model's.

    Raises:
        ArtifactError: the wrapper doesn't have one whole-model binary, or that doesn't fit the model.
        ModelError: the wrapper can't be read.
        BackendUnavailableError: libQnnSystem isn't here.
    """
    binary, known = binary_of(wrapper, work)
    info = read_context_binary(binary)
    return info, match_tensors(info, model, names=known_names(info, model, known))


def known_names(info: ContextInfo, model: Model, known: Mapping[str, str]) -> dict[str, str]:
    """Of ``known`` (a wrapper's name -> the binary's) those that both the model and the binary have."""
    there = {t.name for g in info.graphs for t in (*g.inputs, *g.outputs)}
    wanted = {s.name for s in (*model.inputs, *model.outputs)}
    return {name: tensor for name, tensor in known.items() if name in wanted and tensor in there}


def binary_of(wrapper: Path, work: Path) -> tuple[Path, dict[str, str]]:
    """The binary of an EPContext wrapper, and what the wrapper's inputs and outputs are called in it.

    Args:
        work: folder for a binary that is embedded in the wrapper.

    Returns:
        The binary's file, and the names, which are empty where nodes of the model lie between the wrapper's edge and the
        binary.

    Raises:
        ArtifactError: the wrapper has no binary, or several.
        ModelError: the wrapper can't be read.
    """
    graph = load_proto(wrapper).graph
    contexts = [n for n in graph.node if n.op_type == "EPContext"]
    attributes = [{a.name: a for a in n.attribute} for n in contexts]
    mains = [a for a in attributes if "main_context" not in a or a["main_context"].i]
    if len(mains) != 1:
        raise ArtifactError(
            f"{wrapper}: it has {len(mains)} context binaries; one is needed: name the .bin itself, or the wrapper of one"
        )
    content = mains[0]["ep_cache_context"].s if "ep_cache_context" in mains[0] else b""
    if "embed_mode" in mains[0] and mains[0]["embed_mode"].i:
        binary = work / "embedded.bin"
        binary.write_bytes(content)
    else:
        binary = wrapper.parent / content.decode(errors="replace")
    if len(contexts) != 1:
        return binary, {}
    told = mains[0]["io_name_overrides"].s.decode() if "io_name_overrides" in mains[0] else ""
    overrides = dict(pair.split("=", 1) for pair in told.split(";") if "=" in pair)
    return binary, {outer: overrides.get(inner, inner) for outer, inner in _ends(graph, contexts[0])}


def _ends(graph: Any, context: Any) -> list[tuple[str, str]]:
    """(name of a graph input or output, name at the EPContext node), through nothing but edge operators."""
    producers = {o: n for n in graph.node for o in n.output}
    readers = {n.input[0]: n for n in graph.node if n.op_type in EDGE_OPERATORS}
    found = []
    for name in context.input:
        node, outer = producers.get(name), name
        while node is not None and node.op_type in EDGE_OPERATORS:
            outer = node.input[0]
            node = producers.get(outer)
        found.append((outer, name))
    for name in context.output:
        outer = name
        results = {v.name for v in graph.output}
        while outer not in results and outer in readers:
            outer = readers[outer].output[0]
        found.append((outer, name))
    edge = {v.name for v in (*graph.input, *graph.output)}
    return found if edge <= {outer for outer, _ in found} else []
