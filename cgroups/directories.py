"""Directories of cgroupfs: named, made, opened, listed and removed under a descriptor."""

from __future__ import annotations

import errno
import os
import time
from typing import Final

from . import files
from .errors import BusyError, CgroupError, ExistsError, FormatError, GoneError, NotSupportedError
from .formats import parse_flat

__all__ = [
    "MODE",
    "check_name",
    "child_names",
    "make_directory",
    "open_directory",
    "remove_directory",
    "translate",
]

MODE: Final = 0o755
"""Of every cgroup that we make, whatever the umask: the processes inside may read their own."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_MAX_NAME_BYTES = 255
_REMOVE_TRIES = 50
_REMOVE_PAUSE = 0.001  # seconds


def check_name(name: str) -> str:
    """Return `name`, or raise `FormatError` if no cgroup can have it."""
    if not name or name in (".", "..") or len(os.fsencode(name)) > _MAX_NAME_BYTES or set(name) & set("/\0\n"):
        raise FormatError(
            f"{name!r} cannot name a cgroup",
            remedy="use 1 to 255 bytes, without slash and newline",
            value=name,
        )
    return name


def make_directory(name: str, dir_fd: int, path: str, *, exist_ok: bool) -> bool:
    """Make a cgroup; False if it was there already, which is an `ExistsError` unless `exist_ok`."""
    try:
        os.mkdir(name, MODE, dir_fd=dir_fd)
    except FileExistsError as error:
        if exist_ok:
            return False
        raise ExistsError(f"cannot make {path}: the name is taken", path=path, errno=errno.EEXIST) from error
    except OSError as error:
        raise translate("make", path, error) from error
    return True


def open_directory(name: str, dir_fd: int | None = None) -> int:
    """Open a cgroup's directory, never through a link. Raises `OSError`; the caller knows what it was for."""
    return os.open(name, _DIRECTORY, dir_fd=dir_fd)


def child_names(dir_fd: int) -> list[str]:
    """The names of the cgroups directly below, in no order.

    Raises:
        CgroupError: the directory cannot be read. One that was removed reads as empty.
    """
    try:
        with os.scandir(dir_fd) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise files.translate(error, dir_fd, "") from error


def remove_directory(dir_fd: int, name: str, inode: int, path: str) -> None:
    """Remove the cgroup behind `dir_fd`, which was made as `name` and has this inode. Gone already is no error.

    Raises:
        BusyError: it has processes or children.
        GoneError: its name now belongs to another cgroup, which is left alone.
    """
    # By way of our own descriptor: what leads to the parent by its path may be another cgroup by now.
    sibling = f"../{name}"
    for _ in range(_REMOVE_TRIES):
        try:
            if os.stat(sibling, dir_fd=dir_fd, follow_symlinks=False).st_ino != inode:
                raise GoneError(f"cannot remove {path}: that is another cgroup by now", path=path)
            os.rmdir(sibling, dir_fd=dir_fd)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise translate("remove", path, error) from error
            _refuse_in_use(dir_fd, path, error)
        else:
            return
        # Empty, and still busy: what died last is not wholly taken down yet. Nothing tells when it is.
        time.sleep(_REMOVE_PAUSE)
    raise BusyError(f"cannot remove {path}: it is empty and stays busy", path=path, errno=errno.EBUSY)


def _refuse_in_use(dir_fd: int, path: str, error: OSError) -> None:
    try:
        # Children first: what runs in them makes this one populated as well.
        names = sorted(child_names(dir_fd))
        populated = parse_flat(files.read(dir_fd, "cgroup.events"))["populated"]
    except GoneError:  # someone else removed it just now
        return
    if names:
        reason, remedy = f"it has children: {', '.join(names)}", "remove them first, or remove recursively"
    elif populated:
        reason, remedy = "it has processes", "kill it and wait until it is empty"
    else:
        return
    raise BusyError(f"cannot remove {path}: {reason}", remedy=remedy, path=path, errno=errno.EBUSY) from error


def translate(deed: str, path: str, error: OSError) -> CgroupError:
    """Turn what the kernel answered for a cgroup's directory into our error, to be raised from the first."""
    number = error.errno or 0
    message = f"cannot {deed} {path}: {os.strerror(number)}"
    if number in (errno.ENOENT, errno.ENODEV):
        return GoneError(f"cannot {deed} {path}: there is no such cgroup", path=path, errno=number)
    if number in files.DENIED:
        return CgroupError(message, remedy=files.DENIED_REMEDY, path=path, errno=number)
    if number == errno.EOPNOTSUPP:
        return NotSupportedError(message, path=path, errno=number)
    return CgroupError(message, path=path, errno=number)
