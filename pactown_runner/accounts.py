"""Linux accounts: a login, a group and a home for each tenant, made with the host's own tools.

groupadd(8) and useradd(8) are asked for exactly one thing: this name, this uid, this gid, no password, no shell, no
supplementary group, no subordinate ids, no home. What they made is read back. Homes are made by `home_dirs`, since
useradd would fill them with whatever `/etc/skel` holds.

All of it, from choosing a uid to the last check, happens under one lock for the whole host, `Accounts.lock`: several
states may take their uids from the same ranges. Other programs that add users do not know that lock; they meet us at
the lock of `/etc/passwd` itself, and we wait for them there.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path

from .errors import AccountError
from .models import IsolatedUser
from .registry import UserRow

__all__ = ["MAX_NAME", "PREFIX", "Accounts"]

PREFIX = "pactown_"
"""Begins every tenant's login; the user's key follows."""

MAX_NAME = 32
"""Bytes in a login, useradd(8)."""

LOCK_PATIENCE = 30.0
"""Seconds to wait for another program that holds the lock of `/etc/passwd`."""

LOCK_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Seconds between two tries; the last one repeats. An ordinary useradd holds the lock for some 20 ms."""

TOOL_TIMEOUT = 60.0
"""Seconds after which a useradd that hangs, say on a name service, is given up."""

HOMED_UIDS = (60001, 60513)
"""systemd-homed gives these to its users on its own: https://systemd.io/UIDS-GIDS"""

_TOOL_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_LOCKED_CODES = frozenset({1, 10})  # cannot update passwd, cannot update group: see useradd(8), groupadd(8)
_NO_SUCH_NAME = 6
_USER_IS_BUSY = 8


