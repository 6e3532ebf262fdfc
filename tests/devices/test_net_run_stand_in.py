"""The stand-in of qnn-net-run refuses what the real one refuses, and says in every file and log that it is a stand-in."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pytest_qnn.backend import Backend
from pytest_qnn.testing.device_runtime import TARGETS, make_device_runtime, set_net_run_fault
from pytest_qnn.testing.profiling_log import inference_rows, to_csv, to_log
from pytest_qnn.testing.sdk_stand_in import MARK, dlc
from tests.contexts import foreign_models

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_device_runtime(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(scope="module")
def two(htp: Backend, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A binary with inputs a and b, and output y = a - b, float32[1, 16] each."""
    folder = tmp_path_factory.mktemp("two")
    htp.compile(foreign_models.two_inputs(folder / "two.onnx"), folder)
    return next(folder.glob("*.bin"))


@pytest.fixture
def run(runtime: Path, tmp_path: Path) -> Run:
    """Run the program here as on a device: ``run(*arguments, **environment)`` in a folder with files a.raw and b.raw."""
    np.arange(16, dtype=np.float32).tofile(tmp_path / "a.raw")
    np.ones(16, np.float32).tofile(tmp_path / "b.raw")
    (tmp_path / "list.txt").write_text("b:=b.raw a:=a.raw\n")

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        libraries = str(runtime / "lib" / "aarch64-android")
        skeletons = str(runtime / "lib" / "hexagon-v75" / "unsigned")
        env = {**os.environ, "LD_LIBRARY_PATH": libraries, "ADSP_LIBRARY_PATH": f"/nowhere;{skeletons}", **environment}
        program = runtime / "bin" / "aarch64-android" / "qnn-net-run"
        return subprocess.run(
            [program, *map(str, arguments)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )

    return run


def test_every_file_of_the_runtime_names_itself(runtime: Path) -> None:
    files = [path for path in runtime.rglob("*") if path.is_file()]
    assert len(files) > 2 * len(TARGETS)
    assert all(MARK.encode() in path.read_bytes()[:100] for path in files)


def test_it_writes_to_output_as_float_by_default_and_says_what_it_is(run: Run, two: Path, tmp_path: Path) -> None:
    done = run("--backend", "libQnnHtp.so", "--retrieve_context", two, "--input_list", "list.txt")
    assert done.returncode == 0, done.stderr
    assert "Finished Executing Graphs" in done.stdout
    assert f"{MARK}: libQnnHtp.so is Qualcomm's HTP simulator on this host, as a SM8650 (v75)" in done.stdout
    got = np.fromfile(tmp_path / "output" / "Result_0" / "y.raw", np.float32)
    assert np.allclose(got, np.arange(16) - 1, atol=0.01)
    assert sorted(p.name for p in (tmp_path / "output").iterdir()) == ["Result_0", "execution_metadata.yaml"]


def test_a_native_file_taken_for_a_float_is_silently_wrong(
    run: Run, htp: Backend, models: Path, tmp_path: Path
) -> None:
    names = {"x": "x", "y": "y"}
    integers = foreign_models.with_integer_edges(models / "conv.qdq.onnx", tmp_path / "int.onnx", names)
    htp.compile(integers, tmp_path / "out")
    binary = next((tmp_path / "out").glob("*.bin"))
    np.full(768, 7, np.uint8).tofile(tmp_path / "u8.raw")
    np.full(768, 7, np.float32).tofile(tmp_path / "f32.raw")
    common = ("--backend", "libQnnHtp.so", "--retrieve_context", binary, "--input_list", "in.txt")
    for file, flags, fits in (
        ("u8.raw", ("--use_native_input_files",), True),
        ("u8.raw", ("--input_data_type", "native"), True),
        ("u8.raw", (), False),
        ("f32.raw", (), True),
        ("f32.raw", ("--use_native_input_files",), False),
    ):
        (tmp_path / "in.txt").write_text(f"{file}\n")
        done = run(*common, *flags, "--output_data_type", "float_and_native", "--output_dir", f"o/{file}{len(flags)}")
        assert (done.returncode == 0) == fits, done.stderr
        assert fits or "Invalid input file size" in done.stderr
    written = tmp_path / "o" / "u8.raw1" / "Result_0"
    assert {p.name: p.stat().st_size for p in written.iterdir()} == {"y.raw": 4 * 2048, "y_native.raw": 2048}


def test_inferences_repeat_and_only_the_first_results_are_kept(run: Run, two: Path, tmp_path: Path) -> None:
    done = run(
        *(
            "--backend",
            "libQnnHtp.so",
            "--retrieve_context",
            two,
            "--input_list",
            "list.txt",
            "--profiling_level",
            "basic",
        ),
        *("--num_inferences", 5, "--keep_num_outputs", 2, "--perf_profile", "burst", "--output_dir", "o"),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "o").glob("Result_*")) == ["Result_0", "Result_1"]
    csv = to_csv((tmp_path / "o" / "qnn-profiling-data_0.log").read_bytes())
    assert csv.count(",US,NETRUN,ROOT,Graph 0: ") == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "x.so", "--retrieve_context", "x.bin"), "Exactly one of --model and --retrieve_context"),
        ((), "Exactly one of --model and --retrieve_context"),
        (("--retrieve_context", "{two}", "--debug"), "--debug is not allowed with --retrieve_context"),
        (("--retrieve_context", "{two}"), "Missing option: --backend"),
        (("--retrieve_context", "{two}", "--backend", "libQnnHtp.so"), "Missing option: --input_list"),
        (("--retrieve_context", "{two}", "--turbo"), "unrecognized arguments: --turbo"),
        (("{all}", "--backend", "libQnnDsp.so"), "Unable to load backend. dlerror(): dlopen failed: library \"libQnnDsp.so\""),
        (("{all}", "--backend", "libQnnSystem.so"), "no QNN interface"),
        (("{all}", "--backend", "libQnnGpu.so"), "gpu doesn't support serialized contexts"),
        (("--backend", "libQnnHtp.so", "--retrieve_context", "a.raw", "--input_list", "list.txt"), "Could not create context from binary"),
        (("{all}", "--native_input_tensor_names", "g:a"), "no graph 'g'"),
        (("{all}", "--input_list", "missing.txt"), "Input list missing.txt"),
        (("{all}", "--input_list", "wrong.txt"), "no file for input tensor 'b'"),
        (("{all}", "--input_list", "short.txt"), "a line has 1 files, the model has 2 inputs"),
        (("{all}", "--input_list", "gone.txt"), "Could not open file: gone.raw"),
        (("{all}", "--config_file", "list.txt"), "can't be parsed"),
        (("{all}", "--config_file", "bad.json"), "backend config file schema validation failed"),
    ],
)  # fmt: skip
def test_it_refuses(run: Run, two: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "wrong.txt").write_text("a:=a.raw c:=b.raw\n")
    (tmp_path / "short.txt").write_text("a.raw\n")
    (tmp_path / "gone.txt").write_text("a.raw gone.raw\n")
    (tmp_path / "inner.json").write_text('{"graphs": [{"graph_names": 5, "vtcm_mb": "x"}]}')
    extension = '{"shared_library_path": "libQnnHtpNetRunExtensions.so", "config_file_path": "inner.json"}'
    (tmp_path / "bad.json").write_text(f'{{"backend_extensions": {extension}}}')
    usual = ("--backend", "libQnnHtp.so", "--retrieve_context", str(two), "--input_list", "list.txt")
    words = [w for a in arguments for w in (usual if a == "{all}" else [a.replace("{two}", str(two))])]
    done = run(*words)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Finished" not in done.stdout


