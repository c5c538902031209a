"""What sandboxes write: taken without loss, written down as JSON lines, read while it is being written.

`LogPump` is the writing half, one for each run; `read_log` the reading half; a `LogFeed` joins the two
inside a process. `LogTenants` holds what one tenant's pumps share: how much it may print, and how much is kept.
"""

from __future__ import annotations

from .errors import LogError
from .feed import LogFeed
from .hub import LogHub
from .limits import LogLimits
from .paths import LogPaths, fifo_runs
from .pump import LogPump
from .reader import read_log
from .tenant import LogTenants, TenantLogs

__all__ = [
    "LogError",
    "LogFeed",
    "LogHub",
    "LogLimits",
    "LogPaths",
    "LogPump",
    "LogTenants",
    "TenantLogs",
    "fifo_runs",
    "read_log",
]
