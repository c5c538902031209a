"""The log file of one service, as its one writer sees it."""

from __future__ import annotations

import os

from .errors import LogError
from .paths import private_directory
from .records import Position, parse_position, run_mark

__all__ = ["PREVIOUS", "Journal"]

PREVIOUS = ".1"
"""Follows the name of a log that is full."""

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
_STEP = 1 << 16


class Journal:
    """An append-only file of JSON lines. One write a batch; what is left of a batch goes first.

    Args:
        path: the log. At half the cap it becomes `path` with `PREVIOUS`, in place of the one before, and a new one is
            begun. Numbers go on, so the first record that is still there tells how many were dropped.
        cap: the most bytes that both take, but for one batch; None for no end.
    """

    __slots__ = ("_cap", "_fd", "_rest", "_size", "path")

    def __init__(self, path: str, cap: int | None) -> None:
        self.path = path
        self._cap = cap
        self._fd = -1
        self._size = 0
        self._rest = b""

    def open(self, run_id: str, *, resumed: bool) -> tuple[int, tuple[int, int]]:
        """Open the log, made if it is missing, and cut off a last line that a crash tore.

        Args:
            run_id: the run that will be written.
            resumed: whether the log may hold records of it already.

        Returns:
            The number of the last record, and how much of the run's two streams is in the log.

        Raises:
            OSError: it cannot be made, opened or read.
            LogError: its last line is no record.
        """
        try:
            self._fd = os.open(self.path, _FLAGS | os.O_CREAT, 0o600)
        except FileNotFoundError:
            private_directory(os.path.dirname(self.path))
            self._fd = os.open(self.path, _FLAGS | os.O_CREAT, 0o600)
        try:
            last = _recover(self._fd, self.path)
            self._size = os.fstat(self._fd).st_size
            ends = last.ends if last.run_id == run_id else None
            if resumed and last.seq and ends is None:
                ends = _last_of(self._fd, run_id)
            if not last.seq or (resumed and ends is None):
                last, ends = self._look_back(last, run_id)
        except BaseException:
            self.close()
            raise
        return last.seq, ends or (0, 0)

    def _look_back(self, last: Position, run_id: str) -> tuple[Position, tuple[int, int] | None]:
        try:
            fd = os.open(self.path + PREVIOUS, _FLAGS)
        except FileNotFoundError:
            return last, None
        try:
            earlier = _recover(fd, self.path + PREVIOUS)
            return last if last.seq else earlier, _last_of(fd, run_id)
        finally:
            os.close(fd)

    def write(self, batch: bytes) -> None:
        """Append whole lines.

        Raises:
            OSError: the disk is full or broken. The batch is kept: `flush` goes on where this write stopped.
        """
        full = not self._rest and self._cap is not None and self._size >= self._cap // 2
        self._rest += batch
        if full:
            os.rename(self.path, self.path + PREVIOUS)
            os.close(self._fd)
            self._fd = -1
        self.flush()

    def flush(self) -> None:
        """Write what a failed `write` left.

        Raises:
            OSError: as `write`.
        """
        if self._rest and self._fd < 0:
            self._fd = os.open(self.path, _FLAGS | os.O_CREAT, 0o600)
            self._size = 0
        while self._rest:
            count = os.write(self._fd, self._rest)
            self._rest = self._rest[count:]
            self._size += count

    def close(self) -> None:
        """Close it. What was not written is dropped: the spool has it, behind the last whole record."""
        self._rest = b""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _recover(fd: int, path: str) -> Position:
    size = os.fstat(fd).st_size
    end = _after_newline(fd, size)
    if end != size:
        os.ftruncate(fd, end)
    if end == 0:
        return Position()
    begin = _after_newline(fd, end - 1)
    try:
        return parse_position(os.pread(fd, end - begin, begin))
    except LogError as error:
        raise LogError(f"cannot go on with {path}: {error.message}", remedy=error.remedy) from error


def _after_newline(fd: int, end: int) -> int:
    """The offset behind the last newline before offset `end`; 0 if there is none."""
    while end > 0:
        begin = max(0, end - _STEP)
        found = os.pread(fd, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _last_of(fd: int, run_id: str) -> tuple[int, int] | None:
    """How much of a run's streams is in the log, though others may have written since; None if nothing."""
    mark = run_mark(run_id)
    end = os.fstat(fd).st_size
    while end > 0:
        begin = max(0, end - _STEP)
        found = os.pread(fd, end - begin + len(mark), begin).rfind(mark)
        if found >= 0:
            first = _after_newline(fd, begin + found)
            return parse_position(_line(fd, first)).ends
        end = begin
    return None


def _line(fd: int, offset: int) -> bytes:
    line = b""
    while b"\n" not in line[-_STEP:] and (block := os.pread(fd, _STEP, offset + len(line))):
        line += block
    return line[: line.find(b"\n") + 1]
