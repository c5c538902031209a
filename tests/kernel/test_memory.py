"""Memory limits against programs that want more: what is killed, what is not, and what is said about it."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from cgroups import Limits
from pactown_runner import Outcome, Sandbox, Settings, Supervisor
from pactown_runner.errors import LimitsError
from tests.kernel.conftest import MIB, Bystander, Measure, cgroup_of, left, slice_of
from tests.supervising import eventually, line_of, lines, python, soon, spec

pytestmark = pytest.mark.kernel

GROW = """
held = []
while len(held) < {mib}:
    held.append(b"x" * (1 << 20))
print("ready", flush=True)
"""
HOLD = GROW + "import time\ntime.sleep(1000)\n"
TALK = """
import sys
def grow(mib):
    held.append(b"x" * (mib << 20))
held = []
print("ready", flush=True)
for line in sys.stdin:
    exec(line)
    print("did " + line.strip(), flush=True)
"""
"""Does what it is told, line by line, so that a test can let it grow step by step."""


async def tell(sandbox: Sandbox, line: str) -> None:
    await sandbox.send(line.encode() + b"\n")
    await line_of(sandbox, f"did {line}")


def is_killed(outcome: Outcome, level: str = "service") -> None:
    assert outcome.stats is not None
    assert (outcome.reason, outcome.oom_level) == ("oom-killed", level), outcome
    assert outcome.stats.oom_kill


def overrun(outcome: Outcome, limit: int) -> int:
    """Bytes above the limit at the worst, which must not be more than a tenth or 32 MiB."""
    assert outcome.stats is not None
    assert outcome.stats.memory_peak is not None
    over = outcome.stats.memory_peak - limit
    assert over <= max(limit // 10, 32 * MIB)
    return over


# ---- One offender


async def test_anonymous_memory(supervisor: Supervisor, bystander: Bystander, measured: Measure) -> None:
    limits = Limits(memory_max="64M")
    async with bystander.answering():
        outcome = await soon(supervisor.run(spec(python(GROW.format(mib=500)), limits=limits)))
    is_killed(outcome)
    assert outcome.signal == 9
    assert outcome.stats is not None
    assert outcome.stats.oom
    measured("bytes above memory_max", overrun(outcome, 64 * MIB))
    measured("bystander's slowest answer, s", bystander.worst)


async def test_shared_memory_counts_too(supervisor: Supervisor) -> None:
    # Unlinked at once: nobody removes a killed program's files.
    source = """
import os
fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
for _ in range(500):
    os.write(fd, b"x" * (1 << 20))
print("ready")
"""
    outcome = await soon(supervisor.run(spec(python(source), limits=Limits(memory_max="48M"))))
    is_killed(outcome)
    overrun(outcome, 48 * MIB)


async def test_page_cache_is_reclaimed_and_nothing_killed(supervisor: Supervisor) -> None:
    # What a slow disk has not taken yet cannot be reclaimed, and the kernel might kill for it.
    source = """
import os
block = b"x" * (1 << 20)
with open("big", "wb+") as file:
    for _ in range(12):
        for _ in range(8):
            file.write(block)
        file.flush()
        os.fdatasync(file.fileno())
    file.seek(0)
    while file.read(1 << 20):
        pass
os.unlink("big")
"""
    outcome = await soon(supervisor.run(spec(python(source), limits=Limits(memory_max="32M"))), 100)
    assert outcome.ok, outcome
    assert outcome.stats is not None
    assert (outcome.oom_level, outcome.stats.oom_kill) == (None, 0)
    assert outcome.stats.memory_events_max
    overrun(outcome, 32 * MIB)


CHILDREN = """
import os, signal, sys
def child():
    held = [b"x" * (1 << 20) for _ in range({mib})]
    signal.pause()
children = []
for _ in range({children}):
    if not (pid := os.fork()):
        child()
    children.append(pid)
