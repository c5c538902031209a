"""Fresh homes beside the ones in use: made, put in the place of those, and removed, with only their top touched.

All of them are directly in `users_base`, in which nobody but root can put one thing in the place of another.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import RunnerError
from ..home_dirs import FreshHome, fresh_homes, make_home
from ..host import Host
from ..jobs import Stop
from ..models import IsolatedUser
from ..registry import HOLD
from .children import child
from .errors import ArchiveError

__all__ = ["REMOVAL_TIMEOUT", "fresh_home", "remove_home", "swap", "sweep_fresh_homes"]

REMOVAL_TIMEOUT = 600.0
"""Seconds for removing what is not needed any more. What is left then is tried again when a supervisor begins."""

_RENAME_EXCHANGE = 2
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_log = logging.getLogger(__name__)


def fresh_home(host: Host, user: IsolatedUser, run_id: str) -> Path:
    """Make an empty home for this tenant beside the one that it has.

    Args:
        run_id: that of the hold under which this is done; once its row is gone, so may be the fresh home.

    Raises:
        AccountError: see `make_home`.
    """
    path = FreshHome(user.home_dir.parent, user.key, run_id).path
    make_home(path.parent, path.name, user.linux_uid, user.linux_gid)
    return path


def swap(user: IsolatedUser, fresh: Path) -> None:
    """Put a fresh home in the place of the tenant's, and that one in its place, in one step. Both are on the disk then.

    Raises:
        ArchiveError: that cannot be done here.
    """
    with _opened(fresh.parent) as base:
        try:
            new = os.open(fresh.name, _FOLDER_FLAGS, dir_fd=base)
            try:
                os.fchmod(new, 0o700)
                _call("syncfs", new)
            finally:
                os.close(new)
            names = (os.fsencode(fresh.name), os.fsencode(user.home_dir.name))
            _call("renameat2", base, names[0], base, names[1], _RENAME_EXCHANGE)
            os.fsync(base)
        except OSError as error:
            raise ArchiveError(f"cannot put the new home in the place of {user.home_dir}: {error.strerror}") from error


def remove_home(host: Host, user: IsolatedUser, path: Path, *, python: Path | None = None) -> bool:
    """Empty what was once a home or was to become one, as the tenant, and remove it. False if it is left."""
    try:
        if _removed(path):
            return True
        with child(host, user, "emptying", path, python=python, timeout=REMOVAL_TIMEOUT, stop=Stop()) as emptier:
            emptier.begin({})
            left = emptier.take().numbers["left"]
    except (RunnerError, OSError) as error:
        _log.error("cannot remove %s yet: %s", path, error)
        return False
    if _removed(path):
        return True
    _log.error("cannot remove %s: %d things in it are not the tenant's", path, left)
    return False


def _removed(path: Path) -> bool:
    """Remove a folder if nothing is in it; whether it is gone."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def sweep_fresh_homes(host: Host) -> None:
    """Remove what interrupted imports left; blocking, for as long as that takes.

    To be called when dead owners' rows have been taken over. A user's removal does this itself.
    """
    # In this order: a row is there before what it names, so what has none by now is not about to get one.
    for fresh in fresh_homes(host.settings.users_base):
        row = host.registry.sandboxes.row(fresh.key, HOLD)
        saas_user_id = host.registry.users.key_holder(fresh.key)
        if saas_user_id is None or (row is not None and row.run_id == fresh.run_id):
            continue  # another state's, or in use
        _log.warning("removing %s, which an interrupted import left", fresh.path)
        _sweep(host, saas_user_id, fresh.path)


def _sweep(host: Host, saas_user_id: str, path: Path) -> None:
    user = host.users.get(saas_user_id)
    if user is not None:
        remove_home(host, user, path)
    elif not _removed(path):
        _log.error("cannot remove %s: it belongs to no user any more", path)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    fd = os.open(folder, _FOLDER_FLAGS)
    try:
        yield fd
    finally:
        os.close(fd)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes) -> None:
    """Call a function of the C library that Python has no name for; raises `OSError`."""
    try:
        function = getattr(_libc(), name)
    except AttributeError:
        raise OSError(0, f"the C library has no {name}") from None
    if function(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
