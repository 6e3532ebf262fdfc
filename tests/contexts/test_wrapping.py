"""Foreign context binaries run on the simulated HTP, with the inputs and outputs of the ONNX model they came from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from pytest_qnn import ArtifactError
from pytest_qnn.artifacts.binary import GraphInfo, TensorInfo, read_context_binary
from pytest_qnn.artifacts.matching import Edge, Match
from pytest_qnn.artifacts.wrapper import EDGE_OPERATORS, Wrapped, build_wrapper, wrap
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.model.tensors import Encoding, TensorSpec
from tests import small_models
from tests.contexts import foreign_models
from tests.contexts.conftest import Load, MakeBinary


def same_results(load: Load, wrapped: Wrapped, model: Path) -> None:
    """The wrapper's outputs are those of the ordinary load, bit for bit, and only its edge runs on the CPU."""
    foreign, ordinary = load(wrapped.path, wrapped.files), load(model)
    assert foreign.info.inputs == ordinary.info.inputs
    assert foreign.info.outputs == ordinary.info.outputs
    for sample in seeded_inputs(model, count=2, seed=7):
        (got, _), (wanted, _) = foreign.run(sample), ordinary.run(sample)
        for name, array in wanted.items():
            assert got[name].dtype == array.dtype
            assert np.array_equal(got[name], array)
            assert np.unique(array).size > 1
    placed = foreign.info.placement
    assert [op for ep, _, op in placed if ep.startswith("QNN")] == ["EPContext"]
    assert {op for ep, _, op in placed if not ep.startswith("QNN")} <= EDGE_OPERATORS


@pytest.mark.parametrize(
    ("binary", "model", "edge"),
    [
        ("conv.qdq.onnx", "conv.qdq.onnx", ["QuantizeLinear", "DequantizeLinear"]),
        ("conv.onnx", "conv.onnx", []),
        ("conv16.qdq.onnx", "conv16.qdq.onnx", ["QuantizeLinear", "DequantizeLinear"]),
        ("nhwc.onnx", "conv.qdq.onnx", ["Transpose", "QuantizeLinear", "DequantizeLinear", "Transpose"]),
        ("nhwc16.onnx", "conv16.qdq.onnx", ["Transpose", "QuantizeLinear", "DequantizeLinear", "Transpose"]),
        ("two.onnx", "two.onnx", []),
        ("lookup.onnx", "lookup.onnx", []),
    ],
)
def test_a_bare_binary_computes_what_its_model_does(
    binary: str,
    model: str,
    edge: list[str],
    models: Path,
    kinds: Path,
    make_binary: MakeBinary,
    load: Load,
    tmp_path: Path,
) -> None:
    here = {p.name: p for folder in (models, kinds) for p in folder.glob("*.onnx")}
    lone = Path(shutil.copy(make_binary(here[binary]), tmp_path / "foreign.bin"))  # no wrapper, no manifest
    wrapped = wrap(read_context_binary(lone), tmp_path / "wrapped", read_model(here[model]))
    assert [op for _, op in wrapped.edges] == edge
    same_results(load, wrapped, here[model])


def test_exchanged_names_reach_the_right_tensor(
    kinds: Path, make_binary: MakeBinary, load: Load, tmp_path: Path
) -> None:
    swapped = foreign_models.two_inputs(tmp_path / "swapped.onnx", "b", "a", "r")  # r = b - a
    binary = make_binary(kinds / "two.onnx")  # y = a - b
    wrapped = wrap(read_context_binary(binary), tmp_path / "w", read_model(swapped), names={"b": "a", "a": "b"})
    same_results(load, wrapped, swapped)


