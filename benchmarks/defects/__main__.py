"""``python -m benchmarks.defects``: prints what the gate catches and how often it cries wolf, beside the rules that others use."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.defects import model_defects, node_tests
from benchmarks.defects.evaluate import ModelDefect, Tally, judge_model_defects, judge_outputs
from benchmarks.defects.nets import NETS, PRECISIONS
from benchmarks.defects.rules import RULES
from benchmarks.defects.runs import SOCS, TUNED_SEED, UNSEEN_SEED, Runs
from pytest_qnn.bench import Bench
from pytest_qnn.settings import Settings

MAIN_SOC = "SM8650"


def main(arguments: list[str] | None = None) -> int:
    """Run the bench; what an interrupted run has done isn't done again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defects", description=__doc__)
    default = Path(platformdirs.user_cache_dir("pytest-qnn")) / "defect-bench"
    parser.add_argument("--folder", type=Path, default=default, help="keeps models and results (default: %(default)s)")
    parser.add_argument("--inputs", type=int, default=32, help="inputs of each run (default: %(default)s)")
    parser.add_argument("--socs", default=",".join(SOCS), help="SoCs (default: %(default)s)")
    parser.add_argument("--nets", default="", help="only these, separated by commas")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="precisions (default: %(default)s)")
    parser.add_argument("--node-tests", type=Path, help="wheel of onnx 1.19.1: run its backend node tests, too")
    parser.add_argument("--no-model-defects", action="store_true", help="leave out defects in models")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    chosen = parser.parse_args(arguments)
    socs = chosen.socs.split(",")
    nets = [net for net in NETS if not chosen.nets or net.name in chosen.nets.split(",")]
    precisions = [p for p in PRECISIONS if p in chosen.precisions.split(",")]
    if not precisions:
        parser.error(f"--precisions: unknown; there are {', '.join(PRECISIONS)}")
    if not nets:
        parser.error(f"--nets: unknown; there are {', '.join(net.name for net in NETS)}")
    if chosen.inputs < 2:
        parser.error("--inputs: stale and exchanged results need at least 2")
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bench = Bench(Settings(cache_dir=chosen.folder / "cache"))
    healthy = {name: Tally() for name in ("tuned", "other inputs", "other nets")}
    defects: dict[str, dict[str, Tally]] = {name: {} for name in healthy}
    broken: list[ModelDefect] = []
    nodes: list[node_tests.NodeResult] = []
    try:
        runs = Runs(bench, chosen.folder, chosen.inputs)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            work = [
                (net, p, soc, seed) for net in nets for p in precisions for soc in socs for seed in _seeds(soc, socs)
            ]
            bar = progress.add_task("healthy runs and broken outputs", total=len(work))
            for net, precision, soc, seed in work:
                group = "other nets" if net.held_out else "tuned" if seed == TUNED_SEED else "other inputs"
                judge_outputs(runs.outcomes(runs.pair(net, precision), soc, seed), healthy[group], defects[group])
                progress.advance(bar)
            if not chosen.no_model_defects:
                pairs = [runs.pair(net, precision) for net in nets for precision in precisions]
                bar = progress.add_task("broken models", total=len(pairs) * len(model_defects.DEFECTS))
                few = Runs(bench, chosen.folder, min(8, chosen.inputs))
                for pair in pairs:
                    broken += judge_model_defects(few, pair, _main(socs), TUNED_SEED, lambda: progress.advance(bar))
            if chosen.node_tests:
                bar = progress.add_task("ONNX node tests", total=len(node_tests.names(chosen.node_tests)))
                nodes = node_tests.run_all(
                    bench, chosen.node_tests, chosen.folder, _main(socs), lambda: progress.advance(bar)
                )
    except KeyboardInterrupt:
        console.print("interrupted: what was done is kept, the same command goes on from there")
        return 130
    finally:
        bench.close()
    report(console, healthy, defects, broken, nodes)
    if chosen.json:
        figures = {
            "healthy": {name: asdict(tally) for name, tally in healthy.items()},
            "output defects": {g: {n: asdict(t) for n, t in found.items()} for g, found in defects.items()},
            "model defects": [asdict(defect) for defect in broken],
            "node tests": [asdict(result) for result in nodes],
        }
        chosen.json.write_text(json.dumps(figures, indent=1))
    return 0


