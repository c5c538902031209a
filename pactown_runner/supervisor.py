"""The face of the library: a supervisor, its life, and what can be asked of it about its sandboxes."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import anyio
from anyio import to_thread

from cgroups import CgroupError, Stats

from .admission import Admission, raise_descriptor_limit
from .archives import sweep_fresh_homes
from .config import Settings
from .deletion import finish_removals
from .errors import (
    AdmissionError,
    AlreadyRunningError,
    NotFoundError,
    RunnerError,
    SpecError,
    StartError,
    StateError,
    TreeError,
)
from .events import EventBus, EventReader, Listener
from .exits import reap_late
from .holdings import Run
from .homes import SandboxFiles
from .host import LoopHost
from .live import LiveSandboxes
from .logs import LogHub, LogPaths, LogTenants, read_log
from .models import LogRecord, Outcome, State
from .monitor import Monitor
from .notify import DescriptorStore
from .outcomes import failed_to_start
from .owners import Owner
from .recovery import sweep
from .registry import Kind, Registry
from .sandbox import Sandbox, stats_of_all
from .specs import SandboxSpec, check_service_id
from .standings import Standings
from .succession import Succession
from .supervisor_users import Placed, SupervisorUsers
from .tenant_threads import TenantThreads
from .trees import open_tree
from .users import Users
from .waiting import finish

__all__ = ["Supervisor"]

_log = logging.getLogger(__name__)

THREADS = 8
"""For what may block on the way to and from each sandbox: microseconds as a rule, the disk's latency at worst."""

Role = Literal["server", "one-shot"]


