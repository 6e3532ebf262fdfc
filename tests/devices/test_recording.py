"""What is recorded is answered again, and nothing else is: on a device in memory, and on the loopback device."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_qnn.devices.transport import OfThisHost, Transport, decided, part
from pytest_qnn.errors import (
    DeviceFileError,
    DeviceLostError,
    DeviceSpaceError,
    OptionError,
    RecordingError,
    ReplayError,
)
from pytest_qnn.recording import Recording, Replay, check_folder, check_possible
from pytest_qnn.recording.content import DIGEST
from pytest_qnn.recording.log import LOG, encode
from pytest_qnn.recording.stored import problems, read_session
from tests.devices.memory_device import MemoryDevice

BIG = bytes(range(256)) * 8

Session = Callable[[Transport], Any]


def record(folder: Path, session: Session, device: Transport | None = None) -> Any:
    """Record what ``session`` asks; its result."""
    recording = Recording(folder)
    result = session(recording.transport(device or MemoryDevice()))
    recording.close("0")
    return result


def replay(folder: Path, session: Session) -> Any:
    """The same out of the recording; its result."""
    again = Replay(folder)
    result = session(again.transport(0))
    again.finish()
    return result


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def rewrite(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Change the lines of a log and make its sums good again: what somebody with evil in mind would do."""
    rows = lines(folder)
    change(rows)
    before, log = b"", b""
    for row in rows:
        row.pop("sum", None)
        line, before = encode(row, before)
        log += line
    (folder / LOG).write_bytes(log)


# --- answering again --------------------------------------------------------------------------------------------------


def test_every_operation_is_answered_as_it_was(tmp_path: Path) -> None:
    local = tmp_path / "model.bin"
    local.write_bytes(BIG)

    def session(transport: Transport) -> list[Any]:
        got = tmp_path / transport.fresh_name()
        answers: list[Any] = [
            got.name,
            transport.push({"/d/model": local, "/d/list": b"in0:=/d/in0"}, mode=0o755, timeout=9),
            transport.shell(["cat", "/d/model"], cwd="/d", env={"LD_LIBRARY_PATH": "/d/lib"}, stdin=BIG),
            transport.shell(["cat", "/nowhere"]),
            transport.pull({"/d/model": got}, timeout=9, sizes={"/d/model": len(BIG)}),
            got.read_bytes(),
            transport.read("/d/list"),
            transport.stat("/d/list"),
            transport.stat("/nowhere"),
            transport.clock(),
            transport.wait(1000),
            transport.clock(),
            transport.reconnect(5),
        ]
        stream = transport.start(["echo"], timeout=9, cwd="/d")
        stream.write(b"abc", memoryview(BIG), timeout=9)
        answers += [stream.read(5, timeout=9), stream.read(len(BIG) - 2, timeout=9), stream.log(), stream.exit_code]
        stream.close()
        transport.close()
        return answers

    recorded = record(tmp_path / "rec", session)
    (tmp_path / recorded[0]).unlink()
    assert replay(tmp_path / "rec", session) == recorded


def test_errors_come_again_with_their_class_message_and_log(tmp_path: Path) -> None:
    def session(transport: Transport) -> list[str]:
        told = []
        for ask in (
            lambda: transport.shell(["lose"]),
            lambda: transport.shell(["a\0b"]),
            lambda: transport.read("/nowhere"),
            lambda: transport.push({"/d/x": BIG}, timeout=9),
            lambda: transport.reconnect(0.1),
        ):
            with pytest.raises((DeviceLostError, DeviceFileError, DeviceSpaceError, ValueError)) as caught:
                ask()
            told.append(f"{type(caught.value).__name__} {getattr(caught.value, 'log', '')}")
        return told

    recorded = record(tmp_path / "rec", session, MemoryDevice(room=10))
    assert recorded[0] == "DeviceLostError kernel: unplugged"
    assert replay(tmp_path / "rec", session) == recorded


def test_a_replay_waits_for_nothing_and_needs_no_device(tmp_path: Path) -> None:
    def session(transport: Transport) -> None:
        transport.wait(1e6)
        transport.shell(["echo"], timeout=1e6)

    record(tmp_path / "rec", session)
    again = Replay(tmp_path / "rec")
    assert again.transport(0).address == "recorded://memory"
    session(again.transport(0))
    again.finish()


