"""The processes of a cgroup: listing them, and signalling every one without ever hitting a stranger."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import files
from .directories import child_names, open_directory
from .errors import CgroupError, GoneError, NotSupportedError, WaitTimeoutError

__all__ = ["kill_tracers", "list_pids", "signal_all"]

_BATCH = 64  # pidfds held at one time, so that a crowd does not use up our descriptors
_MAX_ROUNDS = 50


def list_pids(dir_fd: int, *, recursive: bool = False) -> list[int]:
    """The processes of a cgroup, with those below it if asked for.

    A process that lies outside our pid namespace is listed as 0, as the kernel does.

    Raises:
        GoneError: the cgroup was removed; of those below it that is only the end of their processes.
    """
    pids = [int(word) for word in files.read(dir_fd, "cgroup.procs").split()]
    if recursive:
        for name in child_names(dir_fd):
            pids.extend(_child_pids(dir_fd, name))
    return pids


def _child_pids(dir_fd: int, name: str) -> list[int]:
    try:
        child = open_directory(name, dir_fd)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise files.translate(error, dir_fd, name) from error
    try:
        return list_pids(child, recursive=True)
    except GoneError:
        return []
    except NotSupportedError as error:
        # A threaded cgroup lists no processes; the domain that it belongs to lists them.
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
    finally:
        os.close(child)


def signal_all(dir_fd: int, number: int) -> int:
    """Send a signal to every process of a cgroup and below it; returns how many got it.

    Looks again until a look shows nobody new, so that children born meanwhile get it too. A process that
    forks faster than it can be signalled needs `cgroup.kill`.

    Raises:
        WaitTimeoutError: new processes kept appearing.
        NotSupportedError: a process lies outside our pid namespace.
        GoneError: the cgroup was removed.
        CgroupError: the kernel forbids it.
    """
    # By number: a number that comes back within these few milliseconds is passed over, never wrongly hit.
    done: set[int] = set()
    for _ in range(_MAX_ROUNDS):
        new = [pid for pid in list_pids(dir_fd, recursive=True) if pid not in done]
        if not new:
            return len(done)
        if 0 in new:
            raise NotSupportedError(
                f"cannot signal a process of {files.directory_path(dir_fd)}: it is outside our pid namespace",
                remedy="kill the whole cgroup instead",
            )
        for start in range(0, len(new), _BATCH):
            done.update(_signal_batch(dir_fd, new[start : start + _BATCH], number))
    raise WaitTimeoutError(
        f"cannot signal all of {files.directory_path(dir_fd)}: new processes keep appearing",
        remedy="freeze the cgroup first, or kill it as a whole",
    )


def kill_tracers(dir_fd: int, within_fd: int) -> int:
    """Kill what traces a process of one cgroup, ptrace(2), and is itself in another one; returns how many that were.

    Tracers of those tracers, and so on, are killed as well.

    Raises:
        GoneError: one of the two was removed.
        CgroupError: the kernel forbids it.
    """
    tracers: set[int] = set()
    new = _tracers_of(int(tid) for tid in files.read(dir_fd, "cgroup.threads").split())
    while new:
        tracers |= new
        new = {tracer for pid in new for tracer in _tracers_of(_threads_of(pid))} - tracers
    return sum(1 for _ in _signal_batch(within_fd, list(tracers), signal.SIGKILL))


def _threads_of(pid: int) -> Iterable[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _tracers_of(tids: Iterable[int]) -> set[int]:
    """Who traces these threads: proc_pid_status(5), which knows a thread by its own id as well."""
    found = set()
    for tid in tids:
        try:
            status = Path(f"/proc/{tid}/status").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        found.add(int(status.partition(b"\nTracerPid:")[2].split(maxsplit=1)[0]))
    return found - {0}


def _signal_batch(dir_fd: int, pids: list[int], number: int) -> Iterator[int]:
    held: dict[int, int] = {}
    try:
        for pid in pids:
            try:
                held[pid] = os.pidfd_open(pid)
            except (ProcessLookupError, FileNotFoundError):
                continue
        # The number may have changed hands before the descriptor was opened. If it is listed now, the
        # descriptor is either this very process or a dead one, to which a signal does nothing.
        still = frozenset(list_pids(dir_fd, recursive=True))
        for pid, fd in held.items():
            if pid in still and _send(fd, number, pid):
                yield pid
    finally:
        for fd in held.values():
            os.close(fd)


def _send(pidfd: int, number: int, pid: int) -> bool:
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    except OSError as error:
        raise CgroupError(
            f"cannot send signal {number} to process {pid}: {os.strerror(error.errno or 0)}",
            errno=error.errno,
        ) from error
    return True
