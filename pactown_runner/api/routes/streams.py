"""Logs and events, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, NamedTuple

from fastapi import Header, Query, Request

from ...errors import NotFoundError
from ...models import LogRecord
from ...sandbox import Sandbox
from ...specs import check_service_id
from ..access import Caller
from ..schemas import ServiceId, UserId
from ..server import Server, caller_of, server_of
from ..sse import Closing, Message, end, event_stream
from .users import known_user

__all__ = ["events", "logs"]


class Wanted(NamedTuple):
    """What of a log is asked for, see `logs`."""

    follow: bool
    since: int
    tail: int | None


Follow = Annotated[bool, Query(description="Go on as lines are printed, until the service has ended.")]
Since = Annotated[int, Query(description="Begin behind the record of this number.", ge=0, le=2**63 - 1)]
Tail = Annotated[int | None, Query(description="Begin with the last so many records.", ge=0, le=10_000_000)]
LastId = Annotated[
    str | None, Header(alias="Last-Event-ID", description="As `since`; what a client that comes back sends by itself.")
]


async def logs(  # noqa: PLR0917 - FastAPI gives them by name
    request: Request,
    user_id: UserId,
    service_id: ServiceId,
    follow: Follow = False,
    since: Since = 0,
    tail: Tail = None,
    last_id: LastId = None,
) -> Closing:
    """What a service has printed, over all its runs, as server-sent events; it need not run.

    Each `record` has its number as its id, so that a client that comes back goes on where it was. The last event is
    `end`, and says why: `read` (there is no more), `ended` (the service has), `not-running`, `server-stopping`,
    `token-expired`, `time` (it lasted as long as it may) or `failed`, with the problem.
    """
    check_service_id(service_id)
    await known_user(request, user_id)
    server = server_of(request)
    if last_id is not None and last_id.isascii() and last_id.isdecimal() and len(last_id) <= 18:
        since, tail = int(last_id), None
    records = _records(server, user_id, service_id, Wanted(follow, since, tail))
    return event_stream(server, caller_of(request), records)


async def _records(server: Server, user_id: str, service_id: str, wanted: Wanted) -> AsyncGenerator[Message, None]:
    follow, since, tail = wanted
    sandbox = _live(server, user_id, service_id) if follow else None
    # All runs before those that this sandbox knows of, too. Then on from there, without a gap.
    async with aclosing(server.supervisor.logs(user_id, service_id, tail=tail, since=since)) as past:
        async for record in past:
            since, tail = record.seq, None
            yield _message(record)
    if sandbox is None:
        yield end("not-running" if follow else "read")
        return
    async with aclosing(sandbox.logs(follow=True, since=since, tail=tail)) as coming:
        async for record in coming:
            yield _message(record)
    outcome = sandbox.outcome
    yield end("ended", outcome=None if outcome is None else outcome.to_dict())


def _live(server: Server, user_id: str, service_id: str) -> Sandbox | None:
    try:
        return server.supervisor.get(user_id, service_id)
    except NotFoundError:
        return None


def _message(record: LogRecord) -> Message:
    return Message("record", record.to_dict(), record.seq)


async def events(
    request: Request, user_id: Annotated[str | None, Query(description="Of this user only.")] = None
) -> Closing:
    """What happens to users and sandboxes from now on, as server-sent events: each is named as what happened.

    A client that is too slow is told by `missed` how many it did not get. The last event is `end`, and says why.
    """
    server, caller = server_of(request), caller_of(request)
    return event_stream(server, caller, _events(server, caller, user_id))


async def _events(server: Server, caller: Caller, user_id: str | None) -> AsyncGenerator[Message, None]:
    async with aclosing(server.supervisor.events()) as reader:
        async for event in reader:
            ours = event.kind == "missed" or (caller.reaches(event.user_id) and user_id in (None, event.user_id))
            if ours:
                yield Message(event.kind, event.to_dict())
    yield end("server-stopping")