texts = st.text(alphabet=st.characters(exclude_characters="\0"), max_size=12)
paths = st.sampled_from(["/d/a", "/d/b", "/d/c"])
contents = st.one_of(st.binary(max_size=20), st.integers(500, 3000).map(lambda size: BIG[:1] + bytes(size)))
operations = st.one_of(
    st.tuples(st.just("echo"), st.lists(texts, max_size=3), st.dictionaries(texts, texts, max_size=2)),
    st.tuples(st.sampled_from(["cat", "read", "stat", "pull"]), paths),
    st.tuples(st.sampled_from(["put", "push", "push file"]), paths, contents),
    st.tuples(st.sampled_from(["clock", "fresh_name", "lose", "count", "start", "log", "exit"])),
    st.tuples(st.just("write"), contents),
    st.tuples(st.just("take"), st.integers(0, 30)),
)


def do(transport: Transport, steps: list[Any], folder: Path) -> list[Any]:
    """Do the steps; what came of each."""
    results: list[Any] = []
    stream = transport.start(["echo"], timeout=9)
    for step in steps:
        kind, rest = step[0], step[1:]
        try:
            if kind == "echo":
                value: Any = transport.shell(["echo", *rest[0]], env=rest[1])
            elif kind in ("cat", "lose", "count"):
                value = transport.shell([kind, *rest])
            elif kind == "put":
                value = transport.shell(["put", rest[0]], stdin=rest[1])
            elif kind == "push":
                value = transport.push({rest[0]: rest[1]}, timeout=9)
            elif kind == "push file":
                (folder / "local").write_bytes(rest[1])
                value = transport.push({rest[0]: folder / "local"}, timeout=9)
            elif kind == "pull":
                (folder / "pulled").unlink(missing_ok=True)
                value = transport.pull({rest[0]: folder / "pulled"}, timeout=9), (folder / "pulled").read_bytes()
            elif kind == "start":
                value = None
                stream = transport.start(["echo"], timeout=9)
            elif kind == "write":
                value = stream.write(rest[0], timeout=9)
            elif kind == "take":
                value = stream.read(rest[0], timeout=9)
            elif kind == "log":
                value = stream.log()
            elif kind == "exit":
                value = stream.exit_code
            else:
                value = getattr(transport, kind)(*rest)
        except (DeviceLostError, DeviceFileError) as error:
            value = type(error), str(error).replace(transport.address, "")
        results.append(value)
    return results


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(operations, max_size=12))
def test_any_sequence_of_operations_gives_the_same_answers_again(
    steps: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("property")
    recorded = record(folder / "rec", lambda transport: do(transport, steps, folder))
    answers = replay(folder / "rec", lambda transport: do(transport, steps, folder))
    for now, then in zip(answers, recorded, strict=True):
        if not (isinstance(then, tuple) and isinstance(then[0], type)):
            assert now == then
        else:  # messages have this host's paths taken out
            assert now[0] is then[0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(operations, min_size=1, max_size=8), other=st.lists(operations, min_size=1, max_size=8))
def test_any_other_sequence_is_refused(
    steps: list[Any], other: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("property")
    same = [s if s[0] != "push file" else ("push", *s[1:]) for s in steps]  # the device can't tell these apart
    record(folder / "rec", lambda transport: do(transport, steps, folder))
    if same == [s if s[0] != "push file" else ("push", *s[1:]) for s in other]:
        return
    with pytest.raises(ReplayError):
        replay(folder / "rec", lambda transport: do(transport, other, folder))


# --- what differs -----------------------------------------------------------------------------------------------------

DIFFERENCES: dict[str, tuple[Session, str]] = {
    "another word": (
        lambda t: t.shell(["run", "--perf", "high"], cwd="/d", env={"LD_LIBRARY_PATH": "/d"}, stdin=b"in"),
        "words[2]: 'high' instead of 'burst'",
    ),
    "a word more": (
        lambda t: t.shell(["run", "--perf", "burst", "-v"], cwd="/d", env={"LD_LIBRARY_PATH": "/d"}, stdin=b"in"),
        "words[3]: '-v', recorded was nothing",
    ),
    "another folder": (
        lambda t: t.shell(["run", "--perf", "burst"], cwd="/e", env={"LD_LIBRARY_PATH": "/d"}, stdin=b"in"),
        "cwd: '/e' instead of '/d'",
    ),
    "another environment": (
        lambda t: t.shell(["run", "--perf", "burst"], cwd="/d", env={"LD_LIBRARY_PATH": "/e"}, stdin=b"in"),
        "env['LD_LIBRARY_PATH']: '/e' instead of '/d'",
    ),
    "another input": (
        lambda t: t.shell(["run", "--perf", "burst"], cwd="/d", env={"LD_LIBRARY_PATH": "/d"}, stdin=b"ni"),
        "stdin: 'ni' instead of 'in'",
    ),
    "another limit": (
        lambda t: t.shell(["run", "--perf", "burst"], cwd="/d", env={"LD_LIBRARY_PATH": "/d"}, stdin=b"in", limit=9),
        "limit: 9 instead of",
    ),
    "another operation": (lambda t: t.clock(), "operation: clock instead of shell"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_difference_names_both_and_the_first_one_stays(name: str, tmp_path: Path) -> None:
    def session(transport: Transport) -> None:
        transport.clock()
        transport.shell(["run", "--perf", "burst"], cwd="/d", env={"LD_LIBRARY_PATH": "/d"}, stdin=b"in", timeout=5)
        transport.shell(["cat", "/x"])

    record(tmp_path / "rec", session)
    again = Replay(tmp_path / "rec")
    again.begin_test("")
    transport = again.transport(0)
    transport.clock()
    different, told = DIFFERENCES[name]
    with pytest.raises(ReplayError) as caught:
        different(transport)
    message = str(caught.value)
    assert told in message
    assert "operation 2 of 3 here" in message
    assert "recorded: shell run --perf burst" in message
    assert "record again" in message
    for ask in (lambda: transport.shell(["cat", "/x"]), transport.clock, again.finish):
        with pytest.raises(ReplayError, match="operation 2 of 3 here"):
            ask()


def test_pushed_content_and_what_a_stream_is_sent_are_compared(tmp_path: Path) -> None:
    def session(transport: Transport, change: int = 0) -> None:
        transport.push({"/d/in0": BIG[:-1] + bytes([change])}, timeout=9)
        transport.start(["agent"], timeout=9).write(BIG, timeout=9)

    record(tmp_path / "rec", session)
    replay(tmp_path / "rec", session)
    with pytest.raises(ReplayError, match=r"files\['/d/in0'\]: 2048 bytes with digest \w{12} instead of 2048 bytes"):
        replay(tmp_path / "rec", lambda transport: session(transport, 1))


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        (b"\xff" * 40, b"\xff" * 38 + b"ab", "stdin: 2 of 40 bytes differ from byte 38 on: b'ab' instead of"),
        (b"\xff" * 40, b"\xff" * 39, "stdin: 39 bytes instead of 40, which differ from byte 39 on: b'' instead of"),
        (b"\xff" * 40, b"text", "stdin: 'text' instead of 40 bytes"),
        (
            b"a\nb\n",
            b"a\nc\nd\n",
            "stdin line[1]: 'c' instead of 'b'\n  differs:  stdin line[2]: 'd', recorded was nothing",
        ),
        (b"a\nb\n", b"a\nb", "stdin: ends of lines"),
        (BIG, b"x", "stdin: 'x' instead of 2048 bytes with digest"),
    ],
)
def test_what_differs_in_content_is_shown(then: bytes, now: bytes, told: str, tmp_path: Path) -> None:
    record(tmp_path / "rec", lambda t: t.shell(["put", "/x"], stdin=then))
    with pytest.raises(ReplayError) as caught:
        replay(tmp_path / "rec", lambda t: t.shell(["put", "/x"], stdin=now))
    assert told in str(caught.value)


def test_asking_more_or_less_is_a_difference(tmp_path: Path) -> None:
    def session(transport: Transport) -> None:
        transport.shell(["cat", "/x"])
        transport.shell(["count"])

    record(tmp_path / "rec", session)
    with pytest.raises(ReplayError, match=r"more was asked than was recorded \(2 operations here\)"):
        replay(tmp_path / "rec", lambda t: (session(t), t.clock()))
    with pytest.raises(
        ReplayError, match=r"1 recorded operation was not asked again:\n  session, line \d+: shell count"
    ):
        replay(tmp_path / "rec", lambda t: t.shell(["cat", "/x"]))


def test_the_same_question_to_another_device_is_a_difference(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "rec")
    phones = [recording.transport(MemoryDevice(serial)) for serial in ("one", "two")]
    phones[1].shell(["count"])
    recording.close()
    again = Replay(tmp_path / "rec")
    assert [device.serial for device in again.devices] == ["one", "two"]
    with pytest.raises(ReplayError, match="device: number 0 instead of 1"):
        again.transport(0).shell(["count"])


def test_an_environment_value_is_compared_and_not_stored(tmp_path: Path) -> None:
    def session(transport: Transport, token: str = "s3cr3t-t0ken") -> None:
        transport.shell(["run"], env={"API_TOKEN": token})

    record(tmp_path / "rec", session, Silent())
    assert "s3cr3t" not in (tmp_path / "rec" / LOG).read_text()
    replay(tmp_path / "rec", session)
    with pytest.raises(ReplayError, match=r"env\['API_TOKEN'\]"):
        replay(tmp_path / "rec", lambda transport: session(transport, "other"))


class Silent(MemoryDevice):
    """Says nothing of the environment."""

    def shell(self, words: Any, **rest: Any) -> Any:
        return super().shell(words, **{**rest, "env": None})


# --- parts: tests in another order, or alone --------------------------------------------------------------------------


class Model:
    """What a plugin does for tests: opens the device and loads models once, whichever test comes first."""

    def __init__(self, session: Recording | Replay, transport: Transport) -> None:
        self.session, self.transport = session, transport
        self.loaded: dict[str, str] = {}

    def load(self, name: str) -> str:
        if name not in self.loaded:
            with part(self.transport, f"load {name}"):
                place = f"/d/{self.transport.fresh_name()}"
                with part(self.transport, "send the runtime"):
                    if "runtime" not in self.loaded:
                        self.loaded["runtime"] = self.transport.push({"/d/rt": b"runtime"}, timeout=9)["/d/rt"]
                self.transport.push({place: name.encode()}, timeout=9)
                self.loaded[name] = place
        return self.loaded[name]

    def test(self, nodeid: str, model: str) -> str:
        self.session.begin_test(nodeid)
        place = self.load(model)
        result = self.transport.shell(["echo", self.transport.fresh_name(), place]).text
        self.session.end_test("passed")
        self.session.begin_test("")
        return result


TESTS = {"t.py::test_a": "a", "t.py::test_b": "b", "t.py::test_a2": "a"}


def record_tests(folder: Path) -> dict[str, str]:
    recording = Recording(folder)
    plugin = Model(recording, recording.transport(MemoryDevice()))
    results = {nodeid: plugin.test(nodeid, model) for nodeid, model in TESTS.items()}
    plugin.transport.shell(["count"])
    recording.close("0")
    return results


@pytest.mark.parametrize(
    "chosen", [[2, 1, 0], [1], [2], [0, 2], [1, 2]], ids=["reversed", "second", "last", "two", "others"]
)
def test_tests_can_be_replayed_in_another_order_or_alone(chosen: list[int], tmp_path: Path) -> None:
    recorded = record_tests(tmp_path / "rec")
    again = Replay(tmp_path / "rec")
    plugin = Model(again, again.transport(0))
    for nodeid in [list(TESTS)[index] for index in chosen]:
        assert plugin.test(nodeid, TESTS[nodeid]) == recorded[nodeid]
    plugin.transport.shell(["count"])
    again.finish()


def test_a_test_that_was_not_recorded_is_named_with_those_that_were(tmp_path: Path) -> None:
    record_tests(tmp_path / "rec")
    again = Replay(tmp_path / "rec")
    with pytest.raises(
        ReplayError,
        match=r"t.py::test_c: nothing was recorded here:\n  asked:    fresh_name\n  recorded tests: t.py::test_a, t.py::test_b",
    ):
        Model(again, again.transport(0)).test("t.py::test_c", "a")


def test_a_test_that_uses_another_tests_leftovers_is_told_apart(tmp_path: Path) -> None:
    def run(session: Recording | Replay, transport: Transport, nodeids: list[str]) -> None:
        place = "/d/0"
        for nodeid in nodeids:
            session.begin_test(nodeid)
            if nodeid == "t.py::test_makes":
                place = f"/d/{transport.fresh_name()}"
            transport.shell(["cat", place])

    recording = Recording(tmp_path / "rec")
    run(recording, recording.transport(MemoryDevice()), ["t.py::test_makes", "t.py::test_uses"])
    recording.close()
    again = Replay(tmp_path / "rec")
    with pytest.raises(ReplayError, match=r"depends on t.py::test_makes, recorded before and not run this time"):
        run(again, again.transport(0), ["t.py::test_uses"])


def test_a_test_that_asks_less_is_named_at_the_end_unless_it_failed(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "rec")
    transport = recording.transport(MemoryDevice())
    recording.begin_test("t.py::test_a")
    transport.shell(["count"])
    transport.shell(["cat", "/a"])
    recording.close()

    def shortened() -> Replay:
        again = Replay(tmp_path / "rec")
        again.begin_test("t.py::test_a")
        again.transport(0).shell(["count"])
        return again

    with pytest.raises(ReplayError, match=r"t.py::test_a, line \d+: shell cat /a"):
        shortened().finish()
    shortened().finish(unfinished=["t.py::test_a"])


def test_what_a_full_replay_never_comes_to_is_named(tmp_path: Path) -> None:
    record_tests(tmp_path / "rec")
    again = Replay(tmp_path / "rec")
    for nodeid in TESTS:
        again.begin_test(nodeid)
    with pytest.raises(ReplayError, match=r"recorded operations were not asked again:\n(.*\n)*?  load a, line"):
        again.finish()


def test_the_same_part_again_gets_its_second_answers(tmp_path: Path) -> None:
    def session(transport: Transport) -> list[str]:
        counts = []
        for _ in range(3):
            with part(transport, "probe"):
                counts.append(transport.shell(["count"]).text)
        return counts

    assert record(tmp_path / "rec", session) == ["1", "2", "3"]
    assert replay(tmp_path / "rec", session) == ["1", "2", "3"]


def test_what_was_asked_the_second_time_is_no_answer_for_the_first(tmp_path: Path) -> None:
    def session(transport: Transport, asks: list[bool]) -> None:
        for ask in asks:
            with part(transport, "probe"):
                if ask:
                    transport.shell(["count"])

    record(tmp_path / "rec", lambda transport: session(transport, [False, True]))
    replay(tmp_path / "rec", lambda transport: session(transport, [False, True]))
    with pytest.raises(ReplayError, match="in 'probe': nothing was recorded here:"):
        replay(tmp_path / "rec", lambda transport: session(transport, [True, False]))


def test_threads_ask_each_in_their_own_order(tmp_path: Path) -> None:
    def session(transport: Transport) -> dict[str, list[str]]:
        results: dict[str, list[str]] = {}

        def ask(name: str) -> None:
            results[name] = [transport.shell(["echo", name, str(i)]).text for i in range(20)]
            results[name] += [transport.fresh_name() for _ in range(20)]

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("a", "b", "c")]
        for thread in threads:
            thread.start()
        ask("main")
        for thread in threads:
            thread.join()
        return results

    recorded = record(tmp_path / "rec", session)
    for _ in range(3):
        assert replay(tmp_path / "rec", session) == recorded


# --- what is of this host ---------------------------------------------------------------------------------------------


def test_a_note_of_this_host_is_neither_stored_nor_compared(tmp_path: Path) -> None:
    device = MemoryDevice()
    record(tmp_path / "rec", lambda t: t.shell(["put", "/o"], stdin=OfThisHost(b"pid 4711")), device)
    assert device.files["/o"] == b"pid 4711"
    assert "4711" not in (tmp_path / "rec" / LOG).read_text()
    replay(tmp_path / "rec", lambda t: t.shell(["put", "/o"], stdin=OfThisHost(b"pid 12")))
    with pytest.raises(ReplayError, match="stdin"):
        replay(tmp_path / "rec", lambda t: t.shell(["put", "/o"], stdin=b"pid 4711"))


def test_what_this_host_decided_is_decided_again(tmp_path: Path) -> None:
    record(tmp_path / "rec", lambda t: decided(t, "the dead", lambda: ["a", "b"]))
    assert replay(tmp_path / "rec", lambda t: decided(t, "the dead", lambda: [])) == ["a", "b"]
    assert decided(MemoryDevice(), "the dead", lambda: ["c"]) == ["c"]


def test_paths_and_hosts_stay_out(tmp_path: Path) -> None:
    local = tmp_path / "secret-project" / "model.bin"
    local.parent.mkdir()
    local.write_bytes(BIG)
    recording = Recording(tmp_path / "rec")
    transport = recording.transport(MemoryDevice(room=10))
    transport.describe({"soc": "SM8650", "where": transport.address}, "a device in memory")
    for ask in (
        lambda: transport.push({"/d/m": local}, timeout=9),
        lambda: transport.pull({"/d/m": local}, timeout=9),
        lambda: transport.shell(["lose"]),
    ):
        with pytest.raises((DeviceSpaceError, DeviceFileError, DeviceLostError)):
            ask()
    recording.close()
    text = (tmp_path / "rec" / LOG).read_text()
    assert "secret-project" not in text
    assert "labhost" not in text
    assert "<local file>" in text


def test_programs_are_known_by_digest_only(tmp_path: Path) -> None:
    library = tmp_path / "libQnnHtp.so"
    library.write_bytes(b"\x7fELF" + BIG)

    def session(transport: Transport) -> None:
        transport.push({"/d/lib": library, "/d/tool": library.read_bytes() + b"!", "/d/in": BIG}, timeout=9)

    record(tmp_path / "rec", session)
    assert [path.stat().st_size for path in (tmp_path / "rec" / "files").iterdir()] == [len(BIG)]
    replay(tmp_path / "rec", session)
    assert problems(read_session(tmp_path / "rec")) == []


# --- compiled models --------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_used_again_as_it_was(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    entry.mkdir()
    (entry / "model.ctx.onnx").write_bytes(b"wrapper")
    (entry / "model.bin").write_bytes(BIG)
    recording = Recording(tmp_path / "rec")
    for _ in range(2):
        recording.keep_artifact("f" * 64, entry)
    recording.close()
    assert sum(row["kind"] == "artifact" for row in lines(tmp_path / "rec")) == 1
    again = Replay(tmp_path / "rec")
    again.artifact("f" * 64, tmp_path / "new" / "folder")
    assert {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()} == {
        "model.ctx.onnx": b"wrapper",
        "model.bin": BIG,
    }
    with pytest.raises(FileExistsError):
        again.artifact("f" * 64, tmp_path / "new" / "folder")
    with pytest.raises(ReplayError, match="a compiled model was asked for that wasn't recorded"):
        again.artifact("0" * 64, tmp_path / "other")


def test_an_altered_compiled_model_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    entry.mkdir()
    (entry / "model.bin").write_bytes(BIG)
    recording = Recording(tmp_path / "rec")
    recording.keep_artifact("key", entry)
    recording.close()
    (stored,) = (tmp_path / "rec" / "files").iterdir()
    stored.write_bytes(BIG[:-1] + b"!")
    with pytest.raises(ReplayError, match="its digest differs"):
        Replay(tmp_path / "rec").artifact("key", tmp_path / "out" / "entry")
    assert list((tmp_path / "out").iterdir()) == []


# --- damaged and hostile recordings -----------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A recording with a bit of everything."""

    def session(transport: Transport) -> None:
        transport.shell(["put", "/big"], stdin=BIG)
        transport.shell(["cat", "/big"])
        transport.pull({"/big": tmp_path / "pulled"}, timeout=9)
        transport.clock()
        transport.fresh_name()
        transport.stat("/big")

    record(tmp_path / "rec", session)
    return tmp_path / "rec"


def test_an_altered_missing_or_exchanged_line_is_noticed(recorded: Path) -> None:
    log = recorded / LOG
    good = log.read_bytes()
    rows = good.splitlines(keepends=True)
    for altered in (
        good.replace(b'"code":0', b'"code":1', 1),
        b"".join(rows[:3] + rows[4:]),
        b"".join([*rows[:3], rows[4], rows[3], *rows[5:]]),
        b"".join(rows[1:]),
        good[:200] + b"\0" + good[200:],
    ):
        log.write_bytes(altered)
        with pytest.raises(ReplayError, match="not a recording as it was made"):
            Replay(recorded)
    for truncated in (b"", b"half a line", rows[0][:-1]):
        log.write_bytes(truncated)
        with pytest.raises(ReplayError, match="it is empty"):
            Replay(recorded)


@pytest.mark.parametrize("cut", range(1, 80, 7))
def test_whatever_is_cut_off_the_rest_can_be_replayed_and_that_is_said(recorded: Path, cut: int) -> None:
    log = recorded / LOG
    log.write_bytes(log.read_bytes()[:-cut])
    session = read_session(recorded)
    assert not session.ended
    assert any("killed" in problem for problem in problems(session))


def test_a_recording_that_ends_early_says_so_where_it_ends(recorded: Path) -> None:
    log = recorded / LOG
    rows = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(rows[:5]))
    transport = Replay(recorded).transport(0)
    transport.shell(["put", "/big"], stdin=BIG)
    transport.shell(["cat", "/big"])
    with pytest.raises(ReplayError, match="the recording is incomplete: the recorder was killed"):
        transport.fresh_name()


