"""``qnn-onnx-converter``: from an ONNX model to C++ source and weights, quantised on the way if asked for.

Flags are those of Qualcomm's public manual and converters. Releases differ in one thing that matters here: the bit widths
were ``--act_bw``, ``--weight_bw`` and ``--bias_bw`` and are ``--act_bitwidth`` and so on since, so the tool is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from pytest_qnn.encodings.checks import require_sound
from pytest_qnn.encodings.files import QNN, read_encodings, write_encodings
from pytest_qnn.errors import ModelError, OptionError
from pytest_qnn.model.graph_tensors import read_graph
from pytest_qnn.model.onnx_file import Model, read_model
from pytest_qnn.model.pair import usable
from pytest_qnn.quantization.calibration import CalibrationData, open_calibration_data
from pytest_qnn.sdk.installation import CONVERTER, Sdk
from pytest_qnn.sdk.tool import ask, step
from pytest_qnn.settings import unknown_name

LAYOUTS = ("NCDHW", "NDHWC", "NCHW", "NHWC", "NFC", "NCF", "NTF", "TNF", "NF", "NC", "F", "NONTRIVIAL")
BIT_WIDTHS = {"activations": (8, 16), "weights": (4, 8), "bias": (8, 32)}
_FLAGS = {
    "activations": ("--act_bitwidth", "--act_bw"),
    "weights": ("--weights_bitwidth", "--weight_bw"),
    "bias": ("--bias_bitwidth", "--bias_bw"),
}
HELP_SECONDS = 120


@dataclass(frozen=True)
class Conversion:
    """What the converter made.

    Attributes:
        cpp: C++ source that builds the graph.
        weights: its constants; None for a model without any.
        description: JSON description of the converted graph.
        graph: the graph's name, by which backend configuration must call it.
        log: the tool's log.
    """

    cpp: Path
    weights: Path | None
    description: Path | None
    graph: str
    log: Path


def convert(
    sdk: Sdk,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    name: str | None = None,
    dimensions: Mapping[str, int] | None = None,
    overrides: str | os.PathLike[str] | None = None,
    data: object = None,
    samples: int | None = None,
    activations: int | None = None,
    weights: int | None = None,
    bias: int | None = None,
    per_channel: bool = False,
    float_fallback: bool = False,
    layouts: Mapping[str, str] | None = None,
    preserve_layout: bool = True,
    timeout: float = 1800,
) -> Conversion:
    """Convert a model into ``output``/``NAME.cpp``, ``.bin`` and ``_net.json``.

    Args:
        name: of the result, and of the graph; by default the model's file name.
        dimensions: sizes for named dynamic dimensions.
        overrides: encodings that win over the converter's own, of any format that
            :func:`pytest_qnn.model.read_encodings` reads; the converter gets them as ``--quantization_overrides``.
        data: calibration data, as for :func:`pytest_qnn.model.quantize`; it makes the converter quantise.
        samples: use the first so many samples only.
        activations, weights, bias: bit widths; the converter's default is 8.
        per_channel: quantise the weights of convolutions per channel.
        float_fallback: quantise without data, by encodings alone; what has none stays float.
        layouts: layout of inputs by name, e.g. ``{"image": "NCHW"}``.
        preserve_layout: keep the ONNX model's layout of inputs and outputs; otherwise the converter may make images
            channel-last, and calibration data would have to be given so.
        timeout: seconds.

    Raises:
        ModelError, InputError, EncodingError, OptionError: what was asked for makes no sense.
        CompileError: the converter refused the model.
        ArtifactError: it made nothing, or ``output`` can't be written.
        TargetError: it died, hung, or isn't there.
    """
    source = usable(read_model(model, dimensions))
    stem = _checked_name(name or source.path.name.removesuffix(".onnx"))
    widths = {"activations": activations, "weights": weights, "bias": bias}
    arguments = [
        "--input_network",
        str(source.path),
        *_input_dims(source, dict(dimensions or {})),
        *_layouts(source, layouts or {}),
        *(["--preserve_io", "layout"] if preserve_layout else []),
    ]
    quantizes = data is not None or float_fallback
    asked = [what for what, bits in widths.items() if bits is not None]
    asked += ["overrides"] * (overrides is not None) + ["per_channel"] * per_channel
    if asked and not quantizes:
        raise OptionError(
            f"{', '.join(asked)}: without calibration data the converter ignores this and makes a float model: give data "
            "(--data), or float_fallback (--float-fallback) to quantise by encodings alone"
        )
    if data is not None and float_fallback:
        raise OptionError(
            "float_fallback quantises by encodings alone, and the converter refuses it with data: leave one out"
        )
    if float_fallback and overrides is None and not source.quantized:
        raise OptionError(
            f"float_fallback: {source.path.name} is a float model and no overrides are given: nothing to go by"
        )
    if data is not None and not preserve_layout:
        raise OptionError(
            "preserve_layout=False with data: the converter would read the data in a layout of its own choice, unnoticed"
        )
    for what, bits in widths.items():
        if bits is not None:
            arguments += [_flag(sdk, *_FLAGS[what]), str(_bits(what, bits))]
    arguments += ["--use_per_channel_quantization"] * per_channel + ["--float_fallback"] * float_fallback
    calibration = open_calibration_data(data, source.inputs, samples) if data is not None else None
    graph = read_graph(source.path) if overrides is not None else None
    encodings = read_encodings(overrides, graph) if overrides is not None else None
    if encodings is not None:
        require_sound(encodings, graph)
    folder = Path(output).expanduser().absolute()
    with step(sdk, CONVERTER, source.path.name, folder, f"{stem}.convert.log", timeout) as run:
        if calibration is not None:
            arguments += ["--input_list", str(write_input_list(calibration, run.work / "calibration"))]
        results = run.work / "results"
        results.mkdir()
        named = results / f"{stem}_overrides.json"
        if encodings is not None:
            write_encodings(encodings, named, QNN, graph)
            arguments += ["--quantization_overrides", str(named)]
        cpp = results / f"{stem}.cpp"
        arguments += ["--output_path", str(cpp)]
        run.run(arguments)
        run.made(cpp)
        made = [cpp, *(f for f in (results / f"{stem}.bin", results / f"{stem}_net.json", named) if f.is_file())]
        run.made(*made)
        inputs = [Path(path) for path, _ in source.files] + ([Path(overrides)] if overrides is not None else [])
        run.hand_over({file: folder / file.name for file in made}, inputs, arguments)
        present = {file.name for file in made}
        return Conversion(
            cpp=folder / cpp.name,
            weights=folder / f"{stem}.bin" if f"{stem}.bin" in present else None,
            description=folder / f"{stem}_net.json" if f"{stem}_net.json" in present else None,
            graph=graph_name(stem),
            log=run.log,
        )


def graph_name(stem: str) -> str:
    """The name that the converter gives a graph: its output's file name, what C++ doesn't allow replaced."""
    return re.sub(r"\W", "_", stem, flags=re.ASCII)


def write_input_list(data: CalibrationData, folder: Path) -> Path:
    """Write samples as float32 ``.raw`` files, which is how the converter reads them, with a list of absolute paths.

    Raises:
        InputError: a sample doesn't fit.
        OSError: ``folder`` can't be written.
    """
    folder.mkdir()
    lines = []
    for number, sample in enumerate(data):
        parts = []
        for position, spec in enumerate(data.specs):
            file = folder / f"{number}_{position}.raw"
            sample[spec.name].astype(np.float32).tofile(file)
            parts.append(f"{spec.name}:={file}")
        lines.append(" ".join(parts))
    listed = folder / "input_list.txt"
    listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return listed


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]*", name, re.ASCII):
        raise OptionError(f"name: {name!r} can't be a file name here: use letters, digits, '_', '-' and '.'")
    return graph_name(name)  # so that file and graph are called alike


def _input_dims(model: Model, dimensions: Mapping[str, int]) -> list[str]:
    if not dimensions:
        return []
    shapes = ((spec.name, ",".join(map(str, spec.shape))) for spec in model.inputs)
    return [text for name, shape in shapes for text in ("--input_dim", name, shape)]


def _layouts(model: Model, layouts: Mapping[str, str]) -> list[str]:
    names = [spec.name for spec in model.inputs]
    arguments = []
    for name, layout in layouts.items():
        if name not in names:
            raise ModelError(f"{model.path.name}: layout: {unknown_name('input', name, names)}")
        if layout not in LAYOUTS:
            raise OptionError(f"input {name!r}: {unknown_name('layout', layout, LAYOUTS)}")
        arguments += ["--input_layout", name, layout]
    return arguments


def _bits(what: str, bits: object) -> int:
    if isinstance(bits, bool) or bits not in BIT_WIDTHS[what]:
        raise OptionError(f"{what}: the converter knows {' and '.join(map(str, BIT_WIDTHS[what]))} bits, got {bits!r}")
    return int(str(bits))


@cache
def _flag(sdk: Sdk, current: str, former: str) -> str:
    """Whichever name of a flag this release's converter has."""
    _, text = ask(sdk, CONVERTER, "--help", HELP_SECONDS)
    return former if former in text and current not in text else current
