"""The SDK's own tools, by a stand-in of their command line: nothing here was ever run against the real ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest

from pytest_qnn import (
    ArtifactError,
    BackendUnavailableError,
    CompileError,
    EncodingError,
    InputError,
    ModelError,
    OptionError,
    QnnError,
    RuntimeCrashError,
    TargetError,
    TargetTimeoutError,
    assert_matches_reference,
)
from pytest_qnn.artifacts.binary import read_context_binary
from pytest_qnn.backend import Backend
from pytest_qnn.cli import main
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.sdk import (
    ANDROID,
    Sdk,
    build,
    build_library,
    convert,
    describe_context,
    find_sdk,
    make_context,
)
from pytest_qnn.sdk.check import Finding, check_sdk
from pytest_qnn.sdk.conversion import graph_name
from pytest_qnn.sdk.installation import HOST, read_version
from pytest_qnn.testing.sdk_stand_in import DLC_HEAD
from tests import small_models
from tests.conftest import needs_simulator
from tests.sdk_stand_in import TOOLS, VERSION, a_small_library, install, needs_a_missing_library

STAND_IN = f"{VERSION}.stand-in"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in SDK; tests must not change it."""
    needs_simulator()
    return install(tmp_path_factory.mktemp("sdk") / "qairt")


@pytest.fixture
def sdk(root: Path, monkeypatch: pytest.MonkeyPatch) -> Sdk:
    """The stand-in, named by the environment as an installed SDK is."""
    monkeypatch.setenv("QNN_SDK_ROOT", str(root))
    for name in ("ANDROID_NDK_ROOT", "QNN_SDK_PYTHON", "STAND_IN_FAULT"):
        monkeypatch.delenv(name, raising=False)
    return find_sdk()


