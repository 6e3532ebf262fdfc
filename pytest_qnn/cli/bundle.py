"""``pytest-qnn bundle``: a failing case that was kept: shown, judged again, run again."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pytest_qnn.cli import write
from pytest_qnn.cli.devices import add_settings, read_settings
from pytest_qnn.errors import BundleError, PlacementError, QnnError, UsageError
from pytest_qnn.interface import DEVICE_SETTINGS

if TYPE_CHECKING:
    from pytest_qnn.records.stored_bundle import Bundle
    from pytest_qnn.session import Session
    from pytest_qnn.verdict.judge import AccuracyVerdict

REPRODUCED, NOT_REPRODUCED, NOTHING_JUDGED = 0, 1, 2
SHOWN_FAILURES = 4
_CONTROL = re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]")


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("bundle", help="show a failing case that was kept, judge it again, run it again")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="what failed, figures, versions; of a folder of bundles: a list")
    judge = actions.add_parser(
        "judge",
        help="judge the stored outputs again, without any backend",
        description="Exit code 0: it passes, 1: it fails, 2: nothing was judged (wrong usage, damaged).",
    )
    again = actions.add_parser(
        "run",
        help="run the inputs again on this host or a device, judge by the same limits, compare with the stored outputs",
        description="Exit code 0: reproduced (it fails again, with the same outputs or different ones), 1: not reproduced, 2: "
        "nothing was judged (wrong usage, damaged, the model isn't there, the runtime failed).",
    )
    for action, function in ((show, _show), (judge, _judge), (again, _run)):
        action.add_argument("folder", metavar="DIR", help="a bundle, as a failure's message names it")
        action.add_argument("--json", action="store_true", help="print JSON")
        action.set_defaults(run=function)
    again.add_argument("--soc", help="simulate this SoC instead of the stored one")
    again.add_argument(
        "--device", metavar="SERIAL", help="on this attached device: its serial, or adb://SERIAL@HOST:PORT"
    )
    add_settings(again)
    again.add_argument("--model", metavar="FILE", help="where the model is now")
    again.add_argument("--float-model", metavar="FILE", help="where its float original is now")
    again.add_argument("--artifact", metavar="FILE", help="where the artifact is now that the test gave")


# --- show -------------------------------------------------------------------------------------------------------------


def _show(chosen: argparse.Namespace) -> int:
    from pytest_qnn.records.bundle_folder import DESCRIPTION, bundles_in
    from pytest_qnn.records.stored_bundle import read_bundle

    folder = Path(chosen.folder).absolute()
    if folder.is_dir() and not (folder / DESCRIPTION).exists() and (found := bundles_in(folder)):
        return _list(found, chosen.json)
    bundle = read_bundle(folder)
    if chosen.json:
        write(json.dumps(bundle.description, indent=1))
    else:
        _print(bundle)
    return 0


def _list(folders: Sequence[Path], as_json: bool) -> int:
    from pytest_qnn.records.stored_bundle import read_description

    rows, damaged = [], []
    for folder in folders:
        try:
            told = read_description(folder)
            rows.append({"folder": str(folder), **{k: told[k] for k in ("time", "test", "subject", "reason")}})
        except (BundleError, KeyError) as error:
            damaged.append({"folder": str(folder), "problem": str(error)})
    if as_json:
        write(json.dumps({"bundles": rows, "damaged": damaged}, indent=1))
        return 1 if damaged else 0
    console = _console()
    for row in sorted(rows, key=lambda r: str(r["time"])):
        console.print(_plain(f"{Path(row['folder']).name}  {str(row['time'])[:19]}", "bold"))
        for line in (row["test"], f"{row['subject']}: {row['reason']}"):
            console.print(Padding(_plain(str(line)), (0, 0, 0, 2)))
    for problem in damaged:
        console.print(_plain(f"damaged: {problem['problem']}"))
    return 1 if damaged else 0


def _print(bundle: Bundle) -> None:
    from pytest_qnn.records.bundle import run_command

    told, console = bundle.description, _console()
    verdict, samples, provenance = told["verdict"], told["samples"], told["provenance"]
    console.print(_plain(told["subject"], "bold"))
    console.print(_plain(told["reason"], "red"))
    lines = {
        "test": told["test"] or "none",
        "when": f"{told['time']}, {told['host']['system']}",
        "samples": f"{len(samples['kept'])} of {samples['run']}: {', '.join(map(str, samples['kept']))}"
        + (", inputs of qnn_inputs" if told["synthetic_inputs"] else ""),
        "blame": verdict["blame"] if verdict else "",
        "computed in": f"{provenance['computed_in']}, {provenance['artifact']['kind']}",
        "options": ", ".join(f"{k}={v}" for k, v in provenance["options"].items()),
        "versions": ", ".join(f"{k} {v}" for k, v in provenance["versions"].items()),
        "model": _model_line(told["model"]),
        "float model": _model_line(told["float_model"]) if told["float_model"] else "",
        "note": samples["note"],
    }
    for name, text in lines.items():
        if text:
            console.print(_plain(f"{name + ':':13}{text}"))
    if verdict:
        console.print()
        console.print(_figures(verdict["outputs"], provenance["backend"]))
        _print_failures(console, verdict["outputs"])
    console.print()
    if told["commands"]["test"]:
        console.print(_plain(f"the test: {told['commands']['test']}"), soft_wrap=True)
    command = run_command(bundle.folder, told["artifact_file"], told.get("device_options", {}))
    console.print(_plain(f"these samples alone: {command}"), soft_wrap=True)


def _model_line(model: Mapping[str, Any]) -> str:
    copy = ", copied here" if model["copy"] else ""
    return f"{model['file']} (SHA-256 {model['sha256'][:16]}..., {model['bytes'] / 2**20:.2f} MiB{copy})"


def _figures(outputs: Sequence[Mapping[str, Any]], backend: str) -> Table:
    table = _table("output", "limits", "SQNR dB", "QDQ SQNR dB", f"{backend}-QDQ dB", "max steps", "gain", "verdict")
    for output in outputs:
        m = output["metrics"]
        table.add_row(
            _plain(str(output["name"])),
            _plain(str(output.get("tolerance") or output.get("limits_from") or "")),
            *(
                _plain(_number(m.get(name), form))
                for name, form in (
                    ("sqnr_db", ".1f"),
                    ("sqnr_quantized_db", ".1f"),
                    ("sqnr_against_quantized_db", ".1f"),
                    ("max_steps", ".3g"),
                    ("gain", ".4f"),
                )
            ),
            Text("pass", style="green") if output["ok"] else Text("fail", style="red"),
        )
    return table


def _print_failures(console: Console, outputs: Sequence[Mapping[str, Any]]) -> None:
    for output in outputs:
        for failure in output["failures"][:SHOWN_FAILURES]:
            console.print(Padding(_plain(f"{output['name']}: {failure}"), (0, 0, 0, 2)))
        if len(output["failures"]) > SHOWN_FAILURES:
            console.print(Padding(Text(f"and {len(output['failures']) - SHOWN_FAILURES} more"), (0, 0, 0, 2)))


# --- judge ------------------------------------------------------------------------------------------------------------


def _judge(chosen: argparse.Namespace) -> int:
    from pytest_qnn.records.bundle import verdict_json
    from pytest_qnn.records.record import plain
    from pytest_qnn.records.stored_bundle import read_bundle

    bundle = read_bundle(Path(chosen.folder).absolute())
    verdict = bundle.judge()
    if verdict is None:
        raise BundleError(
            f"{bundle.folder}: nothing to judge by: {bundle.description['samples']['note'] or 'it has no references'}"
        )
    found = plain(verdict_json(verdict))
    if chosen.json:
        write(json.dumps(found, indent=1))
    else:
        console = _console()
        console.print(_figures(found["outputs"], bundle.description["provenance"]["backend"]))
        _print_failures(console, found["outputs"])
        for line in (_verdict_line(verdict), *_other_than_stored(bundle, found)):
            console.print(_plain(line))
    return 0 if verdict.ok else 1


def _other_than_stored(bundle: Bundle, found: Mapping[str, Any]) -> list[str]:
    """What a reader must know where another verdict was stored."""
    told = bundle.description
    stored, whole, samples = told["verdict_of_kept"], told["verdict"], told["samples"]
    lines = []
    if stored is not None and (stored["ok"], stored["blame"]) != (found["ok"], found["blame"]):
        lines.append(
            f"it was judged otherwise by pytest-qnn {told['provenance']['versions'].get('pytest_qnn', '?')}: "
            f"{'pass' if stored['ok'] else 'fail, blame: ' + stored['blame']}"
        )
    elif whole is not None and whole["ok"] != found["ok"]:
        lines.append(f"note: {samples['note']}")
    if whole is None:
        lines.append(f"note: the test did not fail because of these limits, but: {told['reason']}")
    return lines


def _verdict_line(verdict: AccuracyVerdict) -> str:
    samples = f"{verdict.samples} sample{'' if verdict.samples == 1 else 's'}"
    return f"{samples}: " + ("pass" if verdict.ok else f"fail, blame: {verdict.blame}")


# --- run --------------------------------------------------------------------------------------------------------------


def _run(chosen: argparse.Namespace) -> int:
    from pytest_qnn.records.stored_bundle import read_bundle

    bundle = read_bundle(Path(chosen.folder).absolute())
    try:
        return _run_again(bundle, chosen)
    except UsageError:
        raise
    except QnnError as error:  # 1 would say that it passes now
        sys.stderr.write(f"pytest-qnn: nothing was judged: {type(error).__name__}: {error}\n")
        return NOTHING_JUDGED


def _run_again(bundle: Bundle, chosen: argparse.Namespace) -> int:
    from pytest_qnn.assertions import not_allowed
    from pytest_qnn.bench import Bench
    from pytest_qnn.devices.soc import find_soc
    from pytest_qnn.markers import BackendRequest
    from pytest_qnn.records.bundle import verdict_json
    from pytest_qnn.records.record import plain
    from pytest_qnn.records.stored_bundle import differing
    from pytest_qnn.three_ways import references_of

    told, provenance = bundle.description, bundle.description["provenance"]
    if chosen.device:
        if chosen.soc:
            raise UsageError("--soc: an attached device has its own: leave out --soc or --device")
        settings = replace(read_settings(chosen, device=chosen.device), target="adb")
    else:
        if given := [name for name in DEVICE_SETTINGS if getattr(chosen, name)]:
            raise UsageError(f"--{given[0].replace('_', '-')} is for a device: name it with --device")
        settings = read_settings(chosen).on_this_host()
        settings = replace(settings, soc=find_soc(chosen.soc or provenance["soc"] or settings.soc).name)
    # what the run was made with is stored; what the project says by now would change it
    bench = Bench(replace(settings, backend_options={}))
    try:
        session = _load(bundle, bench.backend(BackendRequest(provenance["backend"])), chosen)
        if elsewhere := not_allowed(session):
            raise PlacementError(f"{session.subject}: {len(elsewhere)} nodes ran on the CPU, the first: {elsewhere[0]}")
        run = session.run_many(list(bundle.samples), allow_non_finite=True)
        pairs = zip(run.samples, bundle.references, strict=True) if bundle.references else ()
        references = [references_of(session, sample, len(stored.drawn)) for sample, stored in pairs]
        verdict = bundle.judge(run.results, references) if references else None
        changed = _changed(told, session)
    finally:
        bench.close()
    bits = sorted({name for a, b in zip(bundle.results, run.results, strict=True) for name in differing(a, b)})
    if told["verdict"] is None:  # something else than a limit was violated: only the outputs can tell
        verdict = None
    stored_ok = (told["verdict_of_kept"] or {"ok": False})["ok"]
    outcome = _outcome(verdict is not None and verdict.ok, stored_ok, bits, verdict is None)
    document = {
        "outcome": outcome,
        "outputs_that_differ": bits,
        "changed": changed,
        "verdict": verdict and plain(verdict_json(verdict)),
        "stored_verdict": told["verdict_of_kept"],
    }
    if chosen.json:
        write(json.dumps(document, indent=1))
    else:
        _print_run(bundle, session, document, verdict, differing_references(bundle, references))
    return NOT_REPRODUCED if outcome == "not reproduced" else REPRODUCED


def _outcome(passes: bool, stored_passed: bool, bits: Sequence[str], unjudged: bool) -> str:
    """What running it again showed.

    Args:
        passes, stored_passed: the kept samples, now and when they were kept (where only the whole run failed they passed).
        bits: outputs that differ.
        unjudged: there is no verdict to compare.
    """
    if unjudged:
        return "not reproduced" if bits else "reproduced"
    if passes and not stored_passed:
        return "not reproduced"
    return "different" if bits else "reproduced"


def differing_references(bundle: Bundle, references: Sequence[Any]) -> list[str]:
    """Outputs whose reference on onnxruntime isn't the stored one any more."""
    from pytest_qnn.records.stored_bundle import differing

    pairs = zip(bundle.references, references, strict=True) if references else ()
    return sorted({name for old, new in pairs for name in differing(old.quantized, new.quantized)})


