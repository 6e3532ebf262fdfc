"""Runs one command and ends it, with everything it started, as soon as whoever started this program is gone.

``python -I guard.py LIFELINE FOLDER COMMAND...``: LIFELINE is the descriptor of a pipe whose other end the caller holds;
when that end closes, by the caller's wish or by its death, the command's process group is killed and FOLDER removed. The
exit code is the command's; if it died of a signal, so does this program. A program of its own, because a thread of the
caller would die with it. Standard library only, and nothing of this package.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress


def main() -> None:
    """Run the command."""
    lifeline, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    except OSError as error:
        sys.stderr.write(f"error: {command[0]} can't be started: {error.strerror}\n")
        sys.exit(126)

    def kill() -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)

    ending = threading.Event()

    def watch() -> None:
        os.read(lifeline, 1)
        ending.set()
        kill()
        child.wait()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(125)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    if ending.is_set():
        threading.Event().wait()  # until the other thread has tidied up and ends this program
    kill()  # what it left running
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
