"""One sandbox, from its start to its `Outcome`: what it holds, the program, its end.

The whole life is one coroutine that the supervisor runs as a task of its own: a caller that is cancelled while it waits
takes nothing down with it by halves.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import TypeVar

import anyio

from cgroups import Cgroup, CgroupError, GoneError, Limits, Stats

from .ending import emptied, end_rest
from .errors import RunnerError, SpecError, StartError, StateError
from .holdings import Holdings, Run, ask_to_end
from .host import Host
from .logs import LogError, read_log
from .main_process import Main
from .models import IsolatedUser, IsolationReport, LogRecord, Outcome, Reason, State
from .outcomes import outcome_of
from .program import Program
from .specs import SandboxSpec

__all__ = ["Sandbox"]

_log = logging.getLogger(__name__)
T = TypeVar("T")

FREEZE_TIMEOUT = 10.0
"""Seconds in which the kernel must have frozen or thawed a sandbox. It waits for running system calls only."""

PRESSURE_AFTER = 2.0
"""Seconds that a sandbox must have lived for its `Outcome` to tell of pressure: the kernel's own sampling period."""


class Sandbox:
    """A process tree of one tenant's service: born in a cgroup of its own, and ended with it.

    Made by `Supervisor.start`; safe to use from the supervisor's event loop only.

    Attributes:
        run: what was asked for, and what tells it from other runs of the same service.
    """

    def __init__(
        self,
        host: Host,
        run: Run,
        on_end: Callable[[Sandbox], None],
    ) -> None:
        self.run = run
        self._host = host
        self._on_end = on_end
        self._state = State.STARTING
        self._started = asyncio.Event()
        self._ended = asyncio.Event()
        self._failure: Exception | None = None
        self._outcome: Outcome | None = None
        self._ending: Reason | None = None
        self._patience = anyio.CancelScope()
        self._program = Program()
        self._held: Holdings | None = None
        self._given_back = False
        self._survivors = 0
        # A run that was taken over began before this process did.
        self._began = time.monotonic() - max(0.0, time.time() - run.started_at)

    def __repr__(self) -> str:
        return f"<Sandbox {self.spec.user_id!r}/{self.spec.service_id} {self._state}>"

    # What it is -------------------------------------------------------------------------------------------------

    @property
    def spec(self) -> SandboxSpec:
        """What was asked for."""
        return self.run.spec

    @property
    def run_id(self) -> str:
        """Tells this run from earlier and later ones of the same service."""
        return self.run.run_id

    @property
    def started_at(self) -> float:
        """When it was started, in seconds since the epoch."""
        return self.run.started_at

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
        """The tenant that it runs as.

        Raises:
            StateError: it has not been started.
        """
        return self._holdings.user

    @property
    def pid(self) -> int:
        """The process id of its first process, as this supervisor sees it."""
        return self._program.pid

    @property
    def isolation(self) -> IsolationReport:
        """What the launcher read back from the kernel just before `execve`.

        Raises:
            StateError: it has not been started, or was adopted from a predecessor that died before it knew.
        """
        if self._program.isolation is None:
            raise StateError(f"nobody knows how {self!r} is isolated")
        return self._program.isolation

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
                await self._holdings.on_cgroup(ask_to_end)
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
        held, tree = self._holdings, self._host.tree
        try:
            changed = await held.on_cgroup(lambda cgroup: tree.limit(held.user.key, cgroup, limits))
        except GoneError as error:
            raise self._wrong_state() from error
        held.limits |= changed
        if self._program.isolation is not None:
            self._program.isolation = isolation = replace(self._program.isolation, limits=dict(held.limits))
            if self.run.kind == "service" and not self._given_back:
                await held.on_cgroup(lambda cgroup: Main.update(cgroup, isolation))

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
            return await self._holdings.on_cgroup(lambda cgroup: cgroup.stats(pressure=True))
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
        pump = self._holdings.pump
        log = pump.paths.log(self.service_id)
        records = read_log(log, follow=follow, tail=tail, since_seq=since, run_id=self.run_id, feed=pump.feed)
        async with contextlib.aclosing(records):
            async for record in records:
                yield record

    async def send(self, data: bytes) -> None:
        """Write to its standard input, as fast as it reads.

        Raises:
            StateError: it was started without `stdin`, has ended, or has closed its standard input.
        """
        await self._program.send(data)

    def close_stdin(self) -> None:
        """Give it end-of-file on its standard input."""
        self._program.close_stdin()

    # Its life ---------------------------------------------------------------------------------------------------

    async def live(self, *, found: bool = False) -> None:
        """Be made, run and end. With `found`, go on with what a dead owner left running.

        Never raises: what goes wrong is told to those who wait.
        """
        outcome: Outcome | None = None
        failure: Exception | None = None
        try:
            self._held = held = await (Holdings.take_over if found else Holdings.take)(self._host, self.run)
            try:
                if found:
                    self._program.recognise(held.main)
                else:
                    await self._program.launch(self.spec, held)
                    self._write_down(held)
                held.pump.start()
                self._state = State.FROZEN if held.frozen else State.RUNNING
                self._started.set()
                await self._first_exit(held)
            except Exception as error:
                failure = error
            outcome = await self._give_back(held)
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

    def _write_down(self, held: Holdings) -> None:
        """Leave a note of the program on the cgroup, for whoever may have to go on with a service."""
        if self.run.kind == "service" and self._program.isolation is not None:
            Main.of(self._program.pid, self._program.isolation).mark(held.cgroup)

    async def _first_exit(self, held: Holdings) -> None:
        """Wait until the program has exited, or its time is up; when asked to stop, for all of its processes."""
        if self.spec.timeout is not None:
            self._patience.deadline = anyio.current_time() + self._began + self.spec.timeout - time.monotonic()
        with self._patience:
            await self._program.exited()
            if self._ending is not None:
                await emptied(held.cgroup)
        if self._patience.cancelled_caught and self._ending is None:
            self._ending = "timed-out"

    async def _give_back(self, held: Holdings) -> Outcome:
        """End what is left, finish the log, and give back all that was taken."""
        # From here on nobody else uses the cgroup, which is about to go.
        self._given_back = True
        self._state = State.STOPPING
        try:
            self._survivors = await end_rest(self._host, held)
        except StateError:
            # Something of it is there, and cannot be ended now: its name stays taken until it is.
            held.let_go()
            self._program.leave(self._host)
            self._host.unfinished[held.claim] = None
            raise
        wall_seconds = time.monotonic() - self._began
        self._program.close_stdin()
        try:
            await held.pump.finish()
        except (LogError, OSError) as error:
            _log.error("log of %r is not complete: %s", self, error)
            held.pump.detach()
            self._host.unwritten[held.claim] = time.monotonic()
        try:
            return outcome_of(
                await self._program.status(self._host),
                asked=self._ending,
                stats=held.stats(pressure=wall_seconds >= PRESSURE_AFTER),
                tenant_oom=held.tenant_oom(),
                survivors=self._survivors,
                wall_seconds=wall_seconds,
            )
        finally:
            await held.give_back()

    def _end_by(self, grace: float) -> None:
        if self._ending is None:
            self._ending = "stopped"
        self._state = State.STOPPING
        self._patience.deadline = min(self._patience.deadline, anyio.current_time() + grace)

    async def _refrigerate(self, to: State, action: Callable[[Cgroup], None]) -> None:
        self._must_live()
        try:
            await self._holdings.on_cgroup(action)
        except CgroupError as error:
            raise StateError(error.message, remedy=error.remedy) from error
        if self._state in (State.RUNNING, State.FROZEN):
            self._state = to

    def _must_live(self) -> None:
        if self._state not in (State.RUNNING, State.FROZEN):
            raise self._wrong_state()

    def _wrong_state(self) -> StateError:
        return StateError(f"sandbox {self.user_id!r}/{self.service_id} is {self._state}, not running")

    def _let_go(self) -> None:
        """End it without waiting; the registry keeps its row, and the next owner finishes what is left."""
        if self._held is not None and not self._given_back:
            self._held.let_go()
        self._program.close()

    @property
    def _holdings(self) -> Holdings:
        if self._held is None:
            raise self._wrong_state()
        return self._held
