"""The ways in which the runtime would let a test pass that should not, each closed. Every test runs the real runtime."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pytest_qnn import (
    AccuracyError,
    ArtifactError,
    BackendUnavailableError,
    CompileError,
    ExecutionError,
    ModelError,
    OptionError,
    PlacementError,
    TargetError,
    assert_fully_offloaded,
    assert_matches_reference,
)
from pytest_qnn.artifacts.content_cache import CacheDamagedWarning
from pytest_qnn.backend import Backend
from pytest_qnn.bench import Bench
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.runners.ort import LoadedModel, LoadRequest
from pytest_qnn.session import Run
from pytest_qnn.settings import Settings
from tests import small_models


@pytest.fixture(scope="module")
def context(htp: Backend, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context binary of the quantised model."""
    return htp.compile(models / "conv.qdq.onnx", tmp_path_factory.mktemp("contexts"))


# --- 1: a runtime library that doesn't load leaves everything on onnxruntime's CPU provider ----------------------------


def test_a_runtime_library_that_does_not_load_is_no_pass(models: Path, tmp_path: Path, cpu_library: Path) -> None:
    broken = tmp_path / "libQnnCpu.so"
    broken.write_bytes(b"not a library")
    bench = Bench(Settings(cache_dir=tmp_path, cpu_library=broken))
    try:
        with pytest.raises(
            PlacementError, match=r"none of the model's \d+ nodes run on cpu(?s:.*)QNN SetupBackend failed"
        ):
            bench.backend(BackendRequest("cpu")).load(models / "conv.onnx")
    finally:
        bench.close()


# --- 2: a failing run is repeated on the CPU by onnxruntime's Python layer ---------------------------------------------


def test_a_failing_run_is_not_repeated_on_the_cpu(bench: Bench, htp: Backend, models: Path) -> None:
    plan = htp._plan({})
    request = LoadRequest(
        model=str(models / "conv.qdq.onnx"),
        files=(),
        process="htp with graph splitting",
        provider="QNNExecutionProvider",
        # makes every run of this runtime release fail, which is what this test needs; our own options refuse it
        provider_options=(*plan.provider_options, ("enable_htp_graph_splitting", "1")),
    )
    loaded = LoadedModel(bench.pool, request, "conv.qdq.onnx", bench.limits)
    with pytest.raises(ExecutionError, match="execute error"):
        loaded.run(seeded_inputs(models / "conv.qdq.onnx", 1)[0])


# --- 3 and 4: options and backends that the provider accepts in silence ------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"nonsense": 1},
        {"htp_arch": "banana"},
        {"htp_performance_mode": "nope"},
        {"vtcm_mb": -5},
        {"soc": "SM8560"},
        {"backend_type": "saver"},
        {"backend_path": "libQnnSaver.so"},
        {"enable_htp_fp16_precision": 0},
        {"qnn_context_priority": True},
        {"htp_graph_finalization_optimization_mode": 1.5},
    ],
    ids=str,
)
def test_options_that_the_provider_would_swallow_are_refused(
    htp: Backend, models: Path, options: dict[str, object]
) -> None:
    with pytest.raises(OptionError, match=next(iter(options)) if "soc" not in options else "unknown SoC 'SM8560'"):
        htp.load(models / "conv.qdq.onnx", **options)


def test_good_options_are_kept_in_the_record(htp: Backend, models: Path) -> None:
    session = htp.load(models / "conv.qdq.onnx", htp_performance_mode="burst", vtcm_mb=4)
    assert session.provenance["options"] == {"htp_performance_mode": "burst", "vtcm_mb": "4"}


@pytest.mark.parametrize("name", ["saver", "ir"])
def test_backends_that_compute_nothing_are_no_backends(bench: Bench, name: str) -> None:
    with pytest.raises((OptionError, BackendUnavailableError)):
        bench.backend(BackendRequest(name)).load("whatever.onnx")


# --- 5 and 6: context binaries for another SoC, or altered -------------------------------------------------------------


