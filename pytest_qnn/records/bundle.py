"""A failing case on disk: what went in, what came out in all three ways, and all that one must know to see it again.

A bundle is a folder with ``bundle.json`` (described by ``bundle.schema.json`` beside this file) and arrays in numpy's ``.npz``
format without pickles. The folder's name follows from the test and from what ran, so a test that fails again replaces its
bundle.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from pytest_qnn.errors import QnnError
from pytest_qnn.interface import DEVICE_SETTINGS
from pytest_qnn.layers.envelope import DRAWS, draws_each
from pytest_qnn.model.onnx_file import Model, file_digest
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.records.bundle_folder import DESCRIPTION, MIB, NoRoomError, folder_name, replaced_folder
from pytest_qnn.records.record import now, plain, repeat_command
from pytest_qnn.runners.reference import cpu_signature
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.three_ways import (
    References,
    add_sample,
    float_name,
    output_case,
    quantized_outputs,
    real_values,
    references_of,
)
from pytest_qnn.verdict.judge import AccuracyVerdict, OutputCase, judge

if TYPE_CHECKING:
    from pytest_qnn.session import Run, Session

BUNDLE_VERSION = 1
FEW = 4  # samples to begin with
ARRAYS_LIMIT = 32 * MIB  # of all kept samples; one sample is kept in any case
MODEL_LIMIT = 16 * MIB  # of model and float original: smaller ones are copied
INPUTS, BACKEND, QUANTIZED, CHECK, FLOAT = "inputs.npz", "backend.npz", "quantized.npz", "check.npz", "float.npz"
ENVELOPE = tuple(f"envelope_{k}.npz" for k in range(len(DRAWS)))
DEVICE_OPTIONS = ("device", *DEVICE_SETTINGS)
MODEL, FLOAT_MODEL = "model.onnx", "float_model.onnx"


class BundleNotKeptWarning(UserWarning):
    """A failing case could not be kept as a bundle; its verdict stays what it is."""


@dataclass(frozen=True)
class Kept:
    """What became of a bundle.

    Attributes:
        folder: None if it could not be kept.
        note: why it could not, or what a reader must know of it.
        command: runs it again.
        samples, of: how many of how many are in it.
    """

    folder: Path | None
    note: str = ""
    command: str = ""
    samples: int = 0
    of: int = 0

    def lines(self) -> list[str]:
        """For a failure's message."""
        if self.folder is None:
            return [f"  bundle: not kept: {self.note}"]
        lines = [
            f"  bundle: {self.folder} ({self.samples} of {self.of} sample{'s' if self.of > 1 else ''})",
            f"  alone: {self.command}",
        ]
        return [*lines, f"  note: {self.note}"] if self.note else lines


