"""Who we are, and where in the cgroup tree sandboxes will live."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cgroups import CgroupError, Mount, delegated, own_directory

from ..config import Settings
from .finding import Finding, fail, ok, warn

__all__ = ["check_identity", "check_place"]

_SYSTEMD = Path("/run/systemd/system")


def check_identity(uid: int | None = None) -> Finding:
    """Whether tenants can have accounts of their own."""
    uid = os.geteuid() if uid is None else uid
    if uid == 0:
        return ok("identity", "root: each tenant gets an account of its own")
    message = f"uid {uid}, not root: tenants' files and processes are this user's own, and not separated from it"
    return warn("identity", message, "run it with sudo")


def check_place(mount: Mount, settings: Settings, *, systemd: Path = _SYSTEMD) -> Iterator[Finding]:
    """Whether there is a part of the tree that is ours to use, and systemd leaves alone."""
    if os.geteuid() != 0:
        yield _own_part(mount)
    elif systemd.is_dir() and not mount.hybrid:
        yield _unit(mount, settings.cgroup_slice)
    elif delegated(mount.path):
        yield ok("cgroup.place", f"sandboxes live in {mount.path / settings.cgroup_slice}, without systemd")
    else:
        remedy = "give the container a writable cgroup tree and a private cgroup namespace"
        yield fail("cgroup.place", f"{mount.path} does not let us make cgroups", remedy)


def _own_part(mount: Mount) -> Finding:
    remedy = "start it with: systemd-run --user --scope -p Delegate=yes COMMAND"
    try:
        own = own_directory(mount)
    except CgroupError as error:
        return fail("cgroup.place", f"our own cgroup cannot be found: {error.message}", remedy)
    if not delegated(own):
        return fail("cgroup.place", f"our own cgroup {own} is not delegated to us: no sandbox can be placed", remedy)
    return ok("cgroup.place", f"our own cgroup {own} is delegated to us")


def _unit(mount: Mount, cgroup_slice: str) -> Finding:
    unit = f"{cgroup_slice.removesuffix('.slice')}-sandboxes.service"
    if (mount.path / cgroup_slice / unit).is_dir():
        return ok("cgroup.place", f"the delegated unit {unit} is there; it outlives every supervisor")
    if shutil.which("systemd-run"):
        return ok("cgroup.place", f"the delegated unit {unit} will be made at the first start")
    return fail("cgroup.place", f"there is neither {unit} nor systemd-run to make it", "install systemd")
