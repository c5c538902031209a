"""The course of a sandbox's life: a claim on a name, and the runs under it, until it ends for good.

All of it is one coroutine that the supervisor runs as a task of its own: a caller that is cancelled while it waits
takes nothing down with it by halves. What may happen when stands in `lifecycle`; one run is an `Attempt`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from cgroups import CgroupError, Limits

from .attempt import HELD_PAUSE, Attempt, LeftError
from .errors import AdmissionError, BlockedError, RegistryError, RunnerError, SpecError, StartError, StateError
from .events import NoteKind
from .holdings import Claiming, Holdings, Run
from .host import Claim, LoopHost
from .lifecycle import Action, Life, Trigger, Wish
from .logs import LogFeed
from .models import EventKind, Outcome, State
from .outcomes import failed_to_start
from .registry import HeldError

__all__ = ["Beginning", "Course"]

_log = logging.getLogger(__name__)

RUNS_REMEMBERED = 64
"""Of so many runs at most a sandbox's log is shown."""

Beginning = Literal["new", "return", "adopt", "lost"]
"""How a sandbox comes to a supervisor: somebody starts it; it is registered, and comes back; a dead supervisor left it
running; or a dead supervisor left its claim, and nothing runs."""


class TakenError(StateError):
    """Another supervisor has the claim, who took this one for dead."""


