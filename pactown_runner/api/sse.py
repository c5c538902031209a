"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Send

from ..errors import RunnerError
from .access import Caller
from .problems import problem_of
from .server import Server

__all__ = ["EVENT", "MEDIA_TYPE", "Closing", "Message", "chained", "end", "event_stream"]

T = TypeVar("T")

MEDIA_TYPE = "text/event-stream"

EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": {"type": "object"}},
        "id": {"type": "string"},
    },
    "required": ["event", "data"],
}
"""The JSON schema of one event."""


class Message(NamedTuple):
    """One event.

    Attributes:
        event: its kind.
        data: as JSON can hold it.
        id: what a client that comes back sends as `Last-Event-ID`; None for none.
    """

    event: str
    data: Mapping[str, Any]
    id: int | None = None

    def rendered(self) -> bytes:
        """As it is sent."""
        mark = "" if self.id is None else f"id: {self.id}\n"
        # In ASCII, and hence without a line break of any kind.
        return f"{mark}event: {self.event}\ndata: {json.dumps(self.data)}\n\n".encode()


def end(reason: str, **more: Any) -> Message:
    """The last event of every stream: why nothing follows."""
    return Message("end", {"reason": reason, **more})


class Closing(StreamingResponse):
    """An answer in pieces whose source is closed when it is over, however it ends."""

    async def stream_response(self, send: Send) -> None:
        body = self.body_iterator
        assert isinstance(body, AsyncGenerator)
        async with aclosing(body):
            await super().stream_response(send)


async def chained(first: T, rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """All of a source of which the first piece was taken already, to learn whether there is one. It is closed."""
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()


def event_stream(server: Server, caller: Caller, source: AsyncGenerator[Message, None]) -> Closing:
    """The answer that sends events as they come, ends with a reason, and is never silent for long.

    It lasts no longer than the caller's token, and than the server lets it.
    """
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Closing(_stream(server, caller, source), media_type=MEDIA_TYPE, headers=headers)


async def _stream(server: Server, caller: Caller, source: AsyncGenerator[Message, None]) -> AsyncGenerator[bytes, None]:
    loop = asyncio.get_running_loop()
    stopping = asyncio.ensure_future(server.stopping.wait())
    coming: asyncio.Future[Message | None] | None = None
    lasts, why = _bound(server, caller)
    over = loop.time() + lasts
    try:
        # The head goes out with it: clients see that they are heard.
        yield b":\n\n"
        while True:
            coming = coming or asyncio.ensure_future(_next(source))
            both: list[asyncio.Future[Any]] = [coming, stopping]
            pause = min(server.heartbeat, over - loop.time())
            await asyncio.wait(both, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                yield end("server-stopping").rendered()
                return
            if loop.time() >= over:
                yield end(why).rendered()
                return
            if not coming.done():
                yield b":\n\n"
                continue
            if (message := coming.result()) is None:
                return
            coming = None
            yield message.rendered()
    except RunnerError as error:
        yield end("failed", problem=json.loads(bytes(problem_of(error).body))).rendered()
    finally:
        waiting = [task for task in (coming, stopping) if task is not None]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await source.aclose()


def _bound(server: Server, caller: Caller) -> tuple[float, str]:
    """For how many seconds a stream may go on, and why it ends then."""
    longest = math.inf if server.longest_stream is None else server.longest_stream
    left = math.inf if caller.expires is None else caller.expires - server.clock()
    return (left, "token-expired") if left < longest else (longest, "time")


async def _next(source: AsyncGenerator[Message, None]) -> Message | None:
    return await anext(source, None)
