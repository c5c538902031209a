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
from tests.logs.conftest import MakePump, Write, records, soon

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
