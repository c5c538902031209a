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
from .formats import MAX, CpuQuota, Max, format_bytes, parse_bytes, parse_cpu
from .limits import Limits
from .stats import Pressure, Stats, StatsPlan, read_stats

__all__ = [
    "MAX",
    "BusyError",
    "CgroupError",
    "CpuQuota",
    "ExistsError",
    "FormatError",
    "FrozenTimeoutError",
    "GoneError",
    "LimitRefusedError",
    "Limits",
    "Max",
    "NotSupportedError",
    "Pressure",
    "Stats",
    "StatsPlan",
    "WaitTimeoutError",
    "format_bytes",
    "parse_bytes",
    "parse_cpu",
    "read_stats",
]
