"""What a context binary tells of itself, and what becomes of files that aren't one."""

from __future__ import annotations

import os
import random
import shutil
import struct
import sys
from pathlib import Path

import psutil
import pytest

from pytest_qnn import ArtifactError, BackendUnavailableError
from pytest_qnn.artifacts.binary import (
    check_runs_on,
    find_system_library,
    read_context_binary,
    runtime_release,
)
from pytest_qnn.devices.soc import SOCS
from pytest_qnn.model.onnx_file import read_model
from tests.contexts.conftest import Load, MakeBinary


@pytest.mark.parametrize("soc", SOCS)
def test_a_binary_names_the_soc_and_the_architecture_that_it_was_made_for(
    soc: str, make_binary: MakeBinary, models: Path
) -> None:
    info = read_context_binary(make_binary(models / "conv.qdq.onnx", soc))
    assert (info.soc, info.htp_arch) == (SOCS[soc], SOCS[soc].htp_arch)
    assert info.release == runtime_release() is not None
    assert check_runs_on(info, SOCS[soc]) == ()
    for other in SOCS.values():
        if other.name != soc:
            with pytest.raises(ArtifactError, match=rf"made for {soc} \(v\d+\), but {other.name} \(v\d+\)"):
                check_runs_on(info, other)


def test_the_tensors_of_an_8_bit_binary_have_the_models_shapes_and_encodings(conv_binary: Path, models: Path) -> None:
    info, model = read_context_binary(conv_binary), read_model(models / "conv.qdq.onnx")
    (graph,) = info.graphs
    for (tensor,), (spec,) in ((graph.inputs, model.inputs), (graph.outputs, model.outputs)):
        assert (tensor.shape, tensor.dtype, tensor.data_type) == (spec.shape, "uint8", "UFIXED_POINT_8")
        assert tensor.encoding == spec.encoding  # zero points, not QNN's negative offsets
    assert graph.inputs[0].encoding is not None
    assert graph.inputs[0].encoding.zero_point[0] > 0
    assert graph.inputs[0].size == 3 * 16 * 16
    assert info.size == conv_binary.stat().st_size > info.blob_bytes > 0
    assert dict(graph.memory)["vtcm_bytes"] >= 1 << 20


def test_16_bit_float_and_64_bit_tensors_are_told_apart(make_binary: MakeBinary, models: Path, kinds: Path) -> None:
    wide = read_context_binary(make_binary(kinds / "conv16.qdq.onnx")).graph().inputs[0]
    assert (wide.dtype, wide.encoding) == ("uint16", read_model(kinds / "conv16.qdq.onnx").inputs[0].encoding)
    plain = read_context_binary(make_binary(models / "conv.onnx")).graph().inputs[0]
    assert (plain.describe(), plain.encoding) == ("x: FLOAT_32[1, 3, 16, 16]", None)
    assert read_context_binary(make_binary(kinds / "lookup.onnx")).graph().inputs[0].dtype == "int64"


def test_all_graphs_of_a_binary_are_listed_and_one_must_be_named(
    load: Load, models: Path, kinds: Path, tmp_path: Path
) -> None:
    info = read_context_binary(shared_binary(load, models, kinds, tmp_path))
    assert [g.inputs[0].dtype for g in info.graphs] == ["uint8", "uint16"]
    with pytest.raises(ArtifactError, match=r"2 graphs \('.*', '.*'\): name one with graph="):
        info.graph()
    assert info.graph(info.graphs[1].name) is info.graphs[1]
    with pytest.raises(ArtifactError, match="no graph 'nope'"):
        info.graph("nope")
    assert check_runs_on(info, SOCS["SM8650"]) == ()
    with pytest.raises(ArtifactError, match="graphs share weights, and the simulator can't load such binaries"):
        check_runs_on(info, SOCS["SM8650"], simulated=True)


def shared_binary(load: Load, models: Path, kinds: Path, folder: Path) -> Path:
    """One binary with the graphs of two models."""
    for number, model in enumerate((models / "conv.qdq.onnx", kinds / "conv16.qdq.onnx")):
        load(
            model,
            ep__context_enable="1",
            ep__context_embed_mode="0",
            ep__context_file_path=str(folder / f"m{number}.onnx"),
            ep__share_ep_contexts="1",
            **({"ep__stop_share_ep_contexts": "1"} if number else {}),
        ).close()
    return next(folder.glob("*.bin"))


# --- not a binary -------------------------------------------------------------------------------------------------------


