"""Rules on data: what the activations of a model are on given samples, on onnxruntime's CPU provider."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from pytest_qnn.errors import ModelError
from pytest_qnn.lint.findings import Finding
from pytest_qnn.lint.graph import TRANSPARENT, Graph, label
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.graph_encodings import QUANTIZERS
from pytest_qnn.runners.ort import CPU, LoadedModel, LoadRequest
from pytest_qnn.runners.process import Limits, ProcessPool
from pytest_qnn.runners.reference import LEVEL
from pytest_qnn.work_folder import temporary_folder

CLIPPED_DB = 20.0  # of the signal over what clipping takes away
FEWEST_LEVELS = 32  # steps over which the values are spread: five bits
NOISY_DB = 15.0
LARGEST_FLOAT16 = 65504.0
# As measured: sums and products of single elements keep an exponent bit more until they are stored, and a Conv isn't harmed
WIDER = ("Add", "Div", "Mul", "ReduceMean", "ReduceSum", "Sub")
UNHARMED = ("Conv", "ConvTranspose")
_MASKING = ("Add", "Where", "Sub", *TRANSPARENT)


@dataclass
class Observed:
    """A tensor over all samples. Powers are sums of squares in real units.

    Attributes:
        low, high: smallest and largest value.
        signal, clipping, rounding: power of the values, of what the encoding's ends cut off, of rounding the rest to steps.
        count: how many values there were.
    """

    encoding: Encoding | None = None
    low: float = math.inf
    high: float = -math.inf
    signal: float = 0.0
    clipping: float = 0.0
    rounding: float = 0.0
    count: int = 0

    def add(self, values: npt.NDArray[Any]) -> None:
        """Add the values of one sample."""
        x = values.reshape(-1).astype(np.float64)
        x = x[np.isfinite(x)]
        if not x.size:
            return
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.signal += float(x @ x)
        self.count += x.size
        if self.encoding is not None and len(self.encoding.scale) == 1:
            low, high = self.encoding.range
            kept = np.clip(x, low, high)
            off = kept - np.rint(kept / self.encoding.step) * self.encoding.step
            cut = x - kept
            if low == 0:
                cut = cut[x > 0]  # an encoding from 0 does a Relu's work
            self.clipping += float(cut @ cut)
            self.rounding += float(off @ off)


Observations = Mapping[str, Observed]
Samples = Iterable[Mapping[str, npt.NDArray[Any]]]


def observe(graph: Graph, samples: Samples, pool: ProcessPool, limits: Limits) -> Observations:
    """Run the model on ``samples`` on onnxruntime's CPU provider, with its activations as outputs.

    Of a quantised model these are the tensors that are quantised; of a float model all that nodes compute.

    Raises:
        ModelError: onnxruntime can't load the model.
        TargetError: the runtime process died, hung or ran out of memory.
    """
    if graph.model.quantized:
        taps = {
            n.input[0]: Observed(graph.encoding(n))
            for n in graph.nodes
            if n.op_type == "QuantizeLinear" and not graph.is_constant(n.input[0])
        }
    else:
        taps = {o: Observed() for n in graph.computing() for o in n.output if o}
    inputs = {spec.name for spec in graph.model.inputs}
    with _tapped(graph, [t for t in taps if t not in inputs]) as file:
        request = LoadRequest(
            str(file), (), "reference", CPU, dimensions=graph.model.dimensions, level=LEVEL, log_severity=3
        )
        loaded = LoadedModel(pool, request, f"{graph.model.path.name} on the onnxruntime reference", limits)
        try:
            for sample in samples:
                outputs, _ = loaded.run(sample)
                for name, array in {**outputs, **sample}.items():
                    if name in taps and array.dtype.kind == "f":
                        taps[name].add(array)
        finally:
            loaded.close()
    return {name: seen for name, seen in taps.items() if seen.count}


@contextmanager
def _tapped(graph: Graph, tensors: Iterable[str]) -> Iterator[Path]:
    """The model with more outputs, in a file that is gone afterwards."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    proto.graph.output.extend(onnx.ValueInfoProto(name=t) for t in tensors if t not in graph.outputs)
    external = any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
    with temporary_folder() as folder:
        file = folder / "tapped.onnx"
        try:
            if external:
                onnx.load_external_data_for_model(proto, str(graph.model.path.parent))
            onnx.save(proto, str(file), save_as_external_data=external, location="weights.bin")
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{graph.model.path}: can't be written with its activations as outputs: {error}"
            ) from error
        yield file


# --- rules ------------------------------------------------------------------------------------------------------------


def activation_clipped(graph: Graph, seen: Observations) -> Iterator[Finding]:
    """What the ends of an encoding cut off is not small beside the signal."""
    for name, o in _quantized(seen):
        if o.signal and _db(o.signal, o.clipping) < CLIPPED_DB:
            assert o.encoding is not None
            low, high = o.encoding.range
            yield Finding(
                "activation-clipped",
                *_place(graph, name),
                f"{name!r} reaches over {o.low:.4g}..{o.high:.4g} on this data, its encoding over {low:.4g}..{high:.4g}: what is "
                f"cut off is {_db(o.signal, o.clipping):.1f} dB below the signal",
                "calibrate on data like this, preprocessed as in production; if that was done, what lies before it is quantised too "
                "coarsely",
            )


