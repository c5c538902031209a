"""The cap on the room that a tenant's logs take: what is dropped when there is too much.

Several processes may write for one tenant, so each of them counts what is on the disk. The oldest records go first:
files that were put aside, of any service, and those of services to which nobody writes now. If that is not enough, it
is the logs that are being written, the largest first; each process drops its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from .errors import LogError
from .files import drop_contents
from .paths import LOG_ENDING, LogPaths, put_aside

if TYPE_CHECKING:
    from .journal import Journal

__all__ = ["hold_cap"]

_log = logging.getLogger(__name__)


_NEWEST = 1 << 62
"""Stands for the number of a file that has none yet."""


class _File(NamedTuple):
    """One file of a log. In the order of their last records, so that sorting them begins with the oldest."""

    changed_ns: int
    number: int
    service_id: str
    size: int
    inode: int


def hold_cap(paths: LogPaths, limit: int, own: Mapping[str, Journal]) -> None:
    """Drop logs of a tenant, the oldest first, until all of them take `limit` bytes at most.

    Args:
        paths: the tenant's.
        limit: bytes.
        own: the logs that this process writes to, by path.
    """
    try:
        files = list(_files(paths))
        # Of spools, what is in the logs already has been given back.
        spooled = sum(state.st_blocks * 512 for _, state in _states(paths.spool_dir))
        excess = sum(file.size for file in files) + spooled - limit
    except OSError as error:
        _log.error("cannot see how much the logs in %s take: %s", paths.tenant_dir, error)
        return
    sizes = {}
    for file in sorted(files):
        if excess <= 0:
            return
        path = paths.log(file.service_id)
        if file.number != _NEWEST:
            excess -= _tried(path, partial(_unlink, f"{put_aside(path)}.{file.number}", file.size))
        elif path not in own:
            excess -= _tried(path, partial(drop_contents, paths, file.service_id))
        else:
            sizes[path] = file.size
    for path in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if excess <= 0:
            return
        if (journal := own.get(path)) is not None:
            excess -= _tried(path, journal.restart)


def _files(paths: LogPaths) -> Iterator[_File]:
    found: dict[int, _File] = {}
    # In this order: what is put aside meanwhile is seen once or twice. One file of two names is the newest one still.
    for directory in (paths.tenant_dir, paths.aside_dir):
        for name, state in _states(directory):
            service_id, ending, number = name.rpartition(LOG_ENDING)
            aside = number.removeprefix(".")
            if not ending or not (number == "" or (number[0] == "." and aside.isascii() and aside.isdecimal())):
                continue
            file = _File(state.st_mtime_ns, int(aside or _NEWEST), service_id, state.st_size, state.st_ino)
            found.setdefault(file.inode, file)
    yield from found.values()


def _states(directory: str) -> Iterator[tuple[str, os.stat_result]]:
    """The names in a directory that may be missing, and what is there."""
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                yield entry.name, entry.stat(follow_symlinks=False)


def _unlink(path: str, size: int) -> int:
    with suppress(FileNotFoundError):  # another process was faster, and that is room too
        os.unlink(path)
    return size


def _tried(path: str, drop: Callable[[], int]) -> int:
    try:
        return drop()
    except (OSError, LogError) as error:
        _log.error("cannot make room for newer records: %s: %s", path, error)
        return 0
