"""Freezing, counters and pressure on a kernel that has all controllers."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cgroups import Cgroup, Limits, PressureWatch, Stats
from pactown_runner import Sandbox, Supervisor
from tests.kernel.conftest import MIB, Bystander, Measure, cgroup_of, slice_of
from tests.kernel.test_cpu import BURN, used
from tests.supervising import line_of, python, soon, spec

pytestmark = pytest.mark.kernel


async def test_a_frozen_sandbox_uses_no_cpu(supervisor: Supervisor, bystander: Bystander) -> None:
    sandbox = await supervisor.start(spec(python(BURN.format(processes=3))))
    await line_of(sandbox)
    await sandbox.freeze()
    before = await used(sandbox)
    async with bystander.answering():
        await asyncio.sleep(1)  # the time in which it must not run
    # What it used last, to fall asleep, may be charged when it is frozen already.
    assert await used(sandbox) < before + 0.01
    await sandbox.set_limits(Limits(cpu_max=0.5, pids_max=10))
    await sandbox.thaw()
    async with asyncio.timeout(10):
        while await used(sandbox) < before + 0.1:
            await asyncio.sleep(0.05)
    await sandbox.freeze()
    outcome = await soon(sandbox.kill())
    assert (outcome.reason, outcome.signal) == ("stopped", 9)


async def test_every_counter_is_in_the_outcome(supervisor: Supervisor) -> None:
    source = """
import os
held = b"x" * (16 << 20)
for _ in range(3):
    if not os.fork():
        os._exit(0)
    os.wait()
with open("file", "wb") as file:
    file.write(held)
    os.fsync(file.fileno())
os.unlink("file")
n = 0
while n < 300_000:
    n += 1
import time
from collections.abc import Callable
time.sleep(2.5)  # the kernel sums pressure up every two seconds
"""
    limits = Limits(memory_max="100M", cpu_max=0.5, pids_max=10)
    outcome = await soon(supervisor.run(spec(python(source), limits=limits)), 100)
    assert outcome.ok, outcome
    stats = outcome.stats
    assert isinstance(stats, Stats)
    missing = [name for name, value in stats.to_dict().items() if value is None]
    assert missing == []
    assert stats.memory_peak is not None
    assert 16 * MIB < stats.memory_peak <= 100 * MIB
    assert stats.pids_peak == 2
    assert stats.io_wbytes is not None
    assert stats.io_wbytes >= 16 * MIB
    assert stats.cpu_usage_usec is not None
    assert stats.cpu_usage_usec > 100_000
    assert stats.cpu_nr_throttled
    assert (stats.oom, stats.oom_kill, stats.pids_events_max, stats.pids_current) == (0, 0, 0, 0)
    for pressure in (stats.memory_pressure, stats.cpu_pressure, stats.io_pressure):
        assert pressure is not None
        assert pressure.full_total_usec is not None
    assert stats.cpu_pressure is not None
    assert stats.cpu_pressure.total_usec > 0


STALLS = {
    "memory": (
        Limits(memory_high="16M", memory_max="200M"),
        "import sys\nheld = []\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        "while True: held.append(b'x' * (1 << 20))\n",
    ),
    "cpu": (Limits(cpu_max=0.3), "import sys\nprint('ready', flush=True)\nsys.stdin.readline()\nwhile True: pass\n"),
}


@pytest.mark.parametrize("whose", [cgroup_of, slice_of], ids=["service", "tenant"])
@pytest.mark.parametrize("resource", ["memory", "cpu"])
async def test_pressure_is_told_within_two_seconds_of_stall(
    supervisor: Supervisor, measured: Measure, resource: str, whose: Callable[[Sandbox], Path]
) -> None:
    limits, source = STALLS[resource]
    sandbox = await supervisor.start(spec(python(source), stdin=True, limits=limits))
    await line_of(sandbox)
    loop, heard = asyncio.get_running_loop(), asyncio.Event()
    assert resource in ("memory", "cpu")
    with (
        Cgroup.open(whose(sandbox)) as cgroup,
        PressureWatch(cgroup, resource, 100_000, 1_000_000) as watch,  # type: ignore[arg-type]  # asserted above
    ):
        assert not watch.wait(0.5)
        loop.add_reader(watch.fileno(), heard.set)
        try:
            before, began = watch.read(), time.monotonic()
            await sandbox.send(b"\n")
            await soon(heard.wait())
            measured("s until it was told", time.monotonic() - began)
            # By the stall itself, not by the clock: a guest whose host is busy may begin to stall late.
            assert watch.read().total_usec - before.total_usec < 2_000_000
        finally:
            loop.remove_reader(watch.fileno())
        # It stalls on, and the next window tells again.
        assert await asyncio.to_thread(watch.wait, 5)
        await sandbox.kill()


@pytest.mark.skipif(not Path("/run/systemd/system").is_dir(), reason="needs systemd as process 1")
async def test_systemd_leaves_the_tree_alone(supervisor: Supervisor) -> None:
    limits = Limits(memory_max="32M", pids_max=10, cpu_max=0.5, cpuset_cpus="0")
    sandbox = await supervisor.start(spec("exec sleep 1000", limits=limits))
    before = {name: (cgroup_of(sandbox) / name).read_text() for name in sandbox.isolation.limits}
    await asyncio.to_thread(subprocess.run, ["systemctl", "daemon-reload"], check=True)
    assert {name: (cgroup_of(sandbox) / name).read_text() for name in before} == before
    assert sandbox.state == "running"
