"""The life of a sandbox as data: one table of what may happen in which state, and what has to be done then. Pure.

A state in which nothing of a sandbox runs (`RESTING`) is entered from another one only by a trigger that says that
nothing runs any more, or from one in which nothing ran either. So whatever the order of triggers, no process is left
behind. What is not in the table cannot happen, and asking for it is an error.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Literal

from .errors import StateError
from .models import Outcome, State
from .specs import RestartPolicy

__all__ = ["RESTING", "TABLE", "Action", "Life", "Trigger", "Wish"]

Wish = Literal["up", "down", "again"]
"""What is to become of it: it runs as its policy says, it ends for good, or it ends and is started again."""


class Trigger(enum.StrEnum):
    """What happens to a sandbox."""

    EXECUTED = "executed"
    FROZE = "froze"
    THAWED = "thawed"
    STOP = "stop"
    RESTART = "restart"
    UNHEALTHY = "unhealthy"
    EXITED = "exited"
    """The first process has exited, its time is up, or it could not be started: whatever is left is killed."""
    OVER = "over"
    RETRY = "retry"
    GIVE_UP = "give-up"
    AGAIN = "again"
    """These four: nothing of the run is left. Which one it is `Life.emptied` decides."""
    HELD = "held"
    """It is not to be started for now: nothing of a run has begun, or nothing is left of it."""
    DUE = "due"


class Action(enum.StrEnum):
    """What has to be done about it."""

    LAUNCH = "launch"
    TERMINATE = "terminate"
    """SIGTERM to every process, and SIGKILL when the grace time is over."""
    KILL = "kill"
    PAUSE = "pause"
    """Come back with `DUE` when the time has come."""
    RELEASE = "release"
    """Give the name free."""


RESTING = frozenset({State.BACKING_OFF, State.CRASH_LOOPING, State.ENDED})
"""The states in which nothing of a sandbox runs."""

_LIVE = (State.RUNNING, State.FROZEN)

TABLE: dict[tuple[State, Trigger], tuple[State, Action | None]] = {
    (State.STARTING, Trigger.EXECUTED): (State.RUNNING, None),
    (State.STARTING, Trigger.FROZE): (State.FROZEN, None),  # found so, by a successor
    (State.STARTING, Trigger.EXITED): (State.STOPPING, Action.KILL),
    (State.RUNNING, Trigger.FROZE): (State.FROZEN, None),
    (State.FROZEN, Trigger.THAWED): (State.RUNNING, None),
    **{(state, Trigger.STOP): (State.STOPPING, Action.TERMINATE) for state in _LIVE},
    **{(state, Trigger.RESTART): (State.STOPPING, Action.TERMINATE) for state in _LIVE},
    **{(state, Trigger.UNHEALTHY): (State.STOPPING, Action.TERMINATE) for state in _LIVE},
    **{(state, Trigger.EXITED): (State.STOPPING, Action.KILL) for state in _LIVE},
    (State.STOPPING, Trigger.STOP): (State.STOPPING, Action.TERMINATE),
    (State.STOPPING, Trigger.EXITED): (State.STOPPING, Action.KILL),
    (State.STOPPING, Trigger.OVER): (State.ENDED, Action.RELEASE),
    (State.STOPPING, Trigger.RETRY): (State.BACKING_OFF, Action.PAUSE),
    (State.STOPPING, Trigger.GIVE_UP): (State.CRASH_LOOPING, None),
    (State.STOPPING, Trigger.AGAIN): (State.STARTING, Action.LAUNCH),
    (State.STARTING, Trigger.HELD): (State.BACKING_OFF, Action.PAUSE),
    (State.STOPPING, Trigger.HELD): (State.BACKING_OFF, Action.PAUSE),
    (State.BACKING_OFF, Trigger.DUE): (State.STARTING, Action.LAUNCH),
    (State.BACKING_OFF, Trigger.RESTART): (State.STARTING, Action.LAUNCH),
    (State.BACKING_OFF, Trigger.STOP): (State.ENDED, Action.RELEASE),
    (State.CRASH_LOOPING, Trigger.RESTART): (State.STARTING, Action.LAUNCH),
    (State.CRASH_LOOPING, Trigger.STOP): (State.ENDED, Action.RELEASE),
}


@dataclass(frozen=True, slots=True)
class Life:
    """Where a sandbox is in its life.

    Attributes:
        state: as in `State`.
        wish: what is to become of it.
        failures: restarts in a row without a healthy run in between.
        due: when it is started again, on the clock of whoever asks; while `backing-off` only.
    """

    state: State = State.STARTING
    wish: Wish = "up"
    failures: int = 0
    due: float = 0.0

    def after(self, trigger: Trigger) -> tuple[Life, Action | None]:
        """What follows from a trigger.

        Raises:
            StateError: that cannot happen in this state.
        """
        try:
            state, action = TABLE[self.state, trigger]
        except KeyError:
            raise StateError(f"a sandbox that is {self.state} cannot be told {str(trigger)!r}") from None
        return replace(self, state=state), action

    def wishing(self, wish: Wish) -> Life:
        """It is to end for good, or to be started again. Who wants it to end has the last word."""
        return self if self.wish == "down" else replace(self, wish=wish)

    def held(self, due: float) -> tuple[Life, Action | None]:
        """Its tenant is held, so that nothing starts: it is tried again when `due`, and that counts as no failure."""
        life, action = self.after(Trigger.HELD)
        return replace(life, due=due), action

    def emptied(self, policy: RestartPolicy, outcome: Outcome, now: float, chance: float) -> tuple[Life, Action | None]:
        """Nothing of a run is left: decide what comes then.

        Args:
            policy: what was asked for.
            outcome: how the run ended.
            now: seconds on any clock.
            chance: a random number from 0 to 1, for the jitter.
        """
        failures = 0 if outcome.wall_seconds >= policy.healthy_after else self.failures
        if self.wish == "down":
            trigger = Trigger.OVER
        elif self.wish == "again":
            trigger, failures = Trigger.AGAIN, 0
        elif policy.mode == "no" or (policy.mode == "on-failure" and outcome.ok):
            trigger = Trigger.OVER
        elif policy.max_restarts is not None and failures >= policy.max_restarts:
            trigger = Trigger.GIVE_UP
        else:
            trigger = Trigger.RETRY
        life, action = self.after(trigger)
        if trigger is Trigger.RETRY:
            return replace(life, failures=failures + 1, due=now + pause(policy, failures, chance)), action
        if trigger is Trigger.OVER:
            return life, action
        # Whoever restarts a crash-looping one gives it a new budget.
        return replace(life, wish="up", failures=0), action


def pause(policy: RestartPolicy, failures: int, chance: float) -> float:
    """Seconds between two runs, after so many restarts in a row; shortened by `chance` of the jitter."""
    # Without the inner min a service that fails for weeks would overflow a float.
    doubled = policy.backoff * 2.0 ** min(failures, 64)
    return min(doubled, policy.backoff_max) * (1 - policy.jitter * chance)
