"""One sandbox, from its claim in the registry to its `Outcome`: claim > cgroup > log > process.

Each is taken in this order and given back in the reverse one, whatever happens in between. The claim is the first and
the last, so that at any moment a row in the registry names everything of a sandbox that may exist. The whole life is
one coroutine that the supervisor runs as a task of its own: a caller that is cancelled while it waits takes nothing
down with it by halves.

As a rule all of it happens on the loop: a claim, a cgroup and two FIFOs take 0.15 ms together, and handing them to a
worker thread and back would take as long again. What would have to wait there goes to a thread: a user or a slice that
has to be made first, a registry that somebody else is writing to. What remains, mkdir and rmdir in cgroupfs, waits for
others no longer than the `fork` that every start needs anyway: they take the same locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TypeVar

import anyio

from cgroups import Cgroup, CgroupError, ExistsError, GoneError, Limits, Stats

from .database import BusyError
from .errors import AccountError, NotFoundError, RunnerError, SpecError, StartError, StateError
from .exits import reap, reap_foreign
from .host import Host
from .launcher import DEFAULT_PATH, Directory, LaunchSpec, launch_async
from .logs import LogError, LogPaths, LogPump, read_log
from .main_process import Main
from .models import IsolatedUser, IsolationReport, LogRecord, Outcome, Reason, SandboxSpec, State
from .outcomes import ExitStatus, outcome_of
from .registry import Kind, Registry, SandboxRow
from .trees import slice_name

__all__ = ["Host", "Sandbox", "tenant_environment"]

_log = logging.getLogger(__name__)
T = TypeVar("T")

START_TIMEOUT = 30.0
"""Seconds in which the launcher must have executed the program. It takes milliseconds."""

FREEZE_TIMEOUT = 10.0
"""Seconds in which the kernel must have frozen or thawed a sandbox. It waits for running system calls only."""

KNOWN_USERS = 10_000
"""So many users are remembered, a few hundred bytes each."""

RETRY_PAUSE = 0.1
"""Seconds until the next try to end a sandbox, where that failed for want of descriptors, say."""


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
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._failure: Exception | None = None
        self._outcome: Outcome | None = None
        self._ending: Reason | None = None
        self._patience = anyio.CancelScope()
        self._pid = 0
        self._given_back = False
        self._found_frozen = False
        self._tenant_oom_before = 0
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

        Raises:
            SpecError: that is no number of seconds.
            StartError: it never ran.
        """
        if grace is None:
            grace = self._host.settings.stop_grace if self.spec.stop_grace is None else self.spec.stop_grace
        elif not 0 <= grace < float("inf"):
            raise SpecError(f"grace must be a number of seconds, 0 or more, not {grace!r}")
        await self._started.wait()
        if not self._given_back:
            # The deadline first: the life's own task enforces it, even if the caller goes away in the meantime.
            self._end_by(grace)
            if grace > 0:
                await self._on_cgroup(self._ask_to_end)
        return await self.wait()

    async def kill(self) -> Outcome:
        """Kill everything in it at once (`cgroup.kill`), and wait for the end."""
        return await self.stop(grace=0)

    async def freeze(self) -> None:
        """Stop it from running, and return when the kernel says that it is frozen. It cannot notice.

        Raises:
            StateError: it has ended, or did not freeze in time.
        """
        await self._refrigerate(State.FROZEN, lambda cgroup: cgroup.freeze(FREEZE_TIMEOUT))

    async def thaw(self) -> None:
        """Let a frozen sandbox run again.

        Raises:
            StateError: it has ended.
        """
        await self._refrigerate(State.RUNNING, lambda cgroup: cgroup.thaw(FREEZE_TIMEOUT))

    async def set_limits(self, limits: Limits) -> None:
        """Change limits while it runs. None fields stay as they are; all of them are changed, or none.

        Raises:
            LimitsError: one cannot be enforced here, or was refused by the kernel.
            StateError: it has ended.
        """
        self._must_live()
        try:
            held = await self._on_cgroup(lambda cgroup: self._host.tree.limit(self._user.key, cgroup, limits))
        except GoneError as error:
            raise self._wrong_state() from error
        self._limits |= held
        if self._isolation is not None:
            self._isolation = isolation = replace(self._isolation, limits=dict(self._limits))
            if self.kind == "service" and not self._given_back:
                await self._on_cgroup(lambda cgroup: Main.update(cgroup, isolation))

    async def stats(self) -> Stats:
        """What it uses now; after its end, what it used.

        Raises:
            StateError: it has ended, and its counters could not be read.
        """
        if self._outcome is not None and self._outcome.stats is not None:
            return self._outcome.stats
        if self._state is State.STARTING or self._given_back:
            raise self._wrong_state()
        try:
            return await self._on_cgroup(lambda cgroup: cgroup.stats(pressure=True))
        except GoneError as error:
            raise self._wrong_state() from error

    async def logs(
        self, *, follow: bool = False, tail: int | None = None, since: int = 0
    ) -> AsyncGenerator[LogRecord, None]:
        """What this run has printed; with `follow` until it has ended and all is read.

        Any number of readers may follow; a slow one delays neither the sandbox nor the others.

        Args:
            follow: go on as records arrive.
            tail: begin with the last so many records.
            since: begin behind the record of this sequence number.
        """
        await self.started()
        log, feed = self._pump.paths.log(self.service_id), self._pump.feed
        records = read_log(log, follow=follow, tail=tail, since_seq=since, run_id=self.run_id, feed=feed)
        async with contextlib.aclosing(records):
            async for record in records:
                yield record

    async def send(self, data: bytes) -> None:
        """Write to its standard input, as fast as it reads.

        Raises:
            StateError: it was started without `stdin`, has ended, or has closed its standard input.
        """
        view = memoryview(data)
        while True:
            if self._stdin is None:
                raise StateError(f"{self!r} has no open standard input", remedy="start it with stdin=True")
            if not view:
                return
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                # Closed by us meanwhile: the next turn says so.
                with contextlib.suppress(anyio.ClosedResourceError):
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
            if found:
                await self._host.in_thread(self._take_over, found)
            elif not self._take_at_once():
                await self._host.in_thread(self._take)
            try:
                if not found:
                    await self._launch()
                self._pump.start()
                self._state = State.FROZEN if self._found_frozen else State.RUNNING
                self._started.set()
                await self._first_exit()
            except Exception as error:
                failure = error
            outcome = await self._give_back()
        except Exception as error:
            failure = error
        except BaseException:
            # The loop is being torn down under us: nothing may be awaited, but nothing may go on running either.
            self._let_go()
            raise
        finally:
            if failure is not None:
                failure = self._understood(failure)
            self._outcome, self._failure = outcome if failure is None else None, failure
            self._state = State.ENDED
            self._on_end(self)
            self._started.set()
            self._ended.set()

    def _understood(self, error: Exception) -> Exception:
        """What the kernel refused on the way to a start is a failed start; what nobody foresaw is logged."""
        if isinstance(error, RunnerError):
            return error
        if isinstance(error, CgroupError | OSError) and not self._started.is_set():
            step = "cgroup" if isinstance(error, CgroupError) else "resources"
            remedy = error.remedy if isinstance(error, CgroupError) else None
            message = error.message if isinstance(error, CgroupError) else str(error)
            failed = StartError(f"cannot make the sandbox: {message}", step=step, errno=error.errno or 0, remedy=remedy)
            failed.__cause__ = error
            return failed
        _log.error("%r failed", self, exc_info=error)
        return error

    def _take_at_once(self) -> bool:
        """Take all that it needs; False, and nothing is taken, if something has to be waited for."""
        host = self._host
        try:
            user = host.known.get(self.spec.user_id)
            if user is None or not host.tree.has_slice(user.key):
                return False
            host.users.verify(user)
            self._take_for(user, host.quick)
        except (AccountError, BusyError, NotFoundError):
            # Perhaps the user was removed meanwhile. The long way makes it anew, or says what is wrong.
            return False
        return True

    def _take(self) -> None:
        """Take all that it needs; in a worker thread."""
        user = self._host.users.get_or_create(self.spec.user_id)
        self._take_for(user, self._host.registry)
        if len(self._host.known) >= KNOWN_USERS:
            self._host.known.clear()
        self._host.known[user.saas_user_id] = user

    def _take_for(self, user: IsolatedUser, registry: Registry) -> None:
        """Take the claim, the cgroup and the log, or nothing."""
        host, spec = self._host, self.spec
        self._user = user
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
            registry.claim(row)
            held.callback(host.registry.release, user.key, spec.service_id, self.run_id)
            self._cgroup = held.enter_context(self._make_cgroup())
            held.callback(self._remove_cgroup)
            limits = spec.limits if spec.limits is not None else host.settings.default_limits
            self._limits = host.tree.limit(user.key, self._cgroup, limits)
            self._tenant_oom_before = host.tree.tenant_oom(user.key)
            self._pump = self._make_pump()
            self._pump.create()
            held.pop_all()

    def _make_cgroup(self) -> Cgroup:
        tree, key = self._host.tree, self._user.key
        try:
            return tree.scope(key, self.service_id, self.run_id)
        except ExistsError:
            # The claim is ours, so what is there under this name is nobody's.
            tree.end_scope(slice_name(key), f"{self.service_id}.scope")
            return tree.scope(key, self.service_id, self.run_id)

    def _take_over(self, row: SandboxRow) -> None:
        """Take what a dead owner left running; the claim is ours already."""
        host = self._host
        user = host.users.get(self.spec.user_id)
        if user is None:
            raise StateError(f"{self!r} runs for a user who is not registered")
        self._user = user
        self.started_at = row.created_at
        self._began = time.monotonic() - max(0.0, time.time() - row.created_at)
        self._tenant_oom_before = host.tree.tenant_oom(user.key)
        with ExitStack() as held:
            # Should this fail, whoever called us ends what is left: it goes on running, and the claim stands.
            self._cgroup = held.enter_context(host.tree.open_scope(slice_name(row.key), f"{row.service_id}.scope"))
            if (main := Main.read(self._cgroup)) is not None:
                self._pid, self._isolation, self._limits = main.pid, main.isolation, dict(main.isolation.limits)
                self._pidfd = main.pidfd()
            self._found_frozen = self._cgroup.frozen()
            self._pump = self._make_pump()
            try:
                self._pump.adopt()
            except BaseException:
                self._close_pidfd()
                raise
            held.pop_all()

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
            if os.geteuid() == 0:
                # For programs that open /dev/stdin again.
                os.fchown(stdin, self._user.linux_uid, self._user.linux_gid)
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
            self._patience.deadline = anyio.current_time() + self._began + self.spec.timeout - time.monotonic()
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

    async def _give_back(self) -> Outcome:
        """End what is left, finish the log, and give back all that was taken."""
        # From here on nobody else uses the cgroup, which is about to go.
        self._given_back = True
        self._state = State.STOPPING
        await self._end_rest()
        ended = time.monotonic()
        self.close_stdin()
        try:
            await self._pump.finish()
        except (LogError, OSError) as error:
            _log.error("log of %r is not complete: %s", self, error)
            self._pump.detach()
        try:
            status = await self._exit_status()
            stats = self._last_stats()
            tenant_oom = self._tenant_oom_before != self._host.tree.tenant_oom(self._user.key)
        finally:
            self._remove_cgroup()
            await self._release()
        return outcome_of(
            status,
            asked=self._ending,
            stats=stats,
            tenant_oom=tenant_oom,
            survivors=self._survivors,
            wall_seconds=ended - self._began,
        )

    async def _exit_status(self) -> ExitStatus:
        if self._pidfd is None:
            return ExitStatus()
        try:
            return reap(self._pidfd)
        except ChildProcessError:
            # Not our child: a dead supervisor's, or somebody reaped it although it was not his.
            return await self._host.in_thread(reap_foreign, self._pidfd, self._pid)
        finally:
            self._close_pidfd()

    async def _release(self) -> None:
        claim = (self._user.key, self.service_id, self.run_id)
        try:
            self._host.quick.release(*claim)
        except BusyError:
            await self._host.in_thread(self._host.registry.release, *claim)

    async def _end_rest(self) -> None:
        """Kill what outlived the first process or its time. Returns only when nothing runs any more."""
        while True:
            try:
                if self._cgroup.populated():
                    self._survivors = await self._host.in_thread(self._kill_rest)
                    await self._emptied()
            except GoneError:
                return
            except (CgroupError, OSError) as error:
                # Such as too many open files. To give up would leave it running with nobody to know of it.
                _log.error("cannot end %r yet: %s", self, error)
                await anyio.sleep(RETRY_PAUSE)
            else:
                return

    def _last_stats(self) -> Stats:
        try:
            return self._cgroup.stats(pressure=True)
        except CgroupError as error:
            _log.error("cannot read the counters of %r: %s", self, error)
            return Stats()

    def _remove_cgroup(self) -> None:
        try:
            with self._cgroup as cgroup:
                cgroup.remove()
        except CgroupError as error:
            # Nothing runs in it. Whoever starts this service next tries again.
            _log.error("cannot remove the cgroup of %r: %s", self, error)

    def _close_pidfd(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _kill_rest(self) -> int:
        rest = len(self._cgroup.pids())
        self._cgroup.kill()
        return rest

    @staticmethod
    def _ask_to_end(cgroup: Cgroup) -> None:
        try:
            # Frozen, a process acts on no signal but SIGKILL; stopped, on none but SIGKILL and SIGCONT.
            cgroup.request_freeze(False)
            cgroup.signal(signal.SIGTERM)
            cgroup.signal(signal.SIGCONT)
        except GoneError:
            pass
        except CgroupError as error:
            # The grace time runs all the same, and what is left then is killed.
            _log.warning("not everything in %s could be asked to end: %s", cgroup.path, error)

    async def _on_cgroup(self, action: Callable[[Cgroup], T]) -> T:
        """Do something with the cgroup in a worker thread, where it is held by a descriptor of its own.

        The sandbox may end meanwhile, and its descriptor's number stand for another sandbox's cgroup.
        """
        own = Cgroup(os.dup(self._cgroup.fd), str(self._cgroup.path))

        def act() -> T:
            with own:
                return action(own)

        return await asyncio.shield(self._host.in_thread(act))

    def _end_by(self, grace: float) -> None:
        if self._ending is None:
            self._ending = "stopped"
        self._state = State.STOPPING
        self._patience.deadline = min(self._patience.deadline, anyio.current_time() + grace)

    async def _refrigerate(self, to: State, action: Callable[[Cgroup], None]) -> None:
        self._must_live()
        try:
            await self._on_cgroup(action)
        except CgroupError as error:
            raise StateError(error.message, remedy=error.remedy) from error
        if self._state in (State.RUNNING, State.FROZEN):
            self._state = to

    def _must_live(self) -> None:
        if self._state not in (State.RUNNING, State.FROZEN):
            raise self._wrong_state()

    def _wrong_state(self) -> StateError:
        return StateError(f"sandbox {self.user_id}/{self.service_id} is {self._state}, not running")

    def _let_go(self) -> None:
        """End it without waiting; the registry keeps its row, and the next owner finishes what is left."""
        with contextlib.suppress(AttributeError, CgroupError):
            self._cgroup.kill()
            self._cgroup.close()
        with contextlib.suppress(AttributeError):
            self._pump.detach()
        self._close_pidfd()
        if self._stdin is not None:
            os.close(self._stdin)
            self._stdin = None


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
