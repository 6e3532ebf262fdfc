"""Handing out a bare context binary, for ``qnn-net-run --retrieve_context`` and other runtimes, with a description.

Raw files carry no types, no shapes and no layout, and a wrong guess runs all the same; so ``NAME.tensors.json`` lies beside
``NAME.bin``:

.. code-block:: text

    format      1
    binary      {file, sha256, bytes}
    backend     {id, core_api, backend_api, blob_version, build_id}     id 6 is the HTP
    soc         {id, name, htp_arch}                                    null where the binary doesn't tell
    model       {file, sha256} of the ONNX model, or null
    graphs      [{name, memory: {vtcm_bytes, ...}, inputs: [tensor], outputs: [tensor]}]
    tensor      {name, data_type, dtype, shape, bytes, encoding, model}
                    data_type   QNN's, e.g. UFIXED_POINT_8; dtype is numpy's, null where numpy has none
                    shape       of the native raw file, which has ``bytes`` bytes, last axis fastest
    encoding    {scale: [..], offset: [..], zero_point: [..], bits, axis} or null
                    real = scale * (q + offset) = scale * (q - zero_point); axis is null for one scale
    model       {name, dtype, shape, layout, permutation} of the ONNX model's tensor, or null
                    axis i of the native file is axis permutation[i] of the model's; null: the same order

qnn-net-run reads and writes float32 unless it is told to use native files; those have the shape above too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_qnn.artifacts.binary import ContextInfo, TensorInfo, read_context_binary
from pytest_qnn.artifacts.matching import Edge, Match, match_tensors
from pytest_qnn.artifacts.unwrap import binary_of, known_names
from pytest_qnn.errors import ArtifactError
from pytest_qnn.model.onnx_file import Model, file_digest, read_model
from pytest_qnn.work_folder import work_folder

FORMAT = 1


@dataclass(frozen=True)
class Exported:
    """The files of an exported context binary."""

    binary: Path
    tensors: Path


def export_binary(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | Model | None = None,
    *,
    name: str | None = None,
    dimensions: Mapping[str, int] | None = None,
    graph: str | None = None,
    names: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
) -> Exported:
    """Copy a context binary to ``folder`` and describe its tensors beside it.

    Args:
        source: a context binary, or an ONNX wrapper around one (EPContext), whatever made it.
        folder: made if it is missing.
        model: the ONNX model that the binary was made from: its names, types and layouts go into the description. A wrapper
            stands for it where there is none.
        name: of the files, without suffix; default: the binary's.
        dimensions: sizes for the model's named dynamic dimensions.
        graph, names, layouts: as for :func:`~pytest_qnn.artifacts.matching.match_tensors`.

    Returns:
        ``NAME.bin`` and ``NAME.tensors.json``. The description comes last: while it is missing, nothing is finished.

    Raises:
        ArtifactError: the source is damaged, has no or several binaries, doesn't fit the model; or ``folder`` can't be
            written.
        ModelError: the model or the wrapper can't be read.
        OptionError: ``names`` or ``layouts`` makes no sense.
        BackendUnavailableError: libQnnSystem isn't here.
    """
    file, target = Path(source).expanduser().absolute(), Path(folder).expanduser().absolute()
    with work_folder() as extracted:
        found, known = (file, {}) if file.suffix != ".onnx" else binary_of(file, extracted)
        info = read_context_binary(found)
        described = _model(model, dimensions, file if known else None)
        match = None
        if described is not None:
            told = known_names(info, described, known)
            match = match_tensors(info, described, graph=graph, names={**told, **(names or {})}, layouts=layouts)
        stem = name or file.name.removesuffix(".onnx").removesuffix(".bin")
        binary, tensors = target / f"{stem}.bin", target / f"{stem}.tensors.json"
        text = json.dumps(describe(info, binary.name, described, match), indent=1) + "\n"
        try:
            target.mkdir(parents=True, exist_ok=True)
            with work_folder(target) as work:
                draft = Path(shutil.copyfile(found, work / "binary"))
                if file_digest(draft) != info.sha256:
                    raise ArtifactError(f"{file} changed on disk since it was read: export it again")
                with suppress(FileNotFoundError):
                    tensors.unlink()
                os.replace(draft, binary)
                draft.write_text(text, encoding="utf-8")
                os.replace(draft, tensors)
        except OSError as error:
            raise ArtifactError(f"{target}: the binary can't be written there: {error.strerror or error}") from error
    return Exported(binary, tensors)


def describe(info: ContextInfo, file: str, model: Model | None = None, match: Match | None = None) -> dict[str, Any]:
    """The description of a context binary; its format stands at the head of this module."""
    edges = {} if match is None else {(kind, e.tensor.name): e for kind, e in _edges(match)}
    graphs = []
    for graph in info.graphs:
        here = edges if match is not None and graph.name == match.graph.name else {}
        graphs.append(
            {
                "name": graph.name,
                "memory": dict(graph.memory),
                "inputs": [_tensor(t, here.get(("input", t.name))) for t in graph.inputs],
                "outputs": [_tensor(t, here.get(("output", t.name))) for t in graph.outputs],
            }
        )
    return {
        "format": FORMAT,
        "binary": {"file": file, "sha256": info.sha256, "bytes": info.size},
        "backend": {
            "id": info.backend_id,
            "core_api": info.core_api,
            "backend_api": info.backend_api,
            "blob_version": info.blob_version,
            "build_id": info.build_id,
        },
        "soc": {"id": info.soc_id, "name": info.soc.name if info.soc else None, "htp_arch": info.htp_arch},
        "model": None if model is None else {"file": model.path.name, "sha256": model.digest},
        "graphs": graphs,
    }


def _edges(match: Match) -> list[tuple[str, Edge]]:
    return [*(("input", e) for e in match.inputs), *(("output", e) for e in match.outputs)]


def _tensor(tensor: TensorInfo, edge: Edge | None) -> dict[str, Any]:
    encoding = tensor.encoding
    return {
        "name": tensor.name,
        "data_type": tensor.data_type,
        "dtype": tensor.dtype or None,
        "shape": list(tensor.shape),
        "bytes": tensor.size or None,
        "encoding": None
        if encoding is None
        else {
            "scale": list(encoding.scale),
            "offset": [-zero for zero in encoding.zero_point],
            "zero_point": list(encoding.zero_point),
            "bits": tensor.bits or encoding.bits,
            "axis": encoding.axis,
        },
        "model": None
        if edge is None
        else {
            "name": edge.spec.name,
            "dtype": edge.spec.dtype,
            "shape": list(edge.spec.shape),
            "layout": edge.layout,
            "permutation": None if edge.permutation is None else list(edge.permutation),
        },
    }


def _model(
    model: str | os.PathLike[str] | Model | None, dimensions: Mapping[str, int] | None, wrapper: Path | None
) -> Model | None:
    if isinstance(model, Model):
        return model
    if model is not None:
        return read_model(model, dimensions)
    return None if wrapper is None else read_model(wrapper)
