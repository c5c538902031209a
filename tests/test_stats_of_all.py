"""Reading the counters of all sandboxes at once."""

from __future__ import annotations

import asyncio
import os

import pytest

from pactown_runner import Settings, Supervisor
from pactown_runner.errors import StateError
from tests.supervising import leaves_nothing, line_of, soon, spec

pytestmark = pytest.mark.host


async def test_all_or_one_users_are_counted(supervisor: Supervisor) -> None:
    for user, service in (("a", "api"), ("a", "web"), ("b", "api")):
        await line_of(await supervisor.start(spec("echo ready; exec sleep 1000", user=user, service=service)))
    found = await soon(supervisor.stats())
    assert set(found) == {("a", "api"), ("a", "web"), ("b", "api")}
    assert all(stats.cpu_usage_usec and stats.cpu_pressure is None for stats in found.values())
    with_pressure = await soon(supervisor.stats(supervisor.list("b"), pressure=True))
    assert list(with_pressure) == [("b", "api")]
    assert (with_pressure["b", "api"].cpu_pressure is None) == (not os.path.exists("/proc/pressure/cpu"))


async def test_what_ends_meanwhile_is_left_out(supervisor: Supervisor, settings: Settings) -> None:
    with leaves_nothing(settings):
        await stats_beside_a_churn(supervisor)


async def stats_beside_a_churn(supervisor: Supervisor) -> None:
    staying = await supervisor.start(spec("echo ready; exec sleep 1000", service="stays"))
    await line_of(staying)

    async def churn() -> None:
        for number in range(20):
            sandbox = await supervisor.start_run(spec("true", service=f"s{number}"))
            await sandbox.wait()

    churning = [asyncio.create_task(churn())]
    while not all(task.done() for task in churning):
        found = await soon(supervisor.stats())
        assert found[staying.user_id, "stays"].cpu_usage_usec
    await asyncio.gather(*churning)
    assert set(await supervisor.stats()) == {(staying.user_id, "stays")}
    await soon(staying.stop(grace=0))
    assert await supervisor.stats() == {}


async def test_a_supervisor_that_has_ended_counts_nothing(settings: Settings) -> None:
    async with Supervisor(settings=settings) as supervisor:
        assert await supervisor.stats() == {}
    with pytest.raises(StateError):
        await supervisor.stats()
