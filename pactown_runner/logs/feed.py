"""How a pump tells readers in its own process that there is more to read, without anybody polling."""

from __future__ import annotations

import asyncio

__all__ = ["LogFeed"]


class LogFeed:
    """A counter of changes to one log, that any number of readers can wait for. For one event loop.

    Attributes:
        version: rises with each change.
        closed: nothing more will be written.
    """

    __slots__ = ("_waiters", "closed", "version")

    def __init__(self) -> None:
        self.version = 0
        self.closed = False
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Records were appended: wake those who wait."""
        self.version += 1
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def close(self) -> None:
        """All is written: readers end when they have read it."""
        self.closed = True
        self.notify()

    async def changed(self, seen: int) -> None:
        """Return once `version` is not `seen` any more; at once if it is not now."""
        if self.version != seen:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
