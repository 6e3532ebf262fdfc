"""Rules on the shape of the graph: what HTP doesn't take, and what keeps nodes from running quantised and fused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_qnn.lint.findings import Finding
from pytest_qnn.lint.graph import TRANSPARENT, WEIGHTED, Graph, bounds, label

MOST_DIMENSIONS = 5  # HTP validates no operator on tensors of more (error 3110)
ARITHMETIC = ("Add", "Div", "Mul", "Sub")
FUSING = (*WEIGHTED, "Add", "Mul")  # operators that a Relu or Clip behind them becomes a part of
_WITHOUT_VALUES = (  # outputs that are no activations
    "And",
    "ArgMax",
    "ArgMin",
    "Cast",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "NonZero",
    "Not",
    "Or",
    "Shape",
    "Size",
)


def dynamic_shape(graph: Graph) -> Iterator[Finding]:
    """QNN compiles fixed shapes only; onnxruntime runs a graph with dynamic ones on its CPU provider."""
    for spec in graph.model.inputs:
        if spec.unbound:
            yield Finding(
                "dynamic-shape",
                spec.name,
                "input",
                f"{spec.describe()} has dynamic dimensions, and HTP runs fixed shapes only",
                f"export the model with fixed shapes, or give sizes: dimensions={{{spec.unbound[0]!r}: 1}}, on the command "
                f"line --dimensions {spec.unbound[0]}=1",
            )


def rank(graph: Graph) -> Iterator[Finding]:
    """HTP takes no tensor of more than five dimensions."""
    ranks = graph.ranks()
    for node in graph.computing():
        worst = max((*node.input, *node.output), key=lambda tensor: ranks.get(tensor, 0))
        if (found := ranks.get(worst, 0)) > MOST_DIMENSIONS:
            yield Finding(
                "rank",
                label(node),
                node.op_type,
                f"{worst!r} has {found} dimensions, HTP takes {MOST_DIMENSIONS} at most: the node runs on the CPU",
                "merge dimensions that stay together (Reshape before, Reshape back behind), or drop the batch of 1",
            )


def unfused_batchnorm(graph: Graph) -> Iterator[Finding]:
    """A BatchNormalization that is quantised apart from its Conv: one more rounding, and wrong at 16 bits."""
    for node in graph.computing():
        if node.op_type != "BatchNormalization" or graph.dequantizer(node.input[0]) is None:
            continue
        conv = graph.made_by.get(graph.behind(node.input[0]))
        if conv is not None and conv.op_type in ("Conv", "ConvTranspose"):
            yield Finding(
                "unfused-batchnorm",
                label(node),
                node.op_type,
                f"it is quantised apart from the {conv.op_type} {label(conv)!r} before it: a node and a rounding more",
                "fold it into the weights before quantising: pytest-qnn quantize does, onnxruntime's quant_pre_process too",
            )


def unfused_activation(graph: Graph) -> Iterator[Finding]:
    """A Relu or Clip behind a Quantize/Dequantize pair that nothing else reads."""
    for node in graph.computing():
        before = fused_before(graph, node)
        if before is None or graph.stored_as(node.output[0]) is None or loses_bounds(graph, node):
            continue
        yield Finding(
            "unfused-activation",
            label(node),
            node.op_type,
            f"{label(before)!r} ({before.op_type}) is quantised before it and again behind it: a node more on HTP, and half "
            "the steps are spent on values that it cuts off",
            f"quantise the output of {label(before)!r} once, with the range that is left behind this node, and drop the node",
        )


def clip_lost(graph: Graph) -> Iterator[Finding]:
    """A Clip that HTP fuses into the Conv, Add or Mul before it, and then saturates at the encoding instead."""
    for node in graph.computing():
        if node.op_type != "Clip" or not loses_bounds(graph, node):
            continue
        limits, encoding = bounds(graph, node), graph.stored_as(node.output[0])
        assert limits is not None
        assert encoding is not None
        low, high = encoding.range
        yield Finding(
            "clip-lost",
            label(node),
            node.op_type,
            f"HTP fuses it into the node before it and then keeps values of {low:.4g}..{high:.4g}, the range of its "
            f"encoding, not those of {limits[0]:.4g}..{limits[1]:.4g}: wrong results",
            "give its output an encoding that ends where the Clip does, or drop the Quantize/Dequantize pair before it",
        )


def bias_rounded(graph: Graph) -> Iterator[Finding]:
    """A constant that is added after a ConvTranspose: HTP makes it the ConvTranspose's bias, rounded to whole numbers."""
    for node in graph.computing():
        if node.op_type != "Add":
            continue
        for tensor, other in (node.input, reversed(node.input)):
            before = graph.made_by.get(graph.behind(tensor))
            if (
                before is None
                or before.op_type != "ConvTranspose"
                or not (graph.is_weight(other) or graph.is_constant(other))
            ):
                continue
            yield Finding(
                "bias-rounded",
                label(node),
                node.op_type,
                f"HTP makes its constant the bias of {label(before)!r} (ConvTranspose) and rounds it to whole numbers: wrong results",
                f"make the constant the third input of {label(before)!r} before quantising, and drop this node",
            )


