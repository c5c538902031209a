"""Half a minute of a tenant that wants to bring the host down in two ways, beside another that goes on serving."""

from __future__ import annotations

import asyncio

import pytest

from cgroups import Limits
from pactown_runner import Sandbox, Settings, Supervisor
from tests.kernel.conftest import MIB, Bystander, Measure, left, slice_of
from tests.supervising import processes_of, python, soon, spec

pytestmark = pytest.mark.kernel

SECONDS = 30.0
FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
MEMORY_BOMB = """
import os
while True:
    for _ in range(4):
        try:
            if not os.fork():
                held = []
                while True:
                    held.append(b"x" * (1 << 20))
        except OSError:
            pass
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass
"""


LIMITS = Limits(memory_max="128M", pids_max=64, cpu_max=0.75)


async def test_the_bystander_answers_all_along(
    supervisor: Supervisor, settings: Settings, bystander: Bystander, measured: Measure
) -> None:
    """Both bombs at once, as two services of one tenant."""
    # Keeps the tenant's slice, so that it can be looked at afterwards.
    idle = await supervisor.start(spec("exec sleep 1000", user="villain", service="idle"))

    async def bomb(name: str, source: str) -> Sandbox:
        return await supervisor.start(
            spec(python(source), user="villain", service=name, timeout=SECONDS, limits=LIMITS)
        )

    async with bystander.answering():
        forks, memory = await bomb("forks", FORK_BOMB), await bomb("memory", MEMORY_BOMB)
        ends = await soon(asyncio.gather(forks.wait(), memory.wait()), SECONDS + 30)
    measured("answers", len(bystander.answers))
    measured("slowest answer, s", bystander.worst)
    assert bystander.worst < 5
    for outcome in ends:
        assert outcome.reason == "timed-out"
        assert SECONDS <= outcome.wall_seconds < SECONDS + 15
        measured("s from the deadline to the end of all", outcome.wall_seconds - SECONDS)
    # Each came up against its own limits alone.
    end_of_forks, end_of_memory = ends
    assert end_of_forks.stats is not None
    assert end_of_forks.stats.pids_peak == 64
    assert (end_of_forks.oom_level, end_of_forks.stats.oom_kill) == (None, 0)
    measured("forks refused", end_of_forks.stats.pids_events_max)
    assert end_of_forks.survivors_killed >= 60
    assert end_of_memory.stats is not None
    assert end_of_memory.oom_level == "service"
    measured("processes killed by the kernel", end_of_memory.stats.oom_kill)
    assert (end_of_memory.stats.oom_kill or 0) > 5
    assert end_of_memory.stats.memory_peak is not None
    measured("bytes above memory_max", end_of_memory.stats.memory_peak - 128 * MIB)
    assert end_of_memory.stats.memory_peak <= 160 * MIB
    # Nothing of them runs, and nothing is charged to the tenant any more; the tenant's other service is as it was.
    assert list(processes_of(idle.user.linux_uid)) == [idle.pid]
    charged = int((slice_of(idle) / "memory.current").read_text())
    measured("bytes charged to the tenant afterwards", charged)
    assert charged < 8 * MIB
    assert (await idle.stats()).oom_kill == 0
    assert sorted(path.name for path in left(settings) if path.suffix == ".scope") == ["http.scope", "idle.scope"]
    # The tenant may go on.
    assert (await soon(supervisor.run(spec("true", user="villain", service="forks", limits=LIMITS)))).ok
