"""What a cgroup has used, read in as few system calls as this kernel and tree allow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

from . import files
from .errors import FormatError, GoneError
from .formats import parse_flat, parse_nested, parse_value

__all__ = ["Pressure", "Stats", "StatsPlan", "parse_pressure", "read_all", "read_ooms", "read_stats"]

K = TypeVar("K")

# Control file -> key within it -> field of `Stats`. The empty key is the file's only value.
_SOURCES: Final[dict[str, dict[str, str]]] = {
    "memory.current": {"": "memory_current"},
    "memory.peak": {"": "memory_peak"},
    "memory.swap.current": {"": "memory_swap_current"},
    "memory.events.local": {
        "oom": "oom",
        "oom_kill": "oom_kill",
        "high": "memory_events_high",
        "max": "memory_events_max",
    },
    "cpu.stat": {
        "usage_usec": "cpu_usage_usec",
        "user_usec": "cpu_user_usec",
        "system_usec": "cpu_system_usec",
        "throttled_usec": "cpu_throttled_usec",
        "nr_throttled": "cpu_nr_throttled",
    },
    "pids.current": {"": "pids_current"},
    "pids.peak": {"": "pids_peak"},
    "pids.events": {"max": "pids_events_max"},
}
_IO: Final = "io.stat"
_IO_FIELDS: Final = {"rbytes": "io_rbytes", "wbytes": "io_wbytes", "rios": "io_rios", "wios": "io_wios"}
_PRESSURES: Final = {
    "memory.pressure": "memory_pressure",
    "cpu.pressure": "cpu_pressure",
    "io.pressure": "io_pressure",
}
_AS_WRITTEN: Final = re.compile(
    r"some avg10=([0-9.]+) avg60=[0-9.]+ avg300=[0-9.]+ total=([0-9]+)\n"
    r"full avg10=([0-9.]+) avg60=[0-9.]+ avg300=[0-9.]+ total=([0-9]+)\n"
)
"""A pressure file as kernels write it so far. The format allows for more, which is read the long way."""


@dataclass(frozen=True, kw_only=True)
class Pressure:
    """How long tasks waited for a resource (psi.rst).

    Attributes:
        avg10: percent of the last ten seconds in which at least one task waited (`some`).
        total_usec: microseconds of that since the cgroup was made.
        full_avg10, full_total_usec: the same for time in which all tasks that were not idle waited at once; None
            where the kernel does not tell.
    """

    avg10: float
    total_usec: int
    full_avg10: float | None = None
    full_total_usec: int | None = None


def parse_pressure(text: str) -> Pressure:
    """Read a pressure file.

    Raises:
        FormatError: it does not read as documented.
    """
    try:
        if usual := _AS_WRITTEN.fullmatch(text):
            avg10, total, full_avg10, full_total = usual.groups()
            return Pressure(
                avg10=float(avg10),
                total_usec=int(total),
                full_avg10=float(full_avg10),
                full_total_usec=int(full_total),
            )
        lines = parse_nested(text)
        some, full = lines["some"], lines.get("full")
        values = {"avg10": float(some["avg10"]), "total_usec": int(some["total"])}
        if full is not None:
            values |= {"full_avg10": float(full["avg10"]), "full_total_usec": int(full["total"])}
        return Pressure(**values)  # type: ignore[arg-type]  # each under its own name
    except (KeyError, ValueError) as error:
        raise FormatError(f"the kernel's answer {text!r} is no pressure", value=text) from error


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A cgroup's counters at one moment. None means that the kernel does not offer it here.

    An unknown is never 0. A value counts the cgroup with its descendants, where nothing else is said.

    Attributes:
        memory_current: bytes in use.
        memory_peak: most bytes that were in use; Linux 5.19 and later.
        memory_swap_current: bytes in swap.
        oom: times that this cgroup itself, not a child or an ancestor, had no memory to give below its own
            limit.
        oom_kill: processes of this cgroup itself that were killed for want of memory, whoever's limit it was.
        memory_events_high: times that this cgroup itself was throttled for being above `memory.high`.
        memory_events_max: times that this cgroup itself was about to go above `memory.max`.
        cpu_usage_usec: microseconds of CPU time used.
        cpu_user_usec: those of them spent in user mode.
        cpu_system_usec: those of them spent in the kernel.
        cpu_throttled_usec: microseconds spent waiting for the quota of `cpu.max`.
        cpu_nr_throttled: periods in which that happened.
        pids_current: tasks.
        pids_peak: most tasks that there were; Linux 6.11 and later.
        pids_events_max: forks that failed for want of a pid: on Linux 6.11 and later those that this cgroup's
            or a descendant's limit forbade, before that those tried in this cgroup.
        io_rbytes, io_wbytes: bytes read from and written to disks; what is still in the page cache, to be written
            back later, is not yet counted.
        io_rios, io_wios: the operations that took.
        memory_pressure: waits for memory, if asked for.
        cpu_pressure: waits for a CPU, if asked for.
        io_pressure: waits for input and output, if asked for.
    """

    memory_current: int | None = None
    memory_peak: int | None = None
    memory_swap_current: int | None = None
    oom: int | None = None
    oom_kill: int | None = None
    memory_events_high: int | None = None
    memory_events_max: int | None = None
    cpu_usage_usec: int | None = None
    cpu_user_usec: int | None = None
    cpu_system_usec: int | None = None
    cpu_throttled_usec: int | None = None
    cpu_nr_throttled: int | None = None
    pids_current: int | None = None
    pids_peak: int | None = None
    pids_events_max: int | None = None
    io_rbytes: int | None = None
    io_wbytes: int | None = None
    io_rios: int | None = None
    io_wios: int | None = None
    memory_pressure: Pressure | None = None
    cpu_pressure: Pressure | None = None
    io_pressure: Pressure | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serializable dictionary, None included."""
        return asdict(self)


class StatsPlan:
    """Which files exist, learnt once for each set of controllers and then kept. One serves a whole tree.

    Cgroups of one tree may have different controllers enabled, and those with the same ones have the same
    files.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, ...]] = {}

    def files(self, dir_fd: int) -> tuple[str, ...]:
        """The files to read for this cgroup."""
        # No key by descriptor or name: both are used again, and a parent's `subtree_control` can change.
        key = files.read(dir_fd, "cgroup.controllers")
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = tuple(name for name in (*_SOURCES, _IO) if files.exists(dir_fd, name))
        return known


