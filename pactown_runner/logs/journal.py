"""The log file of one service, as its one writer sees it."""

from __future__ import annotations

import json
import os

from .errors import LogError
from .paths import private_directory
from .records import Position, parse_position

__all__ = ["Journal"]

_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
_STEP = 1 << 16


class Journal:
    """An append-only file of JSON lines. One write a batch; what is left of a batch goes first."""

    __slots__ = ("_fd", "_rest", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        self._rest = b""

    @property
    def is_open(self) -> bool:
        """Whether it is open."""
        return self._fd >= 0

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
            fd = os.open(self.path, _FLAGS | os.O_CREAT, 0o600)
        except FileNotFoundError:
            private_directory(os.path.dirname(self.path))
            fd = os.open(self.path, _FLAGS | os.O_CREAT, 0o600)
        try:
            last = _recover(fd, self.path)
            ends = last.ends if last.run_id == run_id else (0, 0)
            if resumed and last.seq and last.run_id != run_id:
                ends = _last_of(fd, run_id)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return last.seq, ends

    def write(self, batch: bytes) -> None:
        """Append whole lines.

        Raises:
            OSError: the disk is full or broken. The batch is kept: `flush` goes on where this write stopped.
        """
        self._rest += batch
        self.flush()

    def flush(self) -> None:
        """Write what a failed `write` left.

        Raises:
            OSError: as `write`.
        """
        while self._rest:
            self._rest = self._rest[os.write(self._fd, self._rest) :]

    def close(self) -> None:
        """Close it. What was not written is dropped: the spool has it, behind the last whole record."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._rest = b""


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


def _last_of(fd: int, run_id: str) -> tuple[int, int]:
    """How much of an earlier run's streams is in the log. Other runs of the service have written since."""
    # The very bytes: inside a JSON string each quotation mark has a backslash before it.
    mark = b'"run":' + json.dumps(run_id, ensure_ascii=False).encode() + b","
    end = os.fstat(fd).st_size
    while end > 0:
        begin = max(0, end - _STEP)
        found = os.pread(fd, end - begin + len(mark), begin).rfind(mark)
        if found >= 0:
            first = _after_newline(fd, begin + found)
            return parse_position(_line(fd, first)).ends
        end = begin
    return 0, 0


def _line(fd: int, offset: int) -> bytes:
    line = b""
    while b"\n" not in line[-_STEP:] and (block := os.pread(fd, _STEP, offset + len(line))):
        line += block
    return line[: line.find(b"\n") + 1]
