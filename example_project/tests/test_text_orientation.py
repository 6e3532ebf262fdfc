"""The text orientation classifier on QNN: as good as its quantisation allows, good at its task, fast enough."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edge_models.quantization import QuantizedModel
from edge_models.samples import LabeledSamples
from edge_models.text_orientation import OUTPUT, predicted_quarters, turned_crops
from pytest_qnn import Backend, Run, Session, assert_fully_offloaded, assert_latency, assert_matches_reference
from pytest_qnn.runners.reference import Reference


@pytest.fixture(scope="module")
def crops() -> LabeledSamples:
    """Eight inputs and the quarters by which they were turned."""
    return turned_crops(2, seed=2)


@pytest.fixture(scope="module")
def classifier(qnn_backend: Backend, orientation_model: QuantizedModel) -> Session:
    """The classifier, loaded once for each backend."""
    return qnn_backend.load(orientation_model.quantized, float_model=orientation_model.float_model)


@pytest.fixture(scope="module")
def classified(classifier: Session, crops: LabeledSamples) -> Run:
    """One run for all tests that judge outputs: an inference on the simulator takes half a second."""
    return classifier.run(crops.inputs)


@pytest.mark.backend("htp", "cpu")
def test_accuracy(classified: Run) -> None:
    """Runs wholly on the backend, which adds no more error than the quantisation itself."""
    assert_matches_reference(classified)
    assert_fully_offloaded(classified.session)


@pytest.mark.backend("htp")
def test_recognizes_orientation(
    classified: Run,
    crops: LabeledSamples,
    orientation_model: QuantizedModel,
    onnx_reference: Callable[..., Reference],
) -> None:
    """Quantised and on the HTP, at most one crop more is taken for turned otherwise than it is."""
    reference = onnx_reference(orientation_model.float_model)
    in_float = np.stack([reference.run(sample)[OUTPUT] for sample in crops.inputs])

    float_mistakes = np.count_nonzero(predicted_quarters(in_float) != crops.labels)
    mistakes = np.count_nonzero(predicted_quarters(classified.output(OUTPUT)) != crops.labels)

    assert float_mistakes <= 1, "the task itself is broken: look at preprocessing and data first"
    assert mistakes <= float_mistakes + 1


@pytest.mark.backend("htp", htp_performance_mode="burst")
@pytest.mark.latency_budget(p50_ms=3.0, p95_ms=4.0)
def test_latency(classifier: Session, crops: LabeledSamples) -> None:
    """Keeps its budget on a Snapdragon. The simulator's times say nothing about one: there it is "not judged"."""
    # hundreds of inferences on a device; no more than a glance on the simulator, where they would decide nothing
    assert_latency(classifier.measure(crops.inputs))
