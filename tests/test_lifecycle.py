"""Whatever happens to a sandbox, in whatever order, nothing runs behind a state that says so."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pactown_runner.errors import StateError
from pactown_runner.lifecycle import RESTING, TABLE, Action, Life, Trigger, pause
from pactown_runner.models import Outcome, State
from pactown_runner.specs import RestartMode, RestartPolicy

FAILED = Outcome(reason="exited", exit_code=1, wall_seconds=0.1)
EMPTY = (Trigger.OVER, Trigger.RETRY, Trigger.GIVE_UP, Trigger.AGAIN, Trigger.HELD)


def test_a_resting_state_is_entered_only_when_nothing_runs() -> None:
    for (state, trigger), (to, _) in TABLE.items():
        if to in RESTING:
            assert state in RESTING or trigger in EMPTY, (state, trigger)


def test_nothing_leads_out_of_the_end() -> None:
    assert not [trigger for state, trigger in TABLE if state is State.ENDED]


def test_a_program_is_launched_only_where_none_runs() -> None:
    for (state, trigger), (to, action) in TABLE.items():
        assert (action is Action.LAUNCH) == (to is State.STARTING)
        if action is Action.LAUNCH:
            assert state in RESTING or trigger in EMPTY, (state, trigger)


@pytest.mark.parametrize(("state", "trigger"), sorted(set(itertools.product(State, Trigger)) - set(TABLE)))
def test_what_is_not_in_the_table_is_an_error(state: State, trigger: Trigger) -> None:
    with pytest.raises(StateError, match=str(trigger)):
        Life(state).after(trigger)


class World:
    """A sandbox's processes and driver: obeys actions as the real one does, and lets anything happen in between."""

    def __init__(self, policy: RestartPolicy) -> None:
        self.policy = policy
        self.life = Life()
        self.alive = False
        self.executing = True
        self.released = False
        self.now = 0.0
        self.runs = 1

    def happen(self, what: str, outcome: Outcome) -> None:
        try:
            self._happen(what, outcome)
        except StateError:
            # Refused: nothing has changed.
            return
        assert not (self.alive and self.life.state in RESTING)
        assert not (self.executing and self.life.state in RESTING)
        assert self.released == (self.life.state is State.ENDED)

    def _happen(self, what: str, outcome: Outcome) -> None:
        if what == "executed" and self.executing:
            self.executing, self.alive = False, True
            self._feed(Trigger.EXECUTED)
        elif what == "not executed" and self.executing:
            self.executing = False
            self._feed(Trigger.EXITED)
        elif what == "held" and not self.alive and (self.executing or self.life.state is State.STOPPING):
            self.executing = False
            self.life, action = self.life.held(self.now + 1)
            self._obey(action)
        elif what == "exited" and self.alive:
            # The first process; others may live until they are killed.
            self._feed(Trigger.EXITED)
        elif what == "emptied" and not self.alive and not self.executing and self.life.state not in RESTING:
            life, action = self.life.emptied(self.policy, outcome, self.now, 0.5)
            self.life = life
            self._obey(action)
        elif what == "due" and self.life.state is State.BACKING_OFF:
            self.now = max(self.now, self.life.due)
            self._feed(Trigger.DUE)
        elif what in ("stop", "restart") and not self.executing:
            trigger = Trigger(what)
            life, action = self.life.after(trigger)
            self.life = life.wishing("down" if trigger is Trigger.STOP else "again")
            self._obey(action)
        elif what in ("froze", "thawed", "unhealthy"):
            self._feed(Trigger(what))

    def _feed(self, trigger: Trigger) -> None:
        self.life, action = self.life.after(trigger)
        self._obey(action)

    def _obey(self, action: Action | None) -> None:
        if action is Action.LAUNCH:
            assert not self.alive
            assert not self.executing
            self.executing = True
            self.runs += 1
        elif action in (Action.TERMINATE, Action.KILL):
            # The worst case for TERMINATE is that it takes until the kill; either way what follows is empty.
            self.alive = False
        elif action is Action.RELEASE:
            assert not self.released
            self.released = True


