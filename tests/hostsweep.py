"""What a test run can leave on a host, found by whose it is, and removed.

Standard library only, and nothing of the code under test: what is broken there must not blind the search.

Everything that a run makes outside its own directory bears its mark: a name that begins with the run's name,
a uid or gid of the block that the run holds, or, for a process, the run's name in its environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

RUN_VARIABLE = "HOSTGUARD_RUN"
"""Set in the environment of every program that a test starts without choosing its environment."""

PLACES = tuple(
    Path(place)
    for place in (
        "/run", "/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue", "/home", "/var/lib", "/var/log", "/var/mail",
        "/var/spool/cron/crontabs",
    )
)  # fmt: skip
_UMOUNT_DETACH = 2
_IPC_RMID = 0
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Claim:
    """What marks a thing as made by one run: the beginning of its name, or a uid or gid of its block."""

    prefix: str
    first_uid: int
    last_uid: int

    def owns_name(self, name: str) -> bool:
        return name.startswith(self.prefix)

    def owns_id(self, number: int) -> bool:
        return self.first_uid <= number <= self.last_uid


@dataclass(frozen=True)
class Leak:
    """One thing that is still there, and how it is removed."""

    what: str
    remove: Callable[[], None]


def find(claim: Claim) -> list[Leak]:
    """Everything of this claim on the host, in the order in which it can be removed."""
    finders = (cgroups, processes, mounts, accounts, ipc_objects, files)
    return [leak for finder in finders for leak in finder(claim)]


def sweep(look: Callable[[], Iterable[Leak]], rounds: int = 3) -> tuple[list[str], list[str]]:
    """Remove all that `look` finds, until it finds nothing: what was removed, and what could not be.

    What is dying may still make something, so one look is not enough.
    """
    removed: dict[str, None] = {}
    failed: list[str] = []
    for _ in range(rounds):
        leaks = list(look())
        failed = []
        for leak in leaks:
            try:
                leak.remove()
            except (OSError, subprocess.SubprocessError) as error:
                failed.append(f"{leak.what}: {error}")
            else:
                removed[leak.what] = None
        if not leaks:
            break
    return list(removed), failed


# ---- Cgroups


def cgroup2_mounts() -> list[Path]:
    """Where cgroup v2 is mounted, cgroup_namespaces(7) and proc_pid_mountinfo(5)."""
    return [Path(where) for where, kind in _mountinfo() if kind == "cgroup2"]


def cgroup_dirs(matches: Callable[[str], bool]) -> Iterator[Path]:
    """The topmost cgroups whose name matches."""
    for mount in cgroup2_mounts():
        for directory, names, _ in os.walk(mount):
            for name in [name for name in names if matches(name)]:
                names.remove(name)
                yield Path(directory, name)


def cgroups(claim: Claim) -> Iterator[Leak]:
    for path in cgroup_dirs(claim.owns_name):
        yield Leak(f"cgroup {path}", partial(remove_cgroup, path))


def top_cgroups(claim: Claim) -> Iterator[Leak]:
    """Those at the very top of the tree, found with one look at one directory."""
    for mount in cgroup2_mounts():
        for entry in _entries(mount):
            if claim.owns_name(entry.name):
                yield Leak(f"cgroup {entry.path}", partial(remove_cgroup, Path(entry.path)))


def remove_cgroup(path: Path, timeout: float = 10) -> None:
    """Kill everything in a cgroup and remove it with all below it; fine if it is gone."""
    deadline = time.monotonic() + timeout
    _step_out_of(path)
    try:
        events = os.open(path / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        (path / "cgroup.kill").write_text("1")
        poller = select.poll()
        poller.register(events, select.POLLPRI)
        while b"populated 1" in os.pread(events, 4096, 0):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} is still populated {timeout} s after cgroup.kill")
            poller.poll(1000)
    finally:
        os.close(events)
    for directory, _, _ in os.walk(path, topdown=False):
        _rmdir_cgroup(directory, deadline)


def _step_out_of(path: Path) -> None:
    # A test may have moved this very process into its tree, and `cgroup.kill` spares nobody.
    for mount in cgroup2_mounts():
        ours = Path("/proc/self/cgroup").read_text().partition("0::/")[2].partition("\n")[0]
        if path.is_relative_to(mount) and (mount / ours).is_relative_to(path):
            (path.parent / "cgroup.procs").write_text("0")


def _rmdir_cgroup(directory: str, deadline: float) -> None:
    # EBUSY for a moment after the last process: it is off the list, but not yet wholly dead.
    while True:
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)
        else:
            return


# ---- Processes


def processes(claim: Claim) -> Iterator[Leak]:
    for pid in _pids():
        if pid != os.getpid() and _is_process_of(claim, pid):
            yield Leak(f"process {pid}: {_command(pid)}", partial(_kill, pid, lambda pid: _is_process_of(claim, pid)))


def children() -> Iterator[Leak]:
    """This process's own children, dead ones that nobody has waited for among them."""
    for pid in _pids():
        # multiprocessing keeps its tracker for the life of the interpreter, and the two end together.
        if _is_our_child(pid) and "multiprocessing.resource_tracker" not in _command(pid):
            yield Leak(f"process {pid}: {_command(pid)}", partial(_kill, pid, _is_our_child))


