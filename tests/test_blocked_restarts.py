"""What is to be started again while its tenant is blocked: it waits for the end of that, and nothing is lost."""

from __future__ import annotations

import asyncio

import pytest

from pactown_runner import Supervisor
from pactown_runner.errors import BlockedError
from pactown_runner.models import State
from pactown_runner.registry import Standing
from pactown_runner.specs import RestartMode, RestartPolicy
from tests.supervising import USER, eventually, line_of, soon, spec

pytestmark = pytest.mark.host

BLOCKED, FREE = Standing(None, blocked=True), Standing(None, blocked=False)


@pytest.mark.parametrize("mode", ["no", "always"])
async def test_what_a_blocked_tenant_has_is_not_restarted_and_goes_on_afterwards(
    supervisor: Supervisor, mode: RestartMode
) -> None:
    sandbox = await supervisor.start(spec("exec sleep 600", restart=RestartPolicy(mode, max_restarts=3)))
    pid = sandbox.pid
    await soon(supervisor.users.set_standing(USER, BLOCKED))
    with pytest.raises(BlockedError, match="blocked"):
        await soon(sandbox.restart(0))
    assert (sandbox.state, sandbox.pid, sandbox.last_outcome) == (State.FROZEN, pid, None)
    await soon(supervisor.users.set_standing(USER, FREE))
    assert sandbox.state is State.RUNNING
    await soon(sandbox.restart(0))
    assert (sandbox.state, sandbox.restarts) == (State.RUNNING, 1)


async def test_that_nothing_is_started_for_a_blocked_tenant_is_no_failure(supervisor: Supervisor) -> None:
    restart = RestartPolicy("always", backoff=0.01, backoff_max=0.01, max_restarts=1, healthy_after=1000.0)
    sandbox = await supervisor.start(spec("exec sleep 600", restart=restart))
    await soon(supervisor.users.set_standing(USER, BLOCKED))
    await sandbox._holdings.on_cgroup(lambda cgroup: cgroup.kill())
    course = sandbox.course
    await eventually(lambda: isinstance(course.failure, BlockedError) and sandbox.state is not State.STARTING)
    # It is the second failure that would be one too many.
    assert (sandbox.state, sandbox.outcome) == (State.BACKING_OFF, None)
    with pytest.raises(BlockedError):
        await soon(sandbox.restart())
    await soon(supervisor.users.set_standing(USER, FREE))
    await eventually(lambda: sandbox.state is State.RUNNING)
    assert sandbox.restarts == 1


@pytest.mark.parametrize("mode", ["no", "always"])
async def test_who_is_blocked_in_the_midst_of_a_restart_has_it_afterwards(
    supervisor: Supervisor, mode: RestartMode
) -> None:
    program = "trap '' TERM; echo ready; while :; do sleep 0.01; done"
    sandbox = await supervisor.start(spec(program, restart=RestartPolicy(mode, max_restarts=0)))
    await line_of(sandbox)
    restarting = asyncio.create_task(sandbox.restart(grace=1000))
    await eventually(lambda: sandbox.state is State.STOPPING)
    await soon(supervisor.users.set_standing(USER, BLOCKED))
    sandbox.course.attempt.hasten(0)
    with pytest.raises(BlockedError):
        await soon(restarting)
    await eventually(lambda: sandbox.state is State.BACKING_OFF)
    await soon(supervisor.users.set_standing(USER, FREE))
    await eventually(lambda: sandbox.state is State.RUNNING)
    await soon(sandbox.kill())


async def test_what_backs_off_when_its_tenant_is_blocked_can_be_stopped(supervisor: Supervisor) -> None:
    restart = RestartPolicy("on-failure", backoff=0.01)
    sandbox = await supervisor.start(spec("exec sleep 600", restart=restart))
    await soon(supervisor.users.set_standing(USER, BLOCKED))
    await sandbox._holdings.on_cgroup(lambda cgroup: cgroup.kill())
    await eventually(lambda: sandbox.state is State.BACKING_OFF and sandbox.course.failure is not None)
    assert (await soon(sandbox.stop())).reason == "signaled"
    assert supervisor.list() == []
