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
import platform
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, get_args

from anyio import to_thread
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from cgroups import CgroupError, Stats

from .errors import RunnerError
from .events import NoteKind
from .models import EventKind, Reason, State
from .release import installed_version
from .sandbox import Sandbox
from .supervisor import Supervisor
from .tallies import RESOURCES, TENANT, Key, Labels, Tallies, used

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


class _Family(NamedTuple):
    """A metric of sandboxes; `kind` is its further label, and `scale` what one of what is counted comes to."""

    name: str
    help: str
    kind: str | None = None
    kinds: Sequence[str] = ()
    scale: float = 1


_USEC: Final = 1e-6
_LEVELS: Final = ("service", "tenant", "unknown")
_EVENTS: Final[dict[str, _Family]] = {
    "starts": _Family("starts", "Programs executed, restarts included."),
    "restarts": _Family("restarts", "Programs executed again, by a restart policy or on demand."),
    "adoptions": _Family("adoptions", "Sandboxes taken over running from another supervisor."),
    "ends": _Family("ends", "Runs that ended, by how they did.", "reason", get_args(Reason)),
    "crash_loops": _Family("crash_loops", "Times that a service was given up for failing too often."),
    "unhealthy": _Family("unhealthy", "Times that a probe failed."),
    "ooms": _Family("oom_kills", "Processes killed for want of memory, by whose limit it was.", "level", _LEVELS),
    "log_lines": _Family("log_lines", "Lines written to logs."),
    "log_bytes": _Family("log_bytes", "Bytes written to logs, as they were printed."),
    "log_dropped_lines": _Family("log_dropped_lines", "Lines that the rate limit of logs dropped."),
    "log_dropped_bytes": _Family("log_dropped_bytes", "Bytes that the rate limit of logs dropped."),
}
_USED: Final[dict[str, _Family]] = {
    "cpu": _Family("cpu_seconds", "CPU time used.", scale=_USEC),
    "throttled": _Family("cpu_throttled_seconds", "Time spent waiting for the quota of cpu_max.", scale=_USEC),
    "throttled_periods": _Family("cpu_throttled_periods", "Periods in which the quota of cpu_max was used up."),
    "forks_refused": _Family("forks_refused", "Forks that pids_max forbade."),
    "io_read": _Family("io_read_bytes", "Bytes read from disks."),
    "io_written": _Family("io_written_bytes", "Bytes written to disks."),
    "waiting": _Family("pressure_waiting_seconds", "Time in which a task waited (PSI).", "resource", RESOURCES, _USEC),
    "stalled": _Family(
        "pressure_stalled_seconds", "Time in which all tasks waited (PSI).", "resource", RESOURCES, _USEC
    ),
}
_GAUGES: Final = {
    "memory_current": _Family("memory_bytes", "Memory in use."),
    "memory_swap_current": _Family("memory_swap_bytes", "Swap in use."),
    "pids_current": _Family("pids", "Tasks."),
}

Gauges = Mapping[Labels, Mapping[str, int]]


class _Samples(list[Sample]):
    """The samples of a metric, made when they are asked for, of which one is there at a time.

    All at once, and there may be 50,000, would have Python look through the whole heap for garbage again and again, and
    the loop wait for that.
    """

    def __init__(self, make: Callable[[], Iterator[Sample]]) -> None:
        super().__init__()
        self._make = make

    def __iter__(self) -> Iterator[Sample]:
        return self._make()


