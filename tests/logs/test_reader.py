from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from pactown_runner.logs import LogError, LogFeed, LogPaths, read_log
from pactown_runner.logs.paths import put_aside
from pactown_runner.logs.records import record_logger
from tests.logs.conftest import USER, MakePump, Write, gather, records, soon, written

pytestmark = pytest.mark.usefixtures("no_fd_leak")


@pytest.fixture
def log(paths: LogPaths) -> Path:
    os.makedirs(paths.tenant_dir)
    return Path(paths.log("api"))


def lines(first: int, last: int, *, width: int = 0) -> bytes:
    """Records `first` to `last`, each with its number as text."""
    raws = [b"%0*d" % (width, seq) for seq in range(first, last + 1)]
    pieces = [(raw, len(raw) + 1, False) for raw in raws]
    return b"".join(
        record_logger(USER, "api", "r1").render(pieces, ts=1.0, seq=first - 1, stream="stdout", ends=[0, 0], index=0)
    )


async def test_a_log_that_does_not_exist_has_no_records(paths: LogPaths) -> None:
    assert await records(paths) == []


@pytest.mark.parametrize("width", [0, 3000, 200_000])
async def test_since_and_tail(log: Path, paths: LogPaths, width: int) -> None:
    count = 30 if width else 5000
    log.write_bytes(lines(1, count, width=width))
    for number in (0, 1, count // 3, count - 1, count, count + 1):
        after = list(range(1, count + 1))[number:]
        assert [r.seq for r in await records(paths, since_seq=number)] == after
        last = list(range(1, count + 1))[-number:] if number else []
        assert [r.seq for r in await records(paths, tail=number)] == last
    assert [r.seq for r in await records(paths, since_seq=count - 3, tail=10)] == [count - 2, count - 1, count]
    assert [r.seq for r in await records(paths, since_seq=count - 10, tail=2)] == [count - 1, count]


async def test_since_and_tail_over_two_files(log: Path, paths: LogPaths) -> None:
    os.mkdir(paths.aside_dir)
    Path(put_aside(str(log)) + ".1").write_bytes(lines(1001, 4000))
    assert [r.seq for r in await records(paths, tail=2)] == [3999, 4000]
    log.write_bytes(lines(4001, 8000))
    for number in (0, 1001, 2500, 4000, 4001, 6000, 8000):
        assert [r.seq for r in await records(paths, since_seq=number)] == [*range(max(1001, number + 1), 8001)]
    for number in (0, 1, 4000, 4001, 6999, 7000, 9000):
        assert [r.seq for r in await records(paths, tail=number)] == [*range(max(1001, 8001 - number), 8001)]


async def test_a_half_line_at_the_end_is_left_alone(log: Path, paths: LogPaths) -> None:
    whole = lines(1, 3)
    log.write_bytes(whole[:-1])
    assert [r.seq for r in await records(paths)] == [1, 2]
    assert [r.seq for r in await records(paths, tail=1)] == [2]


async def test_a_line_that_is_no_record_is_an_error(log: Path, paths: LogPaths) -> None:
    log.write_bytes(lines(1, 2) + b"nonsense\n" + lines(3, 3))
    with pytest.raises(LogError, match="nonsense"):
        await records(paths)


async def test_a_follower_waits_for_the_rest_of_a_line_that_is_torn_and_written_anew(log: Path) -> None:
    feed = LogFeed()
    log.write_bytes(lines(1, 1) + lines(2, 2)[:-9])
    reading = read_log(str(log), follow=True, feed=feed)
    assert (await anext(reading)).seq == 1
    second = asyncio.ensure_future(anext(reading))
    with log.open("ab") as file:
        file.truncate(len(lines(1, 1)))
        file.write(lines(2, 4))
    feed.notify()
    assert (await soon(asyncio.wait_for(second, 60))).seq == 2
    feed.close()
    assert await soon(gather(reading)) == [3, 4]


async def test_a_follower_that_began_before_the_first_line(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    pump = make_pump()
    early = [asyncio.create_task(gather(read_log(paths.log("api"), follow=True, feed=pump.feed))) for _ in range(3)]
    pump.create()
    pump.start()
    program = await write(pump, "seq", "30000")
    late = asyncio.create_task(gather(read_log(paths.log("api"), follow=True, since_seq=10, feed=pump.feed)))
    await program.wait()
    await pump.finish()
    for follower in early:
        assert await soon(asyncio.wait_for(follower, 60)) == list(range(1, 30001))
    assert await soon(asyncio.wait_for(late, 60)) == list(range(11, 30001))


async def test_a_silent_run_ends_its_followers(make_pump: MakePump, paths: LogPaths) -> None:
    pump = make_pump()
    follower = asyncio.create_task(gather(read_log(paths.log("api"), follow=True, feed=pump.feed)))
    pump.create()
    pump.start()
    await pump.finish()
    assert await soon(asyncio.wait_for(follower, 60)) == []


async def test_a_slow_reader_holds_up_nobody(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    pump = make_pump()
    pump.create()
    pump.start()
    program = await write(pump, "seq", "100000")
    await soon(written(pump, lambda: pump.written > 0))
    slow = read_log(paths.log("api"), follow=True, feed=pump.feed)
    assert (await anext(slow)).seq == 1
    await soon(asyncio.wait_for(program.wait(), 60))
    await soon(pump.finish())
    assert len(await records(paths)) == 100_000
    assert await soon(gather(slow)) == list(range(2, 100_001))


async def test_a_follower_that_is_dropped_leaves_nothing(log: Path) -> None:
    log.write_bytes(lines(1, 1))
    feed = LogFeed()
    reading = read_log(str(log), follow=True, feed=feed)
    assert (await anext(reading)).seq == 1
    waiting = asyncio.ensure_future(anext(reading))
    await asyncio.to_thread(os.stat, log)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await reading.aclose()
    feed.notify()


async def test_a_follower_in_another_process_than_the_writer(log: Path) -> None:
    done = log.with_name("done")
    script = f"""if 1:
        import os, sys
        from pathlib import Path
        for number in range(1, 200):
            with open({str(log)!r}, "ab") as file:
                file.write(sys.stdin.buffer.readline())
        Path({str(done)!r}).touch()
    """
    writer = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdin=asyncio.subprocess.PIPE)
    assert writer.stdin is not None
    reading = gather(read_log(str(log), follow=True, poll=0.001, ended=done.exists))
    writer.stdin.write(lines(1, 199))
    assert await soon(reading) == list(range(1, 200))
    assert await writer.wait() == 0
    writer.stdin.close()
