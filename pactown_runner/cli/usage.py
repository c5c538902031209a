"""`pactown-runner stats`, `limits` and `tiers`: what sandboxes use, and what they may."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .asking import EXIT_CODES, Ask
from .completing import complete_service, complete_user
from .messages import say, typed, write_json
from .options import Config, Cpu, Json, Memory, Pids, Server, Service, User, UsersBase, Watch, limits_of

if TYPE_CHECKING:
    from ..client import Client, SandboxView
    from ..tiers import Tier
    from .sandbox_views import Counted

__all__ = ["register"]

_STATS_EPILOG = f"""\
A dash is what this host does not count. [bold]--json[/bold] writes what is counted of one service, in bytes and
microseconds as the API has it, else {{"stats": [...], "count": N}}; with --watch a line each time.

{EXIT_CODES}

[bold]Examples[/bold]

pactown-runner stats --watch

pactown-runner stats alice my-api --json | jq .memory_current"""

_LIMITS_EPILOG = f"""\
[bold]--json[/bold] writes asked (what was asked for; null for the tier's or the settings') and held (what the kernel
answers, by control file).

{EXIT_CODES}

[bold]Examples[/bold]

pactown-runner limits alice my-api

pactown-runner limits alice my-api --memory 512M --cpu 150% --pids max"""

_TIERS_EPILOG = f"""\
[bold]--json[/bold] writes {{"tiers": [...], "count": N}}, each as the API has it.

{EXIT_CODES}

[bold]Example[/bold]: pactown-runner tiers"""

_TOGETHER = 16
"""So many questions are under way at once: a server bounds how many are connected."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog=_STATS_EPILOG)(stats)
    app.command(epilog=_LIMITS_EPILOG)(limits)
    app.command(epilog=_TIERS_EPILOG)(tiers)


def stats(
    user: Annotated[
        str | None,
        typer.Argument(metavar="USER", help="Of one tenant only.", show_default=False, autocompletion=complete_user),
    ] = None,
    service: Annotated[
        str | None,
        typer.Argument(
            metavar="SERVICE",
            help="All of one service.",
            show_default=False,
            autocompletion=complete_service,
        ),
    ] = None,
    *,
    watch: Watch = False,
    as_json: Json = False,
    server: Server = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Show what services use of memory, CPU, processes and disks."""
    ask = Ask(server, users_base, config, as_json)
    if service is not None and not watch:
        assert user is not None
        _show_one(ask, user, service)
        return

    async def look(client: Client) -> Counted:
        return await _count(client, user, service)

    if not watch:
        ask.then(look, lambda counted: _tell_all(counted, as_json=as_json))
        return
    from .sandbox_views import Rates, stats_grid  # noqa: PLC0415
    from .watching import watched  # noqa: PLC0415

    rates = Rates()
    ask.then(watched(look, lambda counted: stats_grid(counted, rates), _document, as_json=as_json), lambda _: None)


def _show_one(ask: Ask, user: str, service: str) -> None:
    def tell(counted: Counted) -> None:
        from .sandbox_views import show_stats, stats_document  # noqa: PLC0415

        [(sandbox, used)] = counted
        if ask.as_json:
            write_json(stats_document(sandbox, used))
        else:
            show_stats(sandbox, used)

    ask.then(lambda client: _count(client, user, service), tell)


async def _count(client: Client, user: str | None, service: str | None) -> Counted:
    """What these use. What ends while it is counted is left out, unless it is the one that was asked for."""
    import asyncio  # noqa: PLC0415

    from ..errors import NotFoundError, StateError  # noqa: PLC0415

    if user is not None and service is not None:
        sandbox = await client.get_sandbox(user, service)
        return [(sandbox, await client.stats(user, service))]
    room = asyncio.Semaphore(_TOGETHER)

    async def one(sandbox: SandboxView) -> Counted:
        async with room:
            try:
                return [(sandbox, await client.stats(sandbox.user_id, sandbox.service_id))]
            except (NotFoundError, StateError):
                return []

    found = await asyncio.gather(*map(one, await client.list_sandboxes(user)))
    return [pair for pairs in found for pair in pairs]


def _document(counted: Counted) -> dict[str, Any]:
    from .sandbox_views import stats_document  # noqa: PLC0415

    return {"stats": [stats_document(*pair) for pair in counted], "count": len(counted)}


def _tell_all(counted: Counted, *, as_json: bool) -> None:
    from .sandbox_views import stats_grid  # noqa: PLC0415
    from .tables import show_grid  # noqa: PLC0415

    if as_json:
        write_json(_document(counted))
        return
    show_grid(stats_grid(counted))
    if not counted:
        say(f"nothing runs; to see why: {typed('events')}")


def limits(
    user: User,
    service: Service,
    *,
    memory: Memory = None,
    cpu: Cpu = None,
    pids: Pids = None,
    as_json: Json = False,
    server: Server = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Show what the kernel holds a service to, or change it while it runs: all that is given, or none of it.

    A change holds for later runs, too; `max` takes a limit away.
    """
    ask = Ask(server, users_base, config, as_json)
    changed = any(value is not None for value in (memory, cpu, pids))

    async def work(client: Client) -> SandboxView:
        if changed:
            return await client.set_limits(user, service, limits_of(memory, cpu, pids))
        return await client.get_sandbox(user, service)

    def tell(sandbox: SandboxView) -> None:
        from .sandbox_views import limits_document, limits_shown, name_of  # noqa: PLC0415
        from .tables import show_pairs  # noqa: PLC0415

        if as_json:
            write_json(limits_document(sandbox))
        elif shown := limits_shown(sandbox):
            show_pairs(shown)
        else:
            command = typed("limits", user, service, "--memory", "256M")
            say(f"{name_of(sandbox)} has no limit of its own; to give it one: {command}")

    ask.then(work, tell)


def tiers(*, as_json: Json = False, server: Server = None, users_base: UsersBase = None, config: Config = None) -> None:
    """List the tiers that tenants may be given, and what each allows."""

    async def look(client: Client) -> list[Tier]:
        return await client.tiers()

    def tell(found: list[Tier]) -> None:
        from .sandbox_views import tiers_grid  # noqa: PLC0415
        from .tables import show_grid  # noqa: PLC0415

        if as_json:
            write_json({"tiers": [tier.to_dict() for tier in found], "count": len(found)})
        elif found:
            show_grid(tiers_grid(found))
        else:
            say("there are no tiers; they are [tiers.NAME] in the server's settings, see deploy/pactown.toml")

    Ask(server, users_base, config, as_json).then(look, tell)