@pytest.fixture(scope="module")
def built(root: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the chain makes of ``conv.onnx``; tests copy what they change."""
    folder = tmp_path_factory.mktemp("built")
    build(find_sdk(root), models / "conv.onnx", folder, ["SM8650"])
    return folder


def samples(count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


def left(folder: Path) -> list[str]:
    """Names of all files below a folder."""
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


# --- the chain --------------------------------------------------------------------------------------------------------


def test_the_command_takes_a_float_model_to_context_binaries(
    sdk: Sdk, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "sample.npz", **samples(1)[0])
    (tmp_path / "config.json").write_text('{"htp_config": {"vtcm_mb": 2, "performance_mode": "burst"}}')
    (tmp_path / "pyproject.toml").write_text("[tool.pytest_qnn.backend.htp]\nvtcm_mb = 1\n")
    arguments = ["--data", "sample.npz", "--activations", "8", "--weights", "8", "--per-channel"]
    arguments += ["--soc", "SM8650,sm8550", "--backend-config", "config.json", "--output", "out"]
    assert main(["sdk", "build", str(models / "conv.onnx"), *arguments]) == 0
    made = tmp_path / "out"
    assert capsys.readouterr().out.splitlines() == [
        str(made / HOST / "libconv.so"),
        str(made / "conv.SM8650.bin"),
        str(made / "conv.SM8550.bin"),
    ]
    for soc in ("SM8650", "SM8550"):
        info = read_context_binary(made / f"conv.{soc}.bin")  # a real one
        assert info.soc is not None
        assert info.soc.name == soc
        assert info.graphs[0].inputs[0].shape == (1, 3, 16, 16)
        assert dict(info.graphs[0].memory)["vtcm_bytes"] == 2 << 20  # the file wins over the project's table
    assert not list(made.glob(".pytest-qnn-work-*"))
    assert {p.name for p in tmp_path.iterdir()} == {"out", "sample.npz", "config.json", "pyproject.toml"}


def test_each_result_says_what_made_it_from_what_and_that_it_was_a_stand_in(sdk: Sdk, built: Path) -> None:
    for result, tool in (
        ("conv.cpp", "qnn-onnx-converter"),
        (f"{HOST}/libconv.so", "qnn-model-lib-generator"),
        ("conv.SM8650.bin", "qnn-context-binary-generator"),
    ):
        record = json.loads((built / f"{result}.sdk.json").read_text())
        assert (record["tool"], record["sdk"]) == (tool, STAND_IN)
        assert Path(result).name in record["outputs"]
    for log in built.glob("*.log"):
        assert "STAND-IN" in log.read_text()
        assert f"QNN SDK {STAND_IN}" in log.read_text()
    assert len(list(built.glob("*.log"))) == 3
    assert "STAND-IN" in json.loads((built / "conv.SM8650.json").read_text())["info"]["buildId"]


def test_calibration_data_reaches_the_converter_and_bounds_are_kept(sdk: Sdk, models: Path, tmp_path: Path) -> None:
    made = convert(sdk, models / "conv.onnx", tmp_path, data=samples(), samples=2, activations=16, weights=8)
    assert made.weights is not None
    carried = onnx.load(str(made.weights))
    types = {i.data_type for i in carried.graph.initializer if i.name.endswith("x_zero_point")}
    assert types == {onnx.TensorProto.UINT16}
    record = json.loads((tmp_path / "conv.cpp.sdk.json").read_text())
    flags = [a for a in record["arguments"] if a.startswith("--")]
    assert flags == [
        "--input_network",
        "--preserve_io",
        "--act_bitwidth",
        "--weights_bitwidth",
        "--input_list",
        "--output_path",
    ]
    assert left(tmp_path) == ["conv.bin", "conv.convert.log", "conv.cpp", "conv.cpp.sdk.json", "conv_net.json"]


def test_a_release_with_the_former_flags_gets_those(
    sdk: Sdk, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytest_qnn.sdk.conversion import _flag

    monkeypatch.setenv("STAND_IN_OLD_FLAGS", "1")
    _flag.cache_clear()
    convert(sdk, models / "conv.onnx", tmp_path, data=samples(1), activations=8, bias=32)
    _flag.cache_clear()
    arguments = json.loads((tmp_path / "conv.cpp.sdk.json").read_text())["arguments"]
    assert "--act_bw" in arguments
    assert "--bias_bw" in arguments


def test_overrides_without_data_need_float_fallback_or_the_converter_would_ignore_them(
    sdk: Sdk, models: Path, tmp_path: Path
) -> None:
    overrides = tmp_path / "overrides.json"
    overrides.write_text(
        '{"activation_encodings": {"c": [{"bitwidth": 8, "min": -1.28, "max": 1.27, "scale": 0.01, "offset": -128, '
        '"dtype": "int", "is_symmetric": "False"}]}, "param_encodings": {}}'
    )
    with pytest.raises(OptionError, match="overrides: without calibration data the converter ignores this"):
        convert(sdk, models / "conv.onnx", tmp_path / "out", overrides=overrides)
    made = convert(sdk, models / "conv.onnx", tmp_path / "out", overrides=overrides, float_fallback=True)
    assert made.description is not None
    given = json.loads(made.description.read_text())["overrides"]
    assert given == json.loads((tmp_path / "out" / "conv_overrides.json").read_text())
    assert (given["activation_encodings"]["c"][0]["offset"], given["activation_encodings"]["c"][0]["bitwidth"]) == (
        -128,
        8,
    )


def test_overrides_with_the_other_sign_reach_the_converter_with_its_own(sdk: Sdk, models: Path, tmp_path: Path) -> None:
    overrides = (
        tmp_path / "overrides.json"
    )  # (q - offset) * scale, as the document that the project started from has it
    overrides.write_text(
        '{"activation_encodings": {"c": [{"bitwidth": 8, "min": -1.27, "max": 1.28, "scale": 0.01, "offset": 127}]}, '
        '"param_encodings": {}}'
    )
    convert(sdk, models / "conv.onnx", tmp_path / "out", overrides=overrides, float_fallback=True)
    given = json.loads((tmp_path / "out" / "conv_overrides.json").read_text())
    assert given["activation_encodings"]["c"][0]["offset"] == -127


def test_dynamic_dimensions_are_given_to_the_converter(sdk: Sdk, tmp_path: Path) -> None:
    model = small_models.unary(tmp_path / "dynamic.onnx", "Relu", shape=("batch", 16))
    with pytest.raises(ModelError, match=r"dynamic dimensions \(batch\)"):
        convert(sdk, model, tmp_path / "out")
    made = convert(sdk, model, tmp_path / "out", dimensions={"batch": 2})
    assert made.description is not None
    assert json.loads(made.description.read_text())["inputs"] == {"x": [2, 16]}


def test_a_name_that_cpp_does_not_allow_names_file_and_graph_alike(sdk: Sdk, models: Path, tmp_path: Path) -> None:
    made = build(sdk, models / "conv.onnx", tmp_path, ["SM8650"], name="my-net.v2", options={"vtcm_mb": 2})
    assert (made.conversion.graph, made.conversion.cpp.name) == ("my_net_v2", "my_net_v2.cpp")
    assert made.contexts[0].graphs == ("my_net_v2",)
    assert graph_name("1.näme") == "1_n_me"


def test_a_dlc_is_compiled_through_the_sdks_own_library(sdk: Sdk, models: Path, tmp_path: Path) -> None:
    dlc = tmp_path / "net.dlc"
    dlc.write_bytes(DLC_HEAD + b'{"graph": "net"}\n' + (models / "conv.qdq.onnx").read_bytes())
    made = make_context(sdk, dlc, tmp_path / "out", "SM8650", options={"vtcm_mb": 2})
    assert made.graphs == ("net",)
    assert made.info is not None
    assert dict(made.info.graphs[0].memory)["vtcm_bytes"] == 2 << 20


def test_a_library_for_android_needs_the_ndk(
    sdk: Sdk, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        TargetError, match="aarch64-android needs ndk-build, which is not on PATH: install the Android NDK"
    ):
        build_library(sdk, built / "conv.cpp", tmp_path / "out", target=ANDROID)
    ndk = tmp_path / "ndk"
    ndk.mkdir()
    (ndk / "ndk-build").write_text("#!/bin/sh\n")
    (ndk / "ndk-build").chmod(0o755)
    monkeypatch.setenv("ANDROID_NDK_ROOT", str(ndk))
    made = build_library(sdk, built / "conv.cpp", tmp_path / "out", target=ANDROID)
    assert made.path == tmp_path / "out" / ANDROID / "libconv.so"
    with pytest.raises(CompileError, match=r"ended with code 1: .*wrong ELF class"):
        make_context(sdk, made.path, tmp_path / "out", "SM8650")


def test_the_sdk_describes_a_binary(sdk: Sdk, built: Path, tmp_path: Path) -> None:
    made = describe_context(sdk, built / "conv.SM8650.bin", tmp_path / "conv.json")
    assert json.loads(made.read_text())["info"]["graphs"]
    assert left(tmp_path) == ["conv.json"]
    (tmp_path / "no.bin").write_bytes(b"no context")
    with pytest.raises(CompileError, match="Failed to get context binary info"):
        describe_context(sdk, tmp_path / "no.bin", tmp_path / "no.json")


def test_another_release_than_the_runtimes_is_noted(
    models: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QNN_SDK_ROOT", str(install(tmp_path / "sdk", version="2.31.0")))
    monkeypatch.chdir(tmp_path)
    assert main(["sdk", "context", str(built / HOST / "libconv.so"), "--output", "out", "--soc", "SM8650"]) == 0
    assert "note: made by QNN 2.31.0.stand-in; the installed onnxruntime-qnn has 2." in capsys.readouterr().out


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"activations": 8}, OptionError, "activations: without calibration data the converter ignores this"),
        ({"per_channel": True}, OptionError, "per_channel: without calibration data"),
        ({"data": samples(1), "activations": 4}, OptionError, "activations: the converter knows 8 and 16 bits, got 4"),
        ({"data": samples(1), "weights": True}, OptionError, "weights: the converter knows 4 and 8 bits, got True"),
        (
            {"data": samples(1), "float_fallback": True},
            OptionError,
            "the converter refuses it with data: leave one out",
        ),
        ({"float_fallback": True}, OptionError, "conv.onnx is a float model and no overrides are given"),
        ({"data": samples(1), "preserve_layout": False}, OptionError, "in a layout of its own choice, unnoticed"),
        ({"data": [{"y": np.zeros(3)}]}, InputError, "sample 0"),
        ({"data": [{"x": np.zeros((1, 3, 8, 8), np.float32)}]}, InputError, "sample 0"),
        ({"layouts": {"z": "NCHW"}}, ModelError, "layout: unknown input 'z'"),
        ({"layouts": {"x": "NCWH"}}, OptionError, "unknown layout 'NCWH'. Did you mean 'NCHW'?"),
        ({"name": "../up"}, OptionError, "'../up' can't be a file name here"),
        ({"timeout": 0}, OptionError, "timeout must be a number of seconds greater than 0, got 0"),
    ],
)
def test_a_senseless_conversion_is_refused_before_the_tool_runs(
    sdk: Sdk, models: Path, tmp_path: Path, arguments: dict[str, Any], kind: type[QnnError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        convert(sdk, models / "conv.onnx", tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists() or left(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "broken JSON at line 1"),
        ("[]", "o.json"),
        (None, "o.json"),
        ('{"activation_encodings": {"z": [{"bitwidth": 8, "scale": 0.1, "offset": 0}]}, "param_encodings": {}}', "'z'"),
        ('{"activation_encodings": {"x": [{"bitwidth": 8, "scale": 0, "offset": 0}]}, "param_encodings": {}}', "scale"),
    ],
)
def test_broken_overrides_are_refused(
    sdk: Sdk, models: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "o.json").write_text(content)
    with pytest.raises((EncodingError, OptionError), match=message):
        convert(sdk, models / "conv.onnx", tmp_path / "out", overrides=tmp_path / "o.json", float_fallback=True)
    assert not (tmp_path / "out").exists()


def test_a_generator_that_raises_midway_leaves_nothing(sdk: Sdk, models: Path, tmp_path: Path) -> None:
    def broken() -> Any:
        yield samples(1)[0]
        raise ValueError("the camera is gone")

    with pytest.raises(InputError, match="ValueError while item 1 was read: the camera is gone"):
        convert(sdk, models / "conv.onnx", tmp_path / "out", data=broken())
    assert left(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("file", "arguments", "message"),
    [
        ("gone.cpp", {}, "there is no such C\\+\\+ source: convert a model first"),
        ("conv.bin", {}, "expected the converter's .cpp"),
        ("conv.cpp", {"weights": "gone.bin"}, "there are no such weights"),
        (
            "conv.cpp",
            {"target": "x86_64-linux-gcc"},
            "unknown target 'x86_64-linux-gcc'. Did you mean 'x86_64-linux-clang'?",
        ),
        ("conv.cpp", {"name": "lib/x"}, "'lib/x' can't name a library here"),
    ],
)
def test_a_library_of_nothing_is_refused(
    sdk: Sdk, built: Path, tmp_path: Path, file: str, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises((ArtifactError, OptionError), match=message):
        build_library(sdk, built / file, tmp_path, **arguments)  # type: ignore[arg-type]
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "soc", "options", "message"),
    [
        ("gone.so", "SM8650", {}, "there is no such file"),
        ("conv.cpp", "SM8650", {}, r"expected a model library \(.so\) or a .dlc"),
        (f"{HOST}/libconv.so", "SM1", {}, "unknown SoC 'SM1'"),
        (f"{HOST}/libconv.so", "SM8650", {"vtcm": 1}, "unknown option 'vtcm'. Did you mean 'vtcm_mb'?"),
        (
            f"{HOST}/libconv.so",
            "SM8650",
            {"offload_graph_io_quantization": 0},
            "have no such option: there the converter",
        ),
    ],
)
def test_a_context_of_nothing_is_refused(
    sdk: Sdk, built: Path, tmp_path: Path, file: str, soc: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises((ArtifactError, OptionError), match=message):
        make_context(sdk, built / file, tmp_path, soc, options=options)
    assert left(tmp_path) == []


def test_options_that_the_tool_would_ignore_because_the_graph_has_another_name_are_noticed(
    sdk: Sdk, built: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ArtifactError, match=r"its graph is called 'conv', not 'net', so the tool ignored vtcm_mb: pass"
    ):
        make_context(sdk, built / HOST / "libconv.so", tmp_path, "SM8650", options={"vtcm_mb": 2}, graph="net")
    assert left(tmp_path) == ["conv.SM8650.context.log"]


@pytest.mark.parametrize("changed", ["conv.cpp", "conv.bin"])
def test_files_that_do_not_belong_together_any_more_are_refused(
    sdk: Sdk, built: Path, tmp_path: Path, changed: str
) -> None:
    for name in ("conv.cpp", "conv.bin", "conv_net.json", "conv.cpp.sdk.json"):
        shutil.copy(built / name, tmp_path)
    with (tmp_path / changed).open("ab") as f:
        f.write(b" ")
    with pytest.raises(ArtifactError, match=f"{changed}: altered since the SDK's tool made it"):
        build_library(sdk, tmp_path / "conv.cpp", tmp_path / "out")
    (tmp_path / changed).unlink()
    with pytest.raises(ArtifactError, match=r"missing|no such C\+\+ source"):
        build_library(sdk, tmp_path / "conv.cpp", tmp_path / "out")


def test_a_model_that_the_tool_refuses_is_explained_by_its_last_error_line(sdk: Sdk, tmp_path: Path) -> None:
    library = tmp_path / "libx.so"
    library.write_bytes(b"\x7fELF of something else")
    with pytest.raises(CompileError) as caught:
        make_context(sdk, library, tmp_path / "out", "SM8650")
    log = tmp_path / "out" / "x.SM8650.context.log"
    assert str(caught.value) == (
        f"qnn-context-binary-generator on libx.so: ended with code 1: [ ERROR ] {library}: undefined symbol: "
        f"QnnModel_composeGraphs. The log is {log}. Mend what the tool names"
    )
    assert left(tmp_path / "out") == ["x.SM8650.context.log"]


def test_a_folder_that_cannot_be_written_is_named(sdk: Sdk, models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file/out: can't be written: Not a directory"):
        convert(sdk, models / "conv.onnx", tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sdk", "convert", "gone.onnx", "--output", "out"], 2, "gone.onnx"),
        (["sdk", "convert", "conv.onnx", "--output", "out", "--activations", "8"], 2, "without calibration data"),
        (["sdk", "convert", "conv.onnx", "--output", "out", "--layout", "x"], 2, "--layout: expected NAME=VALUE"),
        (["sdk", "context", "conv.onnx", "--output", "out", "--soc", ","], 2, "--soc: name at least one SoC"),
        (["sdk", "context", "conv.onnx", "--output", "out", "--option", "enable_dma=1"], 2, "enable_dma can't be hon"),
        (["sdk", "library", "conv.onnx", "--output", "out"], 2, "expected the converter's .cpp"),
    ],
)
def test_mistakes_on_the_command_line_are_told_without_a_traceback(
    sdk: Sdk,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(models)
    assert main(arguments) == code
    assert message in capsys.readouterr().err
    assert not (models / "out").exists()


def test_without_an_sdk_the_commands_say_how_to_get_one(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    assert main(["sdk", "convert", str(models / "conv.onnx"), "--output", str(tmp_path)]) == 1
    assert "install the Qualcomm AI Runtime SDK and set QNN_SDK_ROOT to its folder" in capsys.readouterr().err
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    with pytest.raises(BackendUnavailableError, match=f"bin/{HOST} doesn't exist: set QNN_SDK_ROOT to the folder that"):
        find_sdk()


# --- tools that misbehave ---------------------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Sdk, Path, Path, Path], object]] = {
    "qnn-onnx-converter": lambda sdk, models, built, out: convert(sdk, models / "conv.onnx", out, timeout=5),
    "qnn-model-lib-generator": lambda sdk, models, built, out: build_library(sdk, built / "conv.cpp", out, timeout=5),
    "qnn-context-binary-generator": lambda sdk, models, built, out: make_context(
        sdk, built / HOST / "libconv.so", out, "SM8650", timeout=5
    ),
}


@pytest.mark.parametrize("tool", STEPS)
@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("crash", RuntimeCrashError, r"died of signal 11 \(SIGSEGV\)\. Last line of its log: .*Finalizing the graph"),
        ("half", CompileError, "ended with code 1: .*Failed to write the result: an internal error"),
        ("silent", ArtifactError, "it ended as if all were well, but .* was not made"),
        ("empty", ArtifactError, "it ended as if all were well, but .* is empty"),
        ("full", CompileError, r"No space left on device\. The log is .*\.log\. Free some space on the disk"),
        ("module", CompileError, "No module named 'qti'.* set QNN_SDK_PYTHON"),
    ],
)
def test_a_tool_that_fails_leaves_its_log_only(
    sdk: Sdk,
    models: Path,
    built: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tool: str,
    fault: str,
    kind: type[QnnError],
    message: str,
) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", f"{tool}:{fault}")
    with pytest.raises(kind, match=message) as caught:
        STEPS[tool](sdk, models, built, tmp_path)
    assert str(caught.value).startswith(f"{tool} on ")
    (log,) = left(tmp_path)
    assert log.endswith(".log")
    assert str(tmp_path / log) in str(caught.value)


def test_a_tool_that_hangs_is_killed_at_its_deadline(
    sdk: Sdk, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", "qnn-onnx-converter:hang")
    monkeypatch.setenv("STAND_IN_PID_FILE", str(tmp_path / "pid"))
    with pytest.raises(
        TargetTimeoutError, match=r"not done after 2 s, and killed\. .* Give it more time with timeout="
    ):
        convert(sdk, models / "conv.onnx", tmp_path / "out", timeout=2)
    assert is_gone(int((tmp_path / "pid").read_text()))
    assert left(tmp_path / "out") == ["conv.convert.log"]


def test_what_a_tool_leaves_running_is_ended_too(
    sdk: Sdk, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", "qnn-onnx-converter:orphan")
    monkeypatch.setenv("STAND_IN_PID_FILE", str(tmp_path / "pid"))
    with pytest.raises(CompileError, match="Compilation failed"):
        convert(sdk, models / "conv.onnx", tmp_path / "out")
    assert is_gone(int((tmp_path / "pid").read_text()))


def is_gone(pid: int) -> bool:
    """Whether a process has ended, or does so soon; one that nobody has waited for yet has ended."""
    try:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE or process.wait(10) is None
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(("ending", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["Ctrl-C", "kill -9"])
def test_whoever_ends_the_command_ends_the_tool_and_nothing_is_left(
    sdk: Sdk, models: Path, tmp_path: Path, ending: signal.Signals, code: int
) -> None:
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "pytest_qnn.cli", "sdk", "convert", str(models / "conv.onnx")]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")],
        env={**os.environ, "STAND_IN_FAULT": "qnn-onnx-converter:hang", "STAND_IN_PID_FILE": str(fifo)},
        stderr=subprocess.PIPE,
        text=True,
    )
    tool = psutil.Process(int(fifo.read_text()))  # waits until the tool is there
    guard = tool.parent()
    assert guard is not None
    process.send_signal(ending)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said == ("pytest-qnn: interrupted\n" if ending is signal.SIGINT else "")
    assert is_gone(tool.pid)
    assert is_gone(guard.pid)
    assert left(tmp_path / "out") == ["conv.convert.log"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["conv.convert.log"]


def test_a_failure_leaves_earlier_results_as_they_were(
    sdk: Sdk, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = convert(sdk, models / "conv.onnx", tmp_path)
    content = before.cpp.read_bytes()
    monkeypatch.setenv("STAND_IN_FAULT", "qnn-onnx-converter:half")
    with pytest.raises(CompileError):
        convert(sdk, models / "conv.onnx", tmp_path)
    assert before.cpp.read_bytes() == content
    assert build_library(sdk, before.cpp, tmp_path).path.is_file()


# --- the stand-in refuses what the real tools refuse ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "arguments", "code", "message"),
    [
        (
            "qnn-onnx-converter",
            "-i {models}/conv.onnx -o {tmp}/c.cpp --target_device hexagon",
            2,
            "unrecognized arguments",
        ),
        ("qnn-onnx-converter", "-i {models}/conv.onnx -o {tmp}/c.cpp --optimization_level high", 2, "unrecognized arg"),
        ("qnn-onnx-converter", "-i {tmp}/gone.onnx -o {tmp}/c.cpp", 1, "Input model file not found"),
        ("qnn-onnx-converter", "-i {models}/conv.onnx -o {tmp}/c.cpp -d x 1,3,8,8", 1, "gives 8 for a dimension of 16"),
        ("qnn-onnx-converter", "-i {models}/conv.onnx -o {tmp}/c.cpp -d z 1", 1, "Input z not found"),
        ("qnn-onnx-converter", "-i {models}/conv.onnx -o {tmp}/no/c.cpp", 1, "doesn't exist or is not writable"),
        ("qnn-onnx-converter", "-i {models}/conv.onnx -o {tmp}/c.cpp --input_list {tmp}/list", 1, "Can't open input"),
        (
            "qnn-model-lib-generator",
            "-c {built}/conv.cpp -o {tmp} -t x86_64-linux-clang",
            1,
            "the weights have 0 bytes",
        ),
        ("qnn-model-lib-generator", "-c {tmp}/list -o {tmp}", 1, "not C++ that a converter made"),
        ("qnn-model-lib-generator", "-c {built}/conv.cpp --target_backends htp,gpu,cpu", 2, "unrecognized arguments"),
        (
            "qnn-context-binary-generator",
            "--model {built}/{host}/libconv.so --backend libQnnCpu.so --binary_file c --output_dir {tmp}",
            1,
            "libQnnCpu.so doesn't support serialized contexts",
        ),
        (
            "qnn-context-binary-generator",
            "--model {built}/{host}/libconv.so --backend libQnnNpu.so --binary_file c",
            1,
            "libQnnNpu.so: cannot open shared object file",
        ),
        (
            "qnn-context-binary-generator",
            "--model {built}/{host}/libconv.so --backend libQnnHtp.so --binary_file c --optimization_level high",
            2,
            "unrecognized arguments",
        ),
        (
            "qnn-context-binary-generator",
            "--model {built}/{host}/libconv.so --backend libQnnHtp.so --binary_file c --config_file {tmp}/config",
            1,
            "schema validation failed: 'much' is not of type 'integer'",
        ),
        ("qnn-net-run", "--retrieve_context c.bin --debug", 1, "--debug is not allowed with --retrieve_context"),
        ("qnn-net-run", "--retrieve_context c.bin --model libc.so", 1, "Exactly one of"),
    ],
)
def test_the_stand_in_refuses_what_the_real_tools_refuse(
    sdk: Sdk, models: Path, built: Path, tmp_path: Path, tool: str, arguments: str, code: int, message: str
) -> None:
    (tmp_path / "list").write_text("x:=gone.raw\n")
    (tmp_path / "inner").write_text('{"graphs": [{"vtcm_mb": "much"}]}')
    library = sdk.library("libQnnHtpNetRunExtensions.so")
    named = {"shared_library_path": str(library), "config_file_path": str(tmp_path / "inner")}
    (tmp_path / "config").write_text(json.dumps({"backend_extensions": named}))
    filled = arguments.format(models=models, built=built, tmp=tmp_path, host=HOST).split()
    done = subprocess.run(
        [*sdk.command(tool), *filled],
        env=sdk.environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stderr


# --- doctor -----------------------------------------------------------------------------------------------------------


def findings(sdk: Sdk, seconds: float = 60) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_sdk(sdk, seconds)}


def test_doctor_checks_release_tools_and_libraries(sdk: Sdk, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    for name in ("QNN SDK", "SDK release", "SDK libraries", *TOOLS):
        assert checks[name]["ok"] is True, checks[name]
    assert STAND_IN in checks["QNN SDK"]["detail"]


def test_doctor_names_what_is_wrong_with_an_sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_simulator()
    root = install(tmp_path / "sdk", version="2.20.0")
    tools = root / "bin" / HOST
    (tools / "qnn-onnx-converter").chmod(0o644)
    (tools / "qnn-model-lib-generator").unlink()
    (tools / "qnn-context-binary-utility").write_text(f"#!{sys.executable}\nimport qti.aisw\n")
    shutil.copy(a_small_library(), tools / "qnn-net-run")
    (tools / "qnn-net-run").chmod(0o755)
    missing = needs_a_missing_library(tools / "qnn-net-run")
    needs_a_missing_library(root / "lib" / HOST / "libQnnSystem.so")
    monkeypatch.setenv("STAND_IN_FAULT", "qnn-context-binary-generator:hang-help")
    found = findings(find_sdk(root), seconds=3)
    wrong = {name: finding.detail for name, finding in found.items() if finding.ok is False}
    assert "is not executable: chmod +x" in wrong.pop("qnn-onnx-converter")
    assert f"has no bin/{HOST}/qnn-model-lib-generator: install the whole SDK" in wrong.pop("qnn-model-lib-generator")
    assert wrong.pop("qnn-context-binary-generator") == "didn't answer --help within 3 s"
    assert "No module named 'qti': it needs the Python that it was built for" in wrong.pop("qnn-context-binary-utility")
    assert f"needs {missing}, which this host doesn't have" in wrong.pop("qnn-net-run")
    assert wrong.pop("SDK libraries").startswith(f"libQnnSystem.so needs {missing}, which this host doesn't have")
    assert wrong == {}
    assert found["SDK release"].ok is None
    assert "2.20, but the installed onnxruntime-qnn has 2." in found["SDK release"].detail


def test_doctor_names_libraries_that_the_sdk_lacks(tmp_path: Path) -> None:
    needs_simulator()
    root = install(tmp_path / "sdk")
    (root / "lib" / HOST / "libQnnModelDlc.so").unlink()
    assert findings(find_sdk(root))["SDK libraries"].detail == (
        f"lib/{HOST} has no libQnnModelDlc.so: install the whole SDK"
    )


def test_doctor_says_that_the_folder_is_no_sdk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_simulator()
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    main(["doctor", "--json"])
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["QNN SDK"]["ok"] is False
    assert "set QNN_SDK_ROOT to the folder that has bin and lib" in checks["QNN SDK"]["detail"]


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({"sdk.yaml": "version: 2.37.0\nbuild_id: '250724'\n"}, "2.37.0.250724"),
        ({"sdk.yaml": "name: x\nversion: 2.37.0.250724\nbuild_id: 250724\n"}, "2.37.0.250724"),
        (
            {"include/QNN/QnnSdkBuildId.h": '#define QNN_SDK_BUILD_ID "v2.36.1.250708151608_123266"\n'},
            "2.36.1.250708151608_123266",
        ),
        ({"sdk.yaml": "name: x\n"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_the_release_is_read_from_whatever_tells_it(tmp_path: Path, files: dict[str, str], version: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_version(tmp_path) == version


def test_python_tools_run_with_the_python_that_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNN_SDK_PYTHON", "/opt/python3.10/bin/python3")
    tool = root / "bin" / HOST / "qnn-onnx-converter"
    assert find_sdk(root).command("qnn-onnx-converter") == ["/opt/python3.10/bin/python3", str(tool)]
    assert find_sdk(root, python="py").command("qnn-onnx-converter") == ["py", str(tool)]


# --- what the tools made, loaded and judged ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["libconv.so", "conv.SM8650.bin"])
def test_what_the_sdk_built_is_loaded_and_judged_against_its_model(
    sdk: Sdk, built: Path, htp: Backend, models: Path, which: str
) -> None:
    artifact = next(built.rglob(which))
    session = htp.load(models / "conv.onnx", artifact=artifact)
    assert assert_matches_reference(session.run(seeded_inputs(session))).ok
    assert session.provenance["artifact"]["kind"] == "foreign context binary"
    assert any("stand-in" in note for note in session.notes), session.notes


def test_a_model_library_that_the_sdk_refuses_says_why(sdk: Sdk, htp: Backend, models: Path, tmp_path: Path) -> None:
    library = tmp_path / "libother.so"
    library.write_bytes(b"\x7fELF and nothing else")
    with pytest.raises(
        CompileError, match=r"qnn-context-binary-generator.*libother\.so|libother\.so.*qnn-context-binary-generator"
    ):
        htp.load(models / "conv.onnx", artifact=library)