class Course:
    """The life of one sandbox.

    Args:
        on_end: called when it has ended for good.
        beginning: how it comes to this supervisor.
        claim: what is claimed already, by a predecessor.

    Attributes:
        run: the current run.
        runs: the ids of the last runs, oldest first.
        restarts: how often the program was started again.
        last_outcome: how the last run that has ended did.
        outcome: how it ended, or None while anything of it runs, or is to run again.
        failure: why it could not be started, or was left.
        never_began: whether it ended without its program having been executed; then nothing is left of it.
        attempt: the current run's, or the last.
        claim: what names it in the registry, once it does.
        feed: told of what it prints.
        started: set when the program was executed for the first time, or never will be.
        settled: set while nothing of it runs, nor will by itself.
        is_ready: set while it is ready to serve.
    """

    def __init__(
        self,
        host: LoopHost,
        run: Run,
        on_end: Callable[[], None],
        *,
        beginning: Beginning = "new",
        claim: Claim | None = None,
    ) -> None:
        self.run = run
        self.runs = deque([run.run_id], RUNS_REMEMBERED)
        self.restarts = 0
        self.last_outcome: Outcome | None = None
        self.outcome: Outcome | None = None
        self.failure: Exception | None = None
        self.never_began = False
        self.feed = LogFeed()
        self.attempt = Attempt(host, run, self.feed)
        self.claim = claim
        self.started = asyncio.Event()
        self.settled = asyncio.Event()
        self.is_ready = asyncio.Event()
        self._host = host
        self._on_end = on_end
        self._beginning = beginning
        self._life = Life()
        self._woken = asyncio.Event()
        self._launched = asyncio.Event()
        self._ended = asyncio.Event()
        # Limits that change while the next run is claimed would be the last one's, and lost.
        self._changing = asyncio.Lock()
        self._leaving = False
        self._grace_cap = float("inf")

    def __str__(self) -> str:
        return f"{self.run.spec.user_id!r}/{self.run.spec.service_id}"

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._life.state

    # What is wanted of it ---------------------------------------------------------------------------------------

    async def wait(self) -> Outcome:
        """Wait until it has settled.

        Raises:
            RunnerError: it never ran.
        """
        await self.settled.wait()
        if self.outcome is None:
            assert self.failure is not None
            raise self.failure
        return self.outcome

    async def end(self, grace: float | None = None) -> Outcome:
        """End it; but a service that is registered comes back with the next supervisor. See `Sandbox.stop`."""
        await self._turn("down", self.grace(grace))
        # One that is crash-looping has settled long ago, and holds its name still.
        await self._ended.wait()
        return await self.wait()

    async def restart(self, grace: float) -> None:
        """End the current run, if there is one, and return when the next has been executed; see `Sandbox.restart`."""
        before, launched = self.attempt, self._launched
        await self._turn("again", grace)
        await launched.wait()
        attempt = self.attempt
        await attempt.executed.wait()
        if attempt is before or not attempt.started:
            raise self.failure or self.wrong_state()

    async def refuse_blocked(self) -> None:
        """Raises `BlockedError` if its tenant is blocked: what is ended now could not be started again."""
        if self.claim is not None:
            key, service_id, _ = self.claim
            if (await self._host.in_thread(self._host.standings.of, key)).blocked:
                user = self.run.spec.user_id
                raise BlockedError(f"cannot start {service_id!r} again: user {user!r} is blocked")

    async def leave(self) -> None:
        """Let go of a service, running as it is, for a successor to take over. What is just ending ends."""
        self.attempt.stop_making()
        await self.started.wait()
        self._leaving = True
        self._woken.set()
        if self.attempt.executed.is_set():
            self.attempt.leave()

    def hasten(self) -> None:
        """Let all grace be over: what was asked to end is killed, and so is what will be."""
        self._grace_cap = 0.0
        self.attempt.hasten(0.0)

    def grace(self, given: float | None) -> float:
        """Seconds between SIGTERM and SIGKILL. Raises `SpecError` for what is none."""
        if given is None:
            spec = self.run.spec
            return self._host.settings.stop_grace if spec.stop_grace is None else spec.stop_grace
        if not 0 <= given < float("inf"):
            raise SpecError(f"grace must be a number of seconds, 0 or more, not {given!r}")
        return given

    async def forget(self) -> None:
        """It is not to come back with the next supervisor."""
        if self._registered and self.claim is not None:
            await self._host.in_thread(self._host.registry.services.forget, *self.claim[:2])

    def feed_life(self, trigger: Trigger) -> Action | None:
        """Something happened to it. Raises `StateError` if it cannot have."""
        self._life, action = self._life.after(trigger)
        return action

    async def remember(self, limits: Limits) -> None:
        """Changed limits hold for later runs, and for a successor."""
        async with self._changing:
            spec = self.run.spec
            assert self.claim is not None
            standings, before = self._host.standings, spec.limits
            if before is None:
                before = await self._host.in_thread(standings.default_limits, self.claim[0])
            given = {name: value for name, value in vars(limits).items() if value is not None}
            self.run = self.run._replace(spec=replace(spec, limits=replace(before, **given)))
            if self.run.kind == "service":
                update = self._host.registry.sandboxes.update_spec
                await self._host.in_thread(update, *self.claim, self.run.spec.to_json())

    def wrong_state(self) -> StateError:
        """What to say to those who want what it cannot do now."""
        return StateError(f"sandbox {self} is {self.state}, not running")

    def tell(self, kind: EventKind, **details: object) -> None:
        """Tell of an event."""
        spec = self.run.spec
        self._host.events.tell(kind, spec.user_id, spec.service_id, self.run.run_id, **details)

    def note(self, kind: NoteKind, **details: object) -> None:
        """Tell those who count."""
        spec = self.run.spec
        self._host.events.note(kind, spec.user_id, spec.service_id, self.run.run_id, **details)

    # What its attempt tells -------------------------------------------------------------------------------------

    def executed(self, held: Holdings) -> None:
        """See `Listener`, as for those that follow."""
        self.claim = held.claim
        self.failure = None
        self.feed_life(Trigger.FROZE if held.frozen else Trigger.EXECUTED)
        kind: EventKind = "restarted" if self.restarts else "adopted" if self._beginning == "adopt" else "started"
        seconds = {} if kind == "adopted" else {"seconds": round(self.attempt.age, 6)}
        self.tell(kind, pid=self.attempt.program.pid, **seconds, **_told(self.last_outcome))
        self.started.set()
        if self._leaving:
            self.attempt.leave()

    def ready(self) -> None:
        self.is_ready.set()
        self.tell("ready")

    def unready(self, reason: str) -> None:
        self.is_ready.clear()
        self.tell("unhealthy", reason=reason)

    def unhealthy(self, reason: str) -> None:
        if self.state in (State.RUNNING, State.FROZEN):
            self.feed_life(Trigger.UNHEALTHY)
        self.unready(reason)

    def exited(self) -> None:
        self.is_ready.clear()
        self.feed_life(Trigger.EXITED)

    # Its life ---------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Be made, run, perhaps again and again, and end. Never raises: what goes wrong is told to those who wait."""
        try:
            await self._live()
        except LeftError:
            self.failure = StateError(f"{self} was left to another supervisor")
        except Exception as error:
            self.failure = self._understood(error)
        except BaseException:
            # The loop is being torn down under us: nothing may be awaited, but nothing may go on running either.
            self.attempt.let_go()
            raise
        finally:
            self._life = replace(self._life, state=State.ENDED)
            self._on_end()
            self.note("gone")
            self.feed.close()
            self.never_began = not self.started.is_set()
            self.started.set()
            self.settled.set()
            self._launched.set()
            self._ended.set()

    async def _live(self) -> None:
        action: Action | None = Action.LAUNCH
        if self._beginning == "lost":
            # Its last run is over, and its claim is ours.
            self.attempt.dismiss()
            self.started.set()
            self.exited()
            lost = Outcome(reason="lost", message="ended while no supervisor was there to see it")
            self.note("ended", outcome=lost)
            action = self._decide(lost)
        while True:
            if action is Action.LAUNCH:
                action = await self._attempt_once()
            elif action is Action.RELEASE:
                await self._release()
                self.outcome = self.last_outcome
                self.tell("stopped", **_told(self.outcome))
                return
            else:
                action = await self._rest()

    async def _attempt_once(self) -> Action | None:
        """One run, from its start to its end. Returns what comes then."""
        first = not self.started.is_set()
        before = None if first else self.attempt
        try:
            claiming = self._first_claiming() if first else await self._claim_again()
            if self._leaving:
                self.attempt.dismiss()
                raise LeftError
            if self._life.wish == "down" and self.last_outcome is not None:
                self.attempt.dismiss()
                self.exited()
                return self._decide(self.last_outcome)
            self._life = self._life.wishing("up")
            outcome = await self.attempt.go(self, claiming)
        except (LeftError, TakenError):
            raise
        except Exception as error:
            if isinstance(error, HeldError | BlockedError) and not first:
                self._life, action = self._life.held(time.monotonic() + HELD_PAUSE)
                return action
            failure = self._understood(error)
            survives = await self._survives(failure, first=first)
            ran = self.attempt is not before and self.attempt.started
            outcome = Outcome(reason="lost", message=str(failure)) if ran else _unstarted(failure)
            self._note_failure(failure, outcome, survives=survives)
            if not survives:
                raise failure from None
        else:
            self.note("ended", outcome=outcome)
        return self._decide(outcome)

    def _note_failure(self, failure: Exception, outcome: Outcome, *, survives: bool) -> None:
        """What is refused has not begun, and neither has what was never tried."""
        if isinstance(failure, AdmissionError):
            self.note("refused", limit=failure.limit)
        elif survives or self.attempt.started or isinstance(failure, StartError):
            self.note("ended", outcome=outcome)

    async def _survives(self, failure: Exception, *, first: bool) -> bool:
        """Whether a run that failed, rather than ended, leaves the sandbox alive, to try again."""
        if self.state is not State.STOPPING:
            self.exited()
        attempt, self.failure = self.attempt, failure
        if attempt.held is not None:
            self.claim = attempt.held.claim
        lost = self.claim is None or (self._beginning == "adopt" and attempt.held is None)
        if lost or self.claim in self._host.unfinished:
            return False
        if attempt.started or not first or self._beginning == "return":
            _log.warning("%s: %s", self, failure)
            self.started.set()
            return True
        # Whoever starts it is told, and nothing is left of it.
        try:
            await self.forget()
        finally:
            await self._release()
        return False

    def _first_claiming(self) -> Claiming | None:
        if self._beginning == "adopt":
            return None
        if self._beginning == "return":
            return "return"
        return "register" if self._registered else "claim"

    async def _claim_again(self) -> Claiming:
        """Make the claim the next run's.

        Raises:
            HeldError, BlockedError: the tenant is held or blocked, and nothing has changed.
            TakenError, RegistryError: it cannot be had.
        """
        assert self.claim is not None
        restart, owner = self._host.registry.sandboxes.restart, self._host.owner.owner_id
        async with self._changing:
            run = self.run._replace(run_id=secrets.token_hex(8), started_at=time.time())
            attempt = Attempt(self._host, run, self.feed)
            try:
                is_ours = await self._host.in_thread(restart, self.claim, owner, run.run_id, run.started_at)
            except (BlockedError, RegistryError) as error:
                # Who wants it restarted waits for the end of a hold, but not for this.
                self.failure = error
                self._tell_launched()
                raise
            if not is_ours:
                raise TakenError(f"{self} belongs to another supervisor by now")
            self.run, self.attempt = run, attempt
            self.claim = (*self.claim[:2], run.run_id)
        self.runs.append(run.run_id)
        self.restarts += 1
        self._tell_launched()
        return "held"

    def _tell_launched(self) -> None:
        """Tell those who want it restarted that another run has begun, or cannot."""
        launched, self._launched = self._launched, asyncio.Event()
        launched.set()

    def _decide(self, outcome: Outcome) -> Action | None:
        """Nothing of the run is left."""
        self.last_outcome = outcome
        chance = random.random()  # noqa: S311 - nobody gains from guessing it
        self._life, action = self._life.emptied(self.run.spec.restart, outcome, time.monotonic(), chance)
        if self.state is State.CRASH_LOOPING:
            self.outcome = outcome
            self.settled.set()
            self.tell("crash-looping", **_told(outcome))
        return action

    async def _rest(self) -> Action | None:
        """Wait until it is due, or somebody wants it restarted or ended."""
        while True:
            if self._leaving:
                raise LeftError
            self._woken.clear()
            if self._life.wish == "down":
                return self.feed_life(Trigger.STOP)
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
        self.outcome = None
        self.settled.clear()
        return self.feed_life(trigger)

    async def _turn(self, wish: Wish, grace: float) -> None:
        """Let the current run end, so that what is wished for can come."""
        if wish == "down":
            self.attempt.stop_making()
        await self.started.wait()
        self._life = self._life.wishing(wish)
        self._woken.set()
        attempt = self.attempt
        await attempt.executed.wait()
        if attempt.over:
            # It rests, or is on its way there: the wish is seen to then.
            return
        if self.state in (State.RUNNING, State.FROZEN):
            self.is_ready.clear()
            self.feed_life(Trigger.STOP if wish == "down" else Trigger.RESTART)
        await attempt.end("stopped", min(grace, self._grace_cap))

    @property
    def _registered(self) -> bool:
        return self.run.kind == "service" and self.run.spec.restart.mode == "always"

    async def _release(self) -> None:
        if self.claim is not None:
            await self._host.release_soon(self.claim)

    def _understood(self, error: Exception) -> Exception:
        """What the kernel refused on the way to a start is a failed start; what nobody foresaw is logged."""
        if isinstance(error, RunnerError):
            return error
        if isinstance(error, CgroupError | OSError) and not self.attempt.started:
            step = "cgroup" if isinstance(error, CgroupError) else "resources"
            remedy = error.remedy if isinstance(error, CgroupError) else None
            message = error.message if isinstance(error, CgroupError) else str(error)
            failed = StartError(f"cannot make the sandbox: {message}", step=step, errno=error.errno or 0, remedy=remedy)
            failed.__cause__ = error
            return failed
        _log.error("%s failed", self, exc_info=error)
        return error


def _unstarted(failure: Exception) -> Outcome:
    if isinstance(failure, StartError):
        return failed_to_start(failure)
    return Outcome(reason="failed-to-start", message=str(failure))


def _told(outcome: Outcome | None) -> dict[str, object]:
    """What an event tells of an end."""
    return {} if outcome is None else {"reason": outcome.reason, "message": outcome.message}
