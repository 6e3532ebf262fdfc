"""Two sets are compared by tensor: what moved and by how many steps, what changed its type, what only one of them has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_qnn.model import (
    Encoding,
    EncodingSet,
    Precision,
    TensorEncoding,
    compare_encodings,
    read_encodings,
    write_encodings,
)
from tests.encodings.strategies import encodings, sets


def set_of(**values: Any) -> EncodingSet:
    return EncodingSet(tuple(TensorEncoding(n, "activation", v) for n, v in values.items()))


def test_the_tensor_that_moved_most_comes_first() -> None:
    first = set_of(
        a=Encoding((0.5,), (0,), "uint8"),
        b=Encoding((0.5,), (0,), "uint8"),
        c=Encoding((1.0,), (9,), "uint8"),
        d=Precision("float", 16),
    )
    second = set_of(
        a=Encoding((0.5,), (2,), "uint8"),
        b=Encoding((1.0,), (0,), "uint8"),
        c=Encoding((1.0,), (9,), "uint8"),
        e=Precision("float", 16),
    )
    found = compare_encodings(first, second)
    assert [(c.name, c.steps, c.before, c.after) for c in found.changes] == [
        ("b", 255.0, (0.0, 127.5), (0.0, 255.0)),
        ("a", 2.0, (0.0, 127.5), (-1.0, 126.5)),
    ]
    assert (found.only_first, found.only_second, found.same, found.steps) == (("d",), ("e",), 1, 255.0)


@pytest.mark.parametrize(
    ("a", "b", "steps", "changed"),
    [
        (Encoding((1.0,), (0,), "uint8"), Encoding((255 / 65535,), (0,), "uint16"), 0.0, ("8 -> 16 bits",)),
        (Encoding((1.0,), (0,), "int8"), Encoding((1.0,), (128,), "uint8"), 0.0, ("symmetric -> unsigned asymmetric",)),
        (Encoding((1.0,), (1,), "int8"), Encoding((1.0,), (129,), "uint8"), 0.0, ("signed asymmetric -> unsigned asymmetric",)),
        (Encoding((1.0,), (0,), "int8"), Encoding((1.0, 0.5), (0, 0), "int8", 1), 0.0, ("per tensor -> 2 channels along axis 1",)),
        (Encoding((1.0, 0.5), (0, 0), "int8", 1), Encoding((1.0, 1.0), (0, 0), "int8", 1), 128.0, ()),
        (Encoding((1.0, 0.5), (0, 0), "int8", 0), Encoding((1.0, 0.5), (0, 0), "int8", 1), 0.0, ("2 channels along axis 0 -> 2 channels along axis 1",)),
        (Encoding((1e-5,), (0,), "int32"), Encoding((2e-5,), (0,), "int32"), 0.0, ("bias scale",)),
        (Encoding((1.0,), (0,), "int8"), Precision("float", 16), math.inf, ("int8 -> float16",)),
        (Encoding((0.0,), (0,), "int8"), Encoding((1.0,), (0,), "int8"), math.inf, ()),
    ],
)  # fmt: skip
def test_what_changed(a: Any, b: Any, steps: float, changed: tuple[str, ...]) -> None:
    (change,) = compare_encodings(set_of(t=a), set_of(t=b)).changes
    assert change.steps == pytest.approx(steps, abs=1e-9)
    assert change.changed == changed


def test_what_float32_or_a_format_leaves_out_is_no_change() -> None:
    """A model stores scales in float32, and AIMET's files don't say the axis."""
    a = set_of(t=Encoding((0.1, 0.2), (0, 0), "int8", 0))
    b = set_of(t=Encoding((0.10000000149011612, 0.20000000298023224), (0, 0), "int8"))
    assert compare_encodings(a, b).changes == ()


@settings(max_examples=50, deadline=None)
@given(sets(plain=False), sets(plain=False))
def test_a_comparison_is_complete(a: EncodingSet, b: EncodingSet) -> None:
    assert compare_encodings(a, a).exceeds(0) is False
    found, back = compare_encodings(a, b), compare_encodings(b, a)
    assert found.same + len(found.changes) + len(found.only_first) == len(a.tensors)
    assert found.same + len(found.changes) + len(found.only_second) == len(b.tensors)
    assert {c.name for c in found.changes} == {c.name for c in back.changes}
    assert found.only_first == back.only_second
    assert [c.steps for c in found.changes] == sorted((c.steps for c in found.changes), reverse=True)


@settings(max_examples=50, deadline=None)
@given(encodings(plain=True), st.sampled_from(["aimet-1.0.0", "qnn"]))
def test_nothing_changes_by_writing(tmp_path_factory: pytest.TempPathFactory, encoding: Encoding, format: str) -> None:
    file: Path = tmp_path_factory.getbasetemp() / "compared.json"
    write_encodings(set_of(t=encoding), file, format)
    assert not compare_encodings(set_of(t=encoding), read_encodings(file)).exceeds(0)
