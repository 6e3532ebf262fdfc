"""The options that each backend takes, what values they may have, and what each becomes.

The execution provider accepts unknown names and bad values in silence, and qnn-net-run replaces a performance mode that it
doesn't know by another with a log line, so everything is checked here first. Names and values are those of onnxruntime's
QNN execution provider; what only the SDK's tools have keeps the tools' name. ``docs/backend-options.md`` maps them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

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
GPU_PRECISIONS = ("fp16", "fp32", "hybrid")


class Values(Protocol):
    """The values that an option can have.

    Attributes:
        examples: some of them, as the execution provider wants them: all, where there are few.
    """

    @property
    def examples(self) -> tuple[str, ...]: ...

    def __call__(self, value: object) -> str:
        """``value`` as the execution provider wants it.

        Raises:
            OptionError: the option can't have it.
        """
        ...


@dataclass(frozen=True)
class Option:
    """One option of a backend: how its value is checked, and what it becomes.

    Attributes:
        compiles: whether it decides what a model is compiled to. The others only say how that is run.
        provider: whether the execution provider has an option of this name.
        run: onnxruntime's run option that carries it.
        extension: where it stands in the configuration of qnn-net-run and qnn-context-binary-generator: a path whose first
            part is a section of the backend extensions file, or ``context_configs`` of the file that names that one.
        elsewhere: for an option without ``extension``, what decides it where the SDK's tools compile and run.
    """

    parse: Values
    help: str
    compiles: bool = True
    provider: bool = True
    run: str = ""
    extension: str = ""
    elsewhere: str = ""


@dataclass(frozen=True)
class Alias:
    """Another name of an option, with what its values mean."""

    option: str
    translate: Callable[[object], object] = lambda value: value


@dataclass(frozen=True)
class _OneOf:
    """One of a few words."""

    examples: tuple[str, ...]

    def __call__(self, value: object) -> str:
        if value not in self.examples:
            raise OptionError(unknown_name("value", value, self.examples))
        return str(value)


@dataclass(frozen=True)
class _Integer:
    """A whole number."""

    low: int
    high: int

    @property
    def examples(self) -> tuple[str, ...]:
        few = (self.low, self.low + 1, self.low + 2, self.low + 3, (self.low + self.high) // 2, self.high)
        return tuple(str(value) for value in dict.fromkeys(few) if value <= self.high)

    def __call__(self, value: object) -> str:
        text = str(value).strip()
        digits = text.removeprefix("-")
        written = digits.isascii() and digits.isdigit() and len(digits) < 19  # int() refuses thousands of digits
        if isinstance(value, bool) or not written or not self.low <= int(text) <= self.high:
            raise OptionError(f"expected a whole number from {self.low} to {self.high}, got {value!r}")
        return str(int(text))


class _Switch:
    """0 or 1."""

    examples: tuple[str, ...] = ("0", "1")

    def __call__(self, value: object) -> str:
        if value in (True, "1", 1):
            return "1"
        if value in (False, "0", 0):
            return "0"
        raise OptionError(f"expected 0 or 1, got {value!r}")


class _OnlyOn:
    """1, and nothing else."""

    examples: tuple[str, ...] = ("1",)

    def __call__(self, value: object) -> str:
        if value not in (True, "1", 1):
            raise OptionError(
                f"expected 1, got {value!r}: the HTP computes a float model in float16 whatever this option says, so "
                "asking for anything else can't be honoured"
            )
        return "1"


def _htp_precision(value: object) -> object:
    if value != "fp16":
        raise OptionError(
            f"expected 'fp16', got {value!r}: the HTP computes a quantised model in the precision that it was quantised to "
            "(quantise the model with the bit widths that you want) and a float model in float16"
        )
    return 1


OPTIONS: Mapping[str, Mapping[str, Option]] = {
    "htp": {
        "htp_performance_mode": Option(
            _OneOf(PERFORMANCE_MODES),
            "clock and power vote while running",
            compiles=False,
            run="qnn.htp_perf_mode",
            extension="devices.cores.perf_profile",
        ),
        "htp_performance_mode_post_run": Option(
            _OneOf(PERFORMANCE_MODES),
            "clock and power vote between runs",
            compiles=False,
            provider=False,
            run="qnn.htp_perf_mode_post_run",
            elsewhere="qnn-net-run withdraws its vote by itself when it ends",
        ),
        "rpc_control_latency": Option(
            _Integer(0, 1_000_000),
            "latency of the call to the DSP, in microseconds",
            compiles=False,
            run="qnn.rpc_control_latency",
            extension="devices.cores.rpc_control_latency",
        ),
        "vtcm_mb": Option(
            _Integer(0, 64),
            "tightly coupled memory to use, in MiB; 0: the runtime's default",
            extension="graphs.vtcm_mb",
        ),
        "hvx_threads": Option(
            _Integer(1, 64), "vector threads that the graph may use", provider=False, extension="graphs.hvx_threads"
        ),
        "device_id": Option(_Integer(0, 63), "which of several HTP devices", extension="devices.device_id"),
        "qnn_context_priority": Option(
            _OneOf(("low", "normal", "normal_high", "high")),
            "priority among contexts",
            extension="context_configs.context_priority",
        ),
        "htp_graph_finalization_optimization_mode": Option(
            _Integer(0, 3), "effort of the graph compiler", extension="graphs.O"
        ),
        "enable_htp_fp16_precision": Option(
            _OnlyOn(), "compute a float model in float16", extension="graphs.fp16_relaxed_precision"
        ),
        "offload_graph_io_quantization": Option(
            _Switch(),
            "1: graph-edge Quantize/Dequantize run on the host's CPU",
            elsewhere="there the converter and qnn-net-run's native or float files decide it",
        ),
        "enable_htp_spill_fill_buffer": Option(
            _Switch(),
            "share the spill/fill buffer between contexts",
            elsewhere="the tools want the buffer's size (context.max_spill_fill_buffer_for_group), which nobody knows before "
            "the contexts are made",
        ),
    },
    "cpu": {},
    "gpu": {
        "precision_mode": Option(
            _OneOf(GPU_PRECISIONS),
            "what tensors are kept and computed in",
            provider=False,
            extension="precision_mode",
        ),
    },
}

ALIASES: Mapping[str, Mapping[str, Alias]] = {
    "htp": {
        "performance_mode": Alias("htp_performance_mode"),
        "precision_mode": Alias("enable_htp_fp16_precision", _htp_precision),
    },
    "cpu": {},
    "gpu": {},
}

_HTP_MODES_ONLY = "performance modes are votes for the HTP's clocks; QNN's {} backend knows none of them"
_NO_SUCH_SWITCH = "neither onnxruntime nor the SDK's tools have such a switch"
_SOC = "the SoC isn't an option of a backend: say it as the setting soc, in the backend or device mark, or to load()"

REFUSED: Mapping[str, Mapping[str, str]] = {
    "htp": {
        "enable_dma": f"{_NO_SUCH_SWITCH}: the HTP's graph compiler schedules transfers itself",
        "num_threads": "the HTP has vector threads of its own: hvx_threads, where the SDK's tools compile",
        "soc": _SOC,
    },
    "cpu": {
        "num_threads": "QNN's CPU backend starts threads of its own, and neither onnxruntime's execution provider nor the "
        "SDK's tools have an option for that: limit the process's cores instead, e.g. with taskset",
        "performance_mode": _HTP_MODES_ONLY.format("CPU"),
        "precision_mode": "QNN's CPU backend computes in float32 only",
        "device_id": "there is one CPU",
        "enable_fast_math": _NO_SUCH_SWITCH,
        "soc": _SOC,
    },
    "gpu": {
        "performance_mode": _HTP_MODES_ONLY.format("GPU"),
        "device_id": "a Snapdragon has one Adreno GPU",
        "enable_transform_optimization": _NO_SUCH_SWITCH,
        "soc": _SOC,
    },
}


def is_option_of(backend: str, name: str) -> bool:
    """Whether ``backend`` has an option of this name, or of which it is another name."""
    return name in OPTIONS.get(backend, {}) or name in ALIASES.get(backend, {})


def check_options(backend: str, options: Mapping[str, object]) -> dict[str, str]:
    """Validate ``options`` of ``backend`` and write them under their own names, as the execution provider wants values.

    Raises:
        OptionError: unknown backend or option, one that can't be honoured anywhere, a value that the option can't have, or
            one option under two names. All that is wrong is said at once.
    """
    if backend not in OPTIONS:
        raise OptionError(unknown_name("backend", backend, OPTIONS))
    checked: dict[str, str] = {}
    source: dict[str, str] = {}
    mistakes: list[str] = []
    for given, value in options.items():
        try:
            name, text = _check(backend, given, value)
        except OptionError as error:
            mistakes.append(str(error))
            continue
        if name in checked:
            mistakes.append(f"option {given}: it means {source[name]}, which is given too: leave one of them out")
        checked[name], source[name] = text, given
    if mistakes:
        raise OptionError("\n".join(f"backend {backend!r}: {mistake}" for mistake in mistakes))
    return dict(sorted(checked.items()))


def _check(backend: str, given: str, value: object) -> tuple[str, str]:
    if reason := REFUSED[backend].get(given):
        raise OptionError(f"option {given} can't be honoured: {reason}")
    alias = ALIASES[backend].get(given, Alias(given))
    if alias.option not in OPTIONS[backend]:
        raise OptionError(unknown_name("option", given, [*OPTIONS[backend], *ALIASES[backend]]))
    try:
        return alias.option, OPTIONS[backend][alias.option].parse(alias.translate(value))
    except OptionError as error:
        raise OptionError(f"option {given}: {error}") from None


def compile_options(backend: str, options: Mapping[str, str]) -> dict[str, str]:
    """Those of the checked ``options`` that decide what a model is compiled to: what an artifact must be keyed by."""
    return {name: value for name, value in options.items() if OPTIONS[backend][name].compiles}
