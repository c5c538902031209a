"""A tenant that is blocked just when something is being started for it, or when somebody else lets it go on."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pactown_runner import RunnerError, Sandbox, Settings, Supervisor
from pactown_runner.registry import Standing
from pactown_runner.standings import Standings
from tests.supervising import USER, python, soon, spec

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


MAZE = """
import os
os.mkdir("d")
os.symlink("d", "maze0")
for n in range(18):
    os.symlink("d/../" * 800 + f"maze{n}", f"maze{n + 1}")
"""
"""Whoever enters `maze18` is on the way for a while. The kernel follows 40 links, and may begin anew half-way."""


async def test_what_is_just_being_started_again_stands_still_when_it_has(supervisor: Supervisor) -> None:
    assert (await soon(supervisor.run(spec(python(MAZE))))).ok
    sandbox = await supervisor.start(spec(["sleep", "600"], cwd="maze18"))
    for _ in range(10):
        before = sandbox.run_id
        restarting = asyncio.create_task(sandbox.restart(0))
        while sandbox.run_id == before:
            await asyncio.sleep(0)
        await soon(supervisor.users.set_standing(USER, Standing(None, blocked=True)))
        assert sandbox.state == "frozen"
        await soon(restarting)
        await soon(supervisor.users.set_standing(USER, Standing(None, blocked=False)))
        assert sandbox.state == "running"


async def test_blocks_that_are_given_and_taken_back_at_once_do_not_wait_for_each_other(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec("exec sleep 600"))
    give = supervisor.users.set_standing
    for _ in range(TRIES):
        both = [give(USER, Standing(None, blocked)) for blocked in (True, False, True, False)]
        await soon(asyncio.gather(*both), 20)
        assert sandbox.state == "running"


@contextlib.contextmanager
def registry_busy(settings: Settings) -> Iterator[None]:
    """While somebody else writes to the registry, whoever wants to waits."""
    with contextlib.closing(sqlite3.connect(settings.state_dir / "registry.db")) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.rollback()


async def test_a_block_whose_caller_is_cancelled_holds_for_all_of_it(
    supervisor: Supervisor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandboxes = [await supervisor.start(spec("exec sleep 600", service=f"s{number}")) for number in range(3)]
    begun = threading.Event()
    change = Standings.change

    def seen(*arguments: Any) -> None:
        begun.set()
        change(*arguments)

    monkeypatch.setattr(Standings, "change", seen)
    for blocked, state in ((True, "frozen"), (False, "running")):
        begun.clear()
        with registry_busy(settings):
            task = asyncio.create_task(supervisor.users.set_standing(USER, Standing(None, blocked)))
            assert await asyncio.to_thread(begun.wait, 30)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task], timeout=0)
        with pytest.raises(asyncio.CancelledError):
            await soon(task)
        assert (await supervisor.users.standing(USER)).blocked is blocked
        assert [str(sandbox.state) for sandbox in sandboxes] == [state] * 3
        assert [sandbox.cgroup.frozen() for sandbox in sandboxes if sandbox.cgroup] == [blocked] * 3
