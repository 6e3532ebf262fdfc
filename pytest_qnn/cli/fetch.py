"""``pytest-qnn fetch cpu-backend``."""

from __future__ import annotations

import argparse
import platform
import sys
from typing import Any

from pytest_qnn.cli import write


def register(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser("fetch", help="download what the installed wheels lack")
    parser.add_argument(
        "what", choices=["cpu-backend"], help="QNN's CPU backend library, from the last wheel that has it"
    )
    parser.add_argument("--force", action="store_true", help="download again even if it is there")
    parser.add_argument("--quiet", action="store_true", help="say nothing if all went well")
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Fetch; returns the exit code."""
    from pytest_qnn.targets.qnn_cpu import WHEEL_VERSION, fetch_cpu_library, is_fetched

    if sys.platform != "linux" or platform.machine() != "x86_64":
        write("pytest-qnn: nothing fetched: the QNN CPU library of the wheels is for x86-64 Linux")
        return 0 if chosen.quiet else 1
    if not chosen.quiet and (chosen.force or not is_fetched()):
        write(f"fetching QNN's CPU backend from onnxruntime-qnn {WHEEL_VERSION} (89 MiB, Qualcomm's licence applies)")
    library = fetch_cpu_library(force=chosen.force)
    if not chosen.quiet:
        write(f"{library}")
    return 0