HAPPENINGS = st.sampled_from(
    ["executed", "not executed", "held", "exited", "emptied", "due", "stop", "restart", "froze", "thawed", "unhealthy"]
)
OUTCOMES = st.sampled_from(
    [
        FAILED,
        Outcome(reason="exited", exit_code=0, wall_seconds=0.1),
        Outcome(reason="oom-killed", signal=9, wall_seconds=100),
        Outcome(reason="lost"),
    ]
)


@given(st.sampled_from(["no", "on-failure", "always"]), st.lists(st.tuples(HAPPENINGS, OUTCOMES), max_size=60))
def test_no_order_of_events_leaves_a_process_behind(mode: RestartMode, happenings: list[tuple[str, Outcome]]) -> None:
    world = World(RestartPolicy(mode, max_restarts=2))
    for what, outcome in happenings:
        world.happen(what, outcome)


@given(st.sampled_from(["no", "on-failure", "always"]), st.lists(st.tuples(HAPPENINGS, OUTCOMES), max_size=30))
def test_from_everywhere_a_stop_ends_it(mode: RestartMode, happenings: list[tuple[str, Outcome]]) -> None:
    world = World(RestartPolicy(mode, max_restarts=2))
    for what, outcome in happenings:
        world.happen(what, outcome)
    for what in ("executed", "stop", "emptied"):
        world.happen(what, FAILED)
    assert world.life.state is State.ENDED
    assert world.released


def _stopping(failures: int = 0) -> Life:
    return Life(State.STOPPING, failures=failures)


@pytest.mark.parametrize(
    ("mode", "outcome", "state"),
    [
        ("no", FAILED, State.ENDED),
        ("on-failure", FAILED, State.BACKING_OFF),
        ("on-failure", Outcome(reason="exited", exit_code=0), State.ENDED),
        ("on-failure", Outcome(reason="oom-killed", signal=9), State.BACKING_OFF),
        ("on-failure", Outcome(reason="lost"), State.BACKING_OFF),
        ("on-failure", Outcome(reason="timed-out", signal=9), State.BACKING_OFF),
        ("always", Outcome(reason="exited", exit_code=0), State.BACKING_OFF),
    ],
)
def test_the_policy_decides(mode: RestartMode, outcome: Outcome, state: State) -> None:
    life, _ = _stopping().emptied(RestartPolicy(mode), outcome, 0.0, 0.0)
    assert life.state is state


def test_pauses_double_up_to_the_cap_and_begin_anew_after_a_healthy_run() -> None:
    policy = RestartPolicy("always", backoff=1, backoff_max=5, jitter=0, healthy_after=10, max_restarts=None)
    life, dues = _stopping(), []
    for _ in range(5):
        life, _ = life.emptied(policy, FAILED, 100.0, 0.9)
        dues.append(life.due - 100)
        life = Life(State.STOPPING, failures=life.failures)
    assert dues == [1, 2, 4, 5, 5]
    life, _ = life.emptied(policy, Outcome(reason="exited", exit_code=1, wall_seconds=10), 100.0, 0.9)
    assert life.due == 101


def test_being_held_is_no_failure() -> None:
    life, action = Life(failures=2).held(7.0)
    assert (life, action) == (Life(State.BACKING_OFF, failures=2, due=7.0), Action.PAUSE)
    life, action = life.after(Trigger.DUE)
    assert (life.state, life.failures, action) == (State.STARTING, 2, Action.LAUNCH)


def test_jitter_only_shortens() -> None:
    policy = RestartPolicy("always", backoff=1, jitter=0.2)
    assert pause(policy, 0, 0.0) == 1
    assert pause(policy, 0, 1.0) == pytest.approx(0.8)
    assert pause(policy, 100_000, 0.0) == policy.backoff_max


def test_a_spent_budget_ends_in_a_crash_loop_and_a_restart_renews_it() -> None:
    policy = RestartPolicy("on-failure", max_restarts=2)
    life = _stopping()
    for _ in range(2):
        life, action = life.emptied(policy, FAILED, 0.0, 0.0)
        assert action is Action.PAUSE
        life = Life(State.STOPPING, failures=life.failures)
    life, action = life.emptied(policy, FAILED, 0.0, 0.0)
    assert (life.state, action, life.failures) == (State.CRASH_LOOPING, None, 0)
    life, action = life.after(Trigger.RESTART)
    assert (life.state, action) == (State.STARTING, Action.LAUNCH)
