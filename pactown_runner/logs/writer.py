"""From a run's two streams to its service's log: the spools, what is dropped on the way, and the records."""

from __future__ import annotations

import time

from .fifo import waiting
from .journal import Journal
from .paths import STREAMS, LogPaths
from .records import PIECE_BYTES, Piece, record_logger, split
from .spool import BLOCK_BYTES, Spool
from .tenant import TenantLogs

__all__ = ["READ_BYTES", "Writer"]

READ_BYTES = 1 << 17
"""The most that one turn renders of a stream. More than a piece, or a long line would never be cut."""
TURN_RECORDS = 256
"""The most records that one turn renders of a stream, about 2 ms of work for both."""
DROPPED_BYTES = 1 << 20
"""So much of a stream is dropped at most before its count is written down: until then the spool keeps it all."""


class Writer:
    """Writes down one run. A log has one writer at a time.

    What is dropped stays in the spool until a record with its count is in the log, so that a successor of a writer that
    is killed counts it anew.

    Args:
        paths, user_id, service_id, run_id: of the run.
        tenant: what its pumps share.

    Attributes:
        seq: the number of the last record that was rendered; it may still be on its way to a full disk.
    """

    __slots__ = ("_dropped", "_ends", "_journal", "_logger", "_names", "_note", "_rate", "_spools", "_tenant", "seq")

    def __init__(self, paths: LogPaths, user_id: str, service_id: str, run_id: str, tenant: TenantLogs) -> None:
        out, err = paths.spools(service_id, run_id)
        self._spools = (Spool(out), Spool(err))
        self._tenant = tenant
        self._journal = Journal(tenant, service_id)
        self._logger = record_logger(user_id, service_id, run_id)
        self._names = (user_id, service_id, run_id)
        self._note = tenant.note
        self._rate = tenant.rate if tenant.rate is not None and tenant.rate.drops else None
        self._ends = [0, 0]
        # Lines and bytes of each stream behind its end in the log.
        self._dropped = ([0, 0], [0, 0])
        self.seq = 0

    def open(self, run_id: str, *, resumed: bool) -> None:
        """Open log and spools, see `Journal.open`.

        Raises:
            OSError, LogError: one cannot be opened; then none is.
        """
        try:
            self.seq, ends = self._journal.open(run_id, resumed=resumed)
            for spool, end in zip(self._spools, ends, strict=True):
                spool.open(end)
        except BaseException:
            self.close()
            raise
        self._ends = list(ends)

    def close(self) -> None:
        """Close all. What is not in the log is left to a successor."""
        self._journal.close()
        for spool in self._spools:
            spool.close()

    def remove_spools(self) -> None:
        """Remove the spools, all of which is in the log."""
        for spool in self._spools:
            spool.remove()
            self._tenant.give_room(spool.room)

    # ---- A stream

    def take(self, index: int, fifo_fd: int, limit: int) -> int:
        """Move up to `limit` bytes from a stream's FIFO to its spool; 0 if none wait.

        Raises:
            OSError: see `Spool.take`.
        """
        spool, tenant = self._spools[index], self._tenant
        if tenant.is_tight(limit + BLOCK_BYTES):
            # A look costs more than to ask how much there is.
            limit = min(limit, waiting(fifo_fd))
        if not limit:
            return 0
        before = spool.room
        tenant.make_room(limit + BLOCK_BYTES)
        try:
            return spool.take(fifo_fd, limit)
        finally:
            tenant.give_room(limit + BLOCK_BYTES - (spool.room - before))

    def backlog(self, index: int) -> int:
        """A stream's bytes that are in the spool and neither in the log nor dropped."""
        return self._spools[index].size - self._place(index)

    def render(self, index: int, *, at_end: bool = False) -> bool:
        """Write down some records of a stream; True if there may be more to write now.

        Args:
            index: the stream's.
            at_end: nothing will be taken any more, so that a line without newline is whole.

        Raises:
            OSError, LogError: they could not be written; the journal keeps them for `flush`.
        """
        place = self._place(index)
        data = self._spools[index].read(place, READ_BYTES)
        if not data:
            return False
        at_end = at_end and place + len(data) == self._spools[index].size
        if self._rate is not None and self._rate.dropping():
            return self._drop(index, data, at_end=at_end)
        pieces = split(data, TURN_RECORDS, at_end=at_end)
        more = len(data) == READ_BYTES or len(pieces) >= TURN_RECORDS
        if self._rate is not None:
            whole = len(pieces)
            pieces = pieces[: _within(pieces, self._rate.left())]
            more = more or len(pieces) < whole
        if pieces:
            self._write(index, pieces)
        return more

    def _place(self, index: int) -> int:
        return self._ends[index] + self._dropped[index][1]

    def _write(self, index: int, pieces: list[Piece]) -> None:
        batch = self._count(index)
        before = self._ends[index]
        batch += self._logger.render(
            pieces, ts=time.time(), seq=self.seq, stream=STREAMS[index], ends=self._ends, index=index
        )
        self.seq += len(pieces)
        if self._note is not None:
            lines = sum(not partial for _, _, partial in pieces)
            self._note("logged", *self._names, lines=lines, bytes=self._ends[index] - before)
        if self._rate is not None:
            self._rate.spend(self._ends[index] - before)
        self._append(batch)

    def _append(self, batch: list[bytes]) -> None:
        self._journal.write(b"".join(batch))
        for spool, end in zip(self._spools, self._ends, strict=True):
            before = spool.room
            spool.give_back(end)
            self._tenant.give_room(before - spool.room)

    def flush(self) -> None:
        """Write what a full disk kept from being written.

        Raises:
            OSError, LogError: it still does.
        """
        self._journal.flush()

    # ---- What is dropped

    @property
    def dropped(self) -> bool:
        """Whether lines have been dropped whose count is not in the log yet."""
        return any(length for _, length in self._dropped)

    def count_dropped(self) -> None:
        """Write down what has been dropped.

        Raises:
            OSError, LogError: as `render`.
        """
        batch = self._count(0) + self._count(1)
        if batch:
            self._append(batch)

    def _count(self, index: int) -> list[bytes]:
        lines, length = self._dropped[index]
        if not length:
            return []
        self.seq += 1
        self._dropped[index][:] = (0, 0)
        if self._note is not None:
            self._note("logged", *self._names, dropped_lines=lines, dropped_bytes=length)
        return [
            self._logger.count_dropped(
                lines, length, ts=time.time(), seq=self.seq, stream=STREAMS[index], ends=self._ends, index=index
            )
        ]

    def _drop(self, index: int, data: bytes, *, at_end: bool) -> bool:
        """Drop the whole lines of `data`; as in `render`, a line that is longer is cut."""
        dropped, length = self._dropped[index], data.rfind(b"\n") + 1
        more = len(data) == READ_BYTES
        if at_end:
            length = len(data)
        elif not length and more:
            length = sum(piece[1] for piece in split(data, 1, at_end=False))
        dropped[0] += data.count(b"\n", 0, length) + (at_end and not data.endswith(b"\n"))
        dropped[1] += length
        if dropped[1] >= DROPPED_BYTES:
            self.count_dropped()
        return more


def _within(pieces: list[Piece], left: int) -> int:
    """How many of the pieces may be written: the last one may take more than is left, or a long one never could."""
    if len(pieces) * (PIECE_BYTES + 1) <= left:
        return len(pieces)
    for number, (_, length, _) in enumerate(pieces):
        if left <= 0:
            return number
        left -= length
    return len(pieces)
