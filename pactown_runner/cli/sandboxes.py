"""`pactown-runner ps`, `stop`, `restart`, `freeze`, `thaw` and `signal`: what runs under a server, and acts upon it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .asking import EXIT_CODES, Ask
from .messages import say, typed, write_json
from .options import Config, Grace, Json, OfTenant, Server, Service, User, UsersBase, Watch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ..client import Client, SandboxView

__all__ = ["register"]

_PS_EPILOG = f"""\
[bold]--json[/bold] writes {{"sandboxes": [...], "count": N}}, each as the API has it; with --watch a line each time.

{EXIT_CODES}

[bold]Examples[/bold]

pactown-runner ps --user alice

pactown-runner ps --json | jq -r '.sandboxes[] | select(.state == "crash-looping") | .service_id'"""

_LAST_SIGNAL = 64

_ACTED = """\
[bold]--json[/bold] writes the sandbox as the API has it.
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog=_PS_EPILOG)(ps)
    app.command(epilog=_epilog("stop alice my-api --grace 30"))(stop)
    app.command(epilog=_epilog("restart alice my-api"))(restart)
    app.command(epilog=_epilog("freeze alice my-api"))(freeze)
    app.command(epilog=_epilog("thaw alice my-api"))(thaw)
    app.command(
        "signal",
        epilog=f'[bold]--json[/bold] writes {{"signalled": N}}.\n\n{EXIT_CODES}\n\n'
        "[bold]Example[/bold]: pactown-runner signal alice my-api HUP",
    )(signal_)


def _epilog(example: str) -> str:
    return f"{_ACTED}\n{EXIT_CODES}\n\n[bold]Example[/bold]: pactown-runner {example}"


def ps(
    *,
    user: OfTenant = None,
    watch: Watch = False,
    as_json: Json = False,
    server: Server = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """List what runs under the server, and what is to run again soon."""
    ask = Ask(server, users_base, config, as_json)

    async def look(client: Client) -> list[SandboxView]:
        return await client.list_sandboxes(user)

    if not watch:
        ask.then(look, lambda found: _tell_list(found, user, as_json=as_json))
        return
    from .sandbox_views import list_grid  # noqa: PLC0415
    from .watching import watched  # noqa: PLC0415

    ask.then(watched(look, list_grid, _document, as_json=as_json), lambda _: None)


def _document(found: Sequence[SandboxView]) -> dict[str, Any]:
    return {"sandboxes": [view.to_dict() for view in found], "count": len(found)}


def _tell_list(found: Sequence[SandboxView], user: str | None, *, as_json: bool) -> None:
    from .sandbox_views import list_grid  # noqa: PLC0415
    from .tables import show_grid  # noqa: PLC0415

    if as_json:
        write_json(_document(found))
        return
    show_grid(list_grid(found))
    if not found:
        say(f"nothing runs{'' if user is None else f' of {user!r}'}; to start something: {_start(user)}")


def _start(user: str | None) -> str:
    return typed("start", "--user", user or "ID", "--service", "NAME", "--", "COMMAND")


def stop(
    user: User,
    service: Service,
    *,
    grace: Grace = None,
    as_json: Json = False,
    server: Server = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Stop a service: SIGTERM to each of its processes, SIGKILL after the grace time. It is not started again.

    It returns when nothing of it runs any more. Directory and log stay.
    """
    ask = Ask(server, users_base, config, as_json)
    _act(ask, lambda client: client.stop(user, service, grace=grace), _tell_stopped)


def _tell_stopped(sandbox: SandboxView) -> None:
    from .sandbox_views import name_of  # noqa: PLC0415

    how = f": {sandbox.outcome.message}" if sandbox.outcome and sandbox.outcome.message else ""
    say(f"stopped {name_of(sandbox)}{how}")


def restart(
    user: User,
    service: Service,
    *,
    grace: Grace = None,
    as_json: Json = False,
    server: Server = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """End a service's program as `stop` does, and start it again; one that is crash-looping as well."""
    ask = Ask(server, users_base, config, as_json)
    _act(ask, lambda client: client.restart(user, service, grace=grace), _tell_state)


def freeze(
    user: User,
    service: Service,
    *,
    as_json: Json = False,
    server: Server = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Have a service stand still, memory and all, until it is thawed. It cannot notice."""
    ask = Ask(server, users_base, config, as_json)
    _act(ask, lambda client: client.freeze(user, service), _tell_state)


def thaw(
    user: User,
    service: Service,
    *,
    as_json: Json = False,
    server: Server = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Let a service that is frozen go on."""
    ask = Ask(server, users_base, config, as_json)
    _act(ask, lambda client: client.thaw(user, service), _tell_state)


def signal_(
    user: User,
    service: Service,
    signal: Annotated[
        str,
        typer.Argument(metavar="SIGNAL", help="Its name, such as HUP or SIGHUP, or its number.", show_default=False),
    ],
    *,
    as_json: Json = False,
    server: Server = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Send a signal to each process of a service. One that is frozen acts on it once it is thawed."""
    number = _number(signal)

    def tell(signalled: int) -> None:
        if as_json:
            write_json({"signalled": signalled})
        elif signalled:  # the kernel does not count those that it kills
            say(f"sent to {signalled} process{'es' * (signalled != 1)}")
        else:
            say("sent")

    Ask(server, users_base, config, as_json).then(lambda client: client.signal(user, service, number), tell)


def _number(word: str) -> int:
    import signal as signals  # noqa: PLC0415

    if word.isascii() and word.isdecimal() and 1 <= (number := int(word)) <= _LAST_SIGNAL:
        return number
    name = f"SIG{word.upper().removeprefix('SIG')}"
    if name in signals.Signals.__members__:
        return signals.Signals[name]
    raise typer.BadParameter(f"there is no signal {word!r}", param_hint="SIGNAL")


def _act(ask: Ask, work: Callable[[Client], Awaitable[SandboxView]], tell: Callable[[SandboxView], None]) -> None:
    ask.then(work, (lambda sandbox: write_json(sandbox.to_dict())) if ask.as_json else tell)


def _tell_state(sandbox: SandboxView) -> None:
    from .sandbox_views import name_of  # noqa: PLC0415

    say(f"{name_of(sandbox)}: {sandbox.state}, pid {sandbox.pid}")
