"""From a float ONNX model to the quantised one that QNN's HTP backend takes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
from filelock import FileLock
from numpy.typing import NDArray

from edge_models.samples import Sample


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
                prepare(source, draft / built.float_model.name)
                quantize(draft / built.float_model.name, draft / built.quantized.name, calibration, per_channel)
                draft.rename(home)  # all or nothing: an interrupted run leaves no half-made model behind
    return built


def _content_key(name: str, source: Path, calibration: Sequence[Sample], per_channel: bool) -> str:
    """Digest over all that decides what is built, this file and the versions of what it calls included."""
    digest = hashlib.sha256(source.read_bytes())
    digest.update(Path(__file__).read_bytes())
    digest.update(repr((name, per_channel, [metadata.version(p) for p in ("onnxruntime", "onnx", "numpy")])).encode())
    for sample in calibration:
        for key, array in sample.items():
            digest.update(f"{key} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()[:24]


def prepare(source: Path, target: Path) -> None:
    """Fix the batch to 1 and fold what is constant then: QNN runs fixed shapes only.

    onnxruntime's basic optimisations do the folding, so BatchNormalization also disappears into the Conv before it,
    and is not quantised apart from it.
    """
    import onnxruntime as ort

    model = onnx.load(source)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]  # they still speak of the dynamic batch
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    folded = onnx.load(target)
    del folded.metadata_props[:]  # onnxruntime's qnn_preprocess_model stumbles over them (seen with 1.32)
    used = {node.domain for node in folded.graph.node}
    for opset in [o for o in folded.opset_import if o.domain and o.domain not in used]:
        folded.opset_import.remove(opset)
    onnx.save(folded, target)


def quantize(float_model: Path, target: Path, calibration: Sequence[Sample], per_channel: bool) -> None:
    """Write the QDQ model of ``float_model``, in the form that onnxruntime recommends for QNN."""
    # imported here because it takes a second that a run which finds its models built needn't spend
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config, qnn_preprocess_model

    class Reader(CalibrationDataReader):
        def __init__(self, samples: Sequence[Sample]) -> None:
            self._rest: Iterator[Sample] = iter(samples)

        def get_next(self) -> Mapping[str, NDArray[np.float32]] | None:
            return next(self._rest, None)

    with tempfile.TemporaryDirectory() as temporary:
        rewritten = Path(temporary, "rewritten.onnx")
        start = rewritten if qnn_preprocess_model(float_model, rewritten) else float_model
        config = get_qnn_qdq_config(
            start,
            Reader(calibration),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8 if per_channel else QuantType.QUInt8,
            per_channel=per_channel,
        )
        quantize(start, target, config)
