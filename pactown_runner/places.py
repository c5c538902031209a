"""Where on this host sandboxes may be placed: one cgroup, found or made, whose controllers they can have.

As root under systemd that is a delegated unit, as root elsewhere a cgroup at the top of the mount, and for other users
their own delegated cgroup.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path, PurePosixPath

from cgroups import Cgroup, Mount, delegated, find_mount, own_directory

from .errors import TreeError

__all__ = ["enable_wanted", "find_place"]

_WANTED = frozenset({"cpu", "io", "memory", "pids"})
"""Always enabled: each limits, and counts for every `Outcome`."""

_KEEPER = "_keeper.scope"

_KEEP = f"""\
cg=$1$(sed -n s/^0:://p /proc/self/cgroup)
mkdir -p "$cg/{_KEEPER}" && echo 0 >"$cg/{_KEEPER}/cgroup.procs" && systemd-notify --ready && exec sleep infinity"""
"""Runs in the delegated unit: its only process steps aside into a leaf, since the unit's own cgroup enables controllers
(from version 254 on systemd's `DelegateSubgroup=` does the same; Debian 12 has 252). A shell does it, so that nothing
of this package has to stay installed for as long as the unit runs."""


def find_place(cgroup_slice: str) -> Cgroup:
    """Return the cgroup below which tenants' slices are made; it is made if it is not there.

    Raises:
        TreeError: there is no place that this process may use.
        CgroupError: there is no cgroup v2 mount, or the kernel refused something.
    """
    mount = find_mount()
    if os.geteuid() != 0:
        place = _in_own_cgroup(mount, cgroup_slice)
    elif Path("/run/systemd/system").is_dir() and not mount.hybrid:
        place = _in_delegated_unit(mount, cgroup_slice)
    else:
        place = _at_top(mount, cgroup_slice)
    enable_wanted(place)
    return place


def _at_top(mount: Mount, cgroup_slice: str) -> Cgroup:
    with Cgroup.open(mount.path) as top:
        return _below(top, cgroup_slice)


def _in_own_cgroup(mount: Mount, cgroup_slice: str) -> Cgroup:
    own = Path(own_directory(mount))
    if own.name == _KEEPER:
        own = own.parent
    if not delegated(own):
        raise TreeError(
            f"this process's cgroup {own} is not delegated to it",
            remedy="start it with: systemd-run --user --scope -p Delegate=yes COMMAND",
        )
    with Cgroup.open(own) as group:
        return _below(group, cgroup_slice)


def _below(group: Cgroup, cgroup_slice: str) -> Cgroup:
    if _WANTED & group.controllers() - group.enabled():
        _step_aside(group)
        enable_wanted(group)
    return group.child(cgroup_slice, create=True, exist_ok=True)


def _step_aside(group: Cgroup) -> None:
    """Move this process into a leaf, if it sits in `group`: else no controller can be enabled there."""
    # Only the real top of the hierarchy has no `cgroup.type`, and is exempt from the rule; a container's top has one.
    if os.path.exists(f"{group.path}/cgroup.type") and os.getpid() in group.pids():
        with group.child(_KEEPER, create=True, exist_ok=True) as leaf:
            leaf.move_here(os.getpid())


def _in_delegated_unit(mount: Mount, cgroup_slice: str) -> Cgroup:
    # The unit holds the tree apart from any supervisor: systemd cannot restart a unit that has live cgroups in it.
    unit = f"{cgroup_slice.removesuffix('.slice')}-sandboxes.service"
    path, installed = _look_at(unit)
    if not path:
        _start_unit(unit, cgroup_slice, mount, installed=installed)
        path, _ = _look_at(unit)
    if not path:
        raise TreeError(f"systemd started {unit}, and it ended at once", remedy=f"journalctl --unit={unit}")
    return Cgroup.open(mount.directory(PurePosixPath(path)))


def _look_at(unit: str) -> tuple[str, bool]:
    """Where a unit is in the tree, "" if it does not run; and whether systemd has a file for it."""
    shown = _systemd("systemctl", "show", "--property=ControlGroup,FragmentPath", unit)
    values = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    return values.get("ControlGroup", ""), bool(values.get("FragmentPath"))


def _start_unit(unit: str, cgroup_slice: str, mount: Mount, *, installed: bool) -> None:
    if installed:
        _systemd("systemctl", "start", unit)
        return
    # As in deploy/pactown-sandboxes.service. One that failed is collected, so that its name is free again.
    properties = ("Type=notify", "NotifyAccess=all", "Delegate=yes", "OOMPolicy=continue", "TasksMax=infinity")
    try:
        _systemd(
            "systemd-run",
            "--quiet",
            "--collect",
            f"--unit={unit}",
            f"--slice={cgroup_slice}",
            "--description=Sandboxes of pactown-runner",
            *(f"--property={text}" for text in properties),
            *("/bin/sh", "-c", _KEEP, "keep", str(mount.path)),
        )
    except TreeError:
        # Of two that start it at once the second finds it there.
        if not _look_at(unit)[0]:
            raise


def _systemd(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TreeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def enable_wanted(group: Cgroup) -> None:
    """Enable what can be enabled. What is missing matters only, and is said, where a limit needs it."""
    if missing := _WANTED & group.controllers() - group.enabled():
        group.enable(missing)
