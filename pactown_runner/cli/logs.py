"""`pactown-runner logs`: what a service has printed, over all its runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from .asking import with_remedies
from .messages import FAILED, LOOK_FOR_USERS, errors_told, look_for_services
from .options import Config, Raw, ServerInstead, Service, User, UsersBase, load_settings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from ..client import Client
    from ..config import Settings
    from ..models import LogRecord
    from .log_view import JsonView, View

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="[bold]Examples[/bold]: pactown-runner logs alice my-api -n 100 -f; "
        "pactown-runner logs alice my-api --since 10m"
    )(logs)


def logs(
    user: User,
    service: Service,
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
    server: ServerInstead = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Show what a service has printed, over all its runs, whether it runs or not.

    What it wrote to standard error comes out on standard error. Control characters are shown as \\x1b and the like.
    It is read from this host's files, so that no server need run; with --server from that one, and then -f ends with
    the service.
    """
    wanted = _Wanted(_since(since), lines, follow)
    with errors_told(FAILED, as_json=as_json):
        from .log_view import JsonView, View  # noqa: PLC0415

        view = JsonView() if as_json else View(raw=raw)
        if server is not None:
            from .connecting import asked  # noqa: PLC0415 - httpx takes 70 ms

            with with_remedies():
                asked(server, users_base, config, lambda client: _relay_served(client, user, service, wanted, view))
            return
        import asyncio  # noqa: PLC0415

        path = _log_of(load_settings(users_base, config), user, service, may_come=follow)
        asyncio.run(_relay_file(path, wanted, view))


# ---- Where to begin


class _Since(NamedTuple):
    seq: int = 0
    time: float | None = None


class _Wanted(NamedTuple):
    """What of the log."""

    begin: _Since
    tail: int | None
    follow: bool

    @property
    def first(self) -> int | None:
        """The number of the first record that there should be; None where what was before is not missed."""
        return self.begin.seq + 1 if self.begin.time is None and self.tail is None else None


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
            row = registry.users.row(user_id)
            runs = row is not None and registry.sandboxes.row(row.key, service_id) is not None
    if row is None:
        raise NotFoundError(f"there is no user {user_id!r} in {settings.state_dir}", remedy=LOOK_FOR_USERS)
    path = LogPaths(settings.log_dir, settings.run_dir, row.key).log(service_id)
    if not Path(path).exists() and not (may_come and runs):
        raise _nothing_printed(user_id, service_id, remedy=look_for_services(user_id))
    return path


def _nothing_printed(user_id: str, service_id: str, remedy: str | None = None) -> Exception:
    from ..errors import NotFoundError  # noqa: PLC0415

    return NotFoundError(
        f"service {service_id!r} of user {user_id!r} has printed nothing yet, or never ran", remedy=remedy
    )


async def _relay_file(path: str, wanted: _Wanted, view: View | JsonView) -> None:
    from ..logs import read_log  # noqa: PLC0415
    from .log_view import with_gaps  # noqa: PLC0415
    from .output import relay  # noqa: PLC0415

    begin, tail, follow = wanted
    records = read_log(path, follow=follow, since_seq=begin.seq, since_time=begin.time, tail=tail)
    await relay(with_gaps(records, wanted.first), view)


async def _relay_served(client: Client, user: str, service: str, wanted: _Wanted, view: View | JsonView) -> None:
    from .log_view import with_gaps  # noqa: PLC0415
    from .output import relay  # noqa: PLC0415

    begin, tail, follow = wanted
    since = begin.seq or None
    async with client.logs(user, service, follow=follow, since=since, tail=tail, reconnect=follow) as records:
        await relay(with_gaps(_from_time(records, begin.time), wanted.first), view)
    if records.cursor is None and tail != 0:
        raise _nothing_printed(user, service)


async def _from_time(records: AsyncIterator[LogRecord], time: float | None) -> AsyncGenerator[LogRecord, None]:
    """The records from the first one on that is not older: a server knows of numbers only."""
    begun = time is None
    async for record in records:
        begun = begun or time is None or record.ts >= time
        if begun:
            yield record
