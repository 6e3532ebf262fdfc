"""Which files of the QNN runtime go to a device: all of them, for its machine, of one release."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pytest_qnn.devices.facts import DeviceFacts
from pytest_qnn.devices.runtime_files import AARCH64, HEXAGON, RuntimeFiles, find_runtime, library_version
from pytest_qnn.devices.soc import SOCS
from pytest_qnn.errors import BackendUnavailableError

PHONE = DeviceFacts("phone", "adb://phone@h:1", "android", soc=SOCS["SM8650"], abi="arm64-v8a")
BOARD = DeviceFacts(
    "board", "adb://board@h:1", "linux", soc=SOCS["QCS6490"], abi="aarch64", release="Qualcomm Linux 1.4"
)
HTP = [
    "qnn-net-run",
    "libQnnHtp.so",
    "libQnnHtpPrepare.so",
    "libQnnSystem.so",
    "libQnnHtpV75Stub.so",
    "libQnnHtpV75Skel.so",
]
RELEASE = "v2.31.0.250130151446"


@pytest.fixture(autouse=True)
def no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QNN_SDK_ROOT", raising=False)


def elf(path: Path, machine: int = AARCH64, bits: int = 64, release: str = RELEASE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9) + struct.pack("<HH", 3, machine)
    path.write_bytes(head.ljust(64, b"\0") + f"QNN {release}\0".encode())
    return path


def sdk(root: Path, target: str = "aarch64-android", arch: int = 75, release: str = RELEASE) -> Path:
    """An SDK's layout, with files that have the right heads."""
    for name in ("Htp", "HtpPrepare", "System", f"HtpV{arch}Stub", "Cpu", "Gpu", "ModelDlc", "HtpNetRunExtensions"):
        elf(root / "lib" / target / f"libQnn{name}.so", release=release)
    elf(root / "bin" / target / "qnn-net-run", release=release)
    elf(root / "lib" / f"hexagon-v{arch}" / "unsigned" / f"libQnnHtpV{arch}Skel.so", HEXAGON, 32, release)
    (root / "sdk.yaml").write_text(f"version: {release[1:]}\n")
    return root


def flat(folder: Path, names: list[str] = HTP) -> Path:
    for name in names:
        elf(folder / name, HEXAGON if "Skel" in name else AARCH64, 32 if "Skel" in name else 64)
    return folder


def test_the_sdk_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNN_SDK_ROOT", str(sdk(tmp_path)))
    found = find_runtime(PHONE, "htp", None, tool=True)
    assert list(found.local) == HTP
    assert found.local["libQnnHtpV75Skel.so"] == tmp_path / "lib/hexagon-v75/unsigned/libQnnHtpV75Skel.so"
    assert found.local["qnn-net-run"] == tmp_path / "bin/aarch64-android/qnn-net-run"
    assert found.version == RELEASE[1:]
    assert "QNN_SDK_ROOT" in found.origin
    assert not found.stand_in


def test_a_named_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNN_SDK_ROOT", str(sdk(tmp_path / "sdk")))
    found = find_runtime(PHONE, "htp", flat(tmp_path / "flat"), tool=True)
    assert {path.parent for path in found.local.values()} == {tmp_path / "flat"}


@pytest.mark.parametrize(
    ("backend", "options", "names"),
    [
        ("cpu", {}, ["libQnnCpu.so", "libQnnSystem.so"]),
        ("gpu", {"tool": True}, ["qnn-net-run", "libQnnGpu.so", "libQnnSystem.so"]),
        ("cpu", {"dlc": True}, ["libQnnCpu.so", "libQnnSystem.so", "libQnnModelDlc.so"]),
        ("htp", {"extensions": True}, [*HTP[1:], "libQnnHtpNetRunExtensions.so"]),
    ],
)
def test_what_each_backend_needs(tmp_path: Path, backend: str, options: dict[str, bool], names: list[str]) -> None:
    found = find_runtime(PHONE, backend, sdk(tmp_path), **{"tool": False, **options})  # type: ignore[arg-type]
    assert list(found.local) == names


@pytest.mark.parametrize("name", HTP)
def test_a_missing_file_is_named_with_the_folders(tmp_path: Path, name: str) -> None:
    sdk(tmp_path)
    next(tmp_path.rglob(name)).unlink()
    with pytest.raises(BackendUnavailableError, match=f"{name} is missing .*searched: {tmp_path}.*device_runtime"):
        find_runtime(PHONE, "htp", tmp_path, tool=True)


def test_what_the_sdk_lacks_is_not_filled_up_from_the_device(tmp_path: Path) -> None:
    there = {f"/vendor/lib64/{name}": "" for name in HTP}
    facts = DeviceFacts("phone", "a", "android", soc=SOCS["SM8650"], runtime=there)
    (flat(tmp_path) / "libQnnSystem.so").unlink()
    with pytest.raises(BackendUnavailableError, match="libQnnSystem.so is missing"):
        find_runtime(facts, "htp", tmp_path, tool=True)


@pytest.mark.parametrize(
    ("name", "machine", "bits", "says"),
    [
        ("libQnnHtp.so", 62, 64, "for x86-64, but AArch64"),
        ("libQnnHtp.so", 40, 32, "for 32-bit ARM"),
        ("libQnnHtpV75Skel.so", AARCH64, 64, "for AArch64, but Hexagon"),
        ("qnn-net-run", 62, 64, "for x86-64"),
    ],
)
def test_files_for_another_machine_are_refused(tmp_path: Path, name: str, machine: int, bits: int, says: str) -> None:
    sdk(tmp_path)
    elf(next(tmp_path.rglob(name)), machine, bits)
    with pytest.raises(BackendUnavailableError, match=says):
        find_runtime(PHONE, "htp", tmp_path, tool=True)


