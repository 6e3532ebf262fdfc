"""``pytest-qnn cache``: what is kept of compiled models and reference results."""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from pytest_qnn.cli import write


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "cache", help="list, verify, prune or clear what is kept of compiled models and references"
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    texts = {
        "list": "what is kept, most recently used first",
        "verify": "read everything and remove what is damaged; exit code 1 if something was",
        "prune": "remove what was used least recently until the size limit is kept",
        "clear": "remove everything",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("--cache-dir", metavar="DIR", help="default: the setting cache_dir")
        if name == "list":
            action.add_argument("--json", action="store_true", help="print JSON")
        if name == "prune":
            action.add_argument("--cache-limit-mb", metavar="MIB", help="default: the setting cache_limit_mb")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Do it; returns the exit code."""
    from pytest_qnn.artifacts.cache_folder import CacheFolder
    from pytest_qnn.interface import project_folder
    from pytest_qnn.settings import load_settings

    given = {"cache_dir": chosen.cache_dir, "cache_limit_mb": getattr(chosen, "cache_limit_mb", None)}
    overrides = {name: value for name, value in given.items() if value is not None}
    settings = load_settings(project_folder(Path.cwd()), overrides, flag="--")
    cache = CacheFolder(settings.cache_dir, settings.cache_limit_mb)
    actions = {"list": _list, "verify": _verify, "prune": _prune, "clear": _clear}
    return actions[chosen.action](cache, chosen)


def _list(cache: Any, chosen: argparse.Namespace) -> int:
    entries = [(kind, entry, _about(kinds, entry)) for kind, kinds in cache.kinds.items() for entry in kinds.entries()]
    entries.sort(key=lambda row: -row[1].used)
    total = sum(entry.size for _, entry, _ in entries)
    if chosen.json:
        rows = [
            {"kind": kind, "key": e.key, "bytes": e.size, "used": _time(e.used), "path": str(e.path), "about": about}
            for kind, e, about in entries
        ]
        write(json.dumps({"folder": str(cache.folder), "bytes": total, "entries": rows}, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    contexts = [row for row in entries if row[0] == "contexts"]
    if contexts:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in ("compiled model", "SoC", "options", "MiB", "compiled in", "last used", "key"):
            table.add_column(column, overflow="fold")
        for _, entry, about in contexts:
            options = " ".join(f"{name}={value}" for name, value in about.get("options", {}).items())
            seconds = f"{about['compile_seconds']:.1f} s" if "compile_seconds" in about else ""
            table.add_row(
                about.get("model") or about["damage"],
                about.get("soc", ""),
                options,
                f"{entry.size / 2**20:.2f}",
                seconds,
                _time(entry.used),
                entry.key[:12],
            )
        Console(highlight=False, markup=False).print(table)
    references = len(entries) - len(contexts)
    write(
        f"{cache.folder}: {_count(len(contexts), 'compiled model')}, {_count(references, 'reference result')}, "
        f"{total / 2**20:.1f} of {cache.limit_mib:g} MiB"
    )
    return 0


def _verify(cache: Any, chosen: argparse.Namespace) -> int:
    from pytest_qnn.artifacts.content_cache import DamagedEntryError

    good, damaged = 0, []
    for kind in cache.kinds.values():
        for entry in list(kind.entries()):
            try:
                kind.read(entry)
                good += 1
            except FileNotFoundError:
                continue  # pruned meanwhile
            except (DamagedEntryError, OSError) as error:
                gone = kind.remove(entry)
                damaged.append(f"{entry.path}: {error}: {'removed' if gone else 'it could not be removed'}")
    for line in damaged:
        write(line)
    write(f"{cache.folder}: {_count(good, 'entry', 'entries')} good, {len(damaged)} damaged")
    return 1 if damaged else 0


def _prune(cache: Any, chosen: argparse.Namespace) -> int:
    removed = cache.prune()
    left = sum(entry.size for kind in cache.kinds.values() for entry in kind.entries())
    write(
        f"{cache.folder}: {_count(removed, 'entry', 'entries')} removed, {left / 2**20:.1f} of {cache.limit_mib:g} MiB left"
    )
    return 0


def _clear(cache: Any, chosen: argparse.Namespace) -> int:
    entries = [(kind, entry) for kind in cache.kinds.values() for entry in kind.entries()]
    stuck = [entry.path for kind, entry in entries if not kind.remove(entry)]
    for kind in cache.kinds.values():
        kind.sweep()
    for path in stuck:
        write(f"{path}: could not be removed")
    write(f"{cache.folder}: {_count(len(entries) - len(stuck), 'entry', 'entries')} removed")
    return 1 if stuck else 0


def _about(kind: Any, entry: Any) -> dict[str, Any]:
    """What a compiled model's manifest says; empty for reference results."""
    from pytest_qnn.artifacts.context import read_manifest
    from pytest_qnn.artifacts.context_cache import WRAPPER
    from pytest_qnn.errors import ArtifactError

    if kind.suffix:
        return {}
    try:
        manifest = read_manifest(entry.path / WRAPPER)
    except (ArtifactError, OSError):
        return {"damage": "(damaged)"}
    recipe = manifest.recipe
    return {
        "model": manifest.model,
        "model_sha256": recipe.model_sha256,
        "soc": recipe.soc,
        "options": dict(recipe.options),
        "dimensions": dict(recipe.dimensions),
        "qnn": manifest.qnn,
        "onnxruntime_qnn": recipe.onnxruntime_qnn,
        "compile_seconds": manifest.compile_seconds,
    }


def _time(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="minutes")[:16]
    except (ValueError, OverflowError, OSError):  # beyond the year 9999
        return "?"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
