"""Tests that run on attached devices: through pytest, a real ADB server and loopback devices that compute real HTP results."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from pytest_qnn import assert_fully_offloaded, assert_matches_reference
from pytest_qnn.adb.server import AdbServer
from pytest_qnn.backend import Backend
from pytest_qnn.bench import Bench, CurrentTest
from pytest_qnn.devices.lease import DeviceLease
from pytest_qnn.errors import BackendUnavailableError, DeviceBusyError, DeviceLostError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.records.bundle import bundle_schema
from pytest_qnn.session import Session
from pytest_qnn.settings import Settings
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.testing.device_runtime import make_device_runtime
from pytest_qnn.testing.sdk_stand_in import dlc, model_library
from tests import sdk_stand_in

ACCURACY = """
@pytest.mark.backend("htp")
def test_accuracy(qnn_backend, qnn_inputs):
    session = qnn_backend.load("conv.qdq.onnx", float_model="conv.onnx")
    assert_matches_reference(session.run(qnn_inputs(session)))
    assert_fully_offloaded(session)
"""


@pytest.fixture(autouse=True)
def own_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of the tests' own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="session")
def device_runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in of the files that qnn-net-run needs on a phone."""
    return make_device_runtime(tmp_path_factory.mktemp("runtime"))


@pytest.fixture
def open_bench(
    adb_server: AdbServer, device_runtime: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Bench]]:
    """A bench with attached devices: ``open_bench(device, ...settings)``."""
    benches: list[Bench] = []
    cache = tmp_path_factory.getbasetemp() / "device-cache"

    def make(*devices: LoopbackDevice, **settings: object) -> Bench:
        serials = tuple(f"adb://{device.address}@{adb_server.address}" for device in devices)
        given = {
            "device_runtime": device_runtime,
            "device": serials,
            "adb_server": adb_server.address,
            "recover_timeout": 20.0,
            **settings,
        }
        bench = Bench(Settings(target="adb", cache_dir=cache, **given))  # type: ignore[arg-type]
        benches.append(bench)
        bench.enter(CurrentTest("test_it.py::test_it"))
        return bench

    yield make
    for bench in benches:
        bench.close()


def work_folders(device: LoopbackDevice) -> list[Path]:
    """Workspaces that are on the device."""
    roots = [device.path(folder) for folder in ("/data/local/tmp", "/var/tmp", "/tmp")]
    return [folder for root in roots for folder in root.glob("pytest-qnn/work/*")]


@pytest.mark.parametrize("flavor", ["linux", "android"])
def test_a_marked_test_runs_on_the_device_and_its_record_says_what_that_is(
    flavor: str,
    make_device: Callable[..., LoopbackDevice],
    adb_server: AdbServer,
    device_runtime: Path,
    project: Callable[..., pytest.RunResult],
    pytester: pytest.Pytester,
) -> None:
    device = make_device(flavor)
    arguments = (
        "--qnn-target=adb",
        f"--qnn-adb-server={adb_server.address}",
        f"--qnn-device={device.address}",
        f"--qnn-device-runtime={device_runtime}",
        "--qnn-json=report.json",
    )
    result = project(ACCURACY, *arguments)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"* {device.address} is a stand-in for a device: loopback device*"])
    record = json.loads((pytester.path / "report.json").read_text())["records"][0]
    provenance = record["provenance"]
    assert provenance["runner"] == {"linux": "ort", "android": "net_run"}[flavor]
    assert (provenance["target"], provenance["soc"], provenance["simulated"]) == ("adb", "SM8650", True)
    assert provenance["versions"]["device_qnn"].startswith("2.")
    assert ("device_onnxruntime" in provenance["versions"]) == (flavor == "linux")
    assert provenance["device"]["serial"] == device.address
    assert "loopback device" in provenance["device"]["stand_in"]
    assert "stand-in" in record["subject"]
    assert f"--qnn-device={device.address}" in record["repeat"]
    assert not work_folders(device)