def test_the_linker_splits_by_colons_and_the_dsp_by_semicolons(run: Run, runtime: Path, two: Path) -> None:
    usual = ("--backend", "libQnnHtp.so", "--retrieve_context", str(two), "--input_list", "list.txt")
    skeletons = str(runtime / "lib" / "hexagon-v75" / "unsigned")
    assert "qnn_open failed, 0x80000406" in run(*usual, ADSP_LIBRARY_PATH=f"/nowhere:{skeletons}").stderr
    assert "Unable to load backend" in run(*usual, LD_LIBRARY_PATH="/nowhere").stderr


def test_a_gpu_runs_a_dlc_in_float32_on_this_hosts_processor_and_says_so(
    run: Run, models: Path, tmp_path: Path
) -> None:
    (tmp_path / "conv.dlc").write_bytes(dlc((models / "conv.onnx").read_bytes(), "conv"))
    np.zeros(768, np.float32).tofile(tmp_path / "x.raw")
    (tmp_path / "x.txt").write_text("x.raw\n")
    done = run(
        *(
            "--backend",
            "libQnnGpu.so",
            "--model",
            "libQnnModelDlc.so",
            "--dlc_path",
            "conv.dlc",
            "--input_list",
            "x.txt",
        )
    )
    assert done.returncode == 0, done.stderr
    assert "onnxruntime's CPU provider in float32, not an Adreno GPU" in done.stdout


def test_a_fault_that_isnt_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no fault 'sleepy'"):
        set_net_run_fault(tmp_path, "sleepy")


def test_the_viewer_reads_only_logs_of_the_stand_in() -> None:
    rows = inference_rows(7, "g", 1500, [("conv, 1:OpId_3", 42)])
    assert to_csv(to_log(rows)).splitlines() == [
        "Msg Timestamp,Message,Time,Unit of Measurement,Timing Source,Event Level,Event Identifier",
        "7,EXECUTE,1500,US,NETRUN,ROOT,Graph 0: g",
        "7,EXECUTE,1500,US,BACKEND,ROOT,QNN (execute) time",
        '7,EXECUTE,42,CYCLES,BACKEND,SUB-EVENT,"conv, 1:OpId_3 (cycles)"',
    ]
    with pytest.raises(ValueError, match="not a profiling log"):
        to_csv(b"QNN\0profile")
