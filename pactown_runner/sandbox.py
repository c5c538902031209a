"""One sandbox, from its claim in the registry to its `Outcome`: claim > cgroup > log > process.

Each is taken in this order and given back in the reverse one, whatever happens in between. The claim is the first and
the last, so that at any moment a row in the registry names everything of a sandbox that may exist. The whole life is
one coroutine that the supervisor runs as a task of its own: a caller that is cancelled while it waits takes nothing
down with it by halves.

What may block (SQLite, mkdir and rmdir in cgroupfs, FIFOs) is bundled into one hop to a worker thread before the
program starts, and one after it has ended. Starting it and waiting for it happen on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import anyio

from cgroups import CgroupError, FrozenTimeoutError, GoneError, Limits, Stats, WaitTimeoutError

from .errors import RunnerError, StartError, StateError
from .host import Host
from .launcher import DEFAULT_PATH, Directory, LaunchSpec, launch_async
from .logs import LogError, LogPaths, LogPump, read_log
from .models import IsolatedUser, IsolationReport, LogRecord, Outcome, Reason, SandboxSpec, State
from .outcomes import ExitStatus, outcome_of
from .registry import Kind, SandboxRow
from .trees import Main, apply_limits, slice_name

__all__ = ["Host", "Sandbox", "tenant_environment"]

_log = logging.getLogger(__name__)

START_TIMEOUT = 30.0
"""Seconds in which the launcher must have executed the program. It takes milliseconds."""

FREEZE_TIMEOUT = 10.0
"""Seconds in which the kernel must have frozen or thawed a sandbox. It waits for running system calls only."""


class Sandbox:
    """A process tree of one tenant's service: born in a cgroup of its own, and ended with it.

    Made by `Supervisor.start`; safe to use from the supervisor's event loop only.

    Attributes:
        spec: what was asked for.
        run_id: tells this run from earlier and later ones of the same service.
        kind: whether a successor of a dead supervisor keeps it (`service`) or ends it (`run`).
        started_at: seconds since the epoch.
    """

    def __init__(
        self,
        host: Host,
        spec: SandboxSpec,
        kind: Kind,
        on_end: Callable[[Sandbox], None],
        *,
        run_id: str | None = None,
    ) -> None:
        self.spec = spec
        self.kind: Kind = kind
        self.run_id = secrets.token_hex(8) if run_id is None else run_id
        self.started_at = time.time()
        self._host = host
        self._on_end = on_end
        self._state = State.STARTING
        self._started = anyio.Event()
        self._ended = anyio.Event()
        self._failure: Exception | None = None
        self._outcome: Outcome | None = None
        self._ending: Reason | None = None
        self._patience = anyio.CancelScope()
        self._pid = 0
        self._limits: dict[str, str] = {}
        self._isolation: IsolationReport | None = None
        self._pidfd: int | None = None
        self._survivors = 0
        self._began = time.monotonic()
        self._stdin: int | None = None

    def __repr__(self) -> str:
        return f"<Sandbox {self.spec.user_id}/{self.spec.service_id} {self._state}>"

    # What it is -------------------------------------------------------------------------------------------------

    @property
    def user_id(self) -> str:
        """The SaaS user's id."""
        return self.spec.user_id

    @property
    def service_id(self) -> str:
        """The service's id."""
        return self.spec.service_id

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._state

    @property
    def user(self) -> IsolatedUser:
        """The tenant that it runs as."""
        return self._user

    @property
    def pid(self) -> int:
        """The process id of its first process, as this supervisor sees it."""
        return self._pid

    @property
    def isolation(self) -> IsolationReport:
        """What the launcher read back from the kernel just before `execve`.

        Raises:
            StateError: it has not been started, or was adopted from a predecessor that died before it knew.
        """
        if self._isolation is None:
            raise StateError(f"nobody knows how {self!r} is isolated")
        return self._isolation

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, or None while anything of it runs."""
        return self._outcome

    # What can be done with it -----------------------------------------------------------------------------------

    async def started(self) -> None:
        """Return when the program has been executed.

        Raises:
            StartError: it could not be started; nothing is left of it.
            RunnerError: the sandbox could not be made.
        """
        await self._started.wait()
        if self._failure is not None:
            raise self._failure

    async def wait(self) -> Outcome:
        """Wait until nothing of it runs any more, its log is complete, and its cgroup is gone."""
        await self._ended.wait()
        if self._outcome is None:
            assert self._failure is not None
            raise self._failure
        return self._outcome

    async def stop(self, grace: float | None = None) -> Outcome:
        """Thaw it, send SIGTERM to each of its processes, and after `grace` seconds SIGKILL to what is left.

        Args:
            grace: seconds; None takes the spec's `stop_grace`, else the settings'.
        """
        if grace is None:
            grace = self._host.settings.stop_grace if self.spec.stop_grace is None else self.spec.stop_grace
        await self._started.wait()
        if not self._ended.is_set():
            # The deadline first: the life's own task enforces it, even if the caller goes away in the meantime.
            self._end_by(grace)
            if grace > 0:
                await self._host.in_thread(self._ask_to_end)
        return await self.wait()

    async def kill(self) -> Outcome:
        """Kill everything in it at once (`cgroup.kill`), and wait for the end."""
        return await self.stop(grace=0)

    async def freeze(self) -> None:
        """Stop it from running, and return when the kernel says that it is frozen. It cannot notice.

        Raises:
            StateError: it has ended, or did not freeze in time.
        """
        await self._refrigerate(State.FROZEN, self._cgroup.freeze)

    async def thaw(self) -> None:
        """Let a frozen sandbox run again.

        Raises:
            StateError: it has ended.
        """
        await self._refrigerate(State.RUNNING, self._cgroup.thaw)

    async def set_limits(self, limits: Limits) -> None:
        """Change limits while it runs. None fields stay as they are; all of them are changed, or none.

        Raises:
            LimitsError: one cannot be enforced here, or was refused by the kernel.
            StateError: it has ended.
        """
        self._must_live()
        held = await self._host.in_thread(apply_limits, self._cgroup, limits)
        self._limits |= held
        if self._isolation is not None:
            self._isolation = replace(self._isolation, limits=self._limits)

    async def stats(self) -> Stats:
        """What it uses now; after its end, what it used.

        Raises:
            StateError: it has ended, and its counters could not be read.
        """
        if self._outcome is not None and self._outcome.stats is not None:
            return self._outcome.stats
        self._must_live()
        return await self._host.in_thread(self._cgroup.stats)

    def logs(self, *, follow: bool = False, tail: int | None = None, since: int = 0) -> AsyncIterator[LogRecord]:
        """The service's log, over all its runs; with `follow` until this run has ended and all is read.

        Any number of readers may follow; a slow one delays neither the sandbox nor the others.

        Args:
            follow: go on as records arrive.
            tail: begin with the last so many records.
            since: begin behind the record of this sequence number.
        """
        log = self._pump.paths.log(self.service_id)
        return read_log(log, follow=follow, tail=tail, since_seq=since, feed=self._pump.feed)

    async def send(self, data: bytes) -> None:
        """Write to its standard input, as fast as it reads.

        Raises:
            StateError: it was started without `stdin`, has ended, or has closed its standard input.
        """
        if self._stdin is None:
            raise StateError("it has no open standard input", remedy="start it with stdin=True")
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                await anyio.wait_writable(self._stdin)
            except BrokenPipeError as error:
                raise StateError("the program has closed its standard input") from error

    def close_stdin(self) -> None:
        """Give it end-of-file on its standard input."""
        if self._stdin is not None:
            anyio.notify_closing(self._stdin)
            os.close(self._stdin)
            self._stdin = None

    # Its life ---------------------------------------------------------------------------------------------------

    async def live(self, found: SandboxRow | None = None) -> None:
        """Be made, run and end. With `found`, go on with what a dead owner left running.

        Never raises: what goes wrong is told to those who wait.
        """
        outcome: Outcome | None = None
        failure: Exception | None = None
        try:
            take = partial(self._take_over, found) if found else self._take
            held = await self._host.in_thread(take)
            try:
                if not found:
                    await self._launch()
                self._pump.start()
                self._state = State.RUNNING
                self._started.set()
                await self._first_exit()
            except RunnerError as error:
                failure = error
            outcome = await self._give_back(held)
        except Exception as error:
            if not isinstance(error, RunnerError):
                _log.exception("%r failed", self)
            failure = error
        except BaseException:
            # The loop is being torn down under us: nothing may be awaited, but nothing may go on running either.
            self._let_go()
            raise
        finally:
            self._outcome, self._failure = outcome if failure is None else None, failure
            self._state = State.ENDED
            self._on_end(self)
            self._started.set()
            self._ended.set()

    def _take(self) -> ExitStack:
        """Take the claim, the cgroup and the log, in a worker thread. What is returned gives them back."""
        host, spec = self._host, self.spec
        self._user = user = host.users.get_or_create(spec.user_id)
        with ExitStack() as held:
            row = SandboxRow(
                key=user.key,
                service_id=spec.service_id,
                run_id=self.run_id,
                owner=host.owner.owner_id,
                kind=self.kind,
                spec=spec.to_json() if self.kind == "service" else "{}",
                cgroup=f"{host.tree.root.path}/{slice_name(user.key)}/{spec.service_id}.scope",
                created_at=self.started_at,
            )
            host.registry.claim(row)
            held.callback(host.registry.release, user.key, spec.service_id, self.run_id)
            self._cgroup = held.enter_context(host.tree.scope(user.key, spec.service_id, self.run_id))
            held.callback(self._cgroup.remove)
            limits = spec.limits if spec.limits is not None else host.settings.default_limits
            self._limits = apply_limits(self._cgroup, limits)
            self._tenant_oom_before = host.tree.tenant_oom(user.key)
            self._pump = self._make_pump()
            self._pump.create()
            return held.pop_all()

    def _take_over(self, row: SandboxRow) -> ExitStack:
        """Take what a dead owner left running; the claim is ours already."""
        host = self._host
        user = host.users.get(self.spec.user_id)
        if user is None:
            raise StateError(f"{self!r} runs for a user who is not registered")
        self._user = user
        with ExitStack() as held:
            held.callback(host.registry.release, row.key, row.service_id, row.run_id)
            self._cgroup = held.enter_context(host.tree.open_scope(slice_name(row.key), f"{row.service_id}.scope"))
            held.callback(self._cgroup.remove)
            if (main := Main.read(self._cgroup)) is not None:
                self._pid, self._isolation = main.pid, main.isolation
                self._pidfd = main.pidfd()
            self._pump = self._make_pump()
            self._pump.adopt()
            return held.pop_all()

    def _make_pump(self) -> LogPump:
        settings, user = self._host.settings, self._user
        return LogPump(
            paths=LogPaths(settings.log_dir, settings.run_dir, user.key),
            user_id=user.saas_user_id,
            service_id=self.service_id,
            run_id=self.run_id,
            uid=user.linux_uid,
            gid=user.linux_gid,
            hub=self._host.hub,
        )

    async def _launch(self) -> None:
        """Start the program in its cgroup.

        Raises:
            StartError: it could not be started.
        """
        out, err = self._pump.child_fds
        stdin = asyncio.subprocess.DEVNULL
        if self.spec.stdin:
            stdin, self._stdin = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(self._stdin, False)
        try:
            with anyio.fail_after(START_TIMEOUT):
                launched = await launch_async(launch_spec(self.spec, self._user), self._cgroup.fd, stdin, out, err)
        except TimeoutError:
            # The tenant's own processes can stop the launcher's child once it has their uid.
            raise StartError(f"not executed after {START_TIMEOUT:g} s", step="launcher") from None
        finally:
            self._pump.close_child_fds()
            if stdin >= 0:
                os.close(stdin)
        self._pid, self._pidfd = launched.pid, launched.pidfd
        self._isolation = replace(launched.report, limits=self._limits)
        if self.kind == "service":
            Main.of(self._pid, self._isolation).mark(self._cgroup)

    async def _first_exit(self) -> None:
        """Wait until the program has exited, or its time is up; when asked to stop, for all of its processes."""
        if self.spec.timeout is not None:
            self._patience.deadline = anyio.current_time() + self.spec.timeout
        with self._patience:
            if self._pidfd is not None:
                await readable(self._pidfd)
            if self._ending is not None:
                await self._emptied()
        if self._patience.cancelled_caught and self._ending is None:
            self._ending = "timed-out"

    async def _emptied(self) -> None:
        """Wait for `populated 0`: nothing of it runs any more."""
        if not self._cgroup.populated():
            return
        with self._cgroup.watch(memory=False) as watch:
            while watch.current.populated:
                await readable(watch.fileno())
                watch.refresh()

    async def _give_back(self, held: ExitStack) -> Outcome:
        """End what is left, finish the log, and give back all that was taken."""
        if self._cgroup.populated():
            self._survivors = await self._host.in_thread(self._kill_rest)
            await self._emptied()
        ended = time.monotonic()
        self._state = State.STOPPING
        self.close_stdin()
        try:
            await self._pump.finish()
        except LogError as error:
            _log.error("log of %r is not complete: %s", self, error)
            self._pump.detach()
        return await self._host.in_thread(self._conclude, held, ended - self._began)

    def _conclude(self, held: ExitStack, wall_seconds: float) -> Outcome:
        """Read the last counters and give everything back, in a worker thread."""
        status = self._reap()
        stats = self._cgroup.stats()
        tenant_oom = self._tenant_oom_before != self._host.tree.tenant_oom(self._user.key)
        held.close()
        return outcome_of(
            status,
            asked=self._ending,
            stats=stats,
            tenant_oom=tenant_oom,
            survivors=self._survivors,
            wall_seconds=wall_seconds,
        )

    def _reap(self) -> ExitStatus:
        if self._pidfd is None:
            return ExitStatus()
        try:
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except ChildProcessError:
            # Not our child: a predecessor's, or somebody reaped it although it was not his.
            return ExitStatus()
        finally:
            os.close(self._pidfd)
            self._pidfd = None
        assert ended is not None
        if ended.si_code == os.CLD_EXITED:
            return ExitStatus(exit_code=ended.si_status)
        return ExitStatus(signal=ended.si_status)

    def _kill_rest(self) -> int:
        rest = len(self._cgroup.pids())
        self._cgroup.kill()
        return rest

    def _ask_to_end(self) -> None:
        """Thaw first: a frozen process acts on no signal but SIGKILL."""
        with contextlib.suppress(GoneError, FrozenTimeoutError, WaitTimeoutError):
            self._cgroup.thaw(FREEZE_TIMEOUT)
            self._cgroup.signal(signal.SIGTERM)

    def _end_by(self, grace: float) -> None:
        if self._ending is None:
            self._ending = "stopped"
        self._state = State.STOPPING
        self._patience.deadline = min(self._patience.deadline, anyio.current_time() + grace)

    async def _refrigerate(self, to: State, action: Callable[[float], None]) -> None:
        self._must_live()
        try:
            await self._host.in_thread(action, FREEZE_TIMEOUT)
        except CgroupError as error:
            raise StateError(error.message, remedy=error.remedy) from error
        if self._state in (State.RUNNING, State.FROZEN):
            self._state = to

    def _must_live(self) -> None:
        if self._state not in (State.RUNNING, State.FROZEN):
            raise StateError(f"sandbox {self.user_id}/{self.service_id} is {self._state}, not running")

    def _let_go(self) -> None:
        """End it without waiting; the registry keeps its row, and the next owner finishes what is left."""
        with contextlib.suppress(AttributeError, CgroupError):
            self._cgroup.kill()
        with contextlib.suppress(AttributeError):
            self._pump.detach()


async def readable(fd: int) -> None:
    """Wait until a descriptor can be read; without the checkpoints of `anyio.wait_readable`, at a third of its cost."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def launch_spec(spec: SandboxSpec, user: IsolatedUser) -> LaunchSpec:
    """What the launcher has to be told to run `spec` as `user`."""
    directories = [
        Directory(user.home_dir),
        Directory("sandboxes", make=True),
        Directory(spec.service_id, make=True),
    ]
    if spec.cwd is not None:
        directories.append(Directory(spec.cwd))
    return LaunchSpec(
        argv=spec.argv,
        mode="root" if os.geteuid() == 0 else "user",
        uid=user.linux_uid,
        gid=user.linux_gid,
        env={**tenant_environment(user), **spec.env},
        directories=directories,
        namespaces=spec.namespaces,
    )


def tenant_environment(user: IsolatedUser) -> dict[str, str]:
    """The environment that every program of a tenant begins with."""
    return {
        "PATH": DEFAULT_PATH,
        "HOME": str(user.home_dir),
        "USER": user.linux_username,
        "LOGNAME": user.linux_username,
        "SHELL": "/bin/sh",
        "LANG": "C.UTF-8",
    }
