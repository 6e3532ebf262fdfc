"""Encodings applied to a float model: the QDQ model that comes out, on onnxruntime's CPU and on the simulated HTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pytest_qnn import EncodingError, ModelError, OptionError, assert_fully_offloaded, assert_matches_reference
from pytest_qnn.backend import Backend
from pytest_qnn.model import (
    AppliedEncodings,
    Encoding,
    EncodingSet,
    Precision,
    TensorEncoding,
    apply_encodings,
    compare_encodings,
    read_encodings,
    write_encodings,
)
from pytest_qnn.model.onnx_file import read_model
from tests import small_models


def run(file: Path, sample: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Results on onnxruntime's CPU, operator by operator."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return list(onnxruntime.InferenceSession(str(file), options).run(None, sample))


def set_of(**values: Any) -> EncodingSet:
    """A set whose tensors learn from the model what they are."""
    return EncodingSet(tuple(TensorEncoding(n, None, v) for n, v in values.items()), source="mine.json")


def of_range(low: float, high: float, bits: int = 8) -> Encoding:
    scale = (high - low) / (2**bits - 1)
    return Encoding((scale,), (round(-low / scale),), f"uint{bits}")


def of_weight(array: np.ndarray, bits: int = 8, axis: int | None = None) -> Encoding:
    """Symmetric, per channel of ``axis``."""
    over = None if axis is None else tuple(i for i in range(array.ndim) if i != axis)
    scale = np.atleast_1d(np.abs(array).max(over) / (2 ** (bits - 1) - 1))
    return Encoding(tuple(scale.tolist()), (0,) * scale.size, f"int{bits}", axis)


def constants(file: Path) -> dict[str, np.ndarray]:
    proto = onnx.load(str(file))
    return {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}


def net(path: Path, opset: int = 17) -> Path:
    """Conv, Relu, MaxPool, Flatten, Gemm with 32 input channels."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("MaxPool", ["r"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], name="fc", transB=1),
    ]
    values = {
        "w": rng.normal(size=(8, 16, 3, 3)).astype(np.float32),
        "b": rng.normal(size=8).astype(np.float32),
        "w2": rng.normal(size=(5, 128)).astype(np.float32),
        "b2": rng.normal(size=5).astype(np.float32),
    }
    return small_models.save(path, nodes, {"x": [1, 16, 8, 8]}, {"y": [1, 5]}, values, opset)


def net_set(file: Path, activations: int, weights: int) -> EncodingSet:
    """What AIMET writes for :func:`net`: no biases, nothing between Conv and Relu, nothing behind operators that only move."""
    w = constants(file)
    return set_of(
        x=of_range(-4.5, 4.5, activations),
        r=of_range(0.0, 45.0, activations),
        y=of_range(-600.0, 600.0, activations),
        w=of_weight(w["w"], weights, 0),
        w2=of_weight(w["w2"], weights, 0),
    )


