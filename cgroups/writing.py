"""Writing limits and enabling controllers: all or nothing, and an error that says what is missing and why."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from . import files
from .errors import BusyError, CgroupError, NotSupportedError
from .formats import parse_proc_cgroup, parse_swaps
from .limits import Limits

__all__ = ["enable_controllers", "read_controllers", "write_limits"]

_SWAPS = Path("/proc/swaps")
_OWN_CGROUP = Path("/proc/self/cgroup")
_SWAP_FILE = "memory.swap.max"


def read_controllers(dir_fd: int, name: str = "cgroup.controllers") -> frozenset[str]:
    """The controllers that a file lists: those available, or enabled below (`subtree_control`)."""
    return frozenset(files.read(dir_fd, name).split())


def write_limits(dir_fd: int, limits: Limits) -> dict[str, str]:
    """Write every limit, and return what the kernel answers when each file is read back.

    All or nothing: when one is refused, those written before it get their former values again.

    Raises:
        NotSupportedError: controllers or files are missing; nothing was written.
        LimitRefusedError: the kernel refused a value.
        GoneError: the cgroup was removed.
        CgroupError: anything else; what could not be put back is added to it as a note.
    """
    lines = limits.render()
    # Read before anything is written: it is needed to go back, and it shows what is missing while nothing is
    # done.
    former = {name: _former(dir_fd, name, limits) for name, _ in lines}
    written: list[str] = []
    try:
        for name, text in lines:
            if former[name] is not None:
                written.append(name)
                files.write(dir_fd, name, text)
        return {name: files.read(dir_fd, name).strip() for name in written}
    except BaseException as error:
        _put_back(dir_fd, {name: former[name] or "" for name in reversed(written)}, error)
        raise


def _former(dir_fd: int, name: str, limits: Limits) -> str | None:
    """The file's present value; None if it may be passed over."""
    text = files.read_optional(dir_fd, name)
    if text is not None:
        return text.strip()
    if missing := limits.controllers() - read_controllers(dir_fd):
        raise _missing(dir_fd, missing)
    path = f"{files.directory_path(dir_fd)}/{name}"
    if name != _SWAP_FILE:
        raise NotSupportedError(
            f"cannot limit {path}: this kernel has no such control file",
            remedy="use a newer kernel, or ask for no such limit; the root cgroup has none at all",
            path=path,
        )
    # Without swap on the host, "no swap" holds by itself. An explicit wish is not ours to drop.
    if limits.swap_implied and not _host_has_swap():
        return None
    raise NotSupportedError(
        f"cannot limit {path}: this kernel does not account for swap",
        remedy="boot with swapaccount=1, or switch swap off and leave memory_swap_max out",
        path=path,
    )


def _host_has_swap() -> bool:
    try:
        return parse_swaps(_SWAPS.read_text())
    except FileNotFoundError:  # a kernel without CONFIG_SWAP
        return False


def _put_back(dir_fd: int, former: dict[str, str], error: BaseException) -> None:
    for name, text in former.items():
        try:
            files.write(dir_fd, name, text)
        except CgroupError as second:
            error.add_note(f"{name} could not be set back to {text!r}: {second}")


def enable_controllers(dir_fd: int, wanted: Iterable[str]) -> None:
    """Let the cgroup's children have these controllers; those that they have already stay.

    Raises:
        NotSupportedError: the cgroup itself lacks some of them, all of which are named.
        BusyError: the cgroup has processes of its own.
    """
    wanted = frozenset(wanted)
    if missing := wanted - read_controllers(dir_fd):
        raise _missing(dir_fd, missing)
    if not (new := wanted - read_controllers(dir_fd, "cgroup.subtree_control")):
        return
    try:
        files.write(dir_fd, "cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(new)))
    except BusyError as error:
        error.remedy = "move its own processes to a leaf first: a cgroup with controllers enabled below takes none"
        raise


def _missing(dir_fd: int, missing: frozenset[str]) -> NotSupportedError:
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
