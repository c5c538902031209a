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
from asyncio.base_events import BaseEventLoop
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..errors import LauncherError, StartError
from ..models import IsolationReport
from .spec import LaunchSpec
from .status import Launched, StatusReader

__all__ = ["Call", "Started", "launch_async", "launch_popen", "launcher_path"]

_BINARY = Path(__file__).resolve().parent / "launch"
_READ_BYTES = 16384
T = TypeVar("T")


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


def launcher_path() -> Path:
    """Return where the launcher is.

    Raises:
        LauncherError: it is not there, or cannot be executed.
    """
    if not os.access(_BINARY, os.X_OK):
        raise LauncherError(
            f"the launcher {_BINARY} is {'not executable' if _BINARY.exists() else 'missing'}",
            remedy="install a C compiler and reinstall, or run `python -m pactown_runner.launcher.build`",
        )
    return _BINARY


class Call:
    """One call of the launcher: what it is executed with, and the pipe that it answers through.

    Attributes:
        argv: the launcher's own words. The program's are in the spec.
        pass_fds: what it inherits beyond 0, 1 and 2.
        status_fd: where its records are read. Not blocking.
        status: the records so far.

    Raises:
        SpecError: from the constructor, see `LaunchSpec.pack`.
        LauncherError: from the constructor: there is no launcher, or SIGCHLD is ignored.
    """

    def __init__(self, spec: LaunchSpec, cgroup_fd: int | None) -> None:
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            raise LauncherError(
                "SIGCHLD is ignored in this process, so that children cannot be waited for",
                remedy="set it to signal.SIG_DFL",
            )
        packed = spec.pack()
        path = str(launcher_path())
        self.status = StatusReader(spec)
        self.status_fd = self._status_write = self._spec_fd = -1
        try:
            self._spec_fd = os.memfd_create("pactown-launch", os.MFD_CLOEXEC)
            os.write(self._spec_fd, packed)
            self.status_fd, self._status_write = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self.status_fd, False)
        except OSError:
            self.close()
            raise
        self.pass_fds: tuple[int, ...] = (self._spec_fd, self._status_write)
        cgroup = "-1"
        if cgroup_fd is not None:
            self.pass_fds += (cgroup_fd,)
            cgroup = str(cgroup_fd)
        self.argv = (path, str(self._spec_fd), str(self._status_write), cgroup)

    def started(self) -> None:
        """Close what only the launcher needs, or the end of the pipe would never be seen."""
        for fd in (self._spec_fd, self._status_write):
            if fd >= 0:
                os.close(fd)
        self._spec_fd = self._status_write = -1

    def close(self) -> None:
        """Close whatever is still open. Closing twice is fine."""
        self.started()
        if self.status_fd >= 0:
            os.close(self.status_fd)
            self.status_fd = -1

    def read(self) -> bool:
        """Take what the pipe holds now. Return whether the start is decided."""
        while True:
            try:
                data = os.read(self.status_fd, _READ_BYTES)
            except BlockingIOError:
                return False
            if self.status.feed(data):
                return True


def launch_popen(
    spec: LaunchSpec,
    cgroup_fd: int | None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | None = None,
    stderr: int | None = None,
) -> tuple[subprocess.Popen[bytes], IsolationReport]:
    """Start a program and return a `Popen` of the program itself, not of the launcher. Safe in any thread.

    Args:
        cgroup_fd: the directory of the leaf to be born in; None places nowhere.
        stdin, stdout, stderr: as for `subprocess.Popen`.

    Raises:
        SpecError: see `LaunchSpec.pack`.
        LauncherError: the launcher is missing, or SIGCHLD is ignored.
        StartError: the program was not executed; nothing of it is left.
    """
    call = Call(spec, cgroup_fd)
    popen: subprocess.Popen[bytes] | None = None
    try:
        popen = _popen(call, stdin, stdout, stderr)
        call.started()
        end = select.poll()
        end.register(call.status_fd, 0)  # the end alone, not each record
        end.poll()
        call.read()
        popen.wait()
        launched = call.status.result()
        # From here on the object stands for the program, which is our own child just as the launcher was.
        popen.pid = launched.pid
        popen.returncode = None
    except BaseException:
        if popen is not None:
            _forget(call, popen)
        raise
    finally:
        call.close()
    return popen, launched.report


