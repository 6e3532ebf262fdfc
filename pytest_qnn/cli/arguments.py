"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pytest_qnn.errors import OptionError


def add_dimensions(parser: argparse.ArgumentParser) -> None:
    """Add ``--dimensions``."""
    parser.add_argument(
        "--dimensions", metavar="NAME=SIZE", action="append", default=[], help="size of a dynamic dimension; repeatable"
    )


def read_dimensions(chosen: argparse.Namespace) -> dict[str, int]:
    """The sizes that ``--dimensions`` gives.

    Raises:
        OptionError: not NAME=SIZE.
    """
    pairs = read_pairs(chosen.dimensions, "--dimensions", "batch=1")
    try:
        return {name: int(size) for name, size in pairs.items()}
    except ValueError:
        raise OptionError(
            f"--dimensions: expected whole numbers such as batch=1, got {' '.join(chosen.dimensions)}"
        ) from None


def read_pairs(texts: Sequence[str], argument: str, example: str) -> dict[str, str]:
    """NAME=VALUE arguments; several may stand in one, with commas between.

    Raises:
        OptionError: one has another form, or a name stands twice.
    """
    pairs: dict[str, str] = {}
    for text in (part for given in texts for part in given.split(",") if part):
        name, equals, value = text.partition("=")
        if not (equals and name and value):
            raise OptionError(f"{argument}: expected NAME=VALUE such as {example}, got {text!r}")
        if name in pairs:
            raise OptionError(f"{argument}: {name} is given twice")
        pairs[name] = value
    return pairs
