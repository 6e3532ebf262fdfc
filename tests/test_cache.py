"""Compiled models are kept: made once, checked, bounded, and never in the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from filelock import FileLock

from pytest_qnn.artifacts.cache_folder import CacheFolder
from pytest_qnn.artifacts.content_cache import CacheDamagedWarning, CacheUnusableWarning, ContentCache, Entry
from pytest_qnn.backend import Backend
from pytest_qnn.bench import Bench
from pytest_qnn.cli import main
from pytest_qnn.errors import CompileError, PlacementError, RuntimeCrashError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.settings import Settings
from tests import small_models
from tests.conftest import needs_simulator

Run = Callable[..., pytest.RunResult]

TWO = """
import pytest
from pytest_qnn import *

@pytest.fixture(scope="module", params=["conv.qdq.onnx", "conv.onnx"])
def session(request, qnn_backend):
    return qnn_backend.load(request.param)

def test_accuracy(session, qnn_inputs):
    assert assert_matches_reference(session.run(qnn_inputs(session))).ok
"""


def report(folder: Path, name: str) -> dict[str, int]:
    return json.loads((folder / name).read_text())["run"]["artifacts"]


@pytest.fixture
def open_bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """A bench on the test's own cache; each call is like a pytest process of its own."""
    needs_simulator()
    benches: list[Bench] = []

    def make(**settings: object) -> Bench:
        benches.append(Bench(Settings(cache_dir=tmp_path / "cache", **settings)))  # type: ignore[arg-type]
        return benches[-1]

    yield make
    for bench in benches:
        bench.close()


def htp(bench: Bench) -> Backend:
    return bench.backend(BackendRequest("htp"))


def contexts(bench: Bench) -> list[Entry]:
    return list(bench.cache.contexts.entries())


# --- compiled once -------------------------------------------------------------------------------------------------------


def test_a_warm_run_compiles_nothing_and_says_so(project: Run, pytester: pytest.Pytester) -> None:
    cold = project(TWO, "--qnn-json=cold.json")
    cold.assert_outcomes(passed=2)
    cold.stdout.fnmatch_lines(["models: 3 compiled, 0 from the cache"])  # the third is the probe of the float precision
    warm = project(TWO, "--qnn-json=warm.json")
    warm.assert_outcomes(passed=2)
    warm.stdout.fnmatch_lines(["models: 0 compiled, 3 from the cache"])
    assert report(pytester.path, "cold.json") == {"compiled": 3, "reused": 0, "rebuilt": 0, "in_memory": 0}
    assert report(pytester.path, "warm.json") == {"compiled": 0, "reused": 3, "rebuilt": 0, "in_memory": 0}
    records = json.loads((pytester.path / "warm.json").read_text())["records"]
    assert {r["provenance"]["artifact"]["source"] for r in records} == {"cache"}


def test_workers_that_want_the_same_compile_it_once(project: Run, pytester: pytest.Pytester) -> None:
    text = TWO.replace('params=["conv.qdq.onnx", "conv.onnx"]', "params=range(4)")
    text = text.replace("qnn_backend.load(request.param)", 'qnn_backend.load("conv.qdq.onnx")')
    project(text, "-n2", "--qnn-json=two.json").assert_outcomes(passed=4)
    assert report(pytester.path, "two.json")["compiled"] == 2  # the model and the probe, for both workers together


def test_without_the_cache_everything_is_compiled_and_nothing_kept(project: Run, pytester: pytest.Pytester) -> None:
    for name in ("first.json", "second.json"):
        project(TWO, "--qnn-no-cache", f"--qnn-json={name}").assert_outcomes(passed=2)
        assert report(pytester.path, name) == {"compiled": 3, "reused": 0, "rebuilt": 0, "in_memory": 0}
    assert not (pytester.path / "cache").exists()


