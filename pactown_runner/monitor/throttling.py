"""How much sandboxes are held back by their `cpu_max`, now and again."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

from cgroups import CgroupError, GoneError, Throttled, read_throttled

from ..config import Settings
from ..events import EventBus
from .watched import Wake, Watched

__all__ = ["ThrottlingWatcher"]

_log = logging.getLogger(__name__)

HOLD_SECONDS = 0.001
"""How long reading counters may hold the loop before everything else gets its turn."""

TURNS = 10
"""In so many turns all sandboxes are read in each interval, those that came at about the same time in the same."""


@dataclass(slots=True, eq=False)
class _Quota:
    sandbox: Watched
    last: Throttled | None
    looked_at: float
    due: float


class ThrottlingWatcher:
    """Reads how often sandboxes were throttled. Who has no quota costs nothing."""

    def __init__(self, bus: EventBus, settings: Settings, wake: Wake) -> None:
        self._bus = bus
        self._wake = wake
        self._share = settings.throttled_share
        self._interval = settings.throttled_interval
        # The first to be looked at comes first.
        self._quotas: dict[str, _Quota] = {}

    def add(self, sandbox: Watched, *, fresh: bool) -> None:
        """Watch a sandbox; a `fresh` one was never throttled before. A second time does nothing."""
        if self._share is not None and sandbox.run_id not in self._quotas:
            self._put(_Quota(sandbox, Throttled(0, 0) if fresh else None, time.monotonic(), 0.0))

    def discard(self, sandbox: Watched) -> None:
        """Watch it no more, if it was."""
        self._quotas.pop(sandbox.run_id, None)

    @property
    def due(self) -> float:
        """When `work` has something to do."""
        for quota in self._quotas.values():
            return quota.due
        return float("inf")

    def work(self, now: float) -> None:
        """Look at those that are due, as many as time allows."""
        until = now + HOLD_SECONDS
        while self.due <= now < until:
            now = time.monotonic()
            self._look(next(iter(self._quotas.values())))

    def _put(self, quota: _Quota) -> None:
        step = self._interval / TURNS
        quota.due = math.ceil((quota.looked_at + self._interval) / step) * step
        self._quotas[quota.sandbox.run_id] = quota
        self._wake(quota.due)

    def _look(self, quota: _Quota) -> None:
        sandbox = quota.sandbox
        del self._quotas[sandbox.run_id]
        try:
            found = read_throttled(sandbox.cgroup)
        except GoneError:
            return
        except CgroupError as error:
            _log.warning("how often %s is throttled will not be told: %s", sandbox.cgroup.path, error)
            return
        last, quota.last = quota.last, found
        since, quota.looked_at = quota.looked_at, time.monotonic()
        self._put(quota)
        if last is not None and self._share is not None:
            share = found.share_since(last, quota.looked_at - since)
            if share >= self._share:
                usec = found.usec - last.usec
                self._bus.tell(
                    "throttled", sandbox.tenant.user_id, sandbox.service_id, sandbox.run_id, share=share, usec=usec
                )
