"""A further program in a sandbox that runs already: born in its cgroup, as its tenant, heard and fed through pipes.

It is not the sandbox's first process, and has no log: what it prints goes to whoever had it executed. Whatever else it
is, it is a process of the sandbox: it counts against its limits, freezes with it, and ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from types import TracebackType
from typing import NamedTuple, Protocol, Self, TypeVar, TypeVarTuple

import anyio

from cgroups import Cgroup, CgroupError, GoneError

from .errors import StartError, StateError
from .exits import reap, reap_foreign
from .launcher import Started
from .models import IsolatedUser, IsolationReport
from .outcomes import ExitStatus
from .pipes import InputPipe, OutputPipe, make_pipe
from .program import launch_in_time
from .programs import launch_spec
from .specs import SandboxSpec
from .venv_layout import Venv
from .waiting import readable

__all__ = ["COLLECT_BYTES", "KILL_TIMEOUT", "Collected", "Execution", "Reaper", "execute"]

COLLECT_BYTES = 1 << 20
"""What `Execution.communicate` keeps of each output."""

KILL_TIMEOUT = 5.0
"""Seconds in which a program that was killed must have ended. It takes longer only if another process of the tenant's
traces it (ptrace(2)), or if it waits for a dead disk."""

CANCEL_PATIENCE = 0.5
"""Seconds that a cancelled caller waits for the end of what it had executed."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Reaper(Protocol):
    """What executions need of the process that they are the children of; `LoopHost` is one."""

    @property
    def unreaped(self) -> set[int]:
        """Children that cannot be reaped yet, see `reap_late`."""

    async def in_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Do what may block."""


class Collected(NamedTuple):
    """A program's end, and what it printed.

    Attributes:
        status: its exit code, or the signal that ended it.
        stdout, stderr: their first bytes, up to the limit.
        dropped: bytes beyond it, of both together.
    """

    status: ExitStatus
    stdout: bytes
    stderr: bytes
    dropped: int


class Execution:
    """A program that was executed in a running sandbox. Use it from the event loop that it was made on.

    A kill from here is for its whole process group: the program, and what it has started. What has left that, such as
    a daemon in a session of its own, stays a part of the sandbox, and ends with that. So does what a program leaves
    behind that ends by itself.

    With `async with` it has ended, killed if need be, when the block is left.

    Attributes:
        pid: its number, as this process sees it.
        isolation: what the launcher read back from the kernel just before `execve`; `limits` is empty, since those are
            the sandbox's.
        stdout, stderr: what it writes. One that is not read makes it wait when the pipe is full. They end with the
            program itself: what its descendants write later goes nowhere, and tells them so by SIGPIPE.
    """

    def __init__(
        self, host: Reaper, started: Started, stdin: InputPipe | None, stdout: OutputPipe, stderr: OutputPipe
    ) -> None:
        self.pid = started.pid
        self.isolation: IsolationReport = started.report
        self.stdout = stdout
        self.stderr = stderr
        self._host = host
        self._pidfd = started.pidfd
        self._stdin = stdin
        self._feeding: asyncio.Task[None] | None = None
        self._ended = False
        self._status: ExitStatus | None = None
        self._over = asyncio.Event()
        self._patience = anyio.CancelScope()
        self._watching = asyncio.create_task(self._see_end(), name=f"pactown-exec-{started.pid}")
        self._watching.add_done_callback(self._let_go)

    def __repr__(self) -> str:
        return f"<Execution {self.pid} {self._status or 'running'}>"

    # What can be done with it -----------------------------------------------------------------------------------

    async def send(self, data: bytes) -> None:
        """Write to its standard input, as fast as it reads.

        Raises:
            StateError: it was executed without `stdin=True`, has ended, or has closed its standard input.
        """
        await self._open_stdin().send(data)

    def close_stdin(self) -> None:
        """Give it end-of-file on its standard input."""
        if self._stdin is not None:
            self._stdin.close()

    def feed(self, data: bytes) -> None:
        """Write to its standard input, and close that, in the background; it need not read any of it.

        Raises:
            StateError: as `send`.
        """
        stdin = self._open_stdin()
        self._feeding = asyncio.create_task(_feed(stdin, data), name=f"pactown-feed-{self.pid}")

    def _open_stdin(self) -> InputPipe:
        if self._stdin is None or self._feeding is not None:
            raise StateError("its standard input is not open to be sent to", remedy="execute it with stdin=True")
        return self._stdin

    async def wait(self) -> ExitStatus:
        """Wait until it has ended. Its output can still be read afterwards.

        It is not waited for what it started, even if that has a pipe open. When cancelled, it kills the program first.

        Raises:
            StateError: it was killed, and cannot end, see `kill`.
        """
        try:
            await self._over.wait()
        except asyncio.CancelledError:
            await self._end_with_caller()
            raise
        if self._status is None:
            raise StateError(
                f"process {self.pid} was killed, and has not ended", remedy="stop the sandbox, which ends all of it"
            )
        return self._status

    async def kill(self) -> ExitStatus:
        """Kill it and what is in its process group, and return when it has ended; at once if it has.

        Raises:
            StateError: it has not ended after `KILL_TIMEOUT` seconds, see there. It never runs on, and is looked after
                no more from here; what is left of it ends with the sandbox.
        """
        self._kill()
        return await self.wait()

    async def communicate(self, input: bytes | None = None, *, limit: int = COLLECT_BYTES) -> Collected:  # noqa: A002
        """Feed it, read both outputs, and wait for its end. When cancelled, it kills the program first.

        Args:
            input: what to write to its standard input, which is then closed in any case.
            limit: bytes to keep of each output. What is beyond is read and counted, so that the program can go on.

        Raises:
            StateError: there is `input`, but the program was executed without `stdin=True`; or see `kill`.
        """
        if input is not None:
            self.feed(input)
        elif self._feeding is None:
            self.close_stdin()
        try:
            (out, more_out), (err, more_err) = await asyncio.gather(
                _collect(self.stdout, limit), _collect(self.stderr, limit)
            )
        except BaseException:
            await self._end_with_caller()
            raise
        return Collected(await self.wait(), out, err, more_out + more_err)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()
        with anyio.CancelScope(shield=True):
            await self._over.wait()

    # Its life ---------------------------------------------------------------------------------------------------

    def _kill(self) -> None:
        if not self._over.is_set():
            # The launcher made it the leader of a session, so that it can leave neither that nor its group. It is not
            # reaped before it was seen to have ended; if somebody else did, its number may be another's by now.
            with contextlib.suppress(ProcessLookupError):
                if not self._ended:
                    signal.pidfd_send_signal(self._pidfd, 0)
                    os.killpg(self.pid, signal.SIGKILL)
            now = asyncio.get_running_loop().time()
            self._patience.deadline = min(self._patience.deadline, now + KILL_TIMEOUT)

    async def _end_with_caller(self) -> None:
        self._kill()
        with anyio.move_on_after(CANCEL_PATIENCE, shield=True):
            await self._over.wait()

    async def _see_end(self) -> None:
        with self._patience:
            await readable(self._pidfd)
            self._ended = True
            self._patience.deadline = float("inf")
            self._status = await self._take_status()

    async def _take_status(self) -> ExitStatus:
        try:
            if (status := reap(self._pidfd)) is not None:
                return status
            # Another process traces it, and is shown its end first.
            self._host.unreaped.add(self.pid)
        except ChildProcessError:
            # Somebody reaped it although it was not his.
            pass
        try:
            return await self._host.in_thread(reap_foreign, self._pidfd, self.pid)
        except RuntimeError:  # the supervisor has ended, and its threads
            return ExitStatus()

    def _let_go(self, watching: asyncio.Task[None]) -> None:
        """Take what its pipes hold at its end, whoever else may have them, and close all that there is of it."""
        if self._status is None:
            # It does not end, or the loop does, and then nobody could look after it any more.
            self._kill()
            self._host.unreaped.add(self.pid)
        self.close_stdin()
        for stream in (self.stdout, self.stderr):
            stream.finish()
        os.close(self._pidfd)
        self._over.set()


async def _feed(stdin: InputPipe, data: bytes) -> None:
    # It need not read all of it, nor any.
    try:
        with contextlib.suppress(StateError):
            await stdin.send(data)
    finally:
        stdin.close()


async def _collect(stream: OutputPipe, limit: int) -> tuple[bytes, int]:
    kept, dropped = bytearray(), 0
    with contextlib.suppress(anyio.ClosedResourceError):
        async for chunk in stream:
            room = limit - len(kept)
            kept += chunk[:room]
            dropped += max(0, len(chunk) - room)
    return bytes(kept), dropped


async def execute(
    host: Reaper,
    user: IsolatedUser,
    spec: SandboxSpec,
    cgroup: Cgroup,
    argv: str | Sequence[str],
    *,
    first: int | None,
    stdin: bytes | bool | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | PurePosixPath | None = None,
    venv: Venv | None = None,
) -> Execution:
    """Execute a program in a running sandbox, as its tenant, and return when that is done.

    Cancelled, it leaves nothing of it behind.

    Args:
        host: reaps what cannot be reaped at once.
        user: the sandbox's tenant.
        spec: what the sandbox was started with. The program gets its environment and namespaces.
        cgroup: the sandbox's; stays the caller's, who may close it at any moment.
        argv: a string is run by `/bin/sh -c`, a sequence is executed as it is.
        first: a pidfd of the sandbox's first process, as long as which the sandbox lives, and whose namespaces are
            joined if it has any of its own; None if nobody knows it. Stays the caller's, as `cgroup` does.
        stdin: what the program reads; or True for a pipe to be fed through `Execution.send`; else it is `/dev/null`.
        env: added to the sandbox's environment.
        cwd: a directory relative to `sandboxes/<service_id>`, which is where it runs without; or absolute.
        venv: the environment of the sandbox's requirements.

    Raises:
        SpecError: `argv`, `env` or `cwd` can never be right.
        StateError: the sandbox has ended, is frozen, or nobody knows its first process.
        StartError: the program was not executed, or not in time, since the sandbox's own processes can hold it up;
            nothing of it is left.
        LauncherError: see `launch_async`.
    """
    wanted = replace(spec, command=argv, env={**spec.env, **(env or {})}, cwd=cwd)
    told = launch_spec(wanted, user, venv)
    with contextlib.ExitStack() as held, contextlib.ExitStack() as undo:
        try:
            target = _Target(spec.service_id, cgroup, first, held)
            pipes = _Pipes(user, held, undo, stdin=bool(stdin))
        except OSError as error:
            raise _no_resources(error) from error
        target.must_run()
        try:
            started = await launch_in_time(
                told,
                target.cgroup.fd,
                *pipes.theirs,
                member=target.first if spec.namespaces else None,
                unreaped=host.unreaped,
            )
        except StartError as error:
            raise target.understood(error) from error
        undo.pop_all()
        execution = Execution(host, started, pipes.stdin, pipes.stdout, pipes.stderr)
        await target.must_have(execution)
    if isinstance(stdin, bytes) and stdin:
        execution.feed(stdin)
    return execution


class _Target:
    """The sandbox in which something is to be executed, held by descriptors of its own.

    The sandbox may end at any moment, and then the numbers of its own descriptors stand for something else.
    """

    def __init__(self, service_id: str, cgroup: Cgroup, first: int | None, held: contextlib.ExitStack) -> None:
        if first is None:
            raise StateError(f"nobody knows the first process of {service_id!r}", remedy="restart the sandbox")
        self.cgroup = held.enter_context(Cgroup(os.dup(cgroup.fd), str(cgroup.path)))
        self.first = os.dup(first)
        held.callback(os.close, self.first)
        self._name = service_id
        self._end = select.poll()
        self._end.register(self.first, select.POLLIN)

    def must_run(self) -> None:
        """Raise `StateError` if it has ended or is frozen, and `StartError` if that cannot be told."""
        try:
            runs, frozen = self.cgroup.populated(), self.cgroup.frozen()
        except GoneError:
            runs = frozen = False
        except CgroupError as error:  # out of descriptors, say
            message = f"cannot execute a program: {error.message}"
            raise StartError(message, step="cgroup", errno=error.errno or 0, remedy=error.remedy) from error
        if not runs or self._end.poll(0):
            raise StateError(f"{self._name!r} has ended")
        if frozen:
            # What is born in it freezes itself before it can be executed.
            raise StateError(f"{self._name!r} is frozen", remedy="thaw it first")

    def understood(self, error: StartError) -> StartError:
        """Say what may have come of the sandbox's end, or of its being frozen, to be that (`StateError`)."""
        if error.step in ("clone3", "join", "launcher", "namespaces"):
            with contextlib.suppress(StartError):
                self.must_run()
        if error.step != "namespaces":
            return error
        return StartError(
            f"cannot join the namespaces of {self._name!r}: {os.strerror(error.errno).lower()}",
            step=error.step,
            errno=error.errno,
            remedy="it takes CAP_SYS_ADMIN and CAP_SYS_PTRACE" if error.errno == errno.EPERM else None,
        )

    async def must_have(self, execution: Execution) -> None:
        """See that a program that was executed is in it, and will end with it."""
        place = "/".join(("", *self.cgroup.path.parts[-2:]))
        cgroup = execution.isolation.cgroup or place
        if not cgroup.endswith(place):
            await execution.kill()
            raise StartError(f"it was placed in {cgroup}, not in {place}", step="readback")
        if self._end.poll(0):
            # Perhaps whoever ends the sandbox had looked for the last time before this program came into it. As long as
            # the first process lives, that look is still to come.
            with contextlib.suppress(CgroupError):
                self.cgroup.kill()
            with contextlib.suppress(StateError):
                await execution.kill()
            raise StateError(f"{self._name!r} has ended")


class _Pipes:
    """The pipes of a program that is to be started, one for each stream: `theirs`, and our ends.

    Args:
        held: closes theirs.
        undo: closes ours.
    """

    def __init__(self, user: IsolatedUser, held: contextlib.ExitStack, undo: contextlib.ExitStack, *, stdin: bool):
        self._ids = (user.linux_uid, user.linux_gid)
        self.stdin: InputPipe | None = None
        reads = subprocess.DEVNULL
        if stdin:
            reads, ours = make_pipe(*self._ids)
            held.callback(os.close, reads)
            self.stdin = InputPipe(ours)
            undo.callback(self.stdin.close)
        self.stdout, out = self._output(held, undo)
        self.stderr, err = self._output(held, undo)
        self.theirs = (reads, out, err)

    def _output(self, held: contextlib.ExitStack, undo: contextlib.ExitStack) -> tuple[OutputPipe, int]:
        ours, writes = make_pipe(*self._ids)
        held.callback(os.close, writes)
        stream = OutputPipe(ours)
        undo.callback(stream.finish)
        return stream, writes


def _no_resources(error: OSError) -> StartError:
    reason = (error.strerror or str(error)).lower()
    return StartError(f"cannot execute a program: {reason}", step="resources", errno=error.errno or 0)
