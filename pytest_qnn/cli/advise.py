"""``pytest-qnn advise``: which backend to run a model on, from what really happens on each."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pytest_qnn.cli import write
from pytest_qnn.cli.arguments import add_dimensions, read_dimensions

if TYPE_CHECKING:
    from pytest_qnn.advice.measure import Row
    from pytest_qnn.advice.recommend import Choice, Recommendation
    from pytest_qnn.bench import Bench
    from pytest_qnn.model.onnx_file import Model
    from pytest_qnn.settings import Settings

SEEDED, MOST_SAMPLES = 4, 8
SHOWN_NODES = 8


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "advise",
        help="try a model on each backend and SoC, and recommend one",
        description="Compiles and runs a model on each backend and SoC and recommends one, from what really happened: nodes "
        "placed, precision, accuracy, size. The exit code is 1 if there is a SoC that no backend does it right for.",
    )
    parser.add_argument("model", help="ONNX file, float32 or QDQ")
    parser.add_argument("--float-model", metavar="FILE", help="float original of a QDQ model")
    parser.add_argument(
        "--data", metavar="SOURCE", help="samples: a folder, a .npy/.npz file, an input list, module:function"
    )
    parser.add_argument("--samples", type=int, help=f"use the first so many (default {MOST_SAMPLES})")
    parser.add_argument(
        "--soc", metavar="SOC[,SOC...]", help="default: the setting soc, and one of each other architecture"
    )
    parser.add_argument("--backend", metavar="NAME[,NAME...]", help="default: htp,cpu,gpu")
    parser.add_argument(
        "--prefer", choices=("accuracy", "latency", "power"), default="latency", help="(default latency)"
    )
    add_dimensions(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Try and recommend; 0 only if there is a recommendation for every SoC."""
    from pytest_qnn.advice.measure import candidates, measure
    from pytest_qnn.advice.recommend import recommend
    from pytest_qnn.bench import Bench
    from pytest_qnn.errors import UsageError
    from pytest_qnn.interface import project_folder
    from pytest_qnn.model.pair import read_pair
    from pytest_qnn.settings import load_settings

    settings = load_settings(project_folder(Path.cwd()))
    backends, socs = _backends(chosen.backend), _socs(chosen.soc, settings)
    dimensions = read_dimensions(chosen)
    bench = Bench(settings.on_this_host())
    try:
        _check_dimensions(bench.locate(chosen.model), dimensions)
        float_file = None if chosen.float_model is None else bench.locate(chosen.float_model)
        if float_file is not None and float_file.exists() and float_file.samefile(bench.locate(chosen.model)):
            raise UsageError(
                f"--float-model: {float_file.name} is MODEL itself: name the float model that MODEL was made from"
            )
        model, original = read_pair(bench.locate(chosen.model), float_file, dimensions)
        samples = _samples(chosen, model)
        tried = candidates(bench, model, original, backends, socs, dimensions)
        rows = _measured(measure, bench, tried, samples, quiet=chosen.json)
    finally:
        bench.close()
    advice = recommend(rows, chosen.prefer, synthetic=chosen.data is None)
    if chosen.json:
        _print_json(model, original, rows, advice, len(samples), chosen.data is None)
    else:
        _print(model, rows, advice, len(samples), chosen.data is None)
    return 0 if advice.ok else 1


def _backends(text: str | None) -> tuple[str, ...]:
    from pytest_qnn.errors import OptionError
    from pytest_qnn.settings import BACKENDS, unknown_name

    names = tuple(dict.fromkeys((text or "").replace(",", " ").split()))
    for name in names:
        if name not in BACKENDS:
            raise OptionError(f"--backend: {unknown_name('backend', name, BACKENDS)}")
    if text is not None and not names:
        raise OptionError("--backend: name at least one backend, e.g. --backend htp,cpu")
    return names or BACKENDS


def _socs(text: str | None, settings: Settings) -> tuple[str, ...]:
    """The SoCs that were asked for; else the setting's and the first of every other architecture."""
    from pytest_qnn.devices.soc import SOCS, find_soc
    from pytest_qnn.errors import OptionError

    if text is not None:
        names = text.replace(",", " ").split()
        if not names:
            raise OptionError("--soc: name at least one SoC, e.g. --soc SM8550,SM8650")
        return tuple(dict.fromkeys(find_soc(name).name for name in names))
    own = find_soc(settings.soc)
    one_of_each = {own.htp_arch: own}
    for soc in SOCS.values():
        one_of_each.setdefault(soc.htp_arch, soc)
    return tuple(soc.name for _, soc in sorted(one_of_each.items()))


def _check_dimensions(file: Path, dimensions: Mapping[str, int]) -> None:
    from pytest_qnn.errors import ModelError
    from pytest_qnn.model.onnx_file import read_model

    for spec in read_model(file).inputs:
        missing = [name for name in spec.unbound if name not in dimensions and not name.startswith("?")]
        if missing:
            raise ModelError(
                f"{file}: input {spec.describe()} has dynamic dimensions, and QNN runs fixed shapes only: give their sizes, "
                f"e.g. {' '.join(f'--dimensions {name}=1' for name in missing)}"
            )