def silu_fused(graph: Graph) -> Iterator[Finding]:
    """Conv and x * sigmoid(x) of 16 bits: fused, and wrong for some sizes. As measured: 9 to 12 rows, or more of 8 columns at most."""
    shapes = graph.shapes()
    for node in graph.computing():
        if node.op_type != "Mul":
            continue
        for x, gate in (node.input, reversed(node.input)):
            sigmoid, conv = graph.made_by.get(graph.behind(gate)), graph.made_by.get(graph.behind(x))
            encoding, shape = graph.activation(x), shapes.get(node.output[0], ())
            if sigmoid is None or conv is None or (sigmoid.op_type, conv.op_type) != ("Sigmoid", "Conv"):
                continue
            if (
                graph.behind(sigmoid.input[0]) != conv.output[0]
                or encoding is None
                or encoding.bits <= 8
                or len(shape) != 4
            ):
                continue
            rows, columns = shape[2:]
            if rows is None or columns is None:
                continue
            if 9 <= rows <= 12 or (rows > 12 and columns <= 8):
                yield Finding(
                    "silu-fused",
                    label(node),
                    node.op_type,
                    f"HTP fuses it with {label(conv)!r} (Conv) and computes {rows} rows of {columns} columns wrong: the result has "
                    "nothing to do with the input",
                    "quantise these activations with 8 bits, or run the model at another size",
                )


def fused_before(graph: Graph, node: Any) -> Any | None:
    """The operator that a Relu or Clip could be part of, if a Quantize/Dequantize pair of theirs alone lies between."""
    if node.op_type not in ("Relu", "Clip"):
        return None
    dequantizer = graph.dequantizer(node.input[0])
    source = graph.behind(node.input[0])
    before = graph.made_by.get(source)
    if dequantizer is None or before is None or before.op_type not in FUSING:
        return None
    alone = [graph.reads_only(t) for t in (source, dequantizer.input[0], node.input[0])]
    return before if all(alone) else None


def loses_bounds(graph: Graph, node: Any) -> bool:
    """Whether HTP forgets a Clip's bounds. As measured: with eight bits only where the encoding starts at 0."""
    before = fused_before(graph, node)
    limits, encoding = bounds(graph, node), graph.stored_as(node.output[0])
    if node.op_type != "Clip" or before is None or before.op_type not in ("Conv", "Add", "Mul"):
        return False
    if limits is None or encoding is None:
        return False
    low, high = encoding.range
    if encoding.bits <= 8:
        return low == 0 and high > limits[1] + encoding.step
    return low < limits[0] - encoding.step or high > limits[1] + encoding.step


# --- float in between ---------------------------------------------------------------------------------------------------------


