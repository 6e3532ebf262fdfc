"""Running every layer of a model alone: on the reference, which feeds them, and on the backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_qnn.errors import ModelError, UsageError
from pytest_qnn.layers.arithmetic import Exactness, exactness_of, is_coarse
from pytest_qnn.layers.cut import CutModel, Layer, can_end, cut, find_layers, load_whole, tapped
from pytest_qnn.model.onnx_file import Model, read_model
from pytest_qnn.model.saved_model import save_model
from pytest_qnn.provisioning import Order, provide
from pytest_qnn.runners.ort import LoadedModel
from pytest_qnn.runners.placement import Placement
from pytest_qnn.runners.process import Limits
from pytest_qnn.runners.reference import CHECK_LEVEL, LEVEL, reference_request
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.targets.target import Plan

if TYPE_CHECKING:
    from pytest_qnn.bench import Bench
    from pytest_qnn.runners.loaded import Loaded

Tensors = dict[str, Array]


@dataclass(frozen=True)
class LayerRun:
    """What one sample gave, by the layers' tensors: integers.

    Attributes:
        q: of the reference.
        y: of the backend, each layer computed from the reference's tensors.
        r: of the reference at another optimisation level, computed like that.
        m: of the model itself on onnxruntime, likewise; the same as r where it is its own reference.
    """

    q: Tensors
    y: Tensors
    r: Tensors
    m: Tensors


@dataclass(frozen=True)
class _Pieces:
    """A cut model, and where onnxruntime runs it."""

    cut: CutModel
    loaded: LoadedModel


def _fed(model: CutModel, sample: Mapping[str, Array], q: Tensors) -> Tensors:
    wanted = {v.name for v in model.proto.graph.input}
    fed = {name: array for name, array in sample.items() if name in wanted}
    return fed | {name: q[tensor] for tensor, name in model.fed.items()}


class LayeredModel:
    """A model whose layers can be run alone on a backend. It is compiled when it is first run.

    Args:
        plan: where it runs.
        model: the QDQ model that the backend gets.
        reference: the QDQ model that says what is right, with the same tensors; default: ``model``.
        limits: of the cut model, which is somewhat slower to compile than the whole one.
    """

    def __init__(self, bench: Bench, plan: Plan, model: Model, limits: Limits, reference: Model | None = None) -> None:
        if not model.quantized:
            raise UsageError(
                f"{model.path.name} isn't quantised: layers are judged in steps of their encodings, so they need a QDQ model"
            )
        self.bench, self.plan, self.model, self.reference = bench, plan, model, reference or model
        self.limits = replace(limits, load_seconds=2 * limits.load_seconds)
        self.subject = f"the layers of {model.path.name} on {plan.backend} ({plan.place})"
        self._proto = load_whole(model.path)
        known = None if self.reference is model else {layer.tensor for layer in self._reference_proto[1]}
        self.layers = find_layers(
            self._proto, model.path.parent, lambda layer: can_end(layer) and (known is None or layer.tensor in known)
        )
        if not self.layers:
            raise ModelError(
                f"{model.path}: no activation is quantised with a constant encoding: there are no layers to judge alone"
            )
        self._folder: Path | None = None
        self._loaded: tuple[Loaded, _Pieces, _Pieces] | None = None
        self.placement: Placement | None = None
        self.elsewhere: frozenset[str] = (
            frozenset()
        )  # tensors; for runs that were kept, where nothing tells the placement

    @cached_property
    def exactness(self) -> dict[str, Exactness]:
        """How exactly HTP computes each layer, by its tensor."""
        return exactness_of(self._proto, self.model.path.parent, self.layers, is_coarse(self.plan.soc))

    def ran_elsewhere(self, layer: Layer) -> bool:
        """Whether onnxruntime's CPU provider computed a node of a layer: nothing is proved of the backend then.

        Known once the model has run.
        """
        if self.placement is None:
            return layer.tensor in self.elsewhere
        return not {m.name for m in self.placement.misplaced}.isdisjoint(layer.nodes)

    def rms_of_input(self, known: Exactness, run: LayerRun) -> float:
        """Root mean square of what a layer multiplies, in real units; where no layer ends there, the largest that it can be."""
        for layer in self.layers:
            if layer.tensor == known.source:
                real = layer.encoding.dequantize(run.q[layer.tensor]).astype(np.float64)
                return float(np.sqrt(np.square(real).mean()))
        return known.input_limit

    def run(self, samples: Sequence[Mapping[str, Array]]) -> Iterator[LayerRun]:
        """One run for each sample, in order; only one is in memory at a time.

        Raises:
            CompileError: the backend refused the cut model.
            TargetError: a runtime died, hung or ran out of memory.
        """
        for sample in samples:
            q = self._reference(sample)
            backend, model, reference = self._pieces(q)
            fed = _fed(model.cut, sample, q)
            y = backend.run_many([fed])[0].outputs
            m = model.loaded.run(fed)[0]
            r = m if reference is model else reference.loaded.run(_fed(reference.cut, sample, q))[0]
            yield LayerRun(q, y, r, m)

    # --- the reference ------------------------------------------------------------------------------------------------

    @cached_property
    def _reference_proto(self) -> tuple[Any, tuple[Layer, ...]]:
        if self.reference is self.model:
            return self._proto, self.layers
        proto = load_whole(self.reference.path)
        return proto, find_layers(proto, self.reference.path.parent, can_end)

    @cached_property
    def _feeder(self) -> LoadedModel:
        return self._on_cpu(self._save(tapped(*self._reference_proto), "tapped"), LEVEL)

    def _reference(self, sample: Mapping[str, Array]) -> Tensors:
        outputs, _ = self._feeder.run(sample)
        missing = [layer.tensor for layer in self.layers if layer.tensor not in outputs]
        if missing:
            raise UsageError(
                f"{self.reference.path.name} has no quantised tensor {missing[0]!r}: it isn't what {self.model.path.name} should "
                "equal"
            )
        return outputs

    def _on_cpu(self, model: Model, level: str) -> LoadedModel:
        subject = f"{self.model.path.name} on the onnxruntime reference"
        return self.bench.load_shared(reference_request(model, level), subject, self.limits)

    # --- the pieces ---------------------------------------------------------------------------------------------------

    def _pieces(self, q: Tensors) -> tuple[Loaded, _Pieces, _Pieces]:
        """The cut model on the backend and on onnxruntime, and the cut reference there; made when the shapes are known."""
        if self._loaded is None:
            shapes = {name: array.shape for name, array in q.items()}
            mine = cut(self._proto, self.layers, shapes)
            model = self._save(mine.proto, "layers")
            pieces = reference = _Pieces(mine, self._on_cpu(model, CHECK_LEVEL))
            if self.reference is not self.model:
                theirs = cut(*self._reference_proto, shapes)
                reference = _Pieces(theirs, self._on_cpu(self._save(theirs.proto, "reference"), CHECK_LEVEL))
            provided = provide(Order(self.bench, self.plan, model, self.subject, self.limits))
            self.placement = provided.placement
            self._loaded = provided.loaded, pieces, reference
        return self._loaded

    def _save(self, proto: object, suffix: str) -> Model:
        if self._folder is None:
            self._folder = self.bench.folder()
        file = self._folder / f"{self.model.path.stem}.{suffix}.onnx"
        save_model(proto, file, external=False)
        return read_model(file, dict(self.model.dimensions))
