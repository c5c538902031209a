"""The top directory of a home: the one thing in a tenant's tree that root makes.

It is made and given away through descriptors, in a directory where nobody but root can put something in its place.
What lies in it is the tenant's business: root does not look into it again.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from .database import make_dirs
from .errors import AccountError
from .passage import exposed, way_to

__all__ = ["make_home"]


def make_home(users_base: Path, name: str, uid: int, gid: int) -> None:
    """Make the home `users_base/name`, mode 0700, and give it away; and `users_base`, mode 0711, if it is missing.

    Nothing below the home is looked at once it is the tenant's. Calling it again is harmless.

    Raises:
        AccountError: somebody else could put another directory in its place, or keep the tenant from reaching it;
            or the name is taken by what is neither the tenant's nor an empty directory of ours.
    """
    try:
        make_dirs(users_base, 0o711)
        if os.geteuid() == 0:
            _check_way(users_base)
        base = os.open(users_base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise AccountError(
            f"cannot keep homes in {users_base}: {error}", remedy="name a directory, not a link to one"
        ) from error
    try:
        _check_base(users_base, os.fstat(base))
        _make_in(base, users_base, name, uid, gid)
    except OSError as error:
        raise AccountError(f"cannot make the home {users_base / name}: {error}") from error
    finally:
        os.close(base)


def _check_way(users_base: Path) -> None:
    if (reason := exposed(users_base)) is not None:
        raise AccountError(
            f"cannot keep homes in {users_base}: {reason}", remedy="choose a users_base whose parents are root's"
        )
    for directory in way_to(users_base):
        _check_search(directory, stat.S_IMODE(directory.stat().st_mode))


def _check_search(directory: Path, mode: int) -> None:
    if not mode & stat.S_IXOTH:
        raise AccountError(
            f"cannot keep homes below {directory}: tenants cannot pass through it (mode {mode:04o})",
            remedy=f"chmod o+x {directory}, or choose another users_base",
        )


def _check_base(users_base: Path, found: os.stat_result) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.geteuid() or mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise AccountError(
            f"cannot keep homes in {users_base}: others than uid {os.geteuid()} can change what it holds "
            f"(owner {found.st_uid}, mode {mode:04o})",
            remedy=f"chown {os.geteuid()} {users_base}; chmod 711 {users_base}",
        )
    if os.geteuid() == 0:
        _check_search(users_base, mode)


def _make_in(base: int, users_base: Path, name: str, uid: int, gid: int) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=base)
    home = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=base)
    try:
        found = os.fstat(home)
        if found.st_uid != uid:
            # Only an empty one of our own can be what an earlier, interrupted call made.
            if found.st_uid != os.geteuid() or os.listdir(home):
                raise AccountError(
                    f"{users_base / name} is there already, belongs to uid {found.st_uid} and is not empty or not ours",
                    remedy="move it away",
                )
            os.fchown(home, uid, gid)
        os.fchmod(home, 0o700)
    finally:
        os.close(home)
