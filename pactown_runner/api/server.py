"""What all routes share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from ..config import Settings
from ..metrics import Metrics
from ..supervisor import Supervisor
from .access import Caller
from .problems import ProblemError

__all__ = ["HEARTBEAT", "Server", "caller_of", "server_of", "server_stopping", "while_connected"]

HEARTBEAT = 15.0
"""Seconds after which a stream that has nothing to say says so: proxies and clients take silence for an end."""

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """What routes work with.

    Attributes:
        supervisor: does all that is asked for.
        settings: the supervisor's.
        metrics: of the supervisor.
        stopping: the server takes no more, and what lasts comes to an end.
        heartbeat: seconds, see `HEARTBEAT`.
        longest_stream: seconds after which a stream ends, with the reason `time`; None for never.
        clock: seconds since the epoch, by which tokens expire.
    """

    supervisor: Supervisor
    settings: Settings
    metrics: Metrics
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    heartbeat: float = HEARTBEAT
    longest_stream: float | None = None
    clock: Callable[[], float] = time.time


def server_of(request: Request) -> Server:
    """What the route of this request works with."""
    server = request.app.state.server
    assert isinstance(server, Server)
    return server


def caller_of(request: Request) -> Caller:
    """Who asks."""
    caller = request.scope["pactown.caller"]
    assert isinstance(caller, Caller)
    return caller


def server_stopping() -> ProblemError:
    """What callers of a server are told that stops; the next one, if there is one, is there soon."""
    return ProblemError(503, "server-stopping", "the server stops", headers={"Retry-After": "1"})


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do what lasts for as long as somebody waits for it; its cancellation ends it. The body has been read.

    Raises:
        ProblemError: the caller went away, or the server stops.
    """
    stopping = server_of(request).stopping
    working = asyncio.ensure_future(work)
    others = [asyncio.ensure_future(_gone(request)), asyncio.ensure_future(stopping.wait())]
    try:
        await asyncio.wait([working, *others], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.wait([working])
    finally:
        for task in (working, *others):
            task.cancel()
        await asyncio.wait([working, *others])
    if working.cancelled():
        if stopping.is_set():
            raise server_stopping()
        raise ProblemError(400, "caller-gone", "the caller went away")
    return working.result()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
