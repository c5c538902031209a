"""Users: who they are, what they have, and their end."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request

from ...models import IsolatedUser
from ..problems import ProblemError
from ..schemas import After, Deleted, PageLimit, User, UserDetail, UserId, UserName, UsersPage, UserStatsOut
from ..server import caller_of, server_of

__all__ = ["create", "delete", "get_or_create", "known_user", "list_users", "stats"]


async def list_users(request: Request, limit: PageLimit = 1000, after: After = None) -> UsersPage:
    """All users, in the order of their ids."""
    caller = caller_of(request)
    users = [user for user in await server_of(request).supervisor.users.list() if caller.reaches(user.saas_user_id)]
    users.sort(key=lambda user: user.saas_user_id)
    rest = [user for user in users if after is None or user.saas_user_id > after]
    page = [User.of(user) for user in rest[:limit]]
    return UsersPage(users=page, count=len(page), next=page[-1].saas_user_id if len(rest) > limit else None)


async def get_or_create(
    request: Request,
    user_id: UserId,
    make: Annotated[bool, Query(alias="create", description="Make one; else it is an error if there is none.")] = True,
) -> User:
    """The user of this id. A caller with the role `admin` gets one made if there is none."""
    if make and caller_of(request).changes:
        return await create(request, user_id)
    return User.of(await known_user(request, user_id))


async def create(request: Request, user_id: UserId) -> User:
    """The user of this id, made if there is none."""
    return User.of(await server_of(request).supervisor.users.get_or_create(user_id))


async def stats(
    request: Request,
    user_id: UserId,
    detail: Annotated[bool, Query(description="Tell more than the totals.")] = False,
) -> UserStatsOut:
    """What a user has. The home is counted anew, as the user, which may take seconds."""
    supervisor = server_of(request).supervisor
    found = await supervisor.users.stats(user_id)
    totals = found.to_dict()
    out = UserStatsOut(**totals | {"user": UserName(**totals["user"])})
    if detail:
        standing = await supervisor.users.standing(user_id)
        out.detail = UserDetail(
            size_bytes=found.usage.bytes,
            entries=found.usage.entries,
            running=len(supervisor.list(user_id)),
            tier=standing.tier,
            blocked=standing.blocked,
        )
    return out


async def delete(request: Request, user_id: UserId, delete_home: bool = True, delete_logs: bool = True) -> Deleted:
    """End all that runs as the user, and delete the user with all that is its on this host.

    The id gets the same account if it comes back; nobody else ever does. What is kept waits for that.
    """
    users = server_of(request).supervisor.users
    await users.delete(user_id, delete_home=delete_home, delete_logs=delete_logs)
    return Deleted(user_id=user_id)


async def known_user(request: Request, user_id: str) -> IsolatedUser:
    """The user of this id.

    Raises:
        ProblemError: there is none.
    """
    user = await server_of(request).supervisor.users.get(user_id)
    if user is None:
        raise ProblemError(404, "not-found", "there is no user of this id")
    return user
