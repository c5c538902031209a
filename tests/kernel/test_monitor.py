"""What the kernel says about running sandboxes, told while they run: kills for want of memory, pressure, throttling."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cgroups import Cgroup, Limits, read_throttled
from pactown_runner import Settings
from pactown_runner.events import EventBus, EventReader
from pactown_runner.models import Event, IsolatedUser
from pactown_runner.monitor import Monitor
from pactown_runner.trees import Tree, open_tree
from tests.kernel.conftest import MIB, Measure
from tests.supervising import eventually, python, soon

pytestmark = pytest.mark.kernel

_JOIN = 'echo 0 >"$0/cgroup.procs" && exec "$@"'

GROW = """
import os, sys
def child():
    held = []
    while True:
        held.append(b"x" * (1 << 20))
print("ready", flush=True)
for line in sys.stdin:
    if not (pid := os.fork()):
        child()
    print("died", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
"""For each line that it reads, a child grows until it is killed."""

GROUP = """
import os, signal, sys
print("ready", flush=True)
sys.stdin.readline()
for _ in range(4):
    if not os.fork():
        signal.pause()
held = []
while True:
    held.append(b"x" * (1 << 20))
"""

RECLAIM = """
import os, select, sys
block = b"x" * (1 << 20)
with open(sys.argv[1], "wb+") as file:
    os.unlink(sys.argv[1])
    for _ in range(48):
        file.write(block)
        # What a slow disk has not taken yet cannot be reclaimed.
        os.fsync(file.fileno())
    print("ready", flush=True)
    while not select.select([0], [], [], 0)[0]:
        file.seek(0)
        while file.read(1 << 20):
            pass
held = []
while True:
    held.append(block + b"x")
"""
"""Keeps reading more than its cgroup can hold, and when it is told so, grows until it is killed."""

STALLS = {
    "memory": (
        Limits(memory_high="16M", memory_max="200M"),
        "import sys\nheld = []\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        "while True: held.append(b'x' * (1 << 20))\n",
    ),
    "cpu": (Limits(cpu_max=0.2), "import sys\nprint('ready', flush=True)\nsys.stdin.readline()\nwhile True: pass\n"),
}


def user(number: int) -> IsolatedUser:
    return IsolatedUser(f"user {number}", f"pactown_{number:08x}", 60001, 60001, Path("/nowhere"), 0.0)


class Program:
    """A Python program in a scope, which waits for lines."""

    def __init__(self, scope: Cgroup, source: str, *arguments: str) -> None:
        command = ["/bin/sh", "-c", _JOIN, str(scope.path), *python(source), *arguments]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.line() == "ready"

    def tell(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("go on\n")
        self.popen.stdin.flush()

    def line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    async def dies(self) -> None:
        """Have a child grow until it is killed, and see its end."""
        self.tell()
        assert await soon(asyncio.to_thread(self.line)) == "died -9"


class Place:
    """A tree with a monitor, and programs in it."""

    def __init__(self, tree: Tree, settings: Settings, threads: ThreadPoolExecutor, stack: ExitStack) -> None:
        self.tree = tree
        self.bus = EventBus(1000)
        self.monitor = Monitor(tree, self.bus, settings, threads)
        self._stack = stack

    def scope(self, number: int, limits: Limits, name: str = "api") -> Cgroup:
        scope = self.tree.scope(user(number).key, name, name)
        self._stack.callback(scope.close)
        self._stack.callback(scope.remove)
        self.tree.limit(user(number).key, scope, limits)
        return scope

    def start(self, scope: Cgroup, source: str, *arguments: str) -> Program:
        program = Program(scope, source, *arguments)
        self._stack.enter_context(program.popen)
        self._stack.callback(scope.wait_empty, 10)
        self._stack.callback(scope.kill)
        return program

    def watch(self, number: int, scope: Cgroup, *, adopted: bool = False) -> None:
        """As a supervisor does; the run is named after tenant and service."""
        name = scope.name.removesuffix(".scope")
        self.monitor.add(
            user(number),
            name,
            f"{number}/{name}",
            scope,
            has_cpu_max=not (scope.path / "cpu.max").read_text().startswith("max"),
            tenant_ooms=self.tree.tenant_oom(user(number).key),
            adopted=adopted,
        )


Open = Callable[..., Place]


@pytest.fixture
async def opened(settings: Settings) -> AsyncIterator[Open]:
    with ExitStack() as stack, ThreadPoolExecutor(4) as threads:
        places: list[Place] = []

        def opened(tenant_limits: Limits | None = None, **options: Any) -> Place:
            tree = open_tree(
                cgroup_slice=settings.cgroup_slice, state_id="monitor", tenant_limits=tenant_limits or Limits()
            )
            stack.callback(tree.close)
            places.append(Place(tree, replace(settings, **options), threads, stack))
            return places[-1]

        yield opened
        for place in places:
            await soon(place.monitor.close())


async def next_of(reader: EventReader, kind: str) -> Event:
    """The next event of this kind."""

    async def look() -> Event:
        async for event in reader:
            if event.kind == kind:
                return event
        raise AssertionError(f"no {kind} was told")

    return await soon(look())


async def rest_of(place: Place, reader: EventReader, kind: str) -> list[Event]:
    """All that is told of this kind until everything is closed."""
    await soon(place.monitor.close())
    place.bus.close()
    return [event async for event in reader if event.kind == kind]


def kills(scope: Cgroup) -> int:
    return scope.stats().oom_kill or 0


# ---- Want of memory


async def test_each_kill_is_told_once_while_the_sandbox_runs(opened: Open, measured: Measure) -> None:
    place = opened()
    reader, scope, other = place.bus.read(), place.scope(1, Limits(memory_max="32M")), place.scope(1, Limits(), "other")
    program = place.start(scope, GROW)
    place.watch(1, scope)
    place.watch(1, other)
    for _ in range(2):
        await program.dies()
        began = time.monotonic()
        event = await next_of(reader, "oom")
        measured("s from the killed child's end to the event", time.monotonic() - began)
        assert (event.user_id, event.service_id, event.run_id) == ("user 1", "api", "1/api")
        assert event.details == {"count": 1, "level": "service"}
        assert scope.populated()
    assert kills(scope) == 2
    assert await rest_of(place, reader, "oom") == []


async def test_what_the_whole_tenant_had_no_memory_for(opened: Open) -> None:
    place = opened(Limits(memory_max="48M"))
    reader, scope = place.bus.read(), place.scope(2, Limits())
    program = place.start(scope, GROW)
    place.watch(2, scope)
    for _ in range(2):
        await program.dies()
        event = await next_of(reader, "oom")
        assert (event.service_id, event.details) == ("api", {"count": 1, "level": "tenant"})


async def test_what_neither_s_limit_led_to_has_no_level(opened: Open) -> None:
    place = opened()
    reader, scope = place.bus.read(), place.scope(3, Limits(memory_max="2G"))
    program = place.start(scope, GROW)
    place.watch(3, scope)
    place.tree.root.apply(Limits(memory_max="64M"))
    try:
        await program.dies()
    finally:
        place.tree.root.apply(Limits(memory_max="max", memory_swap_max="max"))
    assert (await next_of(reader, "oom")).details == {"count": 1, "level": None}


async def test_a_whole_group_that_is_killed_is_counted_whole(opened: Open) -> None:
    place = opened()
    reader, scope = place.bus.read(), place.scope(4, Limits(memory_max="32M", memory_oom_group=True))
    place.start(scope, GROUP).tell()
    place.watch(4, scope)
    await asyncio.to_thread(scope.wait_empty, 30)
    told = await rest_of(place, reader, "oom")
    # The kernel counts the one that it chose both by itself and in its group.
    assert sum(event.details["count"] for event in told) == kills(scope) >= 5
    assert {event.details["level"] for event in told} == {"service"}


async def test_what_happened_last_is_told_at_the_latest_when_the_watch_ends(opened: Open) -> None:
    place = opened()
    reader, scope = place.bus.read(), place.scope(5, Limits(memory_max="32M"))
    program = place.start(scope, GROW)
    place.watch(5, scope)
    program.tell()
    program.line()  # without giving the loop a turn
    place.monitor.discard("5/api")
    place.monitor.discard("5/api")
    (event,) = await rest_of(place, reader, "oom")
    assert event.details == {"count": 1, "level": "service"}


async def test_what_was_before_is_told_of_a_new_sandbox_and_not_of_an_adopted_one(opened: Open) -> None:
    place = opened()
    reader, limits = place.bus.read(), Limits(memory_max="32M")
    new, adopted = place.scope(6, limits, "new"), place.scope(6, limits, "adopted")
    programs = [place.start(scope, GROW) for scope in (new, adopted)]
    for program in programs:
        await program.dies()
    place.watch(6, new)
    place.watch(6, adopted, adopted=True)
    assert (await next_of(reader, "oom")).service_id == "new"
    await programs[1].dies()
    event = await next_of(reader, "oom")
    assert (event.service_id, event.details) == ("adopted", {"count": 1, "level": "service"})
    assert await rest_of(place, reader, "oom") == []


async def test_one_that_lives_at_its_limit_does_not_keep_the_monitor_busy(
    opened: Open, settings: Settings, measured: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = opened()
    reader, scope = place.bus.read(), place.scope(7, Limits(memory_max="24M"))
    program = place.start(scope, RECLAIM, str(settings.users_base / "file"))
    place.watch(7, scope)
    looks, look = [], place.monitor._oom._look

    def count_looks(memory: Any) -> bool:
        looks.append(memory)
        return look(memory)

    monkeypatch.setattr(place.monitor._oom, "_look", count_looks)
    began, before = time.monotonic(), scope.stats().memory_events_max or 0
    await eventually(lambda: (scope.stats().memory_events_max or 0) > before + 1000)
    seconds, count = time.monotonic() - began, len(looks)
    measured("changes of memory.events a second", 1000 / seconds)
    measured("looks a second", count / seconds)
    assert count <= seconds * 4 + 1
    # It is heard all the same.
    program.tell()
    event = await next_of(reader, "oom")
    assert event.details == {"count": 1, "level": "service"}


# ---- Pressure


@pytest.mark.parametrize("resource", ["memory", "cpu"])
async def test_pressure_is_told_within_two_seconds_of_stall_and_then_once_a_second(
    opened: Open, measured: Measure, resource: str
) -> None:
    limits, source = STALLS[resource]
    place = opened()
    reader, scope, idle = place.bus.read(), place.scope(8, limits), place.scope(9, Limits())
    program = place.start(scope, source)
    with place.tree.slice(user(8).key) as slice_:
        before, began = slice_.stats(pressure=True), time.monotonic()
        was = getattr(before, f"{resource}_pressure").total_usec
        place.watch(8, scope)
        place.watch(9, idle)
        program.tell()
        told = [await next_of(reader, "pressure")]
        measured("s until it was told", time.monotonic() - began)
        # By the stall itself, not by the clock: a guest whose host is busy may begin to stall late.
        assert 100_000 <= told[0].details["total_usec"] - was < 2_000_000
    told += [await next_of(reader, "pressure") for _ in range(3)]
    assert {(event.user_id, event.service_id, event.run_id) for event in told} == {("user 8", None, None)}
    ours = [event for event in told if event.details["resource"] == resource]
    assert ours[0] is told[0]
    assert len(ours) >= 2
    assert ours[-1].details["avg10"] > 0
    for one, other in pairwise(ours):
        assert other.ts - one.ts > 0.5  # two clocks, and a machine that may stop us between a look at each
        assert other.details["total_usec"] > one.details["total_usec"]


# ---- Throttling


async def test_a_sandbox_that_its_quota_holds_back(opened: Open) -> None:
    place = opened(throttled_interval=1.0)
    reader = place.bus.read()
    held, little, free = (
        place.scope(10, Limits(cpu_max=0.2), "held"),
        place.scope(10, Limits(cpu_max=1.9), "little"),
        place.scope(10, Limits(), "free"),
    )
    source = STALLS["cpu"][1]
    for scope in (held, little, free):
        program = place.start(scope, source)
        place.watch(10, scope)
        program.tell()
    for _ in range(2):
        event = await next_of(reader, "throttled")
        assert (event.user_id, event.service_id, event.run_id) == ("user 10", "held", "10/held")
        assert 0.5 <= event.details["share"] <= 1
        assert event.details["usec"] > 100_000
    assert read_throttled(held).periods >= 10
    place.tree.limit(user(10).key, held, Limits(cpu_max="max"))
    place.tree.limit(user(10).key, free, Limits(cpu_max=0.1))
    place.monitor.set_cpu_max("10/held", False)
    place.monitor.set_cpu_max("10/free", True)
    while (await next_of(reader, "throttled")).service_id != "free":
        pass


# ---- Cost


async def test_watching_costs_microseconds(opened: Open, measured: Measure) -> None:
    place = opened()
    scopes = [place.scope(100 + number, Limits(memory_max=64 * MIB, cpu_max=0.5)) for number in range(100)]
    adding, discarding = [], []
    for _ in range(3):
        for number, scope in enumerate(scopes):
            began = time.perf_counter()
            place.monitor.add(user(100 + number), "api", str(number), scope, has_cpu_max=True)
            adding.append(time.perf_counter() - began)
        for number in range(len(scopes)):
            began = time.perf_counter()
            place.monitor.discard(str(number))
            discarding.append(time.perf_counter() - began)
    for number, scope in enumerate(scopes):
        place.monitor.add(user(100 + number), "api", str(number), scope, has_cpu_max=True)
    await eventually(lambda: len(place.monitor._pressure._heard_of) == len(scopes))
    began = time.perf_counter()
    for scope in scopes:
        read_throttled(scope)
    measured("us to read one quota", (time.perf_counter() - began) / len(scopes) * 1e6)
    began = time.perf_counter()
    await place.monitor.close()
    measured("s to close 100 tenants", time.perf_counter() - began)
    measured("us to add, p50", statistics.median(adding) * 1e6)
    measured("us to discard, p50", statistics.median(discarding) * 1e6)