@pytest.mark.parametrize("damage", ["altered", "shorter", "missing", "link", "fifo"])
def test_a_damaged_file_is_never_answered_with(recorded: Path, damage: str, tmp_path: Path) -> None:
    (file,) = (recorded / "files").iterdir()
    assert DIGEST.fullmatch(file.name)
    if damage == "altered":
        file.write_bytes(BIG[:-1] + b"!")
    elif damage == "shorter":
        file.write_bytes(BIG[:-1])
    else:
        file.unlink()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(BIG)
        file.symlink_to(tmp_path / "elsewhere")
    if damage == "fifo":
        os.mkfifo(file)
    assert problems(read_session(recorded))
    transport = Replay(recorded).transport(0)
    transport.shell(["put", "/big"], stdin=BIG)
    with pytest.raises(ReplayError, match="the recording is damaged: files/"):
        transport.shell(["cat", "/big"])


def asked(rows: list[dict[str, Any]], op: str) -> dict[str, Any]:
    return next(row for row in rows if row["kind"] == "asked" and row["question"]["op"] == op)


HOSTILE: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "format": lambda rows: rows[0].update(format=2),
    "kind": lambda rows: rows[2].update(kind="exec"),
    "digest": lambda rows: asked(rows, "pull")["answer"]["/big"].update(sha256="../../../etc/passwd"),
    "size": lambda rows: asked(rows, "pull")["answer"]["/big"].update(size=-1),
    "other file": lambda rows: asked(rows, "pull").update(answer={"../../x": {"text": ""}}),
    "name": lambda rows: asked(rows, "fresh_name").update(answer="../../../../etc/a"),
    "clock": lambda rows: asked(rows, "clock").update(answer="now"),
    "huge clock": lambda rows: asked(rows, "clock").update(answer=10**400),
    "stat": lambda rows: asked(rows, "stat")["answer"].update(kind="device"),
    "code": lambda rows: asked(rows, "shell")["answer"].update(code=True),
    "stdout": lambda rows: asked(rows, "shell")["answer"].update(stdout={"text": "x" * 513}),
    "base64": lambda rows: asked(rows, "shell")["answer"].update(stdout={"base64": "%"}),
    "surrogate": lambda rows: asked(rows, "shell")["answer"].update(stdout={"text": "\ud800"}),
    "part": lambda rows: asked(rows, "clock").update(part=99),
    "device": lambda rows: asked(rows, "clock").update(device=-1),
    "stream": lambda rows: asked(rows, "clock").update(stream=1),
    "no answer": lambda rows: asked(rows, "clock").pop("answer"),
    "operation": lambda rows: asked(rows, "clock").update(question={"op": "__class__"}),
    "unhashable operation": lambda rows: asked(rows, "clock").update(question={"op": ["clock"]}),
    "error": lambda rows: asked(rows, "clock").update(error="Exception"),
    "errno": lambda rows: asked(rows, "clock").update(
        error={"class": "OSError", "message": "", "attributes": {"errno": "x"}}
    ),
    "artifact": lambda rows: rows.insert(
        2, {"kind": "artifact", "key": "k", "files": {"../../.ssh/authorized_keys": {"text": "x"}}, "executable": []}
    ),
    "second beginning": lambda rows: rows.insert(2, dict(rows[0])),
    "after the end": lambda rows: rows.append(asked(rows, "clock")),
    "thread": lambda rows: asked(rows, "clock").update(thread="0"),
    "times": lambda rows: asked(rows, "clock").update(took="long"),
}


