"""The reference: onnxruntime's own CPU provider, in a process of its own, computed once per (model, input)."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import overload

from pytest_qnn.artifacts.array_cache import FORMAT, ArrayCache
from pytest_qnn.errors import OptionError, TargetError
from pytest_qnn.model.inputs import check_inputs
from pytest_qnn.model.onnx_file import Model, check_unchanged, read_model
from pytest_qnn.model.tensors import digest_of_arrays
from pytest_qnn.runners.ort import CPU, LoadedModel, LoadRequest
from pytest_qnn.runners.process import Limits
from pytest_qnn.runners.shared_tensors import Array
from pytest_qnn.versions import installed_version
from pytest_qnn.work_folder import temporary_folder

LEVEL = "ORT_DISABLE_ALL"  # the graph as it is written: what "the reference" means
CHECK_LEVEL = "ORT_ENABLE_ALL"  # the reference is checked against this
PASSING_BYTES = 64 << 20  # of results for passing inputs, kept in memory


def reference_request(model: Model, level: str) -> LoadRequest:
    """How a model is loaded for references, at a graph optimisation level."""
    return LoadRequest(
        model=str(model.path),
        files=model.files,
        process="reference",
        provider=CPU,
        dimensions=model.dimensions,
        level=level,
        log_severity=3,
    )


class ReferenceRunner:
    """Computes references and keeps them.

    Args:
        load: gives a loaded model for a request (shared with everybody who asks for the same).
        cache: where results are kept across processes and sessions.
    """

    def __init__(
        self, load: Callable[[LoadRequest, str, Limits], LoadedModel], cache: ArrayCache, limits: Limits
    ) -> None:
        self._load, self._cache, self._limits = load, cache, limits
        self._twins: dict[str, Model] = {}
        self._envelopes: dict[str, Model | None] = {}
        self._passing = _Recent(PASSING_BYTES)
        self._folders = ExitStack()

    def run(
        self, model: Model, inputs: Mapping[str, Array], level: str = LEVEL, *, passing: bool = False
    ) -> dict[str, Array]:
        """The model's outputs on onnxruntime's CPU provider at a graph optimisation level.

        Args:
            passing: whether the inputs were drawn at random: nobody will ask for them in another run, so results stay in memory,
                the latest 64 MiB of them. A file each would cost more than to compute them.

        Raises:
            ModelError: onnxruntime can't load the model.
            TargetError: the reference process died, hung or ran out of memory.
        """
        what = {
            "format": FORMAT,
            "model": model.digest,
            "dimensions": model.dimensions,
            "inputs": digest_of_arrays(dict(inputs)),
            "onnxruntime": installed_version("onnxruntime"),
            "level": level,
            "cpu": cpu_signature(),
        }
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

        def compute() -> dict[str, Array]:
            loaded = self._load(
                reference_request(model, level), f"{model.path.name} on the onnxruntime reference", self._limits
            )
            outputs, _ = loaded.run(inputs)
            check_unchanged(model)  # external data is mapped, not copied: what was kept must be what the digest says
            return outputs

        if passing:
            return self._passing.get(key, compute)
        return self._cache.compute(key, compute, wait_seconds=2 * self._limits.run_seconds)

    def without_rounding(self, model: Model) -> Model:
        """The float twin of a QDQ model that came without its float original (see ``model.rounding``).

        Raises:
            ModelError: it can't be derived.
        """
        from pytest_qnn.model.rounding import without_rounding

        if model.digest not in self._twins:
            file = self._folders.enter_context(temporary_folder()) / f"{model.digest[:16]}.onnx"
            try:
                without_rounding(model.path, file)
            except OSError as error:
                raise TargetError(
                    f"{model.path.name}: no room for its float twin in {file.parent.parent} ({error.strerror}): free some space "
                    "there, or pass float_model="
                ) from error
            check_unchanged(model)
            self._twins[model.digest] = read_model(file, dict(model.dimensions))
        return self._twins[model.digest]

    def envelope(self, model: Model, coarse: bool = False) -> Model | None:
        """The QDQ model with an HTP's rounding noise (see ``layers.envelope``); None where it has no envelope.

        Args:
            coarse: as for :func:`~pytest_qnn.layers.arithmetic.exactness_of`.

        Raises:
            TargetError: there is no room for it.
        """
        from pytest_qnn.layers.envelope import write_envelope

        key = f"{model.digest} {model.dimensions} {coarse}"
        if key not in self._envelopes:
            file = self._folders.enter_context(temporary_folder()) / f"{model.digest[:16]}.onnx"
            try:
                written = write_envelope(model.path, file, dict(model.dimensions), coarse)
            except OptionError as error:
                raise TargetError(f"{model.path.name}: no room for its rounding envelope: {error}") from error
            check_unchanged(model)
            self._envelopes[key] = read_model(file) if written else None
        return self._envelopes[key]

    def close(self) -> None:
        """Remove temporary files."""
        self._folders.close()


class _Recent:
    """Arrays in memory by key; the oldest go when they take more than ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._kept: OrderedDict[str, dict[str, Array]] = OrderedDict()

    def clear(self) -> None:
        """Forget them."""
        self._kept.clear()
        self._size = 0

    def get(self, key: str, compute: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """The arrays for ``key``, computed if they aren't there; read-only."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        computed = compute()
        for array in computed.values():
            array.flags.writeable = False  # they are handed out again
        self._kept[key] = computed
        self._size += sum(array.nbytes for array in computed.values())
        while self._size > self._limit and len(self._kept) > 1:
            self._size -= sum(array.nbytes for array in self._kept.popitem(last=False)[1].values())
        return computed


class Reference:
    """One model's reference.

    Attributes:
        model: the model.
        level: onnxruntime's graph optimisation level.
        version: onnxruntime's version.
    """

    def __init__(self, runner: ReferenceRunner, model: Model, level: str = LEVEL) -> None:
        self._runner, self.model, self.level = runner, model, level
        self.version = installed_version("onnxruntime")

    @overload
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]: ...

    @overload
    def run(self, inputs: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]: ...

    def run(
        self, inputs: Mapping[str, Array] | Sequence[Mapping[str, Array]]
    ) -> dict[str, Array] | list[dict[str, Array]]:
        """Outputs by name for inputs by name; a list of them for a list.

        Raises:
            ModelError: onnxruntime can't load the model.
            InputError: it refuses the inputs.
            TargetError: the reference process died, hung or ran out of memory.
        """
        if isinstance(inputs, Sequence):
            return [self._run(sample) for sample in inputs]
        return self._run(inputs)

    def _run(self, sample: object) -> dict[str, Array]:
        subject = f"{self.model.path.name} on the onnxruntime reference"
        return self._runner.run(self.model, check_inputs(subject, self.model.inputs, sample, True), self.level)


@functools.cache
def cpu_signature() -> str:
    """A digest of this CPU's architecture and instruction sets: onnxruntime picks its kernels by them."""
    flags = ""
    try:
        with open("/proc/cpuinfo") as f:
            flags = next((line for line in f if line.startswith(("flags", "Features"))), "")
    except OSError:
        flags = platform.processor()
    words = " ".join(sorted(set(flags.split())))
    return hashlib.sha256(f"{platform.machine()} {words}".encode()).hexdigest()[:16]
