"""Events: what happens to users and sandboxes, told to any number of readers. For one event loop.

A reader that is slow holds up nobody and costs no more than its buffer: what does not fit is counted, and the reader is
told how many it missed.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from typing import Any, Self

from .models import Event, EventKind

__all__ = ["EventBus", "EventReader"]


class EventBus:
    """Where events are told. Without readers telling one costs next to nothing.

    Args:
        buffer: how many events are kept for a reader that has not come for them.
    """

    def __init__(self, buffer: int) -> None:
        self._buffer = buffer
        # A reader that nobody holds any more needs no closing.
        self._readers: weakref.WeakSet[EventReader] = weakref.WeakSet()

    def tell(
        self, kind: EventKind, user_id: str, service_id: str | None = None, run_id: str | None = None, **details: Any
    ) -> None:
        """Tell all readers."""
        if self._readers:
            event = Event(
                kind=kind, ts=time.time(), user_id=user_id, service_id=service_id, run_id=run_id, details=details
            )
            for reader in self._readers:
                reader.put(event)

    def read(self) -> EventReader:
        """A reader of all events from now on."""
        reader = EventReader(self._buffer)
        self._readers.add(reader)
        return reader

    def close(self) -> None:
        """No more events: readers end when they have read what they have."""
        for reader in self._readers:
            reader.close()


class EventReader:
    """One reader's events, in order; ends with the supervisor or when it is closed."""

    def __init__(self, buffer: int) -> None:
        self._buffer = buffer
        self._events: deque[Event] = deque()
        self._missed = 0
        self._closed = False
        self._waiting: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Keep it for the reader; count it if there is no room."""
        if self._closed:
            return
        if len(self._events) >= self._buffer:
            self._missed += 1
        else:
            # Said where the gap is, before the first that came through again.
            self._tell_missed()
            self._events.append(event)
        self._wake()

    def close(self) -> None:
        """Nothing more comes."""
        self._closed = True
        self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            self._tell_missed()
            if self._events:
                break
            if self._closed:
                raise StopAsyncIteration
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self._events.popleft()

    async def aclose(self) -> None:
        """As `close`, for `contextlib.aclosing`."""
        self.close()

    def _tell_missed(self) -> None:
        if self._missed:
            count, self._missed = self._missed, 0
            self._events.append(Event(kind="missed", ts=time.time(), details={"count": count}))

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)
