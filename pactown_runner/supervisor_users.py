"""The users of a supervisor, asynchronously: who they are, what they use, their data in and out, and their end."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from anyio import to_thread

from cgroups import CgroupError

from .archives import Exported, Imported, While, export_home, export_stream, import_home, import_stream
from .deletion import delete_user
from .errors import NotFoundError, RunnerError, StateError
from .homes import OnProgress
from .host import LoopHost
from .models import IsolatedUser
from .registry import Standing
from .tenant_threads import TenantThreads
from .usage import Usage, UsageMeter
from .users import Users
from .waiting import finish

__all__ = ["Placed", "SupervisorUsers", "UserStats"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class UserStats:
    """What a user has.

    Attributes:
        user: who.
        usage: what it takes of the disk, and who says so.
    """

    user: IsolatedUser
    usage: Usage

    @property
    def bytes(self) -> int:
        """What the user takes on the disk."""
        return self.usage.bytes

    @property
    def entries(self) -> int:
        """Files, folders, links and all else that the user has."""
        return self.usage.entries

    @property
    def enforced(self) -> bool:
        """Whether the kernel counts them, and holds the user to limits on them."""
        return self.usage.enforced

    def to_dict(self, *, detail: bool = False) -> dict[str, Any]:
        """As `UserIsolationManager.get_user_stats` gives it, the size in MiB; with `detail` also all of the usage."""
        shown = {
            "user": {"saas_user_id": self.user.saas_user_id, "linux_username": self.user.linux_username},
            "sandbox_count": self.usage.sandboxes,
            "total_size_mb": round(self.usage.bytes / _MIB, 2),
        }
        return {**shown, "usage": asdict(self.usage)} if detail else shown


@dataclass(frozen=True, slots=True)
class Placed:
    """What a supervisor has where there is a place for cgroups.

    Attributes:
        host: what is shared.
        threads: for what takes long.
        stop_all: stops all sandboxes of a user that run here.
        hold_all: freezes them, or thaws them.
    """

    host: LoopHost
    threads: TenantThreads
    stop_all: Callable[[str], Awaitable[None]]
    hold_all: Callable[[IsolatedUser, bool], Awaitable[None]]


class SupervisorUsers:
    """The SaaS users of a supervisor; see `users.Users`. Use it from the supervisor's event loop.

    Args:
        users: the users of the state.
        refusal: what to say to those who want something done in a cgroup, while there is no place for one.
    """

    def __init__(self, users: Users, refusal: RunnerError) -> None:
        self._users = users
        self._refusal = refusal
        self._here: Placed | None = None
        self._meter = UsageMeter(None)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def place(self, here: Placed | None) -> None:
        """There is a place for cgroups from now on, or no more."""
        self._here = here
        self._meter = UsageMeter(None if here is None else here.host)

    async def get_or_create(self, user_id: str) -> IsolatedUser:
        """The user of this id; an account is made if there is none."""
        user = await to_thread.run_sync(self._users.get, user_id)
        if user is None:
            user = await to_thread.run_sync(self._users.get_or_create, user_id)
            if self._here is not None:
                self._here.host.events.tell("created", user_id)
        return user

    async def get(self, user_id: str) -> IsolatedUser | None:
        """The user of this id, or None."""
        return await to_thread.run_sync(self._users.get, user_id)

    async def list(self) -> builtins.list[IsolatedUser]:
        """All users, oldest first."""
        return await to_thread.run_sync(self._users.list)

    async def stats(self, user_id: str) -> UserStats:
        """What a user takes of the disk; where nobody but the user can count it, as it was some seconds ago perhaps.

        Raises:
            NotFoundError: there is no such user.
            FilesError: it could not be counted in time.
            StateError: the supervisor is not running.
        """
        here, meter = self._here, self._meter
        if here is None and self._users.root_mode:
            raise self._refusal
        user = await self._known(user_id)
        if here is None:  # all homes are our own
            return UserStats(user, await to_thread.run_sync(meter.usage, user))
        return UserStats(user, await here.threads.run(user_id, lambda stop: meter.usage(user, stop=stop)))

    async def export(
        self, user_id: str, target: Path, *, while_: While = "frozen", on_progress: OnProgress | None = None
    ) -> Exported:
        """Write a user's home into an archive (`tar.gz`), that appears whole or not at all; see `export_home`.

        Args:
            target: in a folder that nobody but us can change.
            while_: `frozen` freezes what runs of the user; with `stopped` it is an error that something does.
            on_progress: is told the archive's bytes so far, from a thread.

        Raises:
            NotFoundError: there is no such user.
            ArchiveError: the home is too large, cannot be read, or the target cannot be written.
            StateError: something did not stand still, or another export or import is on.
        """
        here, user = self._placed(), await self._known(user_id)
        return await here.threads.run(
            user_id,
            lambda stop: export_home(here.host, user, target, while_=while_, progress=on_progress, stop=stop),
            lasting=True,
        )

    async def import_(
        self, user_id: str, archive: Path, *, made_for: str | None = None, on_progress: OnProgress | None = None
    ) -> Imported:
        """Replace a user's home by what an archive holds, wholly or not at all; the user is made if there is none.

        Args:
            made_for: the id of the user whose home the archive was made of, if that is another one.
            on_progress: is told the archive's bytes so far, and its size, from a thread.

        Raises:
            ArchiveError: the archive was refused, or cannot be read; the home is what it was.
            StateError: something of the user's runs, or another export or import is on.
        """
        here, user = self._placed(), await self.get_or_create(user_id)
        return await here.threads.run(
            user_id,
            lambda stop: import_home(here.host, user, archive, made_for=made_for, progress=on_progress, stop=stop),
            lasting=True,
        )

    async def export_stream(self, user_id: str, output: int) -> Exported:
        """As `export`, into a descriptor: a pipe or a socket. What was written is an archive only if this returns.

        Raises:
            OSError: it cannot be written to.
        """
        here, user = self._placed(), await self._known(user_id)
        return await here.threads.run(
            user_id, lambda stop: export_stream(here.host, user, output, stop=stop), lasting=True
        )

    async def import_stream(self, user_id: str, source: int, *, made_for: str | None = None) -> Imported:
        """As `import_`, from a descriptor that is read to its end.

        Raises:
            OSError: it cannot be read.
        """
        here, user = self._placed(), await self.get_or_create(user_id)
        return await here.threads.run(
            user_id,
            lambda stop: import_stream(here.host, user, source, made_for=made_for, stop=stop),
            lasting=True,
        )

    async def standing(self, user_id: str) -> Standing:
        """What the operator lets a user have.

        Raises:
            NotFoundError: there is no such user.
        """
        here, user = self._placed(), await self._known(user_id)
        return await to_thread.run_sync(here.host.standings.of, user.key)

    async def set_standing(self, user_id: str, standing: Standing) -> None:
        """Let a user have this. One who is blocked stands still, with all that runs of it, and starts nothing.

        One who is blocked no more is thawed, whoever froze it; if its home is exported meanwhile, when that is done.
        Once it has begun, a cancellation is raised when it is done.

        Raises:
            NotFoundError: there is no such user.
            SpecError: there is no such tier.
            LimitsError: the tier's limits cannot be enforced here; the standing is what it was.
            StateError: something did not stand still, or go on. The call may be repeated.
        """
        # One after another: who freezes waits for what who thaws takes back.
        turn = self._turns.setdefault(user_id, asyncio.Lock())
        async with turn:
            here, user = self._placed(), await self._known(user_id)
            # Not by halves: the next in turn would meet what is still being frozen, or what nobody ever will.
            await finish(asyncio.ensure_future(_set_standing(here, user, standing)))

    async def delete(self, user_id: str, *, delete_home: bool = True, delete_logs: bool = True) -> IsolatedUser:
        """Stop all of a user's sandboxes, and delete the user with all that carries its uid on this host.

        The key and the uid stay taken, and are this id's again if it comes back. If it is cancelled, or the supervisor
        ends, it is given up half-way: a second call finishes it, or the next supervisor.

        Args:
            delete_home: else the home becomes root's, with all that is in it, until the user is made again.
            delete_logs: else they stay where they are.

        Raises:
            NotFoundError: there is no such user.
            AccountError: the account is not what it was, and nothing was changed.
            StateError: something of the user's runs under another supervisor, or could not be ended yet; its home is
                just being exported or imported; or it was given up.
            FilesError: the home could not be emptied, or the supervisor ended before its turn.
        """
        here = self._placed()
        await here.stop_all(user_id)
        user = await here.threads.run(
            user_id,
            lambda stop: delete_user(
                here.host, user_id, delete_home=delete_home, delete_logs=delete_logs, give_up=stop.asked
            ),
        )
        here.host.events.tell("deleted", user_id)
        return user

    def _placed(self) -> Placed:
        if self._here is None:
            raise self._refusal
        return self._here

    async def _known(self, user_id: str) -> IsolatedUser:
        user = await self.get(user_id)
        if user is None:
            raise NotFoundError(f"there is no user {user_id!r}")
        return user


async def _set_standing(here: Placed, user: IsolatedUser, standing: Standing) -> None:
    host = here.host
    before = await to_thread.run_sync(host.standings.of, user.key)
    try:
        await to_thread.run_sync(host.standings.change, host.tree, user, standing)
    except CgroupError as error:
        raise StateError(error.message, remedy=error.remedy) from error
    if standing.blocked or before.blocked:
        await here.hold_all(user, standing.blocked)
