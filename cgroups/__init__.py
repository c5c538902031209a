"""Linux control groups, version 2: limits, counters, kill, freeze and events of one directory.

Standard library only, synchronous, and it logs nothing. The words are the kernel's; its
`Documentation/admin-guide/cgroup-v2.rst` explains them.
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
from .events import Events, Watch, read_events
from .formats import MAX, CpuQuota, Max, format_bytes, parse_bytes, parse_cpu
from .group import Cgroup
from .limits import Limits
from .stats import Pressure, Stats, StatsPlan, read_stats
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
    "LimitRefusedError",
    "Limits",
    "Max",
    "Mount",
    "NotSupportedError",
    "Pressure",
    "Stats",
    "StatsPlan",
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
    "read_events",
    "read_stats",
]
