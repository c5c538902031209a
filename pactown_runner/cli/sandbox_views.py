"""Sandboxes of a server as an operator sees them: lists, numbers and events, for people."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..models import State
from .human import UNKNOWN, duration_of, size_of
from .tables import Grid, coloured, show_pairs
from .visible import one_line

if TYPE_CHECKING:
    from cgroups import Stats

    from ..client import SandboxView
    from ..models import Event
    from ..tiers import Tier

__all__ = [
    "Counted",
    "Rates",
    "event_line",
    "limits_document",
    "limits_shown",
    "list_grid",
    "name_of",
    "show_stats",
    "stats_document",
    "stats_grid",
    "tiers_grid",
]

Counted = Sequence[tuple["SandboxView", "Stats"]]
"""Sandboxes, and what they use."""

_STATES = {
    "running": "green",
    "frozen": "cyan",
    "running, not ready": "yellow",
    "starting": "yellow",
    "stopping": "yellow",
    "backing-off": "yellow",
    "crash-looping": "bold red",
}
_EVENTS = {
    "ready": "green",
    "unhealthy": "red",
    "oom": "red",
    "crash-looping": "red",
    "pressure": "yellow",
    "throttled": "yellow",
    "missed": "magenta",
}
_SIZES = ("memory.", "memory_", "disk_")


def name_of(sandbox: SandboxView) -> str:
    """Whose it is, and which, within a line of ours."""
    return one_line(f"{sandbox.user_id}/{sandbox.service_id}")


# ---- Lists


def list_grid(sandboxes: Sequence[SandboxView]) -> Grid:
    """Which there are, and how they are."""
    now = time.time()
    rows = [
        (
            sandbox.user_id,
            sandbox.service_id,
            _state(sandbox),
            duration_of(int(now - sandbox.started_at)) if sandbox.started_at else UNKNOWN,
            str(sandbox.pid or UNKNOWN),
            str(sandbox.restarts),
            _command(sandbox),
        )
        for sandbox in sandboxes
    ]
    headings = ("user", "service", "state", "age", "pid", "restarts", "command")
    return Grid(headings, rows, _STATES, in_colour=2, cut=True)


def _state(sandbox: SandboxView) -> str:
    waits = sandbox.state == State.RUNNING and not sandbox.ready
    return f"{sandbox.state}, not ready" if waits else str(sandbox.state)


def _command(sandbox: SandboxView) -> str:
    return sandbox.command if isinstance(sandbox.command, str) else shlex.join(sandbox.command)


# ---- Numbers


class Rates:
    """The share of a CPU that each sandbox takes, from one look to the next."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, int]] = {}

    def of(self, run_id: str, cpu_usec: int | None) -> str:
        """Percent of one CPU since the last look; a dash at the first."""
        if cpu_usec is None:
            return UNKNOWN
        now, before = time.monotonic(), self._before.get(run_id)
        self._before[run_id] = now, cpu_usec
        if before is None or now <= before[0]:
            return UNKNOWN
        return f"{(cpu_usec - before[1]) / (now - before[0]) / 10_000:.1f} %"


def stats_grid(counted: Counted, rates: Rates | None = None) -> Grid:
    """What sandboxes use.

    Args:
        rates: for a column with the share of a CPU.
    """
    share = [] if rates is None else ["cpu"]
    headings = ["user", "service", *share, "cpu time", "memory", "peak", "tasks", "read", "written"]
    rows = [
        [
            sandbox.user_id,
            sandbox.service_id,
            *([] if rates is None else [rates.of(sandbox.run_id, stats.cpu_usage_usec)]),
            _time(stats.cpu_usage_usec),
            _of(_size(stats.memory_current), _limit(sandbox, "memory.max")),
            _size(stats.memory_peak),
            _of(_number(stats.pids_current), _limit(sandbox, "pids.max")),
            _size(stats.io_rbytes),
            _size(stats.io_wbytes),
        ]
        for sandbox, stats in counted
    ]
    return Grid(headings, rows, {})


def stats_document(sandbox: SandboxView, stats: Stats) -> dict[str, Any]:
    """As `--json` tells it."""
    return {"user_id": sandbox.user_id, "service_id": sandbox.service_id, **stats.to_dict()}


def show_stats(sandbox: SandboxView, stats: Stats) -> None:
    """Write all that one sandbox uses."""
    pairs = [
        ("user", sandbox.user_id),
        ("service", sandbox.service_id),
        ("state", _state(sandbox)),
        ("memory", _of(_size(stats.memory_current), _limit(sandbox, "memory.max"))),
        ("memory peak", _size(stats.memory_peak)),
        ("swap", _size(stats.memory_swap_current)),
        ("out of memory", _times(stats.oom, "killed", stats.oom_kill)),
        ("CPU time", _cpu(stats)),
        ("throttled", _of(_time(stats.cpu_throttled_usec), _limit(sandbox, "cpu.max"), "by")),
        ("tasks", _of(_number(stats.pids_current), _limit(sandbox, "pids.max"))),
        ("tasks peak", _number(stats.pids_peak)),
        ("read", _size(stats.io_rbytes)),
        ("written", _size(stats.io_wbytes)),
    ]
    pressures = (("memory", stats.memory_pressure), ("a CPU", stats.cpu_pressure), ("disks", stats.io_pressure))
    pairs += [
        (f"waits for {what}", f"{pressure.avg10:g} % of the last 10 s")
        for what, pressure in pressures
        if pressure is not None
    ]
    show_pairs(pairs)


