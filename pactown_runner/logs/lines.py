"""Lines of a file, found without reading all of it. Blocking; the file's own position is neither used nor moved."""

from __future__ import annotations

import os

__all__ = ["BLOCK_BYTES", "after_newline", "first_line", "last_line", "line_after", "line_at"]

BLOCK_BYTES = 1 << 16
"""Read at once."""


def after_newline(fd: int, end: int) -> int:
    """The offset behind the last newline before offset `end`; 0 if there is none."""
    while end > 0:
        begin = max(0, end - BLOCK_BYTES)
        found = os.pread(fd, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def line_after(fd: int, offset: int, end: int) -> int | None:
    """Where the first line after `offset` begins, if before `end`."""
    while offset < end:
        block = os.pread(fd, min(BLOCK_BYTES, end - offset), offset)
        found = block.find(b"\n")
        if found >= 0:
            return offset + found + 1 if offset + found + 1 < end else None
        if not block:
            break
        offset += len(block)
    return None


def line_at(fd: int, offset: int, end: int) -> bytes | None:
    """The line at `offset` without its newline, or None if it is not whole before `end`."""
    parts: list[bytes] = []
    while offset < end and (block := os.pread(fd, min(BLOCK_BYTES, end - offset), offset)):
        found = block.find(b"\n")
        if found >= 0:
            parts.append(block[:found])
            return b"".join(parts)
        parts.append(block)
        offset += len(block)
    return None


def first_line(fd: int) -> bytes | None:
    """The file's first line without its newline, or None if it has no whole one."""
    return line_at(fd, 0, os.fstat(fd).st_size)


def last_line(fd: int) -> bytes | None:
    """The file's last whole line without its newline, or None; what a crash tore behind it is left out."""
    end = after_newline(fd, os.fstat(fd).st_size)
    if not end:
        return None
    begin = after_newline(fd, end - 1)
    return os.pread(fd, end - 1 - begin, begin)
