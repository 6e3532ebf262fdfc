"""Property-based testing of quantised models: strategies for Hypothesis, invariants, and a search for the worst case.

Names are loaded on first use, so that who needs none of Hypothesis doesn't wait for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_qnn.model.encoding import Encoding
    from pytest_qnn.properties.graph_strategies import qdq_models
    from pytest_qnn.properties.graphs import ModelPair, QdqModel, Step
    from pytest_qnn.properties.invariants import (
        INVARIANTS,
        InvariantVerdict,
        assert_argmax_stable,
        assert_backend_matches,
        assert_deterministic,
        assert_finite,
        assert_order_invariant,
        assert_quantizer,
        assert_saturates,
    )
    from pytest_qnn.properties.patterns import (
        Pattern,
        blobs,
        bursts,
        chirp,
        constant,
        denormal,
        edge,
        edges,
        gradient,
        grid,
        on_steps,
        saturating,
        sines,
        smooth,
        sparse,
        ties,
        uniform,
    )
    from pytest_qnn.properties.relations import (
        Relation,
        assert_batch_invariant,
        assert_equal_across_socs,
        assert_layout_invariant,
        assert_padding_invariant,
        assert_related,
    )
    from pytest_qnn.properties.robust import RobustnessReport, assert_robust
    from pytest_qnn.properties.samples import Sample
    from pytest_qnn.properties.strategies import (
        ALL_KINDS,
        IN_RANGE,
        backend_options,
        batches_of,
        encodings,
        inputs_of,
        socs,
        tensors,
    )

_MODULES = {
    "model.encoding": ("Encoding",),
    "properties.graph_strategies": ("qdq_models",),
    "properties.graphs": ("ModelPair", "QdqModel", "Step"),
    "properties.invariants": (
        "INVARIANTS",
        "InvariantVerdict",
        "assert_argmax_stable",
        "assert_backend_matches",
        "assert_deterministic",
        "assert_finite",
        "assert_order_invariant",
        "assert_quantizer",
        "assert_saturates",
    ),
    "properties.patterns": (
        "Pattern",
        "blobs",
        "bursts",
        "chirp",
        "constant",
        "denormal",
        "edge",
        "edges",
        "gradient",
        "grid",
        "on_steps",
        "saturating",
        "sines",
        "smooth",
        "sparse",
        "ties",
        "uniform",
    ),
    "properties.relations": (
        "Relation",
        "assert_batch_invariant",
        "assert_equal_across_socs",
        "assert_layout_invariant",
        "assert_padding_invariant",
        "assert_related",
    ),
    "properties.robust": ("RobustnessReport", "assert_robust"),
    "properties.samples": ("Sample",),
    "properties.strategies": (
        "ALL_KINDS",
        "IN_RANGE",
        "backend_options",
        "batches_of",
        "encodings",
        "inputs_of",
        "socs",
        "tensors",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ALL_KINDS",
    "INVARIANTS",
    "IN_RANGE",
    "Encoding",
    "InvariantVerdict",
    "ModelPair",
    "Pattern",
    "QdqModel",
    "Relation",
    "RobustnessReport",
    "Sample",
    "Step",
    "assert_argmax_stable",
    "assert_backend_matches",
    "assert_batch_invariant",
    "assert_deterministic",
    "assert_equal_across_socs",
    "assert_finite",
    "assert_layout_invariant",
    "assert_order_invariant",
    "assert_padding_invariant",
    "assert_quantizer",
    "assert_related",
    "assert_robust",
    "assert_saturates",
    "backend_options",
    "batches_of",
    "blobs",
    "bursts",
    "chirp",
    "constant",
    "denormal",
    "edge",
    "edges",
    "encodings",
    "gradient",
    "grid",
    "inputs_of",
    "on_steps",
    "qdq_models",
    "saturating",
    "sines",
    "smooth",
    "socs",
    "sparse",
    "tensors",
    "ties",
    "uniform",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"pytest_qnn.{_HOME[name]}"), name)
