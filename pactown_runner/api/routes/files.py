"""Files of a sandbox's directory, one at a time."""

from __future__ import annotations

from fastapi import Request, Response

from ..schemas import FilePath, ServiceId, TransferOut, UserId
from ..server import server_of, while_connected

__all__ = ["get", "put"]


async def put(request: Request, user_id: UserId, service_id: ServiceId, path: FilePath) -> TransferOut:
    """Put a file into the service's directory; it appears whole, or not at all, also over an older one.

    The user and the directories on the way are made if they are missing. The service need not run.
    """
    content = await request.body()
    files = server_of(request).supervisor.files
    done = await while_connected(request, files.put(user_id, service_id, content, path))
    return TransferOut(files=done.files, bytes=done.bytes)


async def get(request: Request, user_id: UserId, service_id: ServiceId, path: FilePath) -> Response:
    """The content of a file in the service's directory. The service need not run."""
    server = server_of(request)
    reading = server.supervisor.files.read(user_id, service_id, path, max_bytes=server.settings.api_file_bytes)
    content = await while_connected(request, reading)
    # Whatever a tenant wrote is to be taken for nothing but bytes.
    headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment"}
    return Response(content, media_type="application/octet-stream", headers=headers)
