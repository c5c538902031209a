"""Files of a sandbox's directory, one at a time; none is ever held as a whole that is not small."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from fastapi import Request

from ..passing import PIECE_BYTES, given, taken
from ..schemas import FilePath, ServiceId, TransferOut, UserId
from ..server import server_of, while_connected
from ..sse import Closing, chained

__all__ = ["get", "put"]


async def put(request: Request, user_id: UserId, service_id: ServiceId, path: FilePath) -> TransferOut:
    """Put a file into the service's directory; it appears whole, or not at all, also over an older one.

    The user and the directories on the way are made if they are missing. The service need not run.
    """
    files = server_of(request).supervisor.files
    body = request.stream()
    begun, whole = await _begun(body)
    if whole:
        # Nothing is begun before all of it is there: who sends slowly keeps nobody waiting.
        done = await while_connected(request, files.put(user_id, service_id, begun, path))
    else:
        done = await given(chained(begun, body), lambda source: files.put_stream(user_id, service_id, source, path))
    return TransferOut(files=done.files, bytes=done.bytes)


async def _begun(body: AsyncGenerator[bytes, None]) -> tuple[bytes, bool]:
    """The first piece of a body, and whether that is all of it."""
    begun = bytearray()
    async for piece in body:
        begun += piece
        if len(begun) > PIECE_BYTES:
            return bytes(begun), False
    return bytes(begun), True


async def get(request: Request, user_id: UserId, service_id: ServiceId, path: FilePath) -> Closing:
    """The content of a file in the service's directory. The service need not run.

    One that could not be read to its end is cut off before as many bytes as were promised.
    """
    server, loop = server_of(request), asyncio.get_running_loop()
    files, most = server.supervisor.files, server.settings.api_file_bytes
    size: asyncio.Future[int] = loop.create_future()

    def on_size(told: int) -> None:
        loop.call_soon_threadsafe(size.set_result, told)

    pieces = taken(lambda output: files.read_stream(user_id, service_id, path, output, on_size=on_size, max_bytes=most))
    first = await while_connected(request, _first(pieces))
    # Whatever a tenant wrote is to be taken for nothing but bytes.
    headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment"}
    headers["Content-Length"] = str(await size)
    return Closing(chained(first, pieces), media_type="application/octet-stream", headers=headers)


async def _first(pieces: AsyncGenerator[bytes, None]) -> bytes:
    """The first piece; what goes wrong before that can still be told."""
    return await anext(pieces, b"")
