"""The cap on what all logs of one tenant take, over services that run and services that do not."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from pactown_runner.logs import LogFeed, LogPaths, LogPump, TenantLogs, read_log
from pactown_runner.logs import cap as cap_module
from pactown_runner.logs.journal import Journal
from pactown_runner.logs.records import record_logger
from pactown_runner.logs.writer import Writer
from tests.logs.conftest import USER, MakePump, Write, files, limited, records, soon, written

WIDTH = 900
"""Of a line; a record has about 1000 bytes."""


def write_lines(journal: Journal, service_id: str, run_id: str, first: int, last: int, *, width: int = WIDTH) -> None:
    logger = record_logger(USER, service_id, run_id)
    for seq in range(first, last + 1):
        piece = (b"%0*d" % (width, seq), width + 1, False)
        journal.write(b"".join(logger.render([piece], ts=seq, seq=seq - 1, stream="stdout", ends=[0, 0], index=0)))


def log(tenant: TenantLogs, service_id: str, count: int, *, run_id: str = "r1", width: int = WIDTH) -> None:
    """Write so many records of a service that then ends."""
    journal = Journal(tenant, service_id)
    last, _ = journal.open(run_id, resumed=False)
    write_lines(journal, service_id, run_id, last + 1, last + count, width=width)
    journal.close()


def total(paths: LogPaths) -> int:
    """What logs, and what is remembered of them, take on the disk."""
    return blocks(paths.tenant_dir, paths.aside_dir, paths.gone_dir)


def blocks(*directories: str) -> int:
    """What the files in directories take on the disk. One that is just being put aside has two names."""
    found = {}
    for directory in directories:
        with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file():
                        found[entry.inode()] = entry.stat().st_blocks * 512
    return sum(found.values())


def age(paths: LogPaths, *names: str) -> None:
    """Let the files have been written to in this order."""
    for number, name in enumerate(names):
        directory = paths.tenant_dir if name.endswith(".jsonl") else paths.aside_dir
        os.utime(f"{directory}/{name}", (number + 1, number + 1))


async def kept(paths: LogPaths, service_id: str) -> list[int]:
    return [record.seq for record in await records(paths, service_id)]


async def test_the_oldest_file_of_any_service_goes_first(paths: LogPaths) -> None:
    tenant = limited(paths, rotate_bytes=10_000, keep=10)
    for service_id in ("a", "b"):
        log(tenant, service_id, 40)
    age(paths, "a.jsonl.1", "b.jsonl.1", "b.jsonl.2", "a.jsonl.2", "a.jsonl.3", "a.jsonl", "b.jsonl.3", "b.jsonl")
    log(limited(paths, rotate_bytes=10_000, keep=10, cap_bytes=total(paths) - 22_000), "c", 1)
    assert sorted(set(files(paths))) == ["a.jsonl", "a.jsonl.2", "a.jsonl.3", "b.jsonl", "b.jsonl.3", "c.jsonl"]
    assert (await kept(paths, "a"))[-1] == 40
    assert await kept(paths, "b") == list(range((await kept(paths, "b"))[0], 41))


async def test_of_a_service_that_runs_no_more_the_numbers_are_kept(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    log(limited(paths), "ended", 50)
    log(limited(paths), "young", 10)
    age(paths, "ended.jsonl", "young.jsonl")
    log(limited(paths, cap_bytes=40_000), "new", 1)
    assert (await kept(paths, "ended"), await kept(paths, "young")) == ([], list(range(1, 11)))
    assert set(files(paths)) == {"new.jsonl", "young.jsonl"}
    pump = make_pump("ended", "r2")
    pump.create()
    pump.start()
    await (await write(pump, "echo", "again")).wait()
    await soon(pump.finish())
    assert [(r.seq, r.line) for r in await records(paths, "ended", since_seq=20)] == [(51, "again")]


async def test_small_logs_count_as_what_they_take_of_the_disk(paths: LogPaths) -> None:
    cap = 400_000
    tenant = limited(paths, cap_bytes=cap, rotate_bytes=cap)
    for number in range(200):
        log(tenant, f"run-{number}", 1, width=1)
        assert total(paths) <= cap
    assert cap * 0.8 < total(paths)
    assert await kept(paths, "run-199") == [1]


async def test_there_are_not_more_files_than_can_be_counted_at_once(paths: LogPaths) -> None:
    cap = 64 << 20
    for number in range(1100):
        log(limited(paths), f"run-{number}", 1, width=1)
    age(paths, *(f"run-{number}.jsonl" for number in range(1100)))
    log(limited(paths, cap_bytes=cap), "new", 1)
    assert set(files(paths)) == {"new.jsonl"} | {f"run-{number}.jsonl" for number in range(1100 - 1024, 1100)}
    log(limited(paths), "run-0", 1, width=1)
    assert await kept(paths, "run-0") == [2]


@pytest.mark.parametrize("feed", [True, False])
async def test_who_follows_a_log_that_is_dropped_whole_has_what_its_service_prints_when_it_comes_back(
    paths: LogPaths, feed: bool
) -> None:
    """Also behind the file's end that it has open, and though what came back has been put aside by then."""
    told = LogFeed() if feed else None
    log(limited(paths), "ended", 3)
    reading = read_log(paths.log("ended"), follow=True, feed=told, poll=0.001)
    assert [(await soon(anext(reading))).seq for _ in range(3)] == [1, 2, 3]
    more = asyncio.ensure_future(anext(reading))
    for last in (3, 6, 9):
        log(limited(paths, cap_bytes=4096), "new", 1)
        assert "ended.jsonl" not in files(paths)
        assert await records(paths, "ended") == []
        assert await records(paths, "ended", since_seq=last) == []
        log(limited(paths, rotate_bytes=1), "ended", 3)
        if told is not None:
            told.notify()
        assert [(await soon(more)).seq, (await soon(anext(reading))).seq] == [last + 1, last + 2]
        more = asyncio.ensure_future(anext(reading))
        assert (await soon(more)).seq == last + 3
        more = asyncio.ensure_future(anext(reading))
        assert [r.seq for r in await records(paths, "ended", since_seq=last - 1)] == [last + 1, last + 2, last + 3]
    more.cancel()
    await asyncio.wait([more])
    await reading.aclose()


