"""Sandboxes: started, looked at, and acted upon."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request

from cgroups import Stats

from ...errors import BlockedError
from ...sandbox import Sandbox
from ..schemas import After, Grace, LimitsIn, PageLimit, SandboxesPage, SandboxIn, SandboxView, ServiceId, UserId
from ..server import caller_of, server_of, while_connected

__all__ = [
    "freeze",
    "list_sandboxes",
    "restart",
    "set_limits",
    "show",
    "start",
    "stats",
    "stop",
    "thaw",
]


async def list_sandboxes(
    request: Request,
    user_id: Annotated[str | None, Query(description="Of this user only.")] = None,
    limit: PageLimit = 1000,
    after: After = None,
) -> SandboxesPage:
    """Sandboxes that are alive under this server, by user and service."""
    caller = caller_of(request)
    found = [sandbox for sandbox in server_of(request).supervisor.list(user_id) if caller.reaches(sandbox.user_id)]
    found.sort(key=_place)
    if after is not None:
        # An id may hold a slash, a service's name does not.
        behind = tuple(after.rpartition("/")[::2])
        found = [sandbox for sandbox in found if _place(sandbox) > behind]
    page = [SandboxView.of(sandbox) for sandbox in found[:limit]]
    last = f"{page[-1].user_id}/{page[-1].service_id}" if len(found) > limit else None
    return SandboxesPage(sandboxes=page, count=len(page), next=last)


async def start(request: Request, body: SandboxIn) -> SandboxView:
    """Start a service, and answer when its program has been executed; or a run, and answer when it has ended.

    The user and the service's directory are made if they are missing.
    """
    caller_of(request).must_reach(body.user_id)
    supervisor, spec = server_of(request).supervisor, body.spec()
    if body.kind == "service":
        return SandboxView.of(await supervisor.start(spec))
    return await while_connected(request, _run(request, body))


async def _run(request: Request, body: SandboxIn) -> SandboxView:
    sandbox = await server_of(request).supervisor.start_run(body.spec())
    try:
        await sandbox.wait()
    finally:
        # Whoever waited is gone: nobody is left to hear of it.
        if sandbox.outcome is None:
            await sandbox.kill()
    return SandboxView.of(sandbox)


async def show(request: Request, user_id: UserId, service_id: ServiceId) -> SandboxView:
    """A sandbox that is alive."""
    return SandboxView.of(_live(request, user_id, service_id))


async def stop(request: Request, user_id: UserId, service_id: ServiceId, grace: Grace = None) -> SandboxView:
    """Stop it: SIGTERM, after the grace time SIGKILL. When the answer comes, nothing of it runs any more.

    It is not started again. Its directory and its log stay.
    """
    sandbox = _live(request, user_id, service_id)
    await sandbox.stop(grace)
    return SandboxView.of(sandbox)


async def freeze(request: Request, user_id: UserId, service_id: ServiceId) -> SandboxView:
    """Stop it from running; it cannot notice."""
    sandbox = _live(request, user_id, service_id)
    await sandbox.freeze()
    return SandboxView.of(sandbox)


async def thaw(request: Request, user_id: UserId, service_id: ServiceId) -> SandboxView:
    """Let it run again."""
    sandbox = _live(request, user_id, service_id)
    await _refuse_blocked(request, user_id)
    await sandbox.thaw()
    return SandboxView.of(sandbox)


async def restart(request: Request, user_id: UserId, service_id: ServiceId, grace: Grace = None) -> SandboxView:
    """End its program as a stop does, and start it again, also if it is `crash-looping`."""
    sandbox = _live(request, user_id, service_id)
    await _refuse_blocked(request, user_id)
    await sandbox.restart(grace)
    return SandboxView.of(sandbox)


async def set_limits(request: Request, user_id: UserId, service_id: ServiceId, body: LimitsIn) -> SandboxView:
    """Change limits while it runs: all that are given, or none. They hold for its later runs, too."""
    sandbox = _live(request, user_id, service_id)
    await sandbox.set_limits(body.limits())
    return SandboxView.of(sandbox)


async def stats(request: Request, user_id: UserId, service_id: ServiceId) -> Stats:
    """What it uses. A counter that this host does not have is null."""
    return await _live(request, user_id, service_id).stats()


def _live(request: Request, user_id: str, service_id: str) -> Sandbox:
    return server_of(request).supervisor.get(user_id, service_id)


async def _refuse_blocked(request: Request, user_id: str) -> None:
    if (await server_of(request).supervisor.users.standing(user_id)).blocked:
        raise BlockedError("this user is blocked: what there is of it stands still")


def _place(sandbox: Sandbox) -> tuple[str, str]:
    return sandbox.user_id, sandbox.service_id
