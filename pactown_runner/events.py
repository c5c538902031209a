"""Events: what happens to users and sandboxes, told to any number of readers. For one event loop, and its thread only.

A reader that is slow holds up nobody and costs no more than its buffer: what does not fit is counted, and the reader is
told how many it missed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

from .models import Event, EventKind

__all__ = ["EventBus", "EventReader", "Listener", "NoteKind"]

_log = logging.getLogger(__name__)

NoteKind = Literal["ended", "gone", "logged", "refused"]
"""What listeners hear besides events, for who counts: a run has ended (its `outcome`), whatever comes then; a sandbox
has ended for good, or was left; so many `lines` and `bytes` were logged, `dropped_lines` and `dropped_bytes` dropped;
a start was refused (the `limit`)."""

Listener = Callable[[EventKind | NoteKind, str, str | None, str | None, Mapping[str, Any]], None]
"""Is called with what happened, the user's id, the service's, the run's and details, as an event has them."""


class EventBus:
    """Where events are told. Without readers telling one costs next to nothing.

    Args:
        buffer: how many events are kept for a reader that has not come for them.
        listeners: are called with each event and note at once, and hence miss none. They must be quick.
    """

    def __init__(self, buffer: int, listeners: Sequence[Listener] = ()) -> None:
        self._buffer = buffer
        self._listeners = listeners
        self._closed = False
        # A reader that nobody holds any more needs no closing. One that is waited on may be held by the waiting task
        # alone, and that task by nothing but what it waits for: so that is held here.
        self._readers: WeakKeyDictionary[EventReader, asyncio.Event] = WeakKeyDictionary()

    @property
    def closed(self) -> bool:
        """Whether there are no more events."""
        return self._closed

    def tell(
        self, kind: EventKind, user_id: str, service_id: str | None = None, run_id: str | None = None, **details: Any
    ) -> None:
        """Tell all readers and listeners."""
        if self._listeners:
            self.note(kind, user_id, service_id, run_id, **details)
        if self._readers:
            event = Event(
                kind=kind, ts=time.time(), user_id=user_id, service_id=service_id, run_id=run_id, details=details
            )
            for reader in self._readers:
                reader._put(event)

    def note(
        self,
        kind: EventKind | NoteKind,
        user_id: str,
        service_id: str | None = None,
        run_id: str | None = None,
        **details: Any,
    ) -> None:
        """Tell listeners only."""
        for listener in self._listeners:
            try:
                listener(kind, user_id, service_id, run_id, details)
            except Exception:
                # Whoever counts wrong is to end nobody's sandbox.
                _log.exception("a listener failed at %r", kind)

    def read(self) -> EventReader:
        """A reader of all events from now on; after `close` there are none."""
        news = asyncio.Event()
        reader = EventReader(self, self._buffer, news)
        if self._closed:
            reader.close()
        else:
            self._readers[reader] = news
        return reader

    def close(self) -> None:
        """No more events: readers end when they have read what they have."""
        self._closed = True
        for reader in list(self._readers):
            reader.close()

    def _forget(self, reader: EventReader) -> None:
        self._readers.pop(reader, None)


class EventReader:
    """One reader's events, in order; ends with the supervisor or when it is closed.

    To be cancelled while it waits loses no event. Of several tasks that wait on one reader each event goes to one only:
    give each a reader of its own.
    """

    def __init__(self, bus: EventBus, buffer: int, news: asyncio.Event) -> None:
        self._bus = bus
        self._buffer = buffer
        self._news = news
        self._events: deque[Event] = deque()
        self._missed = 0
        self._closed = False

    def _put(self, event: Event) -> None:
        """Keep it for the reader; count it if there is no room."""
        if len(self._events) >= self._buffer:
            self._missed += 1
            return
        if self._missed:
            # Said where the gap is, before the first that came through again.
            self._events.append(self._say_missed())
        self._events.append(event)
        self._news.set()

    def close(self) -> None:
        """Nothing more comes. What is there already can still be read."""
        self._closed = True
        self._bus._forget(self)
        self._news.set()

    async def aclose(self) -> None:
        """As `close`, for `contextlib.aclosing`."""
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._missed:
                return self._say_missed()
            if self._closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()

    def _say_missed(self) -> Event:
        count, self._missed = self._missed, 0
        return Event(kind="missed", ts=time.time(), details={"count": count})