def test_the_forger_can_make_a_good_one_too(recorded: Path) -> None:
    rewrite(recorded, lambda rows: asked(rows, "clock").update(answer=1.5))
    Replay(recorded)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_forged_recording_is_refused_before_anything_is_answered(name: str, recorded: Path) -> None:
    rewrite(recorded, HOSTILE[name])
    with pytest.raises(ReplayError):
        Replay(recorded)


@pytest.mark.parametrize("class_name", ["SystemExit", "KeyboardInterrupt", "ReplayError", "eval", "object"])
def test_only_known_errors_are_raised_again(class_name: str, recorded: Path) -> None:
    rewrite(
        recorded,
        lambda rows: asked(rows, "shell").update(error={"class": class_name, "message": "x", "attributes": {}}),
    )
    with pytest.raises(ReplayError, match=f"ended by {class_name}"):
        Replay(recorded).transport(0).shell(["put", "/big"], stdin=BIG)


def test_an_answer_of_the_wrong_shape_is_never_taken_for_another(tmp_path: Path) -> None:
    record(tmp_path / "rec", lambda t: t.push({"/d/x": BIG}, timeout=9))
    rewrite(tmp_path / "rec", lambda rows: asked(rows, "push").update(answer={"/d/x": "0" * 64}))
    with pytest.raises(ReplayError, match="digests of the pushed files"):
        Replay(tmp_path / "rec")


