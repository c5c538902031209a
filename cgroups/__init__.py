"""Linux control groups, version 2: limits, counters, kill, freeze and events of one directory.

Standard library only, synchronous, and it logs nothing. The words are the kernel's; its
`Documentation/admin-guide/cgroup-v2.rst` explains them.

    with Cgroup.open(find_mount().path) as top, top.child("job.scope", create=True) as job:
        job.apply(Limits(memory_max="256M", cpu_max=0.5, pids_max=64))
        ...  # start something in it, by `clone3(CLONE_INTO_CGROUP)` with `job.fd`
        job.kill()
        job.wait_empty()
        print(job.stats())
        job.remove()
"""

from .errors import (
    BusyError,
    CgroupError,
    ExistsError,
    FormatError,
    FrozenTimeoutError,
    GoneError,
    LimitRefusedError,
    NotSupportedError,
    WaitTimeoutError,
)
from .events import Events, MemoryEvents, Watch, read_events
from .formats import MAX, CpuQuota, Max, format_bytes, parse_bytes, parse_cpu
from .group import Cgroup
from .io_limits import IoMax
from .limits import Limits
from .pressure import PressureTrigger, PressureWatch
from .stats import Pressure, Stats, StatsPlan, read_all, read_stats
from .throttling import Throttled, read_throttled
from .tree import Mount, available_controllers, delegated, find_mount, own_directory, own_path

__all__ = [
    "MAX",
    "BusyError",
    "Cgroup",
    "CgroupError",
    "CpuQuota",
    "Events",
    "ExistsError",
    "FormatError",
    "FrozenTimeoutError",
    "GoneError",
    "IoMax",
    "LimitRefusedError",
    "Limits",
    "Max",
    "MemoryEvents",
    "Mount",
    "NotSupportedError",
    "Pressure",
    "PressureTrigger",
    "PressureWatch",
    "Stats",
    "StatsPlan",
    "Throttled",
    "WaitTimeoutError",
    "Watch",
    "available_controllers",
    "delegated",
    "find_mount",
    "format_bytes",
    "own_directory",
    "own_path",
    "parse_bytes",
    "parse_cpu",
    "read_all",
    "read_events",
    "read_stats",
    "read_throttled",
]