def samples(count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(7)
    return [{"x": rng.normal(size=(1, 16, 8, 8)).astype(np.float32)} for _ in range(count)]


@pytest.mark.parametrize(("activations", "weights"), [(8, 8), (16, 8), (16, 4)])
@pytest.mark.parametrize("opset", [17, 21])
def test_what_comes_out_runs_on_htp_alone_and_as_well_as_its_quantisation_allows(
    htp: Backend, tmp_path: Path, opset: int, activations: int, weights: int
) -> None:
    file = net(tmp_path / "net.onnx", opset)
    done = apply_encodings(file, net_set(file, activations, weights), tmp_path / "q.onnx")
    assert done.unquantized == ()
    assert read_model(done.output).precision == f"A{activations}W{weights}"
    assert max(o.version for o in onnx.load(str(done.output)).opset_import if o.domain == "") == opset
    session = htp.load(done.output, float_model=file)
    assert_fully_offloaded(session)
    assert_matches_reference(session.run(samples()))


def test_what_a_set_leaves_out_is_derived_and_named(tmp_path: Path) -> None:
    file = net(tmp_path / "net.onnx")
    given = net_set(file, 8, 8)
    done = apply_encodings(file, given, tmp_path / "q.onnx")
    assert done.given == tuple(given.by_name)
    assert done.derived == {
        "p": "MaxPool of 'r'",
        "f": "Flatten of 'p'",
        "b": "bias: scale of 'x' times scale of 'w'",
        "b2": "bias: scale of 'f' times scale of 'w2'",
    }
    found = read_encodings(done.output).by_name
    x, w = given.by_name["x"].encoding, given.by_name["w"].encoding
    b = found["b"].encoding
    assert x is not None
    assert w is not None
    assert b is not None
    assert (b.dtype, b.axis, set(b.zero_point)) == ("int32", 0, {0})
    assert b.scale == pytest.approx([x.step * s for s in w.scale])
    assert found["r"].encoding == found["p"].encoding == found["f"].encoding
    assert "c" not in found, "a convolution and its Relu are one operation"


def test_weights_are_stored_as_integers_and_the_graphs_ends_keep_their_names(tmp_path: Path) -> None:
    file = net(tmp_path / "net.onnx")
    done = apply_encodings(file, net_set(file, 8, 4), tmp_path / "q.onnx")
    proto = onnx.load(str(done.output))
    onnx.checker.check_model(proto)
    types = {i.name: i.data_type for i in proto.graph.initializer}
    assert types["w_quantized"] == TensorProto.INT4
    assert types["b_quantized"] == TensorProto.INT32
    assert "w" not in types
    assert ([v.name for v in proto.graph.input], [v.name for v in proto.graph.output]) == (["x"], ["y"])
    stored = numpy_helper.to_array(next(i for i in proto.graph.initializer if i.name == "w_quantized"))
    expected = of_weight(constants(file)["w"], 4, 0).quantize(constants(file)["w"])
    np.testing.assert_array_equal(stored.astype(np.int8), expected)
    given = read_model(done.output).inputs[0].encoding
    assert given is not None
    assert given.range == pytest.approx((-4.5, 4.5), abs=0.04)


def test_a_relu_behind_its_quantiser_changes_nothing(tmp_path: Path) -> None:
    """A pair in front of the Relu gives the results of the Relu's own pair alone, which is what is written."""
    file = net(tmp_path / "net.onnx")
    given = net_set(file, 8, 8)
    behind = given.by_name["r"].encoding
    assert behind is not None
    pair = EncodingSet((*given.tensors, TensorEncoding("c", "activation", behind)))
    with_pair = apply_encodings(file, pair, tmp_path / "with.onnx").output
    without = apply_encodings(file, given, tmp_path / "without.onnx")
    assert without.unquantized == ()
    for sample in samples():
        np.testing.assert_array_equal(run(with_pair, sample)[0], run(without.output, sample)[0])


@pytest.mark.parametrize(
    "options", [{}, {"per_channel": True}, {"activation": "QUInt16"}, {"weight": "QInt4", "per_channel": True}], ids=str
)
@pytest.mark.parametrize("format", ["aimet-0.6.1", "aimet-1.0.0", "aimet-2.0.0", "qnn"])
def test_what_onnxruntime_quantised_comes_out_the_same_by_any_file(
    models: Path, tmp_path: Path, options: dict[str, Any], format: str
) -> None:
    from onnxruntime.quantization import QuantType

    chosen = {"per_channel": options.get("per_channel", False)}
    chosen |= {f"{k}_type": getattr(QuantType, v) for k, v in options.items() if k != "per_channel"}
    theirs = small_models.quantized(models / "conv.onnx", tmp_path / "theirs.onnx", **chosen)
    read = read_encodings(theirs)
    write_encodings(read, tmp_path / "e.json", format, models / "conv.onnx")
    ours = apply_encodings(models / "conv.onnx", tmp_path / "e.json", tmp_path / "ours.onnx")
    assert ours.unquantized == ()
    assert set(ours.derived) <= {"c"}
    rng = np.random.default_rng(3)
    for _ in range(4):
        sample = {"x": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)}
        np.testing.assert_array_equal(run(ours.output, sample)[0], run(theirs, sample)[0])
    again = compare_encodings(read, read_encodings(ours.output))
    assert (again.changes, again.only_first) == ((), ())


def test_blocks_run_on_htp_and_raise_the_opset(htp: Backend, tmp_path: Path) -> None:
    """onnxruntime's own quantisers, which lower opsets use for 4 bits, have no blocks."""
    w = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")
    file = small_models.save(tmp_path / "mm.onnx", [node], {"x": [4, 32]}, {"y": [4, 16]}, {"w": w})
    scale = np.abs(w.reshape(4, 8, 16)).max(1) / 7
    blocks = Encoding(tuple(scale.ravel().tolist()), (0,) * 64, "int4", 0, 8, (4, 16))
    given = set_of(x=of_range(-4, 4, 16), w=blocks, y=of_range(-30, 30, 16))
    done = apply_encodings(file, given, tmp_path / "q.onnx")
    assert [o.version for o in onnx.load(str(done.output)).opset_import if o.domain == ""] == [21]
    assert read_encodings(done.output).params["w"].scale_shape == (4, 16)
    session = htp.load(done.output, float_model=file)
    assert_fully_offloaded(session)
    x = np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32)
    assert_matches_reference(session.run({"x": x}))
    np.testing.assert_allclose(run(done.output, {"x": x})[0], x @ blocks.dequantize(blocks.quantize(w)), atol=0.01)


