"""What sandboxes write: taken without loss, written down as JSON lines, read while it is being written.

`LogPump` is the writing half, one for each run; `read_log` the reading half; a `LogFeed` joins the two
inside a process.
"""

from __future__ import annotations

from .errors import LogError
from .feed import LogFeed
from .hub import LogHub
from .paths import LogPaths
from .pump import LogPump
from .reader import read_log

__all__ = ["LogError", "LogFeed", "LogHub", "LogPaths", "LogPump", "read_log"]