def test_a_context_binary_gives_the_results_of_a_fresh_compile(htp: Backend, models: Path, context: Path) -> None:
    fresh = htp.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    cached = htp.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx", artifact=context)
    inputs = seeded_inputs(fresh)
    assert np.array_equal(fresh.run(inputs).output(), cached.run(inputs).output())
    assert cached.provenance["artifact"]["kind"] == "context binary"
    assert assert_matches_reference(cached.run(inputs)).ok
    assert_fully_offloaded(cached)


def test_a_context_binary_for_another_soc_is_refused(htp: Backend, models: Path, context: Path) -> None:
    with pytest.raises(ArtifactError, match=r"made for SoC SM8650 \(v75\), but SM8550 \(v73\) is asked for"):
        htp.load(models / "conv.qdq.onnx", artifact=context, soc="SM8550")


def copy_of(context: Path, folder: Path) -> Path:
    for file in context.parent.iterdir():
        shutil.copy(file, folder)
    return folder / context.name


@pytest.mark.parametrize(
    "damage", ["flipped byte", "truncated", "empty", "missing", "no manifest", "broken manifest", "altered manifest"]
)
def test_a_damaged_context_binary_is_refused(
    htp: Backend, models: Path, context: Path, tmp_path: Path, damage: str
) -> None:
    wrapper = copy_of(context, tmp_path)
    binary = next(tmp_path.glob("*.bin"))
    manifest = next(tmp_path.glob("*.json"))
    content = bytearray(binary.read_bytes())
    match damage:
        case "flipped byte":
            content[len(content) // 2] ^= 1
            binary.write_bytes(content)
        case "truncated":
            binary.write_bytes(content[:-100])
        case "empty":
            binary.write_bytes(b"")
        case "missing":
            binary.unlink()
        case "no manifest":
            manifest.unlink()
        case "broken manifest":
            manifest.write_text('{"format": 1')
        case "altered manifest":
            text = manifest.read_text()
            manifest.write_text(text.replace("CPUExecutionProvider", "QNNExecutionProvider"))
    expected = {
        "altered manifest": "altered since it was made",
        "missing": "is missing",
        "no manifest": "manifest .* is missing",
        "broken manifest": "not a manifest",
    }
    with pytest.raises(ArtifactError, match=expected.get(damage, "altered or truncated since it was made")):
        htp.load(models / "conv.qdq.onnx", artifact=wrapper)


def test_a_context_binary_of_another_model_is_refused(htp: Backend, models: Path, context: Path) -> None:
    with pytest.raises(ArtifactError, match="made for model"):
        htp.load(models / "conv.onnx", artifact=context)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"onnxruntime_qnn": "1.0.0"}, r"made for onnxruntime-qnn 1\.0\.0 \(QNN v2"),
        ({"options": {"vtcm_mb": "4"}}, "made for options {'vtcm_mb': '4'}"),
        ({"dimensions": {"batch": 2}}, "made for dimensions {'batch': 2}"),
        ({"nonsense": 1}, "not a manifest"),
    ],
)
def test_a_context_binary_made_with_something_else_is_refused(
    htp: Backend, models: Path, context: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    wrapper = copy_of(context, tmp_path)
    manifest = next(tmp_path.glob("*.json"))
    content = json.loads(manifest.read_text())
    content["recipe"].update(change)
    del content["sha256"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps({**content, "sha256": digest}))
    with pytest.raises(ArtifactError, match=message):
        htp.load(models / "conv.qdq.onnx", artifact=wrapper)


def test_a_context_wrapper_alone_is_refused(htp: Backend, context: Path) -> None:
    with pytest.raises(Exception, match="wrapper of a context binary"):
        htp.load(context)


# --- 7: NaN and infinities come out finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_inputs_that_come_out_finite_fail(htp: Backend, tmp_path: Path, value: float) -> None:
    session = htp.load(small_models.unary(tmp_path / "neg.onnx", "Neg"))
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
    x[0, 3] = value
    run = session.run([{"x": x}], allow_non_finite=True)
    assert np.isfinite(run.output()).all(), "the runtime has changed: it used to hide non-finite values"
    with pytest.raises(
        AccuracyError, match=r"non-finite: 0 NaN and 0 infinite elements, 1 in the reference; 1 don't match"
    ):
        assert_matches_reference(run)


def test_non_finite_outputs_pass_only_where_the_reference_has_them(htp: Backend, tmp_path: Path) -> None:
    session = htp.load(small_models.unary(tmp_path / "neg.onnx", "Neg"))
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)
    x[0, 3] = np.nan
    run = session.run([{"x": x}], allow_non_finite=True)
    honest = Run(session, run.samples, ({"y": -x},), True, run.seconds)
    assert assert_matches_reference(honest).ok
    elsewhere = -x.copy()
    elsewhere[0, 3], elsewhere[0, 4] = -0.5, np.nan
    with pytest.raises(AccuracyError, match="2 don't match, the first in sample 0 at \\[0, 3\\]"):
        assert_matches_reference(Run(session, run.samples, ({"y": elsewhere},), True, run.seconds))