class Accounts:
    """The accounts of one state on this host. All methods need root.

    Args:
        users_base: where the homes are.
        uid_ranges: first and last uid, inclusive.
        state_id: whose they are; its beginning is written into each login's comment field.
    """

    def __init__(
        self,
        users_base: Path,
        uid_ranges: Sequence[tuple[int, int]],
        state_id: str,
        *,
        etc: Path = Path("/etc"),
        homed_dir: Path = Path("/var/lib/systemd/home"),
    ) -> None:
        self._users_base = users_base
        self._uid_ranges = tuple(uid_ranges)
        self._comment = f"pactown {state_id[:16]}"
        self._etc = etc
        self._passwd_path = str(etc / "passwd")
        self._homed_dir = homed_dir
        self._shell = next(
            (shell for shell in ("/usr/sbin/nologin", "/sbin/nologin") if os.path.exists(shell)), "/bin/false"
        )
        self._passwd: tuple[tuple[int, ...], dict[str, IsolatedUser]] = ((), {})

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let nobody else on this host, of whatever state, make or delete accounts meanwhile.

        The file is the one that lckpwdf(3) uses: it is root's alone, and wherever `/etc/passwd` is shared, so is
        it. lckpwdf takes the other kind of lock, fcntl(2), so that the tools that we start do not wait for us.

        Raises:
            AccountError: others than root can open the file, and so hold the lock for ever.
        """
        path = self._etc / ".pwd.lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise AccountError(f"cannot lock the host's accounts: {error}") from error
        try:
            found = os.fstat(fd)
            if found.st_uid != 0 or found.st_mode & 0o077:
                raise AccountError(f"{path} is open to others", remedy=f"chown root {path}; chmod 600 {path}")
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def knows(self, name: str) -> bool:
        """Whether this host has a login or a group of this name, from whatever source."""
        return _login(name) is not None or _group(name) is not None

    def free_uid(self, unused: Callable[[int, int], Iterator[range]]) -> int:
        """A uid that is nobody's in the registry, nor anything to this host: no uid, gid or subordinate id.

        Call it, and use the answer, under `lock`.

        Args:
            unused: `Registry.unused_uids`. What it tells first of each range is tried before all else.

        Raises:
            AccountError: the ranges are exhausted.
        """
        taken = {number for login in pwd.getpwall() for number in (login.pw_uid, login.pw_gid)}
        taken |= {group.gr_gid for group in grp.getgrall()}
        ranges = self._ranges()
        subordinate = [one for one in self._subordinate_ranges() if any(_overlap(one, our) for our in ranges)]
        inside = [unused(first, last) for first, last in ranges]
        for uid in chain.from_iterable(chain((next(above) for above in inside), *inside)):
            if uid in taken or any(low <= uid <= high for low, high in subordinate):
                continue
            # Name services such as LDAP answer for ids that they do not list.
            if not _names_of(uid):
                return uid
        raise AccountError(
            f"no uid is free in {', '.join(f'{first}-{last}' for first, last in ranges) or 'no range'}",
            remedy="widen uid_ranges in the settings",
        )

    def _ranges(self) -> list[tuple[int, int]]:
        in_use = self._homed_dir.exists()
        return [one for one in self._uid_ranges if not (in_use and _overlap(one, HOMED_UIDS))]

    def _subordinate_ranges(self) -> Iterator[tuple[int, int]]:
        """What user namespaces map into, subuid(5) and subgid(5): such files can be anybody's."""
        for name in ("subuid", "subgid"):
            with contextlib.suppress(FileNotFoundError):
                for line in (self._etc / name).read_text(errors="replace").splitlines():
                    match line.split(":"):
                        case [_, start, count] if start.isdecimal() and count.isdecimal():
                            yield int(start), int(start) + int(count) - 1

    def create(self, row: UserRow) -> None:
        """Make the group and the login that `row` names, or what is missing of them, and read them back.

        Call it under `lock`. Calling it again is harmless.

        Raises:
            AccountError: a tool failed or is missing, or the name or the uid is somebody else's.
        """
        name, gid = row.username, str(row.gid)
        _make(self._group_is_there, row, ["groupadd", "--gid", gid, "--", name])
        options = {
            "--uid": str(row.uid),
            "--gid": gid,
            "--groups": "",
            "--home-dir": str(row.home),
            "--shell": self._shell,
            "--comment": self._comment,
        }
        command = ["useradd", "--no-create-home", "--no-user-group", "--no-log-init"]
        command += ["-K", "SUB_UID_COUNT=0", "-K", "SUB_GID_COUNT=0"]
        command += [word for option in options.items() for word in option]
        _make(self._login_is_there, row, [*command, "--", name])
        if pwd.getpwnam(name).pw_shell != self._shell:
            raise AccountError(f"login {name} has another shell than {self._shell}", remedy="remove the login")
        groups = os.getgrouplist(name, row.gid)
        if groups != [row.gid]:
            raise AccountError(
                f"login {name} has supplementary groups {sorted(set(groups) - {row.gid})}",
                remedy="see GROUPS in /etc/default/useradd, and what name services add",
            )

    def clashes(self, row: UserRow) -> bool:
        """Whether the name, uid or gid of `row` is somebody else's by now. Only `lock` keeps it from changing."""
        login, group = _login(row.username), _group(row.username)
        return (
            (login is not None and _identity(login) != self._wanted(row))
            or (group is not None and group.gr_gid != row.gid)
            or not _names_of(row.uid) <= {row.username}
            or not _names_of(row.gid) <= {row.username}
        )

    def _wanted(self, row: UserRow) -> tuple[int, int, str, str]:
        return row.uid, row.gid, str(row.home), self._comment

    def _group_is_there(self, row: UserRow) -> bool:
        group = _group(row.username)
        if group is None:
            return False
        if group.gr_gid != row.gid or group.gr_mem:
            raise AccountError(
                f"group {row.username} has gid {group.gr_gid} and members {group.gr_mem}, and should have gid "
                f"{row.gid} and none",
                remedy="it is not ours; remove it, or take the user out of the registry",
            )
        return True

    def _login_is_there(self, row: UserRow) -> bool:
        login = _login(row.username)
        if login is None:
            return False
        have, want = _identity(login), self._wanted(row)
        if have != want:
            raise AccountError(
                f"login {row.username} is {have}, and should be {want}",
                remedy="it is not ours; remove it, or take the user out of the registry",
            )
        return True

    def verify(self, user: IsolatedUser) -> None:
        """See that the login still is what the registry says: name, uid, gid, home, and the uid is its alone.

        While `/etc/passwd` is untouched this is one stat(2); else it reads the file.

        Raises:
            AccountError: it is not.
        """
        # The stamp is older than what is read next, so a change in between is seen by the next call.
        stamp = self._stamp()
        if stamp != self._passwd[0]:
            self._passwd = (stamp, {})
        seen = self._passwd[1]
        if seen.get(user.linux_username) == user:
            return
        login = _login(user.linux_username)
        want = (user.linux_uid, user.linux_gid, str(user.home_dir))
        have = (login.pw_uid, login.pw_gid, login.pw_dir) if login else None
        if have != want:
            raise AccountError(
                f"login {user.linux_username} is {have or 'gone'}, and should be {want}",
                remedy="put it back into /etc/passwd as it was, or purge the user",
            )
        others = self._logins_of(user.linux_uid) - {user.linux_username}
        if others:
            raise AccountError(
                f"uid {user.linux_uid} of {user.linux_username} is also that of login {', '.join(sorted(others))}",
                remedy="give it another uid",
            )
        seen[user.linux_username] = user

    def _logins_of(self, uid: int) -> set[str]:
        """All logins of this uid. Of several, getpwuid(3) knows the first; the others are in the file."""
        try:
            lines = Path(self._passwd_path).read_bytes()
        except OSError as error:
            raise AccountError(f"cannot look at the host's accounts: {error}") from error
        found = re.findall(rb"^([^:\n]*):[^:\n]*:0*%d:" % uid, lines, re.MULTILINE)
        names = set(map(os.fsdecode, found))
        with contextlib.suppress(KeyError):
            names.add(pwd.getpwuid(uid).pw_name)
        return names

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._passwd_path)
        except OSError as error:
            raise AccountError(f"cannot look at the host's accounts: {error}") from error
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def check_ours(self, row: UserRow) -> None:
        """See that login, group and uid are what we made, or gone, and nobody else's. Only `lock` keeps it so.

        Raises:
            AccountError: they are not; so what carries the uid may be somebody else's.
        """
        login, group = _login(row.username), _group(row.username)
        if (login is not None and _identity(login) != self._wanted(row)) or (group and group.gr_gid != row.gid):
            raise AccountError(
                f"login {row.username} is {login and _identity(login)}, gid {group and group.gr_gid}, and should be "
                f"{self._wanted(row)}",
                remedy="put it back into /etc/passwd and /etc/group as it was; or it is not ours: leave it alone",
            )
        others = (self._logins_of(row.uid) | _names_of(row.uid) | _names_of(row.gid)) - {row.username}
        if others:
            raise AccountError(
                f"uid {row.uid} of {row.username} is also that of {', '.join(sorted(others))}",
                remedy="give that login or group another number",
            )

    def delete(self, row: UserRow) -> None:
        """Delete the login and its group, not the home. Call it under `lock`; calling it again is harmless.

        Raises:
            AccountError: the login is not ours, a process still runs under its uid, or a tool failed.
        """
        name = row.username
        if self._login_is_there(row):
            done = _run(["userdel", "--", name])
            if done.returncode == _USER_IS_BUSY:
                raise AccountError(
                    f"cannot delete login {name}: {done.stderr.strip()}", remedy="stop all that runs under its uid"
                )
            _check_gone(done)
        # userdel takes the group along, but not where USERGROUPS_ENAB is off.
        if self._group_is_there(row):
            _check_gone(_run(["groupdel", "--", name]))