class Supervisor:
    """Starts and looks after sandboxes, for as long as the `async with` lasts. What it started ends with it.

    Several supervisors, in one or many processes, may share one state: each sandbox belongs to one of them. What a
    dead one left is taken over by the others: one-shot runs are ended by whoever comes first, services go on under a
    supervisor of the role `server`.

    Args:
        users_base: where homes are. Given alone, and other than the default, it keeps the whole state below it.
        settings: all settings instead.
        role: `one-shot` for a process that does not stay to look after services.
        store: keeps what sandboxes have printed beyond this process's end, see `notify`.

    Attributes:
        settings: as they are in effect.
        users: the SaaS users and their identities on this host.
    """

    def __init__(
        self,
        users_base: Path | None = None,
        *,
        settings: Settings | None = None,
        role: Role = "server",
        store: DescriptorStore | None = None,
    ) -> None:
        if settings is None:
            settings = Settings.load(users_base=users_base)
        elif users_base is not None:
            raise SpecError("give users_base or settings, not both")
        self.settings = settings
        self._role = role
        self._store = store or DescriptorStore()
        self._host: LoopHost | None = None
        self._files: SandboxFiles | None = None
        self._listeners: list[Listener] = []
        self._events = EventBus(settings.event_buffer, self._listeners)
        self._refusal: RunnerError = StateError("the supervisor is not running", remedy="use it within `async with`")
        self._held = ExitStack()
        self._live = LiveSandboxes()
        self._patrol: asyncio.Task[None] | None = None
        self._removals: threading.Thread | None = None
        self._give_up = threading.Event()

    # Its life ---------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._host is not None:
            raise StateError("the supervisor is running already")
        if self._events.closed:
            self._events = EventBus(self.settings.event_buffer, self._listeners)
        hub = LogHub()
        self._held.callback(hub.close)
        try:
            # Whole, whoever is cancelled: what is opened after `_close` nobody would close.
            host = await finish(asyncio.ensure_future(self._open_in_thread(hub)))
            if host is not None:
                threads = TenantThreads()
                self._held.callback(threads.close)
                self._files = SandboxFiles(host, threads)
                self.users.place(Placed(host, threads, self._live.stop_all, partial(self._live.hold_all, host)))
                succession = Succession(host, self._live, services=self._role == "server")
                await succession.take_over()
                await sweep(host)
                self._removals = threading.Thread(target=self._clean_up, args=(host,), name="pactown-removals")
                self._removals.start()
                self._patrol = asyncio.create_task(succession.watch(), name="pactown-owners")
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with anyio.CancelScope(shield=True):
            await self._close()

    async def _open_in_thread(self, hub: LogHub) -> LoopHost | None:
        self._host = await to_thread.run_sync(self._open, hub)
        return self._host

    def _open(self, hub: LogHub) -> LoopHost | None:
        """Open all that is shared. Without root there may be no place for sandboxes, but there are users and logs."""
        # The first line of a log would wait for it, and the loop with it.
        import structlog  # noqa: F401, PLC0415

        settings = self.settings
        with ExitStack() as held:
            registry = held.enter_context(Registry(settings.state_dir / "registry.db"))
            owner = held.enter_context(Owner(settings.state_dir))
            LogPaths(settings.log_dir, settings.run_dir, "").prepare()
            quick = held.enter_context(Registry(registry.path, waits=False))
            users, standings = Users(settings, registry), Standings(settings, registry)
            if self._role == "server":
                users.check_quotas()
            try:
                tree = open_tree(
                    cgroup_slice=settings.cgroup_slice,
                    state_id=registry.state_id,
                    tenant_limits=standings.tenant_limits,
                )
            except TreeError as error:
                if settings.root_mode:
                    raise
                self._refusal = error
                self.users = SupervisorUsers(users, error)
                self._held.push(held.pop_all())
                return None
            self.users = SupervisorUsers(users, self._refusal)
            held.callback(tree.close)
            threads = held.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="pactown"))
            work = TenantThreads()
            held.callback(work.close)
            self._held.push(held.pop_all())
        raise_descriptor_limit()
        admission = Admission(settings, partial(standings.tier_of, registry=quick))
        registry.sandboxes.index_for(admission.quota)
        return LoopHost(
            settings=settings,
            registry=registry,
            users=users,
            standings=standings,
            tree=tree,
            owner=owner,
            hub=hub,
            log_tenants=LogTenants(settings, self._events.note),
            threads=threads,
            quick=quick,
            events=self._events,
            monitor=Monitor(tree, self._events, settings, threads),
            admission=admission,
            work=work,
            store=self._store,
        )

    async def _close(self) -> None:
        """End everything. A cancellation meanwhile is raised when all is done: what would be left, nobody would see."""
        # From here on nothing can be started.
        host, self._host, self._files = self._host, None, None
        if host is not None:
            self.users.place(None)
        ending = asyncio.ensure_future(self._end_all(host))
        cancelled: asyncio.CancelledError | None = None
        while not ending.done():
            try:
                await asyncio.wait([ending])
            except asyncio.CancelledError as error:
                cancelled = error
        self._held.close()
        self._events.close()
        if host is not None:
            # With the tenants' processes their tracers have ended.
            reap_late(host.unreaped)
        if cancelled is not None:
            raise cancelled
        ending.result()

    def _clean_up(self, host: LoopHost) -> None:
        """Finish what may take long: removals of users, and imports, that were cut short."""
        finish_removals(host, give_up=self._give_up)
        try:
            sweep_fresh_homes(host)
        except (RunnerError, CgroupError, OSError) as error:
            _log.error("cannot remove what an import left: %s", error)

    async def _end_all(self, host: LoopHost | None) -> None:
        if self._patrol is not None:
            self._patrol.cancel()
            await asyncio.wait([self._patrol])
            self._patrol = None
        await self._live.end_all(leave_services=self.settings.on_exit == "leave")
        if self._removals is not None:
            self._give_up.set()
            await to_thread.run_sync(self._removals.join)
        await self._live.gone()
        if host is not None:
            await host.monitor.close()

    def hasten(self) -> None:
        """Let all grace be over, here and now: what was asked to end, or will be, is killed at once."""
        self._live.hasten()

    def events(self) -> EventReader:
        """What happens to users and sandboxes from now on; `async for` reads it, until the supervisor ends.

        A reader that is there before the supervisor is entered also hears of what is adopted and brought back then.
        Any number of readers may read. One that is slow is told by an event of the kind `missed` how many it did not
        get; it holds up nobody.

        Raises:
            TreeError: there is no place for sandboxes here.
        """
        if isinstance(self._refusal, TreeError):
            raise self._refusal
        return self._events.read()

    def listen(self, listener: Listener) -> None:
        """Have a function called on the loop with all that happens, at once: for who counts, and must miss nothing.

        It must be quick, since starts and logs wait for it. What it raises is logged.
        """
        self._listeners.append(listener)

    @property
    def files(self) -> SandboxFiles:
        """Files into and out of sandboxes.

        Raises:
            StateError: the supervisor is not running.
            TreeError: there is no place for sandboxes here.
        """
        if self._files is None:
            raise self._refusal
        return self._files

    # Sandboxes --------------------------------------------------------------------------------------------------

    async def start(self, spec: SandboxSpec) -> Sandbox:
        """Start a service, and return when its program has been executed. Makes the user if there is none.

        While the user's home is exported or imported nothing starts: it waits for the end of that, as do services that
        are to be started again. `Sandbox.stop` ends the wait.

        Raises:
            StartError: the program could not be started; nothing is left of it.
            AlreadyRunningError: this user's service runs, here or under another owner.
            AdmissionError: a cap is reached, the user has started too much of late, or this host has no room for it.
            LimitsError: a limit cannot be enforced on this host.
            AccountError: the user's account could not be made, or is not what it was.
        """
        async with self._begin(spec, "service") as sandbox:
            await sandbox.started()
        return sandbox

    async def run(self, spec: SandboxSpec) -> Outcome:
        """Start a one-shot run, wait for its end, and say how it ended; cancelled, it ends the run first.

        A program that cannot be started is an outcome here, `failed-to-start`; the other errors of `start` are raised.
        """
        try:
            async with self._begin(spec, "run") as sandbox:
                return await sandbox.wait()
        except StartError as error:
            return failed_to_start(error)

    async def start_run(self, spec: SandboxSpec) -> Sandbox:
        """Start a one-shot run as `run` does, and return it as `start` does: to be fed, followed and waited for."""
        async with self._begin(spec, "run") as sandbox:
            await sandbox.started()
        return sandbox

    def get(self, user_id: str, service_id: str) -> Sandbox:
        """The live sandbox of this name.

        Raises:
            NotFoundError: this supervisor has none.
        """
        if (found := self._live.find(user_id, service_id)) is None:
            raise NotFoundError(f"no sandbox {service_id!r} of user {user_id!r} runs here")
        return found

    def list(self, user_id: str | None = None) -> list[Sandbox]:
        """The live sandboxes of this supervisor, or those of one user."""
        return self._live.of(user_id)

    async def stats(
        self, sandboxes: Sequence[Sandbox] | None = None, *, pressure: bool = False
    ) -> dict[tuple[str, str], Stats]:
        """What all live sandboxes of this supervisor, or some of them, use now, by user and service id.

        For many this is much cheaper than to ask each. What is only just being started or ended is left out.

        Args:
            sandboxes: these only, such as `list` gives for one user.
            pressure: read also for how long they waited, which takes up to twice as much time again.

        Raises:
            StateError: the supervisor is not running.
        """
        if self._host is None:
            raise self._refusal
        return await stats_of_all(self._host, self.list() if sandboxes is None else sandboxes, pressure=pressure)

    async def stats_of_users(self, *, pressure: bool = False) -> dict[str, Stats]:
        """What users with live sandboxes of this supervisor use now, all that runs of each taken together.

        Raises:
            StateError: the supervisor is not running.
        """
        if (host := self._host) is None:
            raise self._refusal
        claims = ((sandbox.user_id, sandbox.course.claim) for sandbox in self._live.of())
        keys = {user_id: claim[0] for user_id, claim in claims if claim is not None}

        def read() -> dict[str, Stats]:
            found = {user_id: host.tree.stats(key, pressure=pressure) for user_id, key in keys.items()}
            return {user_id: stats for user_id, stats in found.items() if stats is not None}

        return await host.in_thread(read)

    async def stop(self, user_id: str, service_id: str, grace: float | None = None) -> Outcome:
        """Stop a sandbox, see `Sandbox.stop`.

        Raises:
            NotFoundError: this supervisor has none of this name.
        """
        return await self.get(user_id, service_id).stop(grace)

    async def logs(
        self, user_id: str, service_id: str, *, tail: int | None = None, since: int = 0
    ) -> AsyncGenerator[LogRecord, None]:
        """What a service has printed so far, over all its runs; it need not run.

        Args:
            tail: begin with the last so many records.
            since: begin behind the record of this sequence number.

        Raises:
            NotFoundError: there is no such user.
            SpecError: the service id is malformed.
        """
        check_service_id(service_id)
        user = await self.users.get(user_id)
        if user is None:
            raise NotFoundError(f"there is no user {user_id!r}")
        paths = LogPaths(self.settings.log_dir, self.settings.run_dir, user.key)
        async with aclosing(read_log(paths.log(service_id), tail=tail, since_seq=since)) as records:
            async for record in records:
                yield record

    def _admit(self, spec: SandboxSpec, alive: int) -> None:
        assert self._host is not None
        try:
            self._host.admission.check(spec, alive)
        except AdmissionError as error:
            self._events.note("refused", spec.user_id, spec.service_id, limit=error.limit)
            raise

    @asynccontextmanager
    async def _begin(self, spec: SandboxSpec, kind: Kind) -> AsyncGenerator[Sandbox, None]:
        """Begin a sandbox's life. Whoever is cancelled within leaves nothing of it behind."""
        if kind == "run" and spec.restart.mode != "no":
            raise SpecError("a one-shot run is not restarted", remedy="start it as a service, or without restart")
        if self._host is None:
            raise self._refusal
        while (there := self._live.find(spec.user_id, spec.service_id)) is not None:
            if there.state is not State.CRASH_LOOPING:
                raise AlreadyRunningError(f"service {spec.service_id!r} of user {spec.user_id!r} runs already")
            self._admit(spec, len(self._live) - 1)
            # Somebody tries anew, with another command perhaps: the old one is not to come back.
            await there.course.forget()
            await there.course.end()
            if self._host is None:
                raise self._refusal
        self._admit(spec, len(self._live))
        run = Run(spec, kind, secrets.token_hex(8), time.time())
        sandbox = self._live.begin(self._host, run, "new")
        try:
            yield sandbox
        except asyncio.CancelledError:
            await self._live.abandon(sandbox)
            raise
