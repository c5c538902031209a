"""What is told of sandboxes while they run, as far as it needs no controllers; the rest is in the kernel lane."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from cgroups import Cgroup, Limits
from pactown_runner.config import Settings
from pactown_runner.events import EventBus, EventReader
from pactown_runner.models import Event, IsolatedUser
from pactown_runner.monitor import Monitor
from pactown_runner.trees import Tree, open_tree
from tests.cgroups.fake import make_fake
from tests.supervising import eventually, soon

SETTINGS = Settings(cpu_pressure_share=0.05, throttled_interval=0.1)
BURN = 'echo 0 >"$0/cgroup.procs" && while :; do :; done'

Burn = Callable[[Cgroup], None]
Make = Callable[..., Monitor]


def user(number: int) -> IsolatedUser:
    return IsolatedUser(f"user {number}", f"pactown_{number:08x}", 60001, 60001, Path("/nowhere"), 0.0)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def lowest_free_descriptor() -> int:
    descriptor = os.open("/dev/null", os.O_RDONLY)
    os.close(descriptor)
    return descriptor


async def next_of(reader: EventReader, kind: str) -> Event:
    """The next event of this kind."""

    async def look() -> Event:
        async for event in reader:
            if event.kind == kind:
                return event
        raise AssertionError(f"no {kind} was told")

    return await soon(look())


@pytest.fixture
def tree(slice_name: str) -> Iterator[Tree]:
    tree = open_tree(cgroup_slice=slice_name, state_id="ours", tenant_limits=Limits())
    yield tree
    tree.close()


@pytest.fixture
def bus() -> EventBus:
    return EventBus(100)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        # All that it needs itself is there before a test counts.
        threads.submit(int).result()
        yield threads


@pytest.fixture
async def make(tree: Tree, bus: EventBus, threads: ThreadPoolExecutor) -> AsyncIterator[Make]:
    """Make a monitor; it is closed, and must have closed what it opened."""
    before, made = descriptors(), []

    def make(settings: Settings = SETTINGS) -> Monitor:
        made.append(Monitor(tree, bus, settings, threads))
        return made[-1]

    yield make
    for monitor in made:
        await soon(monitor.close())
        await soon(monitor.close())
    assert descriptors() == before


@pytest.fixture
def scope(tree: Tree, make: Make) -> Iterator[Callable[[int, str], Cgroup]]:
    """Make a tenant's scope; it is removed while it is still watched, the worst that can happen to a monitor."""
    with ExitStack() as stack:

        def scope(number: int, name: str = "api") -> Cgroup:
            group = tree.scope(user(number).key, name, f"{number}/{name}")
            stack.callback(group.close)
            stack.callback(group.remove)
            stack.callback(group.wait_empty, 10)
            stack.callback(group.kill)
            return group

        yield scope


@pytest.fixture
def burn() -> Iterator[Burn]:
    """Keep two processes of a scope waiting for one CPU."""
    with ExitStack() as stack:

        def burn(scope: Cgroup) -> None:
            for _ in range(2):
                process = stack.enter_context(subprocess.Popen(["/bin/sh", "-c", BURN, str(scope.path)]))
                stack.callback(process.kill)
                os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})

        yield burn


Scope = Callable[..., Cgroup]


# ---- Pressure


@pytest.mark.host
@pytest.mark.each_loop
async def test_pressure_is_told_of_each_tenant_that_has_it(bus: EventBus, make: Make, scope: Scope, burn: Burn) -> None:
    monitor, reader = make(), bus.read()
    for number in range(5):
        group = scope(number)
        monitor.add(user(number), "api", str(number), group, has_cpu_max=False)
        if number % 2:
            burn(group)
    told: dict[str, list[Event]] = {"user 1": [], "user 3": []}
    while min(map(len, told.values())) < 2:
        event = await next_of(reader, "pressure")
        told[event.user_id].append(event)
    for first, second, *_ in told.values():
        assert (first.service_id, first.run_id) == (None, None)
        assert (first.details["resource"], second.details["resource"]) == ("cpu", "cpu")
        assert first.details["total_usec"] >= 50_000
        assert second.details["total_usec"] > first.details["total_usec"]
        assert 0 < second.details["avg10"] <= 100
        assert second.ts - first.ts > 0.5  # two clocks, and a machine that may stop us between a look at each


