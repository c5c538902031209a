"""Events: who hears which, what a slow reader is told, and that nobody waits in vain or is kept for nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import weakref
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pactown_runner import RestartPolicy, Settings, Supervisor
from pactown_runner.events import EventBus, EventReader
from pactown_runner.models import Event
from tests.supervising import USER, soon, spec


def tell(bus: EventBus, *numbers: int) -> None:
    for number in numbers:
        bus.tell("started", "user", "api", str(number))


def take(reader: EventReader) -> int | str | None:
    """The next event's number, `+n` for n that were missed, None if there would be something to wait for."""
    step = anext(reader).__await__()
    try:
        next(step)
    except StopIteration as done:
        return short(done.value)
    step.close()
    return None


def short(event: Event) -> int | str:
    return f"+{event.details['count']}" if event.kind == "missed" else int(event.run_id or "")


def take_all(reader: EventReader) -> list[int | str]:
    taken = []
    while (what := take(reader)) is not None:
        taken.append(what)
    return taken


async def rest(reader: AsyncIterator[Event]) -> list[int | str]:
    """All that comes until the end."""
    return [short(event) async for event in reader]


async def settled() -> None:
    """Let every task go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


# ---- Who hears what


async def test_all_readers_hear_all_that_happens_from_then_on() -> None:
    bus = EventBus(10)
    tell(bus, 1)
    first = bus.read()
    tell(bus, 2)
    second = bus.read()
    tell(bus, 3, 4)
    assert take_all(first) == [2, 3, 4]
    assert take_all(second) == [3, 4]


async def test_an_event_says_what_happened_to_whom() -> None:
    bus = EventBus(10)
    reader = bus.read()
    bus.tell("oom", "auth0|1", "api", "run1", count=2, level="tenant")
    bus.tell("created", "auth0|1")
    oom, created = await anext(reader), await anext(reader)
    assert (oom.kind, oom.user_id, oom.service_id, oom.run_id) == ("oom", "auth0|1", "api", "run1")
    assert oom.details == {"count": 2, "level": "tenant"}
    assert (created.service_id, created.run_id, created.details) == (None, None, {})
    assert 0 < oom.ts <= created.ts
    assert json.loads(json.dumps(oom.to_dict()))["details"] == {"count": 2, "level": "tenant"}


# ---- A slow reader


async def test_a_slow_reader_is_told_how_many_it_missed_where_they_are_missing() -> None:
    bus = EventBus(3)
    slow, fast = bus.read(), bus.read()
    tell(bus, 1, 2, 3)
    assert take_all(fast) == [1, 2, 3]
    tell(bus, 4, 5)
    assert take(slow) == 1
    tell(bus, 6)
    assert take_all(fast) == [4, 5, 6]
    assert take_all(slow) == [2, 3, "+2", 6]


async def test_what_was_missed_last_is_told_without_another_event() -> None:
    bus = EventBus(1)
    reader = bus.read()
    tell(bus, 1, 2, 3)
    assert take_all(reader) == [1, "+2"]
    tell(bus, 4)
    assert take_all(reader) == [4]


@given(st.integers(1, 4), st.lists(st.one_of(st.just("tell"), st.just("read")), max_size=60))
async def test_whatever_the_order_nothing_is_lost_unsaid(buffer: int, deeds: list[str]) -> None:
    bus = EventBus(buffer)
    reader = bus.read()
    told, heard, most = 0, 0, 0
    for deed in [*deeds, *["read"] * (len(deeds) + 1)]:
        if deed == "tell":
            tell(bus, told := told + 1)
            most = max(most, len(reader._events))
        elif isinstance(what := take(reader), str):
            heard += int(what)
        elif what is not None:
            # Each comes right behind the one before, but for those that were said to be missing here.
            assert what == heard + 1
            heard = what
    assert heard == told
    assert most <= buffer + 1  # what is missing is said besides


# ---- Waiting


@pytest.mark.each_loop
async def test_a_reader_that_waits_is_woken() -> None:
    bus = EventBus(10)
    readers = [bus.read(), bus.read()]
    waiting = [asyncio.create_task(rest(reader)) for reader in readers]
    await settled()
    tell(bus, 1)
    await settled()
    tell(bus, 2, 3)
    bus.close()
    assert await soon(asyncio.gather(*waiting)) == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.each_loop
async def test_no_wakeup_is_lost_however_teller_and_reader_take_turns() -> None:
    bus = EventBus(8)
    reader = bus.read()
    reading = asyncio.create_task(rest(reader))
    for number in range(1, 2001):
        tell(bus, number)
        for _ in range(number % 4 if number % 8 else 1):
            await asyncio.sleep(0)
    await settled()
    bus.close()
    assert await soon(reading) == list(range(1, 2001))


@pytest.mark.each_loop
async def test_cancelling_a_wait_loses_no_event() -> None:
    bus = EventBus(10)
    reader = bus.read()
    for number in range(1, 6):
        waiting = asyncio.create_task(anext(reader))
        await settled()
        if number % 2:
            tell(bus, number)  # it has been woken, and is cancelled before it could take it
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        if not number % 2:
            tell(bus, number)
        assert waiting.cancelled()
        assert short(await soon(anext(reader))) == number


@pytest.mark.each_loop
async def test_two_tasks_on_one_reader_share_its_events() -> None:
    bus = EventBus(10)
    reader = bus.read()
    waiting = [asyncio.create_task(rest(reader)) for _ in range(2)]
    await settled()
    tell(bus, 1)
    await settled()
    tell(bus, 2)
    bus.close()
    one, other = await soon(asyncio.gather(*waiting))
    assert sorted([*one, *other]) == [1, 2]


# ---- The end


async def test_after_the_end_a_reader_reads_what_it_has() -> None:
    bus = EventBus(2)
    reader = bus.read()
    tell(bus, 1, 2, 3)
    bus.close()
    tell(bus, 4)
    assert await rest(reader) == [1, 2, "+1"]
    assert await rest(reader) == []
    assert await soon(rest(bus.read())) == []
    bus.close()


async def test_one_reader_ends_and_the_others_go_on() -> None:
    bus = EventBus(10)
    one, other = bus.read(), bus.read()
    async with contextlib.aclosing(one):
        tell(bus, 1)
    tell(bus, 2)
    assert await rest(one) == [1]
    assert take_all(other) == [1, 2]
    assert list(bus._readers) == [other]
    one.close()


async def test_closing_ends_a_wait() -> None:
    reader = EventBus(10).read()
    waiting = asyncio.create_task(rest(reader))
    await settled()
    reader.close()
    assert await soon(waiting) == []


# ---- Nobody holds it


async def test_a_reader_that_nobody_holds_is_forgotten() -> None:
    bus = EventBus(10)
    reader = bus.read()
    tell(bus, 1)
    held = weakref.ref(reader)
    del reader
    gc.collect()
    assert held() is None
    assert not bus._readers


async def test_one_that_was_cancelled_while_it_waited_is_forgotten_too() -> None:
    bus = EventBus(10)
    waiting = asyncio.create_task(rest(bus.read()))
    await settled()
    waiting.cancel()
    await asyncio.wait([waiting])
    del waiting
    gc.collect()
    assert not bus._readers


@pytest.mark.each_loop
async def test_a_task_that_waits_is_not_forgotten_though_nobody_holds_it() -> None:
    bus, heard = EventBus(10), []

    async def listen() -> None:
        async for event in bus.read():
            heard.append(short(event))  # noqa: PERF401 - as they come

    asyncio.create_task(listen())  # noqa: RUF006 - which is the point
    await settled()
    gc.collect()
    tell(bus, 1)
    await settled()
    gc.collect()
    tell(bus, 2)
    await settled()
    assert heard == [1, 2]
    bus.close()
    await settled()


# ---- A supervisor's


@pytest.mark.host
async def test_a_reader_may_be_there_before_the_supervisor(settings: Settings) -> None:
    supervisor = Supervisor(settings=settings)
    reader = supervisor.events()
    async with supervisor:
        await supervisor.start(spec("exec sleep 1000", restart=RestartPolicy("always")))
    assert [event.kind async for event in reader][:2] == ["started", "ready"]
    assert await soon(rest(supervisor.events())) == []
    # What comes back is heard of too.
    successor = Supervisor(settings=settings)
    reader = successor.events()
    async with successor:
        await soon(successor.get(USER, "api").stop(grace=0))
    assert [event.kind async for event in reader] == ["started", "ready", "stopped"]
    # Each life of a supervisor has events of its own.
    async with supervisor:
        reader = supervisor.events()
        await supervisor.users.get_or_create("another")
    assert [event.kind async for event in reader] == ["created"]