@pytest.mark.parametrize("flavor", ["linux", "android"])
def test_the_bundle_of_a_failing_case_runs_again_on_its_device(
    flavor: str,
    make_device: Callable[..., LoopbackDevice],
    adb_server: AdbServer,
    device_runtime: Path,
    project: Callable[..., pytest.RunResult],
    pytester: pytest.Pytester,
) -> None:
    device = make_device(flavor)
    test = ACCURACY.replace("qnn_inputs(session))", "qnn_inputs(session)), Tolerance(sqnr_db=90)")
    given = ["--qnn-target=adb", f"--qnn-adb-server={adb_server.address}", f"--qnn-device={device.address}"]
    if flavor == "android":
        given.append(f"--qnn-device-runtime={device_runtime}")
    result = project(test, *given, "--qnn-artifacts=kept", "--qnn-json=report.json")
    result.assert_outcomes(failed=1)
    (record,) = (r for r in json.loads((pytester.path / "report.json").read_text())["records"] if r["bundle"])
    bundle = Path(record["bundle"])
    described = json.loads((bundle / "bundle.json").read_text())
    jsonschema.validate(described, bundle_schema())
    command = described["commands"]["bundle"]
    assert command in result.stdout.str()
    assert f"--device {device.address} --adb-server {adb_server.address}" in command

    again = subprocess.run([*shlex.split(command), "--json"], capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stderr) == (0, "")
    told = json.loads(again.stdout)
    assert (told["outcome"], told["changed"], told["outputs_that_differ"]) == ("reproduced", [], [])
    assert not work_folders(device)

    here = pytester.run(sys.executable, "-m", "pytest_qnn.cli", "bundle", "run", bundle)
    assert here.ret == 0
    here.stdout.fnmatch_lines(["changed: target: adb -> simulator"])

    device.close()
    lost = pytester.run(*shlex.split(command))
    assert lost.ret == 2
    lost.stderr.fnmatch_lines([f"pytest-qnn: nothing was judged: *{device.address}*"])


# --- what somebody else made, and what only the SDK makes -------------------------------------------------------------

FOREIGN = """
from pytest_qnn.artifacts import ForeignArtifact

LAYOUTS = {"x": "same", "y": "same"}

@pytest.mark.backend("%(backend)s")
@pytest.mark.parametrize("file", %(files)r)
def test_foreign(qnn_backend, qnn_inputs, file):
    artifact = file if file.endswith(".bin") else ForeignArtifact(file, layouts=LAYOUTS)
    session = qnn_backend.load("conv.qdq.onnx", float_model="conv.onnx", artifact=artifact)
    assert_matches_reference(session.run(qnn_inputs(session, 2)))
"""


