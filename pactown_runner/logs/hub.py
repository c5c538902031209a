"""What all pumps of an event loop share: one place to wait for FIFOs, and fair shares of the loop's time."""

from __future__ import annotations

import asyncio
import select
import time
from collections import deque
from collections.abc import Callable

__all__ = ["HOLD_SECONDS", "LogHub"]

HOLD_SECONDS = 0.001
"""How long all pumps together may hold the loop before everything else gets its turn."""
_EVENTS_AT_ONCE = 16


class LogHub:
    """Calls pumps whose FIFO is readable, and, in turn, pumps that have records to write.

    However many sandboxes flood, the loop is held for `hold` seconds and one pump's turn, and each pump
    gets as many turns as any other. FIFOs are in an `epoll(7)` instance of its own, which the loop watches
    as one descriptor: that costs 2 microseconds a FIFO where `loop.add_reader` and `remove_reader` cost 15.

    Args:
        loop: the event loop; the running one if not given.
        hold: seconds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None, *, hold: float = HOLD_SECONDS) -> None:
        self.loop = loop or asyncio.get_running_loop()
        self._hold = hold
        self._queue: deque[Callable[[], bool]] = deque()
        self._scheduled = False
        self._readers: dict[int, Callable[[], None]] = {}
        self._epoll = select.epoll()
        self.loop.add_reader(self._epoll.fileno(), self._poll)

    def close(self) -> None:
        """Stop watching. Pumps that are still listening take nothing any more; closing twice is harmless."""
        if not self._epoll.closed:
            self.loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._readers.clear()
            self._queue.clear()

    def listen(self, fd: int, readable: Callable[[], None]) -> None:
        """Call `readable` whenever `fd` can be read, until `unlisten`."""
        self._readers[fd] = readable
        self._epoll.register(fd, select.EPOLLIN)

    def unlisten(self, fd: int) -> None:
        """Stop calling for `fd`, which must still be open."""
        if self._readers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def add(self, turn: Callable[[], bool]) -> None:
        """Call `turn` soon, and again for as long as it returns True. The caller adds it once at a time."""
        self._queue.append(turn)
        if not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._run)

    async def complete(self, turn: Callable[[], bool]) -> None:
        """Call `turn` as `add` does, and return when it has returned False. What it raises is raised here."""
        done: asyncio.Future[None] = self.loop.create_future()

        def take() -> bool:
            if done.done():  # who waited was cancelled
                return False
            try:
                more = turn()
            except Exception as error:
                done.set_exception(error)
                return False
            if not more:
                done.set_result(None)
            return more

        self.add(take)
        await done

    def _poll(self) -> None:
        for fd, _ in self._epoll.poll(0, _EVENTS_AT_ONCE):
            # A callback may have ended another one's listening.
            readable = self._readers.get(fd)
            if readable is not None:
                readable()

    def _run(self) -> None:
        deadline = time.monotonic() + self._hold
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
                self.loop.call_soon(self._run)
