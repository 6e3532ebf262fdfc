"""Whatever a file on a device is called: it goes there and comes back under that name and no other, or is refused by name."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pytest_qnn.adb.digests import LONGEST_SCRIPT, compute, parse, publish
from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.errors import DeviceFileError
from pytest_qnn.testing import LoopbackDevice
from tests.devices.as_before import as_before
from tests.devices.traces import tree

TMP = "/data/local/tmp"
# fmt: off
BITS = [
    "a", "b", "-", "--", "-rf", ".", "..", "\\", "\\n", "'", '"', "$(touch pwned)", "$(touch${IFS}pwned)", "`touch pwned`", ";touch pwned;",
    "|touch pwned", "&", "*", "?", "[a]", "{a,b}", "~", "!", "#", "%s", "${IFS}", "$HOME", ",33188", "\x01", "\x7f", "ü", "e\u0301", "🙂", "\u202e",
    "=", ":", "<", ">", "(", ")", " ", "\n", "\r", "\t", "\u2028", "\udc80", "\0",
]
# fmt: on
NAMES = st.one_of(
    st.lists(st.sampled_from(BITS), min_size=1, max_size=6).map("".join),
    st.text(min_size=1, max_size=40),
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20),
)
FAST = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
_numbers = itertools.count()


@pytest.fixture
def android(kept_device: Callable[[str], LoopbackDevice]) -> Iterator[LoopbackDevice]:
    with as_before(kept_device("android")) as device:
        yield device


@pytest.fixture
def line(android: LoopbackDevice, open_transport: Callable[[LoopbackDevice], AdbTransport]) -> AdbTransport:
    return open_transport(android)


def everything(android: LoopbackDevice) -> set[str]:
    """All files of the device, and those of this host where something could go astray."""
    return {f"device:{p}" for p in tree(android.root) if not p.startswith("run/")} | {
        f"host:{p}" for p in os.listdir(".")
    }


def can_be(name: str) -> bool:
    """Whether Linux takes this as the name of a file."""
    try:
        data = name.encode()
    except UnicodeEncodeError:
        return False
    return b"\0" not in data and b"/" not in data and name not in (".", "..") and 0 < len(data) < 256


@FAST
@given(names=st.lists(NAMES, min_size=1, max_size=4, unique=True), content=st.binary(max_size=100))
@example(names=["a\n", "a", "\n", "\n\n"], content=b"")
@example(names=["\\", "-", "--", "-rf"], content=b"x")
@example(names=["\r", "\\\n", "\\n", "\\\\n"], content=b"x")
@example(names=["x" * 255, "ü" * 127], content=b"x")
@example(names=["x" * 256], content=b"x")
@example(names=["'" * 255, '"' * 255, "\n" * 255], content=b"x")
@example(names=["good", "."], content=b"x")
@example(names=["good", ""], content=b"x")
@example(names=["good", "\udc80"], content=b"x")
@example(names=["good", "\0"], content=b"x")
@example(names=[" a", "a ", "a\t", " "], content=b"x")
def test_any_name_works_or_is_refused(
    line: AdbTransport,
    android: LoopbackDevice,
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    content: bytes,
) -> None:
    names = [name.replace("/", "_") for name in names]
    before = everything(android)
    folder = f"{TMP}/{next(_numbers)}"
    local = tmp_path_factory.mktemp("local")
    paths = {f"{folder}/{name}": local / str(i) for i, name in enumerate(names)}
    if all(map(can_be, names)):
        line.push(dict.fromkeys(paths, content), timeout=20)
        assert set(os.listdir(android.path(folder))) == set(names)
        for path in paths:
            found = line.stat(path)
            assert found
            assert found.size == len(content)
            assert line.read(path) == content
        line.pull(paths, timeout=20, sizes=dict.fromkeys(paths, len(content)))
        assert [p.read_bytes() for p in paths.values()] == [content] * len(paths)
        assert len(os.listdir(local)) == len(paths)
        expected = {f"device:{folder[1:]}", *(f"device:{folder[1:]}/{name}" for name in names)}
        assert everything(android) - before == expected
        shutil.rmtree(android.path(folder))
    else:
        with pytest.raises((ValueError, DeviceFileError)):
            line.push(dict.fromkeys(paths, content), timeout=20)
        with pytest.raises((ValueError, DeviceFileError)):
            line.pull(paths, timeout=20)
        assert os.listdir(local) == []
        assert everything(android) - before <= {f"device:{folder[1:]}"}
    assert before <= everything(android)


@FAST
@given(parts=st.lists(st.one_of(st.sampled_from(["..", ".", "", "a", "b"]), NAMES), min_size=1, max_size=5))
@example(parts=["..", "..", "..", "..", "..", "etc", "x"])
@example(parts=["a", "..", "b"])
@example(parts=["", "a"])
def test_a_path_leads_where_it_says(line: AdbTransport, android: LoopbackDevice, parts: list[str]) -> None:
    folder = f"{TMP}/p{next(_numbers)}/1/2/3"
    line.push({f"{folder}/here": b""}, timeout=20)
    before = everything(android)
    path = "/".join([folder, *parts])
    try:
        line.push({path: b"content"}, timeout=20)
    except (ValueError, DeviceFileError):
        made = everything(android) - before
        assert not any(".part" in name for name in made)
    else:
        target = os.path.normpath(path)
        made = everything(android) - before
        assert android.path(target).read_bytes() == b"content"
        assert f"device:{target.lstrip('/')}" in made | before
    for name in made:  # folders on the way to it, and it
        assert name.startswith("device:")
        inner = f"/{name.removeprefix('device:')}"
        assert any(
            f"{os.path.normpath('/'.join([folder, *parts[:n]]))}/".startswith(f"{inner}/")
            for n in range(len(parts) + 1)
        )
    for name in sorted(made, reverse=True):
        place = android.path(name.removeprefix("device:"))
        if place.is_dir():
            place.rmdir()
        else:
            place.unlink()
    assert everything(android) == before


@pytest.mark.parametrize("shell", ["dash", "bash"])
@pytest.mark.parametrize("fast", [False, True])
def test_scripts_fit_a_command_and_compare_every_digest(tmp_path: Path, shell: str, fast: bool) -> None:
    hidden, target = tmp_path / "hi'dden", tmp_path / "tar get"
    hidden.mkdir()
    target.mkdir()
    names = [f"{'$(x) ' * 20}{i}" for i in range(300)] + ["'" * 255, "\\", "\n", "-rf", "a\r\n"]
    for name in names:
        (hidden / name).write_text(name)
    paths = [str(hidden / name) for name in names]
    digests: list[str] = []
    for script, some in compute(paths, fast=fast):
        assert len(script.encode()) < LONGEST_SCRIPT + 1000
        digests += parse(subprocess.run([shell, "-c", script], stdout=subprocess.PIPE, check=True).stdout, some)
    wanted = dict(zip(names, digests, strict=True))
    (hidden / names[-1]).write_text("altered")
    *first, last = publish(wanted, str(hidden), str(target), fast=fast)
    for script in first:
        subprocess.run([shell, "-c", script], check=True)
    assert subprocess.run([shell, "-c", last], stdout=subprocess.PIPE).returncode == 65
    assert names[-1] not in os.listdir(target)
    (hidden / names[-1]).write_text(names[-1])
    subprocess.run([shell, "-c", last], check=True)
    assert set(os.listdir(target)) == set(names)
    assert not hidden.exists()


@pytest.mark.parametrize(
    "output",
    [b"", b"0" * 64, b"0" * 64 + b"  /a", b"0" * 63 + b"g  /a\n", b"0" * 64 + b"  /b\n", b"0" * 64 + b"  /a\nmore\n"],
)
def test_odd_answers_of_sha256sum_are_refused(output: bytes) -> None:
    assert parse(b"0" * 64 + b"  /a\n", ["/a"]) == ["0" * 64]
    with pytest.raises(DeviceFileError, match="sha256sum wrote"):
        parse(output, ["/a"])
