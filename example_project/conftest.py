"""The models under test, built once and kept in pytest's cache (``pytest --cache-clear`` builds them anew)."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_models import spoken_digits, text_orientation
from edge_models.quantization import QuantizedModel, build_quantized
from edge_models.spoken_digits import MelFrontEnd

CALIBRATION_SEED = 1  # the tests draw their samples with other seeds


@pytest.fixture(scope="session")
def build_folder(request: pytest.FixtureRequest) -> Path:
    """Where built models are kept between runs."""
    return request.config.cache.mkdir("models")


@pytest.fixture(scope="session")
def front_end() -> MelFrontEnd:
    """The mel front end as the speech embedding wants it."""
    return MelFrontEnd()


@pytest.fixture(scope="session")
def orientation_model(build_folder: Path) -> QuantizedModel:
    """The text orientation classifier, A8W8."""
    calibration = text_orientation.turned_crops(24, CALIBRATION_SEED)
    return build_quantized(build_folder, "text_orientation", text_orientation.model_file(), calibration.inputs)


@pytest.fixture(scope="session")
def embedding_model(build_folder: Path, front_end: MelFrontEnd) -> QuantizedModel:
    """The speech embedding, A8W8 with a scale for each output channel."""
    calibration = spoken_digits.spoken_digits(front_end, 100, CALIBRATION_SEED)
    return build_quantized(
        build_folder, "speech_embedding", spoken_digits.model_file(), calibration.inputs, per_channel=True
    )


@pytest.fixture(scope="session")
def miscalibrated_embedding_model(build_folder: Path) -> QuantizedModel:
    """The same, but calibrated on sound of -1..1 where the front end wants 16-bit samples: a mistake easily made."""
    calibration = spoken_digits.spoken_digits(MelFrontEnd(scale=1), 100, CALIBRATION_SEED)
    return build_quantized(
        build_folder, "speech_embedding_miscalibrated", spoken_digits.model_file(), calibration.inputs, per_channel=True
    )
