"""Running every layer of a model alone: on the reference, which feeds them, and on the backend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pytest_qnn.errors import ModelError, UsageError
from pytest_qnn.layers.cut import CutModel, Layer, can_end, cut, find_layers, load_whole, tapped
from pytest_qnn.layers.weights import rounded_again
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
    """

    q: Tensors
    y: Tensors
    r: Tensors


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
        self.layers = find_layers(self._proto, model.path.parent, can_end)
        if not self.layers:
            raise ModelError(
                f"{model.path}: no activation is quantised with a constant encoding: there are no layers to judge alone"
            )
        self._folder: Path | None = None
        self._feeder: LoadedModel | None = None
        self._checker: LoadedModel | None = None
        self._backend: Loaded | None = None
        self._cut: CutModel | None = None
        self.placement: Placement | None = None

    @cached_property
    def rounded_again(self) -> dict[str, npt.NDArray[np.float64]]:
        """See :func:`pytest_qnn.layers.weights.rounded_again`."""
        if self.plan.backend != "htp":
            return {}
        return rounded_again(self._proto, self.model.path.parent, self.layers)

    def ran_elsewhere(self, layer: Layer) -> bool:
        """Whether onnxruntime's CPU provider computed a node of a layer: nothing is proved of the backend then.

        Known once the model has run.
        """
        return self.placement is not None and not {m.name for m in self.placement.misplaced}.isdisjoint(layer.nodes)

    def rms_of_sources(self, layer: Layer, run: LayerRun) -> float:
        """Root mean square of what a layer is computed from, in real units; the largest of its sources."""
        encodings = {other.tensor: other.encoding for other in self.layers}
        reals = [encodings[s].dequantize(run.q[s]) for s in layer.sources if s in encodings]
        return max((float(np.sqrt(np.square(real.astype(np.float64)).mean())) for real in reals), default=0.0)

    def run(self, samples: Sequence[Mapping[str, Array]]) -> Iterator[LayerRun]:
        """One run for each sample, in order; only one is in memory at a time.

        Raises:
            CompileError: the backend refused the cut model.
            TargetError: a runtime died, hung or ran out of memory.
        """
        for sample in samples:
            q = self._reference(sample)
            fed = self._fed(sample, q)
            y = self._on_backend(q).run_many([fed])[0].outputs
            assert self._checker is not None
            r = self._checker.run(fed)[0]
            yield LayerRun(q, y, r)

    # --- the reference ------------------------------------------------------------------------------------------------

    def _reference(self, sample: Mapping[str, Array]) -> Tensors:
        if self._feeder is None:
            proto = self._proto if self.reference is self.model else load_whole(self.reference.path)
            layers = (
                self.layers if self.reference is self.model else find_layers(proto, self.reference.path.parent, can_end)
            )
            self._feeder = self._on_cpu(self._save(tapped(proto, layers), "tapped"), LEVEL)
        outputs, _ = self._feeder.run(sample)
        missing = [layer.tensor for layer in self.layers if layer.tensor not in outputs]
        if missing:
            raise UsageError(
                f"{self.reference.path.name} has no quantised tensor {missing[0]!r}: it isn't what {self.model.path.name} should equal"
            )
        return {layer.tensor: outputs[layer.tensor] for layer in self.layers}

    def _on_cpu(self, model: Model, level: str) -> LoadedModel:
        return self.bench.load_shared(
            reference_request(model, level), f"{self.model.path.name} on the onnxruntime reference", self.limits
        )

    # --- the backend --------------------------------------------------------------------------------------------------

    def _fed(self, sample: Mapping[str, Array], q: Tensors) -> Tensors:
        cut_model = self._cut_model(q)
        wanted = {v.name for v in cut_model.proto.graph.input}
        fed = {name: array for name, array in sample.items() if name in wanted}
        return fed | {name: q[tensor] for tensor, name in cut_model.fed.items()}

    def _cut_model(self, q: Tensors) -> CutModel:
        if self._cut is None:
            self._cut = cut(self._proto, self.layers, {name: array.shape for name, array in q.items()})
        return self._cut

    def _on_backend(self, q: Tensors) -> Loaded:
        if self._backend is None:
            model = self._save(self._cut_model(q).proto, "layers")
            self._checker = self._on_cpu(model, CHECK_LEVEL)
            provided = provide(Order(self.bench, self.plan, model, self.subject, self.limits))
            self._backend, self.placement = provided.loaded, provided.placement
        return self._backend

    def _save(self, proto: object, suffix: str) -> Model:
        if self._folder is None:
            self._folder = self.bench.folder()
        file = self._folder / f"{self.model.path.stem}.{suffix}.onnx"
        save_model(proto, file, external=False)
        return read_model(file, dict(self.model.dimensions))
