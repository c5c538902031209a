"""Who is watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cgroups import Cgroup

__all__ = ["Tenant", "Wake", "Watched"]

Wake = Callable[[float], None]
"""Tells when, on the clock of `time.monotonic`, there will be something to do."""


@dataclass(slots=True, eq=False)
class Tenant:
    """A tenant of whom sandboxes are watched.

    Attributes:
        key: names its slice.
        user_id: the SaaS user's id.
        sandboxes: how many.
    """

    key: str
    user_id: str
    sandboxes: int = 0


@dataclass(slots=True, eq=False)
class Watched:
    """A sandbox that is watched.

    Attributes:
        tenant: whose it is.
        service_id, run_id: which it is.
        cgroup: its scope, open for as long as it is watched.
        adopted: whether it ran before it was watched.
    """

    tenant: Tenant
    service_id: str
    run_id: str
    cgroup: Cgroup
    adopted: bool
