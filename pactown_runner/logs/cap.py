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
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from .errors import LogError
from .files import drop_idle
from .paths import LOG_ENDING, LogPaths, put_aside
from .spool import BLOCK_BYTES

if TYPE_CHECKING:
    from .journal import Journal

__all__ = ["Look", "most_files"]

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


class Look:
    """A look at what a tenant's logs take, in a thread of its own, which begins at once.

    It drops what nobody writes to, the oldest first, until all of them take `limit` bytes, and are `most_files`, at
    most. What this process writes to is left to `finish`.

    Args:
        paths: the tenant's.
        limit: bytes.
        own: the paths of the logs that this process writes to.
    """

    def __init__(self, paths: LogPaths, limit: int, own: Collection[str]) -> None:
        self._paths = paths
        self._limit = limit
        self._own = frozenset(own)
        self._excess = 0
        self._left: list[_File] = []
        self._thread = threading.Thread(target=self._drop, name="log-cap")
        try:
            self._thread.start()
        except RuntimeError:  # there may be no more threads, or the process ends
            self._drop()

    def _drop(self) -> None:
        self._excess, self._left = _drop_oldest(self._paths, self._limit, self._own)

    @property
    def over(self) -> bool:
        """Whether it is."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it is over."""
        if self._thread.ident is not None:
            self._thread.join()

    def finish(self, own: Mapping[str, Journal]) -> None:
        """Wait until it is over, and drop of what was left to us, the largest first, what is still too much."""
        self.wait()
        for file in sorted(self._left, key=attrgetter("room"), reverse=True):
            if self._excess <= 0 or file.room <= BLOCK_BYTES:
                return
            path = self._paths.log(file.service_id)
            journal = own.get(path)
            # It may have ended meanwhile.
            drop = partial(drop_idle, self._paths, file.service_id) if journal is None else journal.restart
            self._excess -= _tried(path, file.room, drop) or 0


def _drop_oldest(paths: LogPaths, limit: int, own: Collection[str]) -> tuple[int, list[_File]]:
    """Drop what nobody writes to. Returns how much is too much still, and the newest files of what is our `own`."""
    try:
        files = sorted(_files(paths))
        excess = sum(file.room for file in files) + _room(paths.spool_dir) + _room(paths.gone_dir) - limit
    except OSError as error:
        _log.error("cannot see how much the logs in %s take: %s", paths.tenant_dir, error)
        return 0, []
    crowd = min(len(files) - len(own) - most_files(limit), _AT_ONCE)
    left = []
    for file in files:
        if excess <= 0 and crowd <= 0:
            break
        path = paths.log(file.service_id)
        if file.number == _NEWEST and path in own:
            left.append(file)
            continue
        if file.number != _NEWEST:
            freed = _tried(path, file.room, partial(_unlink, f"{put_aside(path)}.{file.number}", file.room))
        else:
            freed = _tried(path, file.room, partial(drop_idle, paths, file.service_id))
        if freed is not None:
            excess -= freed
            crowd -= 1
    return excess, left


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