@pytest.mark.parametrize("content", [b"", b"\x7fEL", b"#!/bin/sh\n", b"\x7fELF"])
def test_files_that_are_no_libraries_are_refused(tmp_path: Path, content: bytes) -> None:
    (flat(tmp_path) / "libQnnHtp.so").write_bytes(content)
    with pytest.raises(BackendUnavailableError, match=r"libQnnHtp\.so is (no ELF file|for machine 0)"):
        find_runtime(PHONE, "htp", tmp_path, tool=True)


def test_mixed_releases_are_refused(tmp_path: Path) -> None:
    elf(flat(tmp_path) / "libQnnHtpV75Stub.so", release="v2.30.0.250109150000")
    with pytest.raises(BackendUnavailableError, match="mixes releases .*libQnnHtpV75Stub.so 2.30.0.250109150000"):
        find_runtime(PHONE, "htp", tmp_path, tool=True)


def test_a_release_is_read_anew_when_the_file_changes(tmp_path: Path) -> None:
    file = elf(tmp_path / "libQnnHtp.so")
    assert library_version(file) == RELEASE[1:]
    elf(file, release="v2.40.1.251119000000")
    os.utime(file, (1, 1))
    assert library_version(file) == "2.40.1.251119000000"
    file.write_bytes(b"")
    assert library_version(file) == ""


def test_a_boards_libraries_are_those_of_its_system(tmp_path: Path) -> None:
    for target in ("aarch64-oe-linux-gcc9.3", "aarch64-oe-linux-gcc11.2", "aarch64-ubuntu-gcc9.4", "aarch64-android"):
        sdk(tmp_path, target, arch=68)
    ubuntu = DeviceFacts("board", "a", "linux", soc=SOCS["QCS6490"], release="Ubuntu 24.04.3 LTS")
    assert (
        find_runtime(BOARD, "htp", tmp_path, tool=True).local["libQnnHtp.so"].parent.name == "aarch64-oe-linux-gcc11.2"
    )
    assert find_runtime(ubuntu, "htp", tmp_path, tool=True).local["libQnnHtp.so"].parent.name == "aarch64-ubuntu-gcc9.4"


def test_an_sdk_without_the_boards_system_is_said(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=r"no folder for aarch64-oe-linux-gcc\* or aarch64-ubuntu-gcc\*"):
        find_runtime(BOARD, "cpu", sdk(tmp_path), tool=True)


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="is no folder"):
        find_runtime(PHONE, "htp", tmp_path / "nowhere", tool=True)


def test_an_unknown_soc_has_no_htp_but_a_cpu(tmp_path: Path) -> None:
    facts = DeviceFacts("phone", "a", "android", soc_text="not among the known ones: ro.soc.model SM8735")
    with pytest.raises(BackendUnavailableError, match="SM8735"):
        find_runtime(facts, "htp", sdk(tmp_path), tool=True)
    assert find_runtime(facts, "cpu", tmp_path, tool=True).local


# --- stand-ins --------------------------------------------------------------------------------------------------------


def stand_in(folder: Path) -> Path:
    for name in HTP:
        (folder / name).write_bytes(b"#!/bin/sh\n# QNN SDK STAND-IN\n")
    return folder


def test_stand_ins_go_to_stand_ins_only(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="only stands in"):
        find_runtime(PHONE, "htp", stand_in(tmp_path), tool=True)
    loopback = DeviceFacts("lo", "a", "android", soc=SOCS["SM8650"], stand_in="loopback device lo")
    assert find_runtime(loopback, "htp", tmp_path, tool=True).stand_in
    with pytest.raises(BackendUnavailableError, match="which is loopback device lo"):
        find_runtime(loopback, "htp", flat(tmp_path / "real"), tool=True)


# --- on the device ----------------------------------------------------------------------------------------------------


def on_device(release: str = "2.31.0.250130151446", **changed: str) -> DeviceFacts:
    runtime = {f"/vendor/lib64/{name}": "" for name in HTP} | {"/vendor/lib64/libQnnHtp.so": release}
    runtime |= {f"/vendor/lib64/{name}.so": value for name, value in changed.items()}
    return DeviceFacts("phone", "a", "android", soc=SOCS["SM8650"], runtime=runtime)


def test_what_is_on_the_device_is_used_where_it_is() -> None:
    found = find_runtime(on_device(), "htp", None, tool=True)
    assert found.local == {}
    assert found.on_device["qnn-net-run"] == "/vendor/lib64/qnn-net-run"
    assert found.version == "2.31.0.250130151446"


def test_a_device_that_mixes_releases_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="mixes releases"):
        find_runtime(on_device(libQnnHtpPrepare="2.20.0.240101000000"), "htp", None, tool=True)


def test_a_device_without_a_runtime_says_how_to_get_one() -> None:
    with pytest.raises(BackendUnavailableError, match=r"qnn-net-run, libQnnHtp.so.* are missing .*QNN_SDK_ROOT"):
        find_runtime(PHONE, "htp", None, tool=True)


def test_it_can_be_kept_with_a_recording(tmp_path: Path) -> None:
    found = find_runtime(PHONE, "htp", flat(tmp_path / "flat"), tool=True)
    found.to_folder(tmp_path / "kept")
    again = RuntimeFiles.from_folder(tmp_path / "kept")
    assert {name: path.read_bytes() for name, path in again.local.items()} == {
        name: path.read_bytes() for name, path in found.local.items()
    }
    assert again.version == found.version
