"""The bare binary is handed out with what raw files don't say of themselves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from pytest_qnn import ArtifactError
from pytest_qnn.artifacts.export import export_binary
from pytest_qnn.model.onnx_file import read_model
from tests import small_models
from tests.contexts.conftest import Load, MakeBinary


def test_names_types_layouts_and_encodings_lie_beside_the_binary(
    make_binary: MakeBinary, kinds: Path, models: Path, tmp_path: Path
) -> None:
    source = make_binary(kinds / "nhwc.onnx", "SM8550")
    exported = export_binary(source, tmp_path / "out", models / "conv.qdq.onnx", name="conv")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["conv.bin", "conv.tensors.json"]
    assert exported.binary.read_bytes() == source.read_bytes()
    told = json.loads(exported.tensors.read_text())
    assert told["binary"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert told["soc"] == {"id": 43, "name": "SM8550", "htp_arch": 73}
    (tensor,) = told["graphs"][0]["inputs"]
    encoding = read_model(models / "conv.qdq.onnx").inputs[0].encoding
    assert encoding is not None
    assert (tensor["name"], tensor["data_type"], tensor["bytes"]) == ("image", "UFIXED_POINT_8", 768)
    assert tensor["encoding"]["offset"] == [-encoding.zero_point[0]]  # QNN's sign
    assert tensor["encoding"]["zero_point"] == list(encoding.zero_point)
    assert tensor["model"]["name"] == "x"
    assert tensor["model"]["layout"] == "channels_last"
    shape = np.zeros(tensor["model"]["shape"]).transpose(tensor["model"]["permutation"]).shape
    assert list(shape) == tensor["shape"] == [1, 16, 16, 3]


def test_a_native_raw_file_made_from_the_description_is_what_the_binary_takes(
    make_binary: MakeBinary, kinds: Path, models: Path, load: Load, tmp_path: Path
) -> None:
    told = json.loads(
        export_binary(make_binary(kinds / "nhwc.onnx"), tmp_path, models / "conv.qdq.onnx").tensors.read_text()
    )
    x = np.random.default_rng(5).normal(size=(1, 3, 16, 16)).astype(np.float32)
    wanted = load(models / "conv.qdq.onnx").run({"x": x})[0]["y"]
    (entry,), (result,) = told["graphs"][0]["inputs"], told["graphs"][0]["outputs"]
    q = np.rint(x / np.float32(entry["encoding"]["scale"][0])) - entry["encoding"]["offset"][0]
    native = q.clip(0, 255).astype(entry["dtype"]).transpose(entry["model"]["permutation"])
    assert native.nbytes == entry["bytes"]
    raw = load(kinds / "nhwc.onnx").run({entry["name"]: native})[0][result["name"]]
    back = (raw.astype(np.float32) + result["encoding"]["offset"][0]) * np.float32(result["encoding"]["scale"][0])
    assert np.array_equal(back.transpose(np.argsort(result["model"]["permutation"])), wanted)


def test_a_wrapper_tells_its_own_names_also_where_shapes_are_equal(
    make_binary: MakeBinary, load: Load, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    weights = {name: (k * rng.normal(size=(4, 3, 3, 3))).astype(np.float32) for k, name in ((1, "v"), (3, "w"))}
    nodes = [onnx.helper.make_node("Conv", ["x", w], [y], name=y) for w, y in (("v", "p"), ("w", "q"))]
    shape = [1, 4, 6, 6]
    floats = small_models.save(tmp_path / "f.onnx", nodes, {"x": [1, 3, 8, 8]}, {"p": shape, "q": shape}, weights)
    model = small_models.quantized(floats, tmp_path / "twin.onnx")
    binary = make_binary(model)
    with pytest.raises(ArtifactError, match="'p' and 'q'.*could be"):
        export_binary(binary, tmp_path / "out", model)
    told = json.loads(export_binary(binary.parent / "twin.onnx", tmp_path / "out").tensors.read_text())
    by_name = {t["model"]["name"]: t["encoding"] for t in told["graphs"][0]["outputs"]}
    for spec in read_model(model).outputs:
        assert spec.encoding is not None
        assert by_name[spec.name]["scale"] == list(spec.encoding.scale)


def test_an_embedded_binary_comes_out(load: Load, models: Path, conv_binary: Path, tmp_path: Path) -> None:
    wrapper = tmp_path / "all-in-one.onnx"
    load(
        models / "conv.qdq.onnx",
        ep__context_enable="1",
        ep__context_embed_mode="1",
        ep__context_file_path=str(wrapper),
    ).close()
    exported = export_binary(wrapper, tmp_path / "out")
    assert exported.binary.name == "all-in-one.bin"
    assert json.loads(exported.tensors.read_text())["graphs"][0]["outputs"][0]["model"]["name"] == "y"


def test_without_a_model_the_description_says_null(conv_binary: Path, tmp_path: Path) -> None:
    told = json.loads(export_binary(conv_binary, tmp_path).tensors.read_text())
    assert told["model"] is told["graphs"][0]["inputs"][0]["model"] is None


def test_nothing_is_left_of_an_export_that_fails(conv_binary: Path, kinds: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing that fits"):
        export_binary(conv_binary, tmp_path / "out", kinds / "two.onnx")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="can't be written there: .*xists"):
        export_binary(conv_binary, tmp_path / "file")
    with pytest.raises(ArtifactError, match="it has 0 context binaries"):
        export_binary(models / "conv.onnx", tmp_path / "out")