def _popen(call: Call, stdin: int | None, stdout: int | None, stderr: int | None) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(call.argv, stdin=stdin, stdout=stdout, stderr=stderr, env={}, pass_fds=call.pass_fds)
    except OSError as error:
        raise _no_launcher(error) from error


def _no_launcher(error: OSError) -> StartError:
    reason = (error.strerror or str(error)).lower()
    return StartError(f"cannot start the launcher: {reason}", step="launcher", errno=error.errno or 0)


def _forget(call: Call, popen: subprocess.Popen[bytes]) -> None:
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
    if call.status.pid:
        pidfd = os.pidfd_open(call.status.pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        finally:
            os.close(pidfd)


async def launch_async(
    spec: LaunchSpec,
    cgroup_fd: int | None,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
) -> Started:
    """Start a program without blocking the event loop, asyncio's own or uvloop.

    On asyncio's loop this is one `asyncio.create_subprocess_exec`. uvloop's spawn copies the page tables, so `Popen`,
    which does not, takes its place there.

    When cancelled, what was started is killed and reaped before `CancelledError` leaves here; what the program itself
    may have forked by then is the caller's to kill, through the cgroup. A tenant's own processes can stop a start
    half-way (SIGSTOP between `setresuid` and `execve`), so give it a time limit.

    Args:
        cgroup_fd: the directory of the leaf to be born in; None places nowhere.
        stdin, stdout, stderr: descriptors, or `subprocess.DEVNULL`.

    Raises:
        SpecError: see `LaunchSpec.pack`.
        LauncherError: the launcher is missing, or SIGCHLD is ignored.
        StartError: the program was not executed; nothing of it is left.
    """
    loop = asyncio.get_running_loop()
    call = Call(spec, cgroup_fd)
    try:
        if isinstance(loop, BaseEventLoop):
            launched = await _through_asyncio(call, stdin, stdout, stderr)
        else:
            launched = await _through_popen(call, stdin, stdout, stderr)
        return Started(launched.pid, os.pidfd_open(launched.pid), launched.report)
    except BaseException:
        await _finish(asyncio.ensure_future(_abandon(call)))
        raise
    finally:
        call.close()


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
        raise _no_launcher(error) from error
    finally:
        await _reap_launcher(spawn)
    return call.status.result()


async def _reap_launcher(spawn: asyncio.Future[asyncio.subprocess.Process]) -> None:
    try:
        launcher = await _finish(spawn)
    except OSError:  # there is none; the caller has, or will not miss, the reason
        return
    if launcher.returncode is None:
        try:
            await launcher.wait()
        except asyncio.CancelledError:
            await _finish(asyncio.ensure_future(launcher.wait()))
            raise


async def _through_popen(call: Call, stdin: int, stdout: int, stderr: int) -> Launched:
    launcher = _popen(call, stdin, stdout, stderr)
    call.started()
    try:
        await _decided(call)
    finally:
        # The parent half waits for nothing, so neither does this.
        launcher.wait()
    return call.status.result()


async def _decided(call: Call) -> None:
    """Wait until the program was executed, or will not be: until the pipe has ended."""
    # Each record would wake the loop, and only the end decides. Asked for no event, epoll tells of the end alone
    # (EPOLLHUP, epoll_ctl(2)), and an epoll descriptor is itself readable when it has something to tell.
    with select.epoll() as end:
        end.register(call.status_fd, 0)
        await _readable(end.fileno())
    call.read()


async def _abandon(call: Call) -> None:
    """Kill and reap the child of a call that failed or was cancelled, if there is one. The launcher has been reaped."""
    call.started()
    # Once the parent half has ended, the pipe holds the pid of the child, if there is one.
    if not call.status.ended:
        with contextlib.suppress(LauncherError):
            call.read()
    if not call.status.pid:
        return
    pidfd = os.pidfd_open(call.status.pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await _readable(pidfd)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - it has ended, as was waited for
    finally:
        os.close(pidfd)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def _finish(work: asyncio.Future[T]) -> T:
    """Wait for `work`, which no cancellation cuts short. One that comes meanwhile is raised afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    result = work.result()
    if cancelled is not None:
        raise cancelled
    return result