def unused_range_on_data(graph: Graph, seen: Observations) -> Iterator[Finding]:
    """The values are spread over a few steps only."""
    for name, o in _quantized(seen):
        if _is_unused(o):
            assert o.encoding is not None
            low, high = o.encoding.range
            yield Finding(
                "unused-range",
                *_place(graph, name),
                f"{name!r} reaches over {o.low:.4g}..{o.high:.4g} on this data, which is {_levels(o):.0f} steps of its encoding "
                f"{low:.4g}..{high:.4g}",
                _remedy_of_unused(o),
            )


def activation_noise(graph: Graph, seen: Observations) -> Iterator[Finding]:
    """Rounding alone leaves little of the values although they use the range: most are small beside the largest."""
    for name, o in _quantized(seen):
        if o.signal and not _is_unused(o) and _db(o.signal, o.rounding) < NOISY_DB:
            assert o.encoding is not None
            yield Finding(
                "activation-noise",
                *_place(graph, name),
                f"rounding {name!r} to {o.encoding.bits} bits leaves {_db(o.signal, o.rounding):.1f} dB on this data: most of its "
                f"values are small beside the largest, {max(abs(o.low), abs(o.high)):.4g}",
                "quantise this tensor to 16 bits, or calibrate with percentiles if the largest don't matter",
            )


def float16_overflow(graph: Graph, seen: Observations) -> Iterator[Finding]:
    """A float model runs in float16 on HTP, which ends at 65504."""
    if graph.model.quantized:
        return
    for name, o in seen.items():
        node, op_type = _place(graph, name)
        largest, limit = max(-o.low, o.high), LARGEST_FLOAT16 if op_type not in WIDER else 2 * LARGEST_FLOAT16
        if largest <= limit or op_type in UNHARMED or (o.high <= limit and _masks(graph, name)):
            continue
        yield Finding(
            "float16-overflow",
            node,
            op_type,
            f"{name!r} reaches {largest:.4g} on this data; HTP computes float models in float16, and cuts this off at {limit:g}",
            "scale the values down before (and up behind), or quantise the model to 16 bits",
        )


def int64_overflow(graph: Graph, samples: Samples) -> Iterator[Finding]:
    """The execution provider casts 64-bit integers to 32 bits, and says nothing of what doesn't fit."""
    largest: dict[str, int] = {}
    for sample in samples:
        for name, array in sample.items():
            if array.dtype in (np.int64, np.uint64) and array.size:
                found = max(int(array.max()), -int(array.min()) - 1)
                largest[name] = max(largest.get(name, 0), found)
    for name, found in largest.items():
        if found >= 2**31:
            yield Finding(
                "int64-overflow",
                name,
                "input",
                f"it has values as large as {found} on this data, and HTP sees the low 32 bits of them: wrong results",
                "keep such values out of the part that runs on HTP, or reduce them before (modulo, offset)",
            )


def _quantized(seen: Observations) -> Iterator[tuple[str, Observed]]:
    return ((name, o) for name, o in seen.items() if o.encoding is not None and len(o.encoding.scale) == 1)


def _levels(o: Observed) -> float:
    assert o.encoding is not None
    low, high = o.encoding.range
    return max(0.0, min(o.high, high) - max(o.low, low)) / o.encoding.step


def _is_unused(o: Observed) -> bool:
    return o.high > o.low and _levels(o) < FEWEST_LEVELS and _db(o.signal, o.clipping) >= CLIPPED_DB


def _remedy_of_unused(o: Observed) -> str:
    assert o.encoding is not None
    with_zero = max(o.high, 0.0) - min(o.low, 0.0)
    if with_zero > (o.encoding.range[1] - o.encoding.range[0]) / 2:
        return (
            "an encoding contains 0, and these values lie far from it: quantise them to 16 bits, or take their mean off"
        )
    return (
        "calibrate on data like this, preprocessed as in production, or with percentiles where outliers set the range"
    )


def _db(signal: float, noise: float) -> float:
    return math.inf if not noise else 10 * math.log10(signal / noise) if signal else -math.inf


def _place(graph: Graph, tensor: str) -> tuple[str, str]:
    """Name and operator of what makes a tensor."""
    node = graph.made_by.get(tensor)
    return (tensor, "input") if node is None else (label(node), str(node.op_type))


def _masks(graph: Graph, tensor: str) -> bool:
    """Whether a tensor becomes a Softmax's input: very negative numbers there are masks, which float16 keeps well enough."""
    waiting, seen = [tensor], set[str]()
    while waiting:
        current = waiting.pop()
        for node in graph.read_by.get(current, []):
            if node.op_type == "Softmax":
                return True
            if node.op_type in (*_MASKING, *QUANTIZERS) and node.output[0] not in seen:
                seen.add(node.output[0])
                waiting.append(node.output[0])
    return False
