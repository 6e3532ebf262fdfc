"""QNN context binaries: what one was made from and for, and checks before it runs.

The runtime itself checks next to nothing: on x86-64 a binary made for one SoC loads under any other, and one with flipped
bytes may load and compute something else. So a manifest beside the wrapper says what the binary was made from and for,
with digests, and nothing is loaded that doesn't match it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import onnx

from pytest_qnn.errors import ArtifactError
from pytest_qnn.model.onnx_file import file_digest, load_proto
from pytest_qnn.work_folder import work_folder

FORMAT = 3


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a model is compiled to.

    Attributes:
        model_sha256: digest of the ONNX model, with its external data.
        dimensions: sizes given to its dynamic dimensions.
        backend, soc: what for.
        options: of the backend, those that decide the result.
        onnxruntime, onnxruntime_qnn: releases of what compiles.
    """

    model_sha256: str
    dimensions: Mapping[str, int]
    backend: str
    soc: str
    options: Mapping[str, str]
    onnxruntime: str
    onnxruntime_qnn: str

    @property
    def key(self) -> str:
        """SHA-256 over all of it."""
        text = json.dumps([FORMAT, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What a context binary is.

    Attributes:
        format: version of this file's layout.
        recipe: what it was made from and for.
        model: name of the model's file.
        htp_arch: Hexagon architecture of the SoC, e.g. 75.
        qnn: release of the QNN SDK inside the execution provider, as the provider writes it.
        wrapper_sha256, binary_sha256: digests of the two files.
        binary: name of the binary, beside the wrapper.
        binary_size: bytes.
        partitions: number of graphs in it: 1 if the backend took the whole model.
        placement: (execution provider, node, operator) of each of the model's nodes, as onnxruntime assigned them.
        reasons: why the backend refused nodes, by name.
        compile_seconds: how long it took on the host that made it.
    """

    format: int
    recipe: Recipe
    model: str
    htp_arch: int
    qnn: str
    wrapper_sha256: str
    binary: str
    binary_sha256: str
    binary_size: int
    partitions: int
    placement: tuple[tuple[str, str, str], ...]
    reasons: Mapping[str, str]
    compile_seconds: float

    def write(self, wrapper: Path) -> None:
        """Write it beside its wrapper, in one piece."""
        draft = manifest_file(wrapper).with_suffix(".draft")
        content = asdict(self)
        draft.write_text(json.dumps({**content, "sha256": _checksum(content)}, indent=1), encoding="utf-8")
        os.replace(draft, manifest_file(wrapper))

    def files(self, wrapper: Path) -> tuple[tuple[str, str], ...]:
        """Path and SHA-256 of the wrapper and of the binary beside it."""
        return (str(wrapper), self.wrapper_sha256), (str(wrapper.parent / self.binary), self.binary_sha256)

    def check_files(self, wrapper: Path) -> None:
        """Make sure that the wrapper and its binary are the ones that the manifest speaks of.

        Raises:
            ArtifactError: one is missing, altered or truncated.
        """
        for name, digest in self.files(wrapper):
            file = Path(name)
            try:
                found = file_digest(file)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ArtifactError(f"{wrapper}: {file.name!r} is missing ({reason}): {_AGAIN}") from None
            if found != digest:
                raise ArtifactError(f"{file}: altered or truncated since it was made (its SHA-256 differs): {_AGAIN}")

    def check_fits(self, wrapper: Path, wanted: Recipe, htp_arch: int) -> None:
        """Make sure that the artifact was made from and for what is asked for.

        Raises:
            ArtifactError: it wasn't; the message names what differs.
        """
        made = self.recipe
        pairs = (
            ("model", f"{self.model} ({made.model_sha256[:12]})", made.model_sha256, wanted.model_sha256),
            ("backend", made.backend, made.backend, wanted.backend),
            ("SoC", f"{made.soc} (v{self.htp_arch})", made.soc, wanted.soc),
            ("options", dict(made.options), dict(made.options), dict(wanted.options)),
            ("dimensions", dict(made.dimensions), dict(made.dimensions), dict(wanted.dimensions)),
            (
                "onnxruntime-qnn",
                f"{made.onnxruntime_qnn} (QNN {self.qnn})",
                made.onnxruntime_qnn,
                wanted.onnxruntime_qnn,
            ),
        )
        asked = {"SoC": f"{wanted.soc} (v{htp_arch})", "model": f"one with digest {wanted.model_sha256[:12]}"}
        for what, shown, ours, theirs in pairs:
            if ours != theirs:
                again = (
                    f"compile it for that one: pytest-qnn compile MODEL --soc {wanted.soc}" if what == "SoC" else _AGAIN
                )
                raise ArtifactError(
                    f"{wrapper}: made for {what} {shown}, but {asked.get(what, theirs)} is asked for: {again}"
                )


_AGAIN = "compile it again with 'pytest-qnn compile' or backend.compile()"


def manifest_file(wrapper: Path) -> Path:
    """Where the manifest of a context wrapper lies."""
    return wrapper.with_name(wrapper.name + ".json")


def read_manifest(wrapper: Path) -> Manifest:
    """The manifest of a wrapper.

    Raises:
        ArtifactError: the wrapper or its manifest is missing, or it is no manifest of this release.
    """
    file = manifest_file(wrapper)
    if not wrapper.is_file():
        raise ArtifactError(f"{wrapper}: the artifact doesn't exist: {_AGAIN}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ArtifactError(f"{file}: format {values['format']!r}, this release reads {FORMAT}: {_AGAIN}")
        if values.pop("sha256") != _checksum(values):
            raise ArtifactError(f"{file}: altered since it was made (its own SHA-256 differs): {_AGAIN}")
        return _manifest(values)
    except FileNotFoundError:
        raise ArtifactError(
            f"{wrapper}: its manifest {file.name} is missing, and without it nobody can tell what the binary was made for: "
            f"{_AGAIN}; or, if it was built elsewhere, pass its .bin"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{file}: not a manifest ({error}): {_AGAIN}") from error


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _manifest(values: dict[str, Any]) -> Manifest:
    expected = {field.name for field in fields(Manifest)}
    if values.keys() != expected:
        raise ValueError(f"fields {sorted(values.keys() ^ expected)}")
    placement = tuple((str(ep), str(node), str(op)) for ep, node, op in values["placement"])
    if Path(values["binary"]).name != values["binary"]:
        raise ValueError(f"binary {values['binary']!r} is not a file name")
    return Manifest(**{**values, "recipe": Recipe(**values["recipe"]), "placement": placement})


def finish(
    wrapper: Path,
    recipe: Recipe,
    model: str,
    htp_arch: int,
    placement: tuple[tuple[str, str, str], ...],
    reasons: Mapping[str, str],
    seconds: float,
) -> Manifest:
    """Write the manifest of a freshly made wrapper and binary.

    Raises:
        ArtifactError: the runtime made something else than one binary.
    """
    contexts, binary = _contexts(load_proto(wrapper), wrapper)
    sdk = next((a.s.decode() for a in contexts[0].attribute if a.name == "ep_sdk_version"), "unknown")
    manifest = Manifest(
        format=FORMAT,
        recipe=recipe,
        model=model,
        htp_arch=htp_arch,
        qnn=sdk,
        wrapper_sha256=file_digest(wrapper),
        binary=binary,
        binary_sha256=file_digest(wrapper.parent / binary),
        binary_size=(wrapper.parent / binary).stat().st_size,
        partitions=len(contexts),
        placement=placement,
        reasons=reasons,
        compile_seconds=round(seconds, 3),
    )
    manifest.write(wrapper)
    return manifest


def copy_to(wrapper: Path, manifest: Manifest, output: Path, stem: str) -> Path:
    """Copy an artifact into the folder ``output`` as ``STEM.ctx.onnx``, ``STEM.bin`` and a manifest.

    The wrapper comes last: while it is missing, nothing there can be taken for a finished artifact.

    Returns:
        The wrapper's copy.

    Raises:
        OSError: ``output`` can't be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    copied, binary = output / f"{stem}.ctx.onnx", f"{stem}.bin"
    proto = load_proto(wrapper)
    for node in _contexts(proto, wrapper)[0]:
        for attribute in node.attribute:
            if attribute.name == "ep_cache_context":
                attribute.s = binary.encode()
    with work_folder(output) as work:
        draft = work / copied.name
        shutil.copyfile(wrapper.parent / manifest.binary, work / binary)
        onnx.save(proto, str(draft))
        copy = replace(manifest, binary=binary, wrapper_sha256=file_digest(draft))
        copy.write(draft)
        copied.unlink(missing_ok=True)
        for file in (work / binary, manifest_file(draft), draft):
            os.replace(file, output / file.name)
    return copied


def _contexts(proto: Any, wrapper: Path) -> tuple[list[Any], str]:
    """The EPContext nodes of a wrapper, and the name of the one binary that they share."""
    nodes = [n for n in proto.graph.node if n.op_type == "EPContext"]
    names = {a.s.decode(errors="replace") for n in nodes for a in n.attribute if a.name == "ep_cache_context" and a.s}
    if not nodes or len(names) != 1:
        raise ArtifactError(f"{wrapper}: the runtime made {len(nodes)} contexts in {len(names)} binaries, not in one")
    return nodes, names.pop()


def read_artifact(wrapper: Path) -> Manifest:
    """The manifest of a wrapper, whose files were checked.

    Raises:
        ArtifactError: it is incomplete, altered or truncated.
    """
    manifest = read_manifest(wrapper)
    manifest.check_files(wrapper)
    return manifest
