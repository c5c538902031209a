"""The log file of one service, as its one writer sees it."""

from __future__ import annotations

import os
from contextlib import suppress

from .errors import LogError
from .files import (
    FLAGS,
    begin_anew,
    ends_of,
    give_up,
    head_of,
    numbers,
    open_newest,
    position_of,
    successor_mark,
    taken,
)
from .gone import recall
from .lines import after_newline
from .paths import put_aside
from .records import Ends, Head, Position
from .spool import in_blocks
from .tenant import TenantLogs

__all__ = ["Journal"]


class Journal:
    """An append-only file of JSON lines. One write a batch; what is left of a batch goes first.

    Args:
        tenant: whose log it is; its limits say when the file is put aside and a new one begun. Numbers go on, so the
            first record that is still there tells how many were dropped.
        service_id: whose, within the tenant.
    """

    __slots__ = ("_due", "_ends", "_fd", "_rest", "_run_id", "_service_id", "_size", "_tenant", "path")

    def __init__(self, tenant: TenantLogs, service_id: str) -> None:
        self.path = tenant.paths.log(service_id)
        self._service_id = service_id
        self._tenant = tenant
        self._run_id = ""
        self._ends: Ends = (0, 0)
        self._fd = -1
        self._size = 0
        self._rest = b""
        self._due = False

    def open(self, run_id: str, *, resumed: bool) -> tuple[int, Ends]:
        """Open the log, made if it is missing, and cut off a last line that a crash tore.

        Args:
            run_id: the run that will be written.
            resumed: whether the log may hold records of it already.

        Returns:
            The number of the last record, and how much of the run's two streams is in the log.

        Raises:
            OSError: it cannot be made, opened or read.
            LogError: its first or last line is no record, or another process keeps it locked.
        """
        self._fd = open_newest(self.path)
        try:
            last = _recover(self._fd, self.path)
            if not last.seq:
                self._tenant.count_file()
                last = self._look_back()
            if last.run_id == run_id:
                self._ends = last.ends
            elif resumed and (ends := ends_of(self._fd, head_of(self._fd) or Head(), run_id)) is not None:
                self._ends = ends
            self._run_id = run_id
            self._size = os.fstat(self._fd).st_size
        except BaseException:
            self.close()
            raise
        self._tenant.journals[self.path] = self
        return last.seq, self._ends

    def _look_back(self) -> Position:
        """Go on after the last file that was put aside, or where a log ended that was dropped whole."""
        if aside := numbers(self.path):
            # Somebody has taken the newest one away.
            previous = f"{put_aside(self.path)}.{aside[-1]}"
            fd = os.open(previous, FLAGS)
            try:
                last = _recover(fd, previous)
                mark, _ = successor_mark(self._tenant.paths, self._service_id, fd, last, {})
            finally:
                os.close(fd)
        elif ended := recall(self._tenant.paths, self._service_id):
            last = Position(service_id=self._service_id, seq=ended.seq)
            mark = last.mark(ended.number, {})
        else:
            return Position()
        self._replace(mark, aside=None)
        return last

    def write(self, batch: bytes) -> None:
        """Append whole lines.

        Raises:
            OSError: the disk is full or broken. The batch is kept: `flush` goes on where this write stopped.
        """
        if not self._rest:
            self._tenant.make_room(in_blocks(self._size + len(batch)) - in_blocks(self._size))
            self._due = self._size >= self._tenant.limits.rotate_bytes
        self._rest += batch
        self.flush()

    def flush(self) -> None:
        """Write what a failed `write` left.

        Raises:
            OSError, LogError: as `write`.
        """
        if self._due and self._rest:
            self._put_aside()
        while self._rest:
            count = os.write(self._fd, self._rest)
            self._rest = self._rest[count:]
            self._size += count

    def restart(self) -> int:
        """Drop all that the newest file holds, and begin another; returns how many bytes that freed.

        Raises:
            OSError, LogError: that cannot be done; nothing is dropped.
        """
        if self._rest or not (last := position_of(self._fd)).seq:
            return 0
        before = taken(self._fd)
        mark, _ = self._mark(last)
        self._replace(mark, aside=None)
        return before - taken(self._fd)

    def _put_aside(self) -> None:
        keep = self._tenant.limits.keep
        last = position_of(self._fd)
        mark, number = self._mark(last)
        aside = [other for other in numbers(self.path) if other < number]
        # First, for a disk may be full. Those that are kept are one less with the one that comes.
        for other in aside[: max(0, len(aside) + 1 - keep)]:
            with suppress(FileNotFoundError):
                os.unlink(f"{put_aside(self.path)}.{other}")
        self._replace(mark, aside=number if keep else None)
        self._due = False

    def _mark(self, last: Position) -> tuple[bytes, int]:
        # What this run has in the log is known: unless the last record is its own, there is nothing since `open`.
        known = {self._run_id: self._ends}
        return successor_mark(self._tenant.paths, self._service_id, self._fd, last, known)

    def _replace(self, mark: bytes, aside: int | None) -> None:
        fd = begin_anew(self.path, mark, aside)
        self._tenant.count_file()
        give_up(self._fd)
        self._fd = fd
        self._size = len(mark)

    def close(self) -> None:
        """Close it. What was not written is dropped: the spool has it, behind the last whole record."""
        self._rest = b""
        self._due = False
        if self._fd >= 0:
            if self._tenant.journals.get(self.path) is self:
                del self._tenant.journals[self.path]
            give_up(self._fd)
            self._fd = -1


def _recover(fd: int, path: str) -> Position:
    size = os.fstat(fd).st_size
    end = after_newline(fd, size)
    if end != size:
        os.ftruncate(fd, end)
    try:
        return position_of(fd)
    except LogError as error:
        raise LogError(f"cannot go on with {path}: {error.message}", remedy=error.remedy) from error
