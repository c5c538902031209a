"""One sandbox: a name that is claimed, and the runs of its program under that name, until it ends for good.

The whole life is one coroutine that the supervisor runs as a task of its own: a caller that is cancelled while it waits
takes nothing down with it by halves. What may happen when stands in `lifecycle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from cgroups import Cgroup, CgroupError, GoneError, Limits, Stats, read_all

from .course import Course
from .errors import RegistryError, StateError
from .execution import Execution
from .holdings import Holdings, Run
from .host import LoopHost
from .lifecycle import RESTING, Trigger
from .logs import LogPaths, read_log
from .main_process import Main
from .models import IsolatedUser, IsolationReport, LogRecord, Outcome, State
from .specs import SandboxSpec
from .waiting import finish

__all__ = ["Sandbox", "stats_of_all"]

_log = logging.getLogger(__name__)

FREEZE_TIMEOUT = 10.0
"""Seconds in which the kernel must have frozen or thawed a sandbox. It waits for running system calls only."""

STATS_BATCH = 100
"""So many sandboxes are counted in one go, each of which takes a descriptor meanwhile."""


class Sandbox:
    """A service or a one-shot run: process trees of one tenant's, one at a time, each born in its cgroup.

    Made by `Supervisor.start`; safe to use from the supervisor's event loop only. Without a restart policy there is one
    run, and the sandbox ends with it.

    Attributes:
        course: its life, which is the supervisor's to lead.
    """

    # For one change at a time from frozen to running and back; few are ever frozen, and only those have one.
    _turn: asyncio.Lock | None = None

    def __init__(self, host: LoopHost, course: Course) -> None:
        self.course = course
        self._host = host

    def __repr__(self) -> str:
        return f"<Sandbox {self.spec.user_id!r}/{self.spec.service_id} {self.state}>"

    # What it is -------------------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        """The current run: what was asked for, and what tells it from other runs of the same service."""
        return self.course.run

    @property
    def restarts(self) -> int:
        """How often its program was started again."""
        return self.course.restarts

    @property
    def last_outcome(self) -> Outcome | None:
        """How the last run that has ended did."""
        return self.course.last_outcome

    @property
    def spec(self) -> SandboxSpec:
        """What was asked for; limits that were changed meanwhile included."""
        return self.run.spec

    @property
    def run_id(self) -> str:
        """Tells the current run from earlier and later ones of the same service."""
        return self.run.run_id

    @property
    def started_at(self) -> float:
        """When the current run was started, in seconds since the epoch."""
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
        return self.course.state

    @property
    def cgroup(self) -> Cgroup | None:
        """The cgroup of its current run, while that lives; the supervisor's, who duplicates it to use it."""
        attempt = self.course.attempt
        if self.state is State.STARTING or attempt.over or attempt.held is None:
            return None
        return attempt.held.cgroup

    @property
    def user(self) -> IsolatedUser:
        """The tenant that it runs as.

        Raises:
            StateError: it has not been started.
        """
        return self._holdings.user

    @property
    def pid(self) -> int:
        """The process id of its first process, as this supervisor sees it; 0 if there is none."""
        return self.course.attempt.program.pid

    @property
    def isolation(self) -> IsolationReport:
        """What the launcher read back from the kernel just before `execve`.

        Raises:
            StateError: it has not been started, or was adopted from a predecessor that died before it knew.
        """
        isolation = self.course.attempt.program.isolation
        if isolation is None:
            raise StateError(f"nobody knows how {self!r} is isolated")
        return isolation

    @property
    def ready(self) -> bool:
        """Whether it is ready to serve, as its `ready` probe says; without one, whether its program runs."""
        return self.course.is_ready.is_set() and self.state in (State.RUNNING, State.FROZEN)

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, or None while anything of it runs, or is to run again."""
        return self.course.outcome

    # What can be done with it -----------------------------------------------------------------------------------

    async def started(self) -> None:
        """Return when the program has been executed for the first time; or could not be, and will be tried again.

        Raises:
            StartError: it could not be started; nothing is left of it.
            RunnerError: the sandbox could not be made.
        """
        await self.course.started.wait()
        if self.course.never_began and self.course.failure is not None:
            raise self.course.failure

    async def until_ready(self) -> None:
        """Wait until it is ready to serve, in this run or a later one.

        Raises:
            StartError: it could not be started.
            StateError: it has ended, or is `crash-looping`.
        """
        await self.started()
        course = self.course
        # It may be ready for a moment only, or in an earlier run.
        while not self.ready:
            if course.settled.is_set():
                raise course.wrong_state()
            ready, settled = (asyncio.ensure_future(event.wait()) for event in (course.is_ready, course.settled))
            try:
                await asyncio.wait([ready, settled], return_when=asyncio.FIRST_COMPLETED)
            finally:
                ready.cancel()
                settled.cancel()

    async def wait(self) -> Outcome:
        """Wait until nothing of it runs any more nor will by itself, its log is complete, and its cgroup is gone.

        That is its end, or that it is `crash-looping`.
        """
        return await self.course.wait()

    async def stop(self, grace: float | None = None) -> Outcome:
        """Thaw it, send SIGTERM to each of its processes, and after `grace` seconds SIGKILL to what is left.

        It is not started again, and does not come back with the next supervisor.

        Args:
            grace: seconds; None takes the spec's `stop_grace`, else the settings'.

        Raises:
            SpecError: that is no number of seconds.
            StartError: it never ran.
            RegistryError: it has ended, but may come back: that it is not to could not be written down. Stop it again.
        """
        grace = self.course.grace(grace)
        self.course.attempt.stop_making()
        await self.course.started.wait()
        unforgotten: RegistryError | None = None
        try:
            await self.course.forget()
        except RegistryError as error:
            # Whatever the disk does, what is to end must not run on.
            unforgotten = error
        outcome = await self.course.end(grace)
        if unforgotten is not None:
            raise unforgotten
        return outcome

    async def kill(self) -> Outcome:
        """Kill everything in it at once (`cgroup.kill`), and wait for the end."""
        return await self.stop(grace=0)

    async def restart(self, grace: float | None = None) -> None:
        """End its program as `stop` does if it runs, and start it again, also if it is `crash-looping`.

        Returns when the new program has been executed.

        Raises:
            StateError: it has ended, or is just being stopped.
            BlockedError: its user is blocked, and nothing has changed; or is by now, and it starts when that is over.
            StartError: it could not be started again; the restart policy decides what comes then.
            RegistryError: the same, for want of the registry.
        """
        grace = self.course.grace(grace)
        await self.course.started.wait()
        await self.course.refuse_blocked()
        self._must_live(RESTING - {State.ENDED})
        await self.course.restart(grace)

    async def freeze(self) -> None:
        """Stop it from running, and return when the kernel says that it is frozen. It cannot notice.

        While the user's home is exported all stands still; what is frozen meanwhile stays so. Once it has begun, a
        cancellation is raised when it is done.

        Raises:
            StateError: it does not run, or did not freeze in time.
        """
        await self._refrigerate(State.FROZEN, Holdings.freeze)

    async def thaw(self) -> None:
        """Let a frozen sandbox run again; while the user's home is exported, when that is done.

        Once it has begun, a cancellation is raised when it is done.

        Raises:
            StateError: it does not run, or did not go on in time.
        """
        await self._refrigerate(State.RUNNING, Holdings.thaw)

    async def signal(self, number: int) -> int:
        """Send a signal to each of its processes; one that is frozen acts on it once it is thawed.

        Returns:
            How many got it. Those that SIGKILL ends are not counted.

        Raises:
            StateError: it does not run, or forks faster than it can be signalled.
        """
        self._must_live()
        try:
            return await self._holdings.on_cgroup(lambda cgroup: cgroup.signal(number))
        except CgroupError as error:
            raise StateError(error.message, remedy=error.remedy) from error

    async def set_limits(self, limits: Limits) -> None:
        """Change limits while it runs. None fields stay as they are; all of them are changed, or none.

        They hold for its later runs, too.

        Raises:
            LimitsError: one cannot be enforced here, or was refused by the kernel.
            StateError: it does not run.
        """
        self._must_live()
        attempt, held, tree = self.course.attempt, self._holdings, self._host.tree
        try:
            changed = await held.on_cgroup(lambda cgroup: tree.limit(held.user.key, cgroup, limits))
        except GoneError as error:
            raise self.course.wrong_state() from error
        held.limits |= changed
        self._host.monitor.set_cpu_max(self.run_id, held.has_cpu_max)
        if attempt.program.isolation is not None:
            attempt.program.isolation = isolation = replace(attempt.program.isolation, limits=dict(held.limits))
            if self.run.kind == "service" and not attempt.over:
                await held.on_cgroup(lambda cgroup: Main.update(cgroup, isolation))
        await self.course.remember(limits)
        self.course.tell("limit-changed", limits=dict(held.limits))

    async def stats(self) -> Stats:
        """What it uses now; after its end, what it used.

        Raises:
            StateError: it does not run, or its counters could not be read.
        """
        if self.course.outcome is not None and self.course.outcome.stats is not None:
            return self.course.outcome.stats
        if self.state is State.STARTING or self.course.attempt.over:
            raise self.course.wrong_state()
        try:
            return await self._holdings.on_cgroup(lambda cgroup: cgroup.stats(pressure=True))
        except GoneError as error:
            raise self.course.wrong_state() from error

    async def logs(
        self, *, follow: bool = False, tail: int | None = None, since: int = 0
    ) -> AsyncGenerator[LogRecord, None]:
        """What it has printed, over all its runs here; with `follow` until it has ended and all is read.

        Any number of readers may follow; a slow one delays neither the sandbox nor the others.

        Args:
            follow: go on as records arrive.
            tail: begin with the last so many records.
            since: begin behind the record of this sequence number.
        """
        await self.started()
        assert self.course.claim is not None
        settings, course = self._host.settings, self.course
        log = LogPaths(settings.log_dir, settings.run_dir, self.course.claim[0]).log(self.service_id)
        records = read_log(log, follow=follow, tail=tail, since_seq=since, run_ids=course.runs, feed=course.feed)
        async with contextlib.aclosing(records):
            async for record in records:
                yield record

    async def exec(
        self,
        argv: str | Sequence[str],
        *,
        stdin: bytes | bool | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | PurePosixPath | None = None,
    ) -> Execution:
        """Execute a further program in it, with the same identity and limits, and return when that is done.

        What it prints goes to the caller, not to the sandbox's log. It ends with the current run at the latest.

        Args:
            argv: a string is run by `/bin/sh -c`, a sequence is executed as it is.
            stdin: what it reads; or True for a pipe to be fed through `Execution.send`; else it is `/dev/null`.
            env: added to the sandbox's environment.
            cwd: a directory relative to the sandbox's own, which is where it runs without; or absolute.

        Raises:
            SpecError: `argv`, `env` or `cwd` can never be right.
            StateError: the sandbox does not run, or is frozen.
            StartError: the program was not executed; nothing of it is left.
        """
        return await self.course.attempt.execute(argv, stdin=stdin, env=env, cwd=cwd)

    async def send(self, data: bytes) -> None:
        """Write to its standard input, as fast as it reads.

        Raises:
            StateError: it was started without `stdin`, has ended, or has closed its standard input.
        """
        await self.course.attempt.program.send(data)

    def close_stdin(self) -> None:
        """Give it end-of-file on its standard input."""
        self.course.attempt.program.close_stdin()

    # Help -------------------------------------------------------------------------------------------------------

    async def _refrigerate(self, to: State, action: Callable[[Holdings, Cgroup, float], None]) -> None:
        self._must_live()
        if self._turn is None:
            self._turn = asyncio.Lock()
        async with self._turn:
            # Once it is begun its end has to be seen, or the kernel would say otherwise than `state`.
            await finish(asyncio.ensure_future(self._refrigerate_now(to, action)))

    async def _refrigerate_now(self, to: State, action: Callable[[Holdings, Cgroup, float], None]) -> None:
        self._must_live()
        held = self._holdings
        try:
            await held.on_cgroup(lambda cgroup: action(held, cgroup, FREEZE_TIMEOUT))
        except CgroupError as error:
            raise StateError(error.message, remedy=error.remedy) from error
        if self.state in (State.RUNNING, State.FROZEN) and self.state is not to:
            self.course.feed_life(Trigger.FROZE if to is State.FROZEN else Trigger.THAWED)

    def _must_live(self, also: frozenset[State] = frozenset()) -> None:
        if self.state not in also | {State.RUNNING, State.FROZEN}:
            raise self.course.wrong_state()

    @property
    def _holdings(self) -> Holdings:
        if self.course.attempt.held is None:
            raise self.course.wrong_state()
        return self.course.attempt.held


async def stats_of_all(host: LoopHost, sandboxes: Sequence[Sandbox], *, pressure: bool) -> dict[tuple[str, str], Stats]:
    """What each of these uses now, by user and service id, without those that are just being started or ended."""
    # In one thread: two would mostly wait for each other, as each of so many short system calls gives up the GIL.
    found: dict[tuple[str, str], Stats] = {}
    for first in range(0, len(sandboxes), STATS_BATCH):
        # They may end meanwhile, and their descriptors' numbers stand for other sandboxes' cgroups.
        own: dict[tuple[str, str], int] = {}
        try:
            for sandbox in sandboxes[first : first + STATS_BATCH]:
                if (cgroup := sandbox.cgroup) is not None:
                    own[sandbox.user_id, sandbox.service_id] = os.dup(cgroup.fd)
        except OSError:
            _close_all(own)
            raise
        # Shielded: what is duplicated is closed there.
        found |= await asyncio.shield(host.in_thread(_read_and_close, own, pressure))
    return found


def _read_and_close(own: dict[tuple[str, str], int], pressure: bool) -> dict[tuple[str, str], Stats]:
    try:
        return {name: stats for name, stats in read_all(own, pressure=pressure).items() if stats is not None}
    finally:
        _close_all(own)


def _close_all(own: dict[tuple[str, str], int]) -> None:
    for fd in own.values():
        os.close(fd)
