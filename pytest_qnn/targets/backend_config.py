"""Backend configuration: what a project wrote down, and what it becomes for each program that runs models.

A project writes options into ``[tool.pytest_qnn.backend.htp]`` or into a JSON file ``{"htp_config": {...}, "gpu_config": ...}``.
From checked options come the options of onnxruntime's execution provider, onnxruntime's run options, and the two files
that qnn-net-run and qnn-context-binary-generator take as ``--config_file``. Their layout is that of Qualcomm's public manual
and, for the HTP, of the schema inside ``libQnnHtpNetRunExtensions.so`` (QAIRT 2.51), against which the tests hold it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_qnn.devices.soc import Soc
from pytest_qnn.errors import OptionError
from pytest_qnn.settings import unknown_name
from pytest_qnn.targets.options import OPTIONS, check_options

Options = Mapping[str, str]

EXTENSION_LIBRARIES = {"htp": "libQnnHtpNetRunExtensions.so", "gpu": "libQnnGpuNetRunExtensions.so"}
_TOOL_SECTIONS = ("backend_extensions", "graphs", "devices", "context", "context_configs", "graph_configs")


# --- what a project wrote ---------------------------------------------------------------------------------------------


def read_backend_tables(tables: object, where: str) -> dict[str, dict[str, str]]:
    """Checked options by backend, from tables by backend.

    Raises:
        OptionError: not tables, an unknown backend, or options that :func:`check_options` refuses; all of it at once.
    """
    if not isinstance(tables, Mapping):
        raise OptionError(f"{where}: expected a table for each backend, got {tables!r}")
    checked: dict[str, dict[str, str]] = {}
    mistakes: list[str] = []
    for backend, options in tables.items():
        try:
            if backend in OPTIONS and not isinstance(options, Mapping):
                raise OptionError(f"backend {backend!r}: expected a table of options, got {options!r}")
            checked[backend] = check_options(backend, options)
        except OptionError as error:
            mistakes += str(error).splitlines()
    if mistakes:
        raise OptionError("\n  ".join([f"{where}:", *mistakes]) if len(mistakes) > 1 else f"{where}: {mistakes[0]}")
    return checked


def read_backend_config(file: Path) -> dict[str, dict[str, str]]:
    """Checked options by backend, from a JSON file ``{"htp_config": {...}, "gpu_config": {...}, "cpu_config": {...}}``.

    Raises:
        OptionError: the file can't be read, isn't such JSON, or has options that can't be honoured.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise OptionError(f"{file}: can't be read ({error.strerror or error}): correct the path") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{file}: not valid JSON ({error}): correct the file") from error
    sections = {f"{backend}_config": backend for backend in OPTIONS}
    if not isinstance(content, dict):
        raise OptionError(f"{file}: expected an object with {', '.join(sections)}, got {type(content).__name__}")
    for key in content:
        if key in _TOOL_SECTIONS:
            raise OptionError(
                f"{file}: {key!r} belongs to a file for qnn-net-run, which pytest-qnn writes by itself: say the same with "
                f"{', '.join(sections)} and the options of docs/backend-options.md"
            )
        if key not in sections:
            raise OptionError(f"{file}: {unknown_name('section', key, sections)}")
    return read_backend_tables({sections[key]: value for key, value in content.items()}, str(file))


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1]
    if repeated:
        raise ValueError(f"{repeated[0]!r} stands there twice")
    return dict(pairs)


# --- onnxruntime ------------------------------------------------------------------------------------------------------


def provider_options(backend: str, options: Options) -> dict[str, str]:
    """The options of onnxruntime's execution provider.

    Raises:
        OptionError: an option that onnxruntime has no way to honour.
    """
    chosen = {}
    for name, value in options.items():
        option = OPTIONS[backend][name]
        if option.provider:
            chosen[name] = value
        elif not option.run:
            raise OptionError(
                f"backend {backend!r}: option {name}: onnxruntime's execution provider has no such option: it holds only "
                "where the SDK's own tools compile (pytest-qnn sdk context). Leave it out here"
            )
    return chosen


def run_options(backend: str, options: Options) -> dict[str, str]:
    """onnxruntime's run options, to be given with each run; none are needed unless a run changes what holds between runs.

    A session votes once for the mode and the latency among its provider options, and that vote stays. A vote after each
    run withdraws it, so that from then on each run must vote anew.
    """
    chosen = {option.run: options[name] for name, option in OPTIONS[backend].items() if option.run and name in options}
    if "qnn.htp_perf_mode_post_run" not in chosen:
        return {}
    return {"qnn.htp_perf_mode": "default", **chosen}


# --- qnn-net-run and qnn-context-binary-generator -----------------------------------------------------------------------


def backend_extensions(
    backend: str, soc: Soc | None, options: Options, graphs: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of the backend extensions file, and the further sections of the file that names it.

    Args:
        soc: what to compile for or to run on.
        graphs: names of the graphs that graph options are meant for. The tools ignore graph options without names, or with
            names that the model doesn't have.

    Raises:
        OptionError: an option that these tools don't have, or graph options without graphs.
    """
    sections: dict[str, dict[str, Any]] = {"devices": {}, "cores": {}, "graphs": {}, "context_configs": {}, "": {}}
    for name, value in options.items():
        option = OPTIONS[backend][name]
        if not option.extension:
            raise OptionError(
                f"backend {backend!r}: option {name}: qnn-net-run and qnn-context-binary-generator have no such option: "
                f"{option.elsewhere}. Leave it out there"
            )
        path, _, key = option.extension.rpartition(".")
        sections[path.rpartition(".")[2]][key] = int(value) if value.isdigit() else value
    names = {"graph_names": list(graphs)}
    if not graphs and (sections["graphs"] or sections[""]):
        raise OptionError(f"backend {backend!r}: options of graphs need the graph's name, or the tools ignore them")
    outer = {"context_configs": sections["context_configs"]} if sections["context_configs"] else {}
    if backend != "htp":
        return ({**names, **sections[""]} if sections[""] else {}), outer
    device = sections["devices"]
    if soc is not None:
        device |= {"soc_model": soc.soc_id, "dsp_arch": f"v{soc.htp_arch}", "pd_session": "unsigned"}
    if sections["cores"]:
        device["cores"] = [sections["cores"]]
    extensions: dict[str, Any] = {"graphs": [names | sections["graphs"]]} if sections["graphs"] else {}
    return (extensions | {"devices": [device]} if device else extensions), outer


def write_backend_extensions(
    folder: Path, library: Path | str, extensions: Mapping[str, Any], outer: Mapping[str, Any], where: str | None = None
) -> Path:
    """Write both files into ``folder``; returns the one that the tools take as ``--config_file``.

    Args:
        library: the extension library, as the tool will find it.
        where: folder in which the tool will find the files, if not ``folder``: e.g. one on a device.

    Raises:
        OSError: ``folder`` can't be written.
    """
    inner, config = folder / "backend_extensions.json", folder / "config.json"
    inner.write_text(json.dumps(extensions, indent=1), encoding="utf-8")
    named = {
        "shared_library_path": str(library),
        "config_file_path": f"{where if where is not None else folder}/{inner.name}",
    }
    config.write_text(json.dumps({"backend_extensions": named, **outer}, indent=1), encoding="utf-8")
    return config