pid, status = os.wait()
print("died", os.waitstatus_to_exitcode(status), flush=True)
for pid in children:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


async def test_many_small_children_are_one_big_offender(supervisor: Supervisor) -> None:
    source = CHILDREN.format(children=12, mib=16)
    sandbox = await supervisor.start(spec(python(source), limits=Limits(memory_max="80M")))
    outcome = await soon(sandbox.wait())
    # Only a child was killed, and the program itself could go on: it says so by its exit code, and we by the level.
    assert outcome.ok, outcome
    assert outcome.oom_level == "service"
    assert outcome.stats is not None
    assert outcome.stats.oom_kill
    assert await lines(sandbox) == ["died -9"]
    overrun(outcome, 80 * MIB)


async def test_the_whole_service_dies_when_it_is_a_group(supervisor: Supervisor) -> None:
    limits = Limits(memory_max="80M", memory_oom_group=True)
    other = await supervisor.start(spec("exec sleep 1000", service="other"))
    sandbox = await supervisor.start(spec(python(CHILDREN.format(children=12, mib=16)), limits=limits))
    outcome = await soon(sandbox.wait())
    is_killed(outcome)
    assert outcome.signal == 9
    assert await lines(sandbox) == []
    # The group is the service, never the tenant.
    assert (slice_of(other) / "memory.oom.group").read_text() == "0\n"
    assert other.state == "running"
    assert outcome.stats is not None
    assert outcome.stats.oom_kill is not None
    assert outcome.stats.oom_kill > 1


# ---- Whose limit it was


async def test_the_tenants_limit_is_told_from_the_services_own(settings: Settings) -> None:
    small = Limits(memory_max="24M")
    async with Supervisor(settings=replace(settings, tenant_limits=Limits(memory_max="96M"))) as supervisor:
        honest = await supervisor.start(spec(python(HOLD.format(mib=4)), service="honest"))
        await line_of(honest)
        assert (slice_of(honest) / "memory.max").read_text() == f"{96 * MIB}\n"
        greedy = await soon(supervisor.run(spec(python(GROW.format(mib=500)), service="greedy")))
        is_killed(greedy, "tenant")
        assert greedy.stats is not None
        assert greedy.stats.oom == 0
        limited = await soon(supervisor.run(spec(python(GROW.format(mib=500)), service="limited", limits=small)))
        is_killed(limited, "service")
        # The tenant's other service is no part of it.
        assert honest.state == "running"
        assert (await honest.stats()).oom_kill == 0
        stopped = await honest.stop(grace=0)
        assert (stopped.reason, stopped.oom_level) == ("stopped", None)
    assert not left(settings)


async def test_tenants_without_an_oom_of_their_own_are_told_of_none(supervisor: Supervisor) -> None:
    limits = Limits(memory_max="32M")
    neighbour = await supervisor.start(spec("exec sleep 1000", service="neighbour", limits=limits))
    is_killed(await soon(supervisor.run(spec(python(GROW.format(mib=200)), limits=limits))))
    outcome = await soon(neighbour.kill())
    assert (outcome.reason, outcome.oom_level) == ("stopped", None)


# ---- Throttling and swap


async def test_above_memory_high_a_program_is_slowed_down_and_not_killed(
    supervisor: Supervisor, measured: Measure
) -> None:
    limits = Limits(memory_high="24M", memory_max="200M")
    began = time.monotonic()
    sandbox = await supervisor.start(spec(python(GROW.format(mib=48)), limits=limits))
    # However long it takes to get so far.
    await eventually(lambda: "high 0\n" not in (cgroup_of(sandbox) / "memory.events").read_text(), 60, pause=0.1)
    with pytest.raises(TimeoutError):
        await soon(line_of(sandbox), 4)
    stats = await sandbox.stats()
    assert stats.memory_events_high
    assert stats.memory_current is not None
    assert stats.memory_current < 48 * MIB
    assert stats.memory_pressure is not None
    assert stats.memory_pressure.total_usec > 100_000
    await sandbox.set_limits(Limits(memory_high="max"))
    outcome = await soon(sandbox.wait())
    assert outcome.ok
    assert outcome.stats is not None
    assert outcome.stats.oom_kill == 0
    measured("memory pressure, s", stats.memory_pressure.total_usec / 1e6)
    measured("of wall time, s", time.monotonic() - began)


