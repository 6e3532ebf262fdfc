"""For tests: devices that aren't there.

:class:`LoopbackDevice` is a device on 127.0.0.1, reached through a real ADB server.
"""

from pytest_qnn.testing.loopback.device import LoopbackDevice

__all__ = ["LoopbackDevice"]