def _is_our_child(pid: int) -> bool:
    return _status(pid).get("PPid") == [str(os.getpid())]


def _is_process_of(claim: Claim, pid: int) -> bool:
    status = _status(pid)
    if status.get("State", ["Z"])[0] == "Z":  # dead, and for its parent to wait for
        return False
    uids = [int(uid) for uid in status["Uid"]]
    if any(claim.owns_id(uid) for uid in uids):
        return True
    if uids[0] != os.getuid():
        return False
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return any(entry.startswith(f"{RUN_VARIABLE}={claim.prefix}".encode()) for entry in environ.split(b"\0"))


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _status(pid: int) -> dict[str, list[str]]:
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return {}
    return {name: rest.split() for name, _, rest in (line.partition(":") for line in text.splitlines())}


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return words[:120] or Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"


def _kill(pid: int, is_meant: Callable[[int], bool]) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        # The number may have become another's since it was read; from here on it cannot.
        if is_meant(pid):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], 10)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


# ---- Mounts


def _mountinfo() -> list[tuple[str, str]]:
    rows = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        where = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        rows.append((where, fields[fields.index("-") + 1]))
    return rows


def mounts(claim: Claim) -> Iterator[Leak]:
    for where, _ in reversed(_mountinfo()):
        if any(claim.owns_name(part) for part in where.split("/")):
            yield Leak(f"mount {where}", partial(_umount, where))


def _umount(where: str) -> None:
    if _libc.umount2(os.fsencode(where), _UMOUNT_DETACH) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), where)


# ---- Accounts


def names_and_ids(database: str) -> dict[str, int]:
    """Our names in `passwd` or `group`, with their numbers. From the file itself: nothing caches it."""
    rows = (line.split(":") for line in Path("/etc", database).read_text().splitlines())
    return {row[0]: int(row[2]) for row in rows if row[0].startswith("pactown_")}


def accounts(claim: Claim) -> Iterator[Leak]:
    for kind, database, command in (("login", "passwd", "userdel"), ("group", "group", "groupdel")):
        for name, number in names_and_ids(database).items():
            if claim.owns_id(number):
                yield Leak(f"{kind} {name} ({number})", partial(_delete_account, command, name, database, number))


def _delete_account(command: str, name: str, database: str, number: int, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    # `userdel` takes the group along, and then another run may take the name.
    while names_and_ids(database).get(name) == number:
        done = subprocess.run([command, name], capture_output=True, text=True, check=False)
        # 6: no such name (userdel takes its group along). 1, 10: another tool holds the lock.
        if done.returncode in {0, 6}:
            return
        if done.returncode not in {1, 10} or time.monotonic() > deadline:
            raise OSError(f"{command} {name} ended with {done.returncode}: {done.stderr.strip()}")
        time.sleep(0.05)


# ---- System V IPC objects, sysvipc(7)


def ipc_objects(claim: Claim) -> Iterator[Leak]:
    for kind, column in (("shm", "shmid"), ("msg", "msqid"), ("sem", "semid")):
        try:
            header, *rows = Path("/proc/sysvipc", kind).read_text().splitlines()
        except OSError:
            continue
        names = header.split()
        for row in rows:
            values = dict(zip(names, row.split(), strict=False))
            if claim.owns_id(int(values["uid"])) or claim.owns_id(int(values["cuid"])):
                number = int(values[column])
                yield Leak(f"{kind} object {number}", partial(_ipcrm, kind, number))


def _ipcrm(kind: str, number: int) -> None:
    remove = {"shm": _libc.shmctl, "msg": _libc.msgctl, "sem": _libc.semctl}[kind]
    arguments = (number, 0, _IPC_RMID, 0) if kind == "sem" else (number, _IPC_RMID, None)
    if remove(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ---- Files


def files(claim: Claim) -> Iterator[Leak]:
    for place in PLACES:
        for entry in _entries(place):
            try:
                owner = entry.stat(follow_symlinks=False).st_uid
            except FileNotFoundError:
                continue
            if claim.owns_id(owner) or (claim.owns_name(entry.name) and owner == os.geteuid()):
                yield Leak(f"file {entry.path}", partial(remove_file, entry.path))


def entries_named(beginning: str) -> list[str]:
    """Paths in the places of `PLACES` whose last part begins so."""
    return [entry.path for place in PLACES for entry in _entries(place) if entry.name.startswith(beginning)]


def _entries(place: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as found:
            return list(found)
    except OSError:
        return []


def remove_file(path: str | os.PathLike[str]) -> None:
    """Remove a file, or a directory with all that is in it; fine if it is gone."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        Path(path).unlink(missing_ok=True)