async def test_of_a_run_that_was_left_behind_nothing_is_written_twice(
    make_pump: MakePump, write: Write, paths: LogPaths
) -> None:
    pump = make_pump()
    pump.create()
    pump.start()
    await (await write(pump, "sh", "-c", "seq 1000; printf end")).wait()
    await soon(written(pump, lambda: pump.written == 1000))
    pump.detach()
    log(limited(paths, cap_bytes=4096), "new", 1)
    assert await kept(paths, "api") == []
    orphan = make_pump()
    orphan.adopt(alive=False)
    await soon(orphan.finish())
    assert [(r.seq, r.line) for r in await records(paths)] == [(1001, "end")]


DROP = """if 1:
    import sys
    from pathlib import Path
    from pactown_runner.logs import LogLimits, LogPaths, TenantLogs
    from pactown_runner.logs.journal import Journal
    from tests.logs.pump_process import arm
    log_dir, run_dir, key, moment = sys.argv[1:]
    paths = LogPaths(Path(log_dir), Path(run_dir), key)
    journal = Journal(TenantLogs(paths, LogLimits(cap_bytes=4096, rotate_bytes=4096)), "new")
    journal.open("r1", resumed=False)
    arm(int(moment))
    journal.write(b"")
"""


async def test_who_is_killed_while_a_log_is_dropped_loses_no_number(paths: LogPaths) -> None:
    words = (str(paths.log_dir), str(paths.run_dir), paths.key)
    codes = []
    for moment in range(8):
        log(limited(paths), "ended", 1)
        found = await kept(paths, "ended")
        assert found == list(range(found[0], moment + 2))
        dropping = await asyncio.create_subprocess_exec(sys.executable, "-c", DROP, *words, str(moment))
        codes.append(await soon(dropping.wait()))
    # Before, amid and behind the write, and before and behind the removal.
    assert codes == [-signal.SIGKILL] * 5 + [0] * 3


async def test_a_log_that_is_written_holds_the_cap_by_itself(paths: LogPaths) -> None:
    cap = 64_000
    tenant = limited(paths, rotate_bytes=64_000, keep=3, cap_bytes=cap)
    journal = Journal(tenant, "api")
    journal.open("r1", resumed=False)
    most = 0
    for first in range(1, 1000, 5):
        write_lines(journal, "api", "r1", first, first + 4)
        most = max(most, total(paths))
    journal.close()
    assert cap * 0.8 < most <= cap
    found = await kept(paths, "api")
    assert found == list(range(found[0], 1001))


