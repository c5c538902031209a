"""The launcher: the only place where privileges go away.

`launch.c` is the program and says how it works; `spec` is what it is told, `status` what it answers, `call` and
`start` what starts it, and `build` compiles it.
"""

from __future__ import annotations

from .call import Call, launcher_path
from .spec import DEFAULT_PATH, DEFAULT_RLIMITS, Directory, LaunchSpec, Rlimit
from .start import START_TIMEOUT, Started, launch_async, launch_popen
from .status import STEPS, Failure, Launched, StatusReader, report_from, start_error

__all__ = [
    "DEFAULT_PATH",
    "DEFAULT_RLIMITS",
    "START_TIMEOUT",
    "STEPS",
    "Call",
    "Directory",
    "Failure",
    "LaunchSpec",
    "Launched",
    "Rlimit",
    "Started",
    "StatusReader",
    "launch_async",
    "launch_popen",
    "launcher_path",
    "report_from",
    "start_error",
]
