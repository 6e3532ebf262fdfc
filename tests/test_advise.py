"""Advice: what really happens on each backend, and a recommendation that rests on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from pytest_qnn.advice.measure import RAN, Row
from pytest_qnn.advice.recommend import recommend
from pytest_qnn.cli import main
from pytest_qnn.runners.placement import Misplaced
from tests import small_models
from tests.conftest import needs_simulator
from tests.qdq_graph import QdqGraph
from tests.test_lint import clipped

Advise = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def advise(
    tmp_path: Path, models: Path, cpu_library: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Advise:
    """``pytest-qnn advise ... --json`` on SM8650, in a folder with the small models and a cache of its own."""
    for model in models.glob("*.onnx"):
        (tmp_path / model.name).write_bytes(model.read_bytes())
    (tmp_path / "pyproject.toml").write_text("[tool.pytest_qnn]\ncache_dir = 'cache'\n")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        soc = [] if any(a.startswith("--soc") for a in arguments) else ["--soc", "SM8650"]
        code = main(["advise", *arguments, *soc, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def states(document: dict[str, Any]) -> dict[str, str]:
    return {f"{r['backend']} {r['precision']}".strip(): r["state"] for r in document["rows"]}


# --- what happens -----------------------------------------------------------------------------------------------------


def test_each_backend_is_tried_with_each_model(advise: Advise) -> None:
    code, found = advise("conv.qdq.onnx", "--float-model", "conv.onnx")
    assert code == 0
    assert states(found) == {"htp A8W8": RAN, "htp float16": RAN, "cpu float32": RAN, "gpu": "not here"}
    quantized, in_float, cpu, gpu = found["rows"]
    assert [r["accurate"] for r in found["rows"]] == [True, True, True, None]
    assert quantized["placed"] == quantized["nodes"] - quantized["edges"] == 11
    assert (quantized["partitions"], quantized["soc"], quantized["htp_arch"]) == (1, "SM8650", 75)
    assert 10 < quantized["sqnr_db"] < 45 < in_float["sqnr_db"] < 80 < cpu["sqnr_db"]
    assert quantized["noise_db"] > quantized["sqnr_db"]
    assert quantized["size"] > 10_000
    assert quantized["compile_seconds"] > 0
    assert quantized["io_bytes"] == 4 * (3 + 8) * 256
    assert "Adreno" in gpu["reason"]
    assert found["synthetic_inputs"] is True
    assert "accuracy on real data" in found["recommendation"]["not_measured"][-1]


@pytest.mark.parametrize(("prefer", "expected"), [("latency", "A8W8"), ("power", "A8W8"), ("accuracy", "float32")])
def test_the_recommendation_follows_the_preference(advise: Advise, prefer: str, expected: str) -> None:
    _, found = advise("conv.qdq.onnx", "--float-model", "conv.onnx", "--backend", "htp,cpu", "--prefer", prefer)
    (choice,) = found["recommendation"]["choices"]
    assert choice["choice"]["precision"] == expected
    inferred = any("inferred, not timed" in reason for reason in choice["reasons"])
    assert inferred == (prefer != "accuracy")
    assert "Measure them on a device" in found["recommendation"]["not_measured"][0]


def test_nodes_that_fall_back_come_with_qnns_reason(advise: Advise) -> None:
    small_models.unary(Path("erf.onnx"), "Relu", "Erf", "Relu")
    code, found = advise("erf.onnx", "--backend", "htp")
    (row,) = found["rows"]
    assert code == 0
    assert (row["placed"], row["nodes"], row["partitions"]) == (2, 3, 2)
    assert [(m["node"], m["op_type"]) for m in row["misplaced"]] == [("n1", "Erf")]
    assert "`Erf` are not supported" in row["misplaced"][0]["reason"]
    hints = found["recommendation"]["hints"]
    assert any("pytest-qnn quantize" in hint and "isn't known until" in hint for hint in hints)
    assert any("pytest-qnn lint" in hint for hint in hints)


def test_a_backend_whose_result_is_wrong_is_never_recommended(advise: Advise) -> None:
    """HTP loses this Clip's bounds (see lint's clip-lost); its float original comes out right."""
    clipped(Path("clip.onnx"), True)
    g = QdqGraph()
    t = g.node("Conv", ["x", g.constant(np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1))])
    y = g.node("Clip", [t, g.constant(np.float32(0)), g.constant(np.float32(6))])
    g.save(Path("float.onnx"), {"x": [1, 8, 8, 8]}, y, [1, 8, 8, 8])
    code, found = advise("clip.onnx", "--backend", "htp")
    assert code == 1
    assert (found["rows"][0]["state"], found["rows"][0]["accurate"], found["rows"][0]["blame"]) == (
        RAN,
        False,
        "backend",
    )
    (choice,) = found["recommendation"]["choices"]
    assert choice["choice"] is None
    assert "wrong results, backend to blame" in choice["rejected"][0]
    code, found = advise("clip.onnx", "--float-model", "float.onnx", "--backend", "htp")
    assert code == 0
    assert found["recommendation"]["choices"][0]["choice"]["precision"] == "float16"


def test_a_compiler_that_dies_does_not_keep_the_others_from_running(advise: Advise) -> None:
    small_models.crashes_while_compiling(Path("crash.onnx"))
    code, found = advise("crash.onnx", "--soc", "SM8550,SM8650")
    assert code == 1
    assert [(r["backend"], r["soc"], r["state"]) for r in found["rows"]] == [
        ("htp", "SM8550", "crashed"),
        ("htp", "SM8650", "crashed"),
        ("cpu", None, "not taken"),
        ("gpu", None, "not here"),
    ]
    assert "SIGSEGV" in found["rows"][0]["reason"]


def test_a_deadline_is_a_row_too(advise: Advise) -> None:
    small_models.compiles_for_long(Path("long.onnx"), 4_000)
    Path("pyproject.toml").write_text("[tool.pytest_qnn]\ncache_dir = 'cache'\nload_timeout = 0.5\n")
    code, found = advise("long.onnx", "--backend", "htp")
    assert code == 1
    assert found["rows"][0]["state"] == "timed out"


def test_a_quantized_model_without_original_is_not_for_the_cpu_backend(advise: Advise) -> None:
    code, found = advise("conv.qdq.onnx")
    assert code == 0
    assert states(found) == {"htp A8W8": RAN, "cpu": "failed", "gpu": "not here"}
    assert "computes in float only" in found["rows"][1]["reason"]


def test_given_data_is_what_is_run(advise: Advise) -> None:
    Path("data").mkdir()
    for i in range(3):
        x = np.random.default_rng(i).normal(size=(1, 3, 16, 16)).astype(np.float32)
        np.savez(Path("data", f"{i}.npz"), x=x)
    _, found = advise("conv.qdq.onnx", "--backend", "htp", "--data", "data", "--samples", "2")
    assert (found["samples"], found["synthetic_inputs"], found["rows"][0]["samples"]) == (2, False, 2)


def test_by_default_one_soc_of_each_architecture_is_tried() -> None:
    from pytest_qnn.cli.advise import _socs
    from pytest_qnn.settings import Settings

    assert _socs(None, Settings(soc="SM8650")) == ("SM8350", "SM8450", "SM8550", "SM8650", "SM8750", "SM8850")
    assert _socs(None, Settings(soc="SM8475")) == ("SM8350", "SM8475", "SM8550", "SM8650", "SM8750", "SM8850")
    assert _socs("sm8650, SM8550 SM8650", Settings()) == ("SM8650", "SM8550")


# --- the recommendation -------------------------------------------------------------------------------------------------


def row(backend: str = "htp", precision: str = "A8W8", soc: str | None = "SM8650", **values: Any) -> Row:
    plain = Row(
        backend,
        soc,
        75,
        "m.onnx",
        RAN,
        nodes=10,
        placed=10,
        partitions=1,
        precision=precision,
        accurate=True,
        sqnr_db=40.0,
    )
    return replace(plain, **values)


OFF = (Misplaced("n", "Erf", "no"),)


@pytest.mark.parametrize("prefer", ["latency", "power"])
def test_what_stays_on_the_backend_wins_over_narrower_arithmetic(prefer: str) -> None:
    whole, split = row(precision="float16"), row(placed=9, misplaced=OFF, partitions=2)
    assert recommend([split, whole], prefer).choices[0].rows == (whole,)


def test_results_as_good_as_the_best_leave_the_choice_to_cost() -> None:
    narrow, wide, cpu = (
        row(sqnr_db=60.0),
        row(precision="A16W8", sqnr_db=60.5),
        row("cpu", "float32", None, sqnr_db=60.2),
    )
    assert recommend([wide, narrow, cpu], "accuracy").choices[0].rows == (narrow,)
    assert recommend([row(sqnr_db=50.0), wide, cpu], "accuracy").choices[0].rows == (wide,)


def test_what_quantising_left_next_to_nothing_of_is_no_bargain_on_real_data() -> None:
    poor, good = row(sqnr_db=4.0), row(precision="float16", sqnr_db=60.0)
    assert recommend([poor, good], "latency").choices[0].rows == (good,)
    assert recommend([poor], "latency").choices[0].rows == (poor,), "where there is nothing else"
    made_up = recommend([poor, good], "latency", synthetic=True)
    assert made_up.choices[0].rows == (poor,)
    assert "leaves little. Give real ones with --data" in made_up.not_measured[-1]


@pytest.mark.parametrize("values", [{"accurate": False, "blame": "reference"}, {"state": "crashed", "accurate": None}])
def test_what_was_not_shown_to_be_right_is_not_eligible(values: dict[str, Any]) -> None:
    advice = recommend([row(**values)], "latency")
    assert not advice.ok
    assert advice.choices[0].rows == ()


def test_float32_on_htp_is_the_simulators_invention() -> None:
    """On SM8350, whose HTP has no float16, the simulator computes small float models in float32."""
    advice = recommend([row(soc="SM8350", precision="float32"), row("cpu", "float32", None)], "accuracy")
    assert [c.rows[0].backend for c in advice.choices] == ["cpu"]
    assert "which no HTP does" in advice.choices[0].rejected[0]


def test_socs_with_the_same_choice_stand_together() -> None:
    rows = [
        row(soc="SM8550"),
        row(soc="SM8650"),
        row(soc="SM8350", state="refused", accurate=None, precision=""),
        row("cpu", "float32", None, sqnr_db=130.0),
    ]
    choices = recommend(rows, "latency").choices
    assert [(c.socs, c.rows[0].backend) for c in choices] == [(("SM8550", "SM8650"), "htp"), (("SM8350",), "cpu")]
    assert choices[1].rejected == ("htp with m.onnx: refused",)


# --- on the command line --------------------------------------------------------------------------------------------------


def test_the_table_fits_a_hundred_columns(
    advise: Advise, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["advise", "conv.qdq.onnx", "--float-model", "conv.onnx", "--soc", "SM8350,SM8650"]) == 0
    printed = capsys.readouterr().out
    lines = [line.rstrip() for line in printed.splitlines()]
    assert max(map(len, lines)) <= 100
    assert any(
        line.startswith("htp      SM8650 v75  A8W8       11/11       1") and line.endswith("right") for line in lines
    )
    assert any(line.startswith("recommended for SM8350, SM8650: htp with conv.qdq.onnx (A8W8)") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["conv.onx"], "Did you mean 'conv.onnx'?"),
        (["text.onnx"], "not an ONNX model"),
        (["dynamic.onnx"], "give their sizes, e.g. --dimensions batch=1"),
        (["conv.onnx", "--dimensions", "batch=1"], "no dynamic dimension 'batch'"),
        (["conv.onnx", "--float-model", "conv.qdq.onnx"], "is itself quantised"),
        (["conv.onnx", "--float-model", "conv.onnx"], "conv.onnx is MODEL itself"),
        (["conv.onnx", "--data", "nowhere"], "there is no such file or folder"),
        (["conv.onnx", "--data", "data"], "input x: float32[1, 3, 16, 16] got shape [1, 3, 8, 8]"),
        (["conv.onnx", "--samples", "0"], "must be at least 1, got 0"),
        (["conv.onnx", "--soc", "SM1"], "unknown SoC 'SM1'"),
        (["conv.onnx", "--backend", "hpt"], "unknown backend 'hpt'. Did you mean 'htp'?"),
        (["conv.onnx", "--backend", ","], "name at least one backend"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for model in models.glob("*.onnx"):
        Path(model.name).write_bytes(model.read_bytes())
    Path("text.onnx").write_text("no model" * 50)
    small_models.unary(Path("dynamic.onnx"), "Relu", shape=("batch", 16))
    Path("data").mkdir()
    np.save(Path("data", "a.npy"), np.zeros((1, 3, 8, 8), np.float32))
    assert main(["advise", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_dimensions_may_be_given(advise: Advise) -> None:
    small_models.unary(Path("dynamic.onnx"), "Relu", shape=("batch", 16))
    code, found = advise("dynamic.onnx", "--dimensions", "batch=2", "--backend", "htp")
    assert code == 0
    assert found["rows"][0]["io_bytes"] == 2 * 2 * 16 * 4


def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    needs_simulator()
    small_models.compiles_for_long(tmp_path / "long.onnx")
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest_qnn.cli", "advise", "long.onnx", "--backend", "htp"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    parent, deadline = psutil.Process(process.pid), time.monotonic() + 60
    while not (children := parent.children(recursive=True)) and time.monotonic() < deadline:
        psutil.wait_procs([parent], timeout=0.05)
    assert children
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.rstrip().endswith("pytest-qnn: interrupted")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    assert not any((tmp_path / "cache").rglob("*.onnx")), "nothing half-made may look finished"
