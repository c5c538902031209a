"""How long tenants' tasks wait for memory and CPUs, as the kernel tells it."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

from cgroups import Cgroup, CgroupError, GoneError, LimitRefusedError, NotSupportedError, PressureTrigger

from ..config import Settings
from ..events import EventBus
from ..trees import Tree, slice_name
from .ear import Ear
from .watched import Tenant, Wake

__all__ = ["PressureWatcher"]

_log = logging.getLogger(__name__)

SETTLE = 0.25
"""Seconds that a tenant must have had sandboxes to be watched, and in which what is to be closed is gathered."""

APART = 1.0
"""Seconds at least between two events about one resource of one tenant."""

WINDOWS_USEC = (1_000_000, 2_000_000)
"""In which waiting is added up. Without CAP_SYS_RESOURCE the kernel takes the second only, and looks every two seconds:
there the event may come four seconds late."""

AT_ONCE = 64
"""Tenants to be taken up by the loop before everything else gets its turn."""

CLOSERS = 64
"""Triggers closed at the same time: the kernel takes some 10 ms for each, and for many at once no longer."""

_FOR_GOOD = (errno.EPERM, errno.EACCES, errno.EROFS)

Resource = Literal["memory", "cpu"]


@dataclass(slots=True, eq=False)
class _Pressure:
    tenant: Tenant
    resource: Resource
    trigger: PressureTrigger
    total_usec: int = 0
    told_at: float = float("-inf")
    fresh: bool = True


class PressureWatcher:
    """Hears of tenants' pressure, from a moment after their first sandbox until their last."""

    def __init__(
        self, tree: Tree, bus: EventBus, settings: Settings, ear: Ear, wake: Wake, *, threads: Executor
    ) -> None:
        self._tree = tree
        self._bus = bus
        self._ear = ear
        self._wake = wake
        self._threads = threads
        shares: dict[Resource, float | None] = {
            "memory": settings.memory_pressure_share,
            "cpu": settings.cpu_pressure_share,
        }
        self._shares = {resource: share for resource, share in shares.items() if share is not None}
        self._windows: Sequence[int] = WINDOWS_USEC
        self._closed = False
        self._heard_of: dict[Tenant, list[_Pressure]] = {}
        self._opening: dict[Tenant, float] = {}
        self._closing: list[PressureTrigger] = []
        self._close_at = float("inf")
        self._job: asyncio.Future[list[list[_Pressure]]] | None = None

    def add(self, tenant: Tenant) -> None:
        """Watch a tenant, in a moment."""
        if self._shares:
            self._opening[tenant] = due = time.monotonic() + SETTLE
            self._wake(due)

    def discard(self, tenant: Tenant) -> None:
        """Watch it no more. If it was not watched yet, it never is."""
        self._opening.pop(tenant, None)
        self._retire(self._heard_of.pop(tenant, []))

    async def close(self) -> None:
        """Close what is open, and return when that is done."""
        self._closed = True
        for tenant in list(self._heard_of):
            self.discard(tenant)
        self._opening.clear()
        if self._job is not None:
            await asyncio.wait([self._job])
        closing, self._closing = self._closing, []
        if closing:
            await asyncio.get_running_loop().run_in_executor(self._threads, _close_all, closing)

    @property
    def due(self) -> float:
        """When `work` has something to do. While a thread is at it, nothing: it says when it has finished."""
        if self._job is not None or self._closed:
            return float("inf")
        return min(next(iter(self._opening.values()), float("inf")), self._close_at)

    def work(self, now: float) -> None:
        """Have a thread open and close what is due."""
        if self.due > now:
            return
        tenants = [tenant for tenant, due in islice(self._opening.items(), AT_ONCE) if due <= now]
        for tenant in tenants:
            del self._opening[tenant]
        closing, self._closing, self._close_at = self._closing, [], float("inf")
        loop = asyncio.get_running_loop()
        self._job = loop.run_in_executor(self._threads, self._open_and_close, tenants, closing)
        self._job.add_done_callback(partial(self._took_up, tenants))

    def _took_up(self, tenants: Sequence[Tenant], job: asyncio.Future[list[list[_Pressure]]]) -> None:
        self._job = None
        try:
            for tenant, pressures in zip(tenants, job.result(), strict=True):
                if self._closed or not tenant.sandboxes:
                    self._put_away(pressures)
                elif pressures:
                    self._listen(tenant, pressures)
        finally:
            self._wake(self.due)

    def _listen(self, tenant: Tenant, pressures: list[_Pressure]) -> None:
        self._heard_of[tenant] = pressures
        try:
            for pressure in pressures:
                fd = pressure.trigger.fileno()
                self._ear.listen(fd, PressureTrigger.POLL_FOR, partial(self._heard, pressure))
        except OSError as error:
            self._complain(tenant, error)

    # In the loop ------------------------------------------------------------------------------------------------

    def _heard(self, pressure: _Pressure) -> None:
        try:
            found = pressure.trigger.read()
        except CgroupError:
            # Somebody removed the slice under its sandboxes.
            self._heard_of[pressure.tenant].remove(pressure)
            self._retire([pressure])
            return
        grown = found.total_usec > pressure.total_usec
        pressure.total_usec = found.total_usec
        if pressure.fresh:  # to listen to it is news, too
            pressure.fresh = False
        elif grown and time.monotonic() - pressure.told_at >= APART:
            pressure.told_at = time.monotonic()
            self._bus.tell(
                "pressure",
                pressure.tenant.user_id,
                resource=pressure.resource,
                avg10=found.avg10,
                total_usec=found.total_usec,
            )

    def _retire(self, pressures: Sequence[_Pressure]) -> None:
        for pressure in pressures:
            self._ear.unlisten(pressure.trigger.fileno())
        self._put_away(pressures)

    def _put_away(self, pressures: Sequence[_Pressure]) -> None:
        if pressures:
            self._closing += [pressure.trigger for pressure in pressures]
            self._close_at = min(self._close_at, time.monotonic() + SETTLE)
            self._wake(self.due)

    # In a thread ------------------------------------------------------------------------------------------------

    def _open_and_close(self, tenants: Sequence[Tenant], closing: Sequence[PressureTrigger]) -> list[list[_Pressure]]:
        # In this order, so that however fast tenants come and go, descriptors do not pile up.
        _close_all(closing)
        return [self._open(tenant) for tenant in tenants]

    def _open(self, tenant: Tenant) -> list[_Pressure]:
        opened: list[_Pressure] = []
        try:
            # Not `Tree.slice`, which would make it anew if its last sandbox has ended meanwhile.
            with self._tree.root.child(slice_name(tenant.key)) as slice_:
                for resource, share in self._shares.items():
                    opened.append(_Pressure(tenant, resource, self._trigger(slice_, resource, share)))
        except GoneError:
            pass
        except CgroupError as error:
            self._complain(tenant, error)
        return opened

    def _trigger(self, slice_: Cgroup, resource: Resource, share: float) -> PressureTrigger:
        window, *others = self._windows
        try:
            return PressureTrigger(slice_, resource, max(1, int(share * window)), window)
        except LimitRefusedError:
            if not others:
                raise
        self._windows = others
        return self._trigger(slice_, resource, share)

    def _complain(self, tenant: Tenant, error: CgroupError | OSError) -> None:
        if isinstance(error, NotSupportedError) or error.errno in _FOR_GOOD:
            if self._shares:
                self._shares = {}
                _log.warning("no pressure of tenants will be told: %s", error)
        else:
            _log.warning("not all pressure of the tenant of %s will be told: %s", slice_name(tenant.key), error)


def _close_all(triggers: Sequence[PressureTrigger]) -> None:
    if triggers:
        with ThreadPoolExecutor(min(len(triggers), CLOSERS), thread_name_prefix="pactown-close") as pool:
            list(pool.map(PressureTrigger.close, triggers))
