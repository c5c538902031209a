"""Users of a server: who they are, what they have, and their homes out and in."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Generator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from io import FileIO
from pathlib import Path

from anyio import to_thread

from ..errors import FilesError
from ..models import IsolatedUser
from ..specs import check_user_id
from ..tiers import Tier
from ..whole_file import WholeFile
from .answers import ImportedHome, UserStats, UserTier, tier_of, user_of
from .calls import Calls
from .paths import user_path

__all__ = ["OnProgress", "UserCalls"]

OnProgress = Callable[[int, int | None], None]
"""Is told the bytes so far, and how many there will be if that is known."""

_PIECE = 1 << 18


class UserCalls(Calls):
    """Calls about users, see `Client`."""

    async def list_users(self) -> list[IsolatedUser]:
        """All users, in the order of their ids."""
        return [user async for user in self._pages(user_of, "/runner/isolation/users", "users")]

    async def get_user(self, user_id: str) -> IsolatedUser:
        """The user of this id.

        Raises:
            NotFoundError: there is none.
        """
        return await self._ask(user_of, "GET", user_path(user_id), params={"create": False})

    async def create_user(self, user_id: str) -> IsolatedUser:
        """The user of this id, made if there is none."""
        return await self._ask(user_of, "PUT", user_path(user_id), read=None)

    async def delete_user(self, user_id: str, *, delete_home: bool = True, delete_logs: bool = True) -> None:
        """End all that runs as the user, and delete the user with all that is its on the host.

        The id gets the same account if it comes back; nobody else ever does.

        Args:
            delete_home, delete_logs: else they are kept until the user comes back.

        Raises:
            NotFoundError: there is none.
            AccountError, StateError: it could not be done, or not yet.
        """
        params = {"delete_home": delete_home, "delete_logs": delete_logs}
        await self._connection.call("DELETE", user_path(user_id), params=params, read=None)

    async def user_stats(self, user_id: str) -> UserStats:
        """What a user has. The home may be counted for that, which may take seconds.

        Raises:
            NotFoundError: there is none.
            FilesError: it could not be counted in time.
        """
        return await self._ask(UserStats.of, "GET", user_path(user_id, "stats"), params={"detail": True}, read=None)

    async def tiers(self) -> list[Tier]:
        """All tiers, as the server's settings have them."""
        return await self._ask(lambda found: [tier_of(tier) for tier in found["tiers"]], "GET", "/runner/tiers")

    async def user_tier(self, user_id: str) -> UserTier:
        """What the operator lets a user have.

        Raises:
            NotFoundError: there is none.
        """
        return await self._ask(UserTier.of, "GET", user_path(user_id, "tier"))

    async def set_tier(self, user_id: str, tier: str | None, *, blocked: bool = False) -> UserTier:
        """Give a user a tier, or none; block it, or not. Both are as given afterwards, also what is not given.

        Raises:
            NotFoundError: there is no such user.
            SpecError: there is no such tier.
            LimitsError: its limits cannot be enforced.
            StateError: something did not stand still, or go on; the call may be repeated.
        """
        body = {"tier": tier, "blocked": blocked}
        return await self._ask(UserTier.of, "PUT", user_path(user_id, "tier"), body=body, read=None)

    # Homes ------------------------------------------------------------------------------------------------------

    async def export_user(self, user_id: str, target: str | Path, progress: OnProgress | None = None) -> int:
        """Write a user's home into an archive (`tar.gz`), that appears whole or not at all; returns its bytes.

        What runs of the user stands still meanwhile.

        Args:
            target: in a folder that nobody but the caller can change.
            progress: is told the archive's bytes so far.

        Raises:
            NotFoundError: there is no such user.
            ArchiveError: the home is too large, or cannot be read.
            FilesError: the target cannot be written.
            ConnectionLostError: the server could not finish it; its log tells why.
            StateError: something did not stand still, or another export or import is on.
        """
        return await _save(self.exported(user_id), Path(target), progress)

    @asynccontextmanager
    async def exported(self, user_id: str) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """A user's home as an archive (`tar.gz`), in pieces. It is one only if the iterator comes to its end:

            async with client.exported("u") as pieces:
                async for piece in pieces: ...

        Raises: as `export_user`, also from the iterator.
        """
        path = user_path(user_id, "export")
        async with (
            self._connection.stream("POST", path, accept="application/gzip", read=None) as answer,
            aclosing(self._connection.pieces(answer)) as pieces,
        ):
            yield pieces

    async def import_user(
        self,
        user_id: str,
        archive: str | Path | AsyncIterable[bytes],
        progress: OnProgress | None = None,
        *,
        made_for: str | None = None,
    ) -> ImportedHome:
        """Replace a user's home by what an archive holds, wholly or not at all; the user is made if there is none.

        Args:
            archive: a file, or what is in one, in pieces.
            progress: is told the bytes that were sent so far, and with a file its size.
            made_for: the id of the user whose home the archive was made of, if that is another one.

        Raises:
            ArchiveError: the archive was refused; the home is what it was.
            FilesError: the archive cannot be read.
            StateError: something of the user's runs, or another export or import is on.
        """
        if made_for is not None:
            check_user_id(made_for)
        with _opened(archive) as (pieces, size):
            return await self._ask(
                ImportedHome.of,
                "POST",
                user_path(user_id, "import"),
                params={"made_for": made_for},
                content=_counted(pieces, size, progress),
                size=size,
                read=None,
            )


async def _save(
    archive: AbstractAsyncContextManager[AsyncIterator[bytes]], target: Path, progress: OnProgress | None
) -> int:
    written = 0
    try:
        with WholeFile(target) as file:
            async with archive as pieces:
                async for piece in pieces:
                    await to_thread.run_sync(file.write, piece)
                    written += len(piece)
                    if progress is not None:
                        progress(written, None)
            await to_thread.run_sync(file.finish)
    except OSError as error:
        raise FilesError(f"cannot write {target}: {error.strerror or error}") from error
    return written


@contextmanager
def _opened(
    archive: str | Path | AsyncIterable[bytes],
) -> Generator[tuple[AsyncIterable[bytes], int | None], None, None]:
    """An archive in pieces, and its size if that is known."""
    if not isinstance(archive, str | Path):
        yield archive, None
        return
    try:
        file = FileIO(archive)
    except OSError as error:
        raise _unreadable(archive, error) from error
    with file:
        found = os.fstat(file.fileno())
        yield _pieces(file, archive), found.st_size if stat.S_ISREG(found.st_mode) else None


async def _pieces(file: FileIO, archive: str | Path) -> AsyncGenerator[bytes, None]:
    try:
        while piece := await to_thread.run_sync(file.read, _PIECE):
            yield piece
    except OSError as error:
        raise _unreadable(archive, error) from error


async def _counted(
    pieces: AsyncIterable[bytes], size: int | None, progress: OnProgress | None
) -> AsyncGenerator[bytes, None]:
    sent = 0
    async for piece in pieces:
        yield piece
        sent += len(piece)
        if progress is not None:
            progress(sent, size)


def _unreadable(archive: str | Path, error: OSError) -> FilesError:
    return FilesError(f"cannot read {archive}: {error.strerror or error}")
