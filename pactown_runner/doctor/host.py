"""What the host keeps: accounts, uids, directories, the registry."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

from cgroups import MAX

from ..accounts import HOMED_UIDS
from ..config import Settings
from ..errors import RunnerError
from ..quotas import quotas_at
from ..registry import Registry
from ..tiers import LEAST_DISK
from .finding import Finding, fail, ok, warn
from .kernel import mount_options

__all__ = ["check_accounts", "check_directories", "check_quotas", "check_state", "check_users_base", "taken_ids"]

_TOOLS = ("useradd", "groupadd", "userdel", "groupdel")
_TOOL_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_HOMED = Path("/var/lib/systemd/home")
FEW_UIDS = 100
OLDEST_SQLITE = (3, 37, 0)
"""The first with STRICT tables."""


def check_accounts(settings: Settings, *, homed: Path = _HOMED, tool_path: str = _TOOL_PATH) -> Iterator[Finding]:
    """Whether accounts can be made, and how many."""
    if os.geteuid() != 0:
        return
    if missing := [tool for tool in _TOOLS if shutil.which(tool, path=tool_path) is None]:
        message = f"no account can be made: {', '.join(missing)} not found"
        yield fail("accounts.tools", message, "apt install passwd (Debian), dnf install shadow-utils (Fedora)")
    else:
        yield ok("accounts.tools", f"{', '.join(_TOOLS)} are there")
    ranges = settings.uid_ranges
    if homed.exists():
        ranges = tuple(one for one in ranges if one[0] > HOMED_UIDS[1] or one[1] < HOMED_UIDS[0])
        yield ok("accounts.homed", "systemd-homed is in use; ranges that overlap its 60001-60513 are left to it")
    yield _free_uids(ranges, taken_ids(settings))


def _free_uids(ranges: tuple[tuple[int, int], ...], taken: set[int]) -> Finding:
    free = sum(last - first + 1 - sum(first <= uid <= last for uid in taken) for first, last in ranges)
    text = ", ".join(f"{first}-{last}" for first, last in ranges) or "no range"
    remedy = "widen uid_ranges in the settings"
    if free <= 0:
        return fail("accounts.uids", f"no uid is free in {text}", remedy)
    if free < FEW_UIDS:
        return warn("accounts.uids", f"only {free} uids are free in {text}", remedy)
    return ok("accounts.uids", f"{free} uids are free in {text}")


def taken_ids(settings: Settings) -> set[int]:
    """Uids and gids that accounts of this host, or tombstones of this state, have."""
    taken = {number for login in pwd.getpwall() for number in (login.pw_uid, login.pw_gid)}
    taken |= {group.gr_gid for group in grp.getgrall()}
    path = settings.state_dir / "registry.db"
    if _exists(path):
        try:
            with Registry(path) as registry:
                taken |= registry.users.used_uids()
        except RunnerError:
            pass  # `check_state` says it
    return taken


def check_users_base(users_base: Path, mountinfo: str | None = None) -> Iterator[Finding]:
    """Whether homes can be kept there: `home_dirs.make_home` refuses what is called a failure here."""
    if os.geteuid() == 0:
        for directory in users_base.parents:
            if _exists(directory) and (problem := _passage(directory)):
                yield problem
    try:
        found = users_base.lstat()
    except FileNotFoundError:
        yield _creatable("users_base", users_base, 0o711)
    except OSError as error:
        yield fail("users_base", f"{users_base}: {error.strerror}")
    else:
        yield _base(users_base, found)
    options = mount_options(str(users_base), mountinfo)
    if "noexec" in options:
        message = f"{users_base} is mounted noexec: tenants cannot execute programs of their own"
        yield warn("users_base.mount", message, f"mount -o remount,exec the file system of {users_base}")
    if "nosuid" in options:
        message = f"{users_base} is mounted nosuid, which takes nothing from tenants: they run with no_new_privs anyway"
        yield ok("users_base.mount", message)


def check_quotas(settings: Settings) -> Iterator[Finding]:
    """Whether tenants' disk can be limited, and counted without a walk."""
    sources = [(settings, ""), *((tier, f" of tier {tier.name}") for tier in settings.tiers)]
    wanted = [name + of for source, of in sources for name in LEAST_DISK if getattr(source, name) not in (None, MAX)]
    if os.geteuid() != 0:
        if wanted:
            yield fail(
                "users_base.quota", f"{' and '.join(wanted)} cannot be enforced without root", "run it with sudo"
            )
        return
    base = settings.users_base
    with quotas_at(next(path for path in (base, *base.parents) if path.is_dir()).resolve()) as quotas:
        state, remedy = quotas.state, quotas.remedy()
    if state == "enforced":
        yield ok("users_base.quota", f"the file system of {base} holds each tenant to its disk quota, if it has one")
        return
    without = "only counts what users take" if state == "counted" else "has no user quotas"
    follows = f"{' and '.join(wanted)} cannot be enforced" if wanted else "one tenant can fill it"
    yield (fail if wanted else warn)("users_base.quota", f"the file system of {base} {without}: {follows}", remedy)