def test_names_that_the_wrapper_has_no_escapes_for_go_by_their_order(
    kinds: Path, make_binary: MakeBinary, load: Load, tmp_path: Path
) -> None:
    odd = foreign_models.two_inputs(tmp_path / "odd.onnx", "p;q", "r=s")
    info, model = read_context_binary(make_binary(odd)), kinds / "two.onnx"
    same_results(load, wrap(info, tmp_path / "w", read_model(model), names={"a": "p;q", "b": "r=s"}), model)
    crossed = wrap(info, tmp_path / "x", read_model(model), names={"a": "r=s", "b": "p;q"})
    sample = seeded_inputs(model, count=1)[0]
    got, wanted = load(crossed.path, crossed.files).run(sample)[0], load(model).run(sample)[0]
    assert np.array_equal(got["y"], -wanted["y"])  # b - a


def test_64_bit_indices_become_the_binarys_32_bits(
    kinds: Path, make_binary: MakeBinary, load: Load, tmp_path: Path
) -> None:
    narrow = onnx.load(str(kinds / "lookup.onnx"))
    narrow.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
    onnx.save(narrow, str(tmp_path / "narrow.onnx"))
    info = read_context_binary(make_binary(tmp_path / "narrow.onnx"))
    assert info.graph().inputs[0].data_type == "INT_32"
    wrapped = wrap(info, tmp_path / "w", read_model(kinds / "lookup.onnx"))
    assert wrapped.edges == (("ids/Cast", "Cast"),)
    same_results(load, wrapped, kinds / "lookup.onnx")


def test_a_scalar_output_that_the_binary_has_as_one_element_is_a_scalar_again(
    make_binary: MakeBinary, load: Load, tmp_path: Path
) -> None:
    node = helper.make_node("ReduceSum", ["x"], ["y"], name="sum", keepdims=0)
    model = small_models.save(tmp_path / "sum.onnx", [node], {"x": [1, 16]}, {"y": []})
    info = read_context_binary(make_binary(model))
    assert info.graph().outputs[0].shape == (1,)
    wrapped = wrap(info, tmp_path / "w", read_model(model))
    assert wrapped.edges == (("y/Reshape", "Reshape"),)
    foreign, ordinary = load(wrapped.path, wrapped.files), load(model)
    sample = seeded_inputs(model, count=1)[0]
    assert foreign.run(sample)[0]["y"].shape == ()
    assert foreign.run(sample)[0]["y"] == ordinary.run(sample)[0]["y"]


def test_one_of_several_graphs_runs_when_it_is_named(make_binary: MakeBinary, load: Load, tmp_path: Path) -> None:
    split = small_models.unary(tmp_path / "split.onnx", "Relu", "Acosh", "Sigmoid")  # Acosh doesn't run on HTP
    info = read_context_binary(make_binary(split))
    assert len(info.graphs) == 2
    assert not info.shares_weights
    for graph, operator in zip(info.graphs, ("Relu", "Sigmoid"), strict=True):
        model = small_models.unary(tmp_path / f"{operator}.onnx", operator)
        same_results(load, wrap(info, tmp_path / operator, read_model(model), graph=graph.name), model)


def test_without_a_model_the_wrapper_has_the_binarys_own_tensors(
    kinds: Path, make_binary: MakeBinary, load: Load, tmp_path: Path
) -> None:
    info = read_context_binary(make_binary(kinds / "nhwc.onnx"))
    wrapped = wrap(info, tmp_path)
    (spec,) = read_model(wrapped.path).inputs
    assert (spec.name, spec.dtype, spec.shape) == ("image", "uint8", (1, 16, 16, 3))
    sample = {"image": np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)}
    got, wanted = load(wrapped.path, wrapped.files).run(sample)[0], load(kinds / "nhwc.onnx").run(sample)[0]
    assert np.array_equal(got["_1_features_out"], wanted["_1_features_out"])


def test_the_wrapper_is_valid_onnx_and_deleting_the_original_does_not_hurt_it(
    models: Path, conv_binary: Path, load: Load, tmp_path: Path
) -> None:
    lone = Path(shutil.copy(conv_binary, tmp_path / "foreign.bin"))
    wrapped = wrap(read_context_binary(lone), tmp_path / "w", read_model(models / "conv.qdq.onnx"))
    onnx.checker.check_model(onnx.load(str(wrapped.path)))
    lone.unlink()
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["foreign.bin", "foreign.wrapper.onnx"]
    same_results(load, wrapped, models / "conv.qdq.onnx")