class _Histogram:
    """How often what was seen lay below which bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        buckets, below = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._sum)


@dataclass(frozen=True, slots=True)
class _Look:
    """What there was to tell at one moment, for another thread to put into words."""

    counts: Sequence[tuple[Labels, Mapping[Key, int]]]
    gauges: Gauges
    sandboxes: Mapping[str, int]
    states: Mapping[State, int]
    refused: Mapping[str, int]
    histograms: Sequence[Metric]


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
        self._spawns = _Histogram(SPAWN_BOUNDS)
        self._delays = _Histogram(DELAY_BOUNDS)
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
        yield from _families(look)

    async def _look_anew(self) -> _Look:
        async with self._turn:
            supervisor, gauges = self._supervisor, defaultdict[Labels, dict[str, int]](dict)
            sandboxes = supervisor.list()
            try:
                # In parts, each of which is forgotten before the next one: see `_Samples`.
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
        for name in _GAUGES:
            if (value := getattr(stats, name)) is not None:
                gauge[name] = gauge.get(name, 0) + value

    def _look(self) -> _Look:
        tallies, sandboxes = self._tallies, self._supervisor.list()
        return _Look(
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


# In words ----------------------------------------------------------------------------------------------------------


def _families(look: _Look) -> Iterator[Metric]:
    yield _build()
    yield from look.histograms
    states = GaugeMetricFamily("pactown_sandboxes", "Sandboxes that are alive, by their state.", labels=["state"])
    for state in State:
        if state is not State.ENDED:
            states.add_metric([state.value], look.states.get(state, 0))
    yield states
    refused = CounterMetricFamily("pactown_admission_refusals", "Starts that were refused.", labels=["limit"])
    for limit, count in look.refused.items():
        refused.add_metric([limit], count)
    yield refused
    alive = GaugeMetricFamily("pactown_tenant_sandboxes", "Sandboxes that are alive.", labels=["user"])
    for user, count in look.sandboxes.items():
        alive.add_metric([user], count)
    yield alive
    yield from _of_sandboxes(look)
    yield from _of_tenants(look)


def _of_sandboxes(look: _Look) -> Iterator[Metric]:
    names = ("user", "service")
    counts = [(labels, counts) for labels, counts in look.counts if labels.service != TENANT]
    gauges = [(labels, values) for labels, values in look.gauges.items() if labels.service != TENANT]
    yield from _counters("pactown_sandbox_", names, {**_EVENTS, **_USED}, counts)
    yield from _in_use("pactown_sandbox_", names, gauges)


def _of_tenants(look: _Look) -> Iterator[Metric]:
    names = ("user",)
    counts = [(labels[:1], counts) for labels, counts in look.counts if labels.service == TENANT]
    gauges = [(labels[:1], values) for labels, values in look.gauges.items() if labels.service == TENANT]
    yield from _counters("pactown_tenant_", names, _USED, counts)
    yield from _in_use("pactown_tenant_", names, gauges)


def _counters(
    prefix: str,
    names: Sequence[str],
    families: Mapping[str, _Family],
    counts: Sequence[tuple[Sequence[str], Mapping[Key, int]]],
) -> Iterator[Metric]:
    for name, family in families.items():
        metric = CounterMetricFamily(prefix + family.name, family.help)
        metric.samples = _Samples(partial(_counted, f"{metric.name}_total", names, name, family, counts))
        yield metric


def _counted(
    full_name: str,
    names: Sequence[str],
    name: str,
    family: _Family,
    counts: Sequence[tuple[Sequence[str], Mapping[Key, int]]],
) -> Iterator[Sample]:
    keys: list[tuple[Key, dict[str, str]]] = [(name, {})]
    if family.kind is not None:
        keys = [(f"{name} {kind}", {family.kind: kind}) for kind in family.kinds]
    for labels, values in counts:
        for key, further in keys:
            if (value := values.get(key)) is not None:
                yield Sample(full_name, {**dict(zip(names, labels, strict=True)), **further}, value * family.scale)


def _in_use(
    prefix: str, names: Sequence[str], gauges: Sequence[tuple[Sequence[str], Mapping[str, int]]]
) -> Iterator[Metric]:
    for name, family in _GAUGES.items():
        metric = GaugeMetricFamily(prefix + family.name, family.help)
        metric.samples = _Samples(partial(_used_now, metric.name, names, name, gauges))
        yield metric


def _used_now(
    full_name: str,
    names: Sequence[str],
    name: str,
    gauges: Sequence[tuple[Sequence[str], Mapping[str, int]]],
) -> Iterator[Sample]:
    for labels, values in gauges:
        if name in values:
            yield Sample(full_name, dict(zip(names, labels, strict=True)), values[name])


def _build() -> Metric:
    build = GaugeMetricFamily("pactown_build_info", "What runs here; always 1.", labels=["version", "python"])
    build.add_metric([installed_version() or "0", platform.python_version()], 1)
    return build
