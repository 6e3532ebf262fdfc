"""Stands in for a faulty backend: the real one computes, and its answers are changed on the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pytest_qnn.runners.loaded import Inference, Loaded
from pytest_qnn.session import Session

Arrays = Mapping[str, Any]
Change = Callable[[int, Arrays, dict[str, Any]], dict[str, Any]]  # number of the inference, inputs, outputs -> outputs


class _Tampered:
    def __init__(self, loaded: Loaded, change: Change) -> None:
        self._real, self._change, self.inferences = loaded, change, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def run_many(self, samples: Sequence[Arrays]) -> list[Inference]:
        answers = []
        for sample, inference in zip(samples, self._real.run_many(samples), strict=True):
            outputs = {name: array.copy() for name, array in inference.outputs.items()}
            answers.append(Inference(self._change(self.inferences, sample, outputs), inference.seconds))
            self.inferences += 1
        return answers


def tampered(session: Session, change: Change) -> Session:
    """The session, with a backend that changes its outputs."""
    faulty = copy.copy(session)
    faulty._loaded = _Tampered(session._loaded, change)  # type: ignore[assignment]
    return faulty


def inferences(session: Session) -> int:
    """How many a tampered session has run."""
    return int(session._loaded.inferences)  # type: ignore[attr-defined]
