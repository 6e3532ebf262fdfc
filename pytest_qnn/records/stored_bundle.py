"""Reading a bundle: nothing in it is believed before it is checked, and nothing of it is executed."""

from __future__ import annotations

import json
import math
import os
import stat
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.lib import format as npy

from pytest_qnn.errors import BundleError, ModelError, QnnError
from pytest_qnn.model.encoding import Encoding
from pytest_qnn.model.onnx_file import read_model
from pytest_qnn.model.tensors import TensorSpec
from pytest_qnn.records.bundle import (
    BACKEND,
    BUNDLE_VERSION,
    CHECK,
    DEVICE_OPTIONS,
    ENVELOPE,
    FLOAT,
    FLOAT_MODEL,
    INPUTS,
    MODEL,
    QUANTIZED,
    digest_of,
    file_sha256,
    member,
)
from pytest_qnn.records.bundle_folder import DESCRIPTION, MIB
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.settings import BACKENDS
from pytest_qnn.three_ways import References, add_sample
from pytest_qnn.verdict.judge import AccuracyVerdict, OutputCase, judge
from pytest_qnn.verdict.metrics import Evidence
from pytest_qnn.verdict.tolerance import Tolerance

LARGEST_DESCRIPTION = 64 * MIB
_FILES = (INPUTS, BACKEND, QUANTIZED, CHECK, FLOAT, *ENVELOPE, MODEL, FLOAT_MODEL)
Tensors = dict[str, Array]


