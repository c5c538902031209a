"""`pactown-runner start`: a service, which the server looks after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .asking import EXIT_CODES, Ask
from .messages import FAILED, errors_told, say, typed, write_json
from .options import (
    Command,
    Config,
    Cpu,
    Cwd,
    Env,
    Grace,
    Json,
    Memory,
    Pids,
    Server,
    Tenant,
    UsersBase,
    environment_of,
    limits_of,
)

if TYPE_CHECKING:
    from ..client import Client, SandboxView
    from ..specs import SandboxSpec

__all__ = ["register"]

_HEALTH = "Life"

_EPILOG = f"""\
[bold]--json[/bold] writes the sandbox as the API has it.

{EXIT_CODES}

[bold]Examples[/bold]

pactown-runner start --user alice --service my-api -- python3 main.py

pactown-runner start --user alice --service my-api --restart always --ready-port 8001 --wait --memory 256M --env
PORT=8001 -- python3 main.py"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=_EPILOG,
        # The first word that is no option begins the command, whether `--` stands before it or not.
        context_settings={"allow_interspersed_args": False},
    )(start)


def start(
    command: Command,
    *,
    user: Tenant,
    service: Annotated[
        str, typer.Option("--service", metavar="NAME", help="Names directory, cgroup and log.", show_default=False)
    ],
    env: Env = None,
    cwd: Cwd = None,
    requirements: Annotated[
        list[str] | None,
        typer.Option("--require", metavar="PACKAGE", help="A Python package that it needs, as pip takes it."),
    ] = None,
    restart: Annotated[
        str,
        typer.Option(
            "--restart",
            metavar="no|on-failure|always",
            help="What to do when it ends. With `always` it also comes back after a restart of the server or the host.",
            rich_help_panel=_HEALTH,
        ),
    ] = "no",
    ready_port: Annotated[
        int | None,
        typer.Option(
            "--ready-port",
            metavar="PORT",
            help="It is ready when it answers on this TCP port.",
            show_default=False,
            rich_help_panel=_HEALTH,
        ),
    ] = None,
    ready_path: Annotated[
        str | None,
        typer.Option(
            "--ready-path",
            metavar="PATH",
            help="And this path there, by HTTP.",
            show_default=False,
            rich_help_panel=_HEALTH,
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return only when it is ready.", rich_help_panel=_HEALTH)
    ] = False,
    grace: Grace = None,
    memory: Memory = None,
    cpu: Cpu = None,
    pids: Pids = None,
    as_json: Json = False,
    server: Server = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Start a service of a tenant under the server, and return when its program has been executed.

    It goes on when this command has ended. A limit that the host cannot enforce is an error.
    """
    with errors_told(FAILED, as_json=as_json):
        spec = _spec(
            {
                "user_id": user,
                "service_id": service,
                "command": command,
                "env": environment_of(env or []),
                "cwd": cwd,
                "stop_grace": grace,
                "requirements": requirements or [],
            },
            restart=restart,
            ready=(ready_port, ready_path),
            # Nothing asked for is for the server to fill in.
            limits=(memory, cpu, pids),
        )

    async def work(client: Client) -> SandboxView:
        return await client.start(spec, wait_ready=wait)

    def tell(sandbox: SandboxView) -> None:
        if as_json:
            write_json(sandbox.to_dict())
            return
        from .sandbox_views import name_of  # noqa: PLC0415

        say(f"started {name_of(sandbox)}: {sandbox.state}, pid {sandbox.pid}")
        say(f"to see what it prints: {typed('logs', '-f', user, service)}")

    Ask(server, users_base, config, as_json).then(work, tell)


def _spec(
    given: dict[str, Any],
    *,
    restart: str,
    ready: tuple[int | None, str | None],
    limits: tuple[str | None, str | None, str | None],
) -> SandboxSpec:
    from ..errors import SpecError  # noqa: PLC0415
    from ..specs import Probe, RestartPolicy, SandboxSpec  # noqa: PLC0415

    port, path = ready
    if path is not None and port is None:
        raise SpecError("--ready-path needs a port to ask on", remedy="add --ready-port PORT")
    return SandboxSpec(
        **given,
        restart=RestartPolicy(restart),  # type: ignore[arg-type]  # it checks
        ready=None if port is None else Probe(port=port, path=path),
        limits=limits_of(*limits) or None,
    )