@pytest.mark.host
async def test_a_tenant_takes_two_descriptors_from_its_first_sandbox_to_its_last(make: Make, scope: Scope) -> None:
    groups = [scope(1, "a"), scope(1, "b"), scope(2, "a"), scope(3, "a")]
    before, monitor, each = descriptors(), make(), "memory" in groups[0].controllers()

    def held(sandboxes: int, tenants: int) -> bool:
        return descriptors() == before + 1 + sandboxes * each + tenants * 2

    monitor.add(user(3), "a", "3a", groups[3], has_cpu_max=False)
    monitor.add(user(1), "a", "1a", groups[0], has_cpu_max=False)
    monitor.add(user(1), "b", "1b", groups[1], has_cpu_max=False)
    # It is gone before anything was opened for it.
    monitor.discard("3a")
    assert [tenant.user_id for tenant in monitor._pressure._opening] == ["user 1"]
    await eventually(lambda: held(2, 1))
    monitor.add(user(2), "a", "2a", groups[2], has_cpu_max=False)
    await eventually(lambda: held(3, 2))
    monitor.discard("1a")
    monitor.discard("2a")
    monitor.discard("2a")
    await eventually(lambda: held(1, 1))
    monitor.discard("1b")
    await eventually(lambda: held(0, 0))
    monitor.discard("never added")


@pytest.mark.host
async def test_what_nobody_wants_to_hear_of_costs_nothing(make: Make, scope: Scope) -> None:
    settings = replace(SETTINGS, memory_pressure_share=None, cpu_pressure_share=None, throttled_share=None)
    group, before, monitor = scope(1), descriptors(), make(settings)
    monitor.add(user(1), "api", "1", group, has_cpu_max=True)
    assert monitor._timer is None
    assert descriptors() == before + 2 * ("memory" in group.controllers())
    only = make(replace(settings, cpu_pressure_share=1.0))
    before = descriptors()
    only.add(user(1), "api", "1", group, has_cpu_max=False)
    await eventually(lambda: descriptors() == before + 2 + ("memory" in group.controllers()))


@pytest.mark.host
async def test_a_slice_that_somebody_removes_is_let_go(tree: Tree, make: Make) -> None:
    group = tree.scope(user(1).key, "api", "1")
    before, monitor = descriptors(), make()
    monitor.add(user(1), "api", "1", group, has_cpu_max=False)
    await eventually(lambda: descriptors() >= before + 3)
    group.remove()
    # In a thread: the kernel closes the triggers on the way, and waits.
    await asyncio.to_thread(tree.remove_unused_slices)
    await eventually(lambda: descriptors() == before + 1)
    monitor.discard("1")
    group.close()


