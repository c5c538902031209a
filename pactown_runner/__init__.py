"""Run other people's code on your own Linux machine, safely, from async Python.

`docs/architecture.md` tells the one idea: a sandbox is a cgroup, and its name is a path.
"""

from cgroups import Limits, Stats

from .config import Settings
from .errors import RunnerError
from .models import IsolatedUser, IsolationReport, LogRecord, Outcome, State
from .sandbox import Sandbox
from .specs import SandboxSpec
from .supervisor import Supervisor

__all__ = [
    "IsolatedUser",
    "IsolationReport",
    "Limits",
    "LogRecord",
    "Outcome",
    "RunnerError",
    "Sandbox",
    "SandboxSpec",
    "Settings",
    "State",
    "Stats",
    "Supervisor",
]