async def test_memory_may_go_to_swap_where_that_is_allowed(supervisor: Supervisor) -> None:
    limits = Limits(memory_max="32M", memory_swap_max="100M")
    sandbox = await supervisor.start(spec(python(HOLD.format(mib=64)), limits=limits))
    await line_of(sandbox)
    stats = await sandbox.stats()
    assert stats.memory_swap_current is not None
    assert stats.memory_swap_current > 24 * MIB
    outcome = await soon(sandbox.kill())
    assert outcome.oom_level is None
    overrun(outcome, 32 * MIB)


@pytest.mark.parametrize("swap", [None, "8M"])
async def test_swap_is_no_way_around_the_limit(supervisor: Supervisor, swap: str | None) -> None:
    limits = Limits(memory_max="32M", memory_swap_max=swap)
    sandbox = await supervisor.start(spec(python(GROW.format(mib=64)), limits=limits))
    assert (cgroup_of(sandbox) / "memory.swap.max").read_text().strip() == str(8 * MIB if swap else 0)
    is_killed(await soon(sandbox.wait()))


# ---- Live changes


async def test_a_limit_is_lowered_and_raised_under_a_running_program(supervisor: Supervisor) -> None:
    limits = Limits(memory_max="128M")
    sandbox = await supervisor.start(spec(python(TALK), limits=limits, stdin=True))
    await line_of(sandbox)
    await tell(sandbox, "grow(16)")
    await tell(sandbox, "file = open('big', 'wb+'); [file.write(b'x' * (1 << 20)) for _ in range(64)]")
    assert ((await sandbox.stats()).memory_current or 0) > 60 * MIB
    await sandbox.set_limits(Limits(memory_max="40M"))
    stats = await sandbox.stats()
    assert (stats.memory_current or 0) <= 40 * MIB
    assert sandbox.isolation.limits["memory.max"] == str(40 * MIB)
    assert (cgroup_of(sandbox) / "memory.high").read_text() == "max\n"
    await sandbox.set_limits(Limits(memory_max="128M"))
    await tell(sandbox, "grow(64)")
    await sandbox.set_limits(Limits(memory_max="100M"))
    await sandbox.send(b"grow(64)\n")
    outcome = await soon(sandbox.wait())
    is_killed(outcome)


async def test_lowering_below_what_is_held_is_refused_and_kills_nothing(
    supervisor: Supervisor, measured: Measure
) -> None:
    limits = Limits(memory_max="128M", memory_high="120M", pids_max=20)
    sandbox = await supervisor.start(spec(python(TALK), limits=limits, stdin=True))
    await line_of(sandbox)
    await tell(sandbox, "grow(64)")
    before = {name: (cgroup_of(sandbox) / name).read_text() for name in ("memory.max", "memory.high", "pids.max")}
    began = time.monotonic()
    with pytest.raises(LimitsError, match=r"memory\.max to 24 MiB: .* in use") as caught:
        await sandbox.set_limits(Limits(memory_max="24M", pids_max=10))
    measured("refusal took, s", time.monotonic() - began)
    assert caught.value.remedy
    assert {name: (cgroup_of(sandbox) / name).read_text() for name in before} == before
    assert sandbox.isolation.limits["memory.max"] == str(128 * MIB)
    assert sandbox.state == "running"
    await tell(sandbox, "grow(16)")
    stats = await sandbox.stats()
    assert (stats.oom, stats.oom_kill) == (0, 0)
    outcome = await soon(sandbox.kill())
    assert (outcome.reason, outcome.oom_level) == ("stopped", None)
