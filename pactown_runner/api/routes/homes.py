"""Homes as archives, streamed: neither is ever held as a whole, in memory or on the disk."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request

from ..passing import given, taken
from ..problems import ProblemError
from ..schemas import ImportOut, UserId
from ..server import server_of
from ..sse import Closing, chained

__all__ = ["MEDIA_TYPE", "export", "import_"]

MEDIA_TYPE = "application/gzip"


async def export(request: Request, user_id: UserId) -> Closing:
    """A user's home as a `tar.gz`, for an import here or on another host. What runs of the user stands still meanwhile.

    It is whole only if the answer ends in order. One that could not be finished is cut off, and an import refuses it.
    With HTTP/1.0, which has no end but that of the connection, that could not be seen: it gets nothing.
    """
    if request.scope["http_version"] == "1.0":
        # A proxy's way to us, as a rule, not the caller's to the proxy.
        raise ProblemError(505, "old-http", "an export needs HTTP/1.1", remedy="for nginx: proxy_http_version 1.1")
    users = server_of(request).supervisor.users
    pieces = taken(lambda output: users.export_stream(user_id, output))
    try:
        # What goes wrong before there is anything to send can still be told.
        first = await anext(pieces)
    except BaseException:
        await pieces.aclose()
        raise
    headers = {"Content-Disposition": 'attachment; filename="home.tar.gz"', "X-Content-Type-Options": "nosniff"}
    return Closing(chained(first, pieces), media_type=MEDIA_TYPE, headers=headers)


async def import_(
    request: Request,
    user_id: UserId,
    made_for: Annotated[str | None, Query(description="The id that the archive was made of, if another.")] = None,
) -> ImportOut:
    """Replace a user's home by what an archive holds: wholly, or not at all. The user is made if there is none."""
    users = server_of(request).supervisor.users
    imported = await given(request.stream(), lambda source: users.import_stream(user_id, source, made_for=made_for))
    return ImportOut(entries=imported.entries, files=imported.files, bytes=imported.bytes)
