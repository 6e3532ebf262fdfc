"""Device sessions on disk: everything that was asked of devices and what they answered, and tests answered out of that.

:class:`~pytest_qnn.recording.recorder.Recording` stores, :class:`~pytest_qnn.recording.replay.Replay` answers; the format
stands in :mod:`pytest_qnn.recording.log`.
"""

from pytest_qnn.recording.checks import check_folder, check_possible
from pytest_qnn.recording.recorder import Recording
from pytest_qnn.recording.replay import Replay

__all__ = ["Recording", "Replay", "check_folder", "check_possible"]
