"""Backend configuration: where options come from, what is refused, and what they become for each program."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pytest_qnn import OptionError
from pytest_qnn.artifacts.binary import read_context_binary
from pytest_qnn.backend import Backend
from pytest_qnn.bench import Bench
from pytest_qnn.devices.soc import find_soc
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.runners.ort import QNN, LoadedModel, LoadRequest
from pytest_qnn.settings import Settings, load_settings
from pytest_qnn.targets.backend_config import (
    backend_extensions,
    provider_options,
    read_backend_config,
    run_options,
    write_backend_extensions,
)
from pytest_qnn.targets.options import ALIASES, OPTIONS, PERFORMANCE_MODES, REFUSED, check_options, compile_options
from pytest_qnn.targets.target import Plan
from pytest_qnn.testing.sdk_stand_in import schema_of, wheel_folder

PAGE = Path(__file__).parent.parent / "docs" / "backend-options.md"


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading of the page."""
    section = PAGE.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return cells[2:]


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_maps_each_option_as_the_code_does() -> None:
    def cell(text: str) -> str:
        return f"`{text}`" if text else "-"

    documented = {(r[0], r[1].strip("`")): r[3:] for r in rows("What becomes of an option")}
    coded = {
        (backend, name): [
            "yes" if option.compiles else "no",
            "yes" if option.provider else "-",
            cell(option.run),
            cell(option.extension),
        ]
        for backend, options in OPTIONS.items()
        for name, option in options.items()
    }
    assert documented == coded


def test_the_page_names_each_mode_alias_and_refusal() -> None:
    text = PAGE.read_text(encoding="utf-8")
    refused = {(row[0], name) for row in rows("What can't be honoured") for name in re.findall(r"`(\w+)`", row[1])}
    for backend, names in REFUSED.items():
        assert {name for b, name in refused if b == backend} >= names.keys() - {"soc"}
    assert [m for m in (*PERFORMANCE_MODES, *ALIASES["htp"]) if f"`{m}`" not in text and f"`{m} =" not in text] == []


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("htp", {"enable_dma": True}, "option enable_dma can't be honoured: neither onnxruntime nor the SDK's tools"),
        (
            "htp",
            {"precision_mode": "int8"},
            "option precision_mode: expected 'fp16', got 'int8': the HTP computes a quant",
        ),
        ("htp", {"soc": "SM8650"}, "the SoC isn't an option of a backend: say it as the setting soc"),
        ("htp", {"performance_mode": "fast"}, "option performance_mode: unknown value 'fast'"),
        ("htp", {"performence_mode": "burst"}, "unknown option 'performence_mode'. Did you mean 'performance_mode'?"),
        ("htp", {"hvx_threads": 0}, "option hvx_threads: expected a whole number from 1 to 64, got 0"),
        ("htp", {"vtcm_mb": 2.5}, "option vtcm_mb: expected a whole number from 0 to 64, got 2.5"),
        ("htp", {"device_id": True}, "option device_id: expected a whole number"),
        (
            "cpu",
            {"num_threads": 4},
            "option num_threads can't be honoured: QNN's CPU backend starts threads of its own",
        ),
        ("cpu", {"enable_fast_math": True}, "enable_fast_math can't be honoured"),
        ("gpu", {"precision_mode": "int8"}, "option precision_mode: unknown value 'int8'. *Known: fp16, fp32, hybrid"),
        ("gpu", {"performance_mode": "burst"}, "votes for the HTP's clocks; QNN's GPU backend knows none of them"),
    ],
)
def test_what_nothing_can_honour_is_refused_with_the_reason(
    backend: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        check_options(backend, options)


def test_one_option_under_two_names_is_refused() -> None:
    with pytest.raises(OptionError, match="it means performance_mode, which is given too: leave one of them out"):
        check_options("htp", {"performance_mode": "burst", "htp_performance_mode": "balanced"})


def test_a_file_with_several_mistakes_has_them_all_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(
        '{"htp_config": {"performance_mode": "burst", "enable_dma": true, "vtcm_mb": -1},'
        ' "cpu_config": {"num_threads": 4, "enable_fast_math": true}}'
    )
    with pytest.raises(OptionError) as caught:
        read_backend_config(file)
    for name in ("config.json", "enable_dma", "vtcm_mb", "num_threads", "enable_fast_math"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "expected an object with htp_config, cpu_config, gpu_config, got list"),
        ('{"hpt_config": {}}', "unknown section 'hpt_config'. Did you mean 'htp_config'?"),
        ('{"htp_config": []}', r"backend 'htp': expected a table of options, got \[\]"),
        ('{"htp_config": {"vtcm_mb": 2, "vtcm_mb": 4}}', "'vtcm_mb' stands there twice"),
        ('{"backend_extensions": {}}', "belongs to a file for qnn-net-run, which pytest-qnn writes by itself"),
        ('{"devices": [], "graphs": []}', "'devices' belongs to a file for qnn-net-run"),
        ('\ufeff{"htp_config"', "not valid JSON"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(OptionError, match=message):
        read_backend_config(file)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"backend.json: can't be read \(No such file or directory\): correct the path"
    ):
        load_settings(tmp_path, {"backend_config": str(tmp_path / "backend.json")})
    (tmp_path / "backend.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="not valid JSON"):
        load_settings(tmp_path, {"backend_config": str(tmp_path / "backend.json")})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "[tool.pytest_qnn.backend.hpt]\nvtcm_mb = 1",
            r"\[tool.pytest_qnn.backend\]: unknown backend 'hpt'. Did you mean",
        ),
        ("[tool.pytest_qnn]\nbackend = 'htp'", "expected a table for each backend, got 'htp'"),
        ("[tool.pytest_qnn.backend]\nhtp = 3", "backend 'htp': expected a table of options, got 3"),
        ("[tool.pytest_qnn.backend.htp]\nvtcm = 1", "unknown option 'vtcm'. Did you mean 'vtcm_mb'?"),
        ("[tool.pytest_qnn.backend.cpu]\nnum_threads = 1", "num_threads can't be honoured"),
    ],
)
def test_mistakes_in_the_projects_table_name_it(tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "pyproject.toml").write_text(table)
    with pytest.raises(OptionError, match=message):
        load_settings(tmp_path)


