"""`pactown-runner run`: one program of one tenant, to its end."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated

import typer

from .messages import Ended, errors_told, write_json
from .options import (
    Command,
    Config,
    Cpu,
    Cwd,
    Env,
    Memory,
    Pids,
    Raw,
    Stdin,
    Tenant,
    UsersBase,
    environment_of,
    limits_of,
    load_settings,
)

if TYPE_CHECKING:
    from cgroups import Limits

    from ..specs import SandboxSpec

__all__ = ["register"]

RUN_FAILED = 125
"""The exit code of env(1), timeout(1) and container engines for "it was never started"."""

_EPILOG = """\
[bold]Exit code[/bold]: the program's own; 128 + n if signal n ended it; 124 if --timeout did; 137 if it ran out of
memory; 125 if it was not started or the runner failed; 130 and 143 after control-C and SIGTERM; 141 if nobody reads
the output any more.

[bold]Examples[/bold]

pactown-runner run --user alice -- id

pactown-runner run --user alice --service job --memory 256M --cpu 50% --pids 64 -- python3 main.py

pactown-runner run --user alice -i -- sort < names.txt > sorted.txt

pactown-runner run --user alice --timeout 30 --json -- ./test.sh 2> output.log"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog=_EPILOG,
        # The first word that is no option begins the command, whether `--` stands before it or not.
        context_settings={"allow_interspersed_args": False},
    )(run)


def run(
    command: Command,
    *,
    user: Tenant,
    service: Annotated[
        str | None,
        typer.Option(
            "--service",
            metavar="NAME",
            help="Names directory, cgroup and log, and runs once at a time. By default run-<random>.",
            show_default=False,
        ),
    ] = None,
    env: Env = None,
    cwd: Cwd = None,
    stdin: Stdin = False,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", help="Kill it after that long.", show_default=False),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            "--grace",
            metavar="SECONDS",
            help="From SIGTERM to SIGKILL when this command is interrupted; a second control-C kills at once.",
            show_default=False,
        ),
    ] = None,
    memory: Memory = None,
    cpu: Cpu = None,
    pids: Pids = None,
    raw: Raw = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Standard output carries one JSON document, outcome and isolation, at the end; all that the program "
            "prints goes to standard error.",
        ),
    ] = False,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Run one program as a tenant, in a sandbox of its own, and wait for its end.

    Its output comes out here as it was written, standard output and standard error apart. Nothing that it leaves
    behind goes on running. A limit that this host cannot enforce is an error.
    """
    with errors_told(RUN_FAILED, as_json=as_json):
        settings = load_settings(users_base, config)
        spec = _spec(
            command=command,
            user=user,
            service=service,
            env=environment_of(env or []),
            cwd=cwd,
            stdin=stdin,
            timeout=timeout,
            grace=grace,
            limits=settings.default_limits.merge(limits_of(memory, cpu, pids)),
        )
        from .running import run_to_end  # noqa: PLC0415 - the supervisor, and asyncio

        ended = run_to_end(settings, spec, raw=raw, as_json=as_json)
        if as_json and ended.document is not None:
            write_json(ended.document)
        raise Ended(ended.status)


def _spec(
    *,
    command: list[str],
    user: str,
    service: str | None,
    env: dict[str, str],
    cwd: str | None,
    stdin: bool,
    timeout: float | None,
    grace: float | None,
    limits: Limits,
) -> SandboxSpec:
    from ..errors import SpecError  # noqa: PLC0415
    from ..specs import SandboxSpec  # noqa: PLC0415

    if timeout is not None and not timeout > 0:
        raise SpecError(f"--timeout must be more than 0 seconds, not {timeout:g}")
    return SandboxSpec(
        user_id=user,
        service_id=f"run-{secrets.token_hex(6)}" if service is None else service,
        command=command,
        env=env,
        cwd=cwd,
        stdin=stdin,
        timeout=timeout,
        stop_grace=grace,
        limits=limits,
    )