def bundle_schema() -> dict[str, Any]:
    """The published JSON schema of ``bundle.json``."""
    text = resources.files("pytest_qnn.records").joinpath("bundle.schema.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def keep_bundle(run: Run, verdict: AccuracyVerdict | None, reason: str) -> Path | None:
    """Keep a failing case under the setting ``artifacts``.

    Never raises because of the bundle: a failure must stay a failure when the disk is full. Why nothing could be kept is said
    in a :class:`BundleNotKeptWarning`.

    Args:
        run: what was run. Of many samples only the worst are kept.
        verdict: on the whole run; None where something else than the reference was violated.
        reason: what failed, in one line.

    Returns:
        The bundle's folder; None without the setting, or if it could not be kept.
    """
    kept = store_bundle(run, verdict, reason)
    return kept.folder if kept is not None else None


def store_bundle(run: Run, verdict: AccuracyVerdict | None, reason: str) -> Kept | None:
    """:func:`keep_bundle`, with what a message says of it; None without the setting."""
    settings = run.session.bench.settings
    if settings.artifacts is None:
        return None
    try:
        return _store(run, verdict, reason, settings.artifacts, settings.artifacts_limit_mb * MIB)
    except NoRoomError as error:
        note = f"{error}: raise it, or look at those first"
    except OSError as error:  # a lock's Timeout is one too
        why = error.strerror or str(error) or type(error).__name__
        note = f"{error.filename or settings.artifacts}: {why}: free some space there, or name another folder"
    except Exception as error:  # whatever it is, the verdict stands
        note = f"{type(error).__name__}: {error}".partition("\n")[0]
    with suppress(BundleNotKeptWarning):  # where warnings are errors, this one still isn't the test's fault
        warnings.warn(f"{run.session.subject}: the bundle was not kept: {note}", BundleNotKeptWarning, stacklevel=3)
    return Kept(None, note)


def run_command(folder: Path, artifact: str | None, device: Mapping[str, str]) -> str:
    """The command that runs a bundle again; it can be pasted anywhere on this host.

    Args:
        artifact: that the test gave, where it lay.
        device: the options that reach the device that it ran on, if it was one.
    """
    own = Path(sys.executable).with_name("pytest-qnn")
    on_path = shutil.which("pytest-qnn")
    if on_path is not None and own.exists() and Path(on_path).samefile(own):
        program = ["pytest-qnn"]
    else:
        program = [sys.executable, "-m", "pytest_qnn.cli"]
    given = {"artifact": artifact} if artifact else {}
    options = [word for k, v in {**given, **device}.items() for word in (f"--{k.replace('_', '-')}", v)]
    return shlex.join([*program, "bundle", "run", str(folder), *options])


def _device_options(session: Session) -> dict[str, str]:
    """What ``bundle run`` must be told to use the device that a session runs on; nothing if that is none."""
    plan, settings = session.plan, session.bench.settings
    if not plan.serial or (plan.device or {}).get("replayed"):
        return {}
    named = [text for text in settings.device if text.startswith(f"adb://{plan.serial}@")]
    values = {name: getattr(settings, name) for name in DEVICE_OPTIONS}
    values["device"] = named[0] if named else plan.serial
    if named:
        values["adb_server"] = None
    return {name: str(value) for name, value in values.items() if value is not None}


def _store(run: Run, verdict: AccuracyVerdict | None, reason: str, folder: Path, limit: float) -> Kept:
    session = run.session
    choice = _choose(run, verdict)
    provenance = session.provenance
    identity = json.dumps([provenance[k] for k in _IDENTITY], sort_keys=True)
    test = session.bench.test.nodeid
    title = "-".join(part for part in test.split("::")[1:] if part) or session.model.path.name
    target = folder / folder_name(title, test, identity)
    with replaced_folder(target, limit, psutil.Process().create_time()) as draft:
        _write_arrays(draft / INPUTS, {i: run.samples[i] for i in choice.samples}, _names(session.inputs))
        outputs = _names(session.outputs)
        _write_arrays(draft / BACKEND, {i: run.results[i] for i in choice.samples}, outputs)
        if choice.references:
            for file, way in ((QUANTIZED, "quantized"), (CHECK, "check"), (FLOAT, "real")):
                arrays = {i: getattr(r, way) for i, r in choice.references.items() if getattr(r, way) is not None}
                if arrays:
                    _write_arrays(draft / file, arrays, outputs)
            for k, file in enumerate(ENVELOPE[: min(len(r.drawn) for r in choice.references.values())]):
                _write_arrays(draft / file, {i: r.drawn[k] for i, r in choice.references.items()}, outputs)
        copied = _copy_models(session, draft)
        description = _describe(run, verdict, reason, choice, provenance, copied, target)
        description["files"] = {
            f.name: {"sha256": file_sha256(f), "bytes": f.stat().st_size} for f in sorted(draft.iterdir())
        }
        description["digest"] = digest_of(description)
        (draft / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    command = run_command(target, description["artifact_file"], description["device_options"])
    return Kept(target, choice.note, command, len(choice.samples), len(run.samples))


_IDENTITY = ("model", "float_model", "executed", "backend", "soc", "options", "target", "dimensions")


# --- which samples ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """Samples to keep, by their place in the run, with their references.

    Attributes:
        verdict: on these samples alone; None where nothing was judged.
        note: what a reader must know of the choice.
    """

    samples: tuple[int, ...]
    references: Mapping[int, References]
    verdict: AccuracyVerdict | None
    note: str = ""


def _choose(run: Run, verdict: AccuracyVerdict | None) -> _Choice:
    """The worst few samples; as many more as it takes for them to fail by themselves, while they aren't too large."""
    size = sum(a.nbytes for a in run.samples[0].values()) + 4 * sum(a.nbytes for a in run.results[0].values())
    most = min(len(run.samples), max(1, ARRAYS_LIMIT // max(size, 1)))
    try:
        order = _worst_first(run, verdict)
        references: dict[int, References] = {}
        count = min(FEW, most)
        derived = verdict is None or any(o.limits_from == "derived" for o in verdict.outputs)
        drawn = draws_each(count) if derived else 0  # as the run was judged
        while True:
            for i in order[len(references) : count]:
                references[i] = references_of(run.session, run.samples[i], drawn)
            chosen = tuple(sorted(references))
            if verdict is None:
                return _Choice(chosen, references, None)
            found = _judge(run, verdict, references)
            if found.ok == verdict.ok:
                return _Choice(chosen, references, found)
            if count == most:
                note = f"the {len(chosen)} samples that were kept pass by themselves: only all {len(run.samples)} fail"
                return _Choice(chosen, references, found, note)
            count = min(2 * count, most)
    except (
        QnnError
    ) as error:  # the model may not load on onnxruntime: what the backend did is worth keeping all the same
        note = f"without references: {str(error).splitlines()[0]}"
        return _Choice(tuple(range(min(FEW, most))), {}, None, note)


def _worst_first(run: Run, verdict: AccuracyVerdict | None) -> list[int]:
    """All samples, those first in which a failed output has its worst element or departs most from the QDQ reference."""
    session = run.session
    failed = {o.name: o for o in (verdict.failed if verdict is not None else ())}
    first = [o.worst.sample for o in failed.values() if o.worst is not None]
    specs = [spec for spec in session.outputs if not failed or spec.name in failed]
    if len(run.samples) == 1:
        return [0]
    distances = []
    for sample, result in zip(run.samples, run.results, strict=True):
        expected = quantized_outputs(session, sample)
        distances.append([_distance(real_values(expected[s.name], s), real_values(result[s.name], s)) for s in specs])
    # of several outputs none must drown the others: each by its own largest
    array = np.array(distances)
    largest = np.max(np.where(np.isfinite(array), array, 0.0), axis=0)
    score = np.max(array / np.where(largest > 0, largest, 1.0), axis=1)
    order = sorted(range(len(run.samples)), key=lambda i: -score[i])
    return list(dict.fromkeys([*first, *order]))


def _distance(q: Array, y: Array) -> float:
    """Sum of squared differences; infinite where they can't be compared."""
    if q.shape != y.shape:
        return math.inf
    with np.errstate(all="ignore"):
        e = y.astype(np.float64) - q.astype(np.float64)
        total = float(np.dot(e.reshape(-1), e.reshape(-1)))
    return total if math.isfinite(total) else math.inf


def _cases(session: Session, verdict: AccuracyVerdict | None) -> list[OutputCase]:
    """The run's outputs with the limits that the verdict was reached by."""
    judged = {o.name: o for o in verdict.outputs} if verdict is not None else {}
    cases = []
    for spec in session.outputs:
        known = judged.get(spec.name)
        limits_from = known.limits_from if known is not None else "derived"
        cases.append(output_case(session, spec, known.tolerance if known is not None else None, limits_from))
    return cases


def _judge(run: Run, verdict: AccuracyVerdict, references: Mapping[int, References]) -> AccuracyVerdict:
    cases = _cases(run.session, verdict)
    for i in sorted(references):
        add_sample(cases, run.session.outputs, references[i], run.results[i])
    return judge(cases, len(references))


# --- what is written --------------------------------------------------------------------------------------------------


def _names(specs: Sequence[TensorSpec]) -> list[str]:
    return [spec.name for spec in specs]


def member(sample: int, tensor: int) -> str:
    """Name of an array in an ``.npz`` file: tensors have any name, members have their number."""
    return f"sample{sample}.tensor{tensor}"


def _write_arrays(file: Path, arrays: Mapping[int, Mapping[str, Array]], names: Sequence[str]) -> None:
    """Write tensors of samples without pickles."""
    members: dict[str, Any] = {}
    for sample, tensors in arrays.items():
        for number, name in enumerate(names):
            array = np.ascontiguousarray(tensors[name]) if tensors[name].ndim else np.asarray(tensors[name])
            if array.dtype.kind not in "biuf":
                raise TypeError(f"{name}: arrays of type {array.dtype} can't be kept")
            members[member(sample, number)] = array
    with file.open("wb") as f:
        np.savez(f, **members)


def _copy_models(session: Session, draft: Path) -> dict[str, str]:
    """Copies of the models if they are small; without external data, which small ones don't have."""
    models = {MODEL: session.model} | ({FLOAT_MODEL: session.float_model} if session.float_model else {})
    if any(len(model.files) != 1 for model in models.values()):
        return {}
    if sum(model.path.stat().st_size for model in models.values()) > MODEL_LIMIT:
        return {}
    for name, model in models.items():
        shutil.copyfile(model.path, draft / name)
        if file_digest(draft / name) != model.digest:
            raise OSError(None, "the model changed on disk since it was loaded", str(model.path))
    return {name: name for name in models}


def _describe(
    run: Run,
    verdict: AccuracyVerdict | None,
    reason: str,
    choice: _Choice,
    provenance: Mapping[str, Any],
    copied: Mapping[str, str],
    target: Path,
) -> dict[str, Any]:
    session = run.session
    test = session.bench.test
    given = session.artifact.path if session.artifact.source == "given" else None
    device = _device_options(session)
    cases = _cases(session, verdict)
    description: dict[str, Any] = plain(
        {
            "schema": BUNDLE_VERSION,
            "reason": reason,
            "test": test.nodeid,
            "worker": test.worker or None,
            "time": now(),
            "subject": session.subject,
            "commands": {
                "test": repeat_command(session.bench, anywhere=True),
                "bundle": run_command(target, given, device),
            },
            "host": {
                "system": platform.platform(),
                "python": platform.python_version(),
                "processor": cpu_signature(),
            },
            "provenance": provenance,
            "allow_cpu": session.allow_cpu if isinstance(session.allow_cpu, bool) else sorted(session.allow_cpu),
            "artifact_file": given,
            "device_options": device,
            "model": _model(session.model, copied.get(MODEL)),
            "float_model": session.float_model and _model(session.float_model, copied.get(FLOAT_MODEL)),
            "float_reference": float_name(session) if choice.references else None,
            "synthetic_inputs": run.synthetic,
            "samples": {"run": len(run.samples), "kept": choice.samples, "note": choice.note},
            "inputs": [_tensor(spec) for spec in session.inputs],
            "outputs": [_tensor(spec) for spec in session.outputs],
            "limits": [_limits(case) for case in cases],
            "verdict": verdict and verdict_json(verdict),
            "verdict_of_kept": choice.verdict and verdict_json(choice.verdict),
        }
    )
    return description


def _model(model: Model, copy: str | None) -> dict[str, Any]:
    size = sum(Path(file).stat().st_size for file, _ in model.files)
    return {"file": str(model.path), "sha256": model.digest, "bytes": size, "copy": copy}


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    encoding = asdict(spec.encoding) if spec.encoding is not None else None
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "encoding": encoding}


def _limits(case: OutputCase) -> dict[str, Any]:
    return {
        "step": case.evidence.step,
        "has_float": case.evidence.has_float,
        "precision": case.precision,
        "bounded": case.bounded,
        "exact": case.exact,
        "nominal_step": case.nominal_step,
        "tolerance": case.tolerance and asdict(case.tolerance),
        "from": case.limits_from,
    }


def verdict_json(verdict: AccuracyVerdict) -> dict[str, Any]:
    """A verdict as JSON data."""
    return {
        "ok": verdict.ok,
        "blame": verdict.blame,
        "samples": verdict.samples,
        "outputs": [o.to_json() for o in verdict.outputs],
    }


def digest_of(description: Mapping[str, Any]) -> str:
    """SHA-256 over a description without its own digest: it shows accidents, and edits that forgot it."""
    rest = {k: v for k, v in description.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, read now."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