async def test_many_services_that_are_written_hold_the_cap_together(paths: LogPaths) -> None:
    cap = 200_000
    tenant = limited(paths, rotate_bytes=200_000, keep=3, cap_bytes=cap)
    names = [f"s{number}" for number in range(10)]
    journals = {name: Journal(tenant, name) for name in names}
    for name in names:
        journals[name].open("r1", resumed=False)
        write_lines(journals[name], name, "r1", 1, 3)
    for first in range(4, 300, 5):
        for name in names[:5]:
            write_lines(journals[name], name, "r1", first, first + 4)
            assert total(paths) <= cap
    for journal in journals.values():
        journal.close()
    # Those that printed little lose nothing to those that flood.
    for name in names[5:]:
        assert await kept(paths, name) == [1, 2, 3]
    for name in names[:5]:
        assert (await kept(paths, name) or [303])[-1] == 303


async def test_a_log_that_another_process_writes_is_left_to_it(paths: LogPaths) -> None:
    mine, other = (limited(paths, cap_bytes=60_000) for _ in range(2))
    writing = Journal(other, "theirs")
    writing.open("r1", resumed=False)
    write_lines(writing, "theirs", "r1", 1, 50)
    age(paths, "theirs.jsonl")
    log(mine, "mine", 20)
    assert await kept(paths, "theirs") == list(range(1, 51))
    # That one looks too, and sees what both take.
    write_lines(writing, "theirs", "r1", 51, 60)
    writing.close()
    assert total(paths) <= 60_000
    found = await kept(paths, "theirs")
    assert found == list(range(found[0], 61))


async def test_who_is_forked_from_a_writer_does_not_keep_its_log_from_being_dropped(paths: LogPaths) -> None:
    """A child of the embedding process has copies of all descriptors, until it executes a program, or for good."""
    writing = Journal(limited(paths), "ended")
    writing.open("r1", resumed=False)
    write_lines(writing, "ended", "r1", 1, 50)
    copy = os.dup(writing._fd)
    try:
        writing.close()
        log(limited(paths, cap_bytes=30_000), "new", 1)
        assert await kept(paths, "ended") == []
    finally:
        os.close(copy)


