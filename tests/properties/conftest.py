"""A small classifier, quantised, for what runs on the simulator."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qnn.backend import Backend
from pytest_qnn.properties import ModelPair, QdqModel, Step
from pytest_qnn.session import Session

NET = QdqModel(
    (1, 3, 16, 16),
    (
        Step("Conv", 1),
        Step("Relu"),
        Step("MaxPool"),
        Step("Conv", 11),
        Step("GlobalAveragePool"),
        Step("Reshape", 1),
        Step("Gemm"),
    ),
)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    """``model.qdq.onnx`` (A8W8) and ``model.onnx``: x[1, 3, 16, 16] -> y[1, 8]."""
    return NET.save(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="session")
def classifier(htp: Backend, pair: ModelPair) -> Session:
    """The classifier on the simulated HTP."""
    return htp.load(pair.quantized, float_model=pair.float_model)


@pytest.fixture(scope="session")
def folder(pair: ModelPair) -> Path:
    """Where the classifier lies."""
    return pair.quantized.parent
