"""What a project configured: command line, then pytest's ini file, then ``[tool.pytest_qnn]``, then the default.

The names stand in :mod:`pytest_qnn.interface`; here are their types, their defaults and the merging.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pytest_qnn.errors import OptionError
from pytest_qnn.interface import SETTINGS

BACKENDS = ("htp", "cpu", "gpu")
RUNNERS = ("auto", "net_run", "ort")
DEFAULT_SOC = "SM8650"


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """``unknown <kind> 'nmae': did you mean 'name'? Known: ...``"""
    import difflib

    known = sorted(known)
    lower = {other.lower(): other for other in reversed(known)}
    close = [lower[c] for c in difflib.get_close_matches(str(name).lower(), lower, n=1)]
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}"


# --- values -----------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise OptionError(f"expected a text, got {value!r}")
    return value.strip()


def _path(value: object) -> Path:
    try:
        return Path(_text(str(value) if isinstance(value, os.PathLike) else value)).expanduser()
    except RuntimeError as error:  # ~ of a user that isn't there
        raise OptionError(f"{value!r}: {error}") from None


def _positive(value: object) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 < number < float("inf"):
        raise OptionError(f"expected a number greater than 0, got {value!r}")
    return number


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off", ""):
        return False
    raise OptionError(f"expected true or false, got {value!r}")


def _names(known: Sequence[str], kind: str) -> Callable[[object], tuple[str, ...]]:
    def parse(value: object) -> tuple[str, ...]:
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        if not isinstance(value, Sequence) or not value:
            raise OptionError(f"expected {kind} names, got {value!r}")
        for name in value:
            if name not in known:
                raise OptionError(unknown_name(kind, name, known))
        return tuple(dict.fromkeys(value))

    return parse


def _required(value: object) -> tuple[str, ...]:
    if value == "all":
        return BACKENDS
    try:
        return _names(BACKENDS, "backend")(value)
    except OptionError as error:
        raise OptionError(
            f"{error}. Write --qnn-require=htp with '=', or put a bare --qnn-require after the file names"
        ) from None


def _one_of(known: Sequence[str], kind: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        return _names(known, kind)([value] if isinstance(value, str) else value)[0]

    return parse


def _words(value: object) -> tuple[str, ...]:
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, Sequence) or not words or not all(isinstance(word, str) and word for word in words):
        raise OptionError(f"expected names, got {value!r}")
    return tuple(dict.fromkeys(words))


def _server(value: object) -> str:
    host, colon, port = _text(value).removeprefix("tcp:").rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise OptionError(f"expected HOST:PORT such as 127.0.0.1:5037, got {value!r}")
    return f"{host or '127.0.0.1'}:{port}"


def _device_path(value: object) -> str:
    path = _text(value)
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise OptionError(f"expected an absolute path on the device, got {value!r}")
    return path


def _soc(value: object) -> str:
    from pytest_qnn.devices.soc import find_soc

    return find_soc(_text(str(value))).name


PARSERS: Mapping[str, Callable[[object], Any]] = {
    "backends": _names(BACKENDS, "backend"),
    "target": _one_of(("simulator", "adb"), "target"),
    "device": _words,
    "adb_server": _server,
    "runner": _one_of(RUNNERS, "runner"),
    "device_runtime": _path,
    "device_folder": _device_path,
    "device_python": _device_path,
    "device_limit_mb": _positive,
    "device_wait": _positive,
    "recover_timeout": _positive,
    "cool_down": _positive,
    "record": _path,
    "replay": _path,
    "soc": _soc,
    "require": _required,
    "backend_config": _path,
    "cpu_library": _path,
    "cache_dir": _path,
    "cache_limit_mb": _positive,
    "no_cache": _flag,
    "load_timeout": _positive,
    "run_timeout": _positive,
    "memory_limit_mb": _positive,
    "strict_latency": _flag,
    "simulated_latency": _flag,
    "no_layers": _flag,
    "artifacts": _path,
    "artifacts_limit_mb": _positive,
    "json": _path,
}


@dataclass(frozen=True)
class Rule:
    """A tolerance or latency budget of the project: values, and globs that say what they apply to."""

    values: Mapping[str, Any]
    model: str = "*"
    output: str = "*"
    backend: str = "*"

    def matches(self, model: str, output: str | None, backend: str) -> bool:
        """Whether the rule applies to a model (file name), output (None: any) and backend."""
        from fnmatch import fnmatchcase

        return (
            fnmatchcase(model, self.model)
            and (output is None or fnmatchcase(output, self.output))
            and fnmatchcase(backend, self.backend)
        )


@dataclass(frozen=True)
class Settings:
    """All settings, with types checked. Times in seconds, sizes in MiB."""

    backends: tuple[str, ...] = ("htp",)
    target: str = "simulator"
    device: tuple[str, ...] = ()
    adb_server: str | None = None
    runner: str = "auto"
    device_runtime: Path | None = None
    device_folder: str | None = None
    device_python: str | None = None
    device_limit_mb: float = 4096.0
    device_wait: float = 600.0
    recover_timeout: float = 120.0
    cool_down: float = 120.0
    record: Path | None = None
    replay: Path | None = None
    soc: str = DEFAULT_SOC
    require: tuple[str, ...] = ()
    backend_config: Path | None = None
    cpu_library: Path | None = None
    cache_dir: Path | None = None
    cache_limit_mb: float = 2048.0
    no_cache: bool = False
    load_timeout: float = 300.0
    run_timeout: float = 120.0
    memory_limit_mb: float = 8192.0
    strict_latency: bool = False
    simulated_latency: bool = False
    no_layers: bool = False
    artifacts: Path | None = None
    artifacts_limit_mb: float = 1024.0
    json: Path | None = None
    tolerances: tuple[Rule, ...] = field(default=())
    latency_budgets: tuple[Rule, ...] = field(default=())
    backend_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # checked, by backend

    def on_this_host(self) -> Settings:
        """The same for what needs no device: compiling, linting, advising."""
        return replace(self, target="simulator")


def read_project_table(folder: Path) -> dict[str, Any]:
    """The table ``[tool.pytest_qnn]`` of ``folder/pyproject.toml``; empty if there is none."""
    import tomllib

    file = folder / "pyproject.toml"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{file} can't be read: {error}") from error
    if "pytest_qnn" not in text and "pytest-qnn" not in text:
        return {}
    try:
        tools = tomllib.loads(text).get("tool", {})
        if not isinstance(tools, dict):
            raise OptionError(f"{file}: [tool] must be a table, got {tools!r}")
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{file} is not valid TOML: {error}") from error
    if "pytest-qnn" in tools:
        raise OptionError(f"{file}: [tool.pytest-qnn] is not read: write [tool.pytest_qnn], with an underscore")
    table = tools.get("pytest_qnn", {})
    if not isinstance(table, dict):
        raise OptionError(f"{file}: [tool.pytest_qnn] must be a table, got {table!r}")
    return table


def _rules(table: object, what: str, allowed: Iterable[str], selectors: Sequence[str]) -> tuple[Rule, ...]:
    where = f"[[tool.pytest_qnn.{what}]]"
    if isinstance(table, dict):
        table = [table]
    if not isinstance(table, list):
        raise OptionError(f"{where}: expected a table, got {table!r}")
    rules = []
    for row in table:
        if not isinstance(row, dict):
            raise OptionError(f"{where}: expected a table, got {row!r}")
        for key in row:
            if key not in {*allowed, *selectors}:
                raise OptionError(f"{where}: {unknown_name('key', key, {*allowed, *selectors})}")
        chosen = {k: str(v) for k, v in row.items() if k in selectors}
        rules.append(Rule({k: v for k, v in row.items() if k not in selectors}, **chosen))
    return tuple(rules)


def load_settings(
    folder: Path,
    command_line: Mapping[str, object] | None = None,
    ini: Mapping[str, object] | None = None,
    flag: str = "--qnn-",
) -> Settings:
    """Merge the layers for the project in ``folder``; ``flag`` is how arguments of the command line begin.

    Raises:
        OptionError: an unknown key or a bad value, naming the layer it came from.
    """
    from pytest_qnn.verdict.latency import LatencyBudget
    from pytest_qnn.verdict.tolerance import Tolerance

    table = read_project_table(folder)
    known = {s.name for s in SETTINGS if s.ini} | {"tolerance", "latency_budget", "backend"}
    for key in table:
        if key not in known:
            raise OptionError(f"{folder / 'pyproject.toml'}: [tool.pytest_qnn]: {unknown_name('key', key, known)}")
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        layers = (
            (f"{flag}{setting.name.replace('_', '-')}", (command_line or {}).get(setting.name)),
            (f"ini value qnn_{setting.name}", (ini or {}).get(setting.name) if setting.ini else None),
            (f"[tool.pytest_qnn] {setting.name}", table.get(setting.name)),
        )
        for layer, value in layers:
            if value is None or value == "":
                continue
            try:
                parsed = PARSERS[setting.name](value)
            except OptionError as error:
                raise OptionError(f"{layer}: {error}") from error
            if isinstance(parsed, Path):  # absolute: a test may change the current folder
                parsed = parsed.absolute() if layer.startswith("--") else folder / parsed
            values[setting.name] = parsed
            break
    tolerances = _rules(
        table.get("tolerance", []),
        "tolerance",
        [f.name for f in fields(Tolerance)],
        ("model", "output", "backend"),
    )
    for rule in tolerances:
        Tolerance.from_values(rule.values, "[[tool.pytest_qnn.tolerance]]")
    budgets = _rules(
        table.get("latency_budget", []),
        "latency_budget",
        [f.name for f in fields(LatencyBudget)],
        ("model", "backend"),
    )
    for rule in budgets:
        LatencyBudget.from_values(rule.values, "[[tool.pytest_qnn.latency_budget]]")
    return Settings(
        **values,
        tolerances=tolerances,
        latency_budgets=budgets,
        backend_options=_backend_options(table.get("backend"), values.get("backend_config")),
    )


def _backend_options(tables: object, file: Path | None) -> dict[str, dict[str, str]]:
    """Options of backends: those of the JSON file win over the tables of the project."""
    if tables is None and file is None:
        return {}
    from pytest_qnn.targets.backend_config import read_backend_config, read_backend_tables

    merged = read_backend_tables(tables, "[tool.pytest_qnn.backend]") if tables is not None else {}
    for backend, options in (read_backend_config(file) if file else {}).items():
        merged[backend] = {**merged.get(backend, {}), **options}
    return merged
