"""Whether a path leads where it seems to: nobody but root may change what lies on the way to it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["exposed", "way_to"]


def way_to(path: Path) -> set[Path]:
    """The directories on the way to `path`: as it is written, and as each link among them leads on.

    Raises:
        OSError: one is not there, or cannot be looked at.
    """
    found: set[Path] = set()
    new = set(path.parents)
    while new:
        found |= new
        links = [directory for directory in new if stat.S_ISLNK(directory.lstat().st_mode)]
        new = {further for link in links for further in (link.parent / link.readlink() / "_").parents} - found
    return found


def exposed(path: Path) -> str | None:
    """Why others than root could put something else in the place of `path`; None if they cannot, and without root.

    Raises:
        OSError: a directory on the way is not there, or cannot be looked at.
    """
    if os.geteuid() != 0:
        return None
    for directory in sorted(way_to(path)):
        found = directory.stat()
        mode = stat.S_IMODE(found.st_mode)
        by_group = mode & stat.S_IWGRP and found.st_gid != 0
        # In a sticky directory only the owner of an entry, or of the directory, can put another in its place.
        if found.st_uid != 0 or ((by_group or mode & stat.S_IWOTH) and not mode & stat.S_ISVTX):
            return (
                f"others than root can change what {directory} holds "
                f"(owner {found.st_uid}, group {found.st_gid}, mode {mode:04o})"
            )
    return None