def _load(bundle: Bundle, backend: Any, chosen: argparse.Namespace) -> Session:
    told, provenance = bundle.description, bundle.description["provenance"]
    model = bundle.model(None if chosen.model is None else Path(chosen.model))
    original = bundle.float_model(None if chosen.float_model is None else Path(chosen.float_model))
    given, artifact = provenance["artifact"], None
    if given["source"] == "given":
        artifact = chosen.artifact
        if artifact is None:  # not taken from where it lay: it may be a program, and the bundle somebody else's
            raise BundleError(
                f"{bundle.folder}: the test gave an artifact ({given['kind']}, SHA-256 {given['sha256'][:16]}..., it lay at "
                f"{told['artifact_file']}): say where it is with --artifact FILE"
            )
    elif chosen.artifact is not None:
        raise BundleError(f"{bundle.folder}: --artifact: the test gave none, the model was compiled")
    session: Session = backend.load(
        model,
        float_model=original,
        dimensions=dict(provenance["dimensions"]) or None,
        artifact=artifact,
        allow_cpu=told["allow_cpu"],
        **provenance["options"],
    )
    if artifact is not None and session.artifact.digest != given["sha256"]:
        raise BundleError(f"--artifact {artifact}: another artifact than the one that failed: its SHA-256 differs")
    return session


