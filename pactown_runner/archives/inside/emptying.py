"""Remove all that is in the folder that this process finds itself in, however deep it is, and whatever its modes."""

from __future__ import annotations

import errno
import os
from collections import Counter
from typing import Any

from . import wire
from .looking import PATH_FLAGS, proc_path

_TRIES = 3
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


class Emptier:
    """Empties the current folder.

    A folder in a folder is moved up to the top before its turn comes, so that no path and no stack of descriptors
    grows with the depth of what was there.
    """

    def __init__(self) -> None:
        self._top = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._moved = 0
        self._failures: Counter[bytes] = Counter()

    def empty(self) -> dict[str, Any]:
        """Remove what can be removed; returns how many things at the top could not."""
        os.fchmod(self._top, 0o700)
        while names := [name for name in _names(self._top) if self._failures[name] < _TRIES]:
            for name in names:
                try:
                    self._remove(name)
                except FileNotFoundError:
                    pass
                except OSError:
                    # Not the tenant's, or with something in it that is not; or somebody made it anew meanwhile.
                    self._failures[name] += 1
        return {"left": len(_names(self._top))}

    def _remove(self, name: bytes) -> None:
        if _removed(name, self._top):
            return
        folder = _open_writable(name, self._top)
        try:
            for below in _names(folder):
                if not _removed(below, folder):
                    # Moving a folder writes to it, its `..`.
                    os.close(_open_writable(below, folder))
                    self._move_up(below, folder)
        finally:
            os.close(folder)
        os.rmdir(name, dir_fd=self._top)

    def _move_up(self, name: bytes, folder: int) -> None:
        while True:
            self._moved += 1
            try:
                os.rename(name, b".pactown-%d" % self._moved, src_dir_fd=folder, dst_dir_fd=self._top)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
            else:
                return


def _names(folder: int) -> list[bytes]:
    return [os.fsencode(name) for name in os.listdir(folder)]


def _removed(name: bytes, folder: int) -> bool:
    """Remove what is no folder, or an empty one; False for others."""
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        try:
            os.rmdir(name, dir_fd=folder)
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            return False
    return True


def _open_writable(name: bytes, parent: int) -> int:
    """Open a folder of ours that is to be removed."""
    looked = os.open(name, PATH_FLAGS | os.O_DIRECTORY, dir_fd=parent)
    try:
        os.chmod(proc_path(looked), 0o700)
        return os.open(proc_path(looked), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(looked)


def serve(arguments: Any) -> None:
    """Do it, in a process of its own."""
    wire.serve(lambda _: Emptier().empty(), arguments)