@pytest.mark.parametrize(
    ("operator", "bounds", "high", "derived"),
    [
        ("Sigmoid", (), 1.0, False),
        ("Clip", (0.0, 6.0), 6.0, True),
        ("Clip", (0.0, 6.0), 12.0, False),
        ("Clip", (1.0, 6.0), 6.0, False),
        ("Relu", (), 12.0, True),
    ],
)
def test_only_what_clips_may_change_places_with_its_quantiser(
    tmp_path: Path, operator: str, bounds: tuple[float, ...], high: float, derived: bool
) -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["n"], name="neg"),
        helper.make_node(operator, ["n", *(f"b{i}" for i in range(len(bounds)))], ["y"], name="op"),
    ]
    values = {f"b{i}": np.array(b, np.float32) for i, b in enumerate(bounds)}
    file = small_models.save(tmp_path / "m.onnx", nodes, {"x": [64]}, {"y": [64]}, values)
    done = apply_encodings(file, set_of(y=of_range(0.0, high)), tmp_path / "q.onnx")
    assert ("n" in done.derived) is derived
    x = np.linspace(-15, 15, 64, dtype=np.float32)
    y = of_range(0.0, high)
    expected = y.dequantize(y.quantize(run(file, {"x": x})[0]))
    np.testing.assert_array_equal(run(done.output, {"x": x})[0], expected)


def test_an_output_of_any_quantisers_model_has_the_outputs_name(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["inner"], name="relu"),
        helper.make_node("QuantizeLinear", ["inner", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dq"),
    ]
    values = {"s": np.array(0.5, np.float32), "z": np.array(3, np.uint8)}
    file = small_models.save(tmp_path / "m.onnx", nodes, {"x": [4]}, {"y": [4]}, values)
    assert read_encodings(file).activations == {"y": Encoding((0.5,), (3,), "uint8")}


def test_a_subgraph_takes_quantised_tensors_of_the_graph_around_it(tmp_path: Path) -> None:
    def branch(name: str, operator: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Add", ["x", "h"], [f"{name}_sum"], name=f"{name}_add"),
            helper.make_node(operator, [f"{name}_sum"], [f"{name}_y"], name=f"{name}_op"),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, [4])])

    nodes = [
        helper.make_node("Sigmoid", ["x"], ["h"], name="sigmoid"),
        helper.make_node(
            "If", ["flag"], ["y"], name="if", then_branch=branch("a", "Neg"), else_branch=branch("b", "Abs")
        ),
    ]
    file = small_models.save(
        tmp_path / "if.onnx", nodes, {"x": [4], "flag": []}, {"y": [4]}, types={"flag": TensorProto.BOOL}
    )
    x_encoding, h_encoding = of_range(-4, 4), of_range(0, 1)
    done = apply_encodings(file, set_of(x=x_encoding, h=h_encoding), tmp_path / "q.onnx")
    x = np.array([-3.3, -0.2, 0.7, 2.9], np.float32)
    real = x_encoding.dequantize(x_encoding.quantize(x))
    h = h_encoding.dequantize(h_encoding.quantize(1 / (1 + np.exp(-real))))
    for flag, expected in ((True, -(real + h)), (False, np.abs(real + h))):
        got = run(done.output, {"x": x, "flag": np.array(flag)})[0]
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_constants_of_elementwise_operators_get_their_own_range(htp: Backend, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="mm"),
        helper.make_node("Add", ["m", "bias"], ["y"], name="add"),
    ]
    rng = np.random.default_rng(0)
    values = {"w": rng.normal(size=(8, 4)).astype(np.float32), "bias": np.array([1.0, -0.5, 0.25, 3.0], np.float32)}
    file = small_models.save(tmp_path / "mm.onnx", nodes, {"x": [2, 8]}, {"y": [2, 4]}, values)
    given = set_of(x=of_range(-4, 4), w=of_weight(values["w"]), m=of_range(-12, 12), y=of_range(-12, 12))
    done = apply_encodings(file, given, tmp_path / "q.onnx")
    assert done.derived == {"bias": "its own range -0.5 .. 3"}
    session = htp.load(done.output, float_model=file)
    assert_fully_offloaded(session)
    assert_matches_reference(session.run({"x": rng.normal(size=(2, 8)).astype(np.float32)}))


