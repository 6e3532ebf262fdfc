"""Writing an ONNX model so that it appears in one piece or not at all, also with its weights in a file of their own."""

from __future__ import annotations

from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from pytest_qnn.errors import OptionError
from pytest_qnn.model.replaced_file import replaced_file

LIMIT = 2**31 - 2**20  # protobuf refuses messages of 2 GiB
_DIGITS = 16


def save_model(proto: Any, output: Path, external: bool) -> None:
    """Write ``proto``, whose weights are in memory; tensors of 128 bytes and more go to a file of their own if ``external``.

    That file is ``<output>.<digest>.data``, named by its content, so that at no moment a model stands beside weights that aren't its
    own; one that an earlier model of that name left is removed.

    Raises:
        OptionError: the files can't be written; nothing is left behind.
    """
    data = None
    try:
        if external:
            data = _write_weights(proto, output)
        with replaced_file(output) as draft:
            onnx.save(proto, str(draft))
    except OSError as error:
        if data is not None:
            data.unlink(missing_ok=True)
        raise OptionError(
            f"output {output}: can't be written: {error.strerror or error}. Free some space or name another folder"
        ) from None
    for old in output.parent.iterdir():
        middle = old.name.removeprefix(f"{output.name}.").removesuffix(".data")
        if old != data and old.name == f"{output.name}.{middle}.data" and _is_digest(middle):
            with suppress(OSError):
                old.unlink()


def _is_digest(text: str) -> bool:
    return len(text) == _DIGITS and set(text) <= set("0123456789abcdef")


def _write_weights(proto: Any, output: Path) -> Path | None:
    """The file that large weights were moved to; None if there are none."""
    digest = sha256()
    large = [t for t in proto.graph.initializer if t.HasField("raw_data") and len(t.raw_data) >= 128]
    for tensor in large:
        digest.update(tensor.raw_data)
    if not large:
        return None
    data = output.with_name(f"{output.name}.{digest.hexdigest()[:_DIGITS]}.data")
    with replaced_file(data) as draft, draft.open("wb") as f:
        for tensor in large:
            f.write(b"\0" * (-f.tell() % 4096))  # page-aligned, so that runtimes can map it
            offset, length = f.tell(), len(tensor.raw_data)
            f.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    return data
