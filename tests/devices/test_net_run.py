"""Models run by qnn-net-run on a device: a stand-in of it, on a loopback device, behind a real ADB server, computes real HTP
results; what comes back is what the simulator itself computes, bit for bit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pytest_qnn import ArtifactError, CompileError, OptionError
from pytest_qnn.adb.server import AdbServer
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.artifacts.binary import read_context_binary
from pytest_qnn.artifacts.matching import Match, match_tensors
from pytest_qnn.artifacts.wrapper import _own_tensors
from pytest_qnn.backend import Backend
from pytest_qnn.devices.attached import AttachedDevice
from pytest_qnn.devices.facts import probe
from pytest_qnn.devices.lease import DeviceLease
from pytest_qnn.devices.runtime_files import find_runtime
from pytest_qnn.errors import (
    BackendUnavailableError,
    DeviceLostError,
    DeviceSpaceError,
    DeviceTimeoutError,
    ExecutionError,
    InputError,
    RuntimeCrashError,
    TargetError,
    TargetTimeoutError,
)
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.runners.net_run import model as net_run_model
from pytest_qnn.runners.net_run.command import Executable, runtime_for
from pytest_qnn.runners.net_run.invocation import check_outputs, invocation
from pytest_qnn.runners.net_run.log import Surroundings
from pytest_qnn.runners.net_run.model import NetRunModel
from pytest_qnn.runners.process import Limits
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.targets.target import Plan
from pytest_qnn.testing import LoopbackDevice
from pytest_qnn.testing.device_runtime import make_device_runtime, set_net_run_fault
from pytest_qnn.testing.sdk_stand_in import dlc, model_library
from tests import sdk_stand_in, small_models
from tests.contexts import foreign_models

LIMITS = Limits(load_seconds=60, run_seconds=30, memory_mib=4096)


@dataclass(frozen=True)
class Phone:
    """A loopback phone in use, and a stand-in SDK with what runs on it."""

    loopback: LoopbackDevice
    device: AttachedDevice
    sdk: Path

    def load(
        self,
        file: Path,
        match: Match,
        *,
        backend: str = "htp",
        io: str = "native",
        limits: Limits = LIMITS,
        runtime: Path | None = None,
        **options: str,
    ) -> NetRunModel:
        """What qnn-net-run runs, whatever kind of file it is."""
        facts = self.device.facts
        plan = Plan(backend, "adb", "", (), soc=facts.soc, runner="net_run", options=tuple(options.items()))
        executable = Executable.of(file)
        files = runtime_for(facts, plan, executable, match.graph.name, runtime or self.sdk)
        return NetRunModel(self.device, executable, match, files, plan, f"{file.name} on a phone", limits, io)

    def left(self) -> set[str]:
        """Files and folders of runs in the workspace."""
        return {path.name for path in self.loopback.path(self.device.workspace.path).glob("run-*")}


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in SDK: tools for this host, and for devices."""
    return make_device_runtime(sdk_stand_in.install(tmp_path_factory.mktemp("sdk") / "qairt"))


@pytest.fixture(scope="module")
def attached_phone(tmp_path_factory: pytest.TempPathFactory, adb_server: AdbServer, sdk: Path) -> Iterator[Phone]:
    with LoopbackDevice(tmp_path_factory.mktemp("phone") / "device", soc="SM8650") as loopback:
        loopback.connect(adb_server)
        transport = AdbTransport(adb_server, loopback.address)
        facts = probe(transport)
        lease = DeviceLease(facts.serial, facts.address)
        device = AttachedDevice(transport, facts, lease, limit_mib=512, wait_seconds=5, recover_seconds=20)
        yield Phone(loopback, device, sdk)
        device.close()
        loopback.disconnect(adb_server)


@pytest.fixture
def phone(attached_phone: Phone) -> Iterator[Phone]:
    """A phone; at the end nothing of any run is left on it."""
    yield attached_phone
    set_net_run_fault(attached_phone.loopback.root)
    assert not attached_phone.left()


