"""The cap on the room that a tenant's logs take: what is dropped when there is too much.

Several processes may write for one tenant, so each of them counts what is on the disk. The oldest records go first:
files that were put aside, of any service, and the logs of services to which nobody writes now, of which no more stays
than where they ended (`gone`). If that is not enough, it is the logs that are being written, the largest first; each
process drops its own.

There is a cap on how many files there are, too, so that it never takes long to count them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from .errors import LogError
from .files import drop_idle
from .paths import LOG_ENDING, LogPaths, put_aside
from .spool import BLOCK_BYTES

if TYPE_CHECKING:
    from .journal import Journal

__all__ = ["hold_cap", "most_files"]

_log = logging.getLogger(__name__)


_AT_ONCE = 1024
"""So many files are dropped at most only because there are too many."""
_NEWEST = 1 << 62
"""Stands for the number of a file that has none yet."""


class _File(NamedTuple):
    """One file of a log. In the order of their last records, so that sorting them begins with the oldest."""

    changed_ns: int
    number: int
    service_id: str
    room: int
    inode: int


def most_files(limit: int) -> int:
    """How many files a tenant's logs are at most, but for those that are being written, with a cap of so many bytes."""
    return max(1024, limit >> 16)


def hold_cap(paths: LogPaths, limit: int, own: Mapping[str, Journal]) -> None:
    """Drop logs of a tenant, the oldest first, until all of them take `limit` bytes, and are `most_files`, at most.

    Args:
        paths: the tenant's.
        limit: bytes.
        own: the logs that this process writes to, by path.
    """
    excess, rooms = _drop_oldest(paths, limit, own.keys())
    for path in sorted(rooms, key=rooms.__getitem__, reverse=True):
        if excess <= 0 or rooms[path] <= BLOCK_BYTES:
            return
        if (journal := own.get(path)) is not None:
            excess -= _tried(path, rooms[path], journal.restart) or 0


def _drop_oldest(paths: LogPaths, limit: int, own: Collection[str]) -> tuple[int, dict[str, int]]:
    """Drop what nobody writes to. Returns how much is too much still, and then what each of our `own` takes."""
    try:
        files = sorted(_files(paths))
        excess = sum(file.room for file in files) + _room(paths.spool_dir) + _room(paths.gone_dir) - limit
    except OSError as error:
        _log.error("cannot see how much the logs in %s take: %s", paths.tenant_dir, error)
        return 0, {}
    crowd = min(len(files) - len(own) - most_files(limit), _AT_ONCE)
    rooms = {}
    for file in files:
        if excess <= 0 and crowd <= 0:
            break
        path = paths.log(file.service_id)
        if file.number == _NEWEST and path in own:
            rooms[path] = file.room
            continue
        if file.number != _NEWEST:
            freed = _tried(path, file.room, partial(_unlink, f"{put_aside(path)}.{file.number}", file.room))
        else:
            freed = _tried(path, file.room, partial(drop_idle, paths, file.service_id))
        if freed is not None:
            excess -= freed
            crowd -= 1
    return excess, rooms


def _files(paths: LogPaths) -> Iterator[_File]:
    found: dict[int, _File] = {}
    # In this order: what is put aside meanwhile is seen once or twice. One file of two names is the newest one still.
    for directory in (paths.tenant_dir, paths.aside_dir):
        for name, state in _states(directory):
            service_id, ending, number = name.rpartition(LOG_ENDING)
            aside = number.removeprefix(".")
            if not ending or not (number == "" or (number[0] == "." and aside.isascii() and aside.isdecimal())):
                continue
            file = _File(state.st_mtime_ns, int(aside or _NEWEST), service_id, state.st_blocks * 512, state.st_ino)
            found.setdefault(file.inode, file)
    yield from found.values()


def _states(directory: str) -> Iterator[tuple[str, os.stat_result]]:
    """The names in a directory that may be missing, and what is there."""
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                yield entry.name, entry.stat(follow_symlinks=False)


def _room(directory: str) -> int:
    return sum(state.st_blocks * 512 for _, state in _states(directory))


def _unlink(path: str, room: int) -> int:
    os.unlink(path)
    return room


def _tried(path: str, room: int, drop: Callable[[], int | None]) -> int | None:
    try:
        return drop()
    except FileNotFoundError:
        return room  # another process was faster, and that is room too
    except (OSError, LogError) as error:
        _log.error("cannot make room for newer records: %s: %s", path, error)
        return None
