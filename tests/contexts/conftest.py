"""Context binaries of many kinds, made here by the execution provider and stripped of everything that it knows of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from onnxruntime.quantization import QuantType

from pytest_qnn.bench import Bench
from pytest_qnn.runners.ort import QNN, LoadedModel, LoadRequest
from tests import small_models
from tests.contexts import foreign_models

MakeBinary = Callable[..., Path]
Load = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def load(bench: Bench) -> Load:
    """Load an ONNX file on the simulated HTP: ``load(path, files, soc, **session configuration)``."""

    def load(path: Path, files: tuple[tuple[str, str], ...] = (), soc: str | None = None, **config: str) -> LoadedModel:
        plan = bench.target.plan("htp", soc, {})
        request = LoadRequest(
            model=str(path),
            files=files,
            process=plan.process,
            provider=QNN,
            provider_options=plan.provider_options,
            config=tuple((key.replace("__", "."), value) for key, value in config.items()),
        )
        return LoadedModel(bench.pool, request, path.name, bench.limits)

    return load


@pytest.fixture(scope="session")
def make_binary(load: Load, tmp_path_factory: pytest.TempPathFactory) -> MakeBinary:
    """A bare context binary of a model: ``make_binary(model, soc)``; its wrapper lies beside it as ``NAME.onnx``."""
    made: dict[tuple[str, str], Path] = {}

    def make(model: Path, soc: str = "SM8650") -> Path:
        if (str(model), soc) not in made:
            wrapper = tmp_path_factory.mktemp("binary") / f"{model.stem}.onnx"
            load(
                model, soc=soc, ep__context_enable="1", ep__context_file_path=str(wrapper), ep__context_embed_mode="0"
            ).close()
            made[str(model), soc] = next(wrapper.parent.glob("*.bin"))
        return made[str(model), soc]

    return make


@pytest.fixture(scope="session")
def kinds(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: ``conv16.qdq.onnx`` (A16W8), and the models of :mod:`tests.contexts.foreign_models`."""
    folder = tmp_path_factory.mktemp("kinds")
    small_models.quantized(
        models / "conv.onnx", folder / "conv16.qdq.onnx", activation_type=QuantType.QUInt16, per_channel=True
    )
    names = {"x": "image", "y": "_1_features_out"}
    foreign_models.with_integer_edges(models / "conv.qdq.onnx", folder / "nhwc.onnx", names)
    foreign_models.with_integer_edges(folder / "conv16.qdq.onnx", folder / "nhwc16.onnx", names)
    foreign_models.two_inputs(folder / "two.onnx")
    foreign_models.lookup(folder / "lookup.onnx")
    foreign_models.cube(folder / "cube.onnx")
    return folder


@pytest.fixture(scope="session")
def conv_binary(make_binary: MakeBinary, models: Path) -> Path:
    """The context binary of ``conv.qdq.onnx`` for SM8650."""
    return make_binary(models / "conv.qdq.onnx")
