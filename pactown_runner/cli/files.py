"""`pactown-runner put` and `pactown-runner get`: files into and out of a sandbox's directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .asking import Ask
from .messages import errors_told, say, write_json
from .options import Config, Json, ServerInstead, Service, User, UsersBase, load_settings
from .visible import one_line

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..client import Client, Transferred
    from ..config import Settings
    from ..homes import OnProgress, SandboxFiles, Transfer

__all__ = ["register"]

_SHOWN_SKIPPED = 10


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
            metavar="TARGET",
            help="Where to, relative to the service's directory. By default a file keeps its name, and a folder's "
            "content goes into the directory itself.",
            show_default=False,
        ),
    ] = None,
    *,
    as_json: Json = False,
    server: ServerInstead = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Put a file or folder into a service's directory, as the tenant. An account is made at first use.

    A file appears whole or not at all; a folder is merged into what is there. Links stay links. With --server
    it is one file, of as many bytes as the server takes (api_file_bytes).
    """
    if server is not None:

        async def send(client: Client) -> Transferred:
            from ..errors import FilesError  # noqa: PLC0415

            if source.is_dir():
                raise FilesError(f"cannot put {source}: a server takes one file at a time", remedy="put each file")
            return await client.put_file(user, service, target or source.name, source.read_bytes())

        Ask(server, users_base, config, as_json).then(
            send, lambda done: _report(done.files, done.bytes, "put", as_json)
        )
        return

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
            metavar="DESTINATION", help="What it is to be called here; by default as it is there.", show_default=False
        ),
    ] = None,
    *,
    as_json: Json = False,
    server: ServerInstead = None,
    users_base: UsersBase = None,
    config: Config = None,
) -> None:
    """Get a file or folder out of a service's directory, wholly or not at all.

    Links, FIFOs and devices are left out, and named. A file that is here is replaced, a folder is not.
    With --server it is one file.
    """
    if server is not None:

        async def fetch(client: Client) -> int:
            from ..whole_file import WholeFile  # noqa: PLC0415

            content = await client.get_file(user, service, path)
            with WholeFile(destination or Path(Path(path).name)) as file:
                file.write(content)
                file.finish()
            return len(content)

        Ask(server, users_base, config, as_json).then(fetch, lambda size: _report(1, size, "got", as_json))
        return

    def move(files: SandboxFiles, on_progress: OnProgress | None) -> Awaitable[Transfer]:
        return files.get(user, service, path, destination, on_progress=on_progress)

    _do(move, "get", users_base, config, as_json=as_json)


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

        from .interrupting import interruptible  # noqa: PLC0415

        settings = load_settings(users_base, config)
        # If it is interrupted, nothing is left of what was under way.
        transfer = asyncio.run(interruptible(_move(settings, verb, move)))
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
            _tell(transfer, "got" if verb == "get" else verb)


async def _move(
    settings: Settings, verb: str, move: Callable[[SandboxFiles, OnProgress | None], Awaitable[Transfer]]
) -> Transfer:
    from ..supervisor import Supervisor  # noqa: PLC0415
    from .progress import bar  # noqa: PLC0415

    async with Supervisor(settings=settings, role="one-shot") as supervisor:
        with bar(verb) as on_progress:
            return await move(supervisor.files, on_progress)


def _report(files: int, size: int, verb: str, as_json: bool) -> None:
    """Say what a server has taken or given: one file, of which nothing is left out."""
    if as_json:
        write_json({"files": files, "bytes": size, "skipped": [], "warnings": ""})
    else:
        say(f"{verb} {files} file{'s' * (files != 1)}, {size} bytes")


def _tell(transfer: Transfer, verb: str) -> None:
    for name in transfer.skipped[:_SHOWN_SKIPPED]:
        say(f"left out, neither file nor folder: {one_line(name)}")
    if more := transfer.skipped[_SHOWN_SKIPPED:]:
        say(f"left out: {len(more)} more")
    if transfer.warnings:
        say(f"the tenant's tar says: {transfer.warnings}")
    say(f"{verb} {transfer.files} file{'s' * (transfer.files != 1)}, {transfer.bytes} bytes")