def test_a_binary_that_changes_between_reading_and_wrapping_is_refused(conv_binary: Path, tmp_path: Path) -> None:
    lone = Path(shutil.copy(conv_binary, tmp_path / "foreign.bin"))
    info = read_context_binary(lone)
    content = bytearray(lone.read_bytes())
    content[-1000] ^= 1
    lone.write_bytes(content)
    os.utime(lone, ns=(1, 1))
    with pytest.raises(ArtifactError, match=r"foreign\.bin changed on disk since it was read"):
        wrap(info, tmp_path / "w")
    assert not list((tmp_path / "w").glob("*.onnx"))


def test_a_folder_that_cannot_be_written_is_named(conv_binary: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=rf"{tmp_path}/file/w: the wrapper can't be written: Not a directory"):
        wrap(read_context_binary(conv_binary), tmp_path / "file" / "w")


# --- the edge alone, computed by onnx's reference implementation ----------------------------------------------------------


def edge_results(edge: Edge, value: np.ndarray, entering: bool) -> np.ndarray:
    """What the nodes before (or after) the EPContext node make of ``value``."""
    other = Edge(TensorSpec("other", "float32", (1,)), TensorInfo("other", "FLOAT_32", "float32", (1,)))
    pair = ((edge,), (other,)) if entering else ((other,), (edge,))
    graph = GraphInfo("g", (pair[0][0].tensor,), (pair[1][0].tensor,))
    proto = build_wrapper(Match(graph, *pair), "x.bin")
    onnx.checker.check_model(proto)
    (context,) = [n for n in proto.graph.node if n.op_type == "EPContext"]
    values = {v.name: v for v in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)}
    if entering:
        inputs, outputs = [values[edge.spec.name]], [values[context.input[0]]]
    else:
        inputs, outputs = [values[context.output[0]]], [values[edge.spec.name]]
    proto.graph.node.remove(context)
    alone = helper.make_graph(proto.graph.node, "edge", inputs, outputs, proto.graph.initializer)
    model = helper.make_model(alone, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    (result,) = ReferenceEvaluator(model).run(None, {inputs[0].name: value})
    return np.asarray(result)


PER_CHANNEL = Encoding((0.5, 0.25, 2.0), (1, 2, 3), "uint8", axis=3)  # of the binary's last axis


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_per_channel_scales_stay_with_the_binarys_axis(dtype: str) -> None:
    edge = Edge(
        TensorSpec("x", dtype, (1, 3, 2, 4)),
        TensorInfo("x", "UFIXED_POINT_8", "uint8", (1, 2, 4, 3), PER_CHANNEL),
        "channels_last",
        (0, 2, 3, 1),
    )
    q = np.random.default_rng(0).integers(0, 200, (1, 2, 4, 3), dtype=np.uint8)
    real = ((q.astype(np.float32) - (1, 2, 3)) * (0.5, 0.25, 2.0)).astype(dtype).transpose(0, 3, 1, 2)
    left = edge_results(edge, q, entering=False)
    assert (left.dtype, left.shape) == (np.dtype(dtype), (1, 3, 2, 4))
    assert np.array_equal(left, real)
    assert np.array_equal(edge_results(edge, real, entering=True), q)


def test_floats_of_another_width_are_cast() -> None:
    edge = Edge(TensorSpec("x", "float32", (2, 2)), TensorInfo("x", "FLOAT_16", "float16", (2, 2)))
    value = np.array([[1.0, 2.5], [-3.0, 0.1]], np.float32)
    assert np.array_equal(edge_results(edge, value, entering=True), value.astype(np.float16))
    assert edge_results(edge, value.astype(np.float16), entering=False).dtype == np.float32
