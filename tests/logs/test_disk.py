"""A disk that is full, for once or for good."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pactown_runner.logs import LogError, LogPaths, LogPump
from tests.logs.conftest import Clock, MakePump, Write, files, limited, rated, records, soon, written

pytestmark = pytest.mark.host

LINES = 100_000


@pytest.fixture
def small(tmp_path: Path) -> Iterator[LogPaths]:
    """Paths whose logs lie on a file system of 32 MiB, of which a file takes all but 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "logs", disk], check=True)
    try:
        (disk / "ballast").write_bytes(bytes(31 << 20))
        yield LogPaths(disk / "log", tmp_path / "run", "aabbccdd")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def make_room(paths: LogPaths) -> None:
    os.unlink(paths.log_dir.parent / "ballast")


async def until_stalled(pump: LogPump) -> None:
    """Wait until the pump has met the full disk."""
    while pump.error is None:
        await pump.feed.changed(pump.feed.version)


async def check(paths: LogPaths) -> None:
    found = await records(paths)
    assert [(r.seq, r.raw) for r in found] == [(i, b"%d" % i) for i in range(1, LINES + 1)]
    assert paths.leftovers() == set()


async def test_a_pump_goes_on_when_there_is_room_again(make_pump: MakePump, write: Write, small: LogPaths) -> None:
    pump = make_pump(paths=small, retry=0.01)
    pump.create()
    pump.start()
    program = await write(pump, "seq", str(LINES))
    await soon(until_stalled(pump))
    assert "No space left" in str(pump.error)
    make_room(small)
    await soon(program.wait())
    await soon(pump.finish())
    assert pump.error is None
    await check(small)


async def test_an_operator_is_told_once_that_a_disk_is_full_and_once_that_it_is_not(
    make_pump: MakePump, write: Write, small: LogPaths, caplog: pytest.LogCaptureFixture
) -> None:
    pump = make_pump(paths=small, retry=0.001)
    pump.create()
    pump.start()
    await write(pump, "seq", str(LINES))
    await soon(until_stalled(pump))
    for _ in range(3):
        await soon(pump.feed.changed(pump.feed.version))
        assert pump.error is not None
    [told] = caplog.records
    assert told.levelname == "ERROR"
    assert "cannot write the log of api" in told.getMessage()
    make_room(small)
    # Whoever waits for the feed hears of it, too.
    while pump.error is not None:
        await soon(pump.feed.changed(pump.feed.version))
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "is written again" in caplog.records[1].getMessage()


async def test_a_full_log_is_put_aside_when_there_is_room_again(
    make_pump: MakePump, write: Write, small: LogPaths
) -> None:
    pump = make_pump(paths=small, retry=0.01, tenant=limited(small, rotate_bytes=1, keep=100))
    pump.create()
    pump.start()
    program = await write(pump, "cat", stdin=asyncio.subprocess.PIPE)
    assert program.stdin is not None
    program.stdin.write(b"1\n")
    await soon(written(pump, lambda: pump.written == 1))
    fill(small)
    # The spool and the log have pages that are not full, but there is none for another file.
    program.stdin.write(b"2\n")
    await soon(until_stalled(pump))
    assert "No space left" in str(pump.error)
    assert list(files(small)) == ["api.jsonl"]
    assert [r.raw for r in await records(small)] == [b"1"]
    make_room(small)
    program.stdin.write(b"3\n")
    await soon(written(pump, lambda: pump.written == 3))
    program.stdin.close()
    await soon(program.wait())
    await soon(pump.finish())
    assert [r.raw for r in await records(small)] == [b"1", b"2", b"3"]
    assert len(files(small)) > 1


async def test_what_is_dropped_while_the_disk_is_full_is_counted_and_frees_it(
    make_pump: MakePump, write: Write, small: LogPaths, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is dropped is not counted meanwhile, however long it takes to fill the disk: its count is what frees it.
    monkeypatch.setattr("pactown_runner.logs.writer.DROPPED_BYTES", 1 << 30)
    monkeypatch.setattr("pactown_runner.logs.pump.COUNT_SECONDS", 3600)
    pump = make_pump(paths=small, retry=0.01, tenant=rated(small, clock, drops=True))
    pump.create()
    pump.start()
    os.truncate(small.log_dir.parent / "ballast", 29 << 20)
    (small.log_dir.parent / "page").write_bytes(bytes(4096))
    program = await write(pump, "seq", "1000000")
    await soon(until_stalled(pump))
    assert "No space left" in str(pump.error)
    # The disk is full of what is dropped; for its count there may just have been no room.
    os.unlink(small.log_dir.parent / "page")
    await soon(program.wait())
    await soon(pump.finish())
    number = 1
    for record in await records(small):
        if record.dropped_bytes:
            dropped = b"".join(b"%d\n" % n for n in range(number, number + record.dropped_lines))
            assert record.dropped_bytes == len(dropped)
            number += record.dropped_lines
        else:
            assert record.raw == b"%d" % number
            number += 1
    assert number == 1_000_001
    assert small.leftovers() == set()


async def test_finish_says_what_it_could_not_write_and_can_be_called_again(
    make_pump: MakePump, write: Write, small: LogPaths
) -> None:
    pump = make_pump(paths=small)
    pump.create()
    pump.start()
    await (await write(pump, "seq", "10000")).wait()
    fill(small)
    with pytest.raises(LogError, match="No space left"):
        await pump.finish()
    assert small.leftovers() == {("api", "r1")}
    os.unlink(small.log_dir.parent / "more")
    make_room(small)
    await pump.finish()
    assert [r.raw for r in await records(small)] == [b"%d" % i for i in range(1, 10001)]


async def test_a_successor_goes_on_after_a_full_disk(make_pump: MakePump, write: Write, small: LogPaths) -> None:
    pump = make_pump(paths=small, retry=3600)
    pump.create()
    pump.start()
    # The program stays: what a FIFO still holds is gone when nobody has it open between the two pumps.
    program = await write(pump, "sh", "-c", f"seq {LINES}; read -r told", stdin=asyncio.subprocess.PIPE)
    await soon(until_stalled(pump))
    pump.detach()
    make_room(small)
    successor = make_pump(paths=small)
    successor.adopt()
    successor.start()
    await soon(program.communicate(b"\n"))
    await soon(successor.finish())
    await check(small)


def fill(paths: LogPaths) -> None:
    """Take what is left of the disk."""
    with (paths.log_dir.parent / "more").open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
