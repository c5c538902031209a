"""`pactown-runner users tier`: what the operator lets a tenant have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .asking import EXIT_CODES, Ask
from .messages import write_json
from .options import Config, Json, Server, User, UsersBase

if TYPE_CHECKING:
    from ..client import Client, UserTier

__all__ = ["register"]

_NONE = "none"

_EPILOG = f"""\
[bold]--json[/bold] writes {{"user_id", "tier" (null for none), "blocked"}}.

{EXIT_CODES}

[bold]Examples[/bold]

pactown-runner users tier alice pro

pactown-runner users tier alice --block"""


def register(users: typer.Typer) -> None:
    """Add the command to those about users."""
    users.command(epilog=_EPILOG)(tier)


def tier(
    user: User,
    name: Annotated[
        str | None,
        typer.Argument(metavar="TIER", help=f"The tier to give; `{_NONE}` takes it away.", show_default=False),
    ] = None,
    *,
    block: Annotated[
        bool | None,
        typer.Option(
            "--block/--unblock",
            help="Have all that runs of the tenant stand still, and start nothing; or let it go on.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    server: Server = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Show a tenant's tier and whether it is blocked, or change that; `pactown-runner tiers` lists them.

    It holds at once, also for what runs. What is not given stays as it is.
    """

    async def work(client: Client) -> UserTier:
        now = await client.user_tier(user)
        if name is None and block is None:
            return now
        wanted = now.tier if name is None else None if name == _NONE else name
        return await client.set_tier(user, wanted, blocked=now.blocked if block is None else block)

    def tell(found: UserTier) -> None:
        if as_json:
            write_json({"user_id": found.user_id, "tier": found.tier, "blocked": found.blocked})
            return
        from .human import UNKNOWN  # noqa: PLC0415
        from .tables import show_pairs  # noqa: PLC0415

        blocked = "yes" if found.blocked else "no"
        show_pairs([("user", found.user_id), ("tier", found.tier or UNKNOWN), ("blocked", blocked)])

    Ask(server, users_base, config, as_json).then(work, tell)
