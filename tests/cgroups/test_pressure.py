"""Pressure triggers: what the kernel is told, and that it tells us."""

from __future__ import annotations

import asyncio
import os
import select
from typing import Any

import pytest

from cgroups import Cgroup, FormatError, GoneError, NotSupportedError, Pressure, PressureTrigger, PressureWatch
from cgroups.pressure import _render
from tests.cgroups.conftest import Start

BURN = "echo ready; while :; do :; done"


def test_the_kernel_is_told_in_its_own_words() -> None:
    assert _render(150_000, 1_000_000, full=False) == "some 150000 1000000"
    assert _render(1, 500_000, full=True) == "full 1 500000"


@pytest.mark.parametrize(
    ("resource", "stall", "window"),
    [
        ("disk", 1, 500_000),
        ("cpu", 0, 500_000),
        ("cpu", 500_001, 500_000),
        ("cpu", 1, 499_999),
        ("cpu", 1, 10_000_001),
    ],
)
def test_what_the_kernel_never_takes_is_refused(fake: Cgroup, resource: Any, stall: int, window: int) -> None:
    with pytest.raises(FormatError) as caught:
        PressureWatch(fake, resource, stall, window)
    assert caught.value.remedy


def test_a_kernel_without_pressure_files(fake: Cgroup) -> None:
    (fake.path / "cpu.pressure").unlink()
    with pytest.raises(NotSupportedError):
        PressureWatch(fake, "cpu", 1, 500_000)


@pytest.mark.host
def test_nothing_waits_and_nothing_is_told(group: Cgroup) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with PressureWatch(group, "cpu", 100_000, 2_000_000) as watch:
        assert not watch.wait(0)
        assert watch.read() == Pressure(avg10=0.0, total_usec=0, full_avg10=0.0, full_total_usec=0)
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.host
def test_one_that_is_forgotten_warns(group: Cgroup) -> None:
    watches = [PressureWatch(group, "memory", 100_000, 2_000_000)]
    with pytest.warns(ResourceWarning, match="unclosed <cgroups.pressure.PressureWatch"):
        watches.clear()


@pytest.mark.host
@pytest.mark.each_loop
async def test_an_event_loop_hears_of_tasks_that_wait_for_a_cpu(group: Cgroup, start: Start) -> None:
    for _ in range(2):  # two that want one CPU
        process = start(BURN)
        os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
    loop, heard = asyncio.get_running_loop(), asyncio.Event()
    with PressureWatch(group, "cpu", 50_000, 2_000_000) as watch:
        loop.add_reader(watch.fileno(), heard.set)
        try:
            await asyncio.wait_for(heard.wait(), 10)
        finally:
            loop.remove_reader(watch.fileno())
            group.kill()
        assert watch.read().total_usec >= 50_000


@pytest.mark.host
def test_a_removed_cgroup_has_no_pressure(group: Cgroup) -> None:
    with group.child("a.scope", create=True) as child, PressureWatch(child, "cpu", 100_000, 2_000_000) as watch:
        child.remove()
        with pytest.raises(GoneError):
            watch.read()
        with pytest.raises(GoneError):
            PressureWatch(child, "cpu", 100_000, 2_000_000)


@pytest.mark.host
def test_one_epoll_in_another_tells_which_of_many_it_was(group: Cgroup, start: Start) -> None:
    with (
        group.child("busy.scope", create=True) as busy,
        group.child("idle.scope", create=True) as idle,
        PressureTrigger(busy, "cpu", 50_000, 2_000_000) as told,
        PressureTrigger(idle, "cpu", 50_000, 2_000_000) as silent,
        select.epoll() as inner,
        select.epoll() as outer,
    ):
        for trigger in (told, silent):
            inner.register(trigger, PressureTrigger.POLL_FOR)
        assert {fd for fd, _ in inner.poll(0)} == {told.fileno(), silent.fileno()}  # the first is no event
        assert inner.poll(0) == []
        outer.register(inner, select.EPOLLIN)
        for _ in range(2):  # two that want one CPU
            process = start(BURN, busy)
            os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
        before = 0
        for _ in range(2):
            assert outer.poll(10)
            assert [fd for fd, _ in inner.poll(0)] == [told.fileno()]
            assert told.read().total_usec >= before + 50_000
            before = told.read().total_usec
        assert silent.read().total_usec == 0