def test_a_mistake_in_the_file_stops_pytest_at_once(pytester: pytest.Pytester) -> None:
    pytester.makefile(".json", config='{"htp_config": {"enable_dma": true}}')
    pytester.makepyfile("def test_a(): ...")
    result = pytester.runpytest_inprocess("--qnn-backend-config=config.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: pytest-qnn: *config.json: *enable_dma can't be honoured*"])


# --- where options come from ------------------------------------------------------------------------------------------


def test_load_wins_over_the_mark_and_that_over_the_file_and_that_over_the_table(
    project: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    pytester.makepyprojecttoml(
        "[tool.pytest_qnn.backend.htp]\nvtcm_mb = 1\nrpc_control_latency = 1\ndevice_id = 0\nqnn_context_priority = 'low'"
    )
    pytester.makefile(
        ".json", config='{"htp_config": {"vtcm_mb": 2, "rpc_control_latency": 2, "performance_mode": "balanced"}}'
    )
    result = project(
        """
        def test_a(qnn_backend):
            assert qnn_backend.load("conv.qdq.onnx").provenance["options"] == {
                "device_id": "0", "htp_performance_mode": "balanced", "qnn_context_priority": "low",
                "rpc_control_latency": "2", "vtcm_mb": "2"}

        @pytest.mark.backend("htp", performance_mode="burst", vtcm_mb=4)
        def test_b(qnn_backend):
            options = qnn_backend.load("conv.qdq.onnx", vtcm_mb=8, performance_mode="power_saver").provenance["options"]
            assert options == {
                "device_id": "0", "htp_performance_mode": "power_saver", "qnn_context_priority": "low",
                "rpc_control_latency": "2", "vtcm_mb": "8"}
        """.replace("\n        ", "\n"),
        "--qnn-backend-config=config.json",
    )
    result.assert_outcomes(passed=2)


def test_a_relative_path_in_the_projects_table_starts_at_the_project(tmp_path: Path) -> None:
    (tmp_path / "here.json").write_text('{"htp_config": {"vtcm_mb": 2}}')
    (tmp_path / "pyproject.toml").write_text("[tool.pytest_qnn]\nbackend_config = 'here.json'\n")
    assert load_settings(tmp_path).backend_options == {"htp": {"vtcm_mb": "2"}}


def test_an_option_that_only_the_sdk_has_is_refused_where_onnxruntime_runs(htp: Backend, models: Path) -> None:
    with pytest.raises(OptionError, match=r"option hvx_threads: onnxruntime's execution provider has no such option"):
        htp.load(models / "conv.qdq.onnx", hvx_threads=4)


def test_a_second_device_is_refused_on_the_simulator(htp: Backend, models: Path) -> None:
    with pytest.raises(OptionError, match="device_id: the simulator has one device, 0, got 1"):
        htp.load(models / "conv.qdq.onnx", device_id=1)


def test_a_mark_of_two_backends_may_use_the_short_names(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.backend("htp", "cpu", performance_mode="burst")
        def test_a(qnn_backend): ...

        @pytest.mark.backend("cpu", performance_mode="burst")
        def test_b(qnn_backend): ...
        """
    )
    result = pytester.runpytest_inprocess("--collect-only")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*test_b: backend 'cpu': option performance_mode can't be honoured: *"])
    assert "test_a: " not in result.stderr.str()


# --- onnxruntime ------------------------------------------------------------------------------------------------------


def verbose_load(bench: Bench, plan: Plan, model: Path) -> LoadedModel:
    """The model under ``plan``, with everything that the runtime has to say of it."""
    request = LoadRequest(
        model=str(model),
        files=(),
        process=f"verbose {plan.process}",
        provider=QNN,
        provider_options=plan.provider_options,
        run_options=plan.run_options,
        log_severity=0,
    )
    return LoadedModel(bench.pool, request, "verbose", replace(bench.limits))


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("performance_mode", "burst", "Updating htp performance mode to: burst."),
        ("rpc_control_latency", 100, "Updating rpc control latency to: 100us."),
        ("qnn_context_priority", "high", "QNN context priority: high"),
        ("htp_graph_finalization_optimization_mode", 3, "HTP graph finalization optimization mode: 3"),
    ],
)
def test_the_runtime_says_that_it_took_the_option(
    bench: Bench, models: Path, option: str, value: object, line: str
) -> None:
    plain = verbose_load(bench, bench.target.plan("htp", None, {}), models / "conv.qdq.onnx")
    asked = verbose_load(bench, bench.target.plan("htp", None, {option: value}), models / "conv.qdq.onnx")
    assert line not in "\n".join(plain.info.log)
    assert line in "\n".join(asked.info.log)
    plain.close()
    asked.close()


def test_a_vote_between_runs_is_made_after_each_run_and_withdrawn_before_the_next(bench: Bench, models: Path) -> None:
    options = {
        "performance_mode": "burst",
        "htp_performance_mode_post_run": "low_power_saver",
        "rpc_control_latency": 50,
    }
    plan = bench.target.plan("htp", None, options)
    model = verbose_load(bench, plan, models / "conv.qdq.onnx")
    sample = seeded_inputs(models / "conv.qdq.onnx", 1)[0]
    model.run(sample)
    process = bench.pool.get(model.request.process)
    for op, more in (("run", {}), ("time", {"count": 1, "seconds": 5.0, "reset_peak": False})):
        answer, _ = process.run(op, "again", sample, 60, 8192, session=model._session, **more)
        said = re.findall(r"Updating htp performance mode to: (\w+)\.", "\n".join(answer["log"]))
        assert said == ["burst", "low_power_saver"], op
    model.close()


def test_vtcm_is_what_the_compiled_binary_was_given(htp: Backend, models: Path, tmp_path: Path) -> None:
    for size in (2, 8):
        wrapper = htp.compile(models / "conv.qdq.onnx", tmp_path / str(size), vtcm_mb=size)
        graph = read_context_binary(next(wrapper.parent.glob("*.bin"))).graphs[0]
        assert dict(graph.memory)["vtcm_bytes"] == size << 20


def test_options_of_running_make_no_other_artifact(htp: Backend, models: Path) -> None:
    plain, burst = htp.load(models / "conv.qdq.onnx"), htp.load(models / "conv.qdq.onnx", performance_mode="burst")
    priority = htp.load(models / "conv.qdq.onnx", qnn_context_priority="high")
    assert plain.artifact.digest == burst.artifact.digest != priority.artifact.digest
    assert burst.provenance["options"] == {"htp_performance_mode": "burst"}


def test_run_options_go_along_only_if_a_run_changes_what_holds_between_runs() -> None:
    assert run_options("htp", {"htp_performance_mode": "burst", "rpc_control_latency": "9"}) == {}
    assert run_options("htp", {"htp_performance_mode_post_run": "default"}) == {
        "qnn.htp_perf_mode": "default",
        "qnn.htp_perf_mode_post_run": "default",
    }
    assert provider_options("htp", {"htp_performance_mode_post_run": "default", "vtcm_mb": "2"}) == {"vtcm_mb": "2"}


def test_compile_options_leave_out_what_only_affects_running() -> None:
    options = check_options("htp", {"performance_mode": "burst", "rpc_control_latency": 1, "vtcm_mb": 1})
    assert compile_options("htp", options) == {"vtcm_mb": "1"}


# --- the SDK's tools --------------------------------------------------------------------------------------------------

EVERYTHING = {
    "htp_performance_mode": "burst",
    "rpc_control_latency": 100,
    "vtcm_mb": 4,
    "hvx_threads": 4,
    "device_id": 0,
    "qnn_context_priority": "high",
    "htp_graph_finalization_optimization_mode": 3,
    "precision_mode": "fp16",
}


def test_the_htp_file_fits_the_schema_of_qualcomms_extension_library() -> None:
    schema = schema_of(wheel_folder() / "libQnnHtpNetRunExtensions.so")
    options = check_options("htp", EVERYTHING)
    assert options.keys() == {name for name, option in OPTIONS["htp"].items() if option.extension}
    extensions, outer = backend_extensions("htp", find_soc("SM8650"), options, ["model"])
    jsonschema.validate(extensions, closed(schema))
    assert extensions == {
        "graphs": [
            {"graph_names": ["model"], "O": 3, "fp16_relaxed_precision": 1, "hvx_threads": 4, "vtcm_mb": 4},
        ],
        "devices": [
            {
                "device_id": 0,
                "soc_model": 57,
                "dsp_arch": "v75",
                "pd_session": "unsigned",
                "cores": [{"perf_profile": "burst", "rpc_control_latency": 100}],
            }
        ],
    }
    assert outer == {"context_configs": {"context_priority": "high"}}
    extensions["graphs"][0]["vtcm"] = 4
    with pytest.raises(jsonschema.ValidationError):  # the schema does tell names that it doesn't have
        jsonschema.validate(extensions, closed(schema))


def closed(schema: Any) -> Any:
    """The schema, refusing names that it doesn't list: the library itself only logs those."""
    if isinstance(schema, dict):
        inner = {key: closed(value) for key, value in schema.items()}
        return {**inner, "additionalProperties": False} if "properties" in schema else inner
    return [closed(value) for value in schema] if isinstance(schema, list) else schema


def test_without_options_only_the_device_is_named() -> None:
    assert backend_extensions("htp", find_soc("SM8550"), {}) == (
        {"devices": [{"soc_model": 43, "dsp_arch": "v73", "pd_session": "unsigned"}]},
        {},
    )
    assert backend_extensions("htp", None, {}) == ({}, {})


def test_the_gpu_file_is_flat() -> None:
    assert backend_extensions("gpu", None, {"precision_mode": "fp16"}, ["model"]) == (
        {"graph_names": ["model"], "precision_mode": "fp16"},
        {},
    )


@pytest.mark.parametrize("name", ["offload_graph_io_quantization", "enable_htp_spill_fill_buffer"])
def test_what_the_tools_lack_is_refused_there(name: str) -> None:
    with pytest.raises(OptionError, match=f"option {name}: qnn-net-run and qnn-context-binary-generator have no such"):
        backend_extensions("htp", find_soc("SM8650"), {name: "1"}, ["model"])


def test_options_of_graphs_need_a_graph() -> None:
    with pytest.raises(OptionError, match="options of graphs need the graph's name, or the tools ignore them"):
        backend_extensions("htp", find_soc("SM8650"), {"vtcm_mb": "4"})


def test_the_files_name_each_other_as_the_tool_will_find_them(tmp_path: Path) -> None:
    config = write_backend_extensions(
        tmp_path, "libX.so", {"devices": []}, {"context_configs": {}}, "/data/local/tmp/a"
    )
    content = json.loads(config.read_text())
    assert content["backend_extensions"] == {
        "shared_library_path": "libX.so",
        "config_file_path": "/data/local/tmp/a/backend_extensions.json",
    }
    assert content["context_configs"] == {}
    assert json.loads((tmp_path / "backend_extensions.json").read_text()) == {"devices": []}


def test_settings_of_a_bench_without_configuration_have_no_options() -> None:
    assert Settings().backend_options == {}
