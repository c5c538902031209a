"""Kills for want of memory, as they happen."""

from __future__ import annotations

import logging
import select
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from cgroups import CgroupError, GoneError, MemoryEvents

from ..errors import RunnerError
from ..events import EventBus
from ..trees import Tree
from .ear import Ear
from .watched import Tenant, Wake, Watched

__all__ = ["OomWatcher"]

_log = logging.getLogger(__name__)

REST = 0.25
"""Seconds between two looks at one sandbox's `memory.events`. At its limit, with pages to reclaim, a sandbox changes
them all the time, and must not keep this process busy with it."""

SAME_CAUSE = 1.0
"""Seconds in which kills have the cause of the first: the kernel counts the want of memory once, and then each kill."""

_KILLS = "oom_kill"
_ON_CHANGE = select.EPOLLPRI | select.EPOLLONESHOT


class _Cause:
    """How often a cgroup was at its own limit, and whether that is why something was killed now."""

    __slots__ = ("_ooms", "_rose_at")

    def __init__(self, ooms: int) -> None:
        self._ooms = ooms
        self._rose_at = float("-inf")

    def is_it(self, ooms: int, now: float) -> bool:
        if ooms > self._ooms:
            self._ooms, self._rose_at = ooms, now
        return now - self._rose_at < SAME_CAUSE


@dataclass(slots=True, eq=False)
class _Memory:
    sandbox: Watched
    events: MemoryEvents
    tenants: _Cause
    own: _Cause = field(default_factory=lambda: _Cause(0))
    killed: int = 0


class OomWatcher:
    """Hears of kills in sandboxes, wherever memory is controlled; where it is not, it does nothing."""

    def __init__(self, tree: Tree, bus: EventBus, ear: Ear, wake: Wake) -> None:
        self._tree = tree
        self._bus = bus
        self._ear = ear
        self._wake = wake
        self._controlled = "memory" in tree.root.enabled()
        self._memories: dict[str, _Memory] = {}
        self._causes: dict[Tenant, _Cause] = {}
        self._resting: deque[tuple[float, _Memory]] = deque()

    def add(self, sandbox: Watched, tenant_ooms: int) -> None:
        """Watch a sandbox: for kills since its start, or if it was adopted, from now on."""
        if not self._controlled:
            return
        tenants = self._causes.setdefault(sandbox.tenant, _Cause(tenant_ooms))
        try:
            events = MemoryEvents(sandbox.cgroup)
            memory = self._memories[sandbox.run_id] = _Memory(sandbox, events, tenants)
            self._ear.listen(events.fileno(), _ON_CHANGE, partial(self._heard, memory))
            if sandbox.adopted:
                memory.own = _Cause(sandbox.cgroup.ooms() or 0)
                memory.killed = events.read().get(_KILLS, 0)
        except (CgroupError, OSError) as error:
            _log.warning("no kill for want of memory will be told of %s: %s", sandbox.cgroup.path, error)
            self._forget(sandbox)
        else:
            # Counters that were never read are news, which there may be already.
            self._look(memory)

    def discard(self, sandbox: Watched) -> None:
        """Look for the last time."""
        if (memory := self._memories.get(sandbox.run_id)) is not None:
            self._look(memory)
        self._forget(sandbox)
        if not sandbox.tenant.sandboxes:
            self._causes.pop(sandbox.tenant, None)

    @property
    def due(self) -> float:
        """When `work` has something to do."""
        return self._resting[0][0] if self._resting else float("inf")

    def work(self, now: float) -> None:
        """Listen again to those that have rested."""
        while self._resting and self._resting[0][0] <= now:
            memory = self._resting.popleft()[1]
            if self._memories.get(memory.sandbox.run_id) is memory:
                self._ear.listen_again(memory.events.fileno(), _ON_CHANGE)

    def _heard(self, memory: _Memory) -> None:
        if self._look(memory):
            due = time.monotonic() + REST
            self._resting.append((due, memory))
            self._wake(due)

    def _look(self, memory: _Memory) -> bool:
        """Tell of kills since the last look. False if the cgroup was removed, and there will be no other."""
        try:
            killed = memory.events.read().get(_KILLS, 0)
        except GoneError:
            self._forget(memory.sandbox)
            return False
        if killed > memory.killed:
            count, memory.killed = killed - memory.killed, killed
            level, sandbox = self._level(memory), memory.sandbox
            self._bus.tell("oom", sandbox.tenant.user_id, sandbox.service_id, sandbox.run_id, count=count, level=level)
        return True

    def _level(self, memory: _Memory) -> Literal["service", "tenant"] | None:
        """Whose limit it was: `oom_kill` rises where the victim lived, only `oom` where the limit was hit."""
        cgroup, now = memory.sandbox.cgroup, time.monotonic()
        try:
            own = memory.own.is_it(cgroup.ooms() or 0, now)
            tenants = memory.tenants.is_it(self._tree.tenant_oom(memory.sandbox.tenant.key), now)
        except (CgroupError, RunnerError) as error:
            _log.warning("whose limit led to a kill in %s is not known: %s", cgroup.path, error)
            return None
        return "service" if own else "tenant" if tenants else None

    def _forget(self, sandbox: Watched) -> None:
        if (memory := self._memories.pop(sandbox.run_id, None)) is not None:
            self._ear.unlisten(memory.events.fileno())
            memory.events.close()
