"""Looking into folders of one's own, also those whose mode forbids it to their owner.

An owner may change a mode, and nobody else's permission is needed for that. So where the mode is in the way it is lent
the bits that are missing, for the few microseconds of one system call; whoever is killed in just these leaves them
there. What is looked at is held by a descriptor that needs no permission (O_PATH, open(2)), and opened through it, so
that no name is ever followed twice.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def proc_path(fd: int) -> str:
    """What a descriptor is open on, as a path that leads to nothing else (proc_pid_fd(5))."""
    return f"/proc/self/fd/{fd}"


@contextlib.contextmanager
def lent(fd: int, bits: int) -> Iterator[None]:
    """Add bits to the mode of what a descriptor is open on, for a moment.

    Raises:
        PermissionError: it is somebody else's.
    """
    mode = stat.S_IMODE(os.fstat(fd).st_mode)
    os.chmod(proc_path(fd), mode | bits)
    try:
        yield
    finally:
        os.chmod(proc_path(fd), mode)


def look(folder: int, name: bytes) -> int:
    """A descriptor of what has this name in a folder, a link itself if it is one.

    Raises:
        OSError: it is not there, or its owner and we are not the same.
    """
    try:
        return os.open(name, PATH_FLAGS, dir_fd=folder)
    except PermissionError:
        with lent(folder, stat.S_IXUSR):
            return os.open(name, PATH_FLAGS, dir_fd=folder)


def open_to_read(looked: int, flags: int = 0) -> int:
    """Open what `look` found.

    Raises:
        OSError: it cannot be read, not by its owner either.
    """
    flags |= os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        return os.open(proc_path(looked), flags)
    except PermissionError:
        with lent(looked, stat.S_IRUSR):
            return os.open(proc_path(looked), flags)
