"""Where the cgroup v2 tree is mounted, where we are in it, and whether a part of it is ours to use.

Parsing is pure and takes text, so that hosts of every kind can be told apart in tests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from .errors import CgroupError, GoneError, NotSupportedError
from .formats import parse_proc_cgroup

__all__ = [
    "Mount",
    "available_controllers",
    "delegated",
    "find_mount",
    "own_directory",
    "own_path",
    "parse_mountinfo",
]

_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_CGROUP: Final = Path("/proc/self/cgroup")
_DELETED: Final = " (deleted)"
# Among the options of a v1 mount stand its controllers; the others there are `xattr`, `name=` and the like.
_V1_NAMES = "blkio cpu cpuacct cpuset debug devices freezer hugetlb memory misc net_cls net_prio perf_event pids rdma"
_V1_CONTROLLERS: Final = frozenset(_V1_NAMES.split(" "))
_TOP: Final = PurePosixPath("/")
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """A cgroup v2 mount.

    Attributes:
        path: where it is mounted.
        root: which cgroup appears there; `/` is the top, or that of our cgroup namespace.
        writable: whether it is mounted read-write.
        v1_controllers: controllers that cgroup v1 mounts hold beside it, and that v2 therefore lacks.
    """

    path: Path
    root: PurePosixPath = _TOP
    writable: bool = True
    v1_controllers: frozenset[str] = frozenset()

    @property
    def hybrid(self) -> bool:
        """Whether cgroup v1 controllers are mounted beside it."""
        return bool(self.v1_controllers)

    def directory(self, cgroup: PurePosixPath) -> Path:
        """Where a cgroup appears that `/proc/PID/cgroup` names.

        Raises:
            NotSupportedError: it lies outside what is mounted.
            GoneError: it was removed.
        """
        if cgroup.name.endswith(_DELETED):
            raise GoneError(f"the cgroup {cgroup} was removed", path=str(cgroup))
        # `..` stands for what is above our cgroup namespace; its names are hidden, so there is no path.
        if ".." in cgroup.parts or ".." in self.root.parts or not cgroup.is_relative_to(self.root):
            raise NotSupportedError(
                f"the cgroup {cgroup} lies outside the mount {self.path}, which shows {self.root}",
                remedy="mount a cgroup2 file system within this cgroup namespace",
                path=str(cgroup),
            )
        return self.path / cgroup.relative_to(self.root)


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)


def parse_mountinfo(text: str) -> tuple[Sequence[Mount], frozenset[str]]:
    """Read `/proc/PID/mountinfo` (proc_pid_mountinfo(5)): the v2 mounts in order, and what v1 mounts hold."""
    mounts: dict[str, Mount] = {}
    v1: set[str] = set()
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        places, kinds = before.split(), after.split()
        if not dash or len(places) < 6 or len(kinds) < 3:
            continue
        path = _unescape(places[4])
        mounts.pop(path, None)  # whatever is mounted later at a place hides what was there
        if kinds[0] == "cgroup2":
            writable = "rw" in places[5].split(",") and "rw" in kinds[2].split(",")
            mounts[path] = Mount(Path(path), PurePosixPath(_unescape(places[3])), writable)
        elif kinds[0] == "cgroup":
            v1 |= _V1_CONTROLLERS & set(kinds[2].split(","))
    held = frozenset(v1)
    return [Mount(mount.path, mount.root, mount.writable, held) for mount in mounts.values()], held


def find_mount(text: str | None = None) -> Mount:
    """The cgroup v2 mount to use: a writable one before a read-only one, the whole tree before a part of it.

    Args:
        text: what `/proc/self/mountinfo` says; read from there if None.

    Raises:
        NotSupportedError: there is none.
    """
    mounts, v1 = parse_mountinfo(_read(_MOUNTINFO) if text is None else text)
    if not mounts:
        raise NotSupportedError(
            f"no cgroup v2 file system is mounted{' beside that of v1' if v1 else ''}",
            remedy="boot with systemd.unified_cgroup_hierarchy=1" if v1 else "mount -t cgroup2 none /sys/fs/cgroup",
        )
    return min(mounts, key=lambda mount: (not mount.writable, mount.root != _TOP))


def own_path(text: str | None = None) -> PurePosixPath:
    """The cgroup that we are in, as the `0::` line of `/proc/self/cgroup` names it.

    Args:
        text: what `/proc/self/cgroup` says; read from there if None.

    Raises:
        NotSupportedError: the kernel has no v2 hierarchy.
    """
    path, _ = parse_proc_cgroup(_read(_CGROUP) if text is None else text)
    if path is None:
        raise NotSupportedError(
            "this process is in no cgroup v2 hierarchy", remedy="mount -t cgroup2 none /sys/fs/cgroup"
        )
    return PurePosixPath(path)


def own_directory(mount: Mount | None = None) -> Path:
    """The directory of the cgroup that we are in; raises what its three steps raise."""
    return (mount or find_mount()).directory(own_path())


def available_controllers(mount: Mount) -> frozenset[str]:
    """The controllers that the top of the mount has. Raises `CgroupError` if it cannot be read."""
    return frozenset(_read(mount.path / "cgroup.controllers").split())


def delegated(directory: str | os.PathLike[str]) -> bool:
    """Whether a cgroup and what is below it may be managed by us (cgroup-v2.rst, "Delegation").

    That is so if we may make cgroups in it, move processes into it, and hand controllers down. Nothing is
    written.
    """
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        return False
    names = ("cgroup.procs", "cgroup.subtree_control")
    return all(os.access(os.path.join(directory, name), os.W_OK, effective_ids=True) for name in names)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise CgroupError(
            f"cannot read {path}: {os.strerror(error.errno or 0)}", path=str(path), errno=error.errno
        ) from error
