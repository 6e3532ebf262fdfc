"""``pytest-qnn compile``: context binaries for SoCs, made on this host."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pytest_qnn.cli import write
from pytest_qnn.cli.arguments import add_dimensions, read_dimensions, read_pairs


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "compile",
        help="compile a model to context binaries for SoCs",
        description="Compiles a model for each SoC on this host, so that a device need not: NAME.SOC.ctx.onnx, its binary and "
        "a manifest that is checked before they are used. An up-to-date compile is taken from the cache.",
    )
    parser.add_argument("model", metavar="MODEL", help="ONNX file, float32 or QDQ")
    parser.add_argument("--soc", metavar="SOC[,SOC...]", help="default: the setting soc")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the artifacts; made if missing")
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="of the htp backend, e.g. vtcm_mb=8; repeatable",
    )
    add_dimensions(parser)
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Compile for each SoC; returns 1 if one of them failed."""
    from pytest_qnn.artifacts.context import read_artifact
    from pytest_qnn.bench import Bench
    from pytest_qnn.devices.soc import find_soc
    from pytest_qnn.errors import QnnError, UsageError
    from pytest_qnn.interface import project_folder
    from pytest_qnn.markers import BackendRequest
    from pytest_qnn.model.onnx_file import read_model
    from pytest_qnn.runners.compiler import place
    from pytest_qnn.settings import load_settings
    from pytest_qnn.targets.options import check_options

    settings = load_settings(project_folder(Path.cwd()))
    names = [name for name in (chosen.soc or settings.soc).replace(",", " ").split() if name]
    if not names:
        raise UsageError("--soc: name at least one SoC, e.g. --soc SM8550,SM8650")
    socs = list(dict.fromkeys(find_soc(name).name for name in names))
    options: dict[str, Any] = dict(read_pairs(chosen.option, "--option", "vtcm_mb=8"))
    check_options("htp", options)
    dimensions = read_dimensions(chosen)
    failed = 0
    bench = Bench(settings.on_this_host())
    try:
        backend = bench.backend(BackendRequest("htp"))
        for soc in socs:
            bench.artifacts.clear()
            try:
                wrapper = backend.compile(chosen.model, chosen.output, dimensions=dimensions, soc=soc, **options)
            except UsageError:
                raise  # the same for every SoC
            except QnnError as error:
                sys.stderr.write(f"pytest-qnn: {soc}: {error}\n")
                failed += 1
                continue
            manifest = read_artifact(wrapper)
            took = "from the cache" if bench.artifacts["reused"] else f"compiled in {manifest.compile_seconds:.1f} s"
            placement = place(read_model(chosen.model, dimensions), "htp", manifest.placement, manifest.reasons)
            write(
                f"{_shown(wrapper)}: {soc} (v{manifest.htp_arch}), {manifest.binary_size / 2**20:.2f} MiB, "
                f"{placement.backend} of {placement.backend + len(placement.misplaced)} nodes in "
                f"{manifest.partitions} graph{'s' if manifest.partitions > 1 else ''}, QNN {manifest.qnn}, {took}"
            )
            for node in placement.misplaced:
                write(f"  not in it, onnxruntime's CPU must run it: {node}")
    finally:
        bench.close()
    return 1 if failed else 0


def _shown(file: Path) -> str:
    """The path from the current folder, where it lies below it."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)
