"""The markers: what a test may ask for. Everything is checked at collection, with standard-library code only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qnn.errors import OptionError
from pytest_qnn.interface import MARKER_NAMES

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True)
class BackendRequest:
    """What one test wants to run on: the parameter of the ``qnn_backend`` fixture.

    Hashable and comparable, so that pytest shares the fixture between tests that want the same.
    """

    name: str
    soc: str | None = None
    serial: str | None = None
    kind: str | None = None
    pinned: bool = False  # soc comes from a device mark: load() can't ask for another
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.name


def _from_near_to_far(definition: pytest.Item | pytest.Collector, name: str) -> list[list[pytest.Mark]]:
    """Marks called ``name`` by node, nearest node first; within a node in the order in which they were written."""
    levels: list[list[pytest.Mark]] = []
    node = None
    for owner, mark in definition.iter_markers_with_node(name):
        if owner is not node:
            levels.append([])
            node = owner
        levels[-1].append(mark)
    return levels


def device_requirements(definition: Any) -> dict[str, str]:
    """The arguments of the ``device`` marks that apply, the nearest mark winning for each argument.

    Raises:
        OptionError: unknown argument, SoC, arch or kind.
    """
    from pytest_qnn.devices.soc import find_soc, soc_of_arch
    from pytest_qnn.settings import unknown_name

    wanted: dict[str, object] = {}
    for level in _from_near_to_far(definition, "device"):
        for mark in level:
            if mark.args:
                raise OptionError(f"device takes keyword arguments only, got {mark.args[0]!r}")
            for key, value in mark.kwargs.items():
                if key not in ("soc", "htp_arch", "serial", "kind"):
                    raise OptionError(f"device: {unknown_name('argument', key, ('soc', 'htp_arch', 'serial', 'kind'))}")
                wanted.setdefault(key, value)
    result: dict[str, str] = {}
    if "soc" in wanted:
        result["soc"] = find_soc(str(wanted["soc"])).name
    if "htp_arch" in wanted:
        by_arch = soc_of_arch(wanted["htp_arch"])
        soc = find_soc(result["soc"]) if "soc" in result else by_arch
        if soc.htp_arch != by_arch.htp_arch:
            raise OptionError(f"device: soc {soc.name} has htp_arch v{soc.htp_arch}, not {wanted['htp_arch']}")
        result["soc"] = soc.name
    if "kind" in wanted:
        kinds = ("simulator", "host", "adb")
        if wanted["kind"] not in kinds:
            raise OptionError(f"device: {unknown_name('kind', wanted['kind'], kinds)}")
        result["kind"] = str(wanted["kind"])
    if "serial" in wanted:
        result["serial"] = str(wanted["serial"])
    return result


def backend_requests(definition: Any, defaults: Iterable[str]) -> list[BackendRequest]:
    """What the ``backend`` and ``device`` marks of a test add up to.

    The nearest node (function, class, module) with a mark that names backends decides which ones; several marks on that
    node add up. A mark without names adds its options to all of them; nearer values win.

    Raises:
        OptionError: unknown backend, option or value, or marks that contradict each other.
    """
    from pytest_qnn.devices.soc import find_soc
    from pytest_qnn.targets.options import check_options

    named: list[tuple[str, Mapping[str, object]]] = []
    general: dict[str, object] = {}
    for level in _from_near_to_far(definition, "backend"):
        for mark in level:
            if not mark.args and not mark.kwargs:
                raise OptionError("backend needs names such as 'htp', or options")
            if mark.args:
                if not all(isinstance(name, str) for name in mark.args):
                    raise OptionError(f"backend takes names such as 'htp', got {mark.args!r}")
            elif not named:
                for key, value in mark.kwargs.items():
                    general.setdefault(key, value)
        if not named:
            named = [(name, mark.kwargs) for mark in level for name in mark.args]
    device = device_requirements(definition)
    requests: list[BackendRequest] = []
    chosen = named or [(name, {}) for name in defaults]
    for name, own in chosen:
        options = _meant_for(name, {**general, **own}, [other for other, _ in chosen])
        soc = options.pop("soc", None)
        soc_name = find_soc(str(soc)).name if soc is not None else None
        if soc_name and "soc" in device and device["soc"] != soc_name:
            raise OptionError(f"backend asks for soc {soc_name}, device for {device['soc']}")
        request = BackendRequest(
            name=name,
            soc=soc_name or device.get("soc"),
            serial=device.get("serial"),
            kind=device.get("kind"),
            pinned="soc" in device,
            options=tuple(check_options(name, options).items()),
        )
        if request not in requests:
            requests.append(request)
    return requests


def _meant_for(backend: str, options: Mapping[str, object], chosen: list[str]) -> dict[str, object]:
    """Of the options of a mark that names several backends, those that ``backend`` has or none of them has."""
    from pytest_qnn.targets.options import is_option_of

    def elsewhere(key: str) -> bool:
        return any(is_option_of(other, key) for other in chosen)

    return {key: value for key, value in options.items() if is_option_of(backend, key) or not elsewhere(key)}


def request_ids(requests: list[BackendRequest]) -> list[str]:
    """Ids such as ``htp``; where a backend stands more than once, what tells its entries apart is added."""
    ids = []
    for request in requests:
        rivals = [r for r in requests if r.name == request.name]
        parts = [request.name]
        if len({r.soc for r in rivals}) > 1:
            parts.append(request.soc or "default")
        differing = {pair for r in rivals for pair in r.options if any(pair not in o.options for o in rivals)}
        parts += [
            value if not value.isdigit() else f"{key}={value}"
            for key, value in request.options
            if (key, value) in differing
        ]
        ids.append("-".join(parts))
    return ids


def check_names(definition: Any) -> None:
    """Refuse marks that look like a misspelt one of ours: pytest itself would ignore them.

    Raises:
        OptionError: such a mark.
    """
    import difflib

    registered = {line.partition("(")[0].partition(":")[0].strip() for line in definition.config.getini("markers")}
    for mark in definition.iter_markers():
        if mark.name not in registered and (close := difflib.get_close_matches(mark.name, MARKER_NAMES, 1, cutoff=0.8)):
            raise OptionError(f"unknown mark {mark.name!r}: did you mean {close[0]!r}?")


def check_value_marks(definition: Any) -> None:
    """Check the ``tolerance`` and ``latency_budget`` marks of a test.

    Raises:
        OptionError: unknown argument or bad value.
    """
    from pytest_qnn.verdict.latency import LatencyBudget
    from pytest_qnn.verdict.tolerance import Tolerance

    for mark in definition.iter_markers("tolerance"):
        _no_positional(mark)
        Tolerance.from_values({k: v for k, v in mark.kwargs.items() if k != "output"}, "tolerance")
    for mark in definition.iter_markers("latency_budget"):
        _no_positional(mark)
        LatencyBudget.from_values(mark.kwargs, "latency_budget")


def _no_positional(mark: Any) -> None:
    if mark.args:
        raise OptionError(f"{mark.name} takes keyword arguments only, got {mark.args[0]!r}")
