"""From a float ONNX model to the quantised one that QNN's HTP backend takes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import onnx
from filelock import FileLock

from edge_models.samples import Sample
from pytest_qnn.model import quantize


@dataclass(frozen=True)
class QuantizedModel:
    """A QDQ model and the float model that it was made from; both have the same inputs and outputs."""

    quantized: Path
    float_model: Path


def build_quantized(
    folder: Path, name: str, source: Path, calibration: Sequence[Sample], *, per_channel: bool = False
) -> QuantizedModel:
    """Quantise ``source`` to A8W8, or take what an earlier run made of the same source, data and options.

    Safe to call from several processes at once: one builds, the others wait for it.

    Args:
        folder: that keeps what was built.
        name: stem of the files, ``<name>.onnx`` and ``<name>.qdq.onnx``.
        source: float model whose only dynamic dimension is the first, the batch.
        calibration: inputs for the model with a batch of 1; their minima and maxima become the ranges of activations.
        per_channel: a scale for each output channel of the weights, which are symmetric then.
    """
    home = folder / _content_key(name, source, calibration, per_channel)
    built = QuantizedModel(home / f"{name}.qdq.onnx", home / f"{name}.onnx")
    with FileLock(home.with_suffix(".lock")):
        if not home.exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                draft = Path(temporary, "draft")
                draft.mkdir()
                fixed = draft / built.float_model.name
                fix_batch(source, fixed)
                quantize(fixed, calibration, draft / built.quantized.name, per_channel=per_channel)
                draft.rename(home)  # all or nothing: an interrupted run leaves no half-made model behind
    return built


def _content_key(name: str, source: Path, calibration: Sequence[Sample], per_channel: bool) -> str:
    """Digest over all that decides what is built, this file and the versions of what it calls included."""
    digest = hashlib.sha256(source.read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(
        repr((name, per_channel, [metadata.version(p) for p in ("pytest-qnn", "onnxruntime", "onnx")])).encode()
    )
    for sample in calibration:
        for key, array in sample.items():
            digest.update(f"{key} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()[:24]


def fix_batch(source: Path, target: Path) -> None:
    """Write ``source`` with a batch of 1: QNN runs fixed shapes only, and both models of a pair must have the same."""
    model = onnx.load(source)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]  # they still speak of the dynamic batch
    onnx.save(model, target)
