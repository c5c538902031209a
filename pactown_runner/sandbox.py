"""One sandbox: a name that is claimed, and the runs of its program under that name, until it ends for good.

The whole life is one coroutine that the supervisor runs as a task of its own: a caller that is cancelled while it waits
takes nothing down with it by halves. What may happen when stands in `lifecycle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Literal

from cgroups import Cgroup, CgroupError, GoneError, Limits, Stats

from .attempt import Attempt, LeftError
from .errors import RunnerError, SpecError, StartError, StateError
from .holdings import Claiming, Holdings, Run
from .host import Claim, LoopHost
from .lifecycle import RESTING, Action, Life, Trigger, Wish
from .logs import LogFeed, LogPaths, read_log
from .main_process import Main
from .models import EventKind, IsolatedUser, IsolationReport, LogRecord, Outcome, State
from .outcomes import failed_to_start
from .specs import SandboxSpec

__all__ = ["Beginning", "Sandbox"]

_log = logging.getLogger(__name__)

FREEZE_TIMEOUT = 10.0
"""Seconds in which the kernel must have frozen or thawed a sandbox. It waits for running system calls only."""

RUNS_REMEMBERED = 64
"""Of so many runs at most `Sandbox.logs` tells."""

Beginning = Literal["new", "return", "adopt", "lost"]
"""How a sandbox comes to a supervisor: somebody starts it; it is registered, and comes back; a dead supervisor left it
running; or a dead supervisor left its claim, and nothing runs."""


class Sandbox:
    """A service or a one-shot run: process trees of one tenant's, one at a time, each born in its cgroup.

    Made by `Supervisor.start`; safe to use from the supervisor's event loop only. Without a restart policy there is one
    run, and the sandbox ends with it.

    Attributes:
        run: the current run: what was asked for, and what tells it from other runs of the same service.
        restarts: how often its program was started again.
        last_outcome: how the last run that has ended did.
    """

    def __init__(
        self,
        host: LoopHost,
        run: Run,
        on_end: Callable[[Sandbox], None],
        *,
        beginning: Beginning = "new",
        claim: Claim | None = None,
    ) -> None:
        self.run = run
        self.restarts = 0
        self.last_outcome: Outcome | None = None
        self._host = host
        self._on_end = on_end
        self._beginning = beginning
        self._life = Life()
        self._feed = LogFeed()
        self._attempt = Attempt(host, run, self._feed)
        self._claim = claim
        self._started = asyncio.Event()
        self._settled = asyncio.Event()
        self._woken = asyncio.Event()
        self._launched = asyncio.Event()
        self._failure: Exception | None = None
        self._outcome: Outcome | None = None
        self._leaving = False
        self._grace_cap = float("inf")
        self._runs = deque([run.run_id], RUNS_REMEMBERED)

    def __repr__(self) -> str:
        return f"<Sandbox {self.spec.user_id!r}/{self.spec.service_id} {self.state}>"

    # What it is -------------------------------------------------------------------------------------------------

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
        return self._life.state

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
        return self._attempt.program.pid

    @property
    def isolation(self) -> IsolationReport:
        """What the launcher read back from the kernel just before `execve`.

        Raises:
            StateError: it has not been started, or was adopted from a predecessor that died before it knew.
        """
        isolation = self._attempt.program.isolation
        if isolation is None:
            raise StateError(f"nobody knows how {self!r} is isolated")
        return isolation

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, or None while anything of it runs, or is to run again."""
        return self._outcome

    # What can be done with it -----------------------------------------------------------------------------------

    async def started(self) -> None:
        """Return when the program has been executed for the first time.

        Raises:
            StartError: it could not be started; nothing is left of it.
            RunnerError: the sandbox could not be made.
        """
        await self._started.wait()
        if self._failure is not None:
            raise self._failure

    async def wait(self) -> Outcome:
        """Wait until nothing of it runs any more nor will by itself, its log is complete, and its cgroup is gone.

        That is its end, or that it is `crash-looping`.
        """
        await self._settled.wait()
        if self._outcome is None:
            assert self._failure is not None
            raise self._failure
        return self._outcome

    async def stop(self, grace: float | None = None) -> Outcome:
        """Thaw it, send SIGTERM to each of its processes, and after `grace` seconds SIGKILL to what is left.

        It is not started again, and does not come back with the next supervisor.

        Args:
            grace: seconds; None takes the spec's `stop_grace`, else the settings'.

        Raises:
            SpecError: that is no number of seconds.
            StartError: it never ran.
        """
        grace = self._grace(grace)
        await self._started.wait()
        await self._forget()
        return await self.end(grace)

    async def kill(self) -> Outcome:
        """Kill everything in it at once (`cgroup.kill`), and wait for the end."""
        return await self.stop(grace=0)

    async def end(self, grace: float | None = None) -> Outcome:
        """End it as `stop` does; but a service that is registered comes back with the next supervisor."""
        await self._turn("down", self._grace(grace))
        return await self.wait()

    async def restart(self, grace: float | None = None) -> None:
        """End its program as `stop` does if it runs, and start it again, also if it is `crash-looping`.

        Returns when the new program has been executed.

        Raises:
            StateError: it has ended, or is just being stopped.
            StartError: it could not be started again; the restart policy decides what comes then.
        """
        grace = self._grace(grace)
        await self._started.wait()
        self._must_live(RESTING - {State.ENDED})
        launched = self._launched
        await self._turn("again", grace)
        await launched.wait()
        attempt = self._attempt
        await attempt.executed.wait()
        if not attempt.started:
            raise self._failure or self._wrong_state()

    async def freeze(self) -> None:
        """Stop it from running, and return when the kernel says that it is frozen. It cannot notice.

        Raises:
            StateError: it does not run, or did not freeze in time.
        """
        await self._refrigerate(State.FROZEN, lambda cgroup: cgroup.freeze(FREEZE_TIMEOUT))

    async def thaw(self) -> None:
        """Let a frozen sandbox run again.

        Raises:
            StateError: it does not run.
        """
        await self._refrigerate(State.RUNNING, lambda cgroup: cgroup.thaw(FREEZE_TIMEOUT))

    async def set_limits(self, limits: Limits) -> None:
        """Change limits while it runs. None fields stay as they are; all of them are changed, or none.

        They hold for its later runs, too.

        Raises:
            LimitsError: one cannot be enforced here, or was refused by the kernel.
            StateError: it does not run.
        """
        self._must_live()
        attempt, held, tree = self._attempt, self._holdings, self._host.tree
        try:
            changed = await held.on_cgroup(lambda cgroup: tree.limit(held.user.key, cgroup, limits))
        except GoneError as error:
            raise self._wrong_state() from error
        held.limits |= changed
        self._host.monitor.set_cpu_max(self.run_id, held.has_cpu_max)
        if attempt.program.isolation is not None:
            attempt.program.isolation = isolation = replace(attempt.program.isolation, limits=dict(held.limits))
            if self.run.kind == "service" and not attempt.over:
                await held.on_cgroup(lambda cgroup: Main.update(cgroup, isolation))
        await self._remember(limits)
        self._tell("limit-changed", limits=dict(held.limits))

    async def stats(self) -> Stats:
        """What it uses now; after its end, what it used.

        Raises:
            StateError: it does not run, or its counters could not be read.
        """
        if self._outcome is not None and self._outcome.stats is not None:
            return self._outcome.stats
        if self.state is State.STARTING or self._attempt.over:
            raise self._wrong_state()
        try:
            return await self._holdings.on_cgroup(lambda cgroup: cgroup.stats(pressure=True))
        except GoneError as error:
            raise self._wrong_state() from error

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
        assert self._claim is not None
        settings = self._host.settings
        log = LogPaths(settings.log_dir, settings.run_dir, self._claim[0]).log(self.service_id)
        records = read_log(log, follow=follow, tail=tail, since_seq=since, run_ids=self._runs, feed=self._feed)
        async with contextlib.aclosing(records):
            async for record in records:
                yield record

    async def send(self, data: bytes) -> None:
        """Write to its standard input, as fast as it reads.

        Raises:
            StateError: it was started without `stdin`, has ended, or has closed its standard input.
        """
        await self._attempt.program.send(data)

    def close_stdin(self) -> None:
        """Give it end-of-file on its standard input."""
        self._attempt.program.close_stdin()

    # For the supervisor -----------------------------------------------------------------------------------------

    async def leave(self) -> None:
        """Let go of a service, running as it is, for a successor to take over. What is just ending ends."""
        await self._started.wait()
        self._leaving = True
        self._woken.set()
        if self._attempt.executed.is_set():
            self._attempt.leave()

    def hasten(self) -> None:
        """Let all grace be over: what was asked to end is killed, and so is what will be."""
        self._grace_cap = 0.0
        self._attempt.hasten(0.0)

    # Its life ---------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Be made, run, perhaps again and again, and end. Never raises: what goes wrong is told to those who wait."""
        try:
            await self._live()
        except LeftError:
            self._failure = StateError(f"{self!r} was left to another supervisor")
        except Exception as error:
            self._failure = self._understood(error)
        except BaseException:
            # The loop is being torn down under us: nothing may be awaited, but nothing may go on running either.
            self._attempt.let_go()
            raise
        finally:
            self._life = replace(self._life, state=State.ENDED)
            self._on_end(self)
            self._feed.close()
            self._started.set()
            self._settled.set()
            self._launched.set()

    async def _live(self) -> None:
        action: Action | None = Action.LAUNCH
        if self._beginning == "lost":
            # Its last run is over, and its claim is ours.
            self._attempt.dismiss()
            self._started.set()
            self._exited()
            action = self._decide(Outcome(reason="lost", message="ended while no supervisor was there to see it"))
        while True:
            if action is Action.LAUNCH:
                action = await self._attempt_once()
            elif action is Action.RELEASE:
                await self._release()
                self._outcome = self.last_outcome
                self._tell("stopped", **_told(self._outcome))
                return
            else:
                action = await self._rest()

    async def _attempt_once(self) -> Action | None:
        """One run, from its start to its end. Returns what comes then."""
        first = not self._started.is_set()
        claiming = self._first_claiming() if first else await self._claim_again()
        if self._leaving:
            raise LeftError
        if self._life.wish == "down" and self.last_outcome is not None:
            self._exited()
            return self._decide(self.last_outcome)
        self._life = self._life.wishing("up")
        try:
            outcome = await self._attempt.go(self._executed, self._exited, claiming)
        except LeftError:
            raise
        except Exception as error:
            failure = self._understood(error)
            if not await self._survives(failure, first=first):
                raise failure from None
            outcome = _unstarted(failure) if not self._attempt.started else Outcome(reason="lost", message=str(failure))
        return self._decide(outcome)

    async def _survives(self, failure: Exception, *, first: bool) -> bool:
        """Whether a run that failed, rather than ended, leaves the sandbox alive, to try again."""
        if self.state is not State.STOPPING:
            self._exited()
        attempt, self._failure = self._attempt, failure
        if attempt.held is not None:
            self._claim = attempt.held.claim
        lost = self._claim is None or (self._beginning == "adopt" and attempt.held is None)
        if lost or self._claim in self._host.unfinished:
            return False
        if attempt.started or not first or self._beginning == "return":
            _log.warning("%r: %s", self, failure)
            self._started.set()
            return True
        # Whoever starts it is told, and nothing is left of it.
        await self._forget()
        await self._release()
        return False

    def _first_claiming(self) -> Claiming | None:
        if self._beginning == "adopt":
            return None
        if self._beginning == "return":
            return "return"
        return "register" if self._registered else "claim"

    async def _claim_again(self) -> Claiming:
        """Make the claim the next run's."""
        assert self._claim is not None
        self.run = run = self.run._replace(run_id=secrets.token_hex(8), started_at=time.time())
        registry, owner = self._host.registry, self._host.owner.owner_id
        if not await self._host.in_thread(registry.restart, self._claim, owner, run.run_id, run.started_at):
            raise StateError(f"{self!r} belongs to another supervisor by now")
        self._claim = (*self._claim[:2], run.run_id)
        self._runs.append(run.run_id)
        self.restarts += 1
        self._attempt = Attempt(self._host, run, self._feed)
        launched, self._launched = self._launched, asyncio.Event()
        launched.set()
        return "held"

    def _executed(self, held: Holdings) -> None:
        self._claim = held.claim
        self._failure = None
        self._feed_life(Trigger.FROZE if held.frozen else Trigger.EXECUTED)
        kind: EventKind = "restarted" if self.restarts else "adopted" if self._beginning == "adopt" else "started"
        self._tell(kind, pid=self.pid, **_told(self.last_outcome))
        self._started.set()
        if self._leaving:
            self._attempt.leave()

    def _exited(self) -> None:
        self._feed_life(Trigger.EXITED)

    def _decide(self, outcome: Outcome) -> Action | None:
        """Nothing of the run is left."""
        self.last_outcome = outcome
        chance = random.random()  # noqa: S311 - nobody gains from guessing it
        self._life, action = self._life.emptied(self.spec.restart, outcome, time.monotonic(), chance)
        if self.state is State.CRASH_LOOPING:
            self._outcome = outcome
            self._settled.set()
            self._tell("crash-looping", **_told(outcome))
        return action

    async def _rest(self) -> Action | None:
        """Wait until it is due, or somebody wants it restarted or ended."""
        while True:
            if self._leaving:
                raise LeftError
            self._woken.clear()
            if self._life.wish == "down":
                return self._feed_life(Trigger.STOP)
            if self._life.wish == "again":
                self._life = self._life.wishing("up")
                return self._relaunch(Trigger.RESTART)
            pause = self._life.due - time.monotonic() if self.state is State.BACKING_OFF else None
            try:
                async with asyncio.timeout(pause):
                    await self._woken.wait()
            except TimeoutError:
                return self._relaunch(Trigger.DUE)

    def _relaunch(self, trigger: Trigger) -> Action | None:
        self._outcome = None
        self._settled.clear()
        return self._feed_life(trigger)

    def _feed_life(self, trigger: Trigger) -> Action | None:
        self._life, action = self._life.after(trigger)
        return action

    async def _turn(self, wish: Wish, grace: float) -> None:
        """Let the current run end, so that what is wished for can come."""
        await self._started.wait()
        self._life = self._life.wishing(wish)
        self._woken.set()
        attempt = self._attempt
        await attempt.executed.wait()
        if attempt.over:
            # It rests, or is on its way there: the wish is seen to then.
            return
        if self.state in (State.RUNNING, State.FROZEN):
            self._feed_life(Trigger.STOP if wish == "down" else Trigger.RESTART)
        await attempt.end("stopped", min(grace, self._grace_cap))

    def _grace(self, grace: float | None) -> float:
        if grace is None:
            return self._host.settings.stop_grace if self.spec.stop_grace is None else self.spec.stop_grace
        if not 0 <= grace < float("inf"):
            raise SpecError(f"grace must be a number of seconds, 0 or more, not {grace!r}")
        return grace

    @property
    def _registered(self) -> bool:
        return self.run.kind == "service" and self.spec.restart.mode == "always"

    async def _forget(self) -> None:
        """It is not to come back."""
        if self._registered and self._claim is not None:
            await self._host.in_thread(self._host.registry.forget, *self._claim[:2])

    async def _release(self) -> None:
        if self._claim is not None:
            await self._host.release_soon(self._claim)

    async def _remember(self, limits: Limits) -> None:
        """Changed limits hold for later runs, and for a successor."""
        before = self._host.settings.default_limits if self.spec.limits is None else self.spec.limits
        given = {name: value for name, value in vars(limits).items() if value is not None}
        self.run = self.run._replace(spec=replace(self.spec, limits=replace(before, **given)))
        if self.run.kind == "service" and self._claim is not None:
            await self._host.in_thread(self._host.registry.update_spec, *self._claim, self.spec.to_json())

    def _tell(self, kind: EventKind, **details: object) -> None:
        self._host.events.tell(kind, self.user_id, self.service_id, self.run_id, **details)

    def _understood(self, error: Exception) -> Exception:
        """What the kernel refused on the way to a start is a failed start; what nobody foresaw is logged."""
        if isinstance(error, RunnerError):
            return error
        if isinstance(error, CgroupError | OSError) and not self._attempt.started:
            step = "cgroup" if isinstance(error, CgroupError) else "resources"
            remedy = error.remedy if isinstance(error, CgroupError) else None
            message = error.message if isinstance(error, CgroupError) else str(error)
            failed = StartError(f"cannot make the sandbox: {message}", step=step, errno=error.errno or 0, remedy=remedy)
            failed.__cause__ = error
            return failed
        _log.error("%r failed", self, exc_info=error)
        return error

    async def _refrigerate(self, to: State, action: Callable[[Cgroup], None]) -> None:
        self._must_live()
        try:
            await self._holdings.on_cgroup(action)
        except CgroupError as error:
            raise StateError(error.message, remedy=error.remedy) from error
        if self.state in (State.RUNNING, State.FROZEN) and self.state is not to:
            self._feed_life(Trigger.FROZE if to is State.FROZEN else Trigger.THAWED)

    def _must_live(self, also: frozenset[State] = frozenset()) -> None:
        if self.state not in also | {State.RUNNING, State.FROZEN}:
            raise self._wrong_state()

    def _wrong_state(self) -> StateError:
        return StateError(f"sandbox {self.user_id!r}/{self.service_id} is {self.state}, not running")

    @property
    def _holdings(self) -> Holdings:
        if self._attempt.held is None:
            raise self._wrong_state()
        return self._attempt.held


def _unstarted(failure: Exception) -> Outcome:
    if isinstance(failure, StartError):
        return failed_to_start(failure)
    return Outcome(reason="failed-to-start", message=str(failure))


def _told(outcome: Outcome | None) -> dict[str, object]:
    """What an event tells of an end."""
    return {} if outcome is None else {"reason": outcome.reason, "message": outcome.message}
