"""Which names of tensors qnn-net-run's files can express; the others are refused by name, before anything runs.

An input list has a line for each inference and white space between files, ``NAME:=PATH`` or, for all files of a line, just
``PATH`` in the binary's order; a line that starts with ``#`` or ``%`` says something else. The published sample application,
whose code for this the tool shares as far as is known, also knows each name with runs of other characters than letters,
digits and ``_`` replaced by ``_``: so two names that become the same get each other's files. An output's file is called as the
tensor is, in a folder that is made for it and without folders below: with a ``/`` in the name it can't be opened there. Whether
newer releases change such names is not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pytest_qnn.errors import ArtifactError

LONGEST_NAME = 200  # bytes: with what is appended, what file systems take


def input_line(files: Mapping[str, str]) -> str:
    """The line of one inference: path on the device by tensor name, in the binary's order.

    Raises:
        ArtifactError: as for :func:`check_names`.
    """
    if len(files) == 1:  # no name is needed, so none can be misread
        return next(iter(files.values()))
    return " ".join(f"{name}:={path}" for name, path in files.items())


def check_names(inputs: Sequence[str], outputs: Sequence[str], path: object) -> None:
    """Make sure that qnn-net-run can be told these inputs and can write these outputs.

    Raises:
        ArtifactError: it can't; the message has the name.
    """
    again = "Give the tensor another name in the model and compile it again"
    if len(inputs) > 1:
        for name in inputs:
            if reason := _unlistable(name):
                raise ArtifactError(
                    f"{path}: input {name!r} can't be named in qnn-net-run's input list: {reason}. {again}"
                )
        _refuse_twins(inputs, f"{path}: inputs", again)
    for name in outputs:
        if reason := _unwritable(name):
            raise ArtifactError(f"{path}: output {name!r} can't be a file of qnn-net-run: {reason}. {again}")
    files = [f"{name}{suffix}" for name in outputs for suffix in (".raw", "_native.raw")]
    for file in files:
        if files.count(file) > 1:
            raise ArtifactError(f"{path}: two outputs would be written to one file, {file!r}. {again}")


def _unlistable(name: str) -> str:
    if not name:
        return "it is empty"
    if found := re.search(r"[\s\x00-\x1f\x7f]", name):
        return f"it has {found[0]!r} in it"
    if ":=" in name or name.endswith(":"):
        return "':=' ends the name there"
    if name[0] in "#%":
        return f"a line that starts with {name[0]!r} is no list of files"
    return "" if _encodable(name) else "it is no proper text"


def _unwritable(name: str) -> str:
    if not name:
        return "it is empty"
    if "/" in name:
        return "it has '/' in it, and there is no such folder"
    if found := re.search(r"[\x00-\x1f\x7f]", name):
        return f"it has {found[0]!r} in it"
    if not _encodable(name):
        return "it is no proper text"
    size = len(name.encode())
    return f"it has {size} bytes, more than {LONGEST_NAME}" if size > LONGEST_NAME else ""


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_twins(names: Sequence[str], subject: str, again: str) -> None:
    seen: dict[str, str] = {}
    for name in names:
        known = seen.setdefault(sanitized(name), name)
        if known != name:
            raise ArtifactError(f"{subject} {known!r} and {name!r} are one and the same to qnn-net-run. {again}")


def sanitized(name: str) -> str:
    """The name by which the tool also knows a tensor."""
    text = re.sub(r"[^0-9A-Za-z_]+", "_", name)
    return text if text[:1].isalpha() or text[:1] == "_" else f"_{text}"
