"""What `users` does at a running server: who there is, what they have, their homes out and in, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FilesError, NotFoundError
from .asking import Ask
from .human import size_of, time_of
from .messages import say, write_json
from .output import Output
from .progress import bar
from .tables import show_pairs, show_table

if TYPE_CHECKING:
    from ..client import Client, ImportedHome, SandboxView, UserStats, UserTier
    from ..models import IsolatedUser

__all__ = ["create", "delete", "export", "import_", "list_", "show", "stats"]

_READ_BYTES = 1 << 18


def list_(ask: Ask) -> None:
    """List all users."""

    def tell(users: list[IsolatedUser]) -> None:
        if ask.as_json:
            write_json({"users": [user.to_dict() for user in users], "count": len(users)})
            return
        rows = [
            (user.saas_user_id, user.linux_username, str(user.linux_uid), time_of(user.created_at)) for user in users
        ]
        show_table(("user", "login", "uid", "created"), rows, {})

    ask.then(lambda client: client.list_users(), tell)


def create(ask: Ask, user_id: str) -> None:
    """Make a user, if there is none."""

    async def work(client: Client) -> tuple[IsolatedUser, bool]:
        try:
            return await client.get_user(user_id), False
        except NotFoundError:
            return await client.create_user(user_id), True

    def tell(made: tuple[IsolatedUser, bool]) -> None:
        user, is_new = made
        if ask.as_json:
            write_json({**user.to_dict(), "created": is_new})
            return
        show_pairs(_pairs(user))
        say("made" if is_new else "it was there already")

    ask.then(work, tell)


def show(ask: Ask, user_id: str) -> None:
    """Show a user, and what is alive of it."""

    async def work(client: Client) -> tuple[IsolatedUser, UserTier, list[SandboxView]]:
        user = await client.get_user(user_id)
        return user, await client.user_tier(user_id), await client.list_sandboxes(user_id)

    def tell(found: tuple[IsolatedUser, UserTier, list[SandboxView]]) -> None:
        user, standing, sandboxes = found
        if ask.as_json:
            alive = [{"service_id": sandbox.service_id, "kind": sandbox.kind} for sandbox in sandboxes]
            write_json({**user.to_dict(), "tier": standing.tier, "blocked": standing.blocked, "sandboxes": alive})
            return
        tier = ("tier", (standing.tier or "-") + ", blocked" * standing.blocked)
        alive_pairs = [
            (sandbox.kind, f"{sandbox.service_id}, since {time_of(sandbox.started_at)}") for sandbox in sandboxes
        ]
        show_pairs([*_pairs(user), tier, *alive_pairs])

    ask.then(work, tell)


def stats(ask: Ask, user_id: str) -> None:
    """Count what a user takes of the disk."""

    def tell(found: UserStats) -> None:
        if ask.as_json:
            write_json(found.raw)
            return
        show_pairs(
            [
                ("user", found.saas_user_id),
                ("login", found.linux_username),
                ("size", f"{size_of(found.size_bytes)} ({found.size_bytes} bytes)"),
                ("entries", f"{found.entries} files, folders and links"),
                ("sandboxes", f"{found.sandbox_count} directories of services"),
            ]
        )

    ask.then(lambda client: client.user_stats(user_id), tell)


def export(ask: Ask, user_id: str, target: Path | None) -> None:
    """Write a user's home into an archive; to standard output if there is no `target`."""

    async def work(client: Client) -> int:
        with bar("export") as progress:
            if target is not None:
                return await client.export_user(user_id, target, progress)
            size, output = 0, Output({"stdout": 1}, raw=True)
            async with client.exported(user_id) as pieces:
                async for piece in pieces:
                    await output.write([(1, piece)])
                    size += len(piece)
            return size

    def tell(size: int) -> None:
        if ask.as_json and target is not None:
            write_json({"path": str(target.absolute()), "archive_bytes": size})
            return
        say(f"exported {user_id!r}: {size_of(size)} packed" + ("" if target is None else f", in {target}"))

    ask.then(work, tell)


def import_(ask: Ask, user_id: str, archive: Path | None, made_for: str | None) -> None:
    """Replace a user's home by what an archive holds; that is read from standard input if there is none named."""

    async def work(client: Client) -> ImportedHome:
        with bar("import") as progress:
            return await client.import_user(user_id, archive or _input(), progress, made_for=made_for)

    def tell(done: ImportedHome) -> None:
        if ask.as_json:
            write_json({"user_id": user_id, "entries": done.entries, "files": done.files, "bytes": done.bytes})
            return
        say(f"imported {user_id!r}: {done.entries} entries, {done.files} of them files, {size_of(done.bytes)}")

    ask.then(work, tell)


def delete(ask: Ask, user_id: str, *, delete_home: bool, delete_logs: bool) -> None:
    """Delete a user, and end what runs of it."""

    def tell(_: None) -> None:
        if ask.as_json:
            kept = {"home_kept": not delete_home, "logs_kept": not delete_logs}
            write_json({"success": True, "user_id": user_id, **kept})
            return
        say(f"deleted {user_id!r}")

    ask.then(lambda client: client.delete_user(user_id, delete_home=delete_home, delete_logs=delete_logs), tell)


def _pairs(user: IsolatedUser) -> list[tuple[str, str]]:
    return [
        ("user", user.saas_user_id),
        ("login", user.linux_username),
        ("uid, gid", f"{user.linux_uid}, {user.linux_gid}"),
        ("home", str(user.home_dir)),
        ("created", time_of(user.created_at)),
    ]


async def _input() -> AsyncIterator[bytes]:
    """Standard input, in pieces. Each is read in a thread that keeps nobody from ending."""
    loop = asyncio.get_running_loop()
    while True:
        reading: asyncio.Future[bytes] = loop.create_future()
        threading.Thread(target=_read, args=(loop, reading), name="pactown-input", daemon=True).start()
        if not (piece := await reading):
            return
        yield piece


def _read(loop: asyncio.AbstractEventLoop, reading: asyncio.Future[bytes]) -> None:
    piece, error = b"", None
    try:
        piece = os.read(0, _READ_BYTES)
    except OSError as failed:
        error = FilesError(f"cannot read standard input: {failed.strerror or failed}")

    def done() -> None:
        if not reading.done():
            reading.set_result(piece) if error is None else reading.set_exception(error)

    with contextlib.suppress(RuntimeError):  # nobody waits any more
        loop.call_soon_threadsafe(done)
