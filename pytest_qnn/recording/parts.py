"""Which operations belong together.

A *part* is a piece of a session that asks the same whenever it is done: a test; or what the first test that needs it does
for all of them (probing the device, sending a file, loading a model), which marks itself with
:func:`pytest_qnn.devices.transport.part`. What is asked inside of such a part belongs to it and to nothing around it. Parts
may come in another order when they are repeated, or not at all; each is known by its name and by how often that name came
before.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SESSION = "session"


def test_part(nodeid: str) -> str:
    """The name of a test's part."""
    return f"test {nodeid}"


@dataclass(frozen=True)
class Part:
    """One occurrence of a part.

    Attributes:
        name: what it is.
        occurrence: how often that name came before.
        test: the test that was running when it began; empty between tests.
    """

    name: str
    occurrence: int
    test: str = ""


class Parts:
    """Which part each thread is in; threads that have entered none are in the running test's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._local = threading.local()
        self.session = self.test = self._next(SESSION, "")

    def _next(self, name: str, test: str) -> Part:
        with self._lock:
            self._counts[name] += 1
            return Part(name, self._counts[name] - 1, test)

    def begin_test(self, nodeid: str) -> Part:
        """``nodeid`` is running from now on; empty: no test is."""
        if nodeid != self.test.test:  # it may be said twice, by whoever opens the device within a test
            self.test = self._next(test_part(nodeid), nodeid) if nodeid else self.session
        return self.test

    @contextmanager
    def inside(self, name: str, shared: bool = True) -> Iterator[None]:
        """What this thread asks in the block is of that part; one that isn't shared is one within the part that it is in."""
        before = getattr(self._local, "part", None)
        if not shared:
            name = f"{self.current.name} #{self.current.occurrence}: {name}"
        self._local.part = self._next(name, self.test.test)
        try:
            yield
        finally:
            self._local.part = before

    @property
    def current(self) -> Part:
        """The part of the thread that asks."""
        return getattr(self._local, "part", None) or self.test

    @property
    def thread(self) -> object:
        """The thread that asks. Not its number: that of a thread that has ended is used again."""
        if not hasattr(self._local, "token"):
            self._local.token = object()
        return self._local.token
