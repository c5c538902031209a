"""Metrics for Prometheus (extra `api`): what a supervisor's sandboxes do and use, and how the supervisor is.

    async with Supervisor() as supervisor:
        metrics = Metrics(supervisor)
        async with metrics.watching():
            ...  # expose `metrics.registry`, or answer requests with `await metrics.render()`

Events are counted from the moment at which `Metrics` is made, in a place that can miss none; what a sandbox had used
before is not counted, but for tenants, whose counters are the kernel's for their slices. A value that this host does
not have is left out: on a host without the controllers memory, pids and io, what they count.

By sandbox, with the labels `user` (the SaaS user's id) and `service`. The settings `metrics_services_max` and
`metrics_users_max` bound how many there are: beyond them the services that have used the least CPU time go together as
`service="_other"` of their user, and so do users that there is no room for, with an empty `user`. With
`metrics_services_max = 0` there is `_other` only.

    pactown_sandbox_starts_total                        programs executed, restarts included
    pactown_sandbox_restarts_total                      those of them that were restarts
    pactown_sandbox_adoptions_total                     sandboxes taken over running from another supervisor
    pactown_sandbox_ends_total{reason}                  runs that ended: exited, signaled, oom-killed, timed-out,
                                                        unhealthy, stopped, failed-to-start, lost
    pactown_sandbox_crash_loops_total                   times that a service was given up for failing too often
    pactown_sandbox_unhealthy_total                     times that a probe failed
    pactown_sandbox_oom_kills_total{level}              processes killed for want of memory, by whose limit it was:
                                                        service, tenant, unknown
    pactown_sandbox_log_lines_total                     lines written to logs
    pactown_sandbox_log_bytes_total                     bytes that were, as the program printed them
    pactown_sandbox_log_dropped_lines_total             lines that a tenant's rate limit dropped
    pactown_sandbox_log_dropped_bytes_total             bytes of them
    pactown_sandbox_cpu_seconds_total                   CPU time
    pactown_sandbox_cpu_throttled_seconds_total         time for which `cpu_max` held it back
    pactown_sandbox_cpu_throttled_periods_total         periods in which it did
    pactown_sandbox_forks_refused_total                 forks that `pids_max` forbade
    pactown_sandbox_io_read_bytes_total                 bytes read from disks
    pactown_sandbox_io_written_bytes_total              bytes written to disks
    pactown_sandbox_pressure_waiting_seconds_total{resource}    time in which some task waited for cpu, io, memory (PSI)
    pactown_sandbox_pressure_stalled_seconds_total{resource}    time in which all did
    pactown_sandbox_memory_bytes                        memory in use
    pactown_sandbox_memory_swap_bytes                   swap in use
    pactown_sandbox_pids                                tasks

By tenant, with the label `user`, all of its sandboxes and the runner's work for it taken together:

    pactown_tenant_sandboxes                            sandboxes that are alive
    pactown_tenant_memory_bytes, pactown_tenant_memory_swap_bytes, pactown_tenant_pids      as above
    pactown_tenant_cpu_seconds_total, pactown_tenant_cpu_throttled_seconds_total, ...       as above, up to io
    pactown_tenant_pressure_waiting_seconds_total{resource}, ..._stalled_seconds_total{resource}

Of the supervisor:

    pactown_sandboxes{state}                            sandboxes that are alive, by their state
    pactown_spawn_seconds                               histogram: from a start to the program's execution
    pactown_admission_refusals_total{limit}             starts that were refused, by the setting that forbade them
    pactown_event_loop_delay_seconds                    histogram: how late the event loop was
    pactown_build_info{version,python}                  1
    process_*                                           the process's own CPU time, memory and descriptors
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from anyio import to_thread
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from cgroups import CgroupError, Stats

from .errors import RunnerError
from .events import NoteKind
from .exposition import GAUGES, Gauges, Histogram, Look, families
from .models import EventKind
from .sandbox import Sandbox
from .supervisor import Supervisor
from .tallies import TENANT, Labels, Tallies, used

__all__ = ["MEDIA_TYPE", "Metrics"]

_log = logging.getLogger(__name__)

MEDIA_TYPE = CONTENT_TYPE_LATEST
"""Of what `Metrics.render` gives."""

LOOK_SECONDS = 0.1
"""Between two looks at how late the loop is."""

PATIENCE_SECONDS = 30.0
"""In which the loop must have answered another thread. It takes milliseconds."""

BATCH = 100
"""Sandboxes whose numbers are read and added up before everything else on the loop gets its turn."""

SPAWN_BOUNDS = (0.001, 0.0015, 0.002, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
DELAY_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics(Collector):
    """What a supervisor does, counted; see the module.

    Make it on the supervisor's event loop, or before that runs; once for each supervisor.

    Args:
        supervisor: it may not run yet.

    Attributes:
        registry: holds these metrics and no others. Collecting it in another thread than the loop's looks at all
            sandboxes; on the loop itself, which cannot wait for that, what was in use when it was looked at last.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        settings = supervisor.settings
        self._supervisor = supervisor
        self._tallies = Tallies(settings.metrics_services_max, settings.metrics_users_max)
        self._spawns = Histogram(SPAWN_BOUNDS)
        self._delays = Histogram(DELAY_BOUNDS)
        self._gauges: Gauges = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = asyncio.Lock()
        self._rendering = asyncio.Lock()
        with suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
        for sandbox in supervisor.list():
            self._tallies.begin_with(sandbox.user_id, sandbox.service_id, sandbox.run_id)
        supervisor.listen(self._hear)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def _hear(
        self,
        kind: EventKind | NoteKind,
        user_id: str,
        service_id: str | None,
        run_id: str | None,
        details: Mapping[str, Any],
    ) -> None:
        if kind in ("started", "restarted"):
            self._spawns.observe(details["seconds"])
        self._tallies.hear(kind, user_id, service_id, run_id, details, now=time.monotonic())

    # The loop ---------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None, None]:
        """See how late the event loop is, for as long as the block lasts."""
        self._loop = asyncio.get_running_loop()
        watch = asyncio.create_task(self._watch(), name="pactown-loop-delay")
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.wait([watch])

    async def _watch(self) -> None:
        while True:
            due = time.monotonic() + LOOK_SECONDS
            await asyncio.sleep(LOOK_SECONDS)
            self._delays.observe(max(0.0, time.monotonic() - due))

    # Looking ----------------------------------------------------------------------------------------------------

    async def render(self) -> bytes:
        """All metrics in Prometheus' text format, read now. To be called on the supervisor's loop, which it holds not.

        Those who ask at the same time wait for each other.
        """
        self._loop = asyncio.get_running_loop()
        async with self._rendering:
            return await to_thread.run_sync(generate_latest, self.registry)

    def collect(self) -> Iterator[Metric]:
        """See `registry`."""
        loop = self._loop
        if loop is None or not loop.is_running() or _running_loop() is loop:
            look = self._look()
        else:
            look = asyncio.run_coroutine_threadsafe(self._look_anew(), loop).result(PATIENCE_SECONDS)
        yield from families(look)

    async def _look_anew(self) -> Look:
        async with self._turn:
            supervisor, gauges = self._supervisor, defaultdict[Labels, dict[str, int]](dict)
            sandboxes = supervisor.list()
            try:
                # In parts, each of which is forgotten before the next one: see `exposition`, of samples.
                for first in range(0, len(sandboxes), BATCH):
                    await self._look_at(sandboxes[first : first + BATCH], gauges)
                tenants = await supervisor.stats_of_users(pressure=True)
            except (RunnerError, CgroupError) as error:
                _log.warning("what sandboxes use cannot be told: %s", error)
                tenants = {}
            for user_id, stats in tenants.items():
                self._use(user_id, TENANT, None, stats, gauges)
            self._gauges = gauges
            look = self._look()
            live = {(sandbox.user_id, sandbox.service_id) for sandbox in sandboxes}
            self._tallies.tidy(live | {(user_id, TENANT) for user_id in tenants}, time.monotonic())
            return look

    async def _look_at(self, sandboxes: Sequence[Sandbox], gauges: Mapping[Labels, dict[str, int]]) -> None:
        runs = [(sandbox, sandbox.run_id) for sandbox in sandboxes]
        found = await self._supervisor.stats(sandboxes, pressure=True)
        for sandbox, run_id in runs:
            name = (sandbox.user_id, sandbox.service_id)
            # What has ended meanwhile has told all that it used, and so will what is just ending.
            if name in found and sandbox.run_id == run_id and sandbox.cgroup is not None:
                self._use(*name, run_id, found[name], gauges)

    def _use(
        self, user_id: str, service_id: str, run_id: str | None, stats: Stats, gauges: Mapping[Labels, dict[str, int]]
    ) -> None:
        gauge = gauges[self._tallies.use(user_id, service_id, run_id, used(stats))]
        for name in GAUGES:
            if (value := getattr(stats, name)) is not None:
                gauge[name] = gauge.get(name, 0) + value

    def _look(self) -> Look:
        tallies, sandboxes = self._tallies, self._supervisor.list()
        return Look(
            counts=[(labels, dict(counts)) for labels, counts in tallies.counts.items()],
            gauges=self._gauges,
            sandboxes=Counter(tallies.user_label(sandbox.user_id) for sandbox in sandboxes),
            states=Counter(sandbox.state for sandbox in sandboxes),
            refused=dict(tallies.refused),
            histograms=(
                self._spawns.family("pactown_spawn_seconds", "From a start to its program's execution."),
                self._delays.family("pactown_event_loop_delay_seconds", "How late the event loop was."),
            ),
        )


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
