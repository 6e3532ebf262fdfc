"""``pytest-qnn encodings``: show, check, convert, compare and apply encodings of AIMET, QNN and QDQ models."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pytest_qnn.cli import write

if TYPE_CHECKING:
    from pytest_qnn.encodings.encoding_set import EncodingSet, TensorEncoding

FILE = "AIMET or QNN encodings, or a QDQ model (.onnx)"
MODEL = "the float model, for what a file leaves to it: unknown tensors, shapes, axes"


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("encodings", help="show, check, convert, compare and apply quantisation encodings")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    show = verbs.add_parser("show", help="list the encodings of a file")
    show.add_argument("file", help=FILE)
    show.add_argument("--tensor", metavar="NAME", help="this tensor alone, with every channel")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(run=_show)

    check = verbs.add_parser("check", help="find everything that is wrong with a file; 1 if there is something")
    check.add_argument("file", help=FILE)
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=_check)

    convert = verbs.add_parser("convert", help="write a file in another format")
    convert.add_argument("file", help=FILE)
    convert.add_argument("output", help="the file to write")
    convert.add_argument("--to", required=True, metavar="FORMAT", help="aimet-0.6.1, aimet-1.0.0, aimet-2.0.0 or qnn")
    convert.add_argument(
        "--unsigned",
        action="store_true",
        help="write signed asymmetric encodings, which only aimet-2.0.0 has, on the unsigned grid: the same real numbers",
    )
    convert.set_defaults(run=_convert)

    compare = verbs.add_parser("compare", help="what differs between two files, and by how many steps")
    compare.add_argument("first", help=FILE)
    compare.add_argument("second", help=FILE)
    compare.add_argument(
        "--max-steps", type=float, metavar="N", help="exit with 1 if a range moved further or a type changed"
    )
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(run=_compare)

    for verb in (show, check, convert, compare):
        verb.add_argument("--model", metavar="ONNX", help=MODEL)

    apply = verbs.add_parser("apply", help="write the QDQ model of a float model with given encodings")
    apply.add_argument("model", help="the float model")
    apply.add_argument("file", help=FILE)
    apply.add_argument("output", help="the QDQ model to write")
    apply.set_defaults(run=_apply)


def _show(chosen: argparse.Namespace) -> int:
    from pytest_qnn.encodings.files import read_encodings
    from pytest_qnn.errors import EncodingError
    from pytest_qnn.settings import unknown_name

    encodings = read_encodings(chosen.file, chosen.model)
    tensors = encodings.tensors
    if chosen.tensor is not None:
        tensors = tuple(t for t in tensors if t.name == chosen.tensor)
        if not tensors:
            names = {t.name for t in encodings.tensors}
            raise EncodingError(f"{encodings.source}: --tensor: {unknown_name('tensor', chosen.tensor, names)}")
    if chosen.json:
        _write_json({**_about(encodings), "tensors": [_as_json(t) for t in tensors]})
        return 0
    if chosen.tensor is None:
        _print_head(encodings)
    table = _table("tensor", "kind", "type", "scale", "zero point", "range", "scales")
    for tensor in tensors:
        _add(table, tensor, each=chosen.tensor is not None)
    _print(table)
    return 0


def _check(chosen: argparse.Namespace) -> int:
    from pytest_qnn.encodings.checks import check_encodings
    from pytest_qnn.encodings.files import read_encodings
    from pytest_qnn.model.graph_tensors import read_graph

    graph = read_graph(chosen.model) if chosen.model else None
    encodings = read_encodings(chosen.file)
    problems = check_encodings(encodings, graph)
    if chosen.json:
        _write_json({**_about(encodings), "ok": not problems, "problems": problems})
    else:
        _print_head(encodings)
        for problem in problems:
            write(problem)
        count = {0: "nothing wrong", 1: "1 problem"}.get(len(problems), f"{len(problems)} problems")
        write(
            f"{count} in {len(encodings.tensors)} encodings"
            + ("" if graph else " (without --model: names and shapes unchecked)")
        )
    return 1 if problems else 0


def _convert(chosen: argparse.Namespace) -> int:
    from pytest_qnn.encodings.files import read_encodings, write_encodings

    encodings = read_encodings(chosen.file, chosen.model)
    if chosen.unsigned:
        encodings = encodings.as_unsigned()
    write_encodings(encodings, chosen.output, chosen.to, chosen.model)
    _print_head(encodings)
    write(f"wrote {chosen.output}: {chosen.to}, {len(encodings.tensors)} encodings")
    return 0


def _compare(chosen: argparse.Namespace) -> int:
    from pytest_qnn.encodings.compare import compare_encodings
    from pytest_qnn.encodings.files import read_encodings

    first, second = read_encodings(chosen.first, chosen.model), read_encodings(chosen.second, chosen.model)
    found = compare_encodings(first, second)
    exceeded = chosen.max_steps is not None and found.exceeds(chosen.max_steps)
    if chosen.json:
        changes = [
            {"tensor": c.name, "steps": c.steps, "before": c.before, "after": c.after, "changed": c.changed}
            for c in found.changes
        ]
        only = {"only_first": found.only_first, "only_second": found.only_second}
        _write_json({"ok": not exceeded, "same": found.same, **only, "changes": changes})
        return int(exceeded)
    if found.changes:
        table = _table("tensor", "moved by steps", "from", "to", "changed")
        for c in found.changes:
            table.add_row(Text(c.name), f"{c.steps:.3g}", _range(c.before), _range(c.after), Text(", ".join(c.changed)))
        _print(table)
    for file, names in ((chosen.first, found.only_first), (chosen.second, found.only_second)):
        if names:
            write(f"only in {file}: {', '.join(names)}")
    write(
        f"{found.same} the same, {len(found.changes)} changed, {len(found.only_first) + len(found.only_second)} in one file alone"
    )
    if exceeded:
        write(f"more than --max-steps {chosen.max_steps:g} allows")
    return int(exceeded)


def _apply(chosen: argparse.Namespace) -> int:
    from pytest_qnn.encodings.apply import apply_encodings
    from pytest_qnn.encodings.files import read_encodings

    encodings = read_encodings(chosen.file)
    _print_head(encodings)
    done = apply_encodings(chosen.model, encodings, chosen.output)
    if done.derived:
        table = _table("derived", "from")
        for name, source in done.derived.items():
            table.add_row(Text(name), Text(source))
        _print(table)
    if done.unquantized:
        shown = ", ".join(done.unquantized[:10]) + (", …" if len(done.unquantized) > 10 else "")
        write(f"left in float, {len(done.unquantized)} tensors: {shown}")
    write(
        f"wrote {chosen.output}: {len(done.given)} tensors by the file's encodings, {len(done.derived)} by derived ones"
    )
    return 0


# --- output -------------------------------------------------------------------------------------------------------------


def _write_json(value: Any) -> None:
    write(json.dumps(_plain(value), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: null for what is no finite number."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(table: Table) -> None:
    Console(width=shutil.get_terminal_size((120, 24)).columns, highlight=False).print(table)


def _print_head(encodings: EncodingSet) -> None:
    write(f"{encodings.source}: {encodings.format}")
    for note in encodings.notes:
        write(f"note: {note}")


def _about(encodings: EncodingSet) -> dict[str, Any]:
    return {
        "file": encodings.source,
        "format": encodings.format,
        "about": dict(encodings.about),
        "notes": encodings.notes,
    }


def _add(table: Table, tensor: TensorEncoding, each: bool) -> None:
    encoding = tensor.encoding
    kind = tensor.kind or "?"
    if encoding is None:
        table.add_row(Text(tensor.name), kind, str(tensor.value), "", "", "", "")
        return
    if each and len(encoding.scale) > 1:
        for i, (scale, zero, ends) in enumerate(zip(encoding.scale, encoding.zero_point, encoding.ranges, strict=True)):
            table.add_row(
                Text(f"{tensor.name}[{i}]"), kind, encoding.dtype, f"{scale:.6g}", str(zero), _range(ends), ""
            )
        return
    axis = "?" if encoding.axis is None else encoding.axis
    blocks = f", blocks of {encoding.block_size}" if encoding.block_size is not None else ""
    scales = f"{len(encoding.scale)} (axis {axis}{blocks})" if len(encoding.scale) > 1 else "1"
    table.add_row(
        Text(tensor.name),
        kind,
        encoding.dtype,
        _span([f"{min(encoding.scale):.6g}", f"{max(encoding.scale):.6g}"]),
        _span([str(min(encoding.zero_point)), str(max(encoding.zero_point))]),
        _range(encoding.range),
        scales,
    )


def _span(ends: list[str]) -> str:
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} .. {ends[1]}"


def _range(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.5g} .. {ends[1]:.5g}"


def _as_json(tensor: TensorEncoding) -> dict[str, Any]:
    encoding = tensor.encoding
    if encoding is None:
        return {"name": tensor.name, "kind": tensor.kind, "dtype": str(tensor.value)}
    return {
        "name": tensor.name,
        "kind": tensor.kind,
        "dtype": encoding.dtype,
        "scale": encoding.scale,
        "zero_point": encoding.zero_point,
        "axis": encoding.axis,
        "block_size": encoding.block_size,
        "range": encoding.range,
        "symmetric": encoding.symmetric,
    }
