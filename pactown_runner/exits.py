"""How a process ended: from its own parent's wait, or from whatever else the kernel still knows."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from pathlib import Path

from .outcomes import ExitStatus

__all__ = ["reap", "reap_foreign", "reap_late"]

_INFO = struct.Struct("<QQ11Ii")
"""`struct pidfd_info` as Linux 6.15 has it: mask, cgroup id, pids and ids, exit status as of `wait(2)`."""
_PIDFD_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_PIDFD_INFO_EXIT = 1 << 3

_CAP_SYS_PTRACE = 19

_PATIENCE = 0.1
"""Seconds for its parent, as a rule init, to reap what is not ours; only then does the kernel give the status away."""
_PAUSE = 0.001


def reap(pidfd: int) -> ExitStatus | None:
    """Take the exit status of a child of ours; None if it has not ended, or is not to be had yet.

    A process that another one traces is shown to its tracer first, and to its parent when that one lets go of it
    (ptrace(2)). So its end may be seen long before it can be waited for.

    Raises:
        ChildProcessError: it is not, or no longer, a child of ours.
    """
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    if ended is None:
        return None
    if ended.si_code == os.CLD_EXITED:
        return ExitStatus(exit_code=ended.si_status)
    return ExitStatus(signal=ended.si_status)


def reap_late(pids: set[int]) -> None:
    """Reap those of our children that can be reaped by now, and take them out of the set."""
    for pid in list(pids):
        try:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is None:
                continue
        except ChildProcessError:  # somebody else was faster
            pass
        pids.discard(pid)


def reap_foreign(pidfd: int, pid: int) -> ExitStatus:
    """Take the exit status of a process that has ended and cannot be waited for, if the kernel still tells; blocking.

    Args:
        pidfd: stays the caller's.
        pid: what the descriptor stands for, as long as it has not been reaped.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        status = _from_zombie(pidfd, pid)
        if status is None:
            status = _from_pidfd(pidfd)
        if status is not None:
            return _decode(status)
        if time.monotonic() > deadline:
            return ExitStatus()
        time.sleep(_PAUSE)


def _from_zombie(pidfd: int, pid: int) -> int | None:
    """What `/proc/PID/stat` says as long as nobody has reaped it: `proc_pid_stat(5)`, fields 3 and 52."""
    try:
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        # Asked afterwards: while it answers the number is not another process's.
        _is_there(pidfd)
    except OSError:
        return None
    return int(words[49]) if words[0] == b"Z" and _may_ptrace() else None


def _may_ptrace() -> bool:
    """Whether field 52 is the truth for everybody's processes: without CAP_SYS_PTRACE the kernel writes 0 there."""
    effective = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) & 1 << _CAP_SYS_PTRACE)


def _is_there(pidfd: int) -> None:
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:") and int(line.split()[1]) > 0:
            return
    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


def _from_pidfd(pidfd: int) -> int | None:
    asked = _INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13)
    try:
        fields = _INFO.unpack(fcntl.ioctl(pidfd, _PIDFD_GET_INFO, asked))
    except OSError:
        # Before Linux 6.15, or not reaped yet.
        return None
    return int(fields[-1]) if fields[0] & _PIDFD_INFO_EXIT else None


def _decode(status: int) -> ExitStatus:
    code = os.waitstatus_to_exitcode(status)
    return ExitStatus(exit_code=code) if code >= 0 else ExitStatus(signal=-code)
