"""Finding a place in a log without reading all of it. Blocking: for a worker thread."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from io import FileIO
from typing import Any, NamedTuple

from .errors import LogError
from .files import head_of, number_of, numbers, same_file
from .lines import BLOCK_BYTES, line_after, line_at
from .paths import put_aside
from .records import Head, loader

__all__ = ["Place", "Wanted", "find"]


class Wanted(NamedTuple):
    """Which records of a log are wanted.

    Attributes:
        seq: those with a higher number.
        since: those from this time on, in seconds since the epoch; None for all.
        tail: the last so many at most; None for all.
        behind: nothing of files with this number or a lower one, which have been read.
    """

    seq: int = 0
    since: float | None = None
    tail: int | None = None
    behind: int = 0


class Place(NamedTuple):
    """A place in a log.

    Attributes:
        file: the file that it is in, open.
        number: the file's.
        offset: in the file; a line begins here.
        newest: whether the file may still grow.
        end: the number of the newest file, and its size now.
    """

    file: FileIO
    number: int
    offset: int
    newest: bool
    end: tuple[int, int]


class _File(NamedTuple):
    """A file of a log, open. `head` is None while there is no whole line in it."""

    file: FileIO
    number: int
    head: Head | None
    newest: bool
    size: int

    @property
    def fd(self) -> int:
        return self.file.fileno()

    @property
    def begin(self) -> int:
        return self.head.length if self.head is not None else 0


def find(path: str, wanted: Wanted) -> Place | None:
    """The first place in a log behind which there is all that is wanted; None if the log has no more files.

    It may be a little before what is wanted.

    Raises:
        LogError: a line that was looked at is no record.
    """
    with ExitStack() as stack:
        files = _open(path, wanted.behind, stack)
        if not files:
            return None
        begin = max(_of_seq(files, wanted.seq), _of_time(files, wanted.since), _of_tail(files, wanted.tail))
        chosen, newest = files[begin[0]], files[-1]
        stack.pop_all()
        for file in files:
            if file is not chosen:
                file.file.close()
        end = (newest.number, newest.size)
        return Place(chosen.file, chosen.number, begin[1], chosen.newest, end)


def _open(path: str, behind: int, stack: ExitStack) -> list[_File]:
    """The files of a log, oldest first."""
    # The newest first: what is put aside meanwhile is seen twice, but none is missed.
    newest = _opened(path, stack)
    files = []
    for number in numbers(path):
        aside = f"{put_aside(path)}.{number}"
        if number <= behind or (newest is not None and same_file(aside, newest.fileno())):
            continue
        file = _opened(aside, stack)
        if file is not None:
            fd = file.fileno()
            files.append(_File(file, number, head_of(fd), newest=False, size=os.fstat(fd).st_size))
    if newest is not None:
        fd = newest.fileno()
        size = os.fstat(fd).st_size
        head = head_of(fd)
        files.append(_File(newest, number_of(path, fd, head or Head()), head, newest=True, size=size))
    return files


def _opened(path: str, stack: ExitStack) -> FileIO | None:
    try:
        return stack.enter_context(FileIO(path))
    except FileNotFoundError:
        return None  # it has not begun, or was dropped


_Begin = tuple[int, int]
"""Which file, and where in it."""


def _of_seq(files: list[_File], seq: int) -> _Begin:
    index = _last(files, lambda head: head.seq <= seq)
    file = files[index]
    return index, _first(file, lambda fields: fields["seq"] > seq) if seq else file.begin


def _of_time(files: list[_File], since: float | None) -> _Begin:
    if since is None:
        return 0, files[0].begin
    index = _last(files, lambda head: head.ts < since)
    return index, _first(files[index], lambda fields: fields["ts"] >= since)


def _of_tail(files: list[_File], tail: int | None) -> _Begin:
    if tail is None:
        return 0, files[0].begin
    missing = tail
    for index in range(len(files) - 1, -1, -1):
        begin, missing = _tail(files[index], missing)
        if not missing:
            return index, begin
    return 0, files[0].begin


def _last(files: list[_File], before: Callable[[Head], bool]) -> int:
    """The last file that begins before what is wanted; the oldest if none does."""
    for index in range(len(files) - 1, 0, -1):
        head = files[index].head
        if head is not None and before(head):
            return index
    return 0


def _tail(file: _File, count: int) -> tuple[int, int]:
    """The offset of the last `count` whole lines of a file, and how many of them are missing."""
    missing = count + 1
    end = file.size
    while end > file.begin:
        begin = max(file.begin, end - BLOCK_BYTES)
        block = os.pread(file.fd, end - begin, begin)
        newlines = block.count(b"\n")
        if newlines >= missing:
            at = len(block)
            for _ in range(missing):
                at = block.rfind(b"\n", 0, at)
            return begin + at + 1, 0
        missing -= newlines
        end = begin
    return file.begin, missing - 1


def _first(file: _File, wanted: Callable[[dict[str, Any]], bool]) -> int:
    """An offset of a line at or before the first that is wanted: all behind it are, so halve the file."""
    load = loader()
    low, high = file.begin, file.size
    while high - low > BLOCK_BYTES:
        middle = (low + high) // 2
        begin = line_after(file.fd, middle, high)
        line = line_at(file.fd, begin, high) if begin is not None else None
        if begin is None or line is None or _is_wanted(line, load, wanted):
            high = middle
        else:
            low = begin
    return low


def _is_wanted(line: bytes, load: Callable[[bytes], Any], wanted: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return wanted(load(line))
    except (ValueError, KeyError, TypeError) as error:
        raise LogError(f"not a log record: {line[:80]!r}") from error
