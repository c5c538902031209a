"""How much a tenant may print: what waits, what is dropped, and that it is counted."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import select
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pactown_runner import Settings
from pactown_runner.logs import LogPaths, LogPump, LogTenants
from pactown_runner.logs.rate import Rate
from pactown_runner.models import LogRecord
from tests.logs.conftest import PER_SECOND, Clock, MakePump, Write, limited, rated, records, soon, written

# ---- The bucket


def test_a_burst_then_the_rate(clock: Clock) -> None:
    rate = Rate(1000, drops=False, clock=clock)
    assert rate.left() == 1000
    rate.spend(1000)
    assert (rate.left(), rate.open()) == (0, False)
    clock.now += 0.25
    assert (rate.left(), rate.open()) == (250, True)
    clock.now += 1000
    assert rate.left() == 1000


def test_what_is_owed_is_paid_and_has_an_end(clock: Clock) -> None:
    rate = Rate(1000, drops=False, clock=clock)
    rate.spend(4000)
    clock.now += 2
    assert not rate.open()
    clock.now += 1.5
    assert rate.left() == 500
    rate.spend(10**9)
    clock.now += 10.5
    assert rate.left() == 500


def test_who_drops_does_so_until_it_is_worth_writing_again(clock: Clock) -> None:
    rate = Rate(1000, drops=True, clock=clock)
    rate.spend(999)
    assert not rate.dropping()
    rate.spend(1)
    assert rate.dropping()
    clock.now += 0.49
    assert rate.dropping()
    clock.now += 0.02
    assert not rate.dropping()
    rate.spend(500)
    assert not rate.dropping()


async def test_turns_come_in_order_and_none_is_left_out(clock: Clock) -> None:
    rate = Rate(100_000, drops=False, clock=clock)
    rate.spend(100_000)
    loop = asyncio.get_running_loop()
    taken: list[tuple[str, int]] = []
    done = asyncio.Event()

    def turn(name: str, share: int) -> None:
        taken.append((name, share))
        rate.spend(share)
        if len(taken) == 6:
            done.set()
        else:
            rate.wait(loop, partial(turn, name))
            clock.now += 0.04

    for name in "abc":
        rate.wait(loop, partial(turn, name))
    clock.now += 0.04
    assert rate.left() > 0
    assert not rate.open(), "who comes later would be served before those who wait"
    await soon(done.wait())
    assert "".join(name for name, _ in taken) == "abcabc"
    assert all(share == 4096 for _, share in taken)


# ---- Writers that wait


async def flood(pump: LogPump, write: Write, *command: str, **options: Any) -> asyncio.subprocess.Process:
    pump.create()
    pump.start()
    return await write(pump, *command, **options)


@pytest.mark.each_loop
async def test_beyond_its_rate_a_writer_waits(make_pump: MakePump, write: Write, paths: LogPaths, clock: Clock) -> None:
    pump = make_pump(tenant=rated(paths, clock, drops=False))
    program = await flood(pump, write, "seq", "50000")
    for second in range(3):
        # In time that stands still so much comes through, and then the pipe is full.
        wanted = PER_SECOND * (second + 1)
        await soon(written(pump, lambda: _printed(paths) > wanted - 10))  # noqa: B023 - awaited at once
        await soon(_full(pump._fifos[0].path))
        assert wanted - 10 < _printed(paths) <= wanted
        clock.now += 1
    # The end of a run waits for nothing, and loses nothing of what is in the pipe.
    program.kill()
    await program.wait()
    await soon(pump.finish())
    found = await records(paths)
    assert len(found) > 12_000
    assert [r.seq for r in found] == list(range(1, len(found) + 1))
    assert all(r.raw == b"%d" % r.seq for r in found[:-1])


def _printed(paths: LogPaths) -> int:
    """How much of the first stream is in the log."""
    log = Path(paths.log("api"))
    lines = log.read_bytes().splitlines() if log.exists() else []
    return int(json.loads(lines[-1])["spool"][0]) if lines else 0


async def _full(path: str) -> None:
    """Wait until a FIFO takes no byte more."""
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        while poller.poll(0):
            await asyncio.sleep(0)
    finally:
        os.close(fd)


async def test_a_flood_leaves_turns_to_its_tenants_other_sandboxes(
    make_pump: MakePump, write: Write, paths: LogPaths, clock: Clock
) -> None:
    shared = rated(paths, clock, drops=False)
    loud, quiet = make_pump("loud", tenant=shared), make_pump("quiet", tenant=shared)
    await flood(loud, write, "yes")
    talking = await flood(quiet, write, "cat", stdin=asyncio.subprocess.PIPE)
    assert talking.stdin is not None
    await soon(_full(loud._fifos[0].path))
    for heard in range(1, 4):
        talking.stdin.write(b"hello\n")
        while quiet.written < heard:
            # Time that stood still from here on could all have been the flood's, before the line was in its FIFO.
            before, clock.now = loud.written, clock.now + 0.5
            await soon(written(loud, lambda: loud.written > before))  # noqa: B023 - awaited at once


async def test_tenants_have_rates_of_their_own(
    make_pump: MakePump, write: Write, paths: LogPaths, clock: Clock
) -> None:
    other = LogPaths(paths.log_dir, paths.run_dir, "bbbbbbbb")
    loud = make_pump("loud", tenant=rated(paths, clock, drops=False))
    quiet = make_pump(paths=other, tenant=rated(other, clock, drops=False))
    await flood(loud, write, "yes")
    await soon(_full(loud._fifos[0].path))
    await (await flood(quiet, write, "echo", "hello")).wait()
    await soon(written(quiet, lambda: quiet.written == 1))


# ---- What is dropped


def check(found: list[LogRecord], last: int) -> int:
    """Each of the numbers up to `last` is there in order, or counted where it should be; returns how many are not."""
    assert [record.seq for record in found] == list(range(1, len(found) + 1))
    number, dropped = 1, 0
    for record in found:
        if record.dropped_bytes:
            assert (record.raw, record.data, record.line, record.partial) == (b"", b"", "", False)
            lines = [b"%d\n" % n for n in range(number, number + record.dropped_lines)]
            assert record.dropped_bytes == len(b"".join(lines))
            number += record.dropped_lines
            dropped += record.dropped_lines
        else:
            assert record.raw == b"%d" % number
            number += 1
    assert number == last + 1
    return dropped


@pytest.mark.each_loop
async def test_beyond_its_rate_lines_are_dropped_and_counted(
    make_pump: MakePump, write: Write, paths: LogPaths, clock: Clock
) -> None:
    pump = make_pump(tenant=rated(paths, clock, drops=True))
    program = await flood(pump, write, "seq", "200000")
    await soon(program.wait())
    await soon(pump.finish())
    found = await records(paths)
    dropped = check(found, 200_000)
    assert PER_SECOND - 10 < sum(len(r.data) for r in found) < PER_SECOND + 10
    assert dropped == 200_000 - sum(not r.dropped_bytes for r in found)
    assert paths.leftovers() == set()


async def test_in_time_that_goes_on_some_is_written_and_some_is_counted(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    pump = make_pump(tenant=limited(paths, rate_bytes=100_000, rate_policy="drop"))
    program = await flood(
        pump, write, "sh", "-c", "for i in 0 1 2 3 4; do seq $((i * 40000 + 1)) $((i * 40000 + 40000)); sleep 0.3; done"
    )
    await soon(program.wait())
    await soon(pump.finish())
    found = await records(paths)
    assert check(found, 200_000) > 50_000
    assert sum(bool(record.dropped_bytes) for record in found) > 2


async def test_the_count_appears_though_nothing_follows_and_before_what_does(
    make_pump: MakePump, write: Write, paths: LogPaths, clock: Clock
) -> None:
    pump = make_pump(tenant=rated(paths, clock, drops=True))
    program = await flood(pump, write, "sh", "-c", "seq 20000; read x; echo 20001", stdin=asyncio.subprocess.PIPE)
    await soon(written(pump, lambda: _printed(paths) == 108_894))
    assert check(await records(paths), 20_000) > 0
    clock.now += 1
    await soon(program.communicate(b"\n"))
    await soon(written(pump, lambda: _printed(paths) == 108_900))
    await pump.finish()
    found = await records(paths)
    check(found, 20_001)
    assert found[-2].dropped_bytes


async def test_what_is_dropped_is_counted_before_the_next_line_however_soon_that_comes(
    make_pump: MakePump, write: Write, paths: LogPaths, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pactown_runner.logs.pump.COUNT_SECONDS", 3600)
    pump = make_pump(tenant=rated(paths, clock, drops=True))
    program = await flood(pump, write, "sh", "-c", "seq 20000; read x; echo 20001", stdin=asyncio.subprocess.PIPE)
    await soon(_dropping(pump, 108_894 - PER_SECOND - 10))
    clock.now += 1
    await soon(program.communicate(b"\n"))
    await soon(pump.finish())
    found = await records(paths)
    check(found, 20_001)
    assert found[-1].raw == b"20001"


async def test_both_streams_are_counted_each(make_pump: MakePump, write: Write, paths: LogPaths, clock: Clock) -> None:
    pump = make_pump(tenant=rated(paths, clock, drops=True, per_second=4096))
    program = await flood(pump, write, "sh", "-c", "seq 30000 & seq 20000 >&2; wait; printf unfinished")
    await soon(program.wait())
    await soon(pump.finish())
    found = await records(paths)
    for stream, lines, size in (("stdout", 30_001, 168_894 + 10), ("stderr", 20_000, 108_894)):
        those = [record for record in found if record.stream == stream]
        assert sum(r.dropped_lines + (not r.dropped_bytes) for r in those) == lines
        assert sum(r.dropped_bytes + len(r.data) for r in those) == size


async def test_long_lines_are_written_in_part_or_not_at_all(
    make_pump: MakePump, write: Write, paths: LogPaths, clock: Clock
) -> None:
    script = "import sys; sys.stdout.write('a' * 100_000 + '\\n' + 'b' * 300_000 + '\\n' + 'c' * 70_000)"
    pump = make_pump(tenant=rated(paths, clock, drops=True))
    program = await flood(pump, write, sys.executable, "-c", script)
    await soon(program.wait())
    await soon(pump.finish())
    found = await records(paths)
    assert [(r.raw[:1], len(r.raw), r.partial) for r in found if r.raw] == [(b"a", 65536, True)]
    rest = [r for r in found if r.dropped_bytes]
    assert sum(r.dropped_bytes for r in rest) == 100_001 + 300_001 + 70_000 - 65536
    assert sum(r.dropped_lines for r in rest) == 3


async def test_what_is_dropped_takes_no_room(make_pump: MakePump, write: Write, paths: LogPaths, clock: Clock) -> None:
    size = 30_000_000
    pump = make_pump(tenant=rated(paths, clock, drops=True))
    program = await flood(pump, write, "sh", "-c", f"yes | head -c {size}; read x", stdin=asyncio.subprocess.PIPE)
    await soon(written(pump, lambda: _printed(paths) == size))
    assert os.stat(paths.spools("api", "r1")[0]).st_blocks * 512 <= 2 << 20
    assert os.stat(paths.log("api")).st_size < 2 << 20
    program.kill()


async def test_a_successor_counts_what_its_predecessor_dropped_and_had_not_counted(
    make_pump: MakePump, write: Write, paths: LogPaths, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pactown_runner.logs.pump.COUNT_SECONDS", 3600)
    monkeypatch.setattr("pactown_runner.logs.writer.DROPPED_BYTES", 1 << 30)
    last = 500_000
    pump = make_pump(tenant=rated(paths, clock, drops=True))
    program = await flood(pump, write, "sh", "-c", f"seq {last}; read x", stdin=asyncio.subprocess.PIPE)
    # More than a step of the spool, which gives back what is in the log, and that only.
    await soon(_dropping(pump, 3 << 20))
    pump.detach()
    successor = make_pump(tenant=rated(paths, clock, drops=True))
    successor.adopt()
    successor.start()
    await soon(program.communicate(b"\n"))
    await soon(successor.finish())
    assert check(await records(paths), last) > 0


async def _dropping(pump: LogPump, count: int) -> None:
    while pump._writer is None or pump._writer._dropped[0][1] < count:
        await asyncio.sleep(0)


# ---- Tenants


@pytest.fixture
def tenants(tmp_path: Path) -> LogTenants:
    settings = Settings(
        log_dir=tmp_path, run_dir=tmp_path, log_rotate_bytes=5000, log_keep=7, log_cap_bytes=6000, log_rate_bytes=4096
    )
    return LogTenants(settings)


def test_the_pumps_of_a_tenant_share_what_its_settings_say(tenants: LogTenants) -> None:
    one, other = tenants.of("aaaaaaaa"), tenants.of("bbbbbbbb")
    assert one is tenants.of("aaaaaaaa")
    assert one is not other
    assert (one.limits.rotate_bytes, one.limits.keep, one.limits.cap_bytes) == (5000, 7, 6000)
    assert one.rate is not None
    assert other.rate is not None
    one.rate.spend(4096)
    assert (one.rate.open(), other.rate.open()) == (False, True)


def test_what_a_tenant_owes_outlives_its_pumps_and_is_forgotten_at_last(tenants: LogTenants) -> None:
    rate = tenants.of("aaaaaaaa").rate
    assert rate is not None
    rate.spend(40_000)
    for number in range(500):
        tenants.of(f"{number:08x}")
    gc.collect()
    assert tenants.of("aaaaaaaa").rate is rate
    for number in range(2000):
        tenants.of(f"{number:08x}")
    gc.collect()
    assert len(tenants._known) <= 1000