def _main(socs: list[str]) -> str:
    return MAIN_SOC if MAIN_SOC in socs else socs[0]


def _seeds(soc: str, socs: list[str]) -> tuple[int, ...]:
    """Inputs that the rule wasn't tuned on are run on one SoC."""
    return (TUNED_SEED, UNSEEN_SEED) if soc == _main(socs) else (TUNED_SEED,)


def report(
    console: Console,
    healthy: dict[str, Tally],
    defects: dict[str, dict[str, Tally]],
    broken: list[ModelDefect],
    nodes: list[node_tests.NodeResult],
) -> None:
    """Print the tables."""
    groups = {"tuned": ("tuned",), "not tuned on": ("other inputs", "other nets")}
    for title, members in groups.items():
        cases = sum(healthy[name].cases for name in members)
        if not cases:
            continue
        table = Table(title=f"Outputs, {title}: share called red (of defects: of the visible ones)")
        table.add_column("run")
        table.add_column("cases")
        for rule in RULES:
            table.add_column(rule, justify="right")
        alarms = {rule: sum(healthy[name].caught_all.get(rule, 0) for name in members) for rule in RULES}
        table.add_row("healthy", str(cases), *(f"{alarms[rule]}/{cases}" for rule in RULES), style="bold")
        for name in dict.fromkeys(name for member in members for name in defects[member]):
            tallies = [defects[member][name] for member in members if name in defects[member]]
            visible, total = sum(t.visible for t in tallies), sum(t.cases for t in tallies)
            caught = [f"{sum(t.caught.get(rule, 0) for t in tallies)}/{visible}" for rule in RULES]
            table.add_row(name, f"{visible} of {total}", *caught)
        console.print(table)
        for member in members:
            for run, _ in healthy[member].missed:
                console.print(f"called red: {run}")
            for name, tally in defects[member].items():
                for run, ratio in tally.missed:
                    console.print(f"missed: {name} in {run} ({ratio:.2f} of the noise)")
    if broken:
        console.print(_model_table(broken))
        for defect in broken:
            if defect.visible and not (defect.outputs or defect.layers):
                console.print(f"missed: {defect.defect} in {defect.pair} ({defect.effect:.2f} of its layer's noise)")
    if nodes:
        console.print(f"ONNX node tests: {dict(Counter(result.outcome for result in nodes))}")
        for result in nodes:
            if result.outcome in ("red", "crash"):
                console.print(f"{result.outcome}: {result.name}: {result.detail[:160]}")


def _model_table(broken: list[ModelDefect]) -> Table:
    table = Table(title="Defects in the model that the backend ran: caught, of those visible at their own layer")
    for column in ("defect", "visible", "outputs", "layers", "both", "starts at the right layer", *list(RULES)[1:]):
        table.add_column(column)
    for name in model_defects.DEFECTS:
        found = [d for d in broken if d.defect == name]
        seen = [d for d in found if d.visible]
        ran = [d for d in seen if d.accepted]
        right = sum(d.right for d in seen if d.layers)
        table.add_row(
            name,
            f"{len(seen)} of {len(found)}",
            str(sum(d.outputs for d in seen)),
            str(sum(d.layers for d in seen)),
            str(sum(d.outputs or d.layers for d in seen)),
            f"{right}/{sum(d.layers for d in seen)}",
            *(f"{sum(not d.accepted[rule] for d in ran)}/{len(ran)}" for rule in list(RULES)[1:]),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