def test_constants_may_be_nodes_and_graph_inputs(tmp_path: Path) -> None:
    """Old exporters list initializers among the inputs, others write Constant nodes."""
    w, b = np.array([[2.0, -1.0]], np.float32), np.array([0.5], np.float32)
    nodes = [
        helper.make_node("Constant", [], ["b"], name="constant", value=numpy_helper.from_array(b)),
        helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="fc", transB=1),
    ]
    file = small_models.save(tmp_path / "m.onnx", nodes, {"x": [1, 2], "w": [1, 2]}, {"y": [1, 1]}, {"w": w})
    given = set_of(x=of_range(-1, 1), w=of_weight(w), y=of_range(-4, 4))
    done = apply_encodings(file, given, tmp_path / "q.onnx")
    proto = onnx.load(str(done.output))
    assert [v.name for v in proto.graph.input] == ["x"]
    assert not [n for n in proto.graph.node if n.op_type == "Constant"]
    assert run(done.output, {"x": np.array([[1.0, 0.5]], np.float32)})[0] == pytest.approx(2.0, abs=0.04)


def test_external_data_stays_external(tmp_path: Path) -> None:
    file = net(tmp_path / "net.onnx")
    given = net_set(file, 8, 8)
    inside = apply_encodings(file, given, tmp_path / "inside.onnx").output
    outside_file = tmp_path / "outside.onnx"
    onnx.save(
        onnx.load(str(file)), str(outside_file), save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    folder = tmp_path / "out"
    folder.mkdir()
    for _ in range(2):
        outside = apply_encodings(outside_file, given, folder / "q.onnx").output
        data = [f.name for f in folder.iterdir() if f.name != "q.onnx"]
        assert len(data) == 1
        assert data[0].startswith("q.onnx.")
        assert data[0].endswith(".data")
    assert outside.stat().st_size < inside.stat().st_size
    np.testing.assert_array_equal(run(outside, samples(1)[0])[0], run(inside, samples(1)[0])[0])
    other = EncodingSet(tuple(t for t in given.tensors if t.name != "w2"))
    apply_encodings(outside_file, other, folder / "q.onnx")
    now = [f.name for f in folder.iterdir() if f.name != "q.onnx"]
    assert len(now) == 1
    assert now != data


def test_tensors_without_encodings_stay_float_and_are_named(tmp_path: Path) -> None:
    file = net(tmp_path / "net.onnx")
    given = net_set(file, 8, 8)
    some = EncodingSet(tuple(t for t in given.tensors if t.name in ("x", "r", "w")))
    done = apply_encodings(file, some, tmp_path / "q.onnx")
    assert done.unquantized == ("w2", "b2")
    assert run(done.output, samples(1)[0])[0].shape == (1, 5)


def test_what_cannot_be_applied(tmp_path: Path) -> None:
    file = net(tmp_path / "net.onnx")
    output = tmp_path / "q.onnx"
    with pytest.raises(
        EncodingError, match=r"mine.json: activation 'x': int8 without a scale: only a calibration can find"
    ):
        apply_encodings(file, set_of(x=Precision("int", 8)), output)
    with pytest.raises(OptionError, match="is the float model itself"):
        apply_encodings(file, set_of(x=of_range(-1, 1)), file)
    with pytest.raises(OptionError, match="its folder .* doesn't exist"):
        apply_encodings(file, set_of(x=of_range(-1, 1)), tmp_path / "no" / "q.onnx")
    with pytest.raises(OptionError, match="is a folder: name a file in it"):
        apply_encodings(file, set_of(x=of_range(-1, 1)), tmp_path)
    with pytest.raises(ModelError, match="nowhere.onnx: the model can't be read"):
        apply_encodings(tmp_path / "nowhere.onnx", set_of(x=of_range(-1, 1)), output)
    with pytest.raises(ModelError, match="net.onnx: has no encodings: it is no QDQ model"):
        apply_encodings(file, file, output)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["net.onnx"]


def test_the_result_says_what_was_done(tmp_path: Path) -> None:
    file = net(tmp_path / "net.onnx")
    before = file.read_bytes()
    done = apply_encodings(str(file), net_set(file, 8, 8), str(tmp_path / "q.onnx"))
    assert isinstance(done, AppliedEncodings)
    assert done.output == tmp_path / "q.onnx"
    assert file.read_bytes() == before
