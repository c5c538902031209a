"""CPU limits, measured: quotas, shares between tenants, and the CPUs themselves."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from cgroups import Limits
from pactown_runner import Sandbox, Settings, Supervisor
from pactown_runner.errors import LimitsError
from tests.kernel.conftest import Bystander, Measure, cgroup_of, left
from tests.supervising import line_of, python, soon, spec

pytestmark = pytest.mark.kernel

BURN = """
import os
for _ in range({processes} - 1):
    if not os.fork():
        break
print("ready", flush=True)
while True:
    pass
"""
WINDOW = 2.0
"""Seconds over which a share is measured: twenty periods of the kernel's quota."""


async def used(sandbox: Sandbox) -> float:
    """Seconds of CPU time so far."""
    usage = (await sandbox.stats()).cpu_usage_usec
    assert usage is not None
    return usage / 1e6


async def shares(*sandboxes: Sandbox) -> list[float]:
    """CPUs that each got, on average over the window. To let time pass is what is measured here."""
    began, before = time.monotonic(), [await used(sandbox) for sandbox in sandboxes]
    await asyncio.sleep(WINDOW)
    after, ended = [await used(sandbox) for sandbox in sandboxes], time.monotonic()
    return [(late - early) / (ended - began) for early, late in zip(before, after, strict=True)]


async def shares_settle(one: Sandbox, other: Sandbox, ratio: float) -> tuple[float, float]:
    """CPUs that each got, once their ratio is this one, give or take a quarter.

    A host that is busy takes the guest's CPU away now from one and now from the other: the longer, the more even.
    """
    began, before = time.monotonic(), (await used(one), await used(other))
    async with asyncio.timeout(30):
        while True:
            await asyncio.sleep(WINDOW)
            took = time.monotonic() - began
            got = (await used(one) - before[0]) / took, (await used(other) - before[1]) / took
            if got[0] / got[1] == pytest.approx(ratio, rel=0.25):
                return got


@pytest.mark.parametrize("cores", [0.25, 1.5])
async def test_a_quota_is_held(supervisor: Supervisor, bystander: Bystander, measured: Measure, cores: float) -> None:
    sandbox = await supervisor.start(spec(python(BURN.format(processes=3)), limits=Limits(cpu_max=cores)))
    await line_of(sandbox)
    async with bystander.answering():
        (share,) = await shares(sandbox)
    outcome = await soon(sandbox.kill())
    measured("CPUs used", share)
    measured("bystander's slowest answer, s", bystander.worst)
    assert share == pytest.approx(cores, rel=0.15)
    assert outcome.stats is not None
    assert outcome.stats.cpu_throttled_usec
    assert outcome.stats.cpu_nr_throttled
    assert outcome.stats.cpu_pressure is not None
    assert outcome.stats.cpu_pressure.total_usec > 0


async def test_a_quota_is_changed_under_a_running_program(supervisor: Supervisor, measured: Measure) -> None:
    sandbox = await supervisor.start(spec(python(BURN.format(processes=1)), limits=Limits(cpu_max=0.2)))
    await line_of(sandbox)
    (low,) = await shares(sandbox)
    await sandbox.set_limits(Limits(cpu_max=0.6))
    (high,) = await shares(sandbox)
    measured("CPUs used", f"{low:.3g}, then {high:.3g}")
    assert low == pytest.approx(0.2, rel=0.15)
    assert high == pytest.approx(0.6, rel=0.15)


async def test_shares_follow_the_tenants_weights_whatever_their_numbers(settings: Settings, measured: Measure) -> None:
    heavy = replace(settings, tenant_limits=Limits(cpu_weight=300))
    light = replace(settings, tenant_limits=Limits(cpu_weight=100))
    one_cpu = Limits(cpuset_cpus="1")
    async with Supervisor(settings=heavy) as first, Supervisor(settings=light) as second:
        one = await first.start(spec(python(BURN.format(processes=1)), user="heavy", limits=one_cpu))
        many = await second.start(spec(python(BURN.format(processes=4)), user="light", limits=one_cpu))
        await line_of(one)
        await line_of(many)
        got_one, got_many = await shares_settle(one, many, 3)
        measured("CPUs used, weight 300 against four processes of weight 100", f"{got_one:.3g} and {got_many:.3g}")
        assert got_one + got_many <= 1.1
    assert not left(settings)


async def test_a_tenants_services_share_by_their_own_weights(supervisor: Supervisor, measured: Measure) -> None:
    sandboxes = []
    for service, weight in (("big", 400), ("small", 100)):
        limits = Limits(cpu_weight=weight, cpuset_cpus="1")
        sandboxes.append(await supervisor.start(spec(python(BURN.format(processes=1)), service=service, limits=limits)))
        await line_of(sandboxes[-1])
    big, small = await shares_settle(sandboxes[0], sandboxes[1], 4)
    measured("CPUs used by weights 400 and 100", f"{big:.3g} and {small:.3g}")
    assert big + small <= 1.1


async def test_a_program_stays_on_its_cpus(supervisor: Supervisor) -> None:
    source = "import os, sys\nfor line in sys.stdin: print('cpus', sorted(os.sched_getaffinity(0)), flush=True)\n"
    sandbox = await supervisor.start(spec(python(source), stdin=True, limits=Limits(cpuset_cpus="1")))
    assert sandbox.isolation.limits["cpuset.cpus"] == "1"
    await sandbox.send(b"\n")
    assert await line_of(sandbox, "cpus") == "cpus [1]"
    await sandbox.set_limits(Limits(cpuset_cpus="0"))
    await sandbox.send(b"\n")
    await line_of(sandbox, "cpus [0]")
    with pytest.raises(LimitsError):
        await sandbox.set_limits(Limits(cpuset_cpus="63"))
    assert (cgroup_of(sandbox) / "cpuset.cpus").read_text() == "0\n"
    await sandbox.set_limits(Limits(cpuset_cpus=""))
    await sandbox.send(b"\n")
    await line_of(sandbox, "cpus [0, 1")


async def test_a_limit_of_cpus_can_be_the_first_on_a_running_sandbox(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(python(BURN.format(processes=2))))
    await line_of(sandbox)
    await sandbox.set_limits(Limits(cpuset_cpus="1"))
    (share,) = await shares(sandbox)
    assert share <= 1.1


async def test_a_service_gets_no_cpu_that_its_tenant_has_not(settings: Settings) -> None:
    async with Supervisor(settings=replace(settings, tenant_limits=Limits(cpuset_cpus="1"))) as supervisor:
        command = python("import os; print('cpus', sorted(os.sched_getaffinity(0)))")
        sandbox = await supervisor.start(spec(command, user="pinned"))
        assert await line_of(sandbox, "cpus") == "cpus [1]"
        with pytest.raises(LimitsError, match="the kernel has the CPUs 1 instead"):
            await supervisor.start(spec("true", user="pinned", service="other", limits=Limits(cpuset_cpus="0")))
    assert not left(settings)
