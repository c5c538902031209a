"""All that is watched of one supervisor's sandboxes."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor

from cgroups import Cgroup

from ..config import Settings
from ..events import EventBus
from ..models import IsolatedUser
from ..trees import Tree
from .ear import Ear
from .oom import OomWatcher
from .pressure import PressureWatcher
from .throttling import ThrottlingWatcher
from .watched import Tenant, Watched

__all__ = ["Monitor"]


class Monitor:
    """Watches sandboxes, and tells what the kernel says about them. For one event loop.

    - `oom`, of a sandbox, at most four times a second: processes of it were killed for want of memory. `count`: how
      many; `level`: whose `memory_max` was hit, `service` or `tenant`, or None if neither's.
    - `pressure`, of a tenant as a whole, at most once a second for each resource: some of its tasks waited for longer
      than the settings have it. `resource`: `memory` or `cpu`; `avg10`: percent of the last ten seconds, which the
      kernel sums up every two seconds; `total_usec`: microseconds since the tenant's slice was made.
    - `throttled`, of a sandbox, for each interval of the settings in which it had used up its `cpu_max` for a larger
      share than they have it. `share`: from 0 to 1; `usec`: microseconds that it waited, added up over CPUs.

    What cannot be watched is logged, and hinders no sandbox. What happened before there was a monitor is not told.

    Args:
        tree: where the sandboxes are.
        bus: where events are told.
        settings: thresholds and intervals.
        threads: for what takes long, one job at a time.
    """

    def __init__(self, tree: Tree, bus: EventBus, settings: Settings, threads: Executor) -> None:
        self._sandboxes: dict[str, Watched] = {}
        self._tenants: dict[str, Tenant] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = float("inf")
        self._closed = False
        self._ear = Ear()
        self._oom = OomWatcher(tree, bus, self._ear, self._wake)
        self._pressure = PressureWatcher(tree, bus, settings, self._ear, self._wake, threads=threads)
        self._throttling = ThrottlingWatcher(bus, settings, self._wake)
        self._watchers = (self._oom, self._pressure, self._throttling)

    def add(
        self,
        user: IsolatedUser,
        service_id: str,
        run_id: str,
        cgroup: Cgroup,
        *,
        has_cpu_max: bool,
        tenant_ooms: int = 0,
        adopted: bool = False,
    ) -> None:
        """Watch a sandbox until `discard`.

        Args:
            user: whose it is.
            service_id: which it is.
            run_id: names it from here on.
            cgroup: its scope. Stays the caller's, and open until `discard`.
            has_cpu_max: whether it has a quota; see `set_cpu_max`.
            tenant_ooms: what `Tree.tenant_oom` was before it started.
            adopted: it ran before, and what happened then was told by somebody else.
        """
        assert run_id not in self._sandboxes
        if self._closed:
            return
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        tenant = self._tenants.get(user.key)
        if tenant is None:
            tenant = self._tenants[user.key] = Tenant(user.key, user.saas_user_id)
            self._pressure.add(tenant)
        tenant.sandboxes += 1
        sandbox = self._sandboxes[run_id] = Watched(tenant, service_id, run_id, cgroup, adopted)
        self._oom.add(sandbox, tenant_ooms)
        if has_cpu_max:
            self._throttling.add(sandbox, fresh=not adopted)

    def set_cpu_max(self, run_id: str, has_cpu_max: bool) -> None:
        """Say whether a sandbox, if it is watched, has a quota from now on."""
        if (sandbox := self._sandboxes.get(run_id)) is None:
            return
        if has_cpu_max:
            self._throttling.add(sandbox, fresh=False)
        else:
            self._throttling.discard(sandbox)

    def discard(self, run_id: str) -> None:
        """Watch a sandbox no more, if it was; it is told if memory was wanted last. Its cgroup is there, and open."""
        if (sandbox := self._sandboxes.pop(run_id, None)) is None:
            return
        tenant = sandbox.tenant
        tenant.sandboxes -= 1
        self._oom.discard(sandbox)
        self._throttling.discard(sandbox)
        if not tenant.sandboxes:
            del self._tenants[tenant.key]
            self._pressure.discard(tenant)

    async def close(self) -> None:
        """Watch nothing more, and return when everything is closed. To be shielded against cancellation."""
        self._closed = True
        for run_id in list(self._sandboxes):
            self.discard(run_id)
        await self._pressure.close()
        self._ear.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self, due: float) -> None:
        """Have the watchers work then, or earlier."""
        # The loop may be closed before all sandboxes are told so.
        if due < self._due and self._loop is not None and not (self._closed or self._loop.is_closed()):
            if self._timer is not None:
                self._timer.cancel()
            self._due = due
            self._timer = self._loop.call_later(due - time.monotonic(), self._work)

    def _work(self) -> None:
        self._timer, self._due = None, float("inf")
        now = time.monotonic()
        for watcher in self._watchers:
            watcher.work(now)
        self._wake(min(watcher.due for watcher in self._watchers))