def read_stats(dir_fd: int, plan: StatsPlan | None = None, *, pressure: bool = False) -> Stats:
    """Read a cgroup's counters; those of pressure only if asked for.

    With a `plan` that has seen a cgroup like this one, only files that exist are opened. Each costs some 5
    microseconds, most of which the kernel takes to open it.

    Raises:
        GoneError: the cgroup was removed.
        FormatError: a file does not read as documented.
    """
    values: dict[str, Any] = {}
    for name in (plan or StatsPlan()).files(dir_fd):
        text = files.read_optional(dir_fd, name)
        if text is not None:
            _take(name, text, values)
    if pressure:
        values |= _read_pressures(dir_fd)
    return Stats(**values)


def read_all(
    cgroups: Mapping[K, int], plan: StatsPlan | None = None, *, pressure: bool = False
) -> dict[K, Stats | None]:
    """Read the counters of many cgroups as `read_stats` does; None for one that was removed.

    Args:
        cgroups: their directories' descriptors, by whatever the caller calls them. None may be closed meanwhile: its
            number could come to stand for another cgroup. For a reader in another thread they are duplicates.

    Raises:
        CgroupError: one that is there cannot be read.
    """
    plan = plan or StatsPlan()
    found: dict[K, Stats | None] = {}
    for name, dir_fd in cgroups.items():
        try:
            found[name] = read_stats(dir_fd, plan, pressure=pressure)
        except GoneError:
            found[name] = None
    return found


def read_ooms(dir_fd: int) -> int | None:
    """How often this cgroup itself had no memory to give below its own limit; None where memory is not counted.

    Raises:
        GoneError: the cgroup was removed.
    """
    text = files.read_optional(dir_fd, "memory.events.local")
    return None if text is None else parse_flat(text).get("oom")


def _take(name: str, text: str, values: dict[str, int]) -> None:
    if name == _IO:
        _take_io(text, values)
        return
    wanted = _SOURCES[name]
    if "" in wanted:
        value = parse_value(text)
        if value != "max":
            values[wanted[""]] = value
        return
    found = parse_flat(text)
    for key, field in wanted.items():
        if key in found:
            values[field] = found[key]


def _take_io(text: str, values: dict[str, int]) -> None:
    values |= dict.fromkeys(_IO_FIELDS.values(), 0)  # no line at all: no disk was used
    for disk in parse_nested(text).values():
        for key, field in _IO_FIELDS.items():
            values[field] += int(disk.get(key, 0))


def _read_pressures(dir_fd: int) -> Mapping[str, Pressure]:
    result = {}
    for name, field in _PRESSURES.items():
        if text := files.read_optional(dir_fd, name):
            result[field] = parse_pressure(text)
    return result
