"""The options that each backend takes, and what values they may have.

The execution provider accepts unknown names and bad values in silence, so everything is checked here first. Names and
values are those of onnxruntime's QNN execution provider, plus ``soc``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pytest_qnn.errors import OptionError
from pytest_qnn.settings import unknown_name

PERFORMANCE_MODES = (
    "balanced",
    "burst",
    "default",
    "extreme_power_saver",
    "high_performance",
    "high_power_saver",
    "low_balanced",
    "low_power_saver",
    "power_saver",
    "sustained_high_performance",
)


@dataclass(frozen=True)
class Option:
    """One option of a backend: how its value is checked and written for the execution provider."""

    parse: Callable[[object], str]
    help: str


def _one_of(*known: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in known:
            raise OptionError(unknown_name("value", value, known))
        return str(value)

    return parse


def _integer(low: int, high: int) -> Callable[[object], str]:
    def parse(value: object) -> str:
        text = str(value).strip()
        digits = text.removeprefix("-")
        if isinstance(value, bool) or not (digits.isascii() and digits.isdigit()) or not low <= int(text) <= high:
            raise OptionError(f"expected a whole number from {low} to {high}, got {value!r}")
        return str(int(text))

    return parse


def _switch(value: object) -> str:
    if value in (True, "1", 1):
        return "1"
    if value in (False, "0", 0):
        return "0"
    raise OptionError(f"expected 0 or 1, got {value!r}")


def _only_on(value: object) -> str:
    if value not in (True, "1", 1):
        raise OptionError(
            f"expected 1, got {value!r}: the HTP computes a float model in float16 whatever this option says, so "
            "asking for anything else can't be honoured"
        )
    return "1"


OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "htp": {
        "htp_performance_mode": Option(_one_of(*PERFORMANCE_MODES), "clock and power vote while running"),
        "rpc_control_latency": Option(_integer(0, 1_000_000), "latency of the call to the DSP, in microseconds"),
        "vtcm_mb": Option(_integer(0, 64), "tightly coupled memory to use, in MiB; 0: all there is"),
        "qnn_context_priority": Option(_one_of("low", "normal", "normal_high", "high"), "priority among contexts"),
        "htp_graph_finalization_optimization_mode": Option(_integer(0, 3), "effort of the graph compiler"),
        "enable_htp_fp16_precision": Option(_only_on, "compute a float model in float16"),
        "offload_graph_io_quantization": Option(_switch, "1: graph-edge Quantize/Dequantize run on the host's CPU"),
        "enable_htp_spill_fill_buffer": Option(_switch, "share the spill/fill buffer between contexts"),
    },
    "cpu": {},
    "gpu": {},
}


def check_options(backend: str, options: Mapping[str, object]) -> dict[str, str]:
    """Validate ``options`` of ``backend`` and write them as the execution provider wants them.

    Raises:
        OptionError: unknown backend or option, or a value that the option can't have.
    """
    if backend not in OPTIONS:
        raise OptionError(unknown_name("backend", backend, OPTIONS))
    known = OPTIONS[backend]
    checked: dict[str, str] = {}
    for name, value in options.items():
        if name not in known:
            raise OptionError(f"backend {backend!r}: {unknown_name('option', name, known)}")
        try:
            checked[name] = known[name].parse(value)
        except OptionError as error:
            raise OptionError(f"backend {backend!r}: option {name}: {error}") from None
    return dict(sorted(checked.items()))
