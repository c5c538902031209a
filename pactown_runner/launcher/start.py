"""Start a program through the launcher: one call, synchronous or asynchronous, and what it leaves behind.

Both ways end with a child of this process, not yet reaped, whose pid is hence its own. Nothing else stays: the
launcher has been reaped, the memfd and the pipe are closed.

What this needs of the process that it runs in: SIGCHLD must not be ignored (`SIG_IGN` makes the kernel reap children
by itself, and a pid would mean nothing), nobody may reap children that he did not start (`waitpid(-1)`), and no other
thread may fork without `execve` meanwhile: such a child would hold the pipe open, and the end is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from asyncio.base_events import BaseEventLoop
from typing import NamedTuple

from ..errors import LauncherError, StartError
from ..models import IsolationReport
from ..waiting import finish, readable
from .call import Call, no_launcher
from .spec import LaunchSpec
from .status import Launched

__all__ = ["START_TIMEOUT", "Started", "launch_async", "launch_popen"]

START_TIMEOUT = 30.0
"""Seconds in which a program must have been executed. It takes milliseconds; but a tenant's own processes can stop a
start half-way."""

REAP_PATIENCE = 1.0
"""Seconds for the child of a call that is given up to end, killed, and to be reaped."""

_PAUSE = 0.005


class Started(NamedTuple):
    """A program that was executed.

    Attributes:
        pid: a child of this process, not yet reaped.
        pidfd: readable when it has ended; the caller's to reap (`os.waitid(os.P_PIDFD, ...)`) and to close.
        report: what the launcher read back; `limits` is left empty.
    """

    pid: int
    pidfd: int
    report: IsolationReport


def launch_popen(
    spec: LaunchSpec,
    cgroup_fd: int | None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | None = None,
    stderr: int | None = None,
    *,
    timeout: float = START_TIMEOUT,
    unreaped: set[int] | None = None,
) -> tuple[subprocess.Popen[bytes], IsolationReport]:
    """Start a program and return a `Popen` of the program itself, not of the launcher. Safe in any thread.

    Args:
        cgroup_fd: the directory of the leaf to be born in; None places nowhere.
        stdin, stdout, stderr: as for `subprocess.Popen`.
        timeout: seconds in which it must have been executed.
        unreaped: as for `launch_async`.

    Raises:
        SpecError: see `LaunchSpec.pack`.
        LauncherError: the launcher is missing, or SIGCHLD is ignored.
        StartError: the program was not executed, or not in time; nothing of it is left.
    """
    call = Call(spec, cgroup_fd)
    popen: subprocess.Popen[bytes] | None = None
    try:
        popen = _popen(call, stdin, stdout, stderr)
        call.started()
        end = select.poll()
        end.register(call.status_fd, 0)  # the end alone, not each record
        if not end.poll(timeout * 1000):
            raise StartError(f"not executed after {timeout:g} s", step="launcher")
        call.read()
        popen.wait()
        launched = call.status.result()
        # From here on the object stands for the program, which is our own child just as the launcher was.
        popen.pid = launched.pid
        popen.returncode = None
    except BaseException:
        if popen is not None:
            _forget(call, popen, set() if unreaped is None else unreaped)
        raise
    finally:
        call.close()
    return popen, launched.report


def _popen(call: Call, stdin: int | None, stdout: int | None, stderr: int | None) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(call.argv, stdin=stdin, stdout=stdout, stderr=stderr, env={}, pass_fds=call.pass_fds)
    except OSError as error:
        raise no_launcher(error) from error


def _forget(call: Call, popen: subprocess.Popen[bytes], unreaped: set[int]) -> None:
    """End and reap both halves of a call that failed or was interrupted, and close the program's pipes."""
    call.started()
    # Once the parent half has ended, the pipe holds the pid of the child, if there is one.
    popen.wait()
    for pipe in (popen.stdin, popen.stdout, popen.stderr):
        if pipe is not None:
            pipe.close()
    if not call.status.ended:
        with contextlib.suppress(LauncherError):
            call.read()
    pid = call.status.pid
    if not pid:
        return
    _kill_child(pid)
    deadline = time.monotonic() + REAP_PATIENCE
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG):
        if time.monotonic() > deadline:
            unreaped.add(pid)
            return
        time.sleep(_PAUSE)


def _kill_child(pid: int) -> None:
    # The number is the child's own as long as it is not reaped, which only we do; this raises if it was.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    os.kill(pid, signal.SIGKILL)


