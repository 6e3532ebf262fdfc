"""The program inside a runtime process: :class:`~pytest_qnn.runners.agent.Runtime` behind shared memory.

Started by :mod:`pytest_qnn.runners.process` as ``python -m pytest_qnn.runners.worker CONTROL LIFELINE INPUTS OUTPUTS``,
four file descriptors: a socket for JSON messages, a pipe that closes when the parent dies, two arenas for tensors.
Everything of QNN is loaded here and nowhere else. Whatever the native code logs goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from pytest_qnn.runners.agent import Runtime, answer, die_with_parent
from pytest_qnn.runners.shared_tensors import Arena

LOG_MARK = "\x1e"  # ends the log of one request


class Worker:
    """Serves requests whose tensors lie in arenas."""

    def __init__(self, inputs: Arena, outputs: Arena) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.runtime = Runtime()

    def handle(self, message: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Answer one request; its arrays are left in an arena."""
        feed = self.inputs.views(message["inputs"]) if "inputs" in message else {}
        reply, arrays = self.runtime.handle(message, feed)
        return ({**reply, "outputs": self.outputs.write(arrays)} if arrays else reply), {}


def main() -> None:
    """Serve until the parent hangs up."""
    control, lifeline, inputs, outputs = map(int, sys.argv[1:5])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    die_with_parent(lifeline)
    connection = Connection(control)
    worker = Worker(Arena(inputs), Arena(outputs))
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        reply, _ = answer(lambda: worker.handle(message))  # noqa: B023
        with suppress(OSError):
            os.write(2, f"{LOG_MARK}{message['id']}\n".encode())
        try:
            connection.send_bytes(json.dumps(reply).encode())
        except OSError:
            return


if __name__ == "__main__":
    main()