@pytest.fixture
def on_phone(
    android: LoopbackDevice, adb_server: AdbServer, project: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> Callable[..., tuple[pytest.RunResult, list[dict[str, Any]]]]:
    """Run pytest with tests on a phone: what it printed, and the records."""

    def run(test: str, *arguments: object) -> tuple[pytest.RunResult, list[dict[str, Any]]]:
        device = f"adb://{android.address}@{adb_server.address}"
        given = ["--qnn-target=adb", f"--qnn-device={device}", "--qnn-json=report.json", *map(str, arguments)]
        result = project(test, *given)
        return result, json.loads((pytester.path / "report.json").read_text())["records"]

    return run


def test_a_binary_a_library_and_a_dlc_of_somebody_else_run_on_a_phone(
    on_phone: Callable[..., tuple[pytest.RunResult, list[dict[str, Any]]]],
    device_runtime: Path,
    htp: Backend,
    models: Path,
    pytester: pytest.Pytester,
) -> None:
    conv = models / "conv.qdq.onnx"
    htp.compile(conv, pytester.path / "made")
    next((pytester.path / "made").glob("*.bin")).rename(pytester.path / "conv.bin")
    (pytester.path / "libconv.so").write_bytes(model_library(conv.read_bytes(), "conv", "aarch64-android", "test"))
    (pytester.path / "conv.dlc").write_bytes(dlc(conv.read_bytes(), "conv"))
    test = FOREIGN % {"backend": "htp", "files": ["conv.bin", "libconv.so", "conv.dlc"]}
    result, records = on_phone(test, f"--qnn-device-runtime={device_runtime}")
    result.assert_outcomes(passed=3)
    kinds = [record["provenance"]["artifact"]["kind"] for record in records]
    assert kinds == ["foreign context binary", "foreign model library", "foreign DLC"]
    assert {record["verdict"] for record in records} == {"pass"}


@pytest.mark.parametrize(
    ("options", "assumed"),
    [
        ("", "float32 is assumed, since precision_mode isn't given"),
        (", precision_mode='fp16'", "float16 is assumed, since precision_mode is fp16"),
    ],
)
def test_gpu_on_a_loopback_phone_is_called_a_stand_in_everywhere(
    options: str,
    assumed: str,
    on_phone: Callable[..., tuple[pytest.RunResult, list[dict[str, Any]]]],
    device_runtime: Path,
    models: Path,
    pytester: pytest.Pytester,
) -> None:
    (pytester.path / "conv.dlc").write_bytes(dlc((models / "conv.onnx").read_bytes(), "conv"))
    test = (FOREIGN % {"backend": "gpu", "files": ["conv.dlc"]}).replace('("gpu")', f'("gpu"{options})')
    result, (record,) = on_phone(test, f"--qnn-device-runtime={device_runtime}", "--junitxml=junit.xml")
    result.assert_outcomes(passed=1)
    text = result.stdout.str()
    assert "gpu*" in text
    assert "stand-in" in record["subject"]
    assert record["provenance"]["simulated"]
    assert "not an Adreno GPU" in json.dumps(record)
    assert assumed in text
    assert record["provenance"]["computed_in"] == assumed.split()[0]
    assert 'name="qnn.stand_in" value="loopback device' in (pytester.path / "junit.xml").read_text()


@pytest.mark.slow
def test_gpu_on_a_phone_takes_a_library_that_the_sdk_builds(
    on_phone: Callable[..., tuple[pytest.RunResult, list[dict[str, Any]]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sdk = make_device_runtime(sdk_stand_in.install(tmp_path / "qairt"))
    ndk_build = tmp_path / "ndk" / "ndk-build"
    ndk_build.parent.mkdir()
    ndk_build.write_text("#!/bin/sh\n")
    ndk_build.chmod(0o755)
    monkeypatch.setenv("QNN_SDK_ROOT", str(sdk))
    monkeypatch.setenv("ANDROID_NDK_ROOT", str(ndk_build.parent))
    test = textwrap.dedent("""
        @pytest.mark.backend("gpu")
        def test_gpu(qnn_backend, qnn_inputs):
            session = qnn_backend.load("conv.onnx")
            assert_matches_reference(session.run(qnn_inputs(session, 2)))
    """)
    result, (record,) = on_phone(test)
    result.assert_outcomes(passed=1)
    assert record["provenance"]["artifact"]["kind"] == "model library"
    assert "not measured" not in result.stdout.str()
    assert "stand-in" in record["subject"]


def test_a_device_that_is_named_but_not_there_is_an_error(
    adb_server: AdbServer, project: Callable[..., pytest.RunResult]
) -> None:
    result = project(ACCURACY, "--qnn-target=adb", f"--qnn-adb-server={adb_server.address}", "--qnn-device=1234abcd")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*1234abcd*"])


def test_no_adb_server_is_an_error_that_says_where_none_is(project: Callable[..., pytest.RunResult]) -> None:
    result = project(ACCURACY, "--qnn-target=adb", "--qnn-adb-server=127.0.0.1:9")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*127.0.0.1:9*"])


def load(bench: Bench, models: Path) -> tuple[Backend, object]:
    backend = bench.backend(BackendRequest("htp"))
    return backend, backend.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")


@pytest.mark.parametrize("flavor", ["linux", "android"])
def test_outputs_are_the_simulators_own_bit_for_bit(
    flavor: str,
    make_device: Callable[..., LoopbackDevice],
    open_bench: Callable[..., Bench],
    models: Path,
    htp: Backend,
) -> None:
    bench = open_bench(make_device(flavor))
    session = bench.backend(BackendRequest("htp")).load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    here = htp.load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    samples = seeded_inputs(here, 3)
    there, ours = session.run(samples), here.run(samples)
    for a, b in zip(there.results, ours.results, strict=True):
        np.testing.assert_array_equal(a["y"], b["y"])
    assert_matches_reference(there)
    assert_fully_offloaded(session)
    assert [*map(str, session.placement.misplaced)] == [*map(str, here.placement.misplaced)]


@pytest.mark.parametrize("flavor", ["linux", "android"])
def test_a_second_session_sends_no_artifact(
    flavor: str, make_device: Callable[..., LoopbackDevice], open_bench: Callable[..., Bench], models: Path
) -> None:
    device = make_device(flavor)
    for sends in (True, False):
        bench = open_bench(device)
        session = bench.backend(BackendRequest("htp")).load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
        session.run(seeded_inputs(session, 1))
        store = bench.target.attached(device.address).store  # type: ignore[attr-defined]
        assert bool(store.sent_files) is sends
        assert store.reused_files or sends
        bench.close()
    assert not work_folders(device)


@pytest.mark.parametrize("flavor", ["linux", "android"])
def test_a_device_that_reboots_is_got_back_once_and_that_is_recorded(
    flavor: str, make_device: Callable[..., LoopbackDevice], open_bench: Callable[..., Bench], models: Path
) -> None:
    device = make_device(flavor)
    bench = open_bench(device)
    session = bench.backend(BackendRequest("htp")).load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    samples = seeded_inputs(session, 2)
    before = session.run(samples)
    device.reboot(down=0.5)
    after = session.run(samples)
    np.testing.assert_array_equal(before.results[0]["y"], after.results[0]["y"])
    assert len(bench.test.retries) == 1
    assert "running conv.qdq.onnx" in bench.test.retries[0]
    device.reboot(down=0.5)
    with pytest.raises(DeviceLostError):  # once for a test
        session.run(samples)


@pytest.mark.parametrize("fault", ["shell_drop", "shell_close"])
def test_a_device_that_is_lost_while_it_is_looked_at_first_is_got_back_too(
    fault: str, make_device: Callable[..., LoopbackDevice], open_bench: Callable[..., Bench]
) -> None:
    device = make_device("linux")
    bench = open_bench(device)
    device.faults(**{fault: 20}, times=1)
    assert bench.backend(BackendRequest("htp")).soc == "SM8650"
    assert len(bench.test.retries) == 1
    assert device.address in bench.test.retries[0]


def test_a_device_that_stays_away_ends_in_an_error_by_the_deadline(
    make_device: Callable[..., LoopbackDevice], open_bench: Callable[..., Bench], models: Path
) -> None:
    device = make_device("linux")
    bench = open_bench(device, recover_timeout=2.0)
    session = bench.backend(BackendRequest("htp")).load(models / "conv.qdq.onnx", float_model=models / "conv.onnx")
    samples = seeded_inputs(session, 1)
    device.close()
    with pytest.raises(DeviceLostError, match=r"did not come back within 2 s"):
        session.run(samples)


def test_a_device_that_another_process_uses_is_waited_for_by_a_deadline(
    make_device: Callable[..., LoopbackDevice],
    open_bench: Callable[..., Bench],
    adb_server: AdbServer,
) -> None:
    device = make_device("linux")
    with DeviceLease(device.address, f"adb://{device.address}@{adb_server.address}", "another run") as lease:
        lease.acquire(0)
        with pytest.raises(DeviceBusyError, match="another run"):
            open_bench(device, device_wait=0.2).backend(BackendRequest("htp"))
    open_bench(device).backend(BackendRequest("htp"))


def test_between_tests_others_may_use_the_device(
    make_device: Callable[..., LoopbackDevice], open_bench: Callable[..., Bench], adb_server: AdbServer
) -> None:
    device = make_device("linux")
    bench = open_bench(device)
    bench.backend(BackendRequest("htp"))
    other = DeviceLease(device.address, f"adb://{device.address}@{adb_server.address}")
    with pytest.raises(DeviceBusyError):
        other.acquire(0)
    bench.enter(CurrentTest())
    other.acquire(0)
    other.release()


def test_the_device_with_the_wanted_soc_is_taken(
    make_device: Callable[..., LoopbackDevice], open_bench: Callable[..., Bench]
) -> None:
    first, second = make_device("linux", soc="SM8650"), make_device("linux", soc="SM8550")
    bench = open_bench(first, second)
    assert bench.backend(BackendRequest("htp", soc="SM8550")).soc == "SM8550"
    assert bench.backend(BackendRequest("htp", serial=first.address)).soc == "SM8650"
    with pytest.raises(BackendUnavailableError, match="SM8750"):
        bench.backend(BackendRequest("htp", soc="SM8750"))


def test_a_phone_without_a_runtime_says_which_files_it_needs(
    make_device: Callable[..., LoopbackDevice], open_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    with pytest.raises(BackendUnavailableError, match="qnn-net-run"):
        open_bench(make_device("android"), device_runtime=None).backend(BackendRequest("htp"))


def test_a_virtual_environment_on_a_board_can_be_named(
    make_device: Callable[..., LoopbackDevice], open_bench: Callable[..., Bench], models: Path
) -> None:
    device = make_device("linux")
    systems, venvs = device.path("/bin/python3"), device.path("/home/root/venv/bin/python")
    venvs.parent.mkdir(parents=True)
    venvs.write_text(systems.read_text())
    venvs.chmod(0o755)
    systems.unlink()

    def load(**settings: object) -> Session:
        bench = open_bench(device, **settings)
        return bench.backend(BackendRequest("htp")).load(models / "conv.qdq.onnx")

    session = load(device_python="/home/root/venv/bin/python")
    assert session.provenance["runner"] == "ort"
    before = session.run(seeded_inputs(session, 1)).results[0]["y"]
    device.reboot(down=0.3)
    np.testing.assert_array_equal(session.run(seeded_inputs(session, 1)).results[0]["y"], before)
    session.bench.close()  # and lets go of the device
    without = load()
    assert without.provenance["runner"] == "net_run"
    without.bench.close()
    for wrong in ("/home/root/none/bin/python", "/bin/true"):
        bench = open_bench(device, device_python=wrong, device_wait=5.0)
        with pytest.raises(
            BackendUnavailableError, match=rf"{wrong} \(device_python\) is no program there, or is no Python"
        ):
            bench.backend(BackendRequest("htp"))
        bench.close()
