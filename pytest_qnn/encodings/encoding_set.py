"""A set of encodings: those of a model's activations and parameters, and what its file said beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pytest_qnn.errors import EncodingError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.graph_tensors import GraphTensors, read_graph

Kind = Literal["activation", "param"]


@dataclass(frozen=True)
class Precision:
    """An entry without scales: floats of so many bits, or integers whose range the converter is to find itself.

    Attributes:
        number: "float" or "int".
        bits: bit width.
    """

    number: Literal["float", "int"]
    bits: int

    def __str__(self) -> str:
        return f"{self.number}{self.bits}"


@dataclass(frozen=True)
class Stated:
    """What a file says that follows from the encoding itself: kept to be checked, and no part of what is compared.

    Attributes:
        ranges: (min, max) of each scale.
        symmetric: its flag.
    """

    ranges: tuple[tuple[float, float], ...] | None = None
    symmetric: bool | None = None


@dataclass(frozen=True)
class TensorEncoding:
    """A tensor's entry.

    Attributes:
        name: as the float model spells it.
        kind: "activation" or "param"; None where the file leaves it to the model (AIMET 2.0.0).
        value: an encoding, or only a precision.
        stated: what the file said beside it.
    """

    name: str
    kind: Kind | None
    value: Encoding | Precision
    stated: Stated = field(default_factory=Stated, compare=False)

    @property
    def encoding(self) -> Encoding | None:
        """The encoding; None where the entry is only a precision."""
        return self.value if isinstance(self.value, Encoding) else None


@dataclass(frozen=True)
class EncodingSet:
    """Encodings by tensor, in the order of their file.

    Attributes:
        tensors: the entries. A broken file may define a tensor twice: see :func:`~pytest_qnn.encodings.checks.check_encodings`.
        about: what the file says of itself: ``quantizer_args``, ``producer``, ``activation_bitwidth``, ...
        source: the file.
        format: its format, a key of :data:`~pytest_qnn.encodings.files.FORMATS`, or "qdq".
        notes: what a reader should know of how the file was read.
    """

    tensors: tuple[TensorEncoding, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    format: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "about", MappingProxyType(dict(self.about)))

    @property
    def by_name(self) -> dict[str, TensorEncoding]:
        """Entry of each tensor."""
        return {t.name: t for t in self.tensors}

    @property
    def activations(self) -> dict[str, Encoding]:
        """Encodings of activations."""
        return {t.name: t.encoding for t in self.tensors if t.encoding and t.kind == "activation"}

    @property
    def params(self) -> dict[str, Encoding]:
        """Encodings of weights and biases."""
        return {t.name: t.encoding for t in self.tensors if t.encoding and t.kind == "param"}

    def bound_to(self, model: str | os.PathLike[str] | GraphTensors) -> EncodingSet:
        """The set with what its file left to the model: which tensors are parameters, along which axis channels lie.

        Tensors that the model doesn't have, or can't tell about, stay as they are; the checks name them.

        Raises:
            ModelError: the model can't be read, or is quantised.
        """
        graph = model if isinstance(model, GraphTensors) else read_graph(model)
        return replace(self, tensors=tuple(_bound(t, graph) for t in self.tensors))

    def as_unsigned(self) -> EncodingSet:
        """The set with every signed encoding whose zero point is not 0 on the unsigned grid: the same real numbers."""
        return replace(
            self,
            tensors=tuple(
                replace(t, value=t.encoding.as_unsigned())
                if t.encoding and t.encoding.signed and not t.encoding.symmetric and t.encoding.bits < 32
                else t
                for t in self.tensors
            ),
        )


def _bound(tensor: TensorEncoding, graph: GraphTensors) -> TensorEncoding:
    kind = tensor.kind
    if kind is None and tensor.name in graph.names:
        kind = "param" if tensor.name in graph.constants else "activation"
    value = tensor.value
    if isinstance(value, Encoding):
        value = graph.bind(tensor.name, value) or value
    return replace(tensor, kind=kind, value=value)


def refuse(problems: list[str], subject: str | Path) -> None:
    """Raise one error that lists all problems, if there are any.

    Raises:
        EncodingError: there are.
    """
    if not problems:
        return
    first = f"{subject}: {problems[0]}"
    if len(problems) > 1:
        shown = [f"  {p}" for p in problems[:30]] + ([f"  and {len(problems) - 30} more"] if len(problems) > 30 else [])
        first = "\n".join([f"{subject}: {len(problems)} problems:", *shown])
    raise EncodingError(first, tuple(problems))