def _samples(chosen: argparse.Namespace, model: Model) -> Sequence[Mapping[str, Any]]:
    from pytest_qnn.errors import OptionError
    from pytest_qnn.model.inputs import seeded_inputs
    from pytest_qnn.quantization.calibration import open_calibration_data

    if chosen.data is not None:
        return list(open_calibration_data(chosen.data, model.inputs, chosen.samples or MOST_SAMPLES))
    if chosen.samples is not None and chosen.samples < 1:
        raise OptionError(f"--samples must be at least 1, got {chosen.samples}")
    return seeded_inputs(model, chosen.samples or SEEDED)


def _measured(measure: Any, bench: Bench, tried: Sequence[Any], samples: Any, quiet: bool) -> list[Row]:
    console = Console(stderr=True, quiet=quiet)
    with console.status("") as status:

        def tell(candidate: Any) -> None:
            place = f"{candidate.backend} {candidate.soc or ''}".strip()
            status.update(f"{place}: {escape(candidate.model.name)}")

        return list(measure(bench, tried, samples, tell))


# --- output -----------------------------------------------------------------------------------------------------------


def _print_json(
    model: Model, original: Model | None, rows: Sequence[Row], advice: Recommendation, samples: int, synthetic: bool
) -> None:
    document = {
        "model": str(model.path),
        "float_model": original and str(original.path),
        "samples": samples,
        "synthetic_inputs": synthetic,
        "rows": [row.to_json() for row in rows],
        "recommendation": advice.to_json(),
        "ok": advice.ok,
    }
    write(json.dumps(document, indent=1))


def _print(model: Model, rows: Sequence[Row], advice: Recommendation, samples: int, synthetic: bool) -> None:
    console = Console(width=shutil.get_terminal_size((100, 24)).columns, highlight=False)
    what = f"{samples} seeded random" if synthetic else str(samples)
    console.print(Text(f"{model.path.name} ({model.precision}), {what} sample{'s' if samples > 1 else ''}\n"))
    console.print(_table(rows))
    console.print(
        Text("SQNR: against float; own noise: against onnxruntime, same model; compiled: seconds on this host")
    )
    for row in rows:
        if row.state not in ("ran", "not here") or row.misplaced or row.accurate is False:
            _print_row(console, row)
    console.print()
    for choice in advice.choices:
        _print_choice(console, choice)
    console.print(Text("not measured:"))
    for line in advice.not_measured:
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    if advice.hints:
        console.print(Text("next:"))
        for line in advice.hints:
            console.print(Padding(Text(line), (0, 0, 0, 2)))


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("backend", "SoC", "precision"):
        table.add_column(title, no_wrap=True)
    for title in ("nodes", "graphs", "SQNR", "own noise", "MiB", "compiled"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("result", no_wrap=True)
    for row in rows:
        ran = row.state == "ran"
        inner = row.nodes - row.edges
        table.add_row(
            row.backend,
            f"{row.soc} v{row.htp_arch}" if row.htp_arch else row.soc or "-",
            row.precision or "-",
            f"{row.placed}/{inner}" if row.nodes else "-",
            str(row.partitions or "-"),
            _decibels(row.sqnr_db) if ran else "-",
            _decibels(row.noise_db) if ran else "-",
            f"{row.size / 2**20:.2f}" if row.size else "-",
            f"{row.compile_seconds:.1f} s" if row.compile_seconds is not None else "-",
            _result(row),
        )
    return table


def _decibels(value: float | None) -> str:
    return "-" if value is None else "exact" if value == float("inf") else f"{value:.1f} dB"


def _result(row: Row) -> Text:
    if row.state != "ran":
        return Text(row.state, style="yellow" if row.state == "not here" else "red")
    return Text("right", style="green") if row.accurate else Text(f"wrong: {row.blame}", style="red")


def _print_row(console: Console, row: Row) -> None:
    place = " ".join(part for part in (row.backend, row.soc, row.precision) if part)
    console.print()
    console.print(Text(f"{place}: {row.reason}" if row.reason else f"{place}:"))
    for node in row.misplaced[:SHOWN_NODES]:
        console.print(Padding(Text(f"on the CPU: {node}"), (0, 0, 0, 2)))
    if len(row.misplaced) > SHOWN_NODES:
        console.print(Padding(Text(f"and {len(row.misplaced) - SHOWN_NODES} more"), (0, 0, 0, 2)))


def _print_choice(console: Console, choice: Choice) -> None:
    from pytest_qnn.advice.recommend import name

    where = f" for {', '.join(choice.socs)}" if choice.socs else ""
    if choice.rows:
        console.print(Text(f"recommended{where}: {name(choice.rows[0])}", style="bold"))
    else:
        console.print(Text(f"recommended{where}: nothing that was tried", style="bold red"))
    for line in (*choice.reasons, *(f"not {other}" for other in choice.rejected)):
        console.print(Padding(Text(line), (0, 0, 0, 2)))