def _passage(directory: Path) -> Finding | None:
    found = directory.stat()
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != 0 or (mode & stat.S_IWOTH and not mode & stat.S_ISVTX):
        return fail(
            "users_base.parents",
            f"others than root can change {directory} (owner {found.st_uid}, mode {mode:04o})",
            f"chown root {directory}; chmod o-w {directory}; or choose another users_base",
        )
    if not mode & stat.S_IXOTH:
        return fail("users_base.parents", f"tenants cannot pass through {directory}", f"chmod o+x {directory}")
    return None


def _base(path: Path, found: os.stat_result) -> Finding:
    mode, uid = stat.S_IMODE(found.st_mode), os.geteuid()
    if not stat.S_ISDIR(found.st_mode):
        return fail("users_base", f"{path} is not a directory", "name a directory, not a link to one")
    if found.st_uid != uid or mode & 0o022:
        message = f"others can change {path} (owner {found.st_uid}, mode {mode:04o})"
        return fail("users_base", message, f"chown {uid} {path}; chmod 711 {path}")
    if uid == 0 and not mode & stat.S_IXOTH:
        return fail("users_base", f"tenants cannot pass through {path} (mode {mode:04o})", f"chmod 711 {path}")
    if mode & 0o044:
        return warn("users_base", f"{path} shows tenants each other's names (mode {mode:04o})", f"chmod 711 {path}")
    return ok("users_base", f"{path}, mode {mode:04o}")


def check_directories(settings: Settings) -> Iterator[Finding]:
    """Whether registry, logs and FIFOs are kept from everybody else."""
    for name in ("state_dir", "log_dir", "run_dir"):
        path: Path = getattr(settings, name)
        try:
            found = path.lstat()
        except FileNotFoundError:
            yield _creatable(name, path, 0o700)
            continue
        except OSError as error:
            yield fail(name, f"{path}: {error.strerror}")
            continue
        if not stat.S_ISDIR(found.st_mode):
            yield fail(name, f"{path} is not a directory", "name a directory, not a link to one")
        elif found.st_uid != os.geteuid() or found.st_mode & 0o077:
            message = f"{path} lets others in (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o})"
            yield fail(name, message, f"chown {os.geteuid()} {path}; chmod 700 {path}")
        else:
            yield ok(name, f"{path} is private")


def _creatable(name: str, path: Path, mode: int) -> Finding:
    above = next(directory for directory in path.parents if _exists(directory))
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK, effective_ids=True) and not _read_only(above):
        return ok(name, f"{path} is not there yet, and will be made with mode {mode:04o}")
    return fail(name, f"{path} is not there and cannot be made in {above}", f"install -d -m {mode:04o} {path}")


def _read_only(directory: Path) -> bool:
    return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True


def check_state(settings: Settings) -> Iterator[Finding]:
    """Whether the registry can be used."""
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        yield fail("sqlite", f"SQLite {version} is too old: 3.37 is needed", "use a Python with a newer SQLite")
        return
    yield ok("sqlite", f"SQLite {version}")
    path = settings.state_dir / "registry.db"
    if not _exists(path):
        yield ok("registry", "no registry yet: nobody has run anything")
        return
    try:
        with Registry(path) as registry:
            users, rows = registry.users.rows("ready"), registry.sandboxes.rows()
    except RunnerError as error:
        yield fail("registry", error.message, error.remedy)
    else:
        yield ok("registry", f"{path}: {len(users)} users, {len(rows)} sandboxes")
