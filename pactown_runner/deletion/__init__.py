"""Deleting users: everything that carries a uid is ended and swept, whoever left it where.

`removal` is the order of things, and what makes it repeatable. `traces` removes what a uid leaves on a host, by
means of `processes`, `kernel_objects` and `spools`, which know one kind each, and of a program that runs as the tenant.
"""

from __future__ import annotations

from .removal import delete_user, finish_removals
from .traces import RunAs, remove_homes, sweep

__all__ = ["RunAs", "delete_user", "finish_removals", "remove_homes", "sweep"]
