"""``pytest-qnn lint``: what makes a model quantise or run badly on HTP."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.text import Text

from pytest_qnn.cli import write
from pytest_qnn.cli.arguments import add_dimensions, read_dimensions

if TYPE_CHECKING:
    from pytest_qnn.lint.findings import LintReport


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("lint", help="find what makes a model quantise or run badly on HTP")
    parser.add_argument("model", nargs="?", help="ONNX file, float or QDQ")
    parser.add_argument(
        "--data", metavar="SOURCE", help="samples: a folder, a .npy/.npz file, an input list, module:function"
    )
    parser.add_argument(
        "--ignore",
        metavar="RULE[:NODE]",
        action="append",
        default=[],
        help="don't report this; repeatable, or with commas",
    )
    add_dimensions(parser)
    parser.add_argument("--soc", help="SoC to compile for")
    parser.add_argument(
        "--no-compile", action="store_true", help="look at the file only: don't compile it on the simulator"
    )
    parser.add_argument("--rules", action="store_true", help="list the rules")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Lint; 0 only if nothing was found."""
    from pytest_qnn.errors import OptionError
    from pytest_qnn.lint.findings import RULES

    if chosen.rules:
        rows = {name: {"severity": r.severity, "needs": r.needs, "finds": r.summary} for name, r in RULES.items()}
        if chosen.json:
            write(json.dumps(rows, indent=1))
        else:
            for name, row in rows.items():
                write(
                    f"{name:20}{row['severity']:9}{row['finds']}"
                    + ("" if row["needs"] == "the model" else f" (needs {row['needs']})")
                )
        return 0
    if chosen.model is None:
        raise OptionError("lint: name the model, or ask for --rules")
    report = _lint(chosen)
    if chosen.json:
        write(json.dumps(report.to_json(), indent=1))
    else:
        _print(report)
    return 0 if report.ok else 1


def _lint(chosen: argparse.Namespace) -> LintReport:
    from pytest_qnn.bench import Bench
    from pytest_qnn.interface import project_folder
    from pytest_qnn.lint.check import lint
    from pytest_qnn.markers import BackendRequest
    from pytest_qnn.settings import load_settings

    settings = load_settings(project_folder(Path.cwd()), {"soc": chosen.soc} if chosen.soc else None, flag="--")
    ignore = [entry for given in chosen.ignore for entry in given.split(",") if entry]
    bench = Bench(settings.on_this_host())
    try:
        missing = "--no-compile was given" if chosen.no_compile else bench.target.missing("htp")
        backend = None if missing else bench.backend(BackendRequest("htp"))
        return lint(
            bench.locate(chosen.model),
            ignore=ignore,
            data=chosen.data,
            backend=backend,
            dimensions=read_dimensions(chosen),
            without_backend=missing,
        )
    finally:
        bench.close()


def _print(report: LintReport) -> None:
    from pytest_qnn.lint.findings import ERROR, headline, notes

    width = shutil.get_terminal_size((100, 24)).columns
    console = Console(width=width, highlight=False, soft_wrap=False)
    console.print(Text(headline(report)))
    for f in report.findings:
        style = "bold red" if f.severity == ERROR else "bold yellow"
        console.print(Text.assemble((f.severity, style), " ", (f.rule, "bold"), f"  {f.node} ({f.op_type})"))
        lines = [Text(f.reason), Text(f"remedy: {f.remedy}"), Text(f"ignore: {f.key}", style="dim")]
        console.print(Padding(Group(*lines), (0, 0, 0, 4)))
    for note in notes(report):
        console.print(Text(note))
    if report.fault is not None:
        console.print(Text(f"the runtime failed: {report.fault}"))
