"""Tiers: which there are, and which a user has. They are the operator's to give."""

from __future__ import annotations

from fastapi import Request

from ...registry import Standing
from ..schemas import TierIn, TierOut, TiersOut, TierView, UserId
from ..server import server_of

__all__ = ["assign", "list_tiers", "show"]


async def list_tiers(request: Request) -> TiersOut:
    """All tiers, as the settings have them."""
    tiers = [TierView.of(tier) for tier in server_of(request).settings.tiers]
    return TiersOut(tiers=tiers, count=len(tiers))


async def show(request: Request, user_id: UserId) -> TierOut:
    """What the operator lets a user have."""
    standing = await server_of(request).supervisor.users.standing(user_id)
    return TierOut(user_id=user_id, tier=standing.tier, blocked=standing.blocked)


async def assign(request: Request, user_id: UserId, body: TierIn) -> TierOut:
    """Give a user a tier, or none; block it, or not. Both are as given afterwards, also what is not given.

    What runs of one who is blocked stands still, and nothing is started for it. One who is blocked no more is thawed.
    """
    users = server_of(request).supervisor.users
    await users.set_standing(user_id, Standing(body.tier, body.blocked))
    return await show(request, user_id)
