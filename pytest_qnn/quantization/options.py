"""How a model is to be quantised, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pytest_qnn.errors import OptionError
from pytest_qnn.settings import unknown_name

METHODS = ("minmax", "entropy", "percentile")
ACTIVATIONS = {"8": "uint8", "16": "uint16", "uint8": "uint8", "uint16": "uint16", "int8": "int8"}
WEIGHTS = (4, 8, 16)
# onnxruntime's own defaults, but for entropy: with its 128 bins its search has one candidate, the whole range
BINS = {"minmax": 0, "entropy": 512, "percentile": 2048}


@dataclass(frozen=True)
class QuantizationOptions:
    """How to quantise.

    Attributes:
        activations: 8 or 16 bits, or "uint8", "uint16", "int8".
        weights: 4, 8 or 16 bits.
        per_channel: a scale for each output channel of convolutions' weights, which are symmetric then. Their 4-bit weights
            always are: QNN's HTP refuses others.
        method: "minmax", "entropy" or "percentile".
        percentile: share of values, in percent, that a range must cover; None: 99.999. For the method of that name only.
        bins: of the histogram for "entropy" and "percentile"; None: 512 and 2048.
        symmetric_activations: ranges of activations are symmetric around zero.
        symmetric_weights: the same for weights; None: where they are signed.
        overrides: bit widths of single tensors, activations (8, 16) or weights (4, 8, 16), by name.
        ranges: (low, high) of single activations, by name, in place of what calibration finds.
        dimensions: sizes for named dynamic dimensions.
        samples: use the first so many samples only; None: all.
        raw_type: what .raw files hold: "float32" or "native".
        external_data: weights in a file beside the model; None: as the float model has it.
    """

    activations: int | str = 8
    weights: int = 8
    per_channel: bool = False
    method: str = "minmax"
    percentile: float | None = None
    bins: int | None = None
    symmetric_activations: bool = False
    symmetric_weights: bool | None = None
    overrides: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    dimensions: Mapping[str, int] = field(default_factory=dict)
    samples: int | None = None
    raw_type: str = "float32"
    external_data: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.activations, bool) or str(self.activations) not in (*ACTIVATIONS, "int16"):
            raise OptionError(f"activations: must be 8, 16, uint8, uint16 or int8, got {self.activations!r}")
        if self.activations == "int16":
            raise OptionError(
                "activations: signed 16-bit activations don't compile on QNN's HTP backend: use 16 (uint16), if need be "
                "with symmetric_activations (zero point 32768)"
            )
        if isinstance(self.weights, bool) or self.weights not in WEIGHTS:
            raise OptionError(f"weights: must be 4, 8 or 16 bits, got {self.weights!r}")
        if self.method not in METHODS:
            raise OptionError(f"method: {unknown_name('method', str(self.method), METHODS)}")
        if self.percentile is not None and (
            isinstance(self.percentile, bool)
            or not isinstance(self.percentile, int | float)
            or not 50 < self.percentile <= 100
        ):
            raise OptionError(f"percentile: must be over 50 and at most 100, got {self.percentile!r}")
        for name, given, methods in (
            ("percentile", self.percentile, ("percentile",)),
            ("bins", self.bins, ("percentile", "entropy")),
        ):
            if given is not None and self.method not in methods:
                raise OptionError(
                    f"{name}: has no meaning for the method {self.method!r}: it is for {' and '.join(methods)}"
                )
        if self.bins is not None and (
            isinstance(self.bins, bool)
            or not isinstance(self.bins, int)
            or not 128 <= self.bins <= 4096
            or self.bins % 2
        ):
            raise OptionError(f"bins: must be an even number of 128 to 4096, got {self.bins!r}")
        for name in ("overrides", "ranges", "dimensions"):
            if not isinstance(getattr(self, name), Mapping):
                raise OptionError(f"{name}: must be a dict by name, got {getattr(self, name)!r}")
        for tensor, bits in self.overrides.items():
            if isinstance(bits, bool) or bits not in WEIGHTS:
                raise OptionError(f"overrides: {tensor!r}: must be 4, 8 or 16 bits, got {bits!r}")
        for tensor, bounds in self.ranges.items():
            try:
                low, high = (float(b) for b in bounds)
            except (TypeError, ValueError):
                raise OptionError(f"ranges: {tensor!r}: must be a pair (low, high), got {bounds!r}") from None
            if not (math.isfinite(low) and math.isfinite(high) and low <= 0 <= high and low < high):
                raise OptionError(
                    f"ranges: {tensor!r}: {low:g} .. {high:g} must be finite and contain zero, which every encoding can write"
                )

    @property
    def covered(self) -> float:
        """What ``percentile`` asks for, in percent."""
        return 99.999 if self.percentile is None else float(self.percentile)

    @property
    def name(self) -> str:
        """Short name, e.g. ``A16W8``."""
        return f"A{16 if '16' in str(self.activations) else 8}W{self.weights}"
