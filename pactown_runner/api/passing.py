"""Bodies through pipes: what is passed on as it comes, and is never held as a whole, in memory or on the disk."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from anyio import CancelScope, EndOfStream

from ..errors import StateError
from ..pipes import InputPipe, OutputPipe

__all__ = ["PIECE_BYTES", "given", "taken"]

T = TypeVar("T")

PIECE_BYTES = 1 << 18
"""Of an answer, at most so much at once."""

_PIPE_BYTES = 1 << 20


async def given(body: AsyncIterable[bytes], work: Callable[[int], Coroutine[Any, Any, T]]) -> T:
    """Give a request's body to what reads it from a descriptor, and return what comes of it.

    Raises: what the body raises, such as that the caller went away; the work has been cancelled then.
    """
    reading, writing = _pipe()
    working = asyncio.ensure_future(work(reading))
    working.add_done_callback(lambda _: os.close(reading))
    pipe = InputPipe(writing)
    try:
        # What is refused early is read no further: the work says why.
        with suppress(StateError):
            async for piece in body:
                await pipe.send(piece)
            pipe.close()
        return await working
    finally:
        # In this order: a body that was cut off must not look like one that has ended.
        with CancelScope(shield=True):
            await _end(working)
        pipe.close()


async def taken(work: Callable[[int], Coroutine[Any, Any, Any]]) -> AsyncGenerator[bytes, None]:
    """What some work writes into a descriptor, as it comes. It ends with the work, and the work with it."""
    reading, writing = _pipe()
    working = asyncio.ensure_future(work(writing))
    # However it ends, whoever reads sees the end.
    working.add_done_callback(lambda _: os.close(writing))
    pipe = OutputPipe(reading)
    try:
        with suppress(EndOfStream):
            while True:
                yield await pipe.receive(PIECE_BYTES)
        await working
    finally:
        # Whoever hangs up cancels all that waits, over and over (anyio).
        with CancelScope(shield=True):
            await pipe.aclose()
            await _end(working)


def _pipe() -> tuple[int, int]:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    # Fewer turns for the same; a host that gives no more to anybody gives what a pipe has.
    with suppress(PermissionError):
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return reading, writing


async def _end(work: asyncio.Future[Any]) -> None:
    """Let it end, done or not."""
    work.cancel()
    await asyncio.wait([work])
    if not work.cancelled():
        # Seen: where nobody reads any more, that it cannot write is no news.
        work.exception()
