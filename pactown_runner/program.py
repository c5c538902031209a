"""A sandbox's first process: started by the launcher, or found; waited for by pidfd; fed through a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace

import anyio

from .errors import StartError, StateError
from .exits import reap, reap_foreign
from .holdings import Holdings
from .host import LoopHost
from .launcher import START_TIMEOUT, LaunchSpec, Started, launch_async
from .main_process import Main
from .models import IsolationReport
from .outcomes import ExitStatus
from .pipes import InputPipe, make_pipe
from .programs import launch_spec
from .specs import SandboxSpec
from .venv_layout import Venv
from .waiting import readable

__all__ = ["Program", "launch_in_time"]

REAP_TIMEOUT = 30.0
"""Seconds in which a process that was killed must be there to be reaped."""


class Program:
    """The first process of a sandbox.

    Attributes:
        pid: its number, as this supervisor sees it; 0 if there is none, or it is not known.
        isolation: what the launcher read back from the kernel just before `execve`, if it is known.
    """

    def __init__(self) -> None:
        self.pid = 0
        self.isolation: IsolationReport | None = None
        self._pidfd: int | None = None
        self._stdin: InputPipe | None = None

    @property
    def pidfd(self) -> int | None:
        """What stands for the process, until `status` or `close`; None if there is none, or it is not known."""
        return self._pidfd

    async def launch(
        self,
        spec: SandboxSpec,
        held: Holdings,
        *,
        venv: Venv | None = None,
        make_venv: Callable[[], Awaitable[None]] | None = None,
        unreaped: set[int] | None = None,
    ) -> None:
        """Start it in its cgroup.

        Args:
            venv: the environment of its requirements.
            make_venv: makes that, or sees that it is there. Called when the launcher could not enter it, or not find
                the program, which is then started once more.
            unreaped: see `launch_async`.

        Raises:
            StartError: it could not be started.
        """
        out, err = held.pump.child_fds
        stdin = asyncio.subprocess.DEVNULL
        if spec.stdin:
            stdin, ours = make_pipe(held.user.linux_uid, held.user.linux_gid)
            self._stdin = InputPipe(ours)
        try:
            told = launch_spec(spec, held.user, venv)
            try:
                started = await launch_in_time(told, held.cgroup.fd, stdin, out, err, unreaped=unreaped)
            except StartError as error:
                if make_venv is None or error.step not in ("directories", "execve"):
                    raise
                await make_venv()
                started = await launch_in_time(told, held.cgroup.fd, stdin, out, err, unreaped=unreaped)
        finally:
            held.pump.close_child_fds()
            if stdin >= 0:
                os.close(stdin)
        self.pid, self._pidfd = started.pid, started.pidfd
        if not (started.report.cgroup or held.place).endswith(held.place):
            raise StartError(f"it was placed in {started.report.cgroup}, not in {held.place}", step="readback")
        self.isolation = replace(started.report, limits=held.limits)

    def recognise(self, main: Main | None) -> None:
        """Go on with what a predecessor started; without a note of its own it is not known which it is."""
        if main is not None:
            self.pid, self.isolation, self._pidfd = main.pid, main.isolation, main.pidfd()

    async def exited(self) -> None:
        """Wait until it has exited; at once where nobody knows which it is."""
        if self._pidfd is not None:
            await readable(self._pidfd)

    def has_exited(self) -> bool:
        """Whether it has exited; False where nobody knows which it is."""
        if self._pidfd is None:
            return False
        end = select.poll()
        end.register(self._pidfd, select.POLLIN)
        return bool(end.poll(0))

    async def status(self, host: LoopHost) -> ExitStatus:
        """Take its exit status, once nothing of its sandbox runs any more."""
        if self._pidfd is None:
            return ExitStatus()
        try:
            return reap(self._pidfd) or await self._reap_patiently(host, self._pidfd)
        except ChildProcessError:
            # Not our child: a dead supervisor's, or somebody reaped it although it was not his.
            return await host.in_thread(reap_foreign, self._pidfd, self.pid)
        finally:
            self._close_pidfd()

    async def _reap_patiently(self, host: LoopHost, pidfd: int) -> ExitStatus:
        """Take the status of what is just ending, of what is shown to its tracer first, or of what escaped its end."""
        # Whoever moved it out of its cgroup took it from under the kill.
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        with anyio.move_on_after(REAP_TIMEOUT):
            await readable(pidfd)
        if (status := reap(pidfd)) is None:
            host.unreaped.add(self.pid)
            status = await host.in_thread(reap_foreign, pidfd, self.pid)
        return status

    def leave(self, host: LoopHost) -> None:
        """Let go of one that cannot be reaped now; the supervisor tries again."""
        if self._pidfd is not None:
            host.unreaped.add(self.pid)
        self.close()

    def close(self) -> None:
        """Close the descriptors."""
        self.close_stdin()
        self._close_pidfd()

    def _close_pidfd(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    async def send(self, data: bytes) -> None:
        """Write to its standard input, as fast as it reads.

        Raises:
            StateError: it has no open standard input, or has closed it.
        """
        if self._stdin is None:
            raise StateError("it has no open standard input", remedy="start it with stdin=True")
        await self._stdin.send(data)

    def close_stdin(self) -> None:
        """Give it end-of-file on its standard input."""
        if self._stdin is not None:
            self._stdin.close()


async def launch_in_time(
    spec: LaunchSpec,
    cgroup_fd: int,
    stdin: int,
    stdout: int,
    stderr: int,
    *,
    member: int | None = None,
    unreaped: set[int] | None = None,
) -> Started:
    """As `launch_async`, which a tenant can hold up; after `START_TIMEOUT` seconds it is a `StartError`."""
    try:
        async with asyncio.timeout(START_TIMEOUT):
            return await launch_async(spec, cgroup_fd, stdin, stdout, stderr, member=member, unreaped=unreaped)
    except TimeoutError:
        # The tenant's own processes can stop the launcher's child once it has their uid.
        raise StartError(f"not executed after {START_TIMEOUT:g} s", step="launcher") from None
