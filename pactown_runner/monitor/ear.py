"""One descriptor of the event loop for all files that the kernel tells about."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable

__all__ = ["Ear"]

_EVENTS_AT_ONCE = 16
"""The others get their turn after everything else in the loop has had one."""


class Ear:
    """Calls whoever listens for a descriptor when there is news of it. It takes nothing before it is used."""

    def __init__(self) -> None:
        self._calls: dict[int, Callable[[], None]] = {}
        self._epoll: select.epoll | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def listen(self, fd: int, events: int, call: Callable[[], None]) -> None:
        """Call `call` at these events (epoll_ctl(2)), until `unlisten`."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._epoll.fileno(), self._hear)
        self._epoll.register(fd, events)
        self._calls[fd] = call

    def listen_again(self, fd: int, events: int) -> None:
        """Go on after an event of EPOLLONESHOT. What has happened since it was read is news at once."""
        if self._epoll is not None:
            self._epoll.modify(fd, events)

    def unlisten(self, fd: int) -> None:
        """Stop calling for `fd`, which must still be open."""
        if self._calls.pop(fd, None) is not None and self._epoll is not None:
            self._epoll.unregister(fd)

    def close(self) -> None:
        """Stop listening to anything; closing twice is harmless."""
        if self._epoll is not None and self._loop is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
        self._calls.clear()

    def _hear(self) -> None:
        if self._epoll is None:
            return
        for fd, _ in self._epoll.poll(0, _EVENTS_AT_ONCE):
            # A call may have ended another one's listening.
            if (call := self._calls.get(fd)) is not None:
                call()