def test_there_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="there is no recording"):
        Replay(tmp_path / "nowhere")
    (tmp_path / "folder" / LOG).mkdir(parents=True)
    with pytest.raises(ReplayError):
        Replay(tmp_path / "folder")


# --- where and when ---------------------------------------------------------------------------------------------------


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path, recorded: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    check_folder(tmp_path / "empty")
    check_folder(tmp_path / "new")
    for folder, told in (("photos", r"cat\.jpg"), ("rec", "there is a recording of 20"), ("file", "can't go there")):
        with pytest.raises(OptionError, match=told):
            check_folder(tmp_path / folder)
        with pytest.raises(OptionError, match=told):
            Recording(tmp_path / folder)


def test_one_process_and_one_of_both(tmp_path: Path) -> None:
    check_possible(None, None, parallel=True)
    check_possible(tmp_path / "new", None, parallel=False)
    with pytest.raises(OptionError, match="--qnn-record and -n"):
        check_possible(tmp_path / "new", None, parallel=True)
    with pytest.raises(OptionError, match="--qnn-replay and -n"):
        check_possible(None, tmp_path / "new", parallel=True)
    with pytest.raises(OptionError, match="both given"):
        check_possible(tmp_path / "a", tmp_path / "b", parallel=False)


def test_a_full_disk_stops_the_tests_and_what_is_there_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = MemoryDevice()
    recording = Recording(tmp_path / "rec")
    transport = recording.transport(device)
    transport.shell(["count"])
    write = os.write

    def full(handle: int, data: Any) -> int:
        if len(data) < 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, bytes(data[:50]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RecordingError, match=r"can't be recorded any further \(No space left on device\)"):
            transport.shell(["put", "/x"], stdin=b"1")
    before = device.asked
    with pytest.raises(RecordingError, match="No space left"):
        transport.shell(["put", "/x"], stdin=b"2")
    assert device.asked == before
    recording.begin_test("t.py::test_a")
    recording.let_through()
    assert transport.shell(["cat", "/x"]).text == "1"
    with pytest.raises(RecordingError, match="No space left"):
        recording.close()
    again = Replay(tmp_path / "rec").transport(0)
    again.shell(["count"])
    with pytest.raises(ReplayError, match="incomplete"):
        again.shell(["put", "/x"], stdin=b"1")


