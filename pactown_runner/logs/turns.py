"""Fair shares of the event loop for everything that renders logs."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

__all__ = ["TURN_SECONDS", "Turns"]

TURN_SECONDS = 0.002
"""How long all pumps together may hold the loop before everything else gets its turn."""


class Turns:
    """A queue of pumps that have work, shared by all pumps of a loop.

    However many sandboxes flood, the loop is held for `budget` seconds plus one pump's turn, and each pump
    gets as many turns as any other.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, budget: float = TURN_SECONDS) -> None:
        self._loop = loop
        self._budget = budget
        self._queue: deque[Callable[[], bool]] = deque()
        self._scheduled = False

    def add(self, turn: Callable[[], bool]) -> None:
        """Call `turn` soon, and again for as long as it returns True. The caller adds it once at a time."""
        self._queue.append(turn)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        deadline = time.monotonic() + self._budget
        queue = self._queue
        try:
            while queue:
                turn = queue.popleft()
                if turn():
                    queue.append(turn)
                if time.monotonic() >= deadline:
                    break
        finally:
            self._scheduled = bool(queue)
            if queue:
                self._loop.call_soon(self._run)
