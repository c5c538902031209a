"""What there is to tell at one moment, put into Prometheus' words; `metrics` tells what they mean. For any thread."""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.samples import Sample

from .models import Reason, State
from .release import installed_version
from .tallies import RESOURCES, TENANT, Key, Labels

__all__ = ["GAUGES", "Gauges", "Histogram", "Look", "families"]


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
GAUGES: Final = {
    "memory_current": _Family("memory_bytes", "Memory in use."),
    "memory_swap_current": _Family("memory_swap_bytes", "Swap in use."),
    "pids_current": _Family("pids", "Tasks."),
}

Gauges = Mapping[Labels, Mapping[str, int]]
"""What is in use, by labels, each by the names in `GAUGES`: those of `Stats`."""


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


class Histogram:
    """How often what was seen lay below which bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count what was seen, in the bounds' unit."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, name: str, text: str) -> HistogramMetricFamily:
        """All that was seen so far, under this name, with this text for its help."""
        buckets, below = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._sum)


@dataclass(frozen=True, slots=True)
class Look:
    """What there was to tell at one moment, for another thread to put into words."""

    counts: Sequence[tuple[Labels, Mapping[Key, int]]]
    gauges: Gauges
    sandboxes: Mapping[str, int]
    states: Mapping[State, int]
    refused: Mapping[str, int]
    histograms: Sequence[Metric]


def families(look: Look) -> Iterator[Metric]:
    """All metrics, each made when it is asked for."""
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


def _of_sandboxes(look: Look) -> Iterator[Metric]:
    names = ("user", "service")
    counts = [(labels, counts) for labels, counts in look.counts if labels.service != TENANT]
    gauges = [(labels, values) for labels, values in look.gauges.items() if labels.service != TENANT]
    yield from _counters("pactown_sandbox_", names, {**_EVENTS, **_USED}, counts)
    yield from _in_use("pactown_sandbox_", names, gauges)


def _of_tenants(look: Look) -> Iterator[Metric]:
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
    for name, family in GAUGES.items():
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
