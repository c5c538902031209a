"""Reading a log: from any point, any number of times, while it is being written.

Each reader has its own place in the file, so a slow one holds up nobody. A reader in the writer's process
waits for the `LogFeed`; one elsewhere looks at the file's size again after `poll` seconds.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from typing import Any

import aiofiles

from ..models import LogRecord
from .feed import LogFeed
from .records import loader, parse_record

__all__ = ["POLL_SECONDS", "read_log"]

CHUNK_BYTES = 1 << 16
"""Read and parsed at once: about 1 ms of the loop."""
POLL_SECONDS = 0.2
"""Between two looks of a reader that follows without a feed."""
_BLOCK = 1 << 16


async def read_log(
    path: str,
    *,
    follow: bool = False,
    since_seq: int = 0,
    tail: int | None = None,
    feed: LogFeed | None = None,
    ended: Callable[[], bool] | None = None,
    poll: float = POLL_SECONDS,
) -> AsyncGenerator[LogRecord, None]:
    """The records of a log, in order. A log that does not exist has none yet.

    Args:
        path: the log file.
        follow: wait for more at the end, until the feed is closed or `ended` says so and all has been read.
        since_seq: leave out the records up to this number.
        tail: begin with the last so many records at most.
        feed: the writing pump's, if it is in this process and loop.
        ended: asked by a reader without feed, before each read: whether no more can come.
        poll: seconds between two looks, without a feed.

    Raises:
        LogError: a whole line of the file is no record.
    """
    load = loader()

    def over() -> bool:
        """Asked before a read: what is written before it is asked is in that read."""
        return not follow or (feed.closed if feed is not None else ended is not None and ended())

    async def more(seen: int) -> None:
        if feed is not None:
            await feed.changed(seen)
        else:
            await asyncio.sleep(poll)

    while True:
        seen, last = feed.version if feed is not None else 0, over()
        try:
            file = await aiofiles.open(path, "rb", buffering=0)
            break
        except FileNotFoundError:
            if last:
                return
        await more(seen)

    try:
        place = await asyncio.to_thread(_start, file.fileno(), since_seq, tail)
        await file.seek(place)
        rest = b""
        while True:
            seen, last = feed.version if feed is not None else 0, over()
            chunk = await file.read(CHUNK_BYTES)
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            for line in lines:
                record = parse_record(line, load)
                if record.seq > since_seq:
                    yield record
            place += sum(map(len, lines)) + len(lines)
            if len(chunk) == CHUNK_BYTES:
                continue
            if rest:
                # A half line at the end of the file may be cut off by a pump that takes over: it is read
                # anew.
                rest = b""
                await file.seek(place)
            if not chunk or not lines:
                if last:
                    return
                await more(seen)
    finally:
        await file.close()


def _start(fd: int, since_seq: int, tail: int | None) -> int:
    """The offset of the first record that is wanted, or a little before it."""
    size = os.fstat(fd).st_size
    place = _after_seq(fd, size, since_seq) if since_seq > 0 else 0
    return max(place, _tail(fd, size, tail)) if tail is not None else place


def _tail(fd: int, size: int, count: int) -> int:
    """The offset of the last `count` whole lines."""
    wanted = count + 1
    end = size
    while end > 0:
        begin = max(0, end - _BLOCK)
        block = os.pread(fd, end - begin, begin)
        newlines = block.count(b"\n")
        if newlines >= wanted:
            at = len(block)
            for _ in range(wanted):
                at = block.rfind(b"\n", 0, at)
            return begin + at + 1
        wanted -= newlines
        end = begin
    return 0


def _after_seq(fd: int, size: int, seq: int) -> int:
    """An offset of a line at or before the first with a higher number: numbers rise, so halve the file."""
    load: Callable[[bytes], Any] = loader()
    low, high = 0, size
    while high - low > _BLOCK:
        middle = (low + high) // 2
        begin = _line_after(fd, middle, high)
        if begin is None:
            high = middle
            continue
        line = _line_at(fd, begin, high)
        if line is None or parse_record(line, load).seq > seq:
            high = middle
        else:
            low = begin
    return low


def _line_after(fd: int, offset: int, end: int) -> int | None:
    """Where the first line after `offset` begins, if before `end`."""
    while offset < end:
        block = os.pread(fd, min(_BLOCK, end - offset), offset)
        found = block.find(b"\n")
        if found >= 0:
            return offset + found + 1 if offset + found + 1 < end else None
        if not block:
            break
        offset += len(block)
    return None


def _line_at(fd: int, offset: int, end: int) -> bytes | None:
    """The line at `offset`, or None if it is not whole before `end`."""
    parts: list[bytes] = []
    while offset < end:
        block = os.pread(fd, min(_BLOCK, end - offset), offset)
        if not block:
            break
        found = block.find(b"\n")
        if found >= 0:
            parts.append(block[:found])
            return b"".join(parts)
        parts.append(block)
        offset += len(block)
    return None
