"""Paths that root is asked to open: no tenant may be able to put something else in their place meanwhile.

Else an archive named in a tenant's home could become a link to what only root can read, and a child with the tenant's
uid would be fed with it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..host import Host
from ..passage import way_to
from .errors import ArchiveError

__all__ = ["check_way"]


def check_way(host: Host, path: Path) -> None:
    """Raise `ArchiveError` if a tenant can change where a path leads, or it cannot be looked at; without root never.

    What the owner of a file can do to it is another matter: an operator's own files are the operator's business.
    """
    if not host.users.root_mode:
        return
    tenants = host.registry.users.used_uids()
    try:
        for end in {path, Path(os.path.realpath(path))}:
            for step in (*way_to(end), *([end] if os.path.lexists(end) else [])):
                _check_step(host, step, tenants)
    except OSError as error:
        raise ArchiveError(f"cannot reach {error.filename}: {error.strerror}") from error


def _check_step(host: Host, step: Path, tenants: set[int]) -> None:
    # A link and what it leads to: whoever owns the one in a sticky directory can replace it, sticky(7).
    for found in (step.lstat(), step.stat()):
        uid = found.st_uid
        if uid in tenants or any(first <= uid <= last for first, last in host.settings.uid_ranges):
            raise ArchiveError(f"{step} is a tenant's (uid {uid})", remedy="name a path that no tenant can change")
        if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            raise ArchiveError(
                f"everybody can change what {step} holds", remedy="name a path that no tenant can change"
            )
