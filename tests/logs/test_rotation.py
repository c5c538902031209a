"""Logs that are put aside when they are full: their names, their readers, and what goes on behind them."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pactown_runner.logs import LogPaths, LogPump, read_log
from pactown_runner.logs.journal import Journal
from pactown_runner.logs.paths import put_aside
from pactown_runner.logs.records import record_logger
from pactown_runner.logs.seek import Wanted, find
from pactown_runner.models import LogRecord
from tests.logs.conftest import USER, MakePump, Write, files, gather, limited, records, soon, written

LINES = 60_000


def lines(first: int, last: int, *, run_id: str = "r1", end: int = 0) -> bytes:
    """Records `first` to `last`, each with its number as text, and that number as its time."""
    logger = record_logger(USER, "api", run_id)
    ends = [end, 0]
    return b"".join(
        logger.render([(b"%d" % seq, 8, False)], ts=seq, seq=seq - 1, stream="stdout", ends=ends, index=0)[0]
        for seq in range(first, last + 1)
    )


def journal(paths: LogPaths, **limits: Any) -> Journal:
    return Journal(limited(paths, **limits), "api")


def write_all(paths: LogPaths, batches: list[tuple[int, int]], **limits: Any) -> None:
    """Write so many batches of records; with these limits each one that follows is in a file of its own."""
    writing = journal(paths, **{"rotate_bytes": 1, "keep": 100} | limits)
    writing.open("r1", resumed=True)
    for first, last in batches:
        writing.write(lines(first, last))
    writing.close()


async def run(pump: LogPump, write: Write, *command: str) -> None:
    pump.create()
    pump.start()
    await (await write(pump, *command)).wait()
    await soon(pump.finish())


def check(found: list[LogRecord], last: int = LINES) -> None:
    first = found[0].seq
    assert [(r.seq, r.raw) for r in found] == [(seq, b"%d" % seq) for seq in range(first, last + 1)]


@pytest.mark.parametrize("keep", [0, 1, 3])
async def test_a_full_log_is_put_aside_and_the_oldest_are_dropped(
    make_pump: MakePump, write: Write, paths: LogPaths, keep: int
) -> None:
    pump = make_pump(tenant=limited(paths, rotate_bytes=500_000, keep=keep))
    await run(pump, write, "seq", str(LINES))
    sizes = files(paths)
    assert len(sizes) == keep + 1
    numbers = sorted(int(name.rpartition(".")[2]) for name in sizes if not name.endswith(".jsonl"))
    assert numbers == list(range(numbers[-1] - keep + 1, numbers[-1] + 1)) if keep else not numbers
    assert all(500_000 <= sizes[f"api.jsonl.{number}"] < 600_000 for number in numbers)
    check(await records(paths))


@pytest.mark.each_loop
async def test_followers_miss_nothing(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    pump = make_pump(tenant=limited(paths, rotate_bytes=500_000, keep=100))
    log = paths.log("api")
    followers = [asyncio.create_task(gather(read_log(log, follow=True, feed=pump.feed))) for _ in range(2)]
    # As from another process, which hears of nothing.
    done = asyncio.Event()
    followers.append(asyncio.create_task(gather(read_log(log, follow=True, poll=0.001, ended=done.is_set))))
    await run(pump, write, "seq", str(LINES))
    done.set()
    for follower in followers:
        assert await soon(follower) == list(range(1, LINES + 1))
    assert len(files(paths)) > 10


async def test_a_follower_that_is_many_files_behind_reads_on(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    write_all(paths, [(1, 10)])
    reading = read_log(paths.log("api"), follow=True, ended=lambda: True)
    assert (await anext(reading)).seq == 1
    write_all(paths, [(n, n + 9) for n in range(11, 500, 10)])
    assert await soon(gather(reading)) == list(range(2, 501))
    assert len(files(paths)) == 50


async def test_a_gap_in_the_numbers_counts_what_a_slow_reader_missed(paths: LogPaths) -> None:
    write_all(paths, [(1, 10)])
    reading = read_log(paths.log("api"), follow=True, ended=lambda: True)
    assert (await anext(reading)).seq == 1
    write_all(paths, [(n, n + 9) for n in range(11, 500, 10)], keep=2)
    # The file that it has open is read to its end, though it has no name any more.
    assert await soon(gather(reading)) == [*range(2, 11), *range(471, 501)]
    found = await records(paths, since_seq=100)
    assert found[0].seq - 100 - 1 == 370


async def test_who_does_not_follow_comes_to_an_end(paths: LogPaths) -> None:
    write_all(paths, [(n, n + 9) for n in range(1, 50, 10)])
    reading = read_log(paths.log("api"))
    assert (await anext(reading)).seq == 1
    write_all(paths, [(n, n + 9) for n in range(51, 100, 10)])
    assert await soon(gather(reading)) == list(range(2, 51))


async def test_readers_keep_one_file_open(paths: LogPaths, no_fd_leak: None) -> None:
    write_all(paths, [(n, n + 9) for n in range(1, 500, 10)])
    before = len(os.listdir("/proc/self/fd"))
    reading = read_log(paths.log("api"))
    await anext(reading)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    await reading.aclose()


def test_a_file_begins_with_where_the_one_before_ended(paths: LogPaths) -> None:
    writing = journal(paths, rotate_bytes=1, keep=100)
    writing.open("r0", resumed=False)
    writing.write(lines(1, 3, run_id="r0"))
    writing.close()
    os.makedirs(paths.spool_dir)
    Path(paths.spools("api", "r0")[0]).touch()
    writing.open("r1", resumed=False)
    writing.write(lines(4, 6, run_id="r1"))
    writing.write(lines(7, 9, run_id="r1", end=24))
    writing.close()
    begun = [Path(path).read_bytes().splitlines()[0] for path in (put_aside(paths.log("api")) + ".2", paths.log("api"))]
    common = {"user": USER, "service": "api"}
    assert [json.loads(mark) for mark in begun] == [
        common | {"run": "r0", "ts": 3, "seq": 3, "spool": [24, 0], "file": 2, "left": {}},
        common | {"run": "r1", "ts": 6, "seq": 6, "spool": [24, 0], "file": 3, "left": {"r0": [24, 0]}},
    ]


async def test_no_number_is_given_twice_though_all_files_that_were_put_aside_are_gone(paths: LogPaths) -> None:
    """Or whoever has read the first file of a number would take the second one for it, and pass over it."""
    write_all(paths, [(1, 10), (11, 20)])
    reading = read_log(paths.log("api"), follow=True, poll=0.001)
    assert [(await anext(reading)).seq for _ in range(20)] == list(range(1, 21))
    os.unlink(put_aside(paths.log("api")) + ".1")
    write_all(paths, [(21, 30), (31, 40)])
    assert [(await soon(anext(reading))).seq for _ in range(20)] == list(range(21, 41))
    await reading.aclose()
    assert sorted(files(paths)) == ["api.jsonl", "api.jsonl.2", "api.jsonl.3"]


# ---- Cursors


@pytest.mark.parametrize("batch", [1, 7, 1000])
async def test_since_and_tail_over_many_files(paths: LogPaths, batch: int) -> None:
    last = batch * 5
    write_all(paths, [(n, n + batch - 1) for n in range(1, last + 1, batch)], keep=3)
    assert sorted(files(paths)) == ["api.jsonl", "api.jsonl.2", "api.jsonl.3", "api.jsonl.4"]
    there = range(batch + 1, last + 1)
    for number in {0, 1, batch - 1, batch, batch + 1, 2 * batch, 2 * batch + 1, last - 1, last, last + 1}:
        assert [r.seq for r in await records(paths, since_seq=number)] == [n for n in there if n > number]
        assert [r.seq for r in await records(paths, since_time=number)] == [n for n in there if n >= number]
        assert [r.seq for r in await records(paths, since_time=number + 0.5)] == [n for n in there if n > number]
        assert [r.seq for r in await records(paths, tail=number)] == list(there)[-number if number else last :]
    mixed = await records(paths, since_seq=2 * batch, since_time=3 * batch, tail=batch * 2 + 1)
    assert [r.seq for r in mixed] == list(range(3 * batch, last + 1))


async def test_a_time_that_many_records_have(paths: LogPaths) -> None:
    writing = journal(paths, rotate_bytes=1, keep=100)
    writing.open("r1", resumed=False)
    logger = record_logger(USER, "api", "r1")
    times = [1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    for seq, ts in enumerate(times):
        [line] = logger.render([(b"x", 2, False)], ts=ts, seq=seq, stream="stdout", ends=[0, 0], index=0)
        writing.write(line)
    writing.close()
    assert len(files(paths)) == len(times)
    for since in (0.5, 1.0, 1.5, 2.0, 3.0, 3.5):
        wanted = [seq for seq, ts in enumerate(times, 1) if ts >= since]
        assert [r.seq for r in await records(paths, since_time=since)] == wanted


async def test_a_clock_that_was_set_back_hides_nothing_that_came_later(paths: LogPaths) -> None:
    writing = journal(paths, rotate_bytes=1 << 20, keep=100)
    writing.open("r1", resumed=False)
    logger = record_logger(USER, "api", "r1")
    for seq, ts in enumerate([1.0, 5.0, 2.0, 3.0]):
        [line] = logger.render([(b"x", 2, False)], ts=ts, seq=seq, stream="stdout", ends=[0, 0], index=0)
        writing.write(line)
    writing.close()
    assert [r.seq for r in await records(paths, since_time=4.0)] == [2, 3, 4]


async def test_a_tail_that_is_followed(paths: LogPaths) -> None:
    write_all(paths, [(1, 10), (11, 20)])
    reading = read_log(paths.log("api"), follow=True, tail=12, poll=0.001)
    assert [(await anext(reading)).seq for _ in range(12)] == list(range(9, 21))
    write_all(paths, [(21, 30), (31, 40)])
    assert [(await anext(reading)).seq for _ in range(20)] == list(range(21, 41))
    await reading.aclose()


async def test_a_tail_of_none_is_what_comes_from_now_on_also_in_a_log_that_has_not_begun(paths: LogPaths) -> None:
    looked = asyncio.Event()
    looks = iter(range(2))

    def ended() -> bool:
        # Asked before each look, so the second time the first one has found nothing.
        if next(looks, 1):
            looked.set()
        return False

    reading = read_log(paths.log("api"), follow=True, tail=0, poll=0.001, ended=ended)
    first = asyncio.ensure_future(anext(reading))
    await soon(looked.wait())
    write_all(paths, [(1, 10), (11, 20)])
    assert (await soon(first)).seq == 1
    await reading.aclose()


async def test_cursors_survive_rotation_and_restart(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    """As a consumer does: it remembers the last number that it has seen, and comes back for more."""
    seen = 0
    for turn in range(1, 6):
        # Each turn a new supervisor, which knows of nothing but what is on the disk.
        pump = make_pump(run_id=f"r{turn}", tenant=limited(paths, rotate_bytes=100_000, keep=3))
        await run(pump, write, "seq", "2000")
        found = await records(paths, since_seq=seen)
        assert [r.seq for r in found] == list(range(seen + 1, turn * 2000 + 1))
        assert [r.raw for r in found] == [b"%d" % n for n in range(1, 2001)]
        seen = found[-1].seq
    assert len(files(paths)) == 4
    pump = make_pump(run_id="r6", tenant=limited(paths, rotate_bytes=100_000, keep=3))
    assert await records(paths, since_seq=seen) == []


def test_neither_writer_nor_reader_looks_at_what_other_services_there_were(
    paths: LogPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def listed(directory: str) -> list[str]:
        seen.append(directory)
        return names(directory)

    names = os.listdir
    monkeypatch.setattr(os, "listdir", listed)
    write_all(paths, [(1, 10), (11, 20)])
    place = find(paths.log("api"), Wanted())
    assert place is not None
    place.file.close()
    assert set(seen) == {paths.aside_dir, paths.spool_dir}


# ---- What is left half done, or taken away


async def test_a_file_of_two_names_is_one(paths: LogPaths) -> None:
    """Who is killed between the two steps of putting a log aside leaves this."""
    write_all(paths, [(1, 10), (11, 20)])
    log = paths.log("api")
    os.link(log, put_aside(log) + ".2")
    Path(log + ".new").write_bytes(b"torn")
    assert [r.seq for r in await records(paths)] == list(range(1, 21))
    assert [r.seq for r in await records(paths, tail=12)] == list(range(9, 21))
    write_all(paths, [(21, 30), (31, 40)])
    assert [r.seq for r in await records(paths)] == list(range(1, 41))
    assert sorted(files(paths)) == ["api.jsonl", "api.jsonl.1", "api.jsonl.2", "api.jsonl.3"]


async def test_a_log_that_somebody_has_taken_away_goes_on_with_its_numbers(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    write_all(paths, [(1, 10), (11, 20)])
    os.unlink(paths.log("api"))
    assert [r.seq for r in await records(paths)] == list(range(1, 11))
    pump = make_pump(run_id="r2", tenant=limited(paths, rotate_bytes=1000, keep=3))
    await run(pump, write, "echo", "hello")
    assert [(r.seq, r.raw) for r in await records(paths, since_seq=10)] == [(11, b"hello")]


async def test_a_log_that_is_taken_away_while_it_is_written_is_begun_anew(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    pump = make_pump(tenant=limited(paths, rotate_bytes=100, keep=100))
    pump.create()
    pump.start()
    program = await write(pump, "cat", stdin=asyncio.subprocess.PIPE)
    assert program.stdin is not None
    program.stdin.write(b"one\n")
    await soon(written(pump, lambda: pump.written == 1))
    os.unlink(paths.log("api"))
    program.stdin.write(b"two\n")
    await soon(written(pump, lambda: pump.written == 2))
    program.stdin.close()
    await program.wait()
    await soon(pump.finish())
    assert [(r.seq, r.raw) for r in await records(paths)] == [(2, b"two")]


async def test_a_run_that_was_left_behind_is_written_down_once_though_its_records_have_been_dropped(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    limits = limited(paths, rotate_bytes=100_000, keep=1)
    pump = make_pump(tenant=limits)
    pump.create()
    pump.start()
    # More than a step of the spool, so that its beginning is not there any more.
    program = "import sys; sys.stdout.write('x' * 999 + '\\n'); sys.stdout.write(('y' * 1000 + '\\n') * 1500 + 'end')"
    await (await write(pump, "python3", "-c", program)).wait()
    await soon(written(pump, lambda: pump.written == 1501))
    pump.detach()
    await run(make_pump(run_id="r2", tenant=limits), write, "seq", "20000")
    assert not [r for r in await records(paths) if r.raw.startswith(b"y")]
    orphan = make_pump(tenant=limits)
    orphan.adopt(alive=False)
    await orphan.finish()
    found = await records(paths)
    assert [(r.seq, r.raw, r.partial) for r in found[-2:]] == [(21501, b"20000", False), (21502, b"end", True)]
    assert paths.leftovers() == set()
