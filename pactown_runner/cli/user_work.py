"""What `users` does with tenants' data: in this process, beside whatever supervisors use the same state.

It is blocking work with a host of its own, in a thread, so that a signal can end it. What a dead process left of the
user, such as the hold of an export that was killed, is taken over first, by a supervisor that lives for just that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ..archives import ArchiveError, Exported, Imported, While, export_home, export_stream, import_home, import_stream
from ..config import Settings
from ..deletion import delete_user
from ..errors import TreeError
from ..host import Host
from ..jobs import Stop
from ..models import IsolatedUser
from ..owners import Owner
from ..registry import Registry
from ..standings import Standings
from ..supervisor import Supervisor
from ..supervisor_users import UserStats
from ..tenant_threads import TenantThreads
from ..trees import open_tree
from ..usage import UsageMeter, home_usage
from ..users import Users
from .interrupting import interruptible
from .messages import say
from .progress import bar

__all__ = ["delete", "export", "import_", "make", "stats"]

T = TypeVar("T")


def make(settings: Settings, user_id: str) -> tuple[IsolatedUser, bool]:
    """The user of this id, and whether it is made only now."""
    with Registry(settings.state_dir / "registry.db") as registry:
        users = Users(settings, registry)
        there = users.get(user_id) is not None
        return users.get_or_create(user_id), not there


def stats(settings: Settings, user: IsolatedUser) -> UserStats:
    """What a user takes of the disk.

    Raises: as `UsageMeter.usage`.
    """

    async def work() -> UserStats:
        try:
            usage = await _work(settings, user.saas_user_id, lambda host, stop: home_usage(host, user, stop=stop))
        except TreeError:
            if settings.root_mode:
                raise
            # All homes are our own then, and need no cgroup to be counted in.
            usage = await _in_thread(user.saas_user_id, lambda stop: UsageMeter(None).usage(user, stop=stop))
        return UserStats(user, usage)

    return asyncio.run(interruptible(work()))


def export(settings: Settings, user: IsolatedUser, target: Path | None, while_: While) -> Exported:
    """Write a user's home into an archive.

    Args:
        target: where to; standard output if None.

    Raises: as `export_home`; `BrokenPipeError` if nobody reads standard output any more.
    """

    if target is not None and target.is_dir():  # to say so after an hour would be late
        raise ArchiveError(f"cannot write {target}: it is a folder", remedy="name a file in it, such as home.tar.gz")

    async def work() -> Exported:
        with bar("export") as progress:

            def pack(host: Host, stop: Stop) -> Exported:
                if target is not None:
                    return export_home(host, user, target, while_=while_, progress=progress, stop=stop)
                with _told("write to standard output"):
                    return export_stream(host, user, 1, while_=while_, progress=progress, stop=stop)

            return await _work(settings, user.saas_user_id, pack)

    return asyncio.run(interruptible(work()))


def import_(settings: Settings, user_id: str, archive: Path | None, made_for: str | None) -> tuple[Imported, bool]:
    """Replace a user's home by what an archive holds; also returns whether the user is made only now.

    Args:
        archive: standard input if None.

    Raises: as `import_home`.
    """
    if archive is not None:
        _check_file(archive)

    async def work() -> tuple[Imported, bool]:
        with bar("import") as progress:

            def unpack(host: Host, stop: Stop) -> tuple[Imported, bool]:
                there = host.users.get(user_id) is not None
                user = host.users.get_or_create(user_id)
                with _making(user, there=there), _with_remedy(made_for):
                    if archive is not None:
                        return import_home(
                            host, user, archive, made_for=made_for, progress=progress, stop=stop
                        ), not there
                    with _told("read standard input"):
                        return import_stream(
                            host, user, 0, size=_size(0), made_for=made_for, progress=progress, stop=stop
                        ), not there

            return await _work(settings, user_id, unpack)

    return asyncio.run(interruptible(work()))


def delete(settings: Settings, user_id: str, *, delete_home: bool, delete_logs: bool) -> None:
    """Delete a user, see `delete_user`; also one whose removal was interrupted.

    Raises: as `delete_user`.
    """
    give_up = threading.Event()

    async def work() -> None:
        await _work(
            settings,
            user_id,
            lambda host, _: delete_user(
                host, user_id, delete_home=delete_home, delete_logs=delete_logs, give_up=give_up
            ),
        )

    asyncio.run(interruptible(work(), also=give_up.set))


# ---- How it is done


async def _work(settings: Settings, user_id: str, work: Callable[[Host, Stop], T]) -> T:
    """Do this in a thread. Cancelled, it has ended, and nothing of it is left, when the cancellation is seen."""
    with _opened(settings) as host:
        if _left_behind(host, user_id):
            async with Supervisor(settings=settings, role="one-shot"):
                pass
        return await _in_thread(user_id, lambda stop: work(host, stop))


async def _in_thread(user_id: str, work: Callable[[Stop], T]) -> T:
    threads = TenantThreads()
    try:
        return await threads.run(user_id, work)
    finally:
        threads.close()


@contextlib.contextmanager
def _opened(settings: Settings) -> Iterator[Host]:
    with contextlib.ExitStack() as held:
        registry = held.enter_context(Registry(settings.state_dir / "registry.db"))
        users, standings = Users(settings, registry), Standings(settings, registry)
        tree = open_tree(
            cgroup_slice=settings.cgroup_slice,
            state_id=registry.state_id,
            tenant_limits=standings.tenant_limits,
        )
        held.callback(tree.close)
        owner = held.enter_context(Owner(settings.state_dir))
        yield Host(settings=settings, registry=registry, users=users, standings=standings, tree=tree, owner=owner)


def _left_behind(host: Host, user_id: str) -> bool:
    """Whether a dead process claimed what would be in our way, and no server has seen to it yet."""
    row = host.registry.users.row(user_id)
    rows = host.registry.sandboxes.rows(key=row.key) if row else []
    return any(row.kind == "run" and not host.owner.alive(row.owner) for row in rows)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Say of which of our descriptors an error is; that nobody reads is not one."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ArchiveError(f"cannot {what}: {error.strerror or error}") from error


@contextlib.contextmanager
def _making(user: IsolatedUser, *, there: bool) -> Iterator[None]:
    """Say so if a user was made for nothing."""
    try:
        yield
    except BaseException:
        if not there:
            say(f"user {user.saas_user_id!r} was made, and its home is empty")
        raise


@contextlib.contextmanager
def _with_remedy(made_for: str | None) -> Iterator[None]:
    try:
        yield
    except ArchiveError as error:
        # It is the tenant's process that refuses, and knows of no options.
        if made_for is None and error.message.startswith("the archive was made of the home of "):
            raise ArchiveError(error.message, remedy="if that is meant, name whose it was: --made-for ID") from error
        raise


def _check_file(archive: Path) -> None:
    """Raise `ArchiveError` if there cannot be an archive: before a user is made for it."""
    try:
        mode = os.stat(archive).st_mode
    except OSError as error:
        raise ArchiveError(f"cannot read {archive}: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise ArchiveError(f"cannot read {archive}: it is a folder")


def _size(fd: int) -> int | None:
    """How much will come, where that can be known."""
    found = os.fstat(fd)
    return found.st_size - os.lseek(fd, 0, os.SEEK_CUR) if stat.S_ISREG(found.st_mode) else None