@dataclass(frozen=True)
class Bundle:
    """A bundle that was found whole.

    Attributes:
        folder: where it lies.
        description: ``bundle.json`` (see its schema).
        inputs, outputs: the session's tensors.
        samples: inputs of each kept sample, by name.
        results: what the backend gave for each.
        references: what onnxruntime gave for each; empty if it could not run the model.
    """

    folder: Path
    description: Mapping[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    samples: tuple[Tensors, ...]
    results: tuple[Tensors, ...]
    references: tuple[References, ...]

    def cases(self) -> list[OutputCase]:
        """Its outputs with the limits that they were judged by, ready for samples."""
        return [_case(spec, limits) for spec, limits in zip(self.outputs, self.description["limits"], strict=True)]

    def judge(
        self, results: Sequence[Mapping[str, Array]] | None = None, references: Sequence[References] | None = None
    ) -> AccuracyVerdict | None:
        """The verdict on the kept samples by the stored limits.

        Args:
            results, references: in place of the stored ones.

        Returns:
            The verdict; None if the bundle has no references.
        """
        against = references or self.references
        if not against:
            return None
        cases = self.cases()
        for reference, result in zip(against, results or self.results, strict=True):
            add_sample(cases, self.outputs, reference, result)
        return judge(cases, len(against))

    def model(self, asked: Path | None = None) -> Path:
        """The model's file: ``asked``, else where it lay, else the bundle's copy; whichever has the right digest.

        Raises:
            BundleError: ``asked`` is another model, or it is in neither place.
        """
        return self._locate("model", "--model", asked)

    def float_model(self, asked: Path | None = None) -> Path | None:
        """The float original's file, likewise; None if there was none.

        Raises:
            BundleError: as for :meth:`model`, or ``asked`` is given and there was none.
        """
        if self.description["float_model"] is None:
            if asked is not None:
                raise BundleError(f"{self.folder}: --float-model: the model was judged without a float original")
            return None
        return self._locate("float_model", "--float-model", asked)

    def _locate(self, which: str, flag: str, asked: Path | None) -> Path:
        known: Mapping[str, Any] = self.description[which]
        if asked is not None:
            found = read_model(asked).digest
            if found != known["sha256"]:
                raise BundleError(
                    f"{flag} {asked}: another model: its SHA-256 is {found[:16]}..., the bundle's {known['sha256'][:16]}..."
                )
            return asked
        places: list[Path] = [Path(known["file"])] + ([self.folder / known["copy"]] if known["copy"] else [])
        for place in places:
            try:
                if read_model(place).digest == known["sha256"]:
                    return place
            except (ModelError, OSError, ValueError):
                continue
        raise BundleError(
            f"{self.folder}: the {which.replace('_', ' ')} (SHA-256 {known['sha256'][:16]}...) isn't at {known['file']} any more"
            f"{' in that form' if places[0].exists() else ''}, and the bundle has no copy: say where it is with {flag} FILE"
        )


def read_bundle(folder: Path) -> Bundle:
    """Read and check a bundle.

    Raises:
        BundleError: it isn't one, or it is incomplete, damaged or altered.
    """
    try:
        description = _description(folder)
        _check_files(folder, description)
        inputs = tuple(_spec(t) for t in description["inputs"])
        outputs = tuple(_spec(t) for t in description["outputs"])
        kept = list(description["samples"]["kept"])
        if not kept or len(description["limits"]) != len(outputs):
            raise BundleError(f"{folder / DESCRIPTION}: no samples, or not one limit for each output")
        ways = {
            name: _tensors(folder / name, kept, inputs if name == INPUTS else outputs)
            for name in (INPUTS, BACKEND, QUANTIZED, CHECK, FLOAT, *ENVELOPE)
            if name in description["files"]
        }
        for limits in description["limits"]:
            if (QUANTIZED in ways) and bool(limits["has_float"]) != (FLOAT in ways):
                raise BundleError(f"{folder}: {FLOAT} is missing, or nobody judges by it")
        references: tuple[References, ...] = ()
        if QUANTIZED in ways:
            real: list[Any] = ways.get(FLOAT) or [None] * len(kept)
            stored = [ways[name] for name in ENVELOPE if name in ways]
            drawn = [tuple(draw[i] for draw in stored) for i in range(len(kept))]
            references = tuple(map(References, ways[QUANTIZED], ways[CHECK], real, drawn))
        bundle = Bundle(folder, description, inputs, outputs, tuple(ways[INPUTS]), tuple(ways[BACKEND]), references)
        bundle.cases()
        _check_provenance(folder, description)
    except BundleError:
        raise
    except OSError as error:
        raise BundleError(f"{error.filename or folder}: can't be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, QnnError) as error:
        raise BundleError(
            f"{folder / DESCRIPTION}: not as its schema says ({type(error).__name__}: {error})"
        ) from error
    return bundle


def read_description(folder: Path) -> Mapping[str, Any]:
    """``bundle.json`` alone, with its own digest checked.

    Raises:
        BundleError: it is missing, damaged, altered, or of another version.
    """
    try:
        return _description(folder)
    except OSError as error:
        raise BundleError(f"{error.filename or folder}: can't be read: {error.strerror or error}") from error


def _description(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    if not folder.is_dir():
        raise BundleError(f"{folder}: there is no such folder: name a bundle, as a failure's message does")
    if not os.path.lexists(file):
        raise BundleError(f"{folder}: not a bundle: it has no {DESCRIPTION}")
    if not stat.S_ISREG(file.lstat().st_mode) or file.stat().st_size > LARGEST_DESCRIPTION:
        raise BundleError(f"{file}: not a regular file of a bundle's size")
    try:
        description = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: damaged: not JSON ({error})") from error
    if not isinstance(description, dict) or "schema" not in description or "digest" not in description:
        raise BundleError(f"{file}: not the description of a bundle")
    if description["schema"] != BUNDLE_VERSION:
        raise BundleError(
            f"{file}: a bundle of version {description['schema']!r}, this pytest-qnn reads {BUNDLE_VERSION}: use the one that wrote it"
        )
    if description["digest"] != digest_of(description):
        raise BundleError(f"{file}: altered since it was written: its digest doesn't fit")
    return description


_SHOWN = ("backend", "soc", "target", "computed_in", "versions", "options", "dimensions", "artifact", "placement")
_LOADS = {"model", "float_model", "dimensions", "artifact", "allow_cpu", "load_timeout", "run_timeout", "soc"}


def _check_provenance(folder: Path, description: Mapping[str, Any]) -> None:
    provenance = description["provenance"]
    missing = [name for name in _SHOWN if name not in provenance]
    tables = all(isinstance(provenance[name], dict) for name in ("versions", "options", "dimensions"))
    device = description.get("device_options", {})  # what older bundles don't have
    known = isinstance(device, dict) and all(k in DEVICE_OPTIONS and isinstance(v, str) for k, v in device.items())
    if (
        missing
        or not tables
        or not known
        or provenance["backend"] not in BACKENDS
        or _LOADS & provenance["options"].keys()
    ):
        raise BundleError(f"{folder / DESCRIPTION}: its provenance is incomplete or has what doesn't belong there")


def _check_files(folder: Path, description: Mapping[str, Any]) -> None:
    for name, known in description["files"].items():
        if name not in _FILES:
            raise BundleError(f"{folder / DESCRIPTION}: names a file {name!r}, which bundles don't have")
        file = folder / name
        if not os.path.lexists(file):
            raise BundleError(f"{file}: missing")
        if not stat.S_ISREG(file.lstat().st_mode):
            raise BundleError(f"{file}: not a regular file")
        if file.stat().st_size != known["bytes"]:
            raise BundleError(f"{file}: damaged or altered: {file.stat().st_size} bytes, it had {known['bytes']}")
        if file_sha256(file) != known["sha256"]:
            raise BundleError(f"{file}: damaged or altered: its SHA-256 isn't the one in {DESCRIPTION}")
    for name in (INPUTS, BACKEND, *([QUANTIZED, CHECK] if {QUANTIZED, CHECK} & description["files"].keys() else [])):
        if name not in description["files"]:
            raise BundleError(f"{folder / DESCRIPTION}: names no {name}")
    for which, name in (("model", MODEL), ("float_model", FLOAT_MODEL)):
        known = description[which]
        if known is not None and known["copy"] not in (None, name):
            raise BundleError(f"{folder / DESCRIPTION}: its {which} is {known['copy']!r}, which bundles don't have")


def _tensors(file: Path, kept: Sequence[int], specs: Sequence[TensorSpec]) -> list[Tensors]:
    """Arrays of each kept sample, by name; only plain numbers, and no more bytes than the file has."""
    try:
        with zipfile.ZipFile(file) as archive:
            _check_archive(archive, file)
            return [
                {spec.name: _array(archive, member(sample, number)) for number, spec in enumerate(specs)}
                for sample in kept
            ]
    except BundleError:
        raise
    except Exception as error:  # zipfile and numpy raise nearly anything for a file that isn't theirs
        raise BundleError(f"{file}: not the arrays of this bundle ({type(error).__name__}: {error})") from error


def _check_archive(archive: zipfile.ZipFile, file: Path) -> None:
    infos = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise BundleError(f"{file}: compressed, which bundles aren't")
    if sum(info.file_size for info in infos) > file.stat().st_size:
        raise BundleError(f"{file}: its parts are larger than the file")


def _array(archive: zipfile.ZipFile, name: str) -> Array:
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        version = npy.read_magic(cast(BinaryIO, stream))
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(cast(BinaryIO, stream))
        if dtype.kind not in "biuf" or math.prod(shape) * dtype.itemsize != info.file_size - stream.tell():
            raise ValueError(f"{name}: its size or type doesn't fit")
    with archive.open(info) as stream:
        return npy.read_array(cast(BinaryIO, stream), allow_pickle=False)


def _spec(told: Mapping[str, Any]) -> TensorSpec:
    encoding = told["encoding"]
    if encoding is not None:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in encoding.items()}
        encoding = Encoding(**values)
    return TensorSpec(str(told["name"]), str(told["dtype"]), tuple(told["shape"]), encoding)


def _case(spec: TensorSpec, limits: Mapping[str, Any]) -> OutputCase:
    tolerance = limits["tolerance"]
    if tolerance is not None:
        known = {f.name for f in fields(Tolerance)}
        tolerance = Tolerance(**{k: v for k, v in tolerance.items() if k in known and v is not None})
    return OutputCase(
        name=spec.name,
        evidence=Evidence(step=limits["step"], has_float=bool(limits["has_float"])),
        precision=str(limits["precision"]),
        bounded=bool(limits["bounded"]),
        exact=bool(limits["exact"]),
        tolerance=tolerance,
        limits_from=str(limits["from"]),
        nominal_step=limits["nominal_step"],
    )


def differing(a: Mapping[str, Array], b: Mapping[str, Array]) -> list[str]:
    """Names of the outputs that differ in any bit (NaN is equal to the same NaN)."""
    return [
        name
        for name in sorted({*a, *b})
        if name not in a
        or name not in b
        or a[name].dtype != b[name].dtype
        or a[name].shape != b[name].shape
        or np.ascontiguousarray(a[name]).tobytes() != np.ascontiguousarray(b[name]).tobytes()
    ]