# --- 8: a float model is computed in float16, or in float32, or not at all ---------------------------------------------


@pytest.mark.parametrize(("soc", "precision"), [("SM8650", "float16"), ("SM8550", "float16"), ("SM8350", "float32")])
def test_the_precision_of_a_float_model_is_measured_and_told(
    htp: Backend, models: Path, soc: str, precision: str
) -> None:
    session = htp.load(models / "conv.onnx", soc=soc)
    assert session.provenance["computed_in"] == precision
    (sample,) = seeded_inputs(session, 1)
    sqnr = assert_matches_reference(session.run([sample])).outputs[0].figures["sqnr_db"]
    assert sqnr is not None
    assert (sqnr > 100) == (precision == "float32")


def test_a_second_soc_does_not_change_the_precision_of_the_first(htp: Backend, models: Path) -> None:
    true_float = htp.load(models / "conv.onnx", soc="SM8350")
    x = seeded_inputs(true_float, 1)
    before = true_float.run(x).output()
    htp.load(models / "conv.onnx", soc="SM8550").run(x)
    assert np.array_equal(true_float.run(x).output(), before)


def test_a_soc_that_refuses_float_models_is_no_pass(htp: Backend, models: Path, tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="none of the model's 1 nodes run on htp"):
        htp.load(small_models.unary(tmp_path / "relu.onnx", "Relu"), soc="SM8635")
    with pytest.raises(CompileError, match="takes quantised models only"):
        htp.load(models / "conv.onnx", soc="SM8635")
    assert htp.load(models / "conv.qdq.onnx", soc="SM8635").precision == "A8W8"


# --- placement ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Relu, Erf, Relu: HTP refuses Erf."""
    return small_models.unary(tmp_path_factory.mktemp("partly") / "partly.onnx", "Relu", "Erf", "Relu")


def test_a_node_elsewhere_fails_by_name_and_reason(htp: Backend, partly: Path) -> None:
    session = htp.load(partly)
    assert session.placement.nodes == {"n0": "htp", "n1": "CPU", "n2": "htp"}
    with pytest.raises(PlacementError, match=r"n1 \(Erf\): Operators of type `Erf` are not supported by QNN EP"):
        assert_fully_offloaded(session)


def test_accuracy_is_not_vouched_for_where_part_of_the_model_ran_elsewhere(htp: Backend, partly: Path) -> None:
    session = htp.load(partly)
    run = session.run(seeded_inputs(session))
    with pytest.raises(PlacementError, match="n1 \\(Erf\\)"):
        assert_matches_reference(run)
    for allowed in (True, ["Erf"], ["n1"]):
        tolerant = htp.load(partly, allow_cpu=allowed)
        assert assert_matches_reference(tolerant.run(seeded_inputs(tolerant))).ok
        assert tolerant.provenance["placement"]["fell_back_to_cpu"] == [str(session.placement.misplaced[0])]


