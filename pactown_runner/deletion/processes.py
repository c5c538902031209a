"""Every process of a uid, wherever on this host it runs, and its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator

from ..errors import StateError
from ..trees import END_TIMEOUT

__all__ = ["end_processes"]

_LOOK_AGAIN = 500
"""Milliseconds until the next look, in case something is not gone yet."""


def end_processes(uid: int, timeout: float = END_TIMEOUT) -> int:
    """Kill whatever has this uid, be it real, effective, saved or for files, until a look finds nothing that runs.

    Returns how many that were. What has ended and waits for its parent to take notice does not run. What forks and
    exits faster than one can look may be missed: only the kernel knows all at one moment, see `traces`.

    Raises:
        StateError: something still runs after `timeout` seconds.
    """
    if uid in (0, os.geteuid()):
        raise ValueError(f"the processes of uid {uid} are not a tenant's")
    deadline = time.monotonic() + timeout
    killed: set[int] = set()
    # One look may miss what is forked meanwhile: the last look is one that finds nothing.
    while found := dict(_running(uid)):
        try:
            for pidfd in found.values():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            killed.update(found)
            _wait(list(found.values()))
        finally:
            for pidfd in found.values():
                os.close(pidfd)
        if time.monotonic() > deadline:
            raise StateError(
                f"processes of uid {uid} were killed, and are not gone after {timeout:g} s: "
                f"{', '.join(map(str, sorted(found)))}"
            )
    return len(killed)


def _running(uid: int) -> Iterator[tuple[int, int]]:
    """Processes of this uid that run, by pid, each with a pidfd; the caller's to close."""
    for name in os.listdir("/proc"):
        if not (name.isdecimal() and _has_uid(name, uid)):
            continue
        pid = int(name)
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            # The number may be another's by now. What is read next is about whom the descriptor stands for, or that one
            # has ended, and no signal reaches anybody through it. A leader that has ended, though its other threads go
            # on, is `Z` in /proc and runs all the same: the descriptor knows.
            if _has_uid(name, uid) and not _poll([pidfd], 0):
                yield pid, pidfd
            else:
                os.close(pidfd)


def _has_uid(pid: str, uid: int) -> bool:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"%d" % uid in text.partition(b"\nUid:")[2].partition(b"\n")[0].split()


def _wait(pidfds: list[int]) -> None:
    """Wait until all have ended, or it is time to look again."""
    deadline = time.monotonic() + _LOOK_AGAIN / 1000
    while pidfds and (left := deadline - time.monotonic()) > 0:
        ended = _poll(pidfds, int(left * 1000) + 1)
        pidfds = [pidfd for pidfd in pidfds if pidfd not in ended]


def _poll(pidfds: list[int], milliseconds: int) -> set[int]:
    """Those that have ended, with all their threads."""
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    return {pidfd for pidfd, _ in poll.poll(milliseconds)}
