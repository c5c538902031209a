"""The kernel: its version, the cgroup tree it offers, and what it lets tenants see and do."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from cgroups import CgroupError, Mount, find_mount, own_directory

from .finding import Finding, fail, ok, warn

__all__ = [
    "ALL_V2",
    "check_controllers",
    "check_kernel",
    "check_mount",
    "check_proc",
    "check_sysctls",
    "mount_options",
]

OLDEST = (5, 14)
"""The first Linux with `cgroup.kill`."""

ALL_V2 = "boot with systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all on the kernel's command line"

_OCTAL = re.compile(r"\\([0-7]{3})")  # how the kernel writes blanks in a path
_MACHINES = ("x86_64", "aarch64")


def check_kernel(release: str | None = None, machine: str | None = None) -> Iterator[Finding]:
    """Whether Linux is new enough, and of a machine that the launcher knows."""
    release = platform.release() if release is None else release
    machine = platform.machine() if machine is None else machine
    oldest = ".".join(map(str, OLDEST))
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is None:
        yield warn("kernel", f"nobody can tell how old Linux {release!r} is; {oldest} is needed")
    elif (int(numbers[1]), int(numbers[2])) < OLDEST:
        yield fail(
            "kernel", f"Linux {release} is older than {oldest}: it has no cgroup.kill", f"install Linux {oldest}"
        )
    else:
        yield ok("kernel", f"Linux {release}")
    if machine not in _MACHINES:
        yield fail("machine", f"the launcher does not know {machine}", f"use one of {', '.join(_MACHINES)}")


def check_mount(mountinfo: str | None = None) -> tuple[Mount | None, list[Finding]]:
    """Where cgroup v2 is mounted, and whether v1 shares the controllers with it."""
    try:
        mount = find_mount(mountinfo)
    except CgroupError as error:
        return None, [fail("cgroup2", error.message, error.remedy)]
    if not mount.writable:
        remedy = "give the container a writable cgroup tree and a private cgroup namespace"
        return mount, [fail("cgroup2", f"cgroup v2 is mounted read-only at {mount.path}", remedy)]
    if mount.hybrid:
        held = ", ".join(sorted(mount.v1_controllers))
        message = f"cgroup v2 is at {mount.path}, and v1 holds {held} (hybrid): tracking, freezing and killing work"
        return mount, [warn("cgroup2", message, ALL_V2)]
    return mount, [ok("cgroup2", f"cgroup v2 alone, at {mount.path}")]


class _Kind(NamedTuple):
    """A kind of limit: whether the runner relies on it, and what follows without."""

    essential: bool
    without: str


_KINDS = {
    "memory": _Kind(True, "a start that asks for one fails, and one tenant can use up the host's memory"),
    "cpu": _Kind(True, "a start that asks for one fails, and tenants take CPU time from each other"),
    "pids": _Kind(True, "a start that asks for one fails, and a fork bomb hits the whole host"),
    "io": _Kind(False, "a start that asks for one fails, and tenants can slow each other's disk"),
    "cpuset": _Kind(False, "a start that asks for one fails"),
}


def check_controllers(mount: Mount, available: frozenset[str] | None = None) -> Iterator[Finding]:
    """Which limits can be enforced here."""
    if available is None:
        try:
            available = _available(mount)
        except CgroupError as error:
            yield fail("limits", f"nobody can tell which limits work: {error.message}", error.remedy)
            return
    for name, kind in _KINDS.items():
        check = f"limits.{name}"
        if name in available:
            yield ok(check, f"{name} limits can be enforced")
            continue
        why = "cgroup v1 holds the controller" if name in mount.v1_controllers | _v1_twins(mount) else "not available"
        message = f"{name} limits cannot be enforced ({why}): {kind.without}"
        yield (fail if kind.essential else warn)(check, message, _controller_remedy(mount, name))


def _v1_twins(mount: Mount) -> frozenset[str]:
    # v1 called the io controller blkio.
    return frozenset({"io"}) if "blkio" in mount.v1_controllers else frozenset()


def _controller_remedy(mount: Mount, name: str) -> str:
    if mount.hybrid:
        return ALL_V2
    if os.geteuid() != 0:
        return f"as root: systemctl set-property user@{os.geteuid()}.service Delegate='cpu cpuset io memory pids'"
    return f"echo +{name} > cgroup.subtree_control in the cgroups above (or the container's host), or a kernel with it"


def _available(mount: Mount) -> frozenset[str]:
    # Without root, sandboxes live below our own cgroup, and have what it has.
    directory = mount.path if os.geteuid() == 0 else own_directory(mount)
    try:
        return frozenset((directory / "cgroup.controllers").read_text().split())
    except OSError as error:
        raise CgroupError(f"cannot read {directory}/cgroup.controllers: {error.strerror}") from error


def mount_options(path: str, mountinfo: str | None = None) -> frozenset[str]:
    """The options, of mount and file system, of what is mounted at `path` or at the nearest directory above it."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    best, options = "", frozenset[str]()
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        point = _OCTAL.sub(lambda found: chr(int(found[1], 8)), before.split()[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # Of two at one place the later hides the earlier.
        if inside and len(point) >= len(best):
            best, options = point, frozenset(f"{before.split()[5]},{after.split()[-1]}".split(","))
    return options


def check_proc(options: frozenset[str] | None = None) -> Iterator[Finding]:
    """Whether tenants see each other's processes, proc(5)."""
    options = mount_options("/proc") if options is None else options
    if options & {"hidepid=2", "hidepid=invisible", "hidepid=4", "hidepid=ptraceable"}:
        yield ok("proc.hidepid", "tenants see their own processes only")
    else:
        message = "tenants can read each other's command lines, and yours, in /proc (never their environments)"
        yield warn("proc.hidepid", message, "mount -o remount,hidepid=invisible /proc")


class _Sysctl(NamedTuple):
    """A switch, the values that are safe, and what goes wrong with others."""

    name: str
    is_safe: Callable[[int], bool]
    advised: int
    otherwise: str


_SYSCTLS = (
    _Sysctl("fs.protected_symlinks", lambda value: value == 1, 1, "links in /tmp can lead other programs astray"),
    _Sysctl("fs.protected_hardlinks", lambda value: value == 1, 1, "tenants can hard-link files that are not theirs"),
    _Sysctl("fs.protected_fifos", lambda value: value > 0, 1, "FIFOs in /tmp can catch what others write"),
    _Sysctl("fs.protected_regular", lambda value: value > 0, 1, "files in /tmp can catch what others write"),
    _Sysctl("kernel.unprivileged_bpf_disabled", lambda value: value > 0, 1, "tenants can load BPF programs"),
    _Sysctl("kernel.dmesg_restrict", lambda value: value == 1, 1, "tenants can read the kernel's log"),
    _Sysctl("kernel.perf_event_paranoid", lambda value: value >= 2, 2, "tenants can profile the kernel"),
    _Sysctl("user.max_user_namespaces", lambda value: value == 0, 0, "tenants reach more of the kernel (userns)"),
)


def check_sysctls(root: Path = Path("/proc/sys")) -> Iterator[Finding]:
    """Whether the kernel keeps from tenants what they have no use for. What it does not have needs no switch."""
    for switch in _SYSCTLS:
        try:
            value = int((root / switch.name.replace(".", "/")).read_text())
        except (OSError, ValueError):
            continue
        if switch.is_safe(value):
            yield ok(switch.name, f"is {value}")
        else:
            yield warn(switch.name, f"is {value}: {switch.otherwise}", f"sysctl -w {switch.name}={switch.advised}")
