"""``pytest-qnn``: what needs no test. One module per command; a new command is one file and one line here."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pytest_qnn import __version__
from pytest_qnn.errors import QnnError, UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 not, 2 wrong usage, 130 interrupted."""
    from pytest_qnn.cli import (
        advise,
        bundle,
        cache,
        compile,
        device,
        devices,
        doctor,
        encodings,
        fetch,
        lint,
        quantize,
        record,
        sdk,
    )

    parser = argparse.ArgumentParser(prog="pytest-qnn", description="Validation of models on Qualcomm's QNN backends.")
    parser.add_argument("--version", action="version", version=f"pytest-qnn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (
        doctor,
        fetch,
        quantize,
        encodings,
        compile,
        cache,
        lint,
        sdk,
        advise,
        devices,
        device,
        record,
        bundle,
    ):
        command.register(commands)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except UsageError as error:
        sys.stderr.write(f"pytest-qnn: {error}\n")
        return 2
    except QnnError as error:
        sys.stderr.write(f"pytest-qnn: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("pytest-qnn: interrupted\n")
        return 130
    except BrokenPipeError:  # whoever read the output has gone, as in "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sys.stderr.write(
            f"pytest-qnn: {error.filename or ''}: {error.strerror or error}\n".replace("pytest-qnn: : ", "pytest-qnn: ")
        )
        return 1
    except Exception as error:
        if os.environ.get("PYTEST_QNN_TRACEBACK"):
            raise
        sys.stderr.write(
            f"pytest-qnn: unexpected {type(error).__name__}: {error}. This is a fault of pytest-qnn: please report it, with what "
            "PYTEST_QNN_TRACEBACK=1 shows\n"
        )
        return 1


def write(text: str = "") -> None:
    """A line of a command's output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