def _changed(told: Mapping[str, Any], session: Session) -> list[str]:
    """What isn't as it was: versions, SoC, target, processor, placement. (Compiling twice seldom gives the same bytes.)"""
    from pytest_qnn.runners.reference import cpu_signature

    before, after = told["provenance"], session.provenance
    old, new = before["versions"], after["versions"]
    lines = [
        f"{name}: {old.get(name, 'none')} -> {new.get(name, 'none')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    for name in ("soc", "target", "computed_in"):
        if before[name] != after[name]:
            lines.append(f"{name}: {before[name]} -> {after[name]}")
    if told["host"]["processor"] != cpu_signature():
        lines.append("processor: another, whose kernels onnxruntime may choose otherwise")
    fell_back = after["placement"]["fell_back_to_cpu"]
    if fell_back != before["placement"]["fell_back_to_cpu"]:
        lines.append(f"placement: {len(fell_back)} nodes run on the CPU now: {'; '.join(fell_back[:3])}")
    return lines


_MEANING = {
    "reproduced": "the outputs are the same, bit for bit",
    "different": "it fails again, but the outputs are not the same bit for bit",
    "not reproduced": "it does not fail any more",
}


def _print_run(
    bundle: Bundle,
    session: Session,
    document: Mapping[str, Any],
    verdict: AccuracyVerdict | None,
    references: Sequence[str],
) -> None:
    console = _console()
    console.print(_plain(f"{session.subject}: {len(bundle.samples)} stored samples", "bold"))
    if verdict is not None:
        console.print(_figures(document["verdict"]["outputs"], session.backend))
        _print_failures(console, document["verdict"]["outputs"])
        console.print(_plain(_verdict_line(verdict)))
    bits = document["outputs_that_differ"]
    lines = [f"changed: {line}" for line in document["changed"]]
    lines += [f"outputs that differ: {', '.join(bits)}"] if bits else []
    lines += [f"references that differ: {', '.join(references)}"] if references else []
    if bundle.description["verdict"] is None:
        lines.append(f"it had failed because: {bundle.description['reason']}")
    for line in lines:
        console.print(_plain(line))
    outcome = document["outcome"]
    meaning = _MEANING[outcome]
    if bits and verdict is None:
        meaning = "the outputs are not the same bit for bit"
    elif outcome == "different" and verdict is not None and verdict.ok:
        meaning = "these samples pass, as before, but the outputs are not the same bit for bit"
    console.print(_plain(f"{outcome}: {meaning}", "bold"))


# --- output -----------------------------------------------------------------------------------------------------------


def _console() -> Console:
    return Console(width=shutil.get_terminal_size((100, 24)).columns, highlight=False)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _plain(text: str, style: str = "") -> Text:
    """``text``, which may be somebody else's, without characters that steer a terminal."""
    return Text(_CONTROL.sub("?", text), style=style)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