def test_from_the_cache_or_in_memory_the_outputs_are_the_same(open_bench: Callable[..., Bench], models: Path) -> None:
    runs = []
    for settings in ({}, {}, {"no_cache": True}):
        session = htp(open_bench(**settings)).load(models / "conv.qdq.onnx")
        runs.append((session.artifact.source, session.artifact.kind, session.run(seeded_inputs(session)).output()))
        assert session.placement.backend
    assert [source for source, _, _ in runs] == ["compiled", "cache", "compiled"]
    assert [kind for _, kind, _ in runs] == ["context binary", "context binary", "compiled in memory"]
    assert np.array_equal(runs[0][2], runs[1][2])
    assert np.array_equal(runs[0][2], runs[2][2])


def test_everything_that_decides_the_artifact_decides_the_entry(
    open_bench: Callable[..., Bench], models: Path, tmp_path: Path
) -> None:
    bench = open_bench()
    backend = htp(bench)
    dynamic = small_models.unary(tmp_path / "dynamic.onnx", "Relu", shape=("batch", 16))

    def new(load: Callable[[], object]) -> int:
        before = len(contexts(bench))
        load()
        return len(contexts(bench)) - before

    assert new(lambda: backend.load(models / "conv.qdq.onnx")) == 2  # and the probe
    assert new(lambda: backend.load(models / "conv.qdq.onnx")) == 0
    assert new(lambda: backend.load(models / "conv.qdq.onnx", htp_performance_mode="burst")) == 0, "only how it is run"
    assert new(lambda: backend.load(models / "conv.qdq.onnx", vtcm_mb=4)) == 1
    assert new(lambda: backend.load(models / "conv.qdq.onnx", soc="SM8550")) == 2  # and that SoC's probe
    assert new(lambda: backend.load(models / "conv.onnx")) == 1
    assert new(lambda: backend.load(dynamic, dimensions={"batch": 1})) == 1
    assert new(lambda: backend.load(dynamic, dimensions={"batch": 2})) == 1


def test_a_split_model_comes_from_the_cache_with_its_reasons(open_bench: Callable[..., Bench], tmp_path: Path) -> None:
    from onnx import helper

    file = small_models.save(
        tmp_path / "split.onnx",
        [
            helper.make_node("Relu", ["x"], ["a"], name="first"),
            helper.make_node("Det", ["a"], ["d"], name="det"),
            helper.make_node("Mul", ["a", "d"], ["y"], name="last"),
        ],
        {"x": [1, 4, 4]},
        {"y": [1, 4, 4]},
    )
    sessions = [htp(open_bench()).load(file, allow_cpu=["Det"]) for _ in range(2)]
    assert [s.artifact.source for s in sessions] == ["compiled", "cache"]
    assert [s.artifact.partitions for s in sessions] == [2, 2]
    for session in sessions:
        (det,) = session.placement.misplaced
        assert (det.name, det.op_type) == ("det", "Det")
        assert "gave no reason" not in det.reason
    x = seeded_inputs(file, 1)[0]
    assert np.array_equal(sessions[0].run(x).output(), sessions[1].run(x).output())


def test_what_cannot_be_compiled_is_not_kept(open_bench: Callable[..., Bench], tmp_path: Path) -> None:
    bench = open_bench()
    with pytest.raises(PlacementError, match="none of the model's 1 nodes"):
        htp(bench).load(small_models.unary(tmp_path / "det.onnx", "Det", shape=(1, 4, 4)))
    with pytest.raises(RuntimeCrashError):
        htp(bench).load(small_models.crashes_while_compiling(tmp_path / "stft.onnx"))
    assert contexts(bench) == []
    left = [f for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.suffix != ".lock"]
    assert left == []