@pytest.mark.host
async def test_without_descriptors_it_says_so_and_goes_on(
    make: Make, scope: Scope, caplog: pytest.LogCaptureFixture
) -> None:
    monitor, groups = make(), [scope(1), scope(2)]
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The limit is on the number, not the count: none below the lowest that is free.
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free_descriptor(), hard))
    try:
        with caplog.at_level(logging.WARNING, "pactown_runner.monitor"):
            monitor.add(user(1), "api", "1", groups[0], has_cpu_max=False)
            await eventually(lambda: "not all pressure" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monitor.discard("1")
    monitor.add(user(2), "api", "2", groups[1], has_cpu_max=False)
    await eventually(lambda: descriptors() == before + 3 + ("memory" in groups[0].controllers()))


@pytest.mark.host
async def test_closing_waits_for_what_is_being_opened(make: Make, scope: Scope, threads: ThreadPoolExecutor) -> None:
    monitor, groups, gate = make(), [scope(1), scope(2)], threading.Event()
    before = descriptors()
    busy = [threads.submit(gate.wait) for _ in range(2)]
    try:
        monitor.add(user(1), "api", "1", groups[0], has_cpu_max=False)
        await eventually(lambda: monitor._pressure._job is not None)
        closing = asyncio.create_task(monitor.close())
        await asyncio.sleep(0)
        assert not closing.done()
    finally:
        gate.set()
    await soon(closing)
    monitor.add(user(2), "api", "2", groups[1], has_cpu_max=True)
    assert monitor._timer is None
    assert descriptors() == before
    assert all(thread.result() for thread in busy)


@pytest.mark.host
def test_sandboxes_may_be_discarded_after_their_loop(tree: Tree, bus: EventBus, threads: ThreadPoolExecutor) -> None:
    monitor = Monitor(tree, bus, SETTINGS, threads)
    with tree.scope(user(1).key, "api", "1") as group:

        async def work() -> None:
            monitor.add(user(1), "api", "1", group, has_cpu_max=True)
            await eventually(lambda: monitor._pressure._heard_of)

        asyncio.run(work())
        monitor.discard("1")
        group.remove()
    asyncio.run(monitor.close())


# ---- Throttling

STAT = "usage_usec 9\nuser_usec 4\nsystem_usec 5\nnr_periods {0}\nnr_throttled {0}\nthrottled_usec {1}\n"


def throttle(group: Cgroup, periods: int, usec: int) -> None:
    # As the kernel does, at once: a reader sees the old text or the new one.
    new = group.path / "new"
    new.write_text(STAT.format(periods, usec))
    new.rename(group.path / "cpu.stat")


@pytest.mark.host
@pytest.mark.each_loop
async def test_throttling_above_the_threshold_is_told(bus: EventBus, make: Make, tmp_path: Path) -> None:
    monitor, reader = make(replace(SETTINGS, throttled_share=1.0)), bus.read()
    with make_fake(tmp_path / "api.scope") as group:
        monitor.add(user(1), "api", "run1", group, has_cpu_max=True)
        throttle(group, 1000, 70_000_000)
        event = await next_of(reader, "throttled")
        assert (event.user_id, event.service_id, event.run_id) == ("user 1", "api", "run1")
        assert event.details == {"share": 1.0, "usec": 70_000_000}
        throttle(group, 2000, 71_000_000)
        event = await next_of(reader, "throttled")
        assert event.details == {"share": 1.0, "usec": 1_000_000}
        monitor.discard("run1")


@pytest.mark.host
async def test_below_the_threshold_nothing_is_told(bus: EventBus, make: Make, tmp_path: Path) -> None:
    monitor, reader = make(replace(SETTINGS, throttled_share=1.0, throttled_interval=0.5)), bus.read()
    with make_fake(tmp_path / "little.scope") as little, make_fake(tmp_path / "much.scope") as much:
        monitor.add(user(1), "little", "1", little, has_cpu_max=True)
        monitor.add(user(1), "much", "2", much, has_cpu_max=True)
        # One of five periods in the first interval, and then none.
        throttle(little, 1, 50_000)
        throttle(much, 1000, 1)
        assert (await next_of(reader, "throttled")).run_id == "2"
        throttle(much, 2000, 2)
        assert (await next_of(reader, "throttled")).run_id == "2"
        monitor.discard("1")
        monitor.discard("2")


@pytest.mark.host
async def test_only_what_has_a_quota_is_read(
    bus: EventBus, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monitor, reader = make(), bus.read()
    with make_fake(tmp_path / "a.scope") as group, make_fake(tmp_path / "b.scope", []) as bare:
        throttle(group, 1000, 5)
        with caplog.at_level(logging.WARNING, "pactown_runner.monitor"):
            monitor.add(user(1), "a", "1", group, has_cpu_max=False)
            assert monitor._throttling.due == float("inf")
            monitor.set_cpu_max("1", True)
            monitor.set_cpu_max("1", True)
            assert monitor._throttling.due < float("inf")
            # What was before there was a quota is not counted.
            await eventually(lambda: monitor._throttling._quotas["1"].last is not None)
            throttle(group, 2000, 12)
            assert (await next_of(reader, "throttled")).details["usec"] == 7
            monitor.set_cpu_max("1", False)
            monitor.set_cpu_max("gone", True)
            assert monitor._throttling.due == float("inf")
            assert not caplog.text
            monitor.add(user(1), "b", "2", bare, has_cpu_max=True)
            await eventually(lambda: "will not be told" in caplog.text)
            assert monitor._throttling.due == float("inf")
        monitor.discard("1")
        monitor.discard("2")


@pytest.mark.host
async def test_what_an_adopted_sandbox_did_before_is_not_told(bus: EventBus, make: Make, tmp_path: Path) -> None:
    monitor, reader = make(), bus.read()
    with make_fake(tmp_path / "a.scope") as group:
        throttle(group, 1000, 5)
        monitor.add(user(1), "a", "1", group, has_cpu_max=True, adopted=True)
        await eventually(lambda: monitor._throttling._quotas["1"].last is not None)
        throttle(group, 2000, 6)
        assert (await next_of(reader, "throttled")).details["usec"] == 1
        monitor.discard("1")
