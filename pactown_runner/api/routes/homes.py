"""Homes as archives, streamed: neither is ever held as a whole, in memory or on the disk."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Annotated, Any

from anyio import EndOfStream
from fastapi import Query, Request
from starlette.requests import ClientDisconnect

from ...archives import Exported
from ...errors import StateError
from ...pipes import InputPipe, OutputPipe
from ..problems import ProblemError
from ..schemas import ImportOut, UserId
from ..server import server_of
from ..sse import Closing, chained

__all__ = ["MEDIA_TYPE", "export", "import_"]

MEDIA_TYPE = "application/gzip"

_PIPE_BYTES = 1 << 20
_READ_BYTES = 1 << 18


async def export(request: Request, user_id: UserId) -> Closing:
    """A user's home as a `tar.gz`, for an import here or on another host. What runs of the user stands still meanwhile.

    It is whole only if the answer ends in order. One that could not be finished is cut off, and an import refuses it.
    With HTTP/1.0, which has no end but that of the connection, that could not be seen: it gets nothing.
    """
    if request.scope["http_version"] == "1.0":
        # A proxy's way to us, as a rule, not the caller's to the proxy.
        raise ProblemError(505, "old-http", "an export needs HTTP/1.1", remedy="for nginx: proxy_http_version 1.1")
    reading, writing = _pipe()
    exporting = asyncio.ensure_future(server_of(request).supervisor.users.export_stream(user_id, writing))
    # However it ends, whoever reads sees the end.
    exporting.add_done_callback(lambda _: os.close(writing))
    pieces = _pieces(OutputPipe(reading), exporting)
    try:
        # What goes wrong before there is anything to send can still be told.
        first = await anext(pieces)
    except BaseException:
        await pieces.aclose()
        raise
    headers = {"Content-Disposition": 'attachment; filename="home.tar.gz"', "X-Content-Type-Options": "nosniff"}
    return Closing(chained(first, pieces), media_type=MEDIA_TYPE, headers=headers)


async def _pieces(pipe: OutputPipe, exporting: asyncio.Future[Exported]) -> AsyncGenerator[bytes, None]:
    try:
        with suppress(EndOfStream):
            while True:
                yield await pipe.receive(_READ_BYTES)
        await exporting
    finally:
        await pipe.aclose()
        await _end(exporting)


async def import_(
    request: Request,
    user_id: UserId,
    made_for: Annotated[str | None, Query(description="The id that the archive was made of, if another.")] = None,
) -> ImportOut:
    """Replace a user's home by what an archive holds: wholly, or not at all. The user is made if there is none."""
    reading, writing = _pipe()
    users = server_of(request).supervisor.users
    importing = asyncio.ensure_future(users.import_stream(user_id, reading, made_for=made_for))
    importing.add_done_callback(lambda _: os.close(reading))
    pipe = InputPipe(writing)
    try:
        # What is refused early is read no further: the import says why.
        with suppress(StateError):
            async for piece in request.stream():
                await pipe.send(piece)
            pipe.close()
        imported = await importing
    except ClientDisconnect:
        raise ProblemError(400, "caller-gone", "the caller went away before the archive's end") from None
    finally:
        # In this order: an archive that was cut off must not look like one that has ended.
        await _end(importing)
        pipe.close()
    return ImportOut(entries=imported.entries, files=imported.files, bytes=imported.bytes)


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
