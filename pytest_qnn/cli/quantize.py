"""``pytest-qnn quantize``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qnn.cli import write
from pytest_qnn.cli.arguments import add_dimensions, read_dimensions
from pytest_qnn.errors import OptionError

if TYPE_CHECKING:
    from pytest_qnn.quantization.report import CalibrationReport

ROWS = 8  # of the printed table; the JSON report has all tensors


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "quantize",
        help="make a QDQ model from a float model and calibration data",
        description="Quantise a float ONNX model for QNN's HTP backend, with ranges from calibration data.",
    )
    parser.add_argument("model", help="float ONNX model")
    parser.add_argument(
        "--data",
        required=True,
        help="a folder of .npy or .npz files or with an input_list.txt of .raw files, such a list, one .npy or .npz file, or "
        "package.module:function that returns an iterable of samples",
    )
    parser.add_argument("--output", "-o", required=True, help="QDQ model to write")
    parser.add_argument("--activations", default="8", help="8 or 16 bits, or uint8, uint16, int8 (default: 8)")
    parser.add_argument("--weights", type=int, default=8, help="4, 8 or 16 bits (default: 8)")
    parser.add_argument("--per-channel", action="store_true", help="a scale for each output channel of convolutions")
    parser.add_argument("--method", default="minmax", help="minmax, entropy or percentile (default: minmax)")
    parser.add_argument("--percentile", type=float, help="of --method percentile (default: 99.999)")
    parser.add_argument("--bins", type=int, help="of the histograms (default: entropy 512, percentile 2048)")
    parser.add_argument(
        "--override", action="append", default=[], metavar="TENSOR=BITS", help="precision of one tensor"
    )
    parser.add_argument(
        "--range", action="append", default=[], metavar="TENSOR=LOW:HIGH", help="range of one activation"
    )
    parser.add_argument("--symmetric-activations", action="store_true", help="ranges of activations around zero")
    parser.add_argument(
        "--symmetric-weights", action=argparse.BooleanOptionalAction, help="(default: where they are signed)"
    )
    add_dimensions(parser)
    parser.add_argument("--samples", type=int, help="use the first so many samples only")
    parser.add_argument("--raw-type", default="float32", help="what .raw files hold: float32 (default) or native")
    parser.add_argument(
        "--external-data",
        action=argparse.BooleanOptionalAction,
        help="weights in a file of their own (default: as the model)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the calibration report as JSON")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Quantise; returns the exit code."""
    signal.signal(signal.SIGTERM, _stop)
    from pytest_qnn.quantization.quantize import quantize
    from pytest_qnn.quantization.report import write_report

    with _progress(not sys.stderr.isatty()) as progress:
        result = quantize(
            chosen.model,
            chosen.data,
            chosen.output,
            progress=progress,
            activations=chosen.activations,
            weights=chosen.weights,
            per_channel=chosen.per_channel,
            method=chosen.method,
            percentile=chosen.percentile,
            bins=chosen.bins,
            overrides=_by_name(chosen.override, "--override", int),
            ranges=_by_name(chosen.range, "--range", _bounds),
            symmetric_activations=chosen.symmetric_activations,
            symmetric_weights=chosen.symmetric_weights,
            dimensions=read_dimensions(chosen),
            samples=chosen.samples,
            raw_type=chosen.raw_type,
            external_data=chosen.external_data,
        )
    _print(result.report)
    for note in result.notes:
        write(f"note: {note}")
    for warning in result.report.warnings:
        write(f"warning: {warning}")
    write(f"{chosen.output}: {result.options.name}, calibrated on {_samples(result.report.samples)}")
    if chosen.report is not None:
        try:
            write_report(result.report, chosen.report)
        except OSError as error:
            raise OptionError(
                f"--report {chosen.report}: can't be written: {error.strerror or error}. The model was written all the same"
            ) from None
    return 0


def _stop(signum: int, frame: object) -> None:
    """End by an exception, so that what is half done is cleaned up."""
    raise SystemExit(128 + signum)


@contextmanager
def _progress(plain: bool) -> Iterator[Callable[[int, int | None], None] | None]:
    """A progress bar on standard error; where that is no terminal, nothing until it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if plain:
        yield None
        return
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("calibrating", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(report: CalibrationReport) -> None:
    """The worst tensors, as a table."""
    import shutil

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    worst = report.worst(ROWS)
    if not worst:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tensor", overflow="fold")
    for title in ("observed", "encoded", "bits", "clipped", "unused"):
        table.add_column(title, justify="right", no_wrap=True)
    for t in worst:
        table.add_row(
            Text(t.name),
            f"{t.low:.4g} .. {t.high:.4g}",
            f"{t.encoded_low:.4g} .. {t.encoded_high:.4g}",
            str(t.bits),
            "?" if t.clipped is None else _percent(t.clipped),
            _percent(t.unused or 0.0),
        )
    Console(width=shutil.get_terminal_size((120, 24)).columns, highlight=False).print(table)
    quantized = sum(t.bits is not None for t in report.tensors)
    if quantized > len(worst):
        write(f"(the worst {len(worst)} of {quantized} quantised tensors; --report FILE has all)")


def _percent(share: float) -> str:
    return "0 %" if share == 0 else "<0.01 %" if share < 1e-4 else f"{100 * share:.2g} %"


def _samples(count: int) -> str:
    return f"{count} sample{'s' if count != 1 else ''}"


def _by_name(texts: Sequence[str], option: str, convert: Callable[[str], Any]) -> dict[str, Any]:
    """``["name=value", ...]`` as a dict; names may have ``=`` in them.

    Raises:
        OptionError: not of that form.
    """
    found = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        try:
            if not equals or not name:
                raise ValueError
            found[name] = convert(value)
        except ValueError:
            raise OptionError(
                f"{option}: expected {'NAME=LOW:HIGH' if convert is _bounds else 'NAME=NUMBER'}, got {text!r}"
            ) from None
    return found


def _bounds(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    return float(low), float(high)
