"""``qnn-context-binary-generator`` and ``qnn-context-binary-utility``: from a model library or DLC to a context binary."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pytest_qnn.artifacts.binary import ContextInfo, read_context_binary, runtime_release
from pytest_qnn.devices.soc import find_soc
from pytest_qnn.errors import ArtifactError, OptionError, QnnError
from pytest_qnn.sdk.conversion import graph_name
from pytest_qnn.sdk.installation import CONTEXT_GENERATOR, CONTEXT_UTILITY, Sdk
from pytest_qnn.sdk.tool import check_record, step
from pytest_qnn.targets.backend_config import EXTENSION_LIBRARIES, backend_extensions, write_backend_extensions
from pytest_qnn.targets.options import check_options, compile_options

BACKEND_LIBRARY = "libQnnHtp.so"
DLC_LIBRARY = "libQnnModelDlc.so"
DESCRIBE_SECONDS = 120


@dataclass(frozen=True)
class SdkContext:
    """A context binary that the SDK made.

    Attributes:
        path: the binary, for ``qnn-net-run --retrieve_context``.
        soc: name of the SoC that it was made for.
        graphs: names of its graphs, as the SDK tells them.
        description: what the SDK tells of the binary, as JSON.
        info: what libQnnSystem of the installed onnxruntime-qnn tells of it; None where it can't read it.
        notes: what should be known before it is used.
        log: the tool's log.
    """

    path: Path
    soc: str
    graphs: tuple[str, ...]
    description: Path
    info: ContextInfo | None = field(repr=False)
    notes: tuple[str, ...]
    log: Path


def make_context(
    sdk: Sdk,
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    soc: str,
    *,
    options: Mapping[str, object] | None = None,
    graph: str | None = None,
    name: str | None = None,
    timeout: float = 1800,
) -> SdkContext:
    """Compile a model for the HTP of ``soc`` into ``output``/``NAME.SOC.bin``.

    Args:
        model: model library for this host (``.so``), or ``.dlc``.
        soc: e.g. "SM8650".
        options: of the ``htp`` backend; those that only affect running are left out.
        graph: name of the model's graph, for the options of graphs; by default the model's file name.
        name: of the result; by default the model's.
        timeout: seconds.

    Raises:
        ArtifactError: the model is missing or altered; the binary isn't one, isn't for ``soc`` or ignored the options; or
            ``output`` can't be written.
        OptionError: unknown SoC or option, or one that the tool doesn't have.
        CompileError: the tool refused the model.
        TargetError: the tool died, hung, or isn't there.
    """
    chosen = find_soc(soc)
    source = Path(model).expanduser().absolute()
    if source.suffix not in (".so", ".dlc"):
        raise ArtifactError(
            f"{source}: expected a model library (.so) or a .dlc: make one with 'pytest-qnn sdk library'"
        )
    if not source.is_file():
        raise ArtifactError(
            f"{source}: there is no such file: correct the path, or make it with 'pytest-qnn sdk library'"
        )
    check_record(source)
    stem = name or source.stem.removeprefix("lib" if source.suffix == ".so" else "")
    if not re.fullmatch(r"\w[\w.-]*", stem, re.ASCII):
        raise OptionError(f"name: {stem!r} can't be a file name here: use letters, digits, '_', '-' and '.'")
    asked = compile_options("htp", check_options("htp", options or {}))
    named = graph or graph_name(source.stem.removeprefix("lib" if source.suffix == ".so" else ""))
    extensions, outer = backend_extensions("htp", chosen, asked, [named])
    folder = Path(output).expanduser().absolute()
    binary = f"{stem}.{chosen.name}"
    with step(sdk, CONTEXT_GENERATOR, source.name, folder, f"{binary}.context.log", timeout) as run:
        config = write_backend_extensions(run.work, sdk.library(EXTENSION_LIBRARIES["htp"]), extensions, outer)
        arguments = ["--model", str(source)]
        if source.suffix == ".dlc":
            arguments = ["--model", str(sdk.library(DLC_LIBRARY)), "--dlc_path", str(source)]
        arguments += ["--backend", str(sdk.library(BACKEND_LIBRARY)), "--binary_file", binary]
        arguments += ["--output_dir", str(run.work / "results"), "--config_file", str(config)]
        run.run(arguments)
        made = run.work / "results" / f"{binary}.bin"
        run.made(made)
        description = describe_context(sdk, made, run.work / f"{binary}.json")
        graphs = _graphs(description)
        if "graphs" in extensions and named not in graphs:
            raise ArtifactError(
                f"{source.name}: its graph is called {' or '.join(map(repr, graphs)) or '(nothing)'}, not {named!r}, so the "
                f"tool ignored {', '.join(asked)}: pass graph= (--graph) with the graph's own name"
            )
        info, notes = _look(sdk, made, chosen.soc_id, f"{chosen.name} (v{chosen.htp_arch})")
        kept = {
            made: folder / made.name,
            description: folder / description.name,
            run.work / "backend_extensions.json": folder / f"{binary}.backend_extensions.json",
        }
        run.hand_over(kept, [source], arguments)
        looked = replace(info, path=kept[made]) if info else None
        return SdkContext(kept[made], chosen.name, graphs, kept[description], looked, notes, run.log)


def describe_context(
    sdk: Sdk, binary: str | os.PathLike[str], output: str | os.PathLike[str], timeout: float = DESCRIBE_SECONDS
) -> Path:
    """Write what the SDK tells of a context binary (graphs, tensors, encodings, release) to the JSON file ``output``.

    Raises:
        ArtifactError: there is no such file, or ``output`` can't be written.
        CompileError: the tool can't read it: not a context binary, or one of a newer SDK.
        TargetError: the tool died, hung, or isn't there.
    """
    file, target = Path(binary).expanduser().absolute(), Path(output).expanduser().absolute()
    if not file.is_file():
        raise ArtifactError(f"{file}: there is no such context binary: correct the path")
    with step(sdk, CONTEXT_UTILITY, file.name, target.parent, f"{target.stem}.describe.log", timeout) as run:
        made = run.work / target.name
        run.run(["--context_binary", str(file), "--json_file", str(made)])
        run.made(made)
        os.replace(made, target)
        run.log.unlink()
    return target


def _graphs(description: Path) -> tuple[str, ...]:
    """Names of the graphs in a description of the SDK: ``info.graphs[].info.graphName``."""
    try:
        content: Any = json.loads(description.read_text(encoding="utf-8"))
        return tuple(str(graph["info"]["graphName"]) for graph in content["info"]["graphs"])
    except (ValueError, LookupError, TypeError) as error:
        raise ArtifactError(
            f"{CONTEXT_UTILITY}: its description of the binary has no info.graphs[].info.graphName ({error!r}): this "
            "release of the SDK writes something else, and pytest-qnn can't check what was made"
        ) from error


def _look(sdk: Sdk, binary: Path, soc_id: int, wanted: str) -> tuple[ContextInfo | None, tuple[str, ...]]:
    """What the installed runtime tells of a fresh binary, and what should be known of it."""
    here, notes = runtime_release(), []
    if here and sdk.release and sdk.release != here:
        notes.append(
            f"made by QNN {sdk.version}; the installed onnxruntime-qnn has {here[0]}.{here[1]}, and a context binary of one "
            "release may not load in another: run it with the runtime of its own release"
        )
    try:
        info = read_context_binary(binary)
    except QnnError as error:
        if here and sdk.release and sdk.release <= here:
            raise
        return None, (*notes, f"not looked into: {error}")
    if info.soc_id not in (None, soc_id):
        raise ArtifactError(f"{binary.name}: the tool made it for {info.made_for} although {wanted} was asked for")
    return info, tuple(notes)
