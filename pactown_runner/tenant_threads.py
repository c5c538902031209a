"""Blocking work for tenants, awaited: in threads of its own, so many at a time, and ended when it is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

import anyio

from .errors import FilesError
from .jobs import Stop

__all__ = ["TenantThreads"]

T = TypeVar("T")

AT_A_TIME = 16
"""So much of it is done at a time. The rest waits; sandboxes do not, they have threads of their own."""

LASTING_AT_A_TIME = 128
"""The same of what lasts as long as somebody else likes. Its threads wait, as a rule."""

A_TENANT = 2
"""So much of each for one tenant, whose processes may keep each thread for as long as a job's time limit."""

_CANCEL_INTERVAL = 0.5
_ENDING = "the supervisor ends"


class _Lane:
    """Threads, and each tenant's turns with them."""

    def __init__(self, at_a_time: int, name: str) -> None:
        self.threads = ThreadPoolExecutor(at_a_time, thread_name_prefix=name)
        # It holds one only for as long as somebody who waits does.
        self.turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()


class TenantThreads:
    """Threads for work that has to do with a tenant's files. Use it from one event loop."""

    def __init__(self) -> None:
        self._brief = _Lane(AT_A_TIME, "pactown-files")
        self._lasting = _Lane(LASTING_AT_A_TIME, "pactown-streams")
        self._stops: set[Stop] = set()
        self._closed = False

    async def run(self, user_id: str, work: Callable[[Stop], T], *, lasting: bool = False) -> T:
        """Do this when it is the tenant's turn. Cancelled, it has ended when the cancellation is seen.

        Args:
            lasting: it goes at the pace of somebody else than the tenant, or moves a whole home; what does not never
                waits for it.

        Raises:
            FilesError: the supervisor ends.
        """
        stop = Stop()
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        lane = self._lasting if lasting else self._brief
        turn = lane.turns.setdefault(user_id, asyncio.Semaphore(A_TENANT))
        async with turn:
            if self._closed:
                raise FilesError(f"given up: {_ENDING}")
            future = lane.threads.submit(work, stop)
            self._stops.add(stop)
            future.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
            try:
                await ended.wait()
            except anyio.get_cancelled_exc_class():
                with anyio.CancelScope(shield=True):
                    while not ended.is_set() and not future.cancel():
                        stop.now("it was cancelled")
                        with anyio.move_on_after(_CANCEL_INTERVAL):
                            await ended.wait()
                raise
            finally:
                self._stops.discard(stop)
            if future.cancelled():  # by `close`, before its turn came
                raise FilesError(f"given up: {_ENDING}")
            return future.result()

    def close(self) -> None:
        """End what is under way; blocks until that has come about."""
        self._closed = True
        lanes = (self._brief, self._lasting)
        for lane in lanes:
            lane.threads.shutdown(wait=False, cancel_futures=True)
        over = threading.Event()

        def hasten() -> None:
            while not over.wait(_CANCEL_INTERVAL):
                self._end_all()

        self._end_all()
        helper = threading.Thread(target=hasten, name="pactown-files-close")
        helper.start()
        for lane in lanes:
            lane.threads.shutdown(wait=True)
        over.set()
        helper.join()

    def _end_all(self) -> None:
        for stop in list(self._stops):
            stop.now(_ENDING)
