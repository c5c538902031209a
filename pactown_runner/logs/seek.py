"""Finding a place in a log without reading all of it. Blocking: for a worker thread."""

from __future__ import annotations

import os

from .records import loader, parse_record

__all__ = ["places"]

_BLOCK = 1 << 16


def places(fds: list[int], since_seq: int, tail: int | None) -> list[int]:
    """Where to begin in each file of a log, oldest first, to miss no record that is wanted.

    Raises:
        LogError: a line that was looked at is no record.
    """
    found: list[int] = []
    for fd in reversed(fds):
        size = os.fstat(fd).st_size
        place = _after_seq(fd, size, since_seq) if since_seq > 0 else 0
        if tail is not None:
            begin, tail = _tail(fd, size, tail)
            place = max(place, begin)
        found.insert(0, place)
    return found


def _tail(fd: int, size: int, count: int) -> tuple[int, int]:
    """The offset of the last `count` whole lines, and how many of them are missing."""
    missing = count + 1
    end = size
    while end > 0:
        begin = max(0, end - _BLOCK)
        block = os.pread(fd, end - begin, begin)
        newlines = block.count(b"\n")
        if newlines >= missing:
            at = len(block)
            for _ in range(missing):
                at = block.rfind(b"\n", 0, at)
            return begin + at + 1, 0
        missing -= newlines
        end = begin
    return 0, missing - 1


def _after_seq(fd: int, size: int, seq: int) -> int:
    """An offset of a line at or before the first with a higher number: numbers rise, so halve the file."""
    load = loader()
    low, high = 0, size
    while high - low > _BLOCK:
        middle = (low + high) // 2
        begin = _line_after(fd, middle, high)
        line = _line_at(fd, begin, high) if begin is not None else None
        if begin is None or line is None or parse_record(line, load).seq > seq:
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
    while offset < end and (block := os.pread(fd, min(_BLOCK, end - offset), offset)):
        found = block.find(b"\n")
        if found >= 0:
            parts.append(block[:found])
            return b"".join(parts)
        parts.append(block)
        offset += len(block)
    return None