def _size(number: int | None) -> str:
    return UNKNOWN if number is None else size_of(number)


def _number(number: int | None) -> str:
    return UNKNOWN if number is None else str(number)


def _time(usec: int | None) -> str:
    return UNKNOWN if usec is None else duration_of(usec / 1_000_000)


def _times(times: int | None, then: str, number: int | None) -> str:
    if times is None and number is None:
        return UNKNOWN
    return f"{times or 0} times, {number or 0} processes {then}"


def _cpu(stats: Stats) -> str:
    if stats.cpu_usage_usec is None:
        return UNKNOWN
    return (
        f"{_time(stats.cpu_usage_usec)} ({_time(stats.cpu_user_usec)} of its own, "
        f"{_time(stats.cpu_system_usec)} in the kernel)"
    )


def _of(used: str, limit: str | None, word: str = "of") -> str:
    return used if limit is None or used == UNKNOWN else f"{used} {word} {limit}"


def _limit(sandbox: SandboxView, file: str) -> str | None:
    """What the kernel holds it to, for people; None for nothing."""
    value = (sandbox.isolation.limits if sandbox.isolation else {}).get(file)
    return None if value is None or value.startswith("max") else _held(file, value)


# ---- Limits and tiers


def limits_document(sandbox: SandboxView) -> dict[str, Any]:
    """As `--json` tells it."""
    return {
        "user_id": sandbox.user_id,
        "service_id": sandbox.service_id,
        "asked": None if sandbox.limits is None else sandbox.limits.to_dict(),
        "held": dict(sandbox.isolation.limits) if sandbox.isolation else None,
    }


def limits_shown(sandbox: SandboxView) -> list[tuple[str, str]]:
    """What the kernel holds it to, by control file."""
    held: Mapping[str, str] = sandbox.isolation.limits if sandbox.isolation else {}
    return [(file, _held(file, value)) for file, value in held.items()]


def _held(file: str, value: str) -> str:
    if file == "cpu.max":
        quota, _, period = value.partition(" ")
        return value if quota == "max" or not period else f"{int(quota) / int(period):g} cores"
    if file.startswith(_SIZES) and value.isdecimal() and not file.endswith("group"):
        return size_of(int(value))
    return value


def tiers_grid(tiers: Sequence[Tier]) -> Grid:
    """Which there are, and what tenants of each may have."""
    rows = [
        (
            tier.name,
            UNKNOWN if tier.max_sandboxes is None else str(tier.max_sandboxes),
            UNKNOWN if tier.starts_per_hour is None else f"{tier.starts_per_hour:g}",
            _limits(None if tier.default_limits is None else tier.default_limits.to_dict()),
            _limits(_of_tenant(tier)),
        )
        for tier in tiers
    ]
    return Grid(("tier", "sandboxes", "starts per hour", "each sandbox", "the tenant"), rows, {})


def _of_tenant(tier: Tier) -> dict[str, Any]:
    disk = {"disk_max": tier.tenant_disk_max, "inodes_max": tier.tenant_inodes_max}
    held = {} if tier.tenant_limits is None else tier.tenant_limits.to_dict()
    return held | {name: most for name, most in disk.items() if most is not None}


def _limits(limits: Mapping[str, Any] | None) -> str:
    if not limits:
        return UNKNOWN
    return ", ".join(
        f"{name} {size_of(value) if name.startswith(_SIZES) and type(value) is int else value}"
        for name, value in limits.items()
    )


# ---- Events


def event_line(event: Event) -> str:
    """What happened, in a line for people, in colour on a terminal."""
    clock = time.strftime("%H:%M:%S", time.localtime(event.ts))
    who = one_line(event.user_id + ("" if event.service_id is None else f"/{event.service_id}")) or UNKNOWN
    kind = f"{one_line(event.kind):<13}"
    details = one_line(_details(event.details))
    return (
        f"{clock}  {coloured(kind, _EVENTS[event.kind]) if event.kind in _EVENTS else kind}  {who}  {details}".rstrip()
    )


def _details(details: Mapping[str, Any]) -> str:
    words = []
    for name, value in details.items():
        if isinstance(value, Mapping):
            words.append(" ".join(f"{key}={item}" for key, item in value.items()))
        elif name == "message":
            words.append(str(value))
        elif name == "seconds" and isinstance(value, int | float):
            words.append(f"in {duration_of(value)}")
        elif value is not None and not (name == "reason" and "message" in details):
            words.append(f"{name} {value}")
    return ", ".join(words)
