"""QNN context binaries: made on this host, and checked before they run.

The runtime itself checks next to nothing: on x86-64 a binary made for one SoC loads under any other, and one with flipped
bytes may load and compute something else. So a manifest beside the wrapper says what the binary was made from and for,
with digests, and nothing is loaded that doesn't match it.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx

from pytest_qnn.errors import ArtifactError
from pytest_qnn.model.onnx_file import Model, file_digest, load_proto
from pytest_qnn.targets.target import Plan

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a context binary was made from and for.

    Attributes:
        format: version of this file's layout.
        model_sha256: digest of the ONNX model, with its external data.
        wrapper_sha256, binary_sha256: digests of the two files.
        binary: name of the binary, beside the wrapper.
        backend, soc, options, onnxruntime_qnn, dimensions: what it was made for and with.
    """

    format: int
    model: str
    model_sha256: str
    wrapper_sha256: str
    binary: str
    binary_sha256: str
    backend: str
    soc: str
    options: dict[str, str]
    onnxruntime_qnn: str
    dimensions: dict[str, int]

    def files(self, wrapper: Path) -> tuple[tuple[str, str], ...]:
        """Path and SHA-256 of the wrapper and of the binary beside it."""
        binary = wrapper.parent / Path(self.binary).name
        return (str(wrapper), self.wrapper_sha256), (str(binary), self.binary_sha256)


def manifest_file(wrapper: Path) -> Path:
    """Where the manifest of a context wrapper lies."""
    return wrapper.with_name(wrapper.name + ".json")


def compile_settings(wrapper: Path) -> tuple[tuple[str, str], ...]:
    """Session configuration entries that make onnxruntime write a context binary and its wrapper."""
    return (
        ("ep.context_enable", "1"),
        ("ep.context_file_path", str(wrapper)),
        ("ep.context_embed_mode", "0"),
    )


def store(made: Path, output: Path, model: Model, plan: Plan) -> Path:
    """Move a freshly made wrapper and its binary to the folder ``output`` and write their manifest.

    The wrapper comes last: while it is missing, nothing there can be taken for a finished artifact.

    Raises:
        ArtifactError: the runtime made no binary.
        OSError: ``output`` can't be written.
    """
    assert plan.soc is not None
    proto = load_proto(made)
    nodes = [n for n in proto.graph.node if n.op_type == "EPContext"]
    if len(nodes) != 1:
        raise ArtifactError(
            f"{model.path.name}: the runtime split the model into {len(nodes)} contexts; one is needed: see which nodes "
            "don't run on the backend with assert_fully_offloaded"
        )
    attribute = next(a for a in nodes[0].attribute if a.name == "ep_cache_context")
    stem = f"{model.path.name.removesuffix('.onnx')}.{plan.soc.name}"
    wrapper, binary = output / f"{stem}.ctx.onnx", output / f"{stem}.bin"
    source = made.parent / attribute.s.decode()
    attribute.s = binary.name.encode()
    onnx.save(proto, str(made))
    manifest = Manifest(
        format=FORMAT,
        model=model.path.name,
        model_sha256=model.digest,
        wrapper_sha256=file_digest(made),
        binary=binary.name,
        binary_sha256=file_digest(source),
        backend=plan.backend,
        soc=plan.soc.name,
        options=dict(plan.options),
        onnxruntime_qnn=plan.versions["onnxruntime_qnn"],
        dimensions=dict(model.dimensions),
    )
    with suppress(FileNotFoundError):
        wrapper.unlink()
    os.replace(source, binary)
    draft = made.with_suffix(".json")
    draft.write_text(json.dumps(asdict(manifest), indent=1), encoding="utf-8")
    os.replace(draft, manifest_file(wrapper))
    os.replace(made, wrapper)
    return wrapper


def check_artifact(wrapper: Path, model: Model, plan: Plan) -> Manifest:
    """Make sure that a context binary is what its manifest says, and fits the model and the plan.

    Raises:
        ArtifactError: no manifest, altered or truncated files, or made from another model or for another SoC, other
            options or another QNN release.
    """
    again = "compile it again with backend.compile()"
    if not wrapper.is_file():
        raise ArtifactError(f"{wrapper}: the artifact doesn't exist: {again}")
    try:
        manifest = Manifest(**json.loads(manifest_file(wrapper).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ArtifactError(
            f"{wrapper}: its manifest {manifest_file(wrapper).name} is missing, and without it nobody can tell what the "
            f"binary was made for: {again}"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{manifest_file(wrapper)}: not a manifest ({error}): {again}") from error
    if manifest.format != FORMAT:
        raise ArtifactError(f"{manifest_file(wrapper)}: format {manifest.format}, this release reads {FORMAT}: {again}")
    for name, digest in manifest.files(wrapper):
        file = Path(name)
        if not file.is_file():
            raise ArtifactError(f"{wrapper}: {file.name} is missing: {again}")
        if file_digest(file) != digest:
            raise ArtifactError(f"{file}: altered or truncated since it was made (its SHA-256 differs): {again}")
    for what, made, wanted in (
        ("model", manifest.model_sha256, model.digest),
        ("backend", manifest.backend, plan.backend),
        ("SoC", manifest.soc, plan.soc.name if plan.soc else ""),
        ("options", manifest.options, dict(plan.options)),
        ("dimensions", manifest.dimensions, dict(model.dimensions)),
        ("onnxruntime-qnn", manifest.onnxruntime_qnn, plan.versions["onnxruntime_qnn"]),
    ):
        if made != wanted:
            raise ArtifactError(f"{wrapper}: made for {what} {made}, but {wanted} is asked for: {again}")
    return manifest
