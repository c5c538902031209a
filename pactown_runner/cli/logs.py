"""`pactown-runner logs`: what a service has printed, over all its runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from .messages import LOOK_FOR_USERS, errors_told, look_for_services
from .options import Config, Raw, UsersBase, load_settings

if TYPE_CHECKING:
    from ..config import Settings

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="[bold]Examples[/bold]: pactown-runner logs alice my-api -n 100 -f; "
        "pactown-runner logs alice my-api --since 10m"
    )(logs)


def logs(
    user: Annotated[str, typer.Argument(metavar="USER", help="The tenant's id.", show_default=False)],
    service: Annotated[str, typer.Argument(metavar="SERVICE", show_default=False)],
    *,
    lines: Annotated[
        int | None,
        typer.Option("-n", "--tail", "--lines", metavar="N", min=0, help="The last N lines only.", show_default=False),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN",
            help="Not what is older: a time (2026-11-24T08:00, this machine's unless it says otherwise), how long ago "
            "(90s, 10m, 1h30m, 2d), or the number of the last line that you have seen (--json tells it).",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on as more is printed, until interrupted.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object a line to standard output, with number and time.")
    ] = False,
    raw: Raw = False,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Show what a service has printed, over all its runs, whether it runs or not.

    What it wrote to standard error comes out on standard error. Control characters are shown as \\x1b and the like.
    """
    begin = _since(since)
    with errors_told(1, as_json=as_json):
        import asyncio  # noqa: PLC0415

        path = _log_of(load_settings(users_base, config), user, service, may_come=follow)
        asyncio.run(_show(path, begin, lines=lines, follow=follow, as_json=as_json, raw=raw))


# ---- Where to begin


class _Since(NamedTuple):
    seq: int = 0
    time: float | None = None


_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def _since(text: str | None) -> _Since:
    import time  # noqa: PLC0415
    from datetime import datetime  # noqa: PLC0415

    if text is None:
        return _Since()
    if text.isascii() and text.isdecimal():
        return _Since(seq=int(text))
    if (parts := _AGO.findall(text)) and _AGO.sub("", text) == "":
        return _Since(time=time.time() - sum(float(number) * _SECONDS[unit] for number, unit in parts))
    try:
        return _Since(time=datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"{text!r} is no time (2026-11-24T08:00), no time ago (10m) and no number of a line", param_hint="--since"
        ) from None


def _log_of(settings: Settings, user_id: str, service_id: str, *, may_come: bool) -> str:
    from pathlib import Path  # noqa: PLC0415

    from ..errors import NotFoundError  # noqa: PLC0415
    from ..logs import LogPaths  # noqa: PLC0415
    from ..registry import Registry  # noqa: PLC0415
    from ..specs import check_service_id, check_user_id  # noqa: PLC0415

    check_user_id(user_id)
    check_service_id(service_id)
    registry_path = settings.state_dir / "registry.db"
    row, runs = None, False
    if registry_path.exists():  # looking must not make one
        with Registry(registry_path) as registry:
            row = registry.user(user_id)
            runs = row is not None and registry.row(row.key, service_id) is not None
    if row is None:
        raise NotFoundError(f"there is no user {user_id!r} in {settings.state_dir}", remedy=LOOK_FOR_USERS)
    path = LogPaths(settings.log_dir, settings.run_dir, row.key).log(service_id)
    if not Path(path).exists() and not (may_come and runs):
        raise NotFoundError(
            f"service {service_id!r} of user {user_id!r} has printed nothing yet, or never ran",
            remedy=look_for_services(user_id),
        )
    return path


async def _show(path: str, begin: _Since, *, lines: int | None, follow: bool, as_json: bool, raw: bool) -> None:
    from ..logs import read_log  # noqa: PLC0415
    from .log_view import JsonView, View, with_gaps  # noqa: PLC0415
    from .output import relay  # noqa: PLC0415

    records = read_log(path, follow=follow, since_seq=begin.seq, since_time=begin.time, tail=lines)
    # From a time on, or the last lines only: then what was before is not missed.
    first = begin.seq + 1 if begin.time is None and lines is None else None
    await relay(with_gaps(records, first), JsonView() if as_json else View(raw=raw))
