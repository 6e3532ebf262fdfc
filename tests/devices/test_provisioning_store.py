"""Files kept on a device: sent once, whole or not at all, bounded, and never taken away from who uses them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_qnn.devices.store import MIB, DeviceStore
from pytest_qnn.devices.transport import Transport
from pytest_qnn.devices.workspace import Workspace, sweep
from pytest_qnn.errors import DeviceError, DeviceFileError, DeviceLostError, DeviceSpaceError
from pytest_qnn.testing import LoopbackDevice
from tests.devices.as_before import as_before, folder_on, on_host

Open = Callable[[LoopbackDevice], Transport]


@pytest.fixture(params=["android", "linux"])
def device(request: pytest.FixtureRequest, kept_device: Callable[[str], LoopbackDevice]) -> Iterator[LoopbackDevice]:
    """A device of each flavour, the same for all tests here."""
    with as_before(kept_device(request.param)) as device:
        yield device


@pytest.fixture
def transport(device: LoopbackDevice, open_transport: Open) -> Transport:
    return open_transport(device)


@pytest.fixture
def folder(device: LoopbackDevice, transport: Transport) -> str:
    return folder_on(device, transport)


def write(path: Path, size: int, seed: int = 0, mode: int = 0o644) -> Path:
    """A file whose content depends on ``seed``."""
    path.write_bytes(hashlib.sha256(str(seed).encode()).digest() * (size // 32 + 1))
    os.truncate(path, size)
    path.chmod(mode)
    return path


def grow_old(device: LoopbackDevice, path: str, seconds: float = 1000) -> None:
    """Make a file look as if it had not been used for some time."""
    then = time.time() - seconds
    os.utime(on_host(device, path), (then, then))


def test_files_arrive_with_content_and_mode(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    library = write(tmp_path / "lib.so", 100_000)
    program = write(tmp_path / "qnn-net-run", 50, 1, 0o755)
    downloaded = write(tmp_path / "program", 60, 2, 0o600)
    store = DeviceStore(transport, folder, 100)
    paths = store.put({"library": library, "program": program, "downloaded": downloaded}, executable=["downloaded"])
    assert {label: on_host(device, path).read_bytes() for label, path in paths.items()} == {
        "library": library.read_bytes(),
        "program": program.read_bytes(),
        "downloaded": downloaded.read_bytes(),
    }
    modes = {label: on_host(device, path).stat().st_mode & 0o777 for label, path in paths.items()}
    assert modes == {"library": 0o644, "program": 0o755, "downloaded": 0o755}
    assert (store.sent_files, store.sent_bytes, store.reused_files) == (3, 100_110, 0)
    assert os.path.basename(paths["library"]) == hashlib.sha256(library.read_bytes()).hexdigest()


def test_a_second_session_sends_nothing(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path, open_transport: Open
) -> None:
    files = {"a": write(tmp_path / "a", 3 * MIB, 1), "b": write(tmp_path / "b", 10, 2, 0o755), "c": tmp_path / "a"}
    first = DeviceStore(transport, folder, 100).put(files)
    device.requests()
    again = DeviceStore(open_transport(device), folder, 100)
    moved = {"a": (tmp_path / "a").rename(tmp_path / "other name"), "b": files["b"]}
    assert again.put(moved) == {"a": first["a"], "b": first["b"]}
    assert (again.sent_files, again.sent_bytes, again.reused_files) == (0, 0, 2)
    assert not [request for request in device.requests() if request.startswith("SEND")]
    assert first["a"] == first["c"]


@pytest.mark.parametrize("harm", ["shorter", "same size", "link"])
def test_what_was_damaged_on_the_device_is_sent_again(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path, harm: str
) -> None:
    file = write(tmp_path / "a", 1000)
    path = DeviceStore(transport, folder, 100).put({"a": file})["a"]
    there = on_host(device, path)
    if harm == "shorter":
        os.truncate(there, 900)
    elif harm == "same size":
        there.write_bytes(b"\1" * 1000)
    else:
        there.rename(there.with_name("hidden"))
        there.symlink_to("hidden")
    store = DeviceStore(transport, folder, 100)
    assert store.put({"a": file}) == {"a": path}
    assert there.read_bytes() == file.read_bytes()
    assert not there.is_symlink()
    assert (store.sent_files, store.damaged_files) == (1, int(harm != "link"))


@pytest.mark.parametrize("fault", [{"push_drop": 200_000}, {"push_corrupt": 5}])
def test_a_push_that_breaks_off_leaves_nothing_under_a_name(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path, fault: dict[str, int]
) -> None:
    file = write(tmp_path / "a", MIB)
    store = DeviceStore(transport, folder, 100)
    device.faults(**fault, times=1)
    with pytest.raises((DeviceLostError, DeviceFileError)):
        store.put({"a": file})
    device.faults()
    transport.reconnect(20)
    assert not [f for f in store.files() if "." not in f.name]
    path = store.put({"a": file})["a"]
    assert on_host(device, path).read_bytes() == file.read_bytes()


def test_drafts_of_the_dead_are_swept_and_of_the_living_are_not(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    store = on_host(device, DeviceStore(transport, folder, 100).put({"a": write(tmp_path / "a", 9)})["a"]).parent
    for name, age in (("old", 7200), ("busy", 7200), ("new", 0)):
        draft = store / f".{name.encode().hex():0>16}.part"
        draft.mkdir()
        (draft / "f").write_bytes(b"half")
        then = time.time() - age
        os.utime(draft / "f", (then, then) if name != "busy" else None)
        os.utime(draft, (then, then))
    assert sweep(transport, folder).drafts == 1
    left = sorted(bytes.fromhex(path.name[1:17]).strip(b"\0").decode() for path in store.glob(".*.part"))
    assert left == ["busy", "new"]


def test_the_least_recently_used_goes_when_the_limit_is_reached(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    store = DeviceStore(transport, folder, 4)
    paths = store.put({str(n): write(tmp_path / str(n), MIB, n) for n in range(4)})
    for n, age in enumerate((4000, 3000, 2000, 1000)):
        grow_old(device, paths[str(n)], age)
    linked = Workspace.make(transport, folder)
    linked.link({"model.bin": paths["0"]})
    store.put({"1": tmp_path / "1"})  # used again
    store.put({"new": write(tmp_path / "new", MIB, 9)})
    there = {label: on_host(device, path).exists() for label, path in paths.items()}
    assert there == {"0": True, "1": True, "2": False, "3": True}
    assert sum(file.size for file in store.files()) == 4 * MIB


def test_more_than_the_limit_at_once_is_refused(transport: Transport, folder: str, tmp_path: Path) -> None:
    store = DeviceStore(transport, folder, 1)
    with pytest.raises(DeviceSpaceError, match="device_limit_mb"):
        store.put({"a": write(tmp_path / "a", MIB + 1)})
    assert store.files() == []


def test_a_full_device_evicts_and_tries_once_more(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    store = DeviceStore(transport, folder, 100)
    old = store.put({"old": write(tmp_path / "old", MIB, 1)})["old"]
    grow_old(device, old)
    device.faults(push_no_space=1000, times=1)
    path = store.put({"new": write(tmp_path / "new", MIB, 2)})["new"]
    assert on_host(device, path).stat().st_size == MIB
    assert not on_host(device, old).exists()


def test_a_full_device_is_an_error_with_numbers(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    store = DeviceStore(transport, folder, 100)
    kept = store.put({"kept": write(tmp_path / "kept", 2 * MIB, 1)})["kept"]
    Workspace.make(transport, folder).link({"kept": kept})
    grow_old(device, kept)
    device.faults(push_no_space=1000)
    with pytest.raises(DeviceSpaceError) as caught:
        store.put({"new": write(tmp_path / "new", 3 * MIB, 2)})
    assert "3.0 MiB more are needed" in str(caught.value)
    assert "2.0 MiB, of which sessions use 2.0 MiB" in str(caught.value)
    assert on_host(device, kept).exists()


def test_too_little_space_is_seen_before_anything_is_sent(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    huge = tmp_path / "huge"
    with huge.open("wb") as f:
        f.truncate(64 << 20)
    tool = device.path("/system/bin/df" if device.path("/system/bin/df").is_symlink() else "/bin/df")
    tool.unlink()
    tool.write_text("#!/bin/sh\necho 'F B U A C M'; echo 'disk 100000 90000 10000 90% /data'\n")
    tool.chmod(0o755)
    device.requests()
    with pytest.raises(DeviceSpaceError, match=r"64.0 MiB more are needed .* 9.8 MiB are free"):
        DeviceStore(transport, folder, 100).put({"huge": huge})
    assert not [request for request in device.requests() if request.startswith("SEND")]


FILLER = """
import sys
from pathlib import Path
from pytest_qnn.adb.server import parse_address
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.devices.store import DeviceStore
serial, server = parse_address(sys.argv[1])
store = DeviceStore(AdbTransport(server, serial), sys.argv[2], 100)
files = {path.name: path for path in Path(sys.argv[3]).iterdir()}
for round in range(3):
    print(sorted(store.put(files).values()))
