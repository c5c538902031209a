"""Reading a log: from any point, any number of times, while it is being written.

Each reader has its own place in the files, so a slow one holds up nobody, and keeps one file at a time. A reader in the
writer's process waits for the `LogFeed`; one elsewhere looks again after `poll` seconds.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Collection
from itertools import dropwhile

from aiofiles.threadpool import wrap

from ..models import LogRecord
from .feed import LogFeed
from .records import loader, parse_record, run_mark
from .seek import Place, Wanted, find

__all__ = ["POLL_SECONDS", "read_log"]

CHUNK_BYTES = 1 << 15
"""Read and parsed at once: about half a millisecond of the loop. More would be no faster."""
POLL_SECONDS = 0.2
"""Between two looks of a reader that follows without a feed."""


async def read_log(
    path: str,
    *,
    follow: bool = False,
    since_seq: int = 0,
    since_time: float | None = None,
    tail: int | None = None,
    run_ids: Collection[str] | None = None,
    feed: LogFeed | None = None,
    ended: Callable[[], bool] | None = None,
    poll: float = POLL_SECONDS,
) -> AsyncGenerator[LogRecord, None]:
    """The records of a log, in order. A log that does not exist has none yet.

    Records have numbers without a gap, over all runs of the service, also across files and restarts of the supervisor:
    whoever has seen number `n` goes on with `since_seq=n`. A number that is more than one higher than the one before,
    or than `since_seq`, tells exactly how many records have made room for newer ones before this reader came to them.

    Args:
        path: the log file.
        follow: wait for more at the end, until the feed is closed or `ended` says so and all has been read.
        since_seq: leave out the records up to this number.
        since_time: leave out the records before the first that was taken at or after this time, in seconds since the
            epoch.
        tail: begin with the last so many records at most.
        run_ids: leave out the records of other runs; looked at anew at each read, so that runs may join.
        feed: the writing pump's, if it is in this process and loop.
        ended: asked by a reader without feed, before each read: whether no more can come.
        poll: seconds between two looks, without a feed.

    Raises:
        LogError: a whole line of the file is no record.
    """
    cursor = _Cursor(path=path, follow=follow, seq=since_seq, run_ids=run_ids, feed=feed, ended=ended, poll=poll)
    cursor.since = since_time
    wanted = Wanted(since_seq, since_time, tail)
    while True:
        cursor.look()
        place = await _found(path, wanted)
        if place is None:
            if cursor.done:
                return
            await cursor.more()
            wanted = Wanted(since_seq, since_time)
            continue
        with place.file:
            async for records in cursor.read(place):
                for record in records:
                    yield record
        if cursor.done:
            return
        wanted = Wanted(cursor.seq, behind=place.number)


async def _found(path: str, wanted: Wanted) -> Place | None:
    finding = asyncio.ensure_future(asyncio.to_thread(find, path, wanted))
    try:
        return await asyncio.shield(finding)
    except asyncio.CancelledError:
        finding.add_done_callback(_close)
        raise


def _close(finding: asyncio.Future[Place | None]) -> None:
    if not finding.cancelled() and finding.exception() is None and (place := finding.result()) is not None:
        place.file.close()


class _Cursor:
    """One reader's place, over the files that are the log by turns."""

    def __init__(
        self,
        *,
        path: str,
        follow: bool,
        seq: int,
        run_ids: Collection[str] | None,
        feed: LogFeed | None,
        ended: Callable[[], bool] | None,
        poll: float,
    ) -> None:
        self.seq = seq
        self.since: float | None = None
        self.done = False
        self._path = path
        self._follow = follow
        self._feed = feed
        self._ended = ended
        self._poll = poll
        self._version = 0
        self._end: tuple[int, int] | None = None
        self._load = loader()
        self._run_ids = run_ids

    def look(self) -> None:
        """Asked before a read: what was written before it is in that read."""
        if self._feed is not None:
            self._version = self._feed.version
            self.done = not self._follow or self._feed.closed
        else:
            self.done = not self._follow or (self._ended is not None and self._ended())

    async def more(self) -> None:
        """Wait until there may be more than at the last look."""
        if self._feed is not None:
            await self._feed.changed(self._version)
        else:
            await asyncio.sleep(self._poll)

    async def read(self, place: Place) -> AsyncGenerator[list[LogRecord], None]:
        """The records of one file; of the newest until it is done or another takes its place.

        Afterwards `done` tells whether these were the last.
        """
        offset, reading, rest = place.offset, wrap(place.file), b""
        stop = self._stop(place)
        place.file.seek(offset)
        while stop is None or offset < stop:
            self.look()
            replaced = place.newest and self._follow and _replaced(self._path, place.file.fileno())
            chunk = await reading.read(CHUNK_BYTES)
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            if records := self._wanted(lines):
                self.seq = records[-1].seq
                yield records
            offset += sum(map(len, lines)) + len(lines)
            if len(chunk) == CHUNK_BYTES:
                continue
            # A half line at the end may be cut off by a pump that takes over: it is read anew.
            rest = b""
            place.file.seek(offset)
            if lines:
                continue
            if replaced or not place.newest:
                self.done = False
                return
            if self.done:
                return
            await self.more()

    def _wanted(self, lines: list[bytes]) -> list[LogRecord]:
        if self._run_ids is not None:
            marks = [run_mark(run_id) for run_id in self._run_ids]
            lines = [line for line in lines if any(mark in line for mark in marks)]
        load, seq = self._load, self.seq
        records = [record for line in lines if (record := parse_record(line, load)).seq > seq]
        if self.since is not None and records:
            since = self.since
            records = list(dropwhile(lambda record: record.ts < since, records))
            if records:
                self.since = None
        return records

    def _stop(self, place: Place) -> int | None:
        """Where in a file to stop: a log that grows as fast as it is read has an end for those who do not follow."""
        if self._follow:
            return None
        if self._end is None:
            self._end = place.end
        number, size = self._end
        if place.number < number:
            return None
        return size if place.number == number else 0


def _replaced(path: str, fd: int) -> bool:
    """Whether another file has the log's name now. If none has it, somebody has taken the file away."""
    try:
        return not os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False
