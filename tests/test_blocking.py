"""A tenant that is blocked just when something is being started for it, or when somebody else lets it go on."""

from __future__ import annotations

import asyncio

import pytest

from pactown_runner import RunnerError, Sandbox, Supervisor
from pactown_runner.registry import Standing
from tests.supervising import USER, soon, spec

pytestmark = [pytest.mark.host]

TRIES = 40


async def test_what_is_just_being_started_does_not_keep_a_block_from_holding(supervisor: Supervisor) -> None:
    await supervisor.users.get_or_create(USER)
    ends = set()
    for number in range(TRIES):
        starting = asyncio.create_task(supervisor.start(spec("exec sleep 600")))
        # At each moment of a start once.
        await asyncio.sleep(number * 0.0002)
        await soon(supervisor.users.set_standing(USER, Standing(None, blocked=True)))
        sandbox: Sandbox | None = None
        try:
            sandbox = await soon(starting)
        except RunnerError as error:
            ends.add(error.code)
        else:
            # It stands still, or will have before it is thawed.
            ends.add(str(sandbox.state))
        await soon(supervisor.users.set_standing(USER, Standing(None, blocked=False)))
        if sandbox is not None:
            assert sandbox.state == "running"
            await soon(sandbox.stop(0))
    assert "frozen" in ends
    assert ends <= {"blocked", "frozen"}


async def test_blocks_that_are_given_and_taken_back_at_once_do_not_wait_for_each_other(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec("exec sleep 600"))
    give = supervisor.users.set_standing
    for _ in range(TRIES):
        both = [give(USER, Standing(None, blocked)) for blocked in (True, False, True, False)]
        await soon(asyncio.gather(*both), 20)
        assert sandbox.state == "running"