def test_a_model_of_which_nothing_runs_on_the_backend_does_not_load(htp: Backend, tmp_path: Path) -> None:
    with pytest.raises(
        PlacementError, match=r"none of the model's 1 nodes run on htp(?s:.*)n0 \(Erf\): Operators of type `Erf`"
    ):
        htp.load(small_models.unary(tmp_path / "erf.onnx", "Erf"))


def test_graph_edge_quantizers_on_the_host_are_allowed_and_told(htp: Backend, models: Path) -> None:
    session = htp.load(models / "conv.qdq.onnx")
    placement = assert_fully_offloaded(session)
    assert len(placement.edges) == 2
    assert "2 graph-edge Quantize/Dequantize on the host's CPU" in placement.describe()
    everything = htp.load(models / "conv.qdq.onnx", offload_graph_io_quantization=0)
    assert assert_fully_offloaded(everything).edges == ()


def test_an_inner_quantizer_elsewhere_is_not_taken_for_a_graph_edge(htp: Backend, tmp_path: Path) -> None:
    """A quantised Erf: Q and DQ around it run on the CPU provider with it, and are inner nodes."""
    scale, zero = np.array(0.01, np.float32), np.array(128, np.uint8)
    chain = ["QuantizeLinear", "DequantizeLinear"]
    nodes, last = [], "x"
    for i, op in enumerate([*chain, "Relu", *chain, "Erf", *chain, "Relu", *chain]):
        name = "y" if i == 10 else f"t{i}"
        constants = ["s", "z"] if op in chain else []
        nodes.append(helper.make_node(op, [last, *constants], [name], name=f"n{i}_{op}"))
        last = name
    file = small_models.save(tmp_path / "m.onnx", nodes, {"x": [1, 16]}, {"y": [1, 16]}, {"s": scale, "z": zero})
    session = htp.load(file)
    assert "Erf" in {m.op_type for m in session.placement.misplaced}
    with pytest.raises(PlacementError, match="Erf"):
        assert_fully_offloaded(session)


# --- nothing compared ----------------------------------------------------------------------------------------------------


def test_outputs_of_another_shape_fail(htp: Backend, models: Path) -> None:
    session = htp.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    run = session.run(seeded_inputs(session, 2))
    wrong = tuple({"y": r["y"][:, :4]} for r in run.results)
    with pytest.raises(
        AccuracyError, match=r"shape: the backend's is \[1, 4, 16, 16\], the reference's \[1, 8, 16, 16\]"
    ):
        assert_matches_reference(Run(session, run.samples, wrong, True, run.seconds))


@pytest.mark.parametrize("defect", ["zeros", "negated", "stale", "halved", "transposed"])
def test_gross_defects_of_a_real_run_fail_by_default(htp: Backend, models: Path, defect: str) -> None:
    session = htp.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    run = session.run(seeded_inputs(session, 4))
    good = [r["y"] for r in run.results]
    bad = {
        "zeros": [np.zeros_like(y) for y in good],
        "negated": [-y for y in good],
        "stale": [good[-1], *good[:-1]],
        "halved": [y * np.float32(0.5) for y in good],
        "transposed": [np.ascontiguousarray(y.swapaxes(2, 3)) for y in good],
    }[defect]
    with pytest.raises(AccuracyError) as caught:
        assert_matches_reference(Run(session, run.samples, tuple({"y": y} for y in bad), True, run.seconds))
    assert caught.value.verdict.blame == "backend"  # type: ignore[attr-defined]


def test_an_integer_output_must_agree(htp: Backend, tmp_path: Path) -> None:
    node = helper.make_node("ArgMax", ["x"], ["y"], name="argmax", axis=1, keepdims=0)
    file = small_models.save(
        tmp_path / "argmax.onnx", [node], {"x": [1, 16]}, {"y": [1]}, types={"y": TensorProto.INT64}
    )
    session = htp.load(file)
    run = session.run(seeded_inputs(session, 4))
    assert assert_matches_reference(run).ok
    wrong = tuple({"y": (r["y"] + 1) % 16} for r in run.results)
    with pytest.raises(AccuracyError, match="values: 4 of 4 integer elements differ"):
        assert_matches_reference(Run(session, run.samples, wrong, True, run.seconds))


