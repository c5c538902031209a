"""Everything that carries a tenant's uid is ended and removed, and the home emptied.

Nothing here follows a path that the tenant, or anybody else but root, can change. Files in public places and in the
home are looked for and removed by a program with the tenant's uid and no rights: what it can be led to remove, the
tenant could. Root touches the home's top directory only, through `home_dirs`.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Protocol

from ..errors import StateError
from ..home_dirs import fresh_homes, open_up_home, remove_home
from ..models import IsolatedUser
from ..trees import END_TIMEOUT
from .kernel_objects import remove_ipc, remove_keys, remove_queues
from .processes import end_processes
from .spools import remove_mail, remove_schedules

__all__ = ["RunAs", "remove_homes", "sweep"]

_log = logging.getLogger(__name__)

PUBLIC_PLACES = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock", "/var/crash")  # noqa: S108 - to clean up in
"""Where everybody may leave files, on usual hosts."""

HOME_SECONDS = 3600.0
"""For a home to be emptied; a big one takes minutes."""

PUBLIC_SECONDS = 900.0
"""For public places to be looked through, which other tenants may have filled as well."""

END_PATIENCE = 2.0
"""Seconds for one of two ways to end processes, until it is the other's turn."""

_KILL_ALL = "kill -s KILL -- -1"
"""Whatever has the uid, but for the shell itself. No fork gets away: the kernel sees to that, kill(2)."""

_CLEAR_PUBLIC = """\
uid=$1 left=
shift
for place in "$@"; do
    [ -d "$place" ] || continue
    find "$place" -xdev -mindepth 1 -type d -user "$uid" ! -perm -700 -execdir chmod u+rwx {} ';'
    left=$left$(find "$place" -xdev -depth -mindepth 1 -user "$uid" ! -delete -printf x)
done
[ -z "$left" ]"""

_EMPTY_HOME = """\
find . -xdev -type d ! -perm -700 -execdir chmod u+rwx {} ';'
exec find . -xdev -mindepth 1 -delete"""


class RunAs(Protocol):
    """Runs a shell script as the tenant, in a scope of its slice."""

    def __call__(self, script: str, directory: str | Path, timeout: float, *words: str) -> bool:
        """Whether it ended with 0, and within `timeout` seconds; nothing of it runs any more.

        Args:
            directory: where, entered as the tenant.
            words: what the script finds in `$1` and so on.
        """


def sweep(user: IsolatedUser, run_as: RunAs) -> None:
    """Remove what carries the uid of an account of our own, but for its home. Its slice has been killed.

    Of files that the tenant itself may not remove, since they lie in somebody else's directory, the log tells.

    Raises:
        StateError: a process that was killed is not gone.
    """
    login, uid = user.linux_username, user.linux_uid
    found = remove_schedules(login, uid)
    _end_processes(uid, run_as)
    # First: it may be most of the memory that the helpers have to share.
    objects = remove_ipc(uid) + remove_queues(uid)
    if not run_as(_CLEAR_PUBLIC, "/", PUBLIC_SECONDS, str(uid), *PUBLIC_PLACES):
        where = " ".join(PUBLIC_PLACES)
        _log.warning("files of uid %d are left, which it may not remove: find %s -xdev -user %d", uid, where, uid)
    # Once more: one of the schedules may have been due while it was removed.
    _end_processes(uid, run_as)
    objects += remove_ipc(uid) + remove_queues(uid) + remove_keys(uid)
    found += remove_mail(login, uid)
    if objects or found:
        _log.info("removed %d kernel objects of uid %d, and %s", objects, uid, ", ".join(found) or "no files")


def remove_homes(user: IsolatedUser, run_as: RunAs, *, kept: bool = False) -> None:
    """Remove a tenant's home, and what imports that were cut short have left beside it.

    Args:
        kept: all but the home itself.

    Raises: as `home_dirs.open_up_home` and `home_dirs.remove_home`.
    """
    homes = [] if kept else [user.home_dir]
    homes += [fresh.path for fresh in fresh_homes(user.home_dir.parent) if fresh.key == user.key]
    for home in homes:
        # As far as the tenant can; what it could not shows then. One that never became its own is empty, or not ours.
        if open_up_home(home, user.linux_uid):
            run_as(_EMPTY_HOME, home, HOME_SECONDS)
        remove_home(home)


def _end_processes(uid: int, run_as: RunAs) -> None:
    """End whatever runs outside the slice, by the tenant's hand and by root's.

    The one stops also what forks faster than one can look for it; the other also what would stop the one.
    """
    deadline = time.monotonic() + END_TIMEOUT
    while True:
        run_as(_KILL_ALL, "/", END_PATIENCE)
        try:
            end_processes(uid, END_PATIENCE)
        except StateError:
            if time.monotonic() > deadline:
                raise
        else:
            return
