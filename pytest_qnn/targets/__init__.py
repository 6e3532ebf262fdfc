"""Where models run. A new target is one file here and one line in :data:`TARGETS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_qnn.settings import Settings
    from pytest_qnn.targets.target import Target

__all__ = ["TARGETS", "open_target"]

TARGETS = {
    "simulator": "pytest_qnn.targets.simulator:SimulatorTarget",
    "adb": "pytest_qnn.targets.adb:AdbTarget",
}


def open_target(settings: Settings, may_retry: Callable[[str], bool]) -> Target:
    """The target that the settings ask for.

    Args:
        may_retry: asked before something is done once more because a device was lost, with what and why; notes it.
    """
    from importlib import import_module

    module, _, name = TARGETS[settings.target].partition(":")
    target: Target = getattr(import_module(module), name)(settings, may_retry)
    return target
