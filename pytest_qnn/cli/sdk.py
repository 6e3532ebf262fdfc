"""``pytest-qnn sdk``: the QNN SDK's own tools, each with a deadline, its log kept and its failure explained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pytest_qnn.cli import write
from pytest_qnn.cli.arguments import add_dimensions, read_dimensions, read_pairs


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "sdk",
        help="run the QNN SDK's converter and generators",
        description="Runs the tools of the QNN SDK in QNN_SDK_ROOT, each until a deadline. Results appear only when they are "
        "whole, each with a record of what made it from what; the tool's log stays beside them.",
    )
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    convert = _step(steps, "convert", "qnn-onnx-converter: ONNX to C++ and weights", "MODEL", "ONNX file", _convert)
    _add_conversion(convert)
    library = _step(
        steps, "library", "qnn-model-lib-generator: C++ to a model library", "CPP", "what convert made", _library
    )
    library.add_argument(
        "--target", default="x86_64-linux-clang", metavar="NAME", help="x86_64-linux-clang (default) or aarch64-android"
    )
    library.add_argument("--name", help="of the library; default: the source's")
    context = _step(
        steps,
        "context",
        "qnn-context-binary-generator: model library or DLC to a context binary",
        "MODEL",
        "model library for this host (.so), or .dlc",
        _context,
    )
    context.add_argument("--graph", metavar="NAME", help="name of the model's graph; default: the file's")
    _add_backend(context)
    build = _step(steps, "build", "all three, from an ONNX model to context binaries", "MODEL", "ONNX file", _build)
    _add_conversion(build)
    _add_backend(build)


def _step(steps: Any, name: str, text: str, metavar: str, what: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = steps.add_parser(name, help=text, description=text)
    parser.add_argument("file", metavar=metavar, help=what)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the results; made if missing")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for each tool; default 1800")
    parser.add_argument(
        "--python",
        metavar="EXE",
        help="interpreter for the SDK's Python tools; default: QNN_SDK_PYTHON, else their own",
    )
    parser.set_defaults(run=run)
    return parser


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    add_dimensions(parser)
    parser.add_argument("--data", metavar="DATA", help="calibration data as for quantize; makes the converter quantise")
    parser.add_argument("--samples", type=int, metavar="N", help="use the first N samples only")
    parser.add_argument("--overrides", metavar="FILE", help="quantization_overrides: encodings as JSON")
    for what in ("activations", "weights", "bias"):
        parser.add_argument(
            f"--{what}", type=int, metavar="BITS", help=f"bit width of {what}; the converter's default is 8"
        )
    parser.add_argument("--per-channel", action="store_true", help="quantise weights of convolutions per channel")
    parser.add_argument("--float-fallback", action="store_true", help="quantise by encodings alone, without data")
    parser.add_argument(
        "--layout", metavar="INPUT=LAYOUT", action="append", default=[], help="e.g. image=NCHW; repeatable"
    )
    parser.add_argument("--name", help="of the results and of the graph; default: the model's")


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--soc", metavar="SOC[,SOC...]", help="default: the setting soc")
    parser.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="of the htp backend, e.g. vtcm_mb=8; repeatable",
    )
    parser.add_argument("--backend-config", metavar="FILE", help="JSON file with options of backends")


def _conversion(chosen: argparse.Namespace) -> dict[str, Any]:
    same = ("data", "samples", "overrides", "activations", "weights", "bias", "per_channel", "float_fallback", "name")
    values = {name: getattr(chosen, name) for name in same}
    layouts = read_pairs(chosen.layout, "--layout", "image=NCHW")
    return {**values, "dimensions": read_dimensions(chosen) or None, "layouts": layouts, "timeout": chosen.timeout}


def _backend(chosen: argparse.Namespace) -> tuple[list[str], dict[str, object]]:
    """Names of the SoCs, and options: the command line's own over the JSON file's over the project's."""
    from pytest_qnn.errors import UsageError
    from pytest_qnn.interface import project_folder
    from pytest_qnn.settings import load_settings
    from pytest_qnn.targets.options import check_options

    given = {"backend_config": chosen.backend_config} if chosen.backend_config else None
    settings = load_settings(project_folder(Path.cwd()), given, flag="--")
    socs = [name for name in (chosen.soc or settings.soc).replace(",", " ").split() if name]
    if not socs:
        raise UsageError("--soc: name at least one SoC, e.g. --soc SM8550,SM8650")
    own = check_options("htp", read_pairs(chosen.option, "--option", "vtcm_mb=8"))
    return list(dict.fromkeys(socs)), {**settings.backend_options.get("htp", {}), **own}


def _convert(chosen: argparse.Namespace) -> int:
    from pytest_qnn import sdk

    made = sdk.convert(sdk.find_sdk(python=chosen.python), chosen.file, chosen.output, **_conversion(chosen))
    write(f"{made.cpp}")
    if made.weights is not None:
        write(f"{made.weights}")
    return 0


def _library(chosen: argparse.Namespace) -> int:
    from pytest_qnn import sdk

    made = sdk.build_library(
        sdk.find_sdk(python=chosen.python),
        chosen.file,
        chosen.output,
        target=chosen.target,
        name=chosen.name,
        timeout=chosen.timeout,
    )
    write(f"{made.path}")
    return 0


def _context(chosen: argparse.Namespace) -> int:
    from pytest_qnn import sdk

    socs, options = _backend(chosen)
    found = sdk.find_sdk(python=chosen.python)
    for soc in socs:
        _show(
            sdk.make_context(
                found, chosen.file, chosen.output, soc, options=options, graph=chosen.graph, timeout=chosen.timeout
            )
        )
    return 0


def _build(chosen: argparse.Namespace) -> int:
    from pytest_qnn import sdk

    socs, options = _backend(chosen)
    made = sdk.build(
        sdk.find_sdk(python=chosen.python), chosen.file, chosen.output, socs, options=options, **_conversion(chosen)
    )
    write(f"{made.library.path}")
    for context in made.contexts:
        _show(context)
    return 0


def _show(context: Any) -> None:
    write(f"{context.path}")
    for note in context.notes:
        write(f"  note: {note}")