async def launch_async(
    spec: LaunchSpec,
    cgroup_fd: int | None,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
    *,
    member: int | None = None,
    unreaped: set[int] | None = None,
) -> Started:
    """Start a program without blocking the event loop, asyncio's own or uvloop.

    As a rule this is one `asyncio.create_subprocess_exec`; see `_spawns_cheaply`.

    When cancelled, what was started is killed and reaped before `CancelledError` leaves here; what the program itself
    may have forked by then is the caller's to kill, through the cgroup. A tenant's own processes can stop a start
    half-way (SIGSTOP between `setresuid` and `execve`), so give it a time limit. And as soon as the program has been
    executed they can trace it, and keep it from being reaped for as long as they like (ptrace(2)).

    Args:
        cgroup_fd: the directory of the leaf to be born in; None places nowhere.
        stdin, stdout, stderr: descriptors, or `subprocess.DEVNULL`.
        member: a pidfd. The spec's namespaces are joined, those of this process, instead of being unshared.
        unreaped: takes the child of a start that was given up, if it was killed and cannot be reaped yet.

    Raises:
        SpecError: see `LaunchSpec.pack`.
        LauncherError: the launcher is missing, or SIGCHLD is ignored.
        StartError: the program was not executed; nothing of it is left.
    """
    loop = asyncio.get_running_loop()
    call = Call(spec, cgroup_fd, member)
    try:
        if _spawns_cheaply(loop):
            launched = await _through_asyncio(call, stdin, stdout, stderr)
        else:
            launched = await _through_posix_spawn(call, stdin, stdout, stderr)
        return Started(launched.pid, _pidfd(launched.pid), launched.report)
    except BaseException:
        await finish(asyncio.ensure_future(_abandon(call, set() if unreaped is None else unreaped)))
        raise
    finally:
        call.close()


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise StartError(f"cannot watch the program: {reason}", step="pidfd", errno=error.errno or 0) from error


def _spawns_cheaply(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop's own spawn costs about what `os.posix_spawn` does, which else takes its place.

    asyncio of Python 3.11 starts a thread for each child, to wait for it: 0.3 ms. uvloop's spawn copies the page
    tables: 30 ms with 1 GiB resident. The child that matters is waited for by pidfd in any case.
    """
    return isinstance(loop, BaseEventLoop) and sys.version_info >= (3, 12)


async def _through_asyncio(call: Call, stdin: int, stdout: int, stderr: int) -> Launched:
    spawn = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *call.argv, stdin=stdin, stdout=stdout, stderr=stderr, env={}, pass_fds=call.pass_fds
        )
    )
    try:
        # When it is cancelled, asyncio kills what it started: the parent half, perhaps before it could tell the child's
        # pid. Then nobody would know whom to reap.
        await asyncio.shield(spawn)
        call.started()
        await _decided(call)
    except OSError as error:
        raise no_launcher(error) from error
    finally:
        await _reap_launcher(spawn)
    return call.status.result()


async def _reap_launcher(spawn: asyncio.Future[asyncio.subprocess.Process]) -> None:
    try:
        launcher = await finish(spawn)
    except OSError:  # there is none; the caller has, or will not miss, the reason
        return
    if launcher.returncode is None:
        try:
            await launcher.wait()
        except asyncio.CancelledError:
            await finish(asyncio.ensure_future(launcher.wait()))
            raise


async def _through_posix_spawn(call: Call, stdin: int, stdout: int, stderr: int) -> Launched:
    launcher = _posix_spawn(call, (stdin, stdout, stderr))
    call.started()
    try:
        await _decided(call)
    finally:
        # The parent half waits for nothing, so neither does this. A host may reap children that are not its own.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(launcher, 0)  # noqa: ASYNC222
    return call.status.result()


def _posix_spawn(call: Call, streams: tuple[int, int, int]) -> int:
    """Start the launcher, and return its pid; at two thirds of what `subprocess.Popen` costs."""
    if any(0 <= fd <= 2 for fd in (*streams, *call.pass_fds)):
        # One would be overwritten before it is copied: the host program runs with a standard stream closed.
        popen = _popen(call, *streams)
        popen.returncode = 0  # reaped by us, not by the object
        return popen.pid
    actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, to, os.devnull, os.O_RDWR, 0)
        if fd == subprocess.DEVNULL
        else (os.POSIX_SPAWN_DUP2, fd, to)
        for to, fd in enumerate(streams)
    ]
    # Copied onto itself, a descriptor stays open in the child, and in the child alone: posix_spawn_file_actions(3p).
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in call.pass_fds]
    try:
        return os.posix_spawn(call.argv[0], call.argv, {}, file_actions=actions)
    except OSError as error:
        raise no_launcher(error) from error


async def _decided(call: Call) -> None:
    """Wait until the program was executed, or will not be: until the pipe has ended."""
    # Each record would wake the loop, and only the end decides. Asked for no event, epoll tells of the end alone
    # (EPOLLHUP, epoll_ctl(2)), and an epoll descriptor is itself readable when it has something to tell.
    with select.epoll() as end:
        end.register(call.status_fd, 0)
        await readable(end.fileno())
    call.read()


async def _abandon(call: Call, unreaped: set[int]) -> None:
    """Kill and reap the child of a call that failed or was cancelled, if there is one. The launcher has been reaped."""
    call.started()
    # Once the parent half has ended, the pipe holds the pid of the child, if there is one.
    if not call.status.ended:
        with contextlib.suppress(LauncherError):
            call.read()
    pid = call.status.pid
    if not pid:
        return
    _kill_child(pid)
    deadline = time.monotonic() + REAP_PATIENCE
    with contextlib.suppress(OSError, TimeoutError):  # out of descriptors, say
        pidfd = os.pidfd_open(pid)
        try:
            async with asyncio.timeout(REAP_PATIENCE):
                await readable(pidfd)
        finally:
            os.close(pidfd)
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG):  # noqa: ASYNC222 - it does not wait
        if time.monotonic() > deadline:
            unreaped.add(pid)
            return
        await asyncio.sleep(_PAUSE)
