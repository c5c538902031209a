"""What the pumps of one tenant share in a process: their rate, and the room that their logs may take."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from ..config import Settings
from .cap import Look, most_files
from .limits import LogLimits
from .paths import LogPaths
from .rate import Rate
from .spool import BLOCK_BYTES

if TYPE_CHECKING:
    from .journal import Journal

__all__ = ["LogTenants", "Note", "TenantLogs"]

Note = Callable[..., None]
"""Is told what was logged, as `EventBus.note` is."""

_REMEMBERED = 1000
"""Tenants whose rate goes on where it was, though none of their pumps is there any more."""
_STEPS = 16
"""Each time that it has written this part of the cap a process has looked at the room that a tenant's logs take."""


class TenantLogs:
    """What the pumps of one tenant share in a process.

    Args:
        paths: the tenant's.
        limits: the tenant's.
        note: is told what was logged and dropped; None if nobody wants to know.

    Attributes:
        journals: the logs that this process writes to now, by path.
        rate: None if there is no limit to it.
    """

    __slots__ = ("__weakref__", "_look", "_seen", "_unseen", "journals", "limits", "note", "paths", "rate")

    def __init__(self, paths: LogPaths, limits: LogLimits, note: Note | None = None) -> None:
        self.paths = paths
        self.limits = limits
        self.note = note
        self.journals: dict[str, Journal] = {}
        self.rate = Rate(limits.rate_bytes, drops=limits.rate_policy == "drop") if limits.rate_bytes else None
        # More than one may write without looking: a process that lives for a short while looks once.
        self._unseen = self._step + 1
        self._look: Look | None = None
        self._seen = 0

    @property
    def _step(self) -> int:
        return min(self.limits.rotate_bytes, self.limits.cap_bytes // _STEPS)

    def is_tight(self, count: int) -> bool:
        """Whether `make_room` for so many bytes would wait for a look at the disk."""
        return self._unseen + count > self._step

    def is_behind(self, count: int) -> bool:
        """Whether `make_room` for so many bytes would wait; then a look is under way. Who can wait otherwise does."""
        count = min(count, self._step // 2)
        if self._look is not None and self._look.over:
            self._end_look()
        if self._look is None and self.is_tight(count):
            self._begin_look(count)
        return self.is_tight(count)

    async def looked(self) -> None:
        """Return when no look is under way."""
        if self._look is not None and not self._look.over:
            await asyncio.to_thread(self._look.wait)

    def make_room(self, count: int) -> None:
        """Hold the cap, now that so many bytes of a log or spool will be written; looks at the disk now and then only.

        What cannot be dropped is told in the supervisor's own log, and no reason not to write.
        """
        if self._look is not None and (self._look.over or self.is_tight(count)):
            self._end_look()
        # Begun at half a step, so that it is over at a whole one.
        if self._look is None and self.is_tight(count + self._step // 2):
            self._begin_look(count)
            if self.is_tight(count):
                self._end_look()
        self._unseen += count

    def _begin_look(self, count: int) -> None:
        # Until the next look there will be a step more.
        self._look = Look(self.paths, self.limits.cap_bytes - self._step - count, self.journals)
        self._seen = self._unseen

    def _end_look(self) -> None:
        assert self._look is not None
        look, self._look = self._look, None
        self._unseen -= self._seen
        look.finish(self.journals)

    def count_file(self) -> None:
        """A further file was begun: it takes a block or two at first, and one of the places for files."""
        self._unseen += max(2 * BLOCK_BYTES, self.limits.cap_bytes // most_files(self.limits.cap_bytes))

    def give_room(self, count: int) -> None:
        """So many of the bytes that there was made room for were not written, or are gone again."""
        self._unseen -= count


class LogTenants:
    """The `TenantLogs` of a process: each tenant has one at a time.

    Args:
        settings: the supervisor's.
        note: see `TenantLogs`.
    """

    def __init__(self, settings: Settings, note: Note | None = None) -> None:
        self._note = note
        self._log_dir = settings.log_dir
        self._run_dir = settings.run_dir
        self._limits = LogLimits.of(settings)
        self._known: WeakValueDictionary[str, TenantLogs] = WeakValueDictionary()
        self._recent: deque[TenantLogs] = deque(maxlen=_REMEMBERED)
        self._lock = threading.Lock()

    def of(self, key: str) -> TenantLogs:
        """What the tenant of this key shares. May be called in a worker thread."""
        with self._lock:
            tenant = self._known.get(key)
            if tenant is None:
                tenant = TenantLogs(LogPaths(self._log_dir, self._run_dir, key), self._limits, self._note)
                self._known[key] = tenant
            self._recent.append(tenant)
        return tenant