def test_files_that_are_no_context_binary_are_refused_by_what_they_are(
    tmp_path: Path, conv_binary: Path, models: Path
) -> None:
    content = conv_binary.read_bytes()
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "text.bin").write_text("hello\n" * 100)
    (tmp_path / "half.bin").write_bytes(content[: len(content) // 2])
    (tmp_path / "short.bin").write_bytes(content[:-1])
    (tmp_path / "net.dlc").write_bytes(b"PK\x03\x04rest")
    shutil.copy(models / "conv.onnx", tmp_path / "model.bin")
    os.mkfifo(tmp_path / "pipe.bin")
    for file, text in (
        ("missing.bin", "can't be read: No such file"),
        (".", "this is a folder"),
        ("pipe.bin", "not a regular file"),
        ("empty.bin", r"empty \(0 bytes\)"),
        ("text.bin", r"not a QNN context binary, or truncated or damaged \(600 bytes"),
        ("half.bin", "not a QNN context binary, or truncated"),
        ("short.bin", "not a QNN context binary, or truncated"),
        ("model.bin", "not a QNN context binary"),
        ("net.dlc", "perhaps a DLC.*qnn-context-binary-generator"),
    ):
        with pytest.raises(ArtifactError, match=text) as caught:
            read_context_binary(tmp_path / file)
        assert str(tmp_path / file) in str(caught.value)
    with pytest.raises(ArtifactError, match=r"an ONNX file, not a context binary; name the \.bin"):
        read_context_binary(models / "conv.onnx")
    with pytest.raises(ArtifactError, match="a shared library.*qnn-context-binary-generator"):
        read_context_binary(find_system_library())


def test_more_content_than_the_file_has_is_refused(tmp_path: Path, conv_binary: Path) -> None:
    size = read_context_binary(conv_binary).blob_bytes
    content = conv_binary.read_bytes()
    head = content[:4096].replace(struct.pack("<Q", size), struct.pack("<Q", size * 8))
    assert head != content[:4096]
    (tmp_path / "x.bin").write_bytes(head + content[4096:])
    assert "truncated or damaged" in why_refused(tmp_path / "x.bin")


def why_refused(file: Path) -> str:
    try:
        read_context_binary(file)
    except ArtifactError as error:
        return str(error)
    return ""


def test_20_damaged_binaries_neither_hang_nor_crash_the_caller(tmp_path: Path, conv_binary: Path) -> None:
    content, refused = conv_binary.read_bytes(), 0
    for seed in range(20):
        rng = random.Random(seed)
        damaged = bytearray(content)
        for _ in range(3):
            damaged[rng.randrange(1024)] ^= rng.randrange(1, 256)  # the head, which is all that is read
        file = tmp_path / f"{seed}.bin"
        file.write_bytes(damaged)
        if why := why_refused(file):
            assert str(file) in why
            refused += 1
    assert refused >= 10  # some hit only padding


@pytest.mark.parametrize(
    ("does", "timeout", "text"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", 60, "died of SIGSEGV"),
        ("signal.pause()", 0.5, "did not come to an end with it within 0.5 s"),
        ("os._exit(3)", 60, r"ended with code 3 \(no message\)"),
    ],
)
def test_a_crash_or_a_hang_of_the_reading_process_names_the_file(
    does: str, timeout: float, text: str, tmp_path: Path, conv_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import os, signal\n{does}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ArtifactError, match=rf"{conv_binary}: .*{text}"):
        read_context_binary(conv_binary, timeout)
    left = [p.cmdline() for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    assert not [c for c in left if "pytest_qnn.runners.context_info" in c]


# --- the library --------------------------------------------------------------------------------------------------------


def test_without_the_wheel_the_error_says_how_to_get_it_and_an_sdk_will_do(
    tmp_path: Path, conv_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = find_system_library()
    monkeypatch.setitem(sys.modules, "onnxruntime_qnn", None)  # as if it weren't installed
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'pytest-qnn\[sim\]'.*QNN_SDK_ROOT"):
        read_context_binary(conv_binary)
    folder = tmp_path / "lib" / "x86_64-linux-clang"
    folder.parent.mkdir()
    folder.symlink_to(library.parent)
    monkeypatch.setenv("QNN_SDK_ROOT", str(tmp_path))
    assert read_context_binary(conv_binary).soc == SOCS["SM8650"]
    folder.unlink()
    folder.mkdir()
    (folder / library.name).write_text("not a library")
    with pytest.raises(BackendUnavailableError, match="doesn't work here"):
        read_context_binary(conv_binary)


def test_a_binary_of_a_newer_release_or_of_another_backend_is_refused(conv_binary: Path) -> None:
    from dataclasses import replace

    info = read_context_binary(conv_binary)
    with pytest.raises(ArtifactError, match=r"made by QNN v99\.1\.0, newer than the runtime here \(\d+\.\d+\)"):
        check_runs_on(replace(info, build_id="v99.1.0"), SOCS["SM8650"])
    with pytest.raises(ArtifactError, match=r"another QNN backend \(number 4\)"):
        check_runs_on(replace(info, backend_id=4), SOCS["SM8650"])
    untold = replace(info, soc_id=None, htp_arch=None)  # what releases before QAIRT 2.2x wrote
    assert check_runs_on(untold, SOCS["SM8550"]) == (
        f"{conv_binary.name} doesn't tell which SoC it was made for: taken as one for SM8550",
    )
    with pytest.raises(ArtifactError, match=r"an unnamed SoC \(v75\), but SM8550 \(v73\)"):
        check_runs_on(replace(info, soc_id=None), SOCS["SM8550"])