def test_the_model_of_this_file_is_what_onnx_says(models: Path) -> None:
    """Guards the tests above: they prove something only while the model is quantised."""
    operators = {n.op_type for n in onnx.load(str(models / "conv.qdq.onnx")).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= operators


# --- models that change, share a name, or have poor names -----------------------------------------------------------------


def test_a_model_that_is_rewritten_after_loading_is_noticed(htp: Backend, models: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(models / "conv.onnx", tmp_path / "m.onnx"))
    session = htp.load(file)
    run = session.run(seeded_inputs(session, 2, seed=385))  # no other test has asked for their reference
    small_models.unary(file, "Relu", shape=(1, 3, 16, 16))
    with pytest.raises(ModelError, match=r"m.onnx changed on disk since the model was first read"):
        assert_matches_reference(run)
    fresh = htp.load(file)
    assert fresh.executed.digest != session.executed.digest
    assert fresh.run(seeded_inputs(fresh, 1)).output().shape == (1, 1, 3, 16, 16)


def test_models_of_one_name_in_two_folders_are_two_models(htp: Backend, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    relu = htp.load(small_models.unary(tmp_path / "a" / "m.onnx", "Relu"))
    neg = htp.load(small_models.unary(tmp_path / "b" / "m.onnx", "Neg"))
    x = {"x": np.ones((1, 16), np.float32)}
    assert relu.run(x).output().min() > 0
    assert neg.run(x).output().max() < 0


def test_inner_quantizers_without_names_are_not_taken_for_graph_edges(htp: Backend, tmp_path: Path) -> None:
    scale, zero = np.array(0.01, np.float32), np.array(128, np.uint8)
    nodes, last = [], "x"
    for i, op in enumerate(["QuantizeLinear", "DequantizeLinear", "Erf", "QuantizeLinear", "DequantizeLinear"]):
        name = "y" if i == 4 else f"t{i}"
        nodes.append(helper.make_node(op, [last, *(["s", "z"] if op != "Erf" else [])], [name]))
        last = name
    file = small_models.save(tmp_path / "m.onnx", nodes, {"x": [1, 16]}, {"y": [1, 16]}, {"s": scale, "z": zero})
    with pytest.raises(PlacementError, match="Erf"):
        assert_fully_offloaded(htp.load(file))


def test_threads_that_share_a_session_get_their_own_results(htp: Backend, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    session = htp.load(small_models.unary(tmp_path / "m.onnx", "Neg", shape=(1, 1024)))
    inputs = [np.full((1, 1024), i, np.float32) for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(lambda x: session.run(x).output(), inputs))
    assert all(np.allclose(y, -x, rtol=1e-3) for x, y in zip(inputs, outputs, strict=True))


def test_limits_of_one_session_are_not_those_of_another(htp: Backend, models: Path) -> None:
    patient = htp.load(models / "conv.onnx")
    hasty = htp.load(models / "conv.onnx", run_timeout=1)
    assert patient._loaded.limits.run_seconds == 120
    assert hasty._loaded.limits.run_seconds == 1


def test_an_output_scale_that_rounds_everything_away_fails(htp: Backend, models: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(models / "conv.qdq.onnx"))
    last = next(n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.output[0] == "y")
    scale = next(i for i in proto.graph.initializer if i.name == last.input[1])
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1000), scale.name))
    onnx.save(proto, str(tmp_path / "coarse.onnx"))
    session = htp.load(tmp_path / "coarse.onnx", float_model=models / "conv.onnx")
    with pytest.raises(AccuracyError) as caught:
        assert_matches_reference(session.run(seeded_inputs(session, 4)))
    assert caught.value.verdict.blame == "quantization"


def test_outputs_that_a_test_changes_are_not_what_is_judged(htp: Backend, models: Path) -> None:
    run = htp.load(models / "conv.onnx").run(seeded_inputs(models / "conv.onnx", 1))
    with pytest.raises(ValueError, match="read-only"):
        run.results[0]["y"][:] = 0


