"""What sandboxes and jobs share: the state, the tree, and on an event loop what keeps it from waiting."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, TypeVarTuple

from .admission import Admission
from .config import Settings
from .errors import RegistryError
from .events import EventBus
from .logs import LogHub, LogTenants
from .models import IsolatedUser
from .monitor import Monitor
from .notify import DescriptorStore
from .owners import Owner
from .registry import Registry
from .standings import Standings
from .trees import Tree
from .users import Users

__all__ = ["Claim", "Host", "LoopHost"]

_log = logging.getLogger(__name__)

Claim = tuple[str, str, str]
"""What names a run in the registry: the tenant's key, the service, the run's own id."""

T = TypeVar("T")


class TenantWork(Protocol):
    """Blocking work for tenants, in threads of its own; `TenantThreads` is it."""

    async def run(self, user_id: str, work: Callable[[Any], T]) -> T:
        """Do this when it is the tenant's turn. Cancelled, it has ended when the cancellation is seen."""


Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What is done for tenants of one state needs: enough for whatever blocks."""

    settings: Settings
    registry: Registry
    users: Users
    standings: Standings
    """What the operator lets each tenant have."""

    tree: Tree
    owner: Owner
    unreaped: set[int] = field(default_factory=set)
    """Children that have ended, or will, and that another process traces: it decides when they can be reaped."""

    unfinished: dict[Claim, None] = field(default_factory=dict)
    """Runs of ours that nobody looks after any more, and whose end could not be brought about, or written down."""

    known: dict[str, IsolatedUser] = field(default_factory=dict)
    """Users by id, as last seen. That one still is what it was only a claim tells."""

    unwritten: dict[Claim, float] = field(default_factory=dict)
    """Runs that have ended and whose output could not be written down, and when that was tried: the spool keeps it."""

    def release(self, claim: Claim) -> None:
        """Give a run's name free, now or later; blocking. Nothing of the run is left."""
        try:
            self.registry.sandboxes.release(*claim)
        except RegistryError as error:
            _log.error("cannot write down yet that run %s of %s has ended: %s", claim[2], claim[1], error)
            self.unfinished[claim] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopHost(Host):
    """What the sandboxes of one supervisor share, on its event loop."""

    hub: LogHub
    log_tenants: LogTenants
    threads: ThreadPoolExecutor
    quick: Registry
    """The registry without waiting, for the event loop: what cannot be had at once is left to a thread."""
    events: EventBus
    monitor: Monitor
    admission: Admission
    work: TenantWork
    """For what may take minutes, and a tenant can make last: not among what moves files, which would wait for it."""
    store: DescriptorStore
    """Where FIFOs are kept beyond this process's end, if the service manager keeps any."""

    async def release_soon(self, claim: Claim) -> None:
        """As `release`, from the loop: at once as a rule, in a thread where the registry has to be waited for."""
        try:
            self.quick.sandboxes.release(*claim)
        except RegistryError:
            await self.in_thread(self.release, claim)

    async def in_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Do what may block in one of the supervisor's own threads, which nothing else can keep busy.

        A call that has begun goes on when the caller is cancelled.
        """
        return await asyncio.get_running_loop().run_in_executor(self.threads, call, *args)
