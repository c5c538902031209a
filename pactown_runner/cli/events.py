"""`pactown-runner events`: what happens, as it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .asking import EXIT_CODES, Ask
from .options import Config, JsonLines, OfTenant, Server, UsersBase

if TYPE_CHECKING:
    from ..client import Client
    from ..models import Event
    from .output import Part

__all__ = ["register"]

_EPILOG = f"""\
[bold]--json[/bold] writes an object a line: kind, ts (seconds since the epoch), user_id, service_id, run_id, details.
`missed` stands for what came too fast to be read, or while the server was away.

{EXIT_CODES}

[bold]Examples[/bold]

pactown-runner events --user alice

pactown-runner events --json | jq -r 'select(.kind == "oom") | .service_id'"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=_EPILOG)(events)


def events(
    *,
    user: OfTenant = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", hidden=True)] = False,
    as_json: JsonLines = False,
    server: Server = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Show what happens to tenants and services from now on, until interrupted: starts, ends, limits that were hit.

    A server that is restarted meanwhile is waited for.
    """
    del follow  # for fingers that are used to it: nothing is kept of what was before

    async def hear(client: Client) -> None:
        from .output import Output  # noqa: PLC0415

        output = Output({"stdout": 1, "stderr": 2}, raw=True)
        async with client.events(user_id=user, reconnect=True) as stream:
            async for event in stream:
                await output.write([_part(event, as_json=as_json)])

    Ask(server, users_base, config, as_json).then(hear, lambda _: None)


def _part(event: Event, *, as_json: bool) -> Part:
    import json  # noqa: PLC0415

    from .sandbox_views import event_line  # noqa: PLC0415

    return 1, (json.dumps(event.to_dict()) if as_json else event_line(event)).encode() + b"\n"