def test_freed_sessions_that_come_back_are_still_bounded(bench: Bench, htp: Backend, tmp_path: Path) -> None:
    from pytest_qnn.bench import KEPT_MODELS

    sessions = [
        htp.load(small_models.unary(tmp_path / f"m{i}.onnx", "Neg", shape=(1, 16 + i))) for i in range(KEPT_MODELS + 3)
    ]
    for _ in range(2):
        for i, session in enumerate(sessions):
            assert session.run(np.ones((1, 16 + i), np.float32)).output().max() < 0
    assert len(bench._loaded) == KEPT_MODELS
    assert sum(s._loaded._process is not None for s in sessions) <= KEPT_MODELS


# --- contexts that share a process ---------------------------------------------------------------------------------------


def test_contexts_with_different_vtcm_do_not_disturb_each_other(htp: Backend, models: Path) -> None:
    """In one process the earlier one fails with error 1100 (measured with QAIRT 2.51)."""
    first = htp.load(models / "conv.qdq.onnx", load_timeout=77)  # not the one that other tests have run already
    second = htp.load(models / "conv.qdq.onnx", vtcm_mb=2, load_timeout=77)
    inputs = seeded_inputs(first)
    assert np.array_equal(first.run(inputs).output(), second.run(inputs).output())


# --- the SDK's library in place of the installed one --------------------------------------------------------------------


def test_a_library_on_the_search_path_does_not_replace_the_installed_runtime(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK's manuals set LD_LIBRARY_PATH to its folder; records would then name a release that did not run."""
    (tmp_path / "libQnnHtp.so").write_bytes(b"not the installed one")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}:/nowhere")
    bench = Bench(Settings(no_cache=True))
    try:
        session = bench.backend(BackendRequest("htp")).load(models / "conv.qdq.onnx")
        assert_fully_offloaded(session)
    finally:
        bench.close()


# --- what was attacked: weights, links, exchanged entries, other runtimes --------------------------------------------------


def doubling(path: Path, value: float, kind: str) -> Path:
    """y = x * w, with w in an external data file, as a constant of ``kind``."""
    weight = onnx.numpy_helper.from_array(np.full(4, value, np.float32), "w")
    (path.parent / "w.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, told in (("location", "w.bin"), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=told)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    constant = helper.make_node("Constant", [], ["w"], value=weight)
    product = helper.make_node("Mul", ["x", "w"], ["y"], name="m")
    functions = []
    if kind == "function":
        functions = [helper.make_function("own", "Scaled", ["x"], ["y"], [constant, product], opsets[:1])]
        nodes = [helper.make_node("Scaled", ["x"], ["y"], domain="own", name="scaled")]
    else:
        nodes = [constant, product]
    constants = []
    if kind == "initializer":
        nodes, constants = [product], [weight]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9), str(path))
    return path


@pytest.mark.parametrize("kind", ["function", "constant", "initializer"])
def test_new_weights_in_external_data_are_a_new_model(tmp_path: Path, kind: str) -> None:
    digests = {read_model(doubling(tmp_path / "m.onnx", value, kind)).digest for value in (2.0, 5.0)}
    assert len(digests) == 2
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"external data file 'w\.bin' of tensor 'w' is missing"):
        read_model(tmp_path / "m.onnx")


def test_a_link_that_leads_elsewhere_now_is_a_new_model(htp: Backend, tmp_path: Path) -> None:
    model = doubling(tmp_path / "m.onnx", 2.0, "initializer")
    (tmp_path / "w.bin").rename(tmp_path / "v1")
    (tmp_path / "v2").write_bytes(np.full(4, 5.0, np.float32).tobytes())
    x, gains = np.ones(4, np.float32), []
    for target in ("v1", "v2"):
        (tmp_path / "w.bin").unlink(missing_ok=True)
        (tmp_path / "w.bin").symlink_to(target)
        gains.append(float(htp.load(model).run({"x": x}).output()[0]))
    assert gains == pytest.approx([2.0, 5.0], rel=1e-3)