def test_a_really_full_disk_while_a_file_is_stored(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "rec")
    transport = recording.transport(MemoryDevice())
    (tmp_path / "rec" / "files").rmdir()
    (tmp_path / "rec" / "files").symlink_to("/dev/full/nothing")
    with pytest.raises(RecordingError, match="can't be recorded any further"):
        transport.push({"/d/x": BIG}, timeout=9)


def test_a_pushed_file_that_changes_meanwhile_is_not_recorded_as_something_else(tmp_path: Path) -> None:
    local = tmp_path / "model.bin"
    local.write_bytes(BIG)

    class Changing(MemoryDevice):
        def push(self, files: Any, **rest: Any) -> dict[str, str]:
            local.write_bytes(BIG[::-1])
            return super().push(files, **rest)

    with pytest.raises(RecordingError, match="changed meanwhile"):
        record(tmp_path / "rec", lambda t: t.push({"/d/x": local}, timeout=9), Changing())


def test_ctrl_c_comes_through_and_can_not_be_replayed(tmp_path: Path) -> None:
    class Interrupted(MemoryDevice):
        def read(self, path: str, **rest: Any) -> bytes:
            raise KeyboardInterrupt

    recording = Recording(tmp_path / "rec")
    with pytest.raises(KeyboardInterrupt):
        recording.transport(Interrupted()).read("/x")
    recording.close("2")
    with pytest.raises(ReplayError, match="it was ended by KeyboardInterrupt"):
        Replay(tmp_path / "rec").transport(0).read("/x")


def test_after_kill_9_everything_up_to_there_can_be_replayed(tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from pytest_qnn.recording import Recording
        from tests.devices.memory_device import MemoryDevice
        transport = Recording(Path(sys.argv[1])).transport(MemoryDevice())
        number = 0
        while True:
            transport.push({f"/d/{number}": number.to_bytes(4, "big") * 500}, timeout=9)
            number += 1
            if number % 50 == 0:
                print(number, flush=True)
        """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "rec")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    told = [int(child.stdout.readline()) for _ in range(4)][-1]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    session = read_session(tmp_path / "rec")
    assert session.operations >= told
    found = problems(session)
    assert len(found) == 1
    assert "killed" in found[0]
    again = Replay(tmp_path / "rec")
    for number in range(told):
        again.transport(0).push({f"/d/{number}": number.to_bytes(4, "big") * 500}, timeout=9)