@pytest.fixture(scope="module")
def compiled(htp: Backend, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(htp, tmp_path_factory.mktemp("compiled"))


class Compiled:
    """Context binaries for the phone's SoC, made once of each model."""

    def __init__(self, htp: Backend, folder: Path) -> None:
        self.htp, self.folder = htp, folder
        self.made: dict[Path, Path] = {}

    def binary(self, model: Path) -> Path:
        """A bare context binary."""
        if model not in self.made:
            output = self.folder / str(len(self.made))
            self.htp.compile(model, output)
            self.made[model] = next(output.glob("*.bin"))
        return self.made[model]

    def matched(self, binary: Path, model: Path, **how: Mapping[str, str]) -> Match:
        """Its tensors as the model's."""
        return match_tensors(read_context_binary(binary), read_model(model), **how)  # type: ignore[arg-type]

    def simulated(self, model: Path, samples: list[dict[str, Array]]) -> list[Mapping[str, Array]]:
        """What the simulator computes on this host."""
        session = self.htp.load(model)
        return [session.run(sample).outputs for sample in samples]


@pytest.fixture(scope="module")
def conv(models: Path) -> Path:
    return models / "conv.qdq.onnx"


def same(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> bool:
    """Whether outputs are the same, bit for bit."""
    assert got.keys() == wanted.keys()
    return all(got[n].dtype == a.dtype and np.array_equal(got[n], a) for n, a in wanted.items())


# --- results ------------------------------------------------------------------------------------------------------------


def test_many_inputs_go_in_one_run_and_results_are_the_simulators(
    phone: Phone, compiled: Compiled, conv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = compiled.binary(conv)
    model = phone.load(binary, compiled.matched(binary, conv), htp_performance_mode="burst")
    samples = seeded_inputs(conv, 12)
    phone.loopback.requests()
    done = model.run_many(samples)
    asked = [r for r in phone.loopback.requests() if "qnn-net-run" in r]
    assert len(asked) == 1
    assert all(same(d.outputs, w) for d, w in zip(done, compiled.simulated(conv, samples), strict=True))
    assert not np.array_equal(done[0].outputs["y"], done[1].outputs["y"])
    assert all(math.isnan(d.seconds) and d.round_trip_seconds and d.round_trip_seconds > 0 for d in done)
    assert any("STAND-IN" in note and "simulator" in note for note in model.notes)
    assert model.loads == 1
    again = phone.load(binary, compiled.matched(binary, conv))  # nothing is sent again
    sent = phone.device.store.sent_bytes
    assert same(again.run_many(samples[:1])[0].outputs, done[0].outputs)
    assert phone.device.store.sent_bytes == sent


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """Models of many types and layouts."""
    folder = tmp_path_factory.mktemp("kinds")
    from onnxruntime.quantization import QuantType

    small_models.quantized(models / "conv.onnx", folder / "conv16.onnx", activation_type=QuantType.QUInt16)
    names = {"x": "image", "y": "_1_features_out"}
    foreign_models.with_integer_edges(models / "conv.qdq.onnx", folder / "nhwc.onnx", names)
    foreign_models.with_integer_edges(folder / "conv16.onnx", folder / "nhwc16.onnx", names)
    foreign_models.two_inputs(folder / "two.onnx")
    lookup = onnx.load(str(foreign_models.lookup(folder / "lookup.onnx")))
    lookup.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32  # as a converter leaves it
    onnx.save(lookup, str(folder / "lookup32.onnx"))
    shutil.copy(models / "conv.onnx", folder / "float.onnx")
    half = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    types = {"x": TensorProto.FLOAT16, "y": TensorProto.FLOAT16}
    small_models.save(folder / "half.onnx", half, {"x": [1, 16]}, {"y": [1, 16]}, types=types)
    return folder


@pytest.mark.parametrize(
    ("made_from", "model", "io"),
    [
        ("conv16.onnx", "conv16.onnx", "native"),
        ("nhwc.onnx", "conv.qdq.onnx", "native"),  # channels last, other names, integers outside
        pytest.param("nhwc16.onnx", "conv16.onnx", "native", marks=pytest.mark.slow),
        ("nhwc.onnx", "nhwc.onnx", "native"),  # uint8 in and out
        ("two.onnx", "two.onnx", "native"),
        pytest.param("lookup.onnx", "lookup.onnx", "native", marks=pytest.mark.slow),  # int64
        ("lookup32.onnx", "lookup.onnx", "native"),  # int64 in the model, int32 in the binary
        ("lookup32.onnx", "lookup.onnx", "float"),
        ("half.onnx", "half.onnx", "native"),
        pytest.param("half.onnx", "half.onnx", "float", marks=pytest.mark.slow),
        ("float.onnx", "float.onnx", "float"),
    ],
)
def test_types_and_layouts_become_the_binarys_and_back(
    phone: Phone, compiled: Compiled, kinds: Path, models: Path, made_from: str, model: str, io: str
) -> None:
    here = {p.name: p for folder in (models, kinds) for p in folder.glob("*.onnx")}
    binary = compiled.binary(here[made_from])
    samples = seeded_inputs(here[model], 2, seed=3)
    loaded = phone.load(binary, compiled.matched(binary, here[model]), io=io)
    wanted = compiled.simulated(here[model], samples)
    assert all(same(d.outputs, w) for d, w in zip(loaded.run_many(samples), wanted, strict=True))
    assert all(np.unique(a).size > 1 for w in wanted for a in w.values())


def test_float_files_differ_from_native_ones_by_a_step_at_most(phone: Phone, compiled: Compiled, conv: Path) -> None:
    binary = compiled.binary(conv)
    match = compiled.matched(binary, conv)
    samples = seeded_inputs(conv, 2)
    native, floats = (phone.load(binary, match, io=io).run_many(samples) for io in ("native", "float"))
    encoding = match.outputs[0].tensor.encoding
    assert encoding is not None
    for a, b in zip(native, floats, strict=True):
        assert np.abs(a.outputs["y"] - b.outputs["y"]).max() <= 8 * encoding.step  # a step at the input becomes a few
        assert np.corrcoef(a.outputs["y"].ravel(), b.outputs["y"].ravel())[0, 1] > 0.999


def test_a_model_library_and_a_dlc_are_prepared_on_the_device(
    phone: Phone, compiled: Compiled, conv: Path, tmp_path: Path
) -> None:
    bound = compiled.matched(compiled.binary(conv), conv)
    inputs, outputs = (
        tuple(replace(edge, tensor=replace(edge.tensor, name=edge.spec.name)) for edge in edges)  # as converters do it
        for edges in (bound.inputs, bound.outputs)
    )
    graph = replace(
        bound.graph, name="conv", inputs=tuple(e.tensor for e in inputs), outputs=tuple(e.tensor for e in outputs)
    )
    match = replace(bound, graph=graph, inputs=inputs, outputs=outputs)
    samples = seeded_inputs(conv, 1)
    wanted = compiled.simulated(conv, samples)
    library, container = tmp_path / "libconv.so", tmp_path / "conv.dlc"
    library.write_bytes(model_library(conv.read_bytes(), "conv", "aarch64-android", "test"))
    container.write_bytes(dlc(conv.read_bytes(), "conv"))
    for file in (library, container):
        loaded = phone.load(file, match, vtcm_mb="4")
        assert same(loaded.run_many(samples)[0].outputs, wanted[0])
    library.write_bytes(model_library(conv.read_bytes(), "conv", "x86_64-linux-clang", "test"))
    with pytest.raises(TargetError, match="built for another kind of device.*aarch64-android"):
        phone.load(library, match).run_many(samples)


def test_gpu_on_a_loopback_device_names_itself(phone: Phone, models: Path, tmp_path: Path) -> None:
    import onnxruntime as ort

    from pytest_qnn.artifacts.binary import GraphInfo, TensorInfo
    from pytest_qnn.artifacts.matching import Edge

    file, onnx_file = tmp_path / "conv.dlc", models / "conv.onnx"
    file.write_bytes(dlc(onnx_file.read_bytes(), "conv"))
    model = read_model(onnx_file)

    def edges(specs: object) -> tuple[Edge, ...]:
        return tuple(Edge(s, TensorInfo(s.name, "FLOAT_32", "float32", s.shape)) for s in specs)  # type: ignore[attr-defined]

    inputs, outputs = edges(model.inputs), edges(model.outputs)
    graph = GraphInfo("conv", tuple(e.tensor for e in inputs), tuple(e.tensor for e in outputs))
    loaded = phone.load(file, Match(graph, inputs, outputs), backend="gpu", precision_mode="fp32")
    (sample,) = seeded_inputs(onnx_file, 1)
    got = loaded.run_many([sample])[0].outputs["y"]
    assert np.array_equal(got, ort.InferenceSession(str(onnx_file)).run(None, sample)[0])
    assert any("not an Adreno GPU" in note for note in loaded.notes)
    with pytest.raises(ArtifactError, match="context binaries are for htp, not for gpu"):
        phone.load(Path("x.bin"), Match(graph, inputs, outputs), backend="gpu")


def test_inputs_that_dont_fit_the_device_together_go_one_after_the_other(
    phone: Phone, compiled: Compiled, conv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = compiled.binary(conv)
    model = phone.load(binary, compiled.matched(binary, conv))
    samples = seeded_inputs(conv, 3)
    each = sum(raw.size for raw in (*model._inputs, *model._outputs))
    monkeypatch.setattr(net_run_model, "CHUNK_BYTES", 2 * each)
    phone.loopback.requests()
    done = model.run_many(samples)
    assert sum("qnn-net-run" in r for r in phone.loopback.requests()) == 2
    assert all(same(d.outputs, w) for d, w in zip(done, compiled.simulated(conv, samples), strict=True))
    monkeypatch.setattr(net_run_model, "ASK_BYTES", 1)
    monkeypatch.setattr(net_run_model, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(DeviceSpaceError, match=r"no space left.*inputs and outputs of one inference take"):
        model.run_many(samples)


def test_after_a_recovery_everything_is_provided_again(phone: Phone, compiled: Compiled, conv: Path) -> None:
    binary = compiled.binary(conv)
    model = phone.load(binary, compiled.matched(binary, conv))
    samples = seeded_inputs(conv, 1)
    old = phone.device.workspace.path
    phone.device._recover(20)
    shutil.rmtree(phone.loopback.path(phone.device.facts.folder))  # it even lost its files
    assert same(model.run_many(samples)[0].outputs, compiled.simulated(conv, samples)[0])
    assert model.loads == 2
    assert phone.device.workspace.path != old


def test_a_board_with_another_system_and_chip(
    make_device: Callable[..., LoopbackDevice],
    open_transport: Callable[[LoopbackDevice], AdbTransport],
    compiled: Compiled,
    conv: Path,
    tmp_path: Path,
) -> None:
    runtime = make_device_runtime(tmp_path / "runtime", soc="QCS6490")
    board = make_device("linux", soc="QCS6490")
    transport = open_transport(board)
    facts = probe(transport)
    device = AttachedDevice(
        transport, facts, DeviceLease(facts.serial, facts.address), limit_mib=64, wait_seconds=5, recover_seconds=5
    )
    wrapper = compiled.htp.compile(conv, tmp_path / "out", soc="QCS6490")
    binary = next(Path(wrapper).parent.glob("*.bin"))
    model = Phone(board, device, runtime).load(binary, compiled.matched(binary, conv), htp_performance_mode="burst")
    samples = seeded_inputs(conv, 1)
    wanted = compiled.htp.load(conv, artifact=wrapper, soc="QCS6490").run(samples[0]).outputs
    assert same(model.run_many(samples)[0].outputs, wanted)
    assert any("as a QCS6490 (v68)" in note for note in model.notes)
    device.close()


# --- names --------------------------------------------------------------------------------------------------------------

HOSTILE = st.text(st.sampled_from(list("aZ0_.-'\"`$();&|<>*?[]{}!#%\\~=:,é☃ \t\n/")), min_size=1, max_size=24).filter(
    lambda text: text not in (".", "..")
)


@pytest.mark.parametrize(
    ("first", "second", "out"),
    [
        ("a'$(touch pwned)'", "b", "-rf"),
        ("$(reboot)", "`id`", 'y"; rm -rf *; "'),
        ("a", "..", "..y 'x' $(id)é☃"),
    ],
)
def test_hostile_names_of_tensors_neither_execute_nor_escape(
    phone: Phone, compiled: Compiled, tmp_path: Path, first: str, second: str, out: str
) -> None:
    model = foreign_models.two_inputs(tmp_path / "two.onnx", first, second, out)
    binary = compiled.binary(model)
    hostile = tmp_path / "$(touch pwned) ';id;' two.bin"
    shutil.copy(binary, hostile)
    samples = seeded_inputs(model, 2)
    match = _own_tensors(read_context_binary(hostile), read_context_binary(hostile).graph())
    if " " in first:
        with pytest.raises(ArtifactError, match="can't be named in qnn-net-run's input list"):
            phone.load(hostile, match)
        return
    done = phone.load(hostile, match).run_many(samples)
    for sample, inference in zip(samples, done, strict=True):
        (got,) = inference.outputs.values()
        assert np.allclose(got, sample[first] - sample[second], atol=0.01)
    assert not list(phone.loopback.root.rglob("pwned"))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(HOSTILE.filter(lambda n: "/" not in n), min_size=1, max_size=4, unique=True), word=HOSTILE)
def test_whatever_a_run_writes_is_listed_fetched_and_kept_apart_by_its_own_name(
    phone: Phone, tmp_path: Path, names: list[str], word: str
) -> None:
    program = f"{phone.device.workspace.path}/writes-files"
    script = b'#!/bin/sh\nmkdir -p output/Result_0\nfor n in "$@"; do printf %s "$n" > "output/Result_0/$n.raw"; done\n'
    phone.device.transport.push({program: script + b"echo Finished Executing Graphs\n"}, mode=0o755, timeout=20)
    near = Surroundings("model", word, word.replace("\n", ""), word.replace("\n", ""))
    wanted = {f"output/Result_0/{name}.raw": len(name.encode()) for name in names}
    with invocation(phone.device.transport, phone.device.workspace.path, near) as run:
        run.send({"input_list.txt": b""})
        finished = run.run(program, names, 20)
        check_outputs(finished.files, list(wanted), [], "model")
        fetched = run.fetch(wanted, tmp_path)
    assert {name: path.read_text() for name, path in fetched.items()} == {
        f"output/Result_0/{name}.raw": name for name in names
    }
    assert {path.parent for path in fetched.values()} == {tmp_path}
    assert set(phone.loopback.path(phone.device.workspace.path).parent.parent.iterdir()) == {
        phone.loopback.path(phone.device.facts.folder) / part for part in ("store", "work")
    }


# --- faults ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(phone: Phone, compiled: Compiled, conv: Path) -> NetRunModel:
    """A model that is on the phone already."""
    return phone.load(compiled.binary(conv), compiled.matched(compiled.binary(conv), conv))


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("silent", ExecutionError, "ended as if all were well, but never said 'Finished Executing Graphs'"),
        ("no-success", ExecutionError, "never said 'Finished Executing Graphs'"),
        ("bad-code", ExecutionError, "(?s)failed with code 3.*Failed to free the context"),
        ("missing-output", ExecutionError, "did not write 1 of 2 output files: 'output/Result_1/"),
        ("short-output", TargetError, "of another size|bytes"),
        ("long-output", TargetError, "of another size|bytes"),
        ("extra-output", ExecutionError, "files that nobody asked for .*another.raw"),
        ("stale-output", ExecutionError, "files that nobody asked for .*Result_5"),
        ("crash", RuntimeCrashError, "died of SIGSEGV.*(?s:.*)Executing Graphs"),
        ("killed", RuntimeCrashError, "died of SIGKILL .*low-memory killer"),
    ],
)
def test_nothing_but_a_whole_and_exact_result_passes(
    phone: Phone, small: NetRunModel, conv: Path, fault: str, error: type[Exception], message: str
) -> None:
    set_net_run_fault(phone.loopback.root, fault)
    with pytest.raises(error, match=message):
        small.run_many(seeded_inputs(conv, 2))


def test_a_run_that_hangs_is_killed_with_its_log_kept(phone: Phone, compiled: Compiled, conv: Path) -> None:
    binary = compiled.binary(conv)
    model = phone.load(
        binary, compiled.matched(binary, conv), limits=replace(LIMITS, load_seconds=1.5, run_seconds=0.1)
    )
    set_net_run_fault(phone.loopback.root, "hang")
    with pytest.raises(TargetTimeoutError, match=r"did not end within 1.6 s(?s:.*)Executing Graphs"):
        model.run_many(seeded_inputs(conv, 1))
    done = phone.device.transport.shell(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\000' ' '"])
    assert "net_run_stand_in" not in done.text


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (
            ("QnnDsp <E> DspTransport.openSession qnn_open failed, 0x80000406, prio 100", "Device Creation failure"),
            BackendUnavailableError,
            r"find or load its skeleton.*libQnnHtpV75Skel.so along ADSP_LIBRARY_PATH=.*/data/local/tmp/.*;.*/vendor/dsp/cdsp",
        ),
        (("Error in composing graphs",), CompileError, "could not prepare"),
        (("write: No space left on device",), DeviceSpaceError, "no space left on the device"),
        (("something new",), ExecutionError, r"failed with code 9 on .*bin(?s:.*)something new"),
    ],
)
def test_known_failures_are_explained(
    phone: Phone, small: NetRunModel, conv: Path, lines: tuple[str, ...], error: type[Exception], message: str
) -> None:
    set_net_run_fault(phone.loopback.root, say=tuple(f"[ ERROR ] {line}" for line in lines), code=9)
    with pytest.raises(error, match=message) as caught:
        small.run_many(seeded_inputs(conv, 1))
    assert lines[-1] in str(caught.value)  # the log's own words are there


def test_libraries_of_another_release_or_for_another_chip_are_named(
    phone: Phone, compiled: Compiled, conv: Path, tmp_path: Path
) -> None:
    binary = compiled.binary(conv)
    match, facts = compiled.matched(binary, conv), phone.device.facts
    files = find_runtime(facts, "htp", phone.sdk, tool=True)
    other = make_device_runtime(tmp_path / "other", version="2.30.0.250101000000")
    plan = Plan("htp", "adb", "", (), soc=facts.soc, runner="net_run")
    skeleton = "libQnnHtpV75Skel.so"
    local = dict(files.local) | {skeleton: other / "lib" / "hexagon-v75" / "unsigned" / skeleton}
    for changed, message in (
        (local, "refused its skeleton .0x80000600|refused its skeleton"),
        ({n: p for n, p in local.items() if n != skeleton}, "did not find or load its skeleton"),
        ({n: p for n, p in local.items() if "Stub" not in n}, "libQnnHtpV75Stub.so along LD_LIBRARY_PATH"),
        ({n: p for n, p in local.items() if n != "libQnnHtp.so"}, "libQnnHtp.so is missing on the device"),
    ):
        model = NetRunModel(
            phone.device, Executable.of(binary), match, replace(files, local=changed), plan, "conv", LIMITS
        )
        with pytest.raises(BackendUnavailableError, match=message):
            model.run_many(seeded_inputs(conv, 1))


def test_a_binary_for_another_chip_is_refused_by_the_device(
    phone: Phone, compiled: Compiled, conv: Path, tmp_path: Path
) -> None:
    compiled.htp.compile(conv, tmp_path / "out", soc="SM8550")
    binary = next((tmp_path / "out").glob("*.bin"))
    with pytest.raises(ArtifactError, match="did not take conv.qdq.SM8550.bin.*another SoC"):
        phone.load(binary, compiled.matched(binary, conv)).run_many(seeded_inputs(conv, 1))


def test_what_cant_be_asked_of_it_is_refused_before_anything_runs(
    phone: Phone, compiled: Compiled, conv: Path, kinds: Path, tmp_path: Path
) -> None:
    binary = compiled.binary(conv)
    match = compiled.matched(binary, conv)
    with pytest.raises(OptionError, match="'native' or 'float', got 'fast'"):
        phone.load(binary, match, io="fast")
    with pytest.raises(OptionError, match="htp_performance_mode_post_run: .*withdraws its vote by itself"):
        phone.load(binary, match, htp_performance_mode_post_run="default")
    with pytest.raises(ArtifactError, match="takes a context binary"):
        phone.load(conv, match)
    with pytest.raises(ArtifactError, match="missing.bin: can't be read"):
        phone.load(tmp_path / "missing.bin", match)
    lookup = compiled.binary(kinds / "lookup32.onnx")
    model = phone.load(lookup, compiled.matched(lookup, kinds / "lookup.onnx"))
    with pytest.raises(InputError, match=r"input 'ids' has 4294967296, which INT_32 of the binary can't hold"):
        model.run_many([{"ids": np.array([[0, 1, 1 << 32, 2]])}])


def test_a_file_that_changed_since_it_was_read_is_refused(
    phone: Phone, compiled: Compiled, conv: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(compiled.binary(conv), tmp_path / "a.bin"))
    match = compiled.matched(file, conv)
    facts = phone.device.facts
    plan = Plan("htp", "adb", "", (), soc=facts.soc, runner="net_run")
    executable = Executable.of(file, read_context_binary(file).sha256)
    files = runtime_for(facts, plan, executable, match.graph.name, phone.sdk)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="a.bin changed on disk since it was read"):
        NetRunModel(phone.device, executable, match, files, plan, "conv", LIMITS)


