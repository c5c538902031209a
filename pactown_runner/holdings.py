"""What a run holds on its host: claim > cgroup > log.

Each is taken in this order and given back in the reverse one, whatever happens in between. The claim is the first and
the last, so that at any moment a row in the registry names everything of a sandbox that may exist.

As a rule all of it happens on the loop: a claim, a cgroup and two FIFOs take 0.15 ms together, and handing them to a
worker thread and back would take as long again. What would have to wait there goes to a thread: a user or a slice that
has to be made first, a registry that somebody else is writing to. What remains, mkdir and rmdir in cgroupfs, waits for
others no longer than the `fork` that every start needs anyway: they take the same locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal, NamedTuple, Self, TypeVar

from cgroups import BusyError as CgroupBusyError
from cgroups import Cgroup, CgroupError, ExistsError, GoneError, Stats

from .database import BusyError
from .errors import AccountError, NotFoundError, StateError
from .host import Claim, LoopHost
from .logs import LogFeed, LogPaths, LogPump
from .main_process import Main
from .models import IsolatedUser
from .registry import Kind, Registry, SandboxRow
from .specs import SandboxSpec
from .trees import slice_name

__all__ = ["Claiming", "Holdings", "Run", "ask_to_end", "kill_rest"]

_log = logging.getLogger(__name__)
T = TypeVar("T")

Claiming = Literal["claim", "register", "return", "held"]
"""How a run comes by its name. It claims it, because somebody starts it; it registers the service as well, which then
comes back; it claims it because it comes back, which no start rate limits; or it has it."""

KNOWN_USERS = 10_000
"""So many users are remembered, a few hundred bytes each."""


class Run(NamedTuple):
    """One run of a service.

    Attributes:
        spec: what was asked for.
        kind: whether a successor of a dead supervisor keeps it (`service`) or ends it (`run`).
        run_id: tells it from earlier and later ones of the same service.
        started_at: seconds since the epoch.
    """

    spec: SandboxSpec
    kind: Kind
    run_id: str
    started_at: float


class Holdings:
    """What one run holds, from `take` or `take_over` to `is_removed` or `let_go`. The claim outlives it.

    Attributes:
        user: the tenant.
        cgroup: the scope.
        pump: the log.
        limits: each control file that was asked for, and what the kernel answers when it is read.
        main: the first process, as a predecessor wrote it down.
        frozen: whether it was taken over frozen, other than by a hold on its tenant.
        ooms_before: how often the tenant had run into its own limit before.
    """

    cgroup: Cgroup
    pump: LogPump
    limits: dict[str, str]

    def __init__(self, host: LoopHost, run: Run, user: IsolatedUser, feed: LogFeed) -> None:
        self.user = user
        self.main: Main | None = None
        self.frozen = False
        self._host = host
        self._run = run
        self._feed = feed
        self.ooms_before = 0

    # Taking -----------------------------------------------------------------------------------------------------

    @classmethod
    async def take(cls, host: LoopHost, run: Run, claiming: Claiming, feed: LogFeed) -> Self:
        """Take all that a run needs, or nothing. Its user is made if there is none.

        Raises:
            RunnerError, CgroupError, OSError: something cannot be had.
        """
        held = None
        # What is registered is on the disk before it runs, and the disk is waited for in a thread.
        if claiming != "register":
            try:
                held = cls._take_at_once(host, run, claiming, feed)
            except ExistsError:
                # A cgroup of that name has to be ended first. As a start it has been counted.
                claiming = "return" if claiming == "claim" else claiming
        return await host.in_thread(cls._take_patiently, host, run, claiming, feed) if held is None else held

    @classmethod
    async def take_over(cls, host: LoopHost, run: Run, feed: LogFeed) -> Self:
        """Take what a dead owner left running; the claim is ours already. If it fails, it goes on running."""
        return await host.in_thread(cls._take_over, host, run, feed)

    @classmethod
    def _take_at_once(cls, host: LoopHost, run: Run, claiming: Claiming, feed: LogFeed) -> Self | None:
        """Take all, if nothing has to be waited for. Raises `ExistsError` as well."""
        user = host.known.get(run.spec.user_id)
        if user is None or not host.tree.has_slice(user.key):
            return None
        try:
            host.users.verify(user)
            return cls(host, run, user, feed)._take(host.quick, claiming)
        except (AccountError, BusyError, NotFoundError):
            # Perhaps the user was removed meanwhile. The long way makes it anew or says what is wrong.
            return None

    @classmethod
    def _take_patiently(cls, host: LoopHost, run: Run, claiming: Claiming, feed: LogFeed) -> Self:
        user = host.users.get_or_create(run.spec.user_id)
        held = cls(host, run, user, feed)._take(host.registry, claiming)
        if len(host.known) >= KNOWN_USERS:
            host.known.clear()
        host.known[user.saas_user_id] = user
        return held

    def _take(self, registry: Registry, claiming: Claiming) -> Self:
        host, spec = self._host, self._run.spec
        with ExitStack() as undo:
            self._claim(registry, claiming, undo)
            self.cgroup = self._make_cgroup(patient=registry is host.registry)
            undo.callback(self.is_removed)
            limits = host.standings.default_limits(self.user.key, registry) if spec.limits is None else spec.limits
            self.limits = host.tree.limit(self.user.key, self.cgroup, limits)
            self.ooms_before = host.tree.tenant_oom(self.user.key)
            self.pump = self._make_pump()
            self.pump.create()
            host.store.keep(self._run.run_id, *self.pump.fds)
            undo.pop_all()
        return self

    def _claim(self, registry: Registry, claiming: Claiming, undo: ExitStack) -> None:
        if claiming == "held":
            return
        host, run = self._host, self._run
        row = SandboxRow(
            key=self.user.key,
            service_id=run.spec.service_id,
            run_id=run.run_id,
            owner=host.owner.owner_id,
            kind=run.kind,
            spec=run.spec.to_json() if run.kind == "service" else "{}",
            cgroup=host.tree.path + self.place,
            created_at=run.started_at,
        )
        admission = host.admission
        if claiming == "register":
            registry.services.register(row, admission.quota)
            undo.callback(registry.services.forget, row.key, row.service_id)
        else:
            registry.sandboxes.claim(row, admission.caps if claiming == "return" else admission.quota)
        undo.callback(host.release, self.claim)

    @classmethod
    def _take_over(cls, host: LoopHost, run: Run, feed: LogFeed) -> Self:
        user = host.users.get(run.spec.user_id)
        if user is None:
            raise StateError(f"{run.spec.service_id!r} runs for a user who is not registered")
        # Others may have been allowed more, or settings were changed meanwhile.
        host.users.hold_to_quotas(user)
        held = cls(host, run, user, feed)
        held.ooms_before = host.tree.tenant_oom(user.key)
        with host.tree.open_scope(slice_name(user.key), f"{run.spec.service_id}.scope") as cgroup:
            held.main = Main.read(cgroup)
            held.limits = dict(held.main.isolation.limits) if held.main else {}
            held.frozen = held._stays_frozen(cgroup)
            held.pump = held._make_pump()
            held.pump.adopt()
            # Whoever began it may have had no store, or a full one.
            host.store.keep(run.run_id, *held.pump.fds)
            held.cgroup = cgroup.dup()
        return held

    def _stays_frozen(self, cgroup: Cgroup) -> bool:
        """Whether it is frozen, and not only for as long as its tenant is held."""
        if not cgroup.frozen() or self._run.spec.service_id in self._host.registry.holds.frozen(self.user.key):
            return False
        # The hold may have ended between these two looks.
        return cgroup.frozen()

    @property
    def place(self) -> str:
        """The end of the scope's path, from the slice on."""
        return f"/{slice_name(self.user.key)}/{self._run.spec.service_id}.scope"

    @property
    def has_cpu_max(self) -> bool:
        """Whether its CPU time is limited."""
        return not self.limits.get("cpu.max", "max").startswith("max")

    @property
    def claim(self) -> Claim:
        """What names it in the registry."""
        return self.user.key, self._run.spec.service_id, self._run.run_id

    def _make_cgroup(self, *, patient: bool) -> Cgroup:
        tree, (key, service_id, run_id) = self._host.tree, self.claim
        try:
            return tree.scope(key, service_id, run_id)
        except ExistsError:
            if not patient:
                raise
            # The claim is ours, so what is there under this name is nobody's.
            tree.end_scope(slice_name(key), f"{service_id}.scope")
            return tree.scope(key, service_id, run_id)

    def _make_pump(self) -> LogPump:
        settings, user = self._host.settings, self.user
        return LogPump(
            paths=LogPaths(settings.log_dir, settings.run_dir, user.key),
            user_id=user.saas_user_id,
            service_id=self._run.spec.service_id,
            run_id=self._run.run_id,
            uid=user.linux_uid,
            gid=user.linux_gid,
            feed=self._feed,
            hub=self._host.hub,
            tenant=self._host.log_tenants.of(user.key),
        )

    # Having -----------------------------------------------------------------------------------------------------

    async def on_cgroup(self, action: Callable[[Cgroup], T]) -> T:
        """Do something with the cgroup in a worker thread, where it is held by a descriptor of its own.

        The sandbox may end meanwhile, and its descriptor's number stand for another sandbox's cgroup.
        """
        own = self.cgroup.dup()

        def act() -> T:
            with own:
                return action(own)

        return await asyncio.shield(self._host.in_thread(act))

    def freeze(self, cgroup: Cgroup, timeout: float) -> None:
        """Let it stand still, and go on standing still when a hold on its tenant ends; blocking.

        Raises:
            CgroupError: it does not within `timeout` seconds.
            RegistryError: that it is to stay so could not be written down.
        """
        with self._host.registry.holds.changing():
            self._goes_on(False)
            cgroup.request_freeze(True)
        cgroup.freeze(timeout)

    def thaw(self, cgroup: Cgroup, timeout: float) -> None:
        """Let it go on; if its tenant is held, when that ends; blocking. Raises as `freeze` does."""
        with self._host.registry.holds.changing():
            if not self._goes_on(True):
                cgroup.thaw(timeout)

    def _goes_on(self, goes_on: bool) -> bool:
        """Write down whether it goes on when the hold on its tenant ends. False if there is none."""
        key, service_id, _ = self.claim
        return self._host.registry.holds.change(key, [service_id], goes_on=goes_on)

    def stats(self, *, pressure: bool) -> Stats:
        """The counters, as far as they can be read."""
        try:
            return self.cgroup.stats(pressure=pressure)
        except CgroupError as error:
            _log.error("cannot read the counters of %s: %s", self.cgroup.path, error)
            return Stats()

    def tenant_oom(self) -> bool:
        """Whether the tenant as a whole ran into its `memory.max` since this was taken."""
        return self._host.tree.tenant_oom(self.user.key) != self.ooms_before

    # Giving back ------------------------------------------------------------------------------------------------

    def _is_populated(self) -> bool:
        with contextlib.suppress(CgroupError):
            return self.cgroup.populated()
        return False

    def kill_tracers(self) -> None:
        """Kill those of the tenant's processes that may keep from ending what was killed; blocking."""
        with self._host.tree.slice(self.user.key) as slice_:
            if count := self.cgroup.kill_tracers(slice_):
                _log.warning("killed %d processes that traced what is to end in %s", count, self.cgroup.path)

    def let_go(self) -> None:
        """Kill without waiting; the registry keeps its row, and whoever comes next finishes what is left."""
        with self.cgroup, contextlib.suppress(CgroupError):
            self.cgroup.kill()
        self.pump.detach()

    def is_removed(self) -> bool:
        """Remove the cgroup. False, and it stays, if something runs in it again: a further program, born just now."""
        try:
            # What runs in it may have made cgroups below, where it may.
            self.cgroup.remove(recursive=True)
        except CgroupError as error:
            if isinstance(error, CgroupBusyError) and self._is_populated():
                return False
            # Nothing runs in it. Whoever starts this service next tries again.
            _log.error("cannot remove the cgroup %s: %s", self.cgroup.path, error)
        self.cgroup.close()
        return True


def ask_to_end(cgroup: Cgroup) -> None:
    """Send SIGTERM to every process, in a way that also one that is frozen or stopped can act on it."""
    try:
        # Frozen, a process acts on no signal but SIGKILL; stopped, on none but SIGKILL and SIGCONT.
        cgroup.request_freeze(False)
        cgroup.signal(signal.SIGTERM)
        cgroup.signal(signal.SIGCONT)
    except GoneError:
        pass
    except CgroupError as error:
        # The grace time runs all the same, and what is left then is killed.
        _log.warning("not everything in %s could be asked to end: %s", cgroup.path, error)


def kill_rest(cgroup: Cgroup) -> int:
    """Kill everything in it; returns how many processes that were."""
    rest = len(cgroup.pids(recursive=True))
    cgroup.kill()
    return rest
