"""`pactown-runner exec`: a further program in a service that runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .asking import Ask
from .completing import complete_service, complete_user
from .messages import Ended, errors_told
from .options import Command, Config, Cwd, Env, Raw, ServerInstead, Stdin, UsersBase, environment_of, load_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..client import Client, ExecStatus, ExecStream

__all__ = ["register"]

EXEC_FAILED = 125
"""The exit code of env(1), timeout(1) and container engines for "it was never started"."""

LONGEST = 31 * 86_400.0
"""Seconds, of a program in a server: as long as its API has it. It ends with its caller, as here."""

_EPILOG = """\
[bold]Exit code[/bold]: the program's own; 128 + n if signal n ended it, which is 137 when the service ends; 125 if it
was not executed; 130 and 143 after control-C and SIGTERM; 141 if nobody reads the output any more.

[bold]Examples[/bold]

pactown-runner exec --user alice --service my-api -- ps -ef

pactown-runner exec --user alice --service my-api -i -- sqlite3 data.db < query.sql"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "exec",
        epilog=_EPILOG,
        # The first word that is no option begins the command, whether `--` stands before it or not.
        context_settings={"allow_interspersed_args": False},
    )(execute)


def execute(
    command: Command,
    *,
    user: Annotated[
        str,
        typer.Option("--user", metavar="ID", help="The tenant's id.", show_default=False, autocompletion=complete_user),
    ],
    service: Annotated[
        str,
        typer.Option(
            "--service",
            metavar="NAME",
            help="A service that runs.",
            show_default=False,
            autocompletion=complete_service,
        ),
    ],
    env: Env = None,
    cwd: Cwd = None,
    stdin: Stdin = False,
    raw: Raw = False,
    server: ServerInstead = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Execute a further program in a service that runs, whichever process looks after that.

    It is born in the service's cgroup, with its identity, environment and namespaces; counts against its limits; and
    ends with it. Its output comes out here and not in the log. When this command is interrupted, the program is killed
    with its process group; what has left that stays a part of the service.

    With --server its standard input is read whole first.
    """
    if server is not None:
        _ask_server(
            Ask(server, users_base, config, as_json=False, failed=EXEC_FAILED),
            lambda client, given, added: client.exec_stream(
                user, service, command, stdin=given, env=added, cwd=cwd, timeout=LONGEST
            ),
            env or [],
            stdin=stdin,
            raw=raw,
        )
        return
    with errors_told(EXEC_FAILED, as_json=False):
        settings = load_settings(users_base, config)
        added = environment_of(env or [])
        from .executing import execute_to_end  # noqa: PLC0415 - asyncio, and all that executes

        raise Ended(execute_to_end(settings, user, service, command, env=added, cwd=cwd, stdin=stdin, raw=raw))


def _ask_server(
    ask: Ask,
    execute: Callable[[Client, bytes, dict[str, str]], ExecStream],
    env: list[str],
    *,
    stdin: bool,
    raw: bool,
) -> None:
    with errors_told(EXEC_FAILED, as_json=False):
        added = environment_of(env)
        given = sys.stdin.buffer.read() if stdin else b""

    async def work(client: Client) -> ExecStatus | None:
        from .output import Output, Shown  # noqa: PLC0415

        written = Output({}, raw=raw)
        shown = {"stdout": (1, Shown(1, raw=raw)), "stderr": (2, Shown(2, raw=raw))}
        async with execute(client, given, added) as output:
            async for stream, data in output:
                fd, as_shown = shown[stream]
                await written.write([(fd, as_shown(data))])
            await written.write([(fd, as_shown(b"", final=True)) for fd, as_shown in shown.values()])
            return output.status

    ask.then(work, _end_as)


def _end_as(status: ExecStatus | None) -> None:
    """End as the program did."""
    if status is not None and status.signal is not None:
        raise Ended(128 + status.signal)
    raise Ended(EXEC_FAILED if status is None or status.exit_code is None else status.exit_code)
