"""Who may use a Unix socket, for those who may not."""

from __future__ import annotations

import grp
import os
import stat
from pathlib import Path

__all__ = ["who_may_use"]


def who_may_use(path: Path) -> str:
    """What to do about a socket, or a directory on the way to it, that lets only others pass."""
    for place in (*reversed(path.parents), path):
        try:
            found = place.stat()
        except OSError:
            break
        right, by_group = (os.W_OK, stat.S_IWGRP) if place == path else (os.X_OK, stat.S_IXGRP)
        if os.access(place, right, effective_ids=True):
            continue
        if found.st_mode & by_group:
            return f"become a member of the group {_name(found.st_gid)}, which may use it"
        break
    return "be root, or have api_group name a group of yours in the server's settings"


def _name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
