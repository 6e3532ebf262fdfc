"""``qnn-model-lib-generator``: from the converter's C++ and weights to a model library."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pytest_qnn.errors import ArtifactError, OptionError, TargetError
from pytest_qnn.sdk.installation import ANDROID, HOST, LIBRARY_GENERATOR, Sdk
from pytest_qnn.sdk.tool import check_record, step
from pytest_qnn.settings import unknown_name

TARGETS = (HOST, ANDROID)


@dataclass(frozen=True)
class ModelLibrary:
    """A model library and what it is for.

    Attributes:
        path: ``lib<name>.so``.
        target: toolchain, "x86_64-linux-clang" or "aarch64-android".
        log: the tool's log.
    """

    path: Path
    target: str
    log: Path


def build_library(
    sdk: Sdk,
    cpp: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    target: str = HOST,
    name: str | None = None,
    timeout: float = 1800,
) -> ModelLibrary:
    """Compile a converted model into ``output``/``TARGET``/``libNAME.so``.

    Args:
        cpp: what :func:`convert` made.
        weights: its constants; by default the ``.bin`` beside it, if there is one.
        target: "x86_64-linux-clang" or "aarch64-android", which needs the Android NDK.
        name: by default the source's.
        timeout: seconds.

    Raises:
        ArtifactError: the source is missing or altered, nothing was made, or ``output`` can't be written.
        OptionError: unknown target or bad name.
        CompileError: the tool or its compiler failed.
        TargetError: the tool died, hung, or isn't there; or the NDK isn't.
    """
    source = Path(cpp).expanduser().absolute()
    if not source.is_file():
        raise ArtifactError(f"{source}: there is no such C++ source: convert a model first")
    if source.suffix != ".cpp":
        raise ArtifactError(f"{source}: expected the converter's .cpp: name that file")
    if target not in TARGETS:
        raise OptionError(unknown_name("target", target, TARGETS))
    chosen = name or source.stem
    if not re.fullmatch(r"\w+", chosen, re.ASCII):
        raise OptionError(f"name: {chosen!r} can't name a library here: use letters, digits and '_'")
    check_record(source)
    beside = source.with_suffix(".bin")
    constants = Path(weights).expanduser().absolute() if weights is not None else beside if beside.is_file() else None
    if constants is not None and not constants.is_file():
        raise ArtifactError(f"{constants}: there are no such weights: name the .bin that the converter made")
    if target == ANDROID and shutil.which("ndk-build", path=sdk.environment()["PATH"]) is None:
        raise TargetError(
            f"{LIBRARY_GENERATOR} on {source.name}: {ANDROID} needs ndk-build, which is not on PATH: install the Android NDK "
            "and set ANDROID_NDK_ROOT to its folder"
        )
    folder = Path(output).expanduser().absolute()
    with step(sdk, LIBRARY_GENERATOR, source.name, folder, f"{chosen}.{target}.library.log", timeout) as run:
        arguments = ["-c", str(source), *(["-b", str(constants)] if constants else [])]
        arguments += ["-t", target, "-l", chosen, "-o", str(run.work / "results")]
        run.run(arguments)
        made = run.work / "results" / target / f"lib{chosen}.so"
        run.made(made)
        result = folder / target / made.name
        run.hand_over({made: result}, [source, *([constants] if constants else [])], arguments)
        return ModelLibrary(result, target, run.log)
