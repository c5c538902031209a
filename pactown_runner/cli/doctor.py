"""`pactown-runner doctor`: whether this host can do it, and the command that mends it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from .messages import Ended, errors_told, write_json
from .options import Config, Json, UsersBase, load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..doctor import Finding

__all__ = ["register"]

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(as_json: Json = False, users_base: UsersBase = None, config: Config = None) -> None:
    """Say whether this host can do what the runner needs, what it cannot, and the command that mends it.

    Exit code 0 if all that is essential works, else 1. As root it tries the launcher, in a cgroup that it removes
    again; nothing else is changed.
    """
    with errors_told(1, as_json=as_json):
        from ..doctor import examine  # noqa: PLC0415

        findings = examine(load_settings(users_base, config))
        works = all(finding.status != "fail" for finding in findings)
        if as_json:
            write_json({"ok": works, "findings": [finding.to_dict() for finding in findings]})
        elif sys.stdout.isatty():
            _show_table(findings)
        else:
            _show_text(findings)
        raise Ended(0 if works else 1)


def _summary(findings: Sequence[Finding]) -> str:
    count = {status: sum(finding.status == status for finding in findings) for status in _COLOURS}
    return ", ".join(f"{number} {status}" for status, number in count.items())


def _show_text(findings: Sequence[Finding]) -> None:
    for finding in findings:
        print(f"{finding.status:<4}  {finding.check}: {finding.message}")
        if finding.remedy:
            print(f"      try: {finding.remedy}")
    print(_summary(findings))


def _show_table(findings: Sequence[Finding]) -> None:
    from rich.console import Console  # noqa: PLC0415 - only for a terminal
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("", "check", "what was found"):
        table.add_column(heading, no_wrap=heading != "what was found")
    for finding in findings:
        what = Text(finding.message)
        if finding.remedy:
            what.append(f"\ntry: {finding.remedy}", style="cyan")
        table.add_row(Text(finding.status, style=_COLOURS[finding.status]), finding.check, what)
    console = Console()
    console.print(table)
    console.print(_summary(findings), highlight=False)
