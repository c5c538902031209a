"""The watch: silent until something changes, and seen from an outer loop."""

from __future__ import annotations

import asyncio
import os
import select
from pathlib import Path

import pytest

from cgroups import Cgroup, Events, GoneError, MemoryEvents, NotSupportedError, Watch, find_mount, read_events
from cgroups.events import wait_until
from tests.cgroups.conftest import Start
from tests.cgroups.test_processes import IDLE

pytestmark = pytest.mark.host


def readable(watch: Watch, timeout: float = 10) -> bool:
    """Whether the watch's own descriptor becomes readable in an outer epoll."""
    with select.epoll() as outer:
        outer.register(watch.fileno(), select.EPOLLIN)
        return bool(outer.poll(timeout))


def test_it_is_silent_until_something_changes(group: Cgroup, start: Start) -> None:
    with group.watch() as watch:
        assert (watch.current.populated, watch.current.frozen) == (False, False)
        assert not readable(watch, 0)
        process = start(IDLE)
        assert readable(watch)
        assert watch.read().populated
        assert watch.current.populated
        assert not readable(watch, 0)
        group.kill()
        assert readable(watch)
        assert not watch.read().populated
        assert process.wait() == -9


def test_freezing_is_an_event_too(group: Cgroup, start: Start) -> None:
    start(IDLE)
    with Watch(group.fd) as watch:
        group.request_freeze(True)
        assert wait_until(watch, lambda events: events.frozen, 10)
        group.request_freeze(False)
        assert wait_until(watch, lambda events: not events.frozen, 10)
        assert watch.current.populated


def test_news_of_a_cgroup_below(group: Cgroup, start: Start) -> None:
    with group.child("a.scope", create=True) as child, group.watch() as watch:
        start(IDLE, child)
        assert readable(watch)
        assert watch.read().populated


def test_reading_without_news_returns_what_was_read_last(group: Cgroup) -> None:
    with group.watch() as watch:
        assert watch.read() is watch.read()
        assert watch.refresh() == watch.current


def test_it_outlives_the_directory_s_descriptor(group: Cgroup, start: Start) -> None:
    with group.child("a.scope", create=True) as child:
        watch = child.watch()
    with watch, group.child("a.scope") as again:
        start(IDLE, again)
        assert readable(watch)
        assert watch.read().populated


def test_a_removed_cgroup_has_no_events(group: Cgroup) -> None:
    with group.child("a.scope", create=True) as child, child.watch() as watch:
        child.remove()
        with pytest.raises(GoneError):
            watch.refresh()
        with pytest.raises(GoneError):
            child.watch()


def test_the_root_cgroup_cannot_be_watched() -> None:
    with Cgroup.open(find_mount().path) as top, pytest.raises(NotSupportedError):
        top.watch()


@pytest.mark.each_loop
async def test_an_event_loop_can_hold_it(group: Cgroup, start: Start) -> None:
    process = start(IDLE)
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()
    with group.watch() as watch:

        def take() -> None:
            if not watch.read().populated:
                heard.set()

        loop.add_reader(watch.fileno(), take)
        try:
            group.kill()
            await asyncio.wait_for(heard.wait(), 10)
        finally:
            loop.remove_reader(watch.fileno())
    process.wait()


def test_memory_events_are_told_where_there_are_any(group: Cgroup) -> None:
    with group.watch() as watch, group.watch(memory=False) as plain:
        assert ("oom_kill" in watch.current.memory) == Path(group.path, "memory.events").exists()
        assert plain.current == read_events(group.fd) == Events(populated=False, frozen=False)


def test_counters_that_are_held_open(fake: Cgroup) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with MemoryEvents(fake) as events:
        assert events.read()["oom_kill"] == 0
        with (fake.path / "memory.events").open("w") as file:
            file.write("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n")
        assert events.read() == {"low": 0, "high": 0, "max": 7, "oom": 1, "oom_kill": 1}
    events.close()
    assert len(os.listdir("/proc/self/fd")) == before
    held = [MemoryEvents(fake.fd)]
    with pytest.warns(ResourceWarning, match=r"unclosed <cgroups\.events\.MemoryEvents"):
        held.clear()
    (fake.path / "memory.events").unlink()
    with pytest.raises(NotSupportedError):
        MemoryEvents(fake)
