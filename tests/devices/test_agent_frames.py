"""What travels between host and device: sound frames arrive as they were sent, everything else is refused before it is read."""

from __future__ import annotations

import ast
import io
import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pytest_qnn.model.tensors import DTYPES
from pytest_qnn.runners import agent
from pytest_qnn.runners.agent import MAGIC, PREFIX, FrameError, PayloadTooLarge, make_frame, read_frame


def reading(data: bytes) -> Any:
    """``read`` over these bytes."""
    stream = io.BytesIO(data)

    def read(count: int) -> bytes:
        got = stream.read(count)
        if len(got) < count:
            raise EOFError
        return got

    return read


def sent(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> bytes:
    return b"".join(bytes(part) for part in make_frame(header, arrays))


def raw(header: object, payload: bytes = b"", size: int | None = None) -> bytes:
    """A frame with a header as it is given, and a right checksum."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    checksum = zlib.crc32(payload, zlib.crc32(text))
    return PREFIX.pack(MAGIC, len(text), len(payload) if size is None else size, checksum) + text + payload


arrays = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda name: hnp.arrays(np.dtype(name), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)


@given(st.dictionaries(st.text(max_size=20), arrays, max_size=4), st.dictionaries(st.text(), st.integers(), max_size=3))
@settings(max_examples=150, deadline=None)
def test_a_frame_arrives_as_it_was_sent(tensors: dict[str, np.ndarray], header: dict[str, int]) -> None:
    header.pop("tensors", None)
    strided = {name: array[..., ::-1] if array.ndim else array for name, array in tensors.items()}
    got, back = read_frame(reading(sent(header, strided) + sent({"next": 1}, {})))
    assert got == header
    assert list(back) == list(strided)
    for name, array in strided.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()


def test_frames_follow_each_other_without_a_byte_between() -> None:
    x = np.arange(6, dtype=np.float16).reshape(2, 3)
    read = reading(sent({"id": 1}, {"x": x}) + sent({"id": 2}, {}))
    assert [read_frame(read)[0]["id"] for _ in range(2)] == [1, 2]
    with pytest.raises(EOFError):
        read_frame(read)


def test_what_travels_is_what_the_project_knows() -> None:
    assert set(agent.SIZES) == DTYPES
    assert all(np.dtype(name).itemsize == size for name, size in agent.SIZES.items())


HOSTILE = {
    "magic": b"QnA2" + raw({"tensors": []})[4:],
    "no JSON": raw(b"{"),
    "no UTF-8": raw(b'{"\xff": 1}'),
    "NaN": raw(b'{"tensors": [], "seconds": NaN}'),
    "infinity": raw(b'{"tensors": [], "seconds": -Infinity}'),
    "nested": raw(b'{"tensors": ' + b"[" * 100_000),
    "a list": raw([]),
    "no tensors": raw({}),
    "tensors of another kind": raw({"tensors": {"x": 1}}),
    "a row of two": raw({"tensors": [["x", "int8"]]}),
    "a name that is no text": raw({"tensors": [[1, "int8", []]]}, b"\0"),
    "two of a name": raw({"tensors": [["x", "int8", [1]], ["x", "int8", [1]]]}, b"\0\0"),
    "object": raw({"tensors": [["x", "object", [1]]]}, b"\0" * 8),
    "pickle": raw({"tensors": [["x", "O", [1]]]}, b"\0" * 8),
    "below zero": raw({"tensors": [["x", "int8", [-1]]]}),
    "twice below zero": raw({"tensors": [["x", "int8", [-1, -1]]]}, b"\0"),
    "true": raw({"tensors": [["x", "int8", [True]]]}, b"\0"),
    "a fraction": raw({"tensors": [["x", "int8", [1.0]]]}, b"\0"),
    "text": raw({"tensors": [["x", "int8", ["1"]]]}, b"\0"),
    "rank": raw({"tensors": [["x", "int8", [1] * 65]]}, b"\0"),
    "huge": raw({"tensors": [["x", "int8", [1 << 40, 1 << 40]]]}),
    "empty and huge": raw({"tensors": [["x", "int8", [0, 1 << 62, 1 << 62]]]}),
    "digits": raw(b'{"tensors": [["x", "int8", [' + b"9" * 10_000 + b"]]]}"),
    "less payload than declared": raw({"tensors": [["x", "int32", [2]]]}, b"\0" * 4),
    "more payload than declared": raw({"tensors": [["x", "int8", [2]]]}, b"\0" * 4),
    "a huge header": PREFIX.pack(MAGIC, agent.HEADER_BYTES + 1, 0, 0),
    "a huge payload": PREFIX.pack(MAGIC, 2, agent.PAYLOAD_BYTES + 1, 0) + b"{}",
    "a truth value of 2": raw({"tensors": [["x", "bool", [2]]]}, b"\1\2"),
    "checksum": raw({"tensors": [["x", "int8", [2]]]}, b"\0\0")[:-1] + b"\1",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_sound_frame_is_refused(what: str) -> None:
    with pytest.raises(FrameError):
        read_frame(reading(HOSTILE[what]))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_change_of_a_frame_goes_unnoticed(data: st.DataObject) -> None:
    whole = sent({"id": 7, "ok": True}, {"y": np.arange(5, dtype=np.int16), "z": np.array([True, False])})
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises((FrameError, EOFError)):
        read_frame(reading(bytes(changed)))


def test_nothing_is_reserved_for_a_payload_that_is_too_large() -> None:
    size = 8 << 30
    data = raw({"id": 3, "tensors": [["x", "float32", [size // 4]]]}, size=size)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge) as caught:
            read_frame(reading(data), limit=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert (caught.value.header, caught.value.size) == ({"id": 3}, size)


def test_a_payload_is_looked_at_before_it_is_read() -> None:
    def refuse(places: list[agent.TensorPlace]) -> None:
        raise FrameError(f"{places[0].name} {places[0].size}")

    with pytest.raises(FrameError, match="x 4096"):  # and not EOFError: nothing of it was read
        read_frame(reading(raw({"tensors": [["x", "int8", [4096]]]}, size=4096)), check=refuse)


def test_a_header_beyond_what_is_read_is_not_sent() -> None:
    with pytest.raises(FrameError, match="more than"):
        make_frame({"log": "x" * (agent.HEADER_BYTES + 1)}, {})


# --- the file that is pushed ----------------------------------------------------------------------------------------------


def test_the_agent_is_one_file_of_python_3_9() -> None:
    text = Path(agent.__file__).read_text()
    tree = ast.parse(text, feature_version=(3, 9))
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            keywords = {keyword.arg for keyword in node.keywords}
            assert not (node.func.id == "zip" and "strict" in keywords), "zip(strict=) is of Python 3.10"
    outside = imported - {"numpy", "onnxruntime", "onnxruntime_qnn"}
    assert outside <= {
        *(
            "__future__",
            "collections",
            "contextlib",
            "errno",
            "fcntl",
            "json",
            "mmap",
            "os",
            "platform",
            "queue",
            "resource",
        ),
        *("select", "shutil", "signal", "struct", "sys", "tempfile", "threading", "time", "typing", "zlib"),
    }, "each of these is in Python 3.9, and in the small Python of an embedded Linux"