# ---- The host's tools


def _make(is_there: Callable[[UserRow], bool], row: UserRow, command: list[str]) -> None:
    if is_there(row):
        return
    done = _run(command)
    # A tool that failed as the name is in use: one that a killed process of ours had started was faster.
    if not is_there(row):
        raise _failed(done)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    program = shutil.which(command[0], path=_TOOL_PATH)
    if program is None:
        raise AccountError(
            f"cannot find {command[0]}", remedy="install the package passwd (Debian) or shadow-utils (Fedora)"
        )
    deadline = time.monotonic() + LOCK_PATIENCE
    for pause in chain(LOCK_PAUSES, repeat(LOCK_PAUSES[-1])):
        try:
            done = subprocess.run(
                [program, *command[1:]],
                check=False,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                cwd="/",
                env={"PATH": _TOOL_PATH, "LC_ALL": "C"},  # messages are read below
                timeout=TOOL_TIMEOUT,
                start_new_session=True,  # control-C must not hit it between two files
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise AccountError(f"cannot run {command[0]}: {error}") from error
        is_locked = done.returncode in _LOCKED_CODES and "lock" in done.stderr
        if not is_locked or time.monotonic() > deadline:
            return done
        time.sleep(pause)
    raise AssertionError  # repeat has no end


def _check_gone(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode not in {0, _NO_SUCH_NAME}:
        raise _failed(done)


def _failed(done: subprocess.CompletedProcess[str]) -> AccountError:
    said = " ".join(done.stderr.split()) or "without a word"
    return AccountError(f"{Path(done.args[0]).name} failed with {done.returncode}: {said}")


# ---- The host's answers


def _login(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _group(name: str) -> grp.struct_group | None:
    try:
        return grp.getgrnam(name)
    except KeyError:
        return None


def _identity(login: pwd.struct_passwd) -> tuple[int, int, str, str]:
    return login.pw_uid, login.pw_gid, login.pw_dir, login.pw_gecos


def _names_of(number: int) -> set[str]:
    """The login and the group that have this number."""
    names = set()
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(number).pw_name)
    with contextlib.suppress(KeyError):
        names.add(grp.getgrgid(number).gr_name)
    return names


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]