# --- times and events -----------------------------------------------------------------------------------------------------


def test_times_come_from_the_device_and_the_process_is_measured(
    phone: Phone, small: NetRunModel, conv: Path, sdk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QNN_SDK_ROOT", str(sdk))
    (sample,) = seeded_inputs(conv, 1)
    first = small.time(sample, 5, 10.0)
    assert len(first.times_ms) == 5
    assert all(t > 0 for t in first.times_ms)
    assert first.peak_memory_mib > 20  # Python, numpy and the simulator
    assert first.cpu_share is not None
    assert 0 < first.cpu_share < 4
    later = small.time(sample, 10_000, 0.02)
    assert len(later.times_ms) < 10_000  # the time that was given decides


def test_the_profile_has_the_cycles_of_each_node(
    phone: Phone, small: NetRunModel, conv: Path, sdk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QNN_SDK_ROOT", str(sdk))
    profile = small.profile(seeded_inputs(conv, 1)[0])
    assert next(e.identifier for e in profile.events if e.level == "ROOT").startswith("Graph 0: ")
    assert any("conv" in node for node in profile.nodes)
    set_net_run_fault(phone.loopback.root, "no-profile")
    with pytest.raises(ExecutionError, match="no profiling log"):
        small.profile(seeded_inputs(conv, 1)[0])


def test_without_the_sdks_viewer_there_are_no_times(
    small: NetRunModel, conv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    with pytest.raises(BackendUnavailableError, match="only qnn-profile-viewer of the QNN SDK reads.*QNN_SDK_ROOT"):
        small.time(seeded_inputs(conv, 1)[0], 5, 1.0)


def test_a_lost_device_is_not_asked_to_tidy_up() -> None:
    """That would take another deadline; an error of the program leaves a device that answers."""
    asked: list[list[str]] = []

    class Line:
        def fresh_name(self) -> str:
            return "x"

        def shell(self, words: list[str], timeout: float) -> None:
            asked.append(words)

    def fail(error: Exception) -> None:
        with invocation(Line(), "/w", Surroundings("net", "net.bin", "", "")):  # type: ignore[arg-type]
            raise error

    for error in (DeviceTimeoutError("mute"), DeviceLostError("gone")):
        with pytest.raises(type(error)):
            fail(error)
    assert asked == []
    with pytest.raises(ExecutionError):
        fail(ExecutionError("failed"))
    assert asked == [["rm", "-rf", "/w/run-x"]]
