"""The top directory of a home: the one thing in a tenant's tree that root makes.

It is made, given away, taken back and removed through descriptors, in a directory where nobody but root can put
something in its place. What lies in it is the tenant's business: root does not look into it again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .database import make_dirs
from .errors import AccountError, FilesError
from .passage import exposed, way_to

__all__ = ["FreshHome", "fresh_homes", "keep_home", "make_home", "open_up_home", "remove_home"]

_FRESH = re.compile(r"\.fresh-([0-9a-f]{8,24})-([0-9a-f]{16})")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def make_home(users_base: Path, name: str, uid: int, gid: int, *, kept: bool = False) -> None:
    """Make the home `users_base/name`, mode 0700, and give it away; and `users_base`, mode 0711, if it is missing.

    Nothing below the home is looked at once it is the tenant's. Calling it again is harmless.

    Args:
        kept: it was the tenant's before, see `keep_home`; so it is given back with all that is in it.

    Raises:
        AccountError: somebody else could put another directory in its place, or keep the tenant from reaching it;
            or the name is taken by what is neither the tenant's nor an empty directory of ours.
    """
    try:
        make_dirs(users_base, 0o711)
        if os.geteuid() == 0:
            _check_way(users_base)
        base = os.open(users_base, _DIRECTORY)
    except OSError as error:
        raise AccountError(
            f"cannot keep homes in {users_base}: {error}", remedy="name a directory, not a link to one"
        ) from error
    try:
        _check_base(users_base, os.fstat(base))
        _make_in(base, users_base, name, uid, gid, kept=kept)
    except OSError as error:
        raise AccountError(f"cannot make the home {users_base / name}: {error}") from error
    finally:
        os.close(base)


class FreshHome(NamedTuple):
    """A home beside the one that a tenant has: it is to take the place of that one, or it did and this was the former.

    Attributes:
        users_base: where both are.
        key: the tenant's.
        run_id: tells by whom, see `archives.swapping`.
    """

    users_base: Path
    key: str
    run_id: str

    @property
    def path(self) -> Path:
        """The directory."""
        return self.users_base / f".fresh-{self.key}-{self.run_id}"


def fresh_homes(users_base: Path) -> list[FreshHome]:
    """All that there are, of whichever state. Raises `OSError`."""
    try:
        names = os.listdir(users_base)
    except FileNotFoundError:
        return []  # nobody has had a home yet
    matches = map(_FRESH.fullmatch, names)
    return [FreshHome(users_base, *match.groups()) for match in matches if match]


def keep_home(home: Path, uid: int) -> None:
    """Take a home back, with all that is in it: its top directory becomes root's, and nobody else can enter it.

    Calling it again is harmless, and that there is none is no error.

    Raises:
        AccountError: somebody else could put another directory in its place, or has; or it cannot be changed.
    """
    with _in_base(home, "keep") as base:
        if (top := _open_top(base, home, uid)) is not None:
            try:
                os.fchmod(top, 0o700)
                os.fchown(top, os.geteuid(), os.getegid())
            finally:
                os.close(top)


def open_up_home(home: Path, uid: int) -> bool:
    """Let the tenant do with its home what it likes, whatever mode it gave it. False if it is not the tenant's.

    Raises: as `keep_home`.
    """
    with _in_base(home, "empty") as base:
        if (top := _open_top(base, home, uid)) is None:
            return False
        try:
            if os.fstat(top).st_uid != uid:
                return False
            os.fchmod(top, 0o700)
            return True
        finally:
            os.close(top)


def remove_home(home: Path) -> None:
    """Remove the top directory of a home that was emptied; that there is none is no error.

    Raises:
        FilesError: something is left in it.
        AccountError: somebody else could put another directory in its place; or it cannot be removed.
    """
    with _in_base(home, "remove") as base:
        try:
            if base >= 0:
                os.rmdir(home.name, dir_fd=base)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            raise FilesError(
                f"cannot remove the home {home}: it is not empty",
                remedy="it holds somebody else's files, or a mount: remove them, then the user again",
            ) from error


@contextlib.contextmanager
def _in_base(home: Path, verb: str) -> Iterator[int]:
    """The directory of a home, in which nobody but us can change anything; -1 if there is none."""
    base = -1
    try:
        if os.geteuid() == 0 and home.parent.exists():
            _check_way(home.parent)
        with contextlib.suppress(FileNotFoundError):
            base = os.open(home.parent, _DIRECTORY)
            _check_base(home.parent, os.fstat(base))
        yield base
    except OSError as error:
        raise AccountError(f"cannot {verb} the home {home}: {error}") from error
    finally:
        if base >= 0:
            os.close(base)


def _open_top(base: int, home: Path, uid: int) -> int | None:
    """The top directory, which is the tenant's or ours; None if there is none."""
    try:
        if base < 0:
            return None
        top = os.open(home.name, _DIRECTORY, dir_fd=base)
    except FileNotFoundError:
        return None
    owner = os.fstat(top).st_uid
    if owner not in (uid, os.geteuid()):
        os.close(top)
        raise AccountError(f"{home} belongs to uid {owner}, not to {uid}", remedy="move it away")
    return top


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


def _make_in(base: int, users_base: Path, name: str, uid: int, gid: int, *, kept: bool) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=base)
    home = os.open(name, _DIRECTORY, dir_fd=base)
    try:
        found = os.fstat(home)
        if found.st_uid != uid:
            # Only one of our own can be what we kept, and only an empty one what an earlier, interrupted call made.
            if found.st_uid != os.geteuid() or (os.listdir(home) and not kept):
                raise AccountError(
                    f"{users_base / name} is there already, belongs to uid {found.st_uid} and is not empty or not ours",
                    remedy="move it away",
                )
            os.fchown(home, uid, gid)
        os.fchmod(home, 0o700)
    finally:
        os.close(home)
