"""Options that several commands share, and the settings that come of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..config import Settings

__all__ = ["Config", "Cwd", "Env", "Json", "Raw", "Stdin", "UsersBase", "environment_of", "load_settings"]

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


def load_settings(users_base: Path | None, config: Path | None) -> Settings:
    """Return the settings in effect, see `Settings.load`."""
    from ..config import Settings  # noqa: PLC0415

    return Settings.load(config=config, users_base=users_base.absolute() if users_base else None)
