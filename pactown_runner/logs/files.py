"""The files of one service's log: the newest, which bears the log's name, and those that were put aside.

    .aside/api.jsonl.1 < .aside/api.jsonl.2 < ... < api.jsonl

Numbers only grow, so a name means one file, also while somebody else puts one aside or drops one. The newest file is
always there once the log has begun: the next one is made beside it, with a mark in it (`records`), and takes its place
in one step. Who is killed in between leaves a file `.new`, which the next one overwrites, or one file of two names.

The pump that writes to the newest file holds a shared `flock(2)` on it; who drops one that nobody writes to takes an
exclusive one first. The lock is given back before a descriptor is closed, because a child that the embedding process
has forked may hold a copy of it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from contextlib import suppress

from .errors import LogError
from .gone import End, remember
from .lines import BLOCK_BYTES as READ_BYTES
from .lines import after_newline, first_line, last_line, line_at
from .paths import LogPaths, private_directory, put_aside
from .records import Ends, Head, Position, parse_head, parse_position, run_mark
from .spool import BLOCK_BYTES

__all__ = [
    "FLAGS",
    "begin_anew",
    "drop_idle",
    "ends_of",
    "give_up",
    "head_of",
    "number_of",
    "numbers",
    "open_newest",
    "position_of",
    "same_file",
    "successor_mark",
    "taken",
]

FLAGS = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
_TRIES = 50
"""So many milliseconds at most: the exclusive lock is held for a few file operations."""


def numbers(path: str) -> list[int]:
    """The numbers of the files of a log that were put aside, oldest first."""
    directory, name = os.path.split(put_aside(path))
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    prefix = name + "."
    endings = (other.removeprefix(prefix) for other in names if other.startswith(prefix))
    return sorted(int(ending) for ending in endings if ending.isascii() and ending.isdecimal())


def same_file(path: str, fd: int) -> bool:
    """Whether `path` is the file that is open as `fd`."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


# ---- The newest file


def open_newest(path: str) -> int:
    """Open a log's newest file for its one writer, made if it is missing, as is its directory.

    Raises:
        OSError: it cannot be made or opened.
        LogError: somebody else holds it locked, as only a process that was stopped can do for long.
    """
    for _ in range(_TRIES):
        try:
            fd = os.open(path, FLAGS | os.O_CREAT, 0o600)
        except FileNotFoundError:
            private_directory(os.path.dirname(path))
            fd = os.open(path, FLAGS | os.O_CREAT, 0o600)
        if _lock(fd, fcntl.LOCK_SH):
            if same_file(path, fd):
                return fd
            give_up(fd)
        else:
            os.close(fd)
            time.sleep(0.001)
    raise LogError(f"{path} is locked by another process", remedy="see who holds it: fuser -v on the file")


def begin_anew(path: str, mark: bytes, aside: int | None) -> int:
    """Put a new file, which holds only a mark, in the place of a log's newest one.

    Args:
        path: the log.
        mark: see `successor_mark`.
        aside: the number under which the old one is kept; None to drop it.

    Returns:
        The new file, open and locked for its writer.

    Raises:
        OSError, LogError: it cannot be made. All is as it was.
    """
    fresh = path + ".new"
    fd = os.open(fresh, FLAGS | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        rest = mark
        while rest:
            rest = rest[os.write(fd, rest) :]
        _lock(fd, fcntl.LOCK_SH)
        if aside is not None:
            kept = f"{put_aside(path)}.{aside}"
            private_directory(os.path.dirname(kept))
            _link(path, kept)
        os.rename(fresh, path)
    except BaseException:
        give_up(fd)
        with suppress(FileNotFoundError):
            os.unlink(fresh)
        raise
    return fd


def _link(path: str, aside: str) -> None:
    try:
        os.link(path, aside)
    except FileNotFoundError:
        pass  # somebody has taken it away
    except FileExistsError:
        # One that was killed behind this has done it already.
        if not os.path.samefile(path, aside):
            raise


def give_up(fd: int) -> None:
    """Close a log's newest file, and give back the lock on it."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def taken(fd: int) -> int:
    """The bytes that a file takes of the disk."""
    return os.fstat(fd).st_blocks * 512


def drop_idle(paths: LogPaths, service_id: str) -> int | None:
    """Drop a newest file to which nobody writes; numbers go on.

    Of a service that has a spool still, or files that were put aside, there stays a file with a mark.

    Returns:
        The bytes that this freed; None if there was nothing to drop.

    Raises:
        OSError: it cannot be read, its successor cannot be made, or where it ended cannot be remembered.
        LogError: what it holds is no log.
    """
    path = paths.log(service_id)
    fd = os.open(path, FLAGS)
    try:
        if not _lock(fd, fcntl.LOCK_EX) or not same_file(path, fd):
            return None
        before, last = taken(fd), position_of(fd)
        if paths.spooled(service_id) or numbers(path):
            if not last.seq or before <= BLOCK_BYTES:
                return None
            mark, _ = successor_mark(paths, service_id, fd, last, {})
            return before - _emptied(path, mark)
        if last.seq:
            number = number_of(path, fd, head_of(fd) or Head())
            before -= remember(paths, service_id, End(last.seq, number + 1))
        os.unlink(path)
        return before
    finally:
        give_up(fd)


def _emptied(path: str, mark: bytes) -> int:
    fd = begin_anew(path, mark, aside=None)
    try:
        return taken(fd)
    finally:
        give_up(fd)


def _lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ---- What they say


def head_of(fd: int) -> Head | None:
    """How a file begins; None if it has no whole line yet.

    Raises:
        LogError: its first line is no record.
    """
    line = first_line(fd)
    return parse_head(line) if line is not None else None


def position_of(fd: int) -> Position:
    """How far the log is at the end of a file.

    Raises:
        LogError: its last whole line is no record.
    """
    line = last_line(fd)
    return parse_position(line) if line is not None else Position()


def successor_mark(
    paths: LogPaths, service_id: str, fd: int, last: Position, known: Mapping[str, Ends]
) -> tuple[bytes, int]:
    """The mark for the file that follows one, and that one's number.

    Args:
        paths: the tenant's.
        service_id: whose log it is.
        fd: the file.
        last: its last record.
        known: how much the log holds of some runs, as the caller knows without looking.

    Raises:
        LogError: what it holds is no log.
    """
    head = head_of(fd) or Head()
    number = number_of(paths.log(service_id), fd, head)
    left = {}
    # Looked up in the whole file, but as a rule there is no such run: it was left behind and is not written down yet.
    for run_id in paths.spooled(service_id) - {last.run_id}:
        ends = known[run_id] if run_id in known else ends_of(fd, head, run_id)
        if ends is not None:
            left[run_id] = ends
    return last.mark(number + 1, left), number


def ends_of(fd: int, head: Head, run_id: str) -> Ends | None:
    """How much of a run's streams is in a log up to the end of a file, though others may have written since.

    None if nothing is.
    """
    mark = run_mark(run_id)
    end = size = os.fstat(fd).st_size
    while end > 0:
        begin = max(0, end - READ_BYTES)
        found = os.pread(fd, end - begin + len(mark), begin).rfind(mark)
        if found >= 0:
            line = line_at(fd, after_newline(fd, begin + found), size)
            return parse_position(line).ends if line is not None else None
        end = begin
    return head.left.get(run_id)


def number_of(path: str, fd: int, head: Head) -> int:
    """The number under which a log's newest file will be put aside."""
    others = (number for number in numbers(path) if not same_file(f"{put_aside(path)}.{number}", fd))
    return max(head.number, max(others, default=0) + 1)
