"""Half a minute of a tenant that wants to bring the host down, beside another that goes on serving."""

from __future__ import annotations

import pytest

from cgroups import Limits
from pactown_runner import Settings, Supervisor
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


@pytest.mark.parametrize("bomb", ["fork", "memory"])
async def test_the_bystander_answers_all_along(
    supervisor: Supervisor, settings: Settings, bystander: Bystander, measured: Measure, bomb: str
) -> None:
    limits = Limits(memory_max="128M", pids_max=64, cpu_max=1.5)
    source = FORK_BOMB if bomb == "fork" else MEMORY_BOMB
    # Keeps the tenant's slice, so that it can be looked at afterwards.
    idle = await supervisor.start(spec("exec sleep 1000", user="villain", service="idle"))
    async with bystander.answering():
        sandbox = await supervisor.start(
            spec(python(source), user="villain", service="bomb", timeout=SECONDS, limits=limits)
        )
        outcome = await soon(sandbox.wait(), SECONDS + 30)
    measured("answers", len(bystander.answers))
    measured("slowest answer, s", bystander.worst)
    assert bystander.worst < 5
    assert outcome.reason == "timed-out"
    assert SECONDS <= outcome.wall_seconds < SECONDS + 15
    measured("s from the deadline to the end of all", outcome.wall_seconds - SECONDS)
    stats = outcome.stats
    assert stats is not None
    if bomb == "fork":
        assert stats.pids_peak == 64
        assert (outcome.oom_level, stats.oom_kill) == (None, 0)
        measured("forks refused", stats.pids_events_max)
        assert outcome.survivors_killed >= 60
    else:
        assert outcome.oom_level == "service"
        measured("processes killed by the kernel", stats.oom_kill)
        assert (stats.oom_kill or 0) > 5
        assert stats.memory_peak is not None
        measured("bytes above memory_max", stats.memory_peak - 128 * MIB)
        assert stats.memory_peak <= 160 * MIB
    # Nothing of it runs, and nothing is charged to the tenant any more; the tenant's other service is as it was.
    assert list(processes_of(sandbox.user.linux_uid)) == [idle.pid]
    charged = int((slice_of(idle) / "memory.current").read_text())
    measured("bytes charged to the tenant afterwards", charged)
    assert charged < 8 * MIB
    assert (await idle.stats()).oom_kill == 0
    assert sorted(path.name for path in left(settings) if path.suffix == ".scope") == ["http.scope", "idle.scope"]
    # The tenant may go on.
    assert (await soon(supervisor.run(spec("true", user="villain", service="bomb", limits=limits)))).ok
