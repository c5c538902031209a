"""Run other people's code on your own Linux machine, safely, from async Python.

`docs/architecture.md` tells the one idea: a sandbox is a cgroup, and its name is a path.

What is named here is imported when it is first used, so that whoever wants a part of it waits for that part only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cgroups import Limits, Stats

    from .client import Client
    from .config import Settings
    from .errors import RunnerError
    from .execution import Execution
    from .isolation import UserIsolationManager, get_isolation_manager
    from .models import Event, IsolatedUser, IsolationReport, LogRecord, Outcome, State
    from .sandbox import Sandbox
    from .specs import Probe, RestartPolicy, SandboxSpec
    from .supervisor import Supervisor

__all__ = [
    "Client",
    "Event",
    "Execution",
    "IsolatedUser",
    "IsolationReport",
    "Limits",
    "LogRecord",
    "Outcome",
    "Probe",
    "RestartPolicy",
    "RunnerError",
    "Sandbox",
    "SandboxSpec",
    "Settings",
    "State",
    "Stats",
    "Supervisor",
    "UserIsolationManager",
    "get_isolation_manager",
]

_MODULES = {
    "Client": ".client",
    "Event": ".models",
    "Execution": ".execution",
    "IsolatedUser": ".models",
    "IsolationReport": ".models",
    "Limits": "cgroups",
    "LogRecord": ".models",
    "Outcome": ".models",
    "Probe": ".specs",
    "RestartPolicy": ".specs",
    "RunnerError": ".errors",
    "Sandbox": ".sandbox",
    "SandboxSpec": ".specs",
    "Settings": ".config",
    "State": ".models",
    "Stats": "cgroups",
    "Supervisor": ".supervisor",
    "UserIsolationManager": ".isolation",
    "get_isolation_manager": ".isolation",
}

if not TYPE_CHECKING:  # a type checker would take every other name for one of ours, too

    def __getattr__(name):
        """Import a public name, https://peps.python.org/pep-0562; from then on it is an ordinary one."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
