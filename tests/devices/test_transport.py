"""A line to a device over a real ADB server: commands and files."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pytest_qnn.adb.transport import AdbTransport
from pytest_qnn.errors import DeviceFileError, DeviceLostError, DeviceTimeoutError
from pytest_qnn.testing import LoopbackDevice
from tests.devices.as_before import as_before
from tests.devices.conftest import needs_own_root
from tests.devices.traces import gone, marked_sleep, tree

HOSTILE = [
    "a b",
    " a ",
    "-rf",
    "--",
    "'",
    '"',
    "\\",
    "a\\nb",
    "a\nb",
    "\n",
    "$(touch /data/local/tmp/pwned)",
    "`touch /data/local/tmp/pwned`",
    "; touch /data/local/tmp/pwned;",
    "a & b | c > d",
    "*",
    "~",
    "${IFS}",
    "!!",
    "#",
    "%s%n",
    "\t",
    "\r",
    "\x01\x7f",
    "ü日本語🙂",
    "e\u0301",
    "\u202egnp.exe",
]
TMP = "/data/local/tmp"


@pytest.fixture
def android(kept_device: Callable[[str], LoopbackDevice]) -> Iterator[LoopbackDevice]:
    with as_before(kept_device("android")) as device:
        yield device


@pytest.fixture
def line(android: LoopbackDevice, open_transport: Callable[[LoopbackDevice], AdbTransport]) -> AdbTransport:
    return open_transport(android)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


# --- commands ---------------------------------------------------------------------------------------------------------


def test_exit_code_and_both_outputs_are_apart(line: AdbTransport) -> None:
    done = line.shell(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.code, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 255", 255), ("kill -9 $$", 137), ("kill -11 $$", 139)]
)
def test_exit_code_is_the_programs(line: AdbTransport, script: str, code: int) -> None:
    assert line.shell(["sh", "-c", script]).code == code


def test_program_that_is_not_there_is_an_answer(line: AdbTransport) -> None:
    assert line.shell(["no-such-program"]).code == 127
    assert line.shell(["true"], cwd="/no/such/folder").code == 126


def test_words_reach_the_program_as_they_are(line: AdbTransport, android: LoopbackDevice) -> None:
    needs_own_root(android)
    assert line.shell(["printf", "%s\\0", *HOSTILE]).stdout == "".join(f"{w}\0" for w in HOSTILE).encode()
    for word in HOSTILE:
        done = line.shell(["sh", "-c", 'pwd; printf %s "$A"'], cwd=TMP, env={"A": word})
        assert done.stdout == f"{TMP}\n{word}".encode()
    assert not list(android.path(TMP).iterdir())


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["echo", "a\0b"], {}),
        (["echo", "\udc80"], {}),
        ([], {}),
        ([""], {}),
        ("ls /", {}),
        (["-x"], {}),
        (["echo", "x" * 60_000], {}),
        (["true"], {"cwd": "relative"}),
        (["true"], {"cwd": "/a\0b"}),
        (["true"], {"env": {"A B": ""}}),
        (["true"], {"env": {"A;id": ""}}),
        (["true"], {"env": {"": ""}}),
        (["true"], {"env": {"A": "\0"}}),
    ],
)
def test_what_can_not_be_passed_on_is_refused_before_the_device_is_asked(
    line: AdbTransport, android: LoopbackDevice, words: list[str], options: dict[str, object]
) -> None:
    android.requests()
    for call in (line.shell, line.start):
        with pytest.raises(ValueError):
            call(words, timeout=10, **options)  # type: ignore[operator]
    assert android.requests() == []


def test_variables_are_the_programs_and_not_of_what_kills_it(line: AdbTransport) -> None:
    done = line.shell(["sh", "-c", "tr '\\0' '\\n' </proc/$PPID/environ"], env={"LD_LIBRARY_PATH": "/nowhere"})
    assert done.code == 0
    assert "LD_LIBRARY_PATH" not in done.text


def test_much_goes_both_ways_at_once(line: AdbTransport) -> None:
    data = os.urandom(3 << 20)
    assert line.shell(["cat"], stdin=data).stdout == data


def test_program_need_not_read_its_input(line: AdbTransport, android: LoopbackDevice) -> None:
    android.requests()
    done = line.shell(["sh", "-c", "echo done; exit 3"], stdin=bytes(5 << 20))
    assert (done.code, done.stdout) == (3, b"done\n")
    # A real adbd drops output of a program that ends before it has taken its input (the loopback's doesn't): so all is taken.
    assert any("cat >/dev/null" in request for request in android.requests())


def test_output_has_a_limit_and_who_writes_it_ends(line: AdbTransport) -> None:
    with pytest.raises(DeviceFileError, match="more than 1000 bytes"):
        line.shell(["cat", "/dev/zero"], limit=1000)
    with pytest.raises(DeviceFileError, match="more than 1000 bytes"):
        line.shell(["sh", "-c", "head -c 1001 /dev/zero >&2"], limit=1000)
    assert len(line.shell(["head", "-c", "1000", "/dev/zero"], limit=1000).stdout) == 1000


def test_command_is_killed_on_the_device_when_its_time_is_over(line: AdbTransport, android: LoopbackDevice) -> None:
    sleep = marked_sleep()
    android.requests()
    with pytest.raises(DeviceTimeoutError, match="sleep"):
        line.shell(sleep, timeout=0.5)
    assert line.kills()
    assert gone(sleep)
    # by itself, so that it is also killed when this host is gone
    assert any(f"timeout -s KILL 2 {' '.join(sleep)}" in request for request in android.requests())


def test_command_is_ended_on_a_device_without_timeout(
    android: LoopbackDevice, open_transport: Callable[[LoopbackDevice], AdbTransport]
) -> None:
    needs_own_root(android)
    android.path("/system/bin/timeout").unlink()
    line, sleep = open_transport(android), marked_sleep()
    assert not line.kills()
    assert line.shell(["sh", "-c", "echo $X; pwd"], env={"X": "x"}, cwd=TMP).text == f"x\n{TMP}"
    with pytest.raises(DeviceTimeoutError):
        line.shell(["sh", "-c", f"{' '.join(sleep)}; true"], timeout=0.5)  # the shell's child as well
    assert gone(sleep)


OLD_BUSYBOX = """#!/bin/sh
[ "$1" = -t ] && [ "$3" = -s ] || exit 127
seconds=$2 signal=$4; shift 4
exec /usr/bin/timeout -s "$signal" "$seconds" "$@"
"""


def test_timeout_of_an_old_busybox_is_known(
    android: LoopbackDevice, open_transport: Callable[[LoopbackDevice], AdbTransport]
) -> None:
    tool = android.path("/system/bin/timeout")
    tool.unlink()
    tool.write_text(OLD_BUSYBOX)
    tool.chmod(0o755)
    line, sleep = open_transport(android), marked_sleep()
    assert line.kills()
    assert line.shell(["echo", "x"]).text == "x"
    with pytest.raises(DeviceTimeoutError):
        line.shell(sleep, timeout=0.5)
    assert gone(sleep)


def test_time_counts_in_all_and_not_from_the_last_output(line: AdbTransport) -> None:
    with pytest.raises(DeviceTimeoutError):
        line.shell(["sh", "-c", "while :; do echo x; sleep 0.05; done"], timeout=0.7)


# --- files to the device ----------------------------------------------------------------------------------------------


def test_files_and_content_arrive_with_their_digests(line: AdbTransport, android: LoopbackDevice, here: Path) -> None:
    source = here / "source"
    source.write_bytes(os.urandom(300_001))
    files: dict[str, Path | bytes] = {f"{TMP}/new/a/big": source, f"{TMP}/new/b": b"content", f"{TMP}/empty": b""}
    digests = line.push(files, mode=0o755, timeout=20)
    for path, content in files.items():
        data = content.read_bytes() if isinstance(content, Path) else content
        assert android.path(path).read_bytes() == data
        assert digests[path] == hashlib.sha256(data).hexdigest()
        assert stat.S_IMODE(android.path(path).stat().st_mode) == 0o755
    assert tree(android.path(TMP)) == {"new", "new/a", "new/a/big", "new/b", "empty"}


def test_hundreds_of_files_take_one_connection_and_a_few_commands(line: AdbTransport, android: LoopbackDevice) -> None:
    files: dict[str, Path | bytes] = {f"{TMP}/many/{'long name ' * 12}{i}": str(i).encode() for i in range(400)}
    line.kills()
    android.requests()
    line.push(files, timeout=30)
    requests = android.requests()
    assert sum(r.startswith("SEND") for r in requests) == 400
    assert sum(r.startswith("shell") for r in requests) < 10
    assert len(list(android.path(f"{TMP}/many").iterdir())) == 400


def test_file_is_replaced_whole(line: AdbTransport, android: LoopbackDevice) -> None:
    line.push({f"{TMP}/x": b"old"}, timeout=10)
    before = android.path(f"{TMP}/x").stat().st_ino
    line.push({f"{TMP}/x": b"new"}, timeout=10)
    assert android.path(f"{TMP}/x").read_bytes() == b"new"
    assert android.path(f"{TMP}/x").stat().st_ino != before  # moved there, and not written over


def test_link_is_replaced_and_not_followed(line: AdbTransport, android: LoopbackDevice) -> None:
    android.path(f"{TMP}/target").write_bytes(b"mine")
    android.path(f"{TMP}/link").symlink_to("target")
    line.push({f"{TMP}/link": b"new"}, timeout=10)
    assert android.path(f"{TMP}/target").read_bytes() == b"mine"
    assert android.path(f"{TMP}/link").read_bytes() == b"new"


def test_folder_in_the_way_is_an_error_and_nothing_stays(line: AdbTransport, android: LoopbackDevice) -> None:
    android.path(f"{TMP}/x").mkdir()
    with pytest.raises(DeviceFileError, match=f"refused {TMP}/x: "):
        line.push({f"{TMP}/x": b"new"}, timeout=10)
    assert tree(android.path(TMP)) == {"x"}
    android.path(f"{TMP}/file").write_bytes(b"")
    with pytest.raises(DeviceFileError, match=f"refused {TMP}/file/x: "):
        line.push({f"{TMP}/file/x": b"new"}, timeout=10)
    assert tree(android.path(TMP)) == {"x", "file"}


def test_place_that_can_not_be_written_is_an_error(line: AdbTransport) -> None:
    with pytest.raises(DeviceFileError, match="refused /proc/1/x"):
        line.push({"/proc/1/x": b"new"}, timeout=10)


@pytest.mark.parametrize(
    "path", ["relative", "", "/", f"{TMP}/", f"{TMP}/.", f"{TMP}/..", f"{TMP}/a\0b", f"{TMP}/\udc80"]
)
def test_path_that_is_none_is_refused(line: AdbTransport, path: str) -> None:
    with pytest.raises(ValueError):
        line.push({path: b""}, timeout=10)


@pytest.mark.parametrize("path", [f"{TMP}/{'x' * 256}", f"{TMP}{('/' + 'x' * 200) * 6}"])
def test_path_that_is_too_long_is_a_refusal_of_the_device(
    line: AdbTransport, android: LoopbackDevice, path: str
) -> None:
    with pytest.raises(DeviceFileError):
        line.push({path: b"x"}, timeout=10)
    with pytest.raises(DeviceFileError):
        line.pull({path: Path("never")}, timeout=10)
    assert tree(android.path(TMP)) == set()


def test_local_file_that_can_not_be_read_is_an_error_and_nothing_stays(
    line: AdbTransport, android: LoopbackDevice, here: Path
) -> None:
    os.mkfifo(here / "pipe")
    for source in (here / "missing", here, here / "pipe"):
        with pytest.raises(OSError):
            line.push({f"{TMP}/first": b"x", f"{TMP}/second": source}, timeout=10)
        assert tree(android.path(TMP)) == set()


# --- files from the device --------------------------------------------------------------------------------------------


def test_files_come_with_their_digests(line: AdbTransport, android: LoopbackDevice, here: Path) -> None:
    data = {f"{TMP}/{name}": os.urandom(size) for name, size in (("a", 0), ("b", 1), ("c", 200_000), ("d\ne\\", 9))}
    for path, content in data.items():
        android.path(path).write_bytes(content)
    local = {path: here / str(i) for i, path in enumerate(data)}
    digests = line.pull(local, timeout=20, sizes={path: len(content) for path, content in data.items()})
    for path, content in data.items():
        assert local[path].read_bytes() == content
        assert digests[path] == hashlib.sha256(content).hexdigest()
    assert len(list(here.iterdir())) == len(data)


def test_hundreds_of_files_come_at_once(line: AdbTransport, android: LoopbackDevice, here: Path) -> None:
    android.path(f"{TMP}/many").mkdir()
    local = {}
    for i in range(300):
        android.path(f"{TMP}/many/{i}").write_bytes(str(i).encode() * 100)
        local[f"{TMP}/many/{i}"] = here / str(i)
    line.pull(local, timeout=30)
    assert all(path.read_bytes() == path.name.encode() * 100 for path in here.iterdir())


@pytest.mark.parametrize("size", [2, 4])
def test_file_of_another_size_is_refused_before_it_is_fetched(
    line: AdbTransport, android: LoopbackDevice, here: Path, size: int
) -> None:
    android.path(f"{TMP}/x").write_bytes(b"abc")
    android.requests()
    with pytest.raises(DeviceFileError, match=f"{TMP}/x on device .* has 3 bytes, and not {size}"):
        line.pull({f"{TMP}/x": here / "x"}, timeout=10, sizes={f"{TMP}/x": size})
    assert not any("RECV" in request for request in android.requests())
    assert not list(here.iterdir())


def test_what_is_no_file_is_refused_and_the_local_file_stays(
    line: AdbTransport, android: LoopbackDevice, here: Path
) -> None:
    needs_own_root(android)
    local = here / "x"
    local.write_bytes(b"old")
    android.path(f"{TMP}/folder").mkdir()
    android.path(f"{TMP}/dangling").symlink_to("nothing")
    android.path(f"{TMP}/good").write_bytes(b"new")
    for path, why in (
        (f"{TMP}/missing", "is not there"),
        (f"{TMP}/dangling", "is not there"),
        (f"{TMP}/folder", "is a folder"),
        ("/dev/null", "no regular file"),
        (f"{TMP}/good/x", "is not there"),
    ):
        with pytest.raises(DeviceFileError, match=why):
            line.pull({f"{TMP}/good": local, path: here / "y"}, timeout=10)
    assert tree(here) == {"x"}
    assert local.read_bytes() == b"old"


def test_file_without_a_size_is_read_and_not_pulled(line: AdbTransport, here: Path, android: LoopbackDevice) -> None:
    needs_own_root(android)
    assert b"MemTotal" in line.read("/proc/meminfo")
    with pytest.raises(DeviceFileError, match="more than the 0 bytes"):
        line.pull({"/proc/meminfo": here / "x"}, timeout=10)
    assert not list(here.iterdir())


def test_read_tells_what_can_not_be_read(line: AdbTransport) -> None:
    line.push({f"{TMP}/x": bytes(1000)}, timeout=10)
    assert line.read(f"{TMP}/x", limit=1000) == bytes(1000)
    with pytest.raises(DeviceFileError, match="more than 999 bytes"):
        line.read(f"{TMP}/x", limit=999)
    for path in (f"{TMP}/missing", TMP):
        with pytest.raises(DeviceFileError, match=path):
            line.read(path)


def test_stat_tells_what_is_there(line: AdbTransport, android: LoopbackDevice) -> None:
    needs_own_root(android)
    android.path(f"{TMP}/x").write_bytes(b"abc")
    os.utime(android.path(f"{TMP}/x"), (1_700_000_000, 1_700_000_000))
    os.truncate(android.path(f"{TMP}/x"), 5 << 30)  # sparse: more than 32 bits
    android.path(f"{TMP}/link").symlink_to("x")
    found = line.stat(f"{TMP}/link")
    assert found
    assert (found.kind, found.size) == ("file", 5 << 30)
    folder, null = line.stat(TMP), line.stat("/dev/null")
    assert folder
    assert null
    assert (folder.kind, null.kind) == ("folder", "other")
    assert line.stat(f"{TMP}/nothing") is None
    assert line.stat(f"{TMP}/x/y") is None


def test_device_with_an_old_sync_is_asked_by_its_shell(line: AdbTransport, android: LoopbackDevice, here: Path) -> None:
    needs_own_root(android)
    names = [f"{TMP}/{name}" for name in ("x", "link", "n\nl", "missing", "x/y")] + [TMP, "/dev/null"]
    android.path(f"{TMP}/x").write_bytes(b"abc")
    android.path(f"{TMP}/n\nl").write_bytes(b"")
    android.path(f"{TMP}/link").symlink_to("x")
    expected = [line.stat(name) for name in names]
    line._has_stat = False  # as on a device without stat_v2: ADB's first version has 32 bits for a size
    android.requests()
    assert [line.stat(name) for name in names] == expected
    assert not any("STA" in request for request in android.requests())
    line.pull({f"{TMP}/link": here / "x"}, timeout=10)
    assert (here / "x").read_bytes() == b"abc"


def test_local_folder_that_is_not_there_is_an_error(line: AdbTransport, android: LoopbackDevice, here: Path) -> None:
    android.path(f"{TMP}/x").write_bytes(b"abc")
    with pytest.raises(FileNotFoundError):
        line.pull({f"{TMP}/x": here / "missing" / "x"}, timeout=10)


# --- programs that stay -----------------------------------------------------------------------------------------------


def test_program_is_written_to_and_read_from(line: AdbTransport) -> None:
    stream = line.start(["cat"], timeout=5)
    stream.write(b"abc", memoryview(b"def"), timeout=5)
    assert stream.read(4, timeout=5) == b"abcd"
    assert stream.exit_code is None
    stream.write(b"", timeout=5)
    assert stream.read(2, timeout=5) == b"ef"
    assert stream.read(0, timeout=5) == b""
    stream.close()
    stream.close()
    with pytest.raises(DeviceLostError, match="cat on device .* was closed"):
        stream.write(b"x", timeout=5)


def test_neither_side_waits_for_the_other_when_both_write_much(line: AdbTransport) -> None:
    data = os.urandom(20 << 20)
    stream = line.start(["cat"], timeout=5)
    stream.write(data, timeout=30)
    assert stream.read(len(data), timeout=30) == data
    stream.close()


def test_log_of_a_program_is_its_standard_error(line: AdbTransport) -> None:
    stream = line.start(
        ["sh", "-c", "echo one >&2; printf two >&2; echo answer; read x; echo three >&2; exit 4"], timeout=5
    )
    assert stream.read(7, timeout=5) == b"answer\n"
    stream.write(b"go\n", timeout=5)
    with pytest.raises(DeviceLostError, match=r"sh on device .* ended with exit code 4; it said:\n  one\n  twothree"):
        stream.read(1, timeout=5)
    assert stream.log() == ["one", "twothree"]
    assert stream.log() == []
    assert stream.exit_code == 4
    stream.close()
    assert stream.exit_code == 4


def test_program_that_says_nothing_is_a_timeout_and_can_be_asked_again(line: AdbTransport) -> None:
    stream = line.start(["cat"], timeout=5)
    stream.write(b"a", timeout=5)
    with pytest.raises(DeviceTimeoutError, match="ran cat"):
        stream.read(2, timeout=0.3)
    stream.write(b"b", timeout=5)
    assert stream.read(2, timeout=5) == b"ab"
    stream.close()


def test_program_that_takes_nothing_is_a_timeout(line: AdbTransport) -> None:
    sleep = marked_sleep()
    stream = line.start(sleep, timeout=5)
    with pytest.raises(DeviceTimeoutError):
        stream.write(bytes(64 << 20), timeout=0.5)
    stream.close()
    assert gone(sleep)


def test_program_ends_when_its_stream_is_closed(line: AdbTransport) -> None:
    sleeps = [marked_sleep(), marked_sleep()]
    first, second = (line.start(sleep, timeout=5) for sleep in sleeps)
    first.close()
    assert gone(sleeps[0])
    assert second.exit_code is None
    line.close()
    assert gone(sleeps[1])


def test_stream_closed_by_another_thread_is_lost_at_once(line: AdbTransport) -> None:
    stream = line.start(["cat"], timeout=5)
    timer = threading.Timer(0.2, stream.close)
    timer.start()
    with pytest.raises(DeviceLostError):
        stream.read(1, timeout=60)
    timer.join()


def test_program_that_can_not_be_started_tells_why(line: AdbTransport) -> None:
    stream = line.start(["/no/such/program"], timeout=5)
    with pytest.raises(DeviceLostError, match="exit code 127; it said:\n.*not found"):
        stream.read(1, timeout=5)
    stream.close()


# --- several at once, and large ---------------------------------------------------------------------------------------


def test_threads_share_a_line(line: AdbTransport, here: Path) -> None:
    def work(number: int) -> None:
        data = os.urandom(100_000)
        path = f"{TMP}/{number}/x"
        line.push({path: data, f"{TMP}/same": b"same"}, timeout=30)
        line.pull({path: here / str(number)}, timeout=30)
        assert (here / str(number)).read_bytes() == data
        assert line.shell(["echo", str(number)], timeout=30).text == str(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert line.read(f"{TMP}/same") == b"same"


@pytest.mark.slow
def test_large_file_goes_and_comes(line: AdbTransport, android: LoopbackDevice, here: Path) -> None:
    source, back = here / "source", here / "back"
    source.write_bytes(os.urandom(1 << 20) * 100)
    memory = psutil.Process().memory_info().rss
    sent = line.push({f"{TMP}/large": source}, timeout=60)
    assert line.pull({f"{TMP}/large": back}, timeout=60) == sent
    assert psutil.Process().memory_info().rss - memory < 30 << 20
    assert back.read_bytes() == source.read_bytes()