"""


def test_two_processes_fill_the_store_at_once(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    files = [write(tmp_path / "files" / str(n), 200_000, n) for n in range(6)]
    words = [sys.executable, "-c", FILLER, transport.address, folder, str(tmp_path / "files")]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len({line for lines in answers for line in lines}) == 1
    contents = {
        on_host(device, f"{folder}/store/{file.name}").read_bytes()
        for file in DeviceStore(transport, folder, 9).files()
    }
    assert contents == {file.read_bytes() for file in files}


def test_a_file_that_changes_while_it_is_sent_does_not_get_another_ones_name(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "a", 1000, 1)
    store = DeviceStore(transport, folder, 100)
    store.put({"a": file})
    stamp = file.stat()
    file.write_bytes(b"\2" * 1000)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as an editor that keeps the time would leave it
    store.clear()
    with pytest.raises(DeviceFileError, match="changed while it was sent"):
        DeviceStore(transport, folder, 100).put({"a": file})
    assert store.files() == []


def test_clear_spares_what_is_linked(transport: Transport, folder: str, tmp_path: Path) -> None:
    store = DeviceStore(transport, folder, 100)
    paths = store.put({"a": write(tmp_path / "a", 10, 1), "b": write(tmp_path / "b", 20, 2)})
    workspace = Workspace.make(transport, folder)
    workspace.link({"b": paths["b"]})
    assert [file.size for file in store.clear()] == [10]
    assert [file.size for file in store.files()] == [20]
    workspace.close()
    assert [file.size for file in store.clear()] == [20]


@pytest.mark.parametrize("folder", ["", "/", "relative", "/a/../b", "/a\nb"])
def test_a_folder_that_can_not_be_ours_is_refused(transport: Transport, folder: str) -> None:
    with pytest.raises(DeviceFileError, match="device_folder"):
        DeviceStore(transport, folder, 1)


def test_foreign_names_in_the_store_are_left_alone(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    store = DeviceStore(transport, folder, 1)
    path = store.put({"a": write(tmp_path / "a", MIB // 2, 1)})["a"]
    place = on_host(device, path).parent
    for name in ("-rf", "$(touch x)", "a\nb", "notes.txt", "..."):
        (place / name).write_bytes(b"mine")
        os.utime(place / name, (0, 0))
    grow_old(device, path)
    store.put({"b": write(tmp_path / "b", MIB, 2)})
    assert sorted(p.name for p in place.iterdir() if len(p.name) < 64) == sorted(
        ["-rf", "$(touch x)", "a\nb", "notes.txt", "..."]
    )
    assert not on_host(device, path).exists()


def test_a_device_that_was_lost_is_said(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    device.faults(shell_drop=0, times=1)
    with pytest.raises(DeviceError):
        DeviceStore(transport, folder, 100).put({"a": write(tmp_path / "a", 10)})
    device.faults()
    transport.reconnect(20)