def test_a_copy_with_the_old_time_is_a_new_model(htp: Backend, tmp_path: Path) -> None:
    x, gains = np.ones(4, np.float32), []
    for value in (2.0, 5.0):
        model = doubling(tmp_path / "m.onnx", value, "initializer")
        os.utime(tmp_path / "w.bin", (1, 1))
        gains.append(float(htp.load(model).run({"x": x}).output()[0]))
    assert gains == pytest.approx([2.0, 5.0], rel=1e-3)


def test_entries_of_the_cache_that_were_exchanged_are_made_again(models: Path, tmp_path: Path) -> None:
    bench = Bench(Settings(cache_dir=tmp_path))
    try:
        backend = bench.backend(BackendRequest("htp"))
        for soc in ("SM8550", "SM8650"):
            backend.load(models / "conv.qdq.onnx", soc=soc)
        mine = [
            e.path
            for e in bench.cache.contexts.entries()
            if bench.cache.contexts.read(e).manifest.model == "conv.qdq.onnx"
        ]
        assert len(mine) == 2
        for source, target in ((mine[0], tmp_path / "x"), (mine[1], mine[0]), (tmp_path / "x", mine[1])):
            source.rename(target)
        with pytest.warns(CacheDamagedWarning, match="made for something else than its name says"):
            session = backend.load(models / "conv.qdq.onnx", load_timeout=76)
        assert session.artifact.source == "compiled"
    finally:
        bench.close()


def test_another_artifact_of_the_same_name_is_another_artifact(
    htp: Backend, models: Path, context: Path, tmp_path: Path
) -> None:
    wrapper = copy_of(context, tmp_path)
    first = htp.load(models / "conv.qdq.onnx", artifact=wrapper)
    proto = onnx.load(str(wrapper), load_external_data=False)
    proto.doc_string = "another one"
    onnx.save(proto, str(wrapper))
    manifest = next(tmp_path.glob("*.json"))
    content = json.loads(manifest.read_text())
    del content["sha256"]
    content["wrapper_sha256"] = hashlib.sha256(wrapper.read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps({**content, "sha256": digest}))
    second = htp.load(models / "conv.qdq.onnx", artifact=wrapper)
    assert first._loaded is not second._loaded


def test_the_binary_of_our_own_compile_is_checked_by_its_manifest(
    htp: Backend, models: Path, context: Path, tmp_path: Path
) -> None:
    copy_of(context, tmp_path)
    binary = next(tmp_path.glob("*.bin"))
    assert htp.load(models / "conv.qdq.onnx", artifact=binary).artifact.kind == "context binary"
    content = bytearray(binary.read_bytes())
    content[-5000] ^= 1
    binary.write_bytes(content)
    with pytest.raises(ArtifactError, match="altered or truncated since it was made"):
        htp.load(models / "conv.qdq.onnx", artifact=binary)


def test_a_runtime_library_from_elsewhere_is_refused_by_name(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = Path(importlib.util.find_spec("onnxruntime_qnn").origin).parent  # type: ignore[union-attr, arg-type]
    (tmp_path / "glibc-hwcaps" / "x86-64-v2").mkdir(parents=True)
    foreign = (
        tmp_path / "glibc-hwcaps" / "x86-64-v2" / "libQnnHtp.so"
    )  # where the filter of LD_LIBRARY_PATH doesn't look
    shutil.copy(installed / "libQnnHtp.so", foreign)
    (tmp_path / "glibc-hwcaps" / "onnxruntime_qnn.libs").symlink_to(installed.parent / "onnxruntime_qnn.libs")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    bench = Bench(Settings(cache_dir=tmp_path / "cache"))
    try:
        with pytest.raises(TargetError, match=r"loaded .*glibc-hwcaps.*libQnnHtp\.so in place of the installed"):
            bench.backend(BackendRequest("htp")).load(models / "conv.qdq.onnx")
        assert list(bench.cache.contexts.entries()) == []
    finally:
        bench.close()
