"""The ONNX backend node tests as healthy runs: every operator that HTP takes, judged by the derived rule.

They come from the wheel of onnx 1.19.1 (later ones lack them), which is read as an archive and not installed.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from pytest_qnn.assertions import judge_run
from pytest_qnn.bench import Bench
from pytest_qnn.errors import QnnError, RuntimeCrashError, TargetError
from pytest_qnn.markers import BackendRequest
from pytest_qnn.model.replaced_file import replaced_file

PREFIX = "onnx/backend/test/data/node/"


@dataclass(frozen=True)
class NodeResult:
    """What came of one node test.

    Attributes:
        outcome: "pass", "red", "not taken" (HTP refuses it, or part of it), "no case" (no such input can be given), "crash" or "error".
        detail: of a red one the failures, else the reason.
    """

    name: str
    outcome: str
    blame: str
    detail: str


def names(wheel: Path) -> list[str]:
    """The node tests in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        found = {n.removeprefix(PREFIX).partition("/")[0] for n in archive.namelist() if n.startswith(PREFIX)}
    return sorted(name for name in found if name.startswith("test_"))


def run_all(bench: Bench, wheel: Path, folder: Path, soc: str, advance: Callable[[], None]) -> list[NodeResult]:
    """Run every test; what an earlier call has done is taken from ``folder``."""
    done = {}
    kept = folder / f"node-tests-{soc}.jsonl"
    if kept.exists():
        done = {entry["name"]: NodeResult(**entry) for entry in map(json.loads, kept.read_text().splitlines())}
    work = folder / "node-tests"
    work.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, kept.open("a") as log:
        for name in names(wheel):
            if name not in done:
                done[name] = _run(bench, archive, name, work, soc)
                log.write(json.dumps(asdict(done[name])) + "\n")
                log.flush()
            advance()
    return list(done.values())


def _run(bench: Bench, archive: zipfile.ZipFile, name: str, work: Path, soc: str) -> NodeResult:
    file = work / f"{name}.onnx"
    with replaced_file(file) as draft:
        draft.write_bytes(archive.read(f"{PREFIX}{name}/model.onnx"))
    try:
        proto = onnx.load(str(file))
        inputs = dict(_inputs(archive, name, proto))
        session = bench.backend(BackendRequest("htp", soc=soc)).load(file)
        if session.placement.misplaced:
            return NodeResult(name, "not taken", "", str(session.placement.misplaced[0])[:200])
        verdict = judge_run(session.run(inputs, allow_non_finite=True))
    except RuntimeCrashError as error:
        return NodeResult(name, "crash", "backend", str(error).partition("\n")[0][:200])
    except TargetError as error:
        return NodeResult(name, "error", "", f"{type(error).__name__}: {str(error)[:200]}")
    except (QnnError, KeyError, ValueError, TypeError, NotImplementedError) as error:
        outcome = "not taken" if type(error).__name__ in ("PlacementError", "CompileError") else "no case"
        return NodeResult(name, outcome, "", f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
    finally:
        file.unlink(missing_ok=True)
    failures = [f"{o.name}: {text}" for o in verdict.failed for text in o.failures]
    return NodeResult(name, "pass" if verdict.ok else "red", verdict.blame, "; ".join(failures)[:600])


def _inputs(archive: zipfile.ZipFile, name: str, proto: onnx.ModelProto) -> Iterator[tuple[str, np.ndarray]]:
    """The first data set's inputs, by the names of the graph's."""
    for index, value in enumerate(proto.graph.input):
        tensor = onnx.TensorProto()
        tensor.ParseFromString(archive.read(f"{PREFIX}{name}/test_data_set_0/input_{index}.pb"))
        yield value.name, numpy_helper.to_array(tensor)
