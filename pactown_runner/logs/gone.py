"""What is left of logs that were dropped whole: where each of them ended, so that its numbers go on.

A line for each, some 30 bytes, at the end of one of a few files of the tenant's. Of a log that was dropped more than
once the last line holds. Nothing is ever taken out, nor locked: the line is there before the log goes, and nobody asks
for it as long as there is a log.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from .paths import LogPaths
from .spool import in_blocks

__all__ = ["End", "recall", "remember"]

_FILES = 16
"""Who begins a log reads one of these: of a hundred thousand that were dropped, 200 KiB."""


class End(NamedTuple):
    """Where a log ended.

    Attributes:
        seq: of its last record.
        number: that the file has with which it goes on.
    """

    seq: int
    number: int


def remember(paths: LogPaths, service_id: str, end: End) -> int:
    """Write down where the log of a service ends that will be dropped now. Returns the bytes of disk that this takes.

    Raises:
        OSError: that cannot be done.
    """
    file = _file(paths, service_id)
    # Behind a newline of its own: a full disk may have torn the line before.
    line = f"\n{service_id} {end.seq} {end.number}\n".encode()
    # Without what is above: a tenant that is being deleted is not to come back.
    with suppress(FileExistsError):
        os.mkdir(paths.gone_dir, 0o700)
    fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        before = os.fstat(fd).st_size
        if os.write(fd, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file)
        return in_blocks(before + len(line)) - in_blocks(before)
    finally:
        os.close(fd)


def recall(paths: LogPaths, service_id: str) -> End | None:
    """Where the log of a service ended when it was dropped; None if it never was.

    Raises:
        OSError: it cannot be read.
    """
    try:
        lines = Path(_file(paths, service_id)).read_bytes()
    except FileNotFoundError:
        return None
    name = f"\n{service_id} ".encode()
    begin = lines.rfind(name)
    if begin < 0:
        return None
    numbers = lines[begin + len(name) : lines.find(b"\n", begin + 1)].split()
    # Of a line that is torn the log was not dropped.
    return End(*map(int, numbers)) if len(numbers) == 2 and all(map(bytes.isdigit, numbers)) else None


def _file(paths: LogPaths, service_id: str) -> str:
    return f"{paths.gone_dir}/{crc32(service_id.encode()) % _FILES:x}"
