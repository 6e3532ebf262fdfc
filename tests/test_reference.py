"""The reference: computed once per model and input, shared, and safe against what happens to files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pytest_qnn.artifacts.array_cache import ArrayCache
from pytest_qnn.artifacts.content_cache import CacheUnusableWarning, prune
from pytest_qnn.bench import Bench
from pytest_qnn.model.inputs import seeded_inputs
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.settings import Settings

Arrays = Mapping[str, np.ndarray[Any, Any]]


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.npz"))


class Counted:
    """Something to compute that counts how often it was."""

    def __init__(self, value: float = 1.0, size: int = 4) -> None:
        self.calls, self.value, self.size = 0, value, size

    def __call__(self) -> Arrays:
        self.calls += 1
        return {"y": np.full(self.size, self.value, np.float32)}


KEY = "ab" + "0" * 62


def test_the_reference_is_onnxruntimes_cpu_result(bench: Bench, models: Path) -> None:
    import onnxruntime as ort

    (x,) = seeded_inputs(models / "conv.qdq.onnx", 1)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(str(models / "conv.qdq.onnx"), options, providers=["CPUExecutionProvider"])
    assert np.array_equal(bench.reference(models / "conv.qdq.onnx").run(x)["y"], plain.run(None, x)[0])


def test_a_second_bench_finds_what_the_first_computed(models: Path, tmp_path: Path) -> None:
    inputs = seeded_inputs(models / "conv.onnx", 2)
    counts = []
    for _ in range(2):
        bench = Bench(Settings(cache_dir=tmp_path))
        try:
            for x in inputs:
                bench.reference(models / "conv.onnx").run(x)
            counts.append((bench.references._cache.misses, bench.references._cache.hits))
        finally:
            bench.close()
    assert counts == [(2, 0), (0, 2)]


def test_level_input_and_model_decide_the_entry(bench: Bench, models: Path) -> None:
    folder, runner = bench.references._cache.folder, bench.references
    model, other = read_model(models / "conv.onnx"), read_model(models / "conv.qdq.onnx")
    x, z = seeded_inputs(models / "conv.onnx", 2, seed=77)
    before = len(entries(folder))
    for m, i, level in (
        (model, x, "ORT_DISABLE_ALL"),
        (model, x, "ORT_ENABLE_ALL"),
        (model, z, "ORT_DISABLE_ALL"),
        (other, x, "ORT_DISABLE_ALL"),
        (model, x, "ORT_DISABLE_ALL"),
    ):
        runner.run(m, i, level)
    assert len(entries(folder)) == before + 4


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_entry_is_computed_again(tmp_path: Path, damage: str) -> None:
    cache, compute = ArrayCache(tmp_path), Counted(size=1000)
    cache.compute(KEY, compute, 10)
    (entry,) = entries(tmp_path)
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 0xFF
    entry.write_bytes(
        {"truncated": entry.read_bytes()[:-50], "flipped": bytes(content), "empty": b"", "text": b"hello"}[damage]
    )
    assert np.array_equal(cache.compute(KEY, compute, 10)["y"], np.ones(1000, np.float32))
    assert compute.calls == 2
    cache.compute(KEY, compute, 10)
    assert compute.calls == 2, "the new entry is good"


def test_an_entry_copied_to_another_name_or_without_an_array_is_computed_again(tmp_path: Path) -> None:
    cache, other = ArrayCache(tmp_path), Counted(size=7)
    cache.compute(KEY, Counted(size=5), 10)
    (entry,) = entries(tmp_path)
    moved = cache.path("cd" * 32)
    moved.parent.mkdir()
    shutil.copy(entry, moved)
    assert cache.compute("cd" * 32, other, 10)["y"].shape == (7,)
    with zipfile.ZipFile(entry) as whole, zipfile.ZipFile(tmp_path / "part.npz", "w") as part:
        part.writestr("contents.npy", whole.read("contents.npy"))
    shutil.move(tmp_path / "part.npz", entry)
    assert cache.compute(KEY, Counted(size=5), 10)["y"].shape == (5,)


def test_threads_that_want_the_same_compute_it_once(tmp_path: Path) -> None:
    compute, together = Counted(), threading.Barrier(4)

    def ask() -> None:
        cache = ArrayCache(tmp_path)
        together.wait()
        cache.compute(KEY, compute, 10)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compute.calls == 1


HOLDER = """
import sys, time
from pathlib import Path
from pytest_qnn.artifacts.array_cache import ArrayCache
def compute():
    print("computing", flush=True)
    time.sleep(60)
ArrayCache(Path(sys.argv[1])).compute(sys.argv[2], compute, 10)
"""


def test_a_process_killed_while_it_computes_blocks_nobody(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), KEY], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "computing\n"
    compute = Counted()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    ArrayCache(tmp_path).compute(KEY, compute, 30)
    assert compute.calls == 1
    assert len(entries(tmp_path)) == 1


def test_who_waits_too_long_for_another_computes_itself(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), KEY], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "computing\n"
        compute = Counted()
        ArrayCache(tmp_path).compute(KEY, compute, 0.2)
        assert compute.calls == 1
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout:
            holder.stdout.close()


def test_a_folder_that_cannot_be_written_is_done_without_and_said_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    cache, compute = ArrayCache(file / "cache"), Counted()
    with pytest.warns(CacheUnusableWarning, match="can't be used .* made anew each time") as caught:
        for _ in range(2):
            assert cache.compute(KEY, compute, 10)["y"].tolist() == [1, 1, 1, 1]
    assert compute.calls == 2
    assert len(caught) == 1


def test_a_full_disk_leaves_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(CacheUnusableWarning, match="No space left on device"):
        ArrayCache(tmp_path).compute(KEY, Counted(), 10)
    assert [f.suffix for f in tmp_path.rglob("*") if f.is_file()] in ([], [".lock"])


def test_the_least_recently_used_entries_go_first(tmp_path: Path) -> None:
    cache = ArrayCache(tmp_path)
    quarter = (1 << 20) // 4
    for i, name in enumerate("abc"):
        cache.compute(name * 64, Counted(size=quarter), 10)
        os.utime(tmp_path / (name * 2) / f"{name * 64}.npz", (i, i))
    cache.compute("a" * 64, Counted(), 10)  # used just now
    assert prune([cache], 2.5) == 1
    assert [entry.name[0] for entry in entries(tmp_path)] == ["a", "c"]


@pytest.mark.parametrize("name", ["a/b", "../../x", "weird \n name", "ünï", "", "x" * 200])
def test_any_tensor_name_can_be_kept(tmp_path: Path, name: str) -> None:
    cache = ArrayCache(tmp_path)
    value = np.arange(3)
    cache.compute(KEY, lambda: {name: value}, 10)
    found = cache.compute(KEY, Counted(), 10)
    assert list(found) == [name]
    assert np.array_equal(found[name], value)
    assert all(file.is_relative_to(tmp_path) for file in entries(tmp_path))
