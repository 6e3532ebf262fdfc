"""A process's folder on a device: made for one, removed at the end, swept after a death, never taken from the living."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_qnn.devices.attached import AttachedDevice
from pytest_qnn.devices.facts import probe
from pytest_qnn.devices.lease import DeviceLease
from pytest_qnn.devices.store import DeviceStore
from pytest_qnn.devices.transport import Completed, Transport
from pytest_qnn.devices.workspace import FOREIGN_SECONDS, Workspace, _safe_name, sweep
from pytest_qnn.errors import DeviceFileError, DeviceLostError
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


def test_files_of_the_store_are_linked_into_it(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\ncat lib/data\n")
    program.chmod(0o755)
    (tmp_path / "data").write_text("content")
    paths = DeviceStore(transport, folder, 1).put({"program": program, "data": tmp_path / "data"})
    workspace = Workspace.make(transport, folder)
    links = workspace.link({"qnn-net-run": paths["program"], "lib/data": paths["data"]})
    assert links["lib/data"] == f"{workspace.path}/lib/data"
    assert transport.shell([links["qnn-net-run"]], cwd=workspace.path).text == "content"
    workspace.close()
    assert not on_host(device, workspace.path).exists()
    assert on_host(device, paths["data"]).read_text() == "content"


def test_many_links_at_once(device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("content")
    path = DeviceStore(transport, folder, 1).put({"data": tmp_path / "data"})["data"]
    workspace = Workspace.make(transport, folder)
    workspace.link({f"f{number}": path for number in range(130)})
    assert len([p for p in on_host(device, workspace.path).iterdir() if p.is_symlink()]) == 130


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../x",
        "/etc/x",
        "a/../b",
        "-rf",
        "a b",
        "a\nb",
        "$(id)",
        "a'b",
        "owner.json",
        "a/",
        ".hidden",
        "é",
        "a" * 200,
    ],
)
def test_names_that_could_leave_it_are_refused(
    device: LoopbackDevice, transport: Transport, folder: str, name: str
) -> None:
    workspace = Workspace.make(transport, folder)
    device.requests()
    with pytest.raises(ValueError):
        workspace.link({name: "/etc/hosts"})
    assert not [request for request in device.requests() if request.startswith("shell")]


@given(st.text(alphabet="ab/.-_$' \n\0é\\;*~"))
def test_a_safe_name_is_one_for_every_shell_and_file_system(name: str) -> None:
    if _safe_name(name):
        assert not set(name) & set("$' \n\0é\\;*~")
        assert os.path.normpath(name) == name
        assert not name.startswith(("/", "-", "."))


@pytest.mark.parametrize("target", ["relative", "/a\nb", "/a/../b", "", "/a\0b"])
def test_targets_that_are_no_paths_are_refused(transport: Transport, folder: str, target: str) -> None:
    with pytest.raises(ValueError):
        Workspace.make(transport, folder).link({"name": target})


def test_hostile_targets_are_names_and_not_commands(device: LoopbackDevice, transport: Transport, folder: str) -> None:
    place = on_host(device, folder)
    workspace = Workspace.make(transport, folder)
    for number, name in enumerate(["$(touch pwned)", "a'; touch pwned; '", "-rf", "sp ace", "`touch pwned`"]):
        (place / name).write_text(str(number))
        workspace.link({f"f{number}": f"{folder}/{name}"})
        assert transport.read(f"{workspace.path}/f{number}") == str(number).encode()
    assert not list(place.rglob("pwned"))


def test_a_link_to_nothing_is_an_error(transport: Transport, folder: str) -> None:
    with pytest.raises(DeviceFileError, match=r"store/gone is not there"):
        Workspace.make(transport, folder).link({"x": f"{folder}/store/gone"})


def test_a_workspace_that_somebody_removed_is_said(device: LoopbackDevice, transport: Transport, folder: str) -> None:
    workspace = Workspace.make(transport, folder)
    shutil.rmtree(on_host(device, workspace.path))
    with pytest.raises(DeviceFileError, match="is gone"):
        workspace.link({"x": "/etc/hosts"})


def test_closing_does_not_mind_that_the_device_is_lost_and_the_next_sweep_does_it(
    device: LoopbackDevice, transport: Transport, folder: str
) -> None:
    workspace, other = Workspace.make(transport, folder), Workspace.make(transport, folder)
    device.faults(shell_drop=0, times=1)
    workspace.close()
    device.faults()
    transport.reconnect(20)
    swept = sweep(transport, folder)
    assert swept.workspaces == (workspace.path.rpartition("/")[2],), "this process lives, but is done with it"
    assert swept.living == (other.path.rpartition("/")[2],)


# --- sweeping ---------------------------------------------------------------------------------------------------------

OWNER = """
import sys, time
from pytest_qnn.adb.server import parse_address
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.devices.workspace import Workspace
serial, server = parse_address(sys.argv[1])
print(Workspace.make(AdbTransport(server, serial), sys.argv[2]).path, flush=True)
time.sleep(600)
"""


def test_a_killed_owners_workspace_is_swept_and_a_living_ones_is_not(
    device: LoopbackDevice, transport: Transport, folder: str
) -> None:
    words = [sys.executable, "-c", OWNER, transport.address, folder]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout
            path = owner.stdout.readline().strip()
            own = Workspace.make(transport, folder)
            assert sweep(transport, folder).workspaces == ()
            assert on_host(device, path).is_dir()
            owner.send_signal(signal.SIGKILL)
            owner.wait()
            swept = sweep(transport, folder)
        finally:
            owner.kill()
    assert swept.workspaces == (path.rpartition("/")[2],)
    assert swept.living == (own.path.rpartition("/")[2],)
    assert not on_host(device, path).exists()
    assert on_host(device, own.path).is_dir()


def change_note(device: LoopbackDevice, workspace: Workspace, age: float, **values: object) -> None:
    file = on_host(device, workspace.path) / "owner.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    then = time.time() - age
    os.utime(file, (then, then))


@pytest.mark.parametrize(("age", "gone"), [(0, False), (FOREIGN_SECONDS - 600, False), (FOREIGN_SECONDS + 600, True)])
def test_of_another_host_the_heartbeat_counts(
    device: LoopbackDevice, transport: Transport, folder: str, age: float, gone: bool
) -> None:
    workspace = Workspace.make(transport, folder)
    change_note(device, workspace, age, host="0" * 32, pid=1, started=0)
    assert bool(sweep(transport, folder).workspaces) is gone
    assert on_host(device, workspace.path).exists() is not gone


def test_the_age_is_by_the_devices_clock(device: LoopbackDevice, transport: Transport, folder: str) -> None:
    workspace = Workspace.make(transport, folder)
    change_note(device, workspace, 0, host="0" * 32)
    tool = next(path for name in ("system/bin", "bin") if (path := Path(device.root, name, "date")).is_symlink())
    tool.unlink()
    tool.write_text(f"#!/bin/sh\necho {int(time.time() + FOREIGN_SECONDS + 600)}\n")
    tool.chmod(0o755)
    assert sweep(transport, folder).workspaces


def test_a_reused_process_id_is_not_the_owner(device: LoopbackDevice, transport: Transport, folder: str) -> None:
    workspace = Workspace.make(transport, folder)
    note = json.loads((on_host(device, workspace.path) / "owner.json").read_text())
    change_note(device, workspace, 0, started=note["started"] - 3600)
    assert sweep(transport, folder).workspaces


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[" * 1900,
        b"\xff\xfe",
        b'{"host": "x", "pid": "$(id)", "started": 0}',
        b"null",
        b'"' + b"x" * 100_000,
    ],
    ids=range(7),
)
def test_a_note_that_can_not_be_read_gives_time(
    device: LoopbackDevice, transport: Transport, folder: str, content: bytes
) -> None:
    workspace = Workspace.make(transport, folder)
    note = on_host(device, workspace.path) / "owner.json"
    note.write_bytes(content)
    assert sweep(transport, folder).workspaces == ()
    os.utime(note, (1, 1))
    assert len(sweep(transport, folder).workspaces) == 1


def test_names_that_are_not_ours_are_never_touched(
    device: LoopbackDevice, transport: Transport, folder: str, tmp_path: Path
) -> None:
    Workspace.make(transport, folder).close()
    work = on_host(device, folder) / "work"
    elsewhere = on_host(device, folder) / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (work / ("a" * 16)).symlink_to("../elsewhere")
    for name in ("-rf", "$(rm -rf ..)", "..x", "a\nb", "A" * 16, "a" * 15, "a" * 17, "*"):
        (work / name).mkdir()
        os.utime(work / name, (1, 1))
    before = sorted(path.name for path in work.iterdir())
    assert sweep(transport, folder, all_owners=True).workspaces == ()
    assert sorted(path.name for path in work.iterdir()) == before
    assert (elsewhere / "precious").exists()


def test_what_a_workspace_links_to_survives_its_removal(
    device: LoopbackDevice, transport: Transport, folder: str
) -> None:
    precious = on_host(device, folder) / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    workspace = Workspace.make(transport, folder)
    workspace.link({"folder": f"{folder}/precious"})
    assert sweep(transport, folder, all_owners=True).workspaces
    assert (precious / "file").exists()


def test_one_whose_making_was_answered_by_a_lost_connection_is_removed_too(
    device: LoopbackDevice, transport: Transport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = probe(transport)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    lease = DeviceLease(facts.serial, facts.address)
    attached = AttachedDevice(transport, facts, lease, limit_mib=1, wait_seconds=5, recover_seconds=5)
    work = on_host(device, facts.folder) / "work"
    shell = transport.shell

    def lose(words: Sequence[str], **options: Any) -> Completed:
        done = shell(words, **options)
        if "make" in words:
            raise DeviceLostError("lost after it was done")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(transport, "shell", lose)
        with pytest.raises(DeviceLostError, match="after it was done"):
            _ = attached.workspace
    assert len(list(work.iterdir())) == 1
    assert on_host(device, attached.workspace.path).exists()
    assert len(list(work.iterdir())) == 2  # ours, and no sweep takes what belongs to the living
    attached.close()
    assert list(work.iterdir()) == []


def test_a_sweep_of_nothing_is_none(transport: Transport, folder: str) -> None:
    assert sweep(transport, f"{folder}/nothing/there").workspaces == ()