def test_a_writer_waits_for_who_drops_what_it_is_about_to_open(paths: LogPaths) -> None:
    log(limited(paths), "api", 5)
    fd = os.open(paths.log("api"), os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(Exception, match="locked by another process"):
            log(limited(paths), "api", 5, run_id="r2")
    finally:
        os.close(fd)
    log(limited(paths), "api", 5, run_id="r2")


async def test_spools_count(make_pump: MakePump, write: Write, paths: LogPaths) -> None:
    os.makedirs(paths.spool_dir)
    log(limited(paths), "ended", 100)
    Path(paths.spools("left", "r1")[0]).write_bytes(b"x" * 90_000)
    log(limited(paths, cap_bytes=160_000), "new", 1)
    assert await kept(paths, "ended") == []
    assert Path(paths.spools("left", "r1")[0]).exists()


def allocated(paths: LogPaths) -> int:
    """What logs and spools take on the disk."""
    return total(paths) + blocks(paths.spool_dir)


@pytest.mark.parametrize("drops", [False, True])
async def test_raw_output_that_waits_counts_whenever_it_comes(paths: LogPaths, drops: bool) -> None:
    """The room of a spool comes and goes in steps of a megabyte, most of it between two looks at the disk."""
    cap = 12 << 20
    rate = {"rate_bytes": 4096, "rate_policy": "drop"} if drops else {}
    tenant = limited(paths, rotate_bytes=cap // 8, keep=50, cap_bytes=cap, **rate)
    writers = [Writer(paths, USER, name, "r1", tenant) for name in ("a", "b")]
    reading, writing = os.pipe2(os.O_NONBLOCK)
    most, line = 0, b"%0*d\n" % (WIDTH, 7)
    try:
        log(limited(paths, rotate_bytes=cap // 8, keep=50), "ended", cap // 1000)
        for writer in writers:
            writer.open("r1", resumed=False)
        for turn in range(1000):
            writer = writers[turn % 2]
            os.write(writing, line * 72)
            while writer.take(0, reading, 1 << 18):
                most = max(most, allocated(paths))
            if writer.backlog(0) >= 1 << 19:
                while writer.render(0):
                    most = max(most, allocated(paths))
        most = max(most, allocated(paths))
    finally:
        os.close(reading)
        os.close(writing)
        for writer in writers:
            writer.close()
    assert cap * 0.7 < most <= cap


PRINT = """if 1:
    import sys
    print("begun", flush=True)
    sys.stdin.readline()
    sys.stdout.write(("y" * 999 + "\\n") * 20_000)
"""


async def test_a_look_that_takes_long_holds_up_its_tenant_alone(
    make_pump: MakePump, write: Write, paths: LogPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = limited(paths, cap_bytes=16 << 20, rotate_bytes=1 << 20, keep=50)
    loud = make_pump("loud", tenant=tenant, retry=0.001)
    quiet = make_pump("quiet", paths=LogPaths(paths.log_dir, paths.run_dir, "bbccddee"))
    for pump in (loud, quiet):
        pump.create()
        pump.start()
    flood = await write(loud, sys.executable, "-c", PRINT, stdin=asyncio.subprocess.PIPE)
    echo = await write(quiet, "cat", stdin=asyncio.subprocess.PIPE)
    assert flood.stdin is not None
    assert echo.stdin is not None
    echo.stdin.write(b"begun\n")
    # Both have looked once.
    await soon(written(loud, lambda: loud.written == 1))
    await soon(written(quiet, lambda: quiet.written == 1))
    look, told = cap_module._drop_oldest, threading.Event()
    tried: list[LogPump] = []
    monkeypatch.setattr(LogPump, "_try_again", lambda pump: tried.append(pump))  # noqa: PLW0108 - a method
    monkeypatch.setattr(cap_module, "_drop_oldest", lambda *words: (told.wait(), look(*words))[1])
    try:
        flood.stdin.write(b"\n")
        count = 1
        while not tenant.is_behind(1 << 19) or count < 100:
            count += 1
            echo.stdin.write(b"still here\n")
            await soon(written(quiet, lambda: quiet.written == count))  # noqa: B023 - awaited at once
        ended = asyncio.ensure_future(flood.wait())
        echo.stdin.close()
        await soon(echo.wait())
        await soon(quiet.finish())
        assert not ended.done()
    finally:
        told.set()
    await soon(ended)
    await soon(loud.finish())
    # It went on as it had stopped, and not as after a full disk: by as much as fits, in the midst of a line.
    assert tried == []
    found = await kept(paths, "loud")
    assert found == list(range(found[0], 20_002))
    assert (16 << 20) * 0.8 < total(paths) <= 16 << 20


async def test_what_is_no_log_is_neither_counted_nor_touched(paths: LogPaths) -> None:
    log(limited(paths), "ended", 50)
    for name in ("notes.txt", "ended.jsonl.old", "ended.jsonl.gz", "x.jsonl.1.bak"):
        Path(paths.tenant_dir, name).write_bytes(b"x" * 100_000)
    Path(paths.tenant_dir, "strange.jsonl").write_bytes(b"no record\n" * 1000)
    age(paths, "strange.jsonl")
    log(limited(paths, cap_bytes=80_000), "new", 1)
    assert await kept(paths, "ended") == list(range(1, 51))
    assert len(os.listdir(paths.tenant_dir)) == 7


WRITE = """if 1:
    import json, os, sys
    from pathlib import Path
    from pactown_runner.logs import LogError, LogLimits, LogPaths, TenantLogs
    from tests.logs.test_cap import log
    log_dir, run_dir, key, limits, name, turns = sys.argv[1:]
    paths = LogPaths(Path(log_dir), Path(run_dir), key)
    turn = 0
    while turn < int(turns):
        try:
            log(TenantLogs(paths, LogLimits(**json.loads(limits))), f"{name}-{turn % 7}", 20, run_id=f"r{turn}")
        except LogError as error:
            # As a pump does, try again: on a busy machine, who drops a log's contents may not run on for long.
            assert "locked" in str(error)
        else:
            turn += 1
"""


async def test_processes_that_share_a_tenant_hold_the_cap_and_lose_no_number(paths: LogPaths) -> None:
    limits = {"rotate_bytes": 20_000, "keep": 2, "cap_bytes": 160_000}
    words = (str(paths.log_dir), str(paths.run_dir), paths.key, json.dumps(limits))
    # The directory is made by the first one.
    log(limited(paths), "first", 1)
    writers = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", WRITE, *words, f"w{number}", "70")
        for number in range(4)
    ]
    most = 0

    async def watch() -> None:
        nonlocal most
        while any(writer.returncode is None for writer in writers):
            most = max(most, await asyncio.to_thread(total, paths))

    try:
        await soon(watch(), 60)
    finally:
        for writer in writers:
            if writer.returncode is None:
                writer.kill()
            await writer.wait()
    assert [writer.returncode for writer in writers] == [0, 0, 0, 0]
    # Each process may be a step ahead of the others.
    assert most <= 160_000 * (1 + 4 / 16)
    for number in range(4):
        for service in range(7):
            found = await kept(paths, f"w{number}-{service}")
            assert found == (list(range(found[0], 201)) if found else [])
    log(limited(paths), "w0-0", 1, run_id="last")
    assert (await kept(paths, "w0-0"))[-1] == 201
