"""A device that this process holds: its facts, its files, the workspace there; and getting it back when it is lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pytest_qnn.devices.transport import Transport

if TYPE_CHECKING:
    from pytest_qnn.devices.facts import DeviceFacts
    from pytest_qnn.devices.store import DeviceStore
    from pytest_qnn.devices.workspace import Workspace


class AttachedDevice:
    """A device in use.

    Attributes:
        transport: the line to it.
        facts: what was found out about it.
        store: files kept on it, by content.
        workspace: this process's own folder on it.
        generation: grows with each recovery: what ran on the device before is gone, and files in the old workspace too.
    """

    transport: Transport
    facts: DeviceFacts
    store: DeviceStore
    workspace: Workspace
    generation: int

    def folder(self) -> Path:
        """A new folder on this host, for files on their way; gone when the device is let go."""
        raise NotImplementedError