def test_a_model_that_cannot_become_a_context_is_compiled_each_time_and_the_cache_is_not_blamed(
    open_bench: Callable[..., Bench], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    bench = open_bench()
    # Mish is a function of other operators
    mish = small_models.unary(tmp_path / "rewrite.onnx", "Relu", "Mish", "Relu", opset=18)
    session = htp(bench).load(mish, allow_cpu=True)
    assert session.artifact.kind == "compiled in memory"
    assert any("rewrite.onnx can't be kept compiled, and is compiled each time" in note for note in session.notes)
    assert [w for w in recwarn if issubclass(w.category, CacheUnusableWarning)] == []


# --- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", ["flipped byte", "truncated", "no binary", "no manifest", "broken manifest", "empty"]
)
def test_a_damaged_entry_is_made_again_and_reported(
    open_bench: Callable[..., Bench], models: Path, damage: str
) -> None:
    session = htp(open_bench()).load(models / "conv.qdq.onnx")
    expected = session.run(seeded_inputs(session, 1)[0]).output()
    assert session.artifact.path is not None
    folder = Path(session.artifact.path).parent
    binary, manifest = next(folder.glob("*.bin")), next(folder.glob("*.json"))
    content = bytearray(binary.read_bytes())
    match damage:
        case "flipped byte":
            content[len(content) // 2] ^= 1
            binary.write_bytes(content)
        case "truncated":
            binary.write_bytes(content[:-1])
        case "no binary":
            binary.unlink()
        case "no manifest":
            manifest.unlink()
        case "broken manifest":
            manifest.write_text("{")
        case "empty":
            for file in folder.iterdir():
                file.write_bytes(b"")
    bench = open_bench()
    with pytest.warns(CacheDamagedWarning, match="thrown away and is made again"):
        again = htp(bench).load(models / "conv.qdq.onnx")
    assert bench.artifacts["rebuilt"] == 1
    assert again.artifact.source == "compiled"
    assert np.array_equal(again.run(seeded_inputs(again, 1)[0]).output(), expected)


def test_damage_is_told_at_the_end_of_a_run(project: Run, pytester: pytest.Pytester) -> None:
    project(TWO).assert_outcomes(passed=2)
    for binary in (pytester.path / "cache" / "contexts").rglob("*.bin"):
        binary.write_bytes(b"\0" * 100)
    result = project(TWO, "--qnn-json=again.json")
    result.assert_outcomes(passed=2, warnings=3)
    result.stdout.fnmatch_lines(["cache: 3 damaged entries were thrown away and compiled again"])
    assert report(pytester.path, "again.json") == {"compiled": 3, "reused": 0, "rebuilt": 3, "in_memory": 0}


def test_an_entry_that_goes_while_it_is_used_is_made_again(open_bench: Callable[..., Bench], models: Path) -> None:
    bench = open_bench()
    session = htp(bench).load(models / "conv.qdq.onnx")
    sample = seeded_inputs(session, 1)[0]
    expected = session.run(sample).output()
    for entry in contexts(bench):
        assert bench.cache.contexts.remove(entry)
    bench.pool.close()  # as after a crash: the next run loads again
    assert np.array_equal(session.run(sample).output(), expected)
    assert session.loads == 2


# --- places that can't be written ------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, models: Path) -> None:
    needs_simulator()
    (tmp_path / "file").write_text("in the way")
    bench = Bench(Settings(cache_dir=tmp_path / "file" / "cache"))
    try:
        with pytest.warns(CacheUnusableWarning, match="cache of compiled models .* can't be used"):
            session = htp(bench).load(models / "conv.qdq.onnx")
        assert session.artifact.kind == "compiled in memory"
        assert bench.artifacts["compiled"] == 2
    finally:
        bench.close()


FULL_DISK = """
import resource, sys, warnings
from pathlib import Path
from pytest_qnn.bench import Bench
from pytest_qnn.markers import BackendRequest
from pytest_qnn.settings import Settings
from pytest_qnn.model.inputs import seeded_inputs

bench = Bench(Settings(cache_dir=Path(sys.argv[2])))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))  # inherited by the runtime process
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    session = bench.backend(BackendRequest("htp")).load(sys.argv[1])
    session.run(seeded_inputs(session))
bench.close()
print(session.artifact.kind, "|", *[str(w.message) for w in caught])
"""


def test_a_disk_that_is_full_is_done_without(tmp_path: Path, models: Path) -> None:
    """A limit on file sizes fails writes as a full disk does; the context of this model has 53,248 bytes."""
    needs_simulator()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(models / "conv.qdq.onnx"), str(tmp_path / "cache"), "20000"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("compiled in memory | the cache of compiled models"), done.stdout
    left = [f for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.suffix != ".lock"]
    assert left == []


def test_a_cache_that_cannot_be_written_any_more_serves_what_it_has(
    open_bench: Callable[..., Bench], models: Path, tmp_path: Path
) -> None:
    htp(open_bench()).load(models / "conv.qdq.onnx")
    for lock in (tmp_path / "cache").rglob("*.lock"):
        lock.unlink()
        lock.mkdir()  # not even root can lock this
    bench = open_bench()
    assert htp(bench).load(models / "conv.qdq.onnx").artifact.source == "cache"
    assert (bench.artifacts["reused"], bench.artifacts["compiled"]) == (2, 0)


# --- kill -9 and locks -----------------------------------------------------------------------------------------------------

LOADS = """
import sys
from pathlib import Path
from pytest_qnn.bench import Bench
from pytest_qnn.markers import BackendRequest
from pytest_qnn.settings import Settings

bench = Bench(Settings(cache_dir=Path(sys.argv[2])))
print("go", flush=True)
session = bench.backend(BackendRequest("htp")).load(sys.argv[1])
print(session.artifact.source, flush=True)
bench.close()
"""


def loading(model: Path, cache: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", LOADS, str(model), str(cache)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_nothing_that_could_be_taken_for_an_entry(tmp_path: Path, models: Path) -> None:
    needs_simulator()
    cache, model = tmp_path / "cache", models / "conv.qdq.onnx"
    for i in range(8):
        process = loading(model, cache)
        time.sleep(0.15 * i)
        kill(process)
        folder = CacheFolder(cache, 100)
        for entry in folder.contexts.entries():
            folder.contexts.read(entry)  # whole, or not there
    last = loading(model, cache)
    assert last.stdout is not None
    assert last.stdout.read().strip() in ("compiled", "cache")
    assert last.wait() == 0
    last.stdout.close()
    assert CacheFolder(cache, 100).contexts.sweep() == 0, "whoever made the entry removed what the killed ones left"


def test_who_was_killed_while_compiling_blocks_nobody(tmp_path: Path) -> None:
    needs_simulator()
    model, cache = small_models.compiles_for_long(tmp_path / "long.onnx"), tmp_path / "cache"
    process = loading(model, cache)
    while not list(cache.glob("contexts/??/*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    runtime = psutil.Process(process.pid).children()
    kill(process)
    psutil.wait_procs(runtime, timeout=10)
    folder = CacheFolder(cache, 100)
    assert list(folder.contexts.entries()) == []
    assert folder.contexts.sweep() == 1, "the lock is free, and the draft goes"


def read_text(entry: Path) -> str:
    return entry.read_text()


def test_who_waits_too_long_does_without(tmp_path: Path) -> None:
    cache, started, go_on = ContentCache(tmp_path, "texts", read_text), threading.Event(), threading.Event()

    def slow(path: Path) -> None:
        started.set()
        go_on.wait(30)
        path.write_text("made")

    thread = threading.Thread(target=lambda: cache.get("ab" * 32, slow, 10))
    thread.start()
    started.wait(30)
    assert cache.get("ab" * 32, lambda path: pytest.fail("one maker at a time"), 0.1) is None
    go_on.set()
    thread.join()
    assert cache.get("ab" * 32, lambda path: pytest.fail("it is there"), 0.1) == "made"


def test_an_error_of_the_maker_is_the_callers_and_leaves_nothing(tmp_path: Path) -> None:
    cache = ContentCache(tmp_path, "texts", read_text)

    def broken(path: Path) -> None:
        path.write_text("half")
        raise CompileError("refused")

    with pytest.raises(CompileError, match="refused"):
        cache.get("ab" * 32, broken, 10)
    assert [f.suffix for f in tmp_path.rglob("*") if f.is_file()] == [".lock"]


def test_what_a_killed_maker_left_goes_when_the_entry_is_made(tmp_path: Path) -> None:
    cache = ContentCache(tmp_path, "texts", read_text)
    left = tmp_path / "ab" / f"{'ab' * 32}.x1y2.part"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    assert cache.get("ab" * 32, lambda path: path.write_text("made") and None, 10) == "made"
    assert not left.exists()


def test_a_stopped_maker_is_waited_for_once(tmp_path: Path) -> None:
    cache, holder = ContentCache(tmp_path, "texts", read_text), FileLock(tmp_path / "ab" / f"{'ab' * 32}.lock")
    (tmp_path / "ab").mkdir()
    with holder:
        assert cache.get("ab" * 32, lambda path: pytest.fail("it is locked"), 0.2) is None
        start = time.monotonic()
        assert cache.get("ab" * 32, lambda path: pytest.fail("it is locked"), 60) is None
        assert time.monotonic() - start < 30


def test_a_folder_that_has_other_things_in_it_keeps_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = [tmp_path / "contexts" / "v2" / "classifier.bin", tmp_path / "contexts" / "v2" / "poetry.lock"]
    mine += [tmp_path / "references" / "v1" / "golden.npz", tmp_path / "contexts" / "v2" / "x.part"]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"mine")
        os.utime(file, (1, 1))
    for action in ("verify", "prune", "clear"):
        assert main(["cache", action, "--cache-dir", str(tmp_path)]) == 0
    assert all(file.read_bytes() == b"mine" for file in mine)


def test_a_session_whose_entry_cannot_be_put_back_is_compiled_in_memory(
    open_bench: Callable[..., Bench], models: Path, tmp_path: Path
) -> None:
    bench = open_bench()
    session = htp(bench).load(models / "conv.qdq.onnx")
    sample = seeded_inputs(session, 1)[0]
    expected = session.run(sample).output()
    bench.pool.close()
    for entry in contexts(bench):
        bench.cache.contexts.remove(entry)
    for lock in (tmp_path / "cache").rglob("*.lock"):
        lock.unlink()
        lock.mkdir()
    with pytest.warns(CacheUnusableWarning):
        assert np.array_equal(session.run(sample).output(), expected)


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(open_bench: Callable[..., Bench], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two compiled models and a reference result, as the setting of the current folder's project."""
    bench = open_bench()
    htp(bench).load(models / "conv.qdq.onnx", vtcm_mb=4)
    bench.reference(models / "conv.onnx").run(seeded_inputs(models / "conv.onnx", 1)[0])
    bench.close()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest_qnn]\ncache_dir = 'cache'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "cache"


def test_list_tells_what_is_kept(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"conv\.qdq\.onnx +SM8650 +vtcm_mb=4 +0\.05 ", out)
    assert "2 compiled models, 1 reference result" in out
    assert main(["cache", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [e["about"].get("model") for e in listed["entries"] if e["kind"] == "contexts"] != []
    assert listed["bytes"] == sum(f.stat().st_size for f in filled.rglob("*") if f.is_file() and f.suffix != ".lock")


def test_verify_removes_what_is_damaged(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify"]) == 0
    assert "3 entries good, 0 damaged" in capsys.readouterr().out
    binary = next(filled.rglob("*.bin"))
    binary.write_bytes(binary.read_bytes()[:-1])
    next(filled.rglob("*.npz")).write_bytes(b"PK")
    assert main(["cache", "verify"]) == 1
    out = capsys.readouterr().out
    assert "altered or truncated" in out
    assert "1 entry good, 2 damaged" in out
    assert main(["cache", "verify"]) == 0


def test_prune_keeps_the_most_recently_used(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = sorted(CacheFolder(filled, 1).contexts.entries(), key=lambda e: e.key)
    os.utime(entries[0].path, (1, 1))
    assert main(["cache", "prune", "--cache-limit-mb", str((entries[1].size + 20_000) / 2**20)]) == 0
    assert "1 entry removed" in capsys.readouterr().out
    assert [e.key for e in CacheFolder(filled, 1).contexts.entries()] == [entries[1].key]


def test_a_run_brings_the_cache_to_its_size(project: Run, pytester: pytest.Pytester) -> None:
    project(TWO, "--qnn-cache-limit-mb=0.06").assert_outcomes(passed=2)
    folder = CacheFolder(pytester.path / "cache", 1)
    assert sum(e.size for kind in folder.kinds.values() for e in kind.entries()) <= 0.06 * 2**20


def test_clear_removes_everything(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear"]) == 0
    assert "3 entries removed" in capsys.readouterr().out
    assert [f for f in filled.rglob("*") if f.is_file() and f.suffix != ".lock"] == []
    assert main(["cache", "list"]) == 0
    assert "0 compiled models, 0 reference results" in capsys.readouterr().out


# --- compile -----------------------------------------------------------------------------------------------------------


def test_compile_makes_a_checked_artifact_for_each_soc(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_simulator()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest_qnn]\ncache_dir = 'cache'\n")
    monkeypatch.chdir(tmp_path)
    arguments = ["compile", str(models / "conv.qdq.onnx"), "--soc", "SM8550,sm8650", "--output", "made"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "SM8550 (v73)" in out
    assert "SM8650 (v75)" in out
    assert "compiled in" in out
    assert sorted(f.name for f in (tmp_path / "made").iterdir()) == [
        f"conv.qdq.{soc}.{end}" for soc in ("SM8550", "SM8650") for end in ("bin", "ctx.onnx", "ctx.onnx.json")
    ]
    assert main(arguments) == 0
    assert "from the cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["missing.onnx", "--output", "made"], 2, "there is no such file"),
        (["{model}", "--output", "made", "--soc", "SM9999"], 2, "unknown SoC 'SM9999'"),
        (["{model}", "--output", "made", "--soc", ","], 2, "name at least one SoC"),
        (["{model}", "--output", "made", "--option", "vtcm=8"], 2, "Did you mean 'vtcm_mb'?"),
        (["{model}", "--output", "made", "--option", "vtcm_mb"], 2, "expected NAME=VALUE"),
        (["{model}", "--output", "made", "--option", "soc=SM8550"], 2, "say it as the setting soc"),
        (["{model}", "--output", "made", "--dimensions", "batch=x"], 2, "expected whole numbers"),
        (["{model}", "--output", "pyproject.toml"], 2, "can't be written"),
    ],
)
def test_mistakes_in_compile(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    needs_simulator()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest_qnn]\ncache_dir = 'cache'\n")
    monkeypatch.chdir(tmp_path)
    assert main(["compile", *(a.format(model=models / "conv.onnx") for a in arguments)]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_float_model_for_a_soc_that_takes_none_says_so_and_the_others_are_made(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_simulator()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest_qnn]\ncache_dir = 'cache'\n")
    monkeypatch.chdir(tmp_path)
    assert main(["compile", str(models / "conv.onnx"), "--soc", "QCS6490,SM8650", "--output", "made"]) == 1
    captured = capsys.readouterr()
    assert "QCS6490 takes quantised models only" in captured.err
    assert [f.name for f in (tmp_path / "made").glob("*.bin")] == ["conv.SM8650.bin"]
