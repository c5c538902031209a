"""Options that several commands share, and the settings that come of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .completing import complete_service, complete_user

if TYPE_CHECKING:
    from cgroups import Limits

    from ..config import Settings

__all__ = [
    "Command",
    "Config",
    "Cpu",
    "Cwd",
    "Env",
    "Grace",
    "Json",
    "JsonLines",
    "Memory",
    "OfTenant",
    "Pids",
    "Raw",
    "Server",
    "ServerInstead",
    "Service",
    "Stdin",
    "Tenant",
    "User",
    "UsersBase",
    "Watch",
    "environment_of",
    "limits_of",
    "load_settings",
]

_LIMITS = "Limits"

User = Annotated[
    str,
    typer.Argument(metavar="USER", help="The tenant's id.", show_default=False, autocompletion=complete_user),
]
Service = Annotated[
    str, typer.Argument(metavar="SERVICE", help="Its name.", show_default=False, autocompletion=complete_service)
]
Tenant = Annotated[
    str,
    typer.Option(
        "--user",
        metavar="ID",
        help="The tenant. An account is made at first use.",
        show_default=False,
        autocompletion=complete_user,
    ),
]
OfTenant = Annotated[
    str | None,
    typer.Option("--user", metavar="ID", help="Those of one tenant.", show_default=False, autocompletion=complete_user),
]
Command = Annotated[
    list[str], typer.Argument(metavar="-- COMMAND...", help="Executed as it is; no shell.", show_default=False)
]
Server = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="ADDRESS",
        envvar="PACTOWN_SERVER",
        help="A socket's path, or http(s)://HOST:PORT with the token in PACTOWN_TOKEN. By default the socket of the "
        "settings.",
        show_default=False,
        show_envvar=True,
        rich_help_panel="Settings",
    ),
]
ServerInstead = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="ADDRESS",
        envvar="PACTOWN_SERVER",
        help="Have that server do it, and not this host: a socket's path, or http(s)://HOST:PORT with the token in "
        "PACTOWN_TOKEN.",
        show_default=False,
        show_envvar=True,
        rich_help_panel="Settings",
    ),
]
"""Of commands that need no server."""
UsersBase = Annotated[
    Path | None,
    typer.Option(
        "--users-base",
        metavar="PATH",
        help="Where homes are. Other than the default, it keeps the whole state, logs too, below it.",
        show_default=False,
        rich_help_panel="Settings",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The TOML file with settings. By default PACTOWN_CONFIG, else /etc/pactown/pactown.toml. "
        "PACTOWN_* variables go before the file.",
        show_default=False,
        rich_help_panel="Settings",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document to standard output.")]
Memory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Such as 256M.", show_default=False, rich_help_panel=_LIMITS),
]
Cpu = Annotated[
    str | None,
    typer.Option("--cpu", metavar="CORES", help="Such as 50% or 1.5.", show_default=False, rich_help_panel=_LIMITS),
]
Pids = Annotated[
    str | None,
    typer.Option("--pids", metavar="N", help="Processes and threads.", show_default=False, rich_help_panel=_LIMITS),
]
Grace = Annotated[
    float | None,
    typer.Option(
        "--grace",
        metavar="SECONDS",
        help="From SIGTERM to SIGKILL when it is stopped; else as the settings say.",
        show_default=False,
        min=0,
    ),
]
Watch = Annotated[bool, typer.Option("-w", "--watch", help="Look again every second, until interrupted.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Write one JSON object a line to standard output.")]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="Pass control characters on to a terminal, too. A program can then drive your terminal."
    ),
]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME=VALUE", help="Add to the environment, of which nothing of yours is passed on."),
]
Cwd = Annotated[
    str | None,
    typer.Option("--cwd", metavar="PATH", help="Relative to the service's directory, or absolute.", show_default=False),
]
Stdin = Annotated[
    bool,
    typer.Option("-i", "--stdin", help="Feed it this command's standard input, through a pipe. Else it is empty."),
]


def environment_of(words: list[str]) -> dict[str, str]:
    """Return what `--env NAME=VALUE` adds to an environment.

    Raises:
        SpecError: one of them has no value.
    """
    from ..errors import SpecError  # noqa: PLC0415

    pairs = [word.partition("=") for word in words]
    for name, sign, _ in pairs:
        if not sign:
            raise SpecError(f"--env {name} has no value", remedy=f"--env {name}=VALUE; nothing is passed on by name")
    return {name: value for name, _, value in pairs}


def limits_of(memory: str | None, cpu: str | None, pids: str | None) -> Limits:
    """Return the limits of `--memory`, `--cpu` and `--pids`.

    Raises:
        SpecError: one of them can never be right.
    """
    from cgroups import FormatError, Limits  # noqa: PLC0415

    from ..errors import SpecError  # noqa: PLC0415

    try:
        return Limits(memory_max=memory, cpu_max=cpu, pids_max=pids)
    except FormatError as error:
        raise SpecError(error.message, remedy=error.remedy) from error


def load_settings(users_base: Path | None, config: Path | None) -> Settings:
    """Return the settings in effect, see `Settings.load`."""
    from ..config import Settings  # noqa: PLC0415

    return Settings.load(config=config, users_base=users_base.absolute() if users_base else None)
