"""Reading a log: from any point, any number of times, while it is being written.

Each reader has its own place in the files, so a slow one holds up nobody. A reader in the writer's process waits for
the `LogFeed`; one elsewhere looks again after `poll` seconds.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import ExitStack, suppress
from io import FileIO

from aiofiles.threadpool import wrap

from ..models import LogRecord
from .feed import LogFeed
from .journal import PREVIOUS
from .records import loader, parse_record, run_mark
from .seek import places

__all__ = ["POLL_SECONDS", "read_log"]

CHUNK_BYTES = 1 << 16
"""Read and parsed at once: about 1 ms of the loop."""
POLL_SECONDS = 0.2
"""Between two looks of a reader that follows without a feed."""


async def read_log(
    path: str,
    *,
    follow: bool = False,
    since_seq: int = 0,
    tail: int | None = None,
    run_ids: Collection[str] | None = None,
    feed: LogFeed | None = None,
    ended: Callable[[], bool] | None = None,
    poll: float = POLL_SECONDS,
) -> AsyncGenerator[LogRecord, None]:
    """The records of a log, in order. A log that does not exist has none yet.

    A number that is more than one higher than the one before tells how many records the log's cap dropped.

    Args:
        path: the log file.
        follow: wait for more at the end, until the feed is closed or `ended` says so and all has been read.
        since_seq: leave out the records up to this number.
        tail: begin with the last so many records at most.
        run_ids: leave out the records of other runs; looked at anew at each read, so that runs may join.
        feed: the writing pump's, if it is in this process and loop.
        ended: asked by a reader without feed, before each read: whether no more can come.
        poll: seconds between two looks, without a feed.

    Raises:
        LogError: a whole line of the file is no record.
    """
    cursor = _Cursor(path=path, follow=follow, seq=since_seq, run_ids=run_ids, feed=feed, ended=ended, poll=poll)
    while True:
        cursor.look()
        with ExitStack() as stack:
            files = [stack.enter_context(file) for file in _open(path)]
            begins = await asyncio.to_thread(places, [file.fileno() for file in files], cursor.seq, tail)
            for file, begin in zip(files, begins, strict=True):
                async for records in cursor.read(file, begin, newest=file is files[-1]):
                    for record in records:
                        yield record
            if cursor.done:
                return
            if not files:
                await cursor.more()
        tail = None


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
        self.done = False
        self._path = path
        self._follow = follow
        self._feed = feed
        self._ended = ended
        self._poll = poll
        self._version = 0
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

    async def read(self, file: FileIO, place: int, *, newest: bool) -> AsyncGenerator[list[LogRecord], None]:
        """The records of one file from `place` on; of the newest until it is done or another takes its place."""
        # A log that grows as fast as it is read has an end for those who do not follow.
        stop = os.fstat(file.fileno()).st_size if newest and not self._follow else None
        reading, rest = wrap(file), b""
        file.seek(place)
        while stop is None or place < stop:
            self.look()
            replaced = newest and self._follow and _replaced(self._path, file)
            chunk = await reading.read(CHUNK_BYTES)
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            load, seq = self._load, self.seq
            records = [record for line in self._wanted(lines) if (record := parse_record(line, load)).seq > seq]
            if records:
                self.seq = records[-1].seq
                yield records
            place += sum(map(len, lines)) + len(lines)
            if len(chunk) == CHUNK_BYTES:
                continue
            # A half line at the end may be cut off by a pump that takes over: it is read anew.
            rest = b""
            file.seek(place)
            if lines:
                continue
            if replaced:
                self.done = False
            if not newest or replaced or self.done:
                return
            await self.more()

    def _wanted(self, lines: list[bytes]) -> list[bytes]:
        if self._run_ids is None:
            return lines
        marks = [run_mark(run_id) for run_id in self._run_ids]
        return [line for line in lines if any(mark in line for mark in marks)]


def _open(path: str) -> list[FileIO]:
    """The files of a log, oldest first."""
    while True:
        with ExitStack() as stack:
            files: list[FileIO] = []
            # The newer first: what becomes the older one between the two is opened twice, but nothing is missed.
            for name in (path, path + PREVIOUS):
                with suppress(FileNotFoundError):
                    files.insert(0, stack.enter_context(FileIO(name)))
            newest = files[-1] if files else None
            if newest is None or newest.name != path or not _replaced(path, newest):
                stack.pop_all()
                return files


def _replaced(path: str, file: FileIO) -> bool:
    """Whether another file has the log's name now. While none has it, the next one is about to come."""
    try:
        return not os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
