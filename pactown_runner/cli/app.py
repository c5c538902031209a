"""All commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from . import doctor, events, files, logs, purge, run, sandboxes, serve, starting, usage, users
from . import exec as exec_

__all__ = ["make_app"]

_COMMANDS = (run, serve, starting, sandboxes, exec_, logs, usage, events, files, users, doctor, purge)
"""Each adds itself with `register(app)`; the help lists them in this order, and groups of commands last."""


def make_app() -> typer.Typer:
    """Return the application."""
    app = typer.Typer(
        name="pactown-runner",
        help="Run other people's code on this machine: each tenant with an account of its own, each program in a "
        "cgroup of its own, born without a single privilege.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        # A traceback with the values of all variables would show secrets from a tenant's environment.
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for module in _COMMANDS:
        module.register(app)
    _join_lines(app)
    return app


def _join_lines(app: typer.Typer) -> None:
    """Let the terminal break the lines of all help texts, and not their source."""
    for command in app.registered_commands:
        command.help = _joined(command.help or command.callback.__doc__)
        command.epilog = _joined(command.epilog)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            _join_lines(group.typer_instance)


def _joined(text: str | None) -> str | None:
    if text is None:
        return None
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _version(asked: bool) -> None:
    if asked:
        from ..release import installed_version  # noqa: PLC0415 - 20 ms

        typer.echo(f"pactown-runner {installed_version() or '(not installed, run from its sources)'}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    pass
