"""What the sandboxes and jobs of one supervisor share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar, TypeVarTuple

from .config import Settings
from .logs import LogHub
from .models import IsolatedUser
from .owners import Owner
from .registry import Registry
from .trees import Tree
from .users import Users

__all__ = ["Host"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True)
class Host:
    """What the sandboxes of one supervisor share."""

    settings: Settings
    registry: Registry
    users: Users
    tree: Tree
    hub: LogHub
    owner: Owner
    threads: ThreadPoolExecutor
    quick: Registry
    """The registry without waiting, for the event loop: what cannot be had at once is left to a thread."""
    known: dict[str, IsolatedUser] = field(default_factory=dict)
    """Users by id, as last seen. That one still is what it was only a claim tells."""
    unreaped: set[int] = field(default_factory=set)
    """Children that have ended, or will, and that another process traces: it decides when they can be reaped."""

    async def in_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Do what may block in one of the supervisor's own threads, which nothing else can keep busy.

        A call that has begun goes on when the caller is cancelled.
        """
        return await asyncio.get_running_loop().run_in_executor(self.threads, call, *args)
