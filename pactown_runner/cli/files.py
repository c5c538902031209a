"""`pactown-runner put` and `pactown-runner get`: files into and out of a sandbox's directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .messages import Ended, errors_told, say, write_json
from .options import Config, Json, UsersBase, load_settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..config import Settings
    from ..homes import OnProgress, SandboxFiles, Transfer

__all__ = ["register"]

_LARGE_BYTES = 16 << 20
"""Less than that is over before anybody could read a bar."""

_STEP_BYTES = 1 << 20
_SHOWN_SKIPPED = 10

User = Annotated[str, typer.Argument(metavar="USER", help="The tenant's id.", show_default=False)]
Service = Annotated[str, typer.Argument(metavar="SERVICE", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="[bold]Example[/bold]: pactown-runner put alice my-api ./src")(put)
    app.command(epilog="[bold]Example[/bold]: pactown-runner get alice my-api report.pdf")(get)


def put(
    user: User,
    service: Service,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A file or a folder.", show_default=False)],
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[TARGET]",
            help="Where to, relative to the service's directory. By default a file keeps its name, and a folder's "
            "content goes into the directory itself.",
            show_default=False,
        ),
    ] = None,
    *,
    as_json: Json = False,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Put a file or folder into a service's directory, as the tenant. An account is made at first use.

    A file appears whole or not at all; a folder is merged into what is there. Links stay links.
    """

    def move(files: SandboxFiles, on_progress: OnProgress | None) -> Awaitable[Transfer]:
        return files.put(user, service, source, target, on_progress=on_progress)

    _do(move, "put", users_base, config, as_json=as_json)


def get(
    user: User,
    service: Service,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="A file or folder in the service's directory; `.` is all of it.", show_default=False
        ),
    ],
    destination: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DESTINATION]", help="What it is to be called here; by default as it is there.", show_default=False
        ),
    ] = None,
    *,
    as_json: Json = False,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Get a file or folder out of a service's directory, wholly or not at all.

    Links, FIFOs and devices are left out, and named. A file that is here is replaced, a folder is not.
    """

    def move(files: SandboxFiles, on_progress: OnProgress | None) -> Awaitable[Transfer]:
        return files.get(user, service, path, destination, on_progress=on_progress)

    _do(move, "got", users_base, config, as_json=as_json)


def _do(
    move: Callable[[SandboxFiles, OnProgress | None], Awaitable[Transfer]],
    verb: str,
    users_base: Path | None,
    config: Path | None,
    *,
    as_json: bool,
) -> None:
    with errors_told(1, as_json=as_json):
        import asyncio  # noqa: PLC0415

        settings = load_settings(users_base, config)
        transfer = asyncio.run(_move(settings, move))
        if as_json:
            write_json(
                {
                    "files": transfer.files,
                    "bytes": transfer.bytes,
                    "skipped": transfer.skipped,
                    "warnings": transfer.warnings,
                }
            )
        else:
            _tell(transfer, verb)


async def _move(settings: Settings, move: Callable[[SandboxFiles, OnProgress | None], Awaitable[Transfer]]) -> Transfer:
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    from ..supervisor import Supervisor  # noqa: PLC0415

    received: list[int] = []
    loop = asyncio.get_running_loop()
    this = asyncio.current_task()
    assert this is not None

    def interrupt(number: int) -> None:
        received.append(number)
        this.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, interrupt, number)
    try:
        async with Supervisor(settings=settings, role="one-shot") as supervisor:
            bar = _Bar() if sys.stderr.isatty() else None
            try:
                return await move(supervisor.files, bar.update if bar else None)
            finally:
                if bar:
                    bar.stop()
    except asyncio.CancelledError:
        # What was under way has ended, and nothing is left of it.
        raise Ended(128 + received[0]) if received else asyncio.CancelledError from None
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _tell(transfer: Transfer, verb: str) -> None:
    for name in transfer.skipped[:_SHOWN_SKIPPED]:
        # The tenant chose it: a line break in it must not begin a line that seems to be ours.
        say(f"left out, neither file nor folder: {name if name.isprintable() else repr(name)}")
    if more := transfer.skipped[_SHOWN_SKIPPED:]:
        say(f"left out: {len(more)} more")
    if transfer.warnings:
        say(f"the tenant's tar says: {transfer.warnings}")
    say(f"{verb} {transfer.files} file{'s' * (transfer.files != 1)}, {transfer.bytes} bytes")


class _Bar:
    """A bar on the terminal, from the first so many bytes on; updated from another thread."""

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import (  # noqa: PLC0415 - only for a terminal
            BarColumn,
            DownloadColumn,
            Progress,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)
        self._shown = 0

    def update(self, done: int, total: int | None) -> None:
        if (total is not None and total < _LARGE_BYTES) or done < min(self._shown + _STEP_BYTES, total or sys.maxsize):
            return
        if total is None and done < _LARGE_BYTES:
            return
        self._shown = done
        self._progress.start()
        self._progress.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        self._progress.stop()
