"""Inputs of a model, and what the right answers are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Sample = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class LabeledSamples:
    """Inputs for a model with a batch of 1, by name, and the class of each."""

    inputs: list[Sample]
    labels: NDArray[np.int64]