def float_island(graph: Graph) -> Iterator[Finding]:
    """A node that reads quantised values and whose output isn't quantised before it is computed with and quantised."""
    for node in graph.computing():
        if node.op_type in (*TRANSPARENT, *_WITHOUT_VALUES) or not any(_reads_quantized(graph, t) for t in node.input):
            continue
        if _ends_quantized(graph, node) or not _leads_back(graph, node):
            continue
        reader = next((n for n in graph.read_by.get(node.output[0], []) if n.op_type != "QuantizeLinear"), node)
        if reader.op_type in ("Relu", "Clip") and graph.stored_as(reader.output[0]) is not None:
            encoding, limits = graph.stored_as(reader.output[0]), bounds(graph, reader)
            assert encoding is not None
            reach = "" if limits is None else f" {limits[0]:.4g}..{limits[1]:.4g}"
            yield Finding(
                "float-island",
                label(reader),
                reader.op_type,
                f"its encoding reaches over {encoding.range[0]:.4g}..{encoding.range[1]:.4g}, beyond what it lets through"
                f"{reach}, so it can't be fused: it and {label(node)!r} ({node.op_type}) run in float16",
                "quantise its output over the range that it lets through (asymmetric: from 0 for a Relu)",
            )
        else:
            yield Finding(
                "float-island",
                label(node),
                node.op_type,
                f"it runs in float16, and so does {label(reader)!r} ({reader.op_type}): its inputs are quantised, its output "
                f"{node.output[0]!r} isn't",
                f"quantise {node.output[0]!r} too",
            )


def float_constant(graph: Graph) -> Iterator[Finding]:
    """A constant in float beside a quantised activation: the operator runs in float."""
    for node in graph.computing():
        if node.op_type not in (*WEIGHTED, *ARITHMETIC) or not _ends_quantized(graph, node):
            continue
        operands = list(node.input[:2])
        if not any(graph.activation(_through(graph, t)) for t in operands):
            continue
        for tensor in operands:
            if graph.is_constant(tensor):
                yield Finding(
                    "float-constant",
                    label(node),
                    node.op_type,
                    f"its constant {tensor!r} is float while its other operand is quantised: the node runs in float16, with a "
                    "Dequantize before and a Quantize behind it",
                    f"quantise {tensor!r} too",
                )


def _through(graph: Graph, tensor: str) -> str:
    """The tensor that was moved about until it became ``tensor``."""
    node = graph.made_by.get(tensor)
    while node is not None and node.op_type in TRANSPARENT:
        tensor = node.input[0]
        node = graph.made_by.get(tensor)
    return tensor


def _reads_quantized(graph: Graph, tensor: str) -> bool:
    return graph.activation(_through(graph, tensor)) is not None


def _float_readers(graph: Graph, node: Any) -> list[Any]:
    """Nodes that compute with a node's outputs: through those that only move them."""
    found: list[Any] = []
    for output in node.output:
        for reader in graph.read_by.get(output, []):
            if reader.op_type in TRANSPARENT:
                found += _float_readers(graph, reader) if reader.input[0] == output else []
            else:
                found.append(reader)
    return found


def _ends_quantized(graph: Graph, node: Any) -> bool:
    """Whether all that reads a node's outputs are quantisers, but for a Relu or Clip that becomes part of it."""
    readers = _float_readers(graph, node)
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        limits, encoding = bounds(graph, readers[0]), graph.stored_as(readers[0].output[0])
        if limits is None or encoding is None:
            return False
        low, high = encoding.range
        return low >= limits[0] - encoding.step and high <= limits[1] + encoding.step
    return bool(readers) and all(n.op_type == "QuantizeLinear" for n in readers)


def _leads_back(graph: Graph, node: Any) -> bool:
    """Whether a node's output is quantised again further on."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        for reader in _float_readers(graph, current):
            if reader.op_type == "QuantizeLinear":
                return True
            if id(reader) not in seen and reader.op_type not in _WITHOUT_VALUES:
                seen.add(id(reader))
                waiting.append(reader)
    return False
