"""Controllers of a cgroup: which it has, handing them down, and what to do where one is missing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from . import files
from .errors import BusyError, NotSupportedError
from .formats import parse_proc_cgroup

__all__ = ["enable_controllers", "missing_controllers", "read_controllers"]

_OWN_CGROUP = Path("/proc/self/cgroup")


def read_controllers(dir_fd: int, name: str = "cgroup.controllers") -> frozenset[str]:
    """The controllers that a file lists: those available, or enabled below (`subtree_control`)."""
    return frozenset(files.read(dir_fd, name).split())


def enable_controllers(dir_fd: int, wanted: Iterable[str]) -> None:
    """Let the cgroup's children have these controllers; those that they have already stay.

    Raises:
        NotSupportedError: the cgroup itself lacks some of them, all of which are named.
        BusyError: the cgroup has processes of its own.
    """
    wanted = frozenset(wanted)
    if missing := wanted - read_controllers(dir_fd):
        raise missing_controllers(dir_fd, missing)
    if not (new := wanted - read_controllers(dir_fd, "cgroup.subtree_control")):
        return
    try:
        files.write(dir_fd, "cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(new)))
    except BusyError as error:
        error.remedy = "move its own processes to a leaf first: a cgroup with controllers enabled below takes none"
        raise


def missing_controllers(dir_fd: int, missing: frozenset[str]) -> NotSupportedError:
    """The error that names controllers which a cgroup lacks, and tells where they would have to come from."""
    path = files.directory_path(dir_fd)
    names = ", ".join(sorted(missing))
    return NotSupportedError(
        f"{path} lacks controllers: {names}", remedy=_remedy(dir_fd, missing, path), path=path, value=names
    )


def _remedy(dir_fd: int, missing: frozenset[str], path: str) -> str:
    above = files.read_optional(dir_fd, "../cgroup.controllers") or ""
    remedies = []
    if near := missing & frozenset(above.split()):
        text = " ".join(f"+{name}" for name in sorted(near))
        remedies.append(f"write {text!r} to {path.rpartition('/')[0]}/cgroup.subtree_control")
    rest = missing - near
    if held := rest & _held_by_v1():
        remedies.append(
            f"{', '.join(sorted(held))}: in use by cgroup v1 on this host; boot with "
            "systemd.unified_cgroup_hierarchy=1 or cgroup_no_v1=all"
        )
    if far := rest - held:
        remedies.append(
            f"{', '.join(sorted(far))}: enable in cgroup.subtree_control from the top of the tree downwards, "
            "under systemd with Delegate=yes; if the top lacks it too, boot a kernel that has it"
        )
    return "; ".join(remedies)


def _held_by_v1() -> frozenset[str]:
    try:
        return parse_proc_cgroup(_OWN_CGROUP.read_text())[1]
    except OSError:
        return frozenset()
