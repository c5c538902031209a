"""What dead owners left: the registry's rows joined with the live cgroups.

A row is written before anything of a sandbox is made and deleted after all of it is gone. So whatever bears this
state's mark without a row is nobody's, and whatever has a row whose owner is dead waits for a new owner. Several
processes may come for it at once; the registry's compare-and-swap gives it to one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from cgroups import Cgroup, GoneError

from .host import Host
from .logs import LogPaths, LogPump
from .registry import SandboxRow
from .trees import Scope, slice_name

__all__ = ["Found", "claim_left_behind", "end_left_behind", "sweep"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What a dead owner answered for and we answer for now.

    Attributes:
        row: its row in the registry.
        scope: its cgroup, if there is one and something runs in it.
    """

    row: SandboxRow
    scope: Scope | None


def claim_left_behind(host: Host, *, services: bool) -> list[Found]:
    """Become the owner of what dead owners left; blocking.

    Args:
        services: take services too, not only one-shot runs. Who will not stay to look after them leaves them alone.
    """
    rows = [row for row in host.registry.rows() if row.owner != host.owner.owner_id and (services or row.kind == "run")]
    alive = {owner: host.owner.alive(owner) for owner in {row.owner for row in rows}}
    left = [row for row in rows if not alive[row.owner]]
    if not left:
        return []
    scopes = {(scope.slice_name, scope.name): scope for scope in host.tree.scopes()}
    found = []
    for row in left:
        if host.registry.take_over(row.key, row.service_id, row.run_id, row.owner, host.owner.owner_id):
            scope = scopes.get((slice_name(row.key), f"{row.service_id}.scope"))
            found.append(Found(row, scope if scope and _is_live(host, scope, row.run_id) else None))
    return found


async def end_left_behind(host: Host, found: Found) -> None:
    """Kill what still runs of it, write down what it had printed, and give its name free."""
    row = found.row
    await host.in_thread(_empty, host, slice_name(row.key), f"{row.service_id}.scope")
    paths = LogPaths(host.settings.log_dir, host.settings.run_dir, row.key)
    if (row.service_id, row.run_id) in await host.in_thread(paths.leftovers):
        user_id = host.registry.key_holder(row.key) or ""
        pump = LogPump(
            paths=paths, user_id=user_id, service_id=row.service_id, run_id=row.run_id, uid=-1, gid=-1, hub=host.hub
        )
        await host.in_thread(lambda: pump.adopt(alive=False))
        await pump.finish()
    await host.in_thread(host.registry.release, row.key, row.service_id, row.run_id)


def sweep(host: Host) -> list[str]:
    """Empty and remove scopes that bear our state's mark and have no row; blocking. Returns their paths."""
    # In this order: a row is there before its scope, so a scope without one is not about to get one.
    scopes = list(host.tree.scopes())
    known = {(slice_name(row.key), f"{row.service_id}.scope") for row in host.registry.rows()}
    swept = []
    for scope in scopes:
        if (scope.slice_name, scope.name) not in known and _empty(host, scope.slice_name, scope.name):
            swept.append(f"{scope.slice_name}/{scope.name}")
            _log.warning("removed the cgroup %s/%s, which no record names", scope.slice_name, scope.name)
    return swept


def _is_live(host: Host, scope: Scope, run_id: str) -> bool:
    if scope.run_id != run_id:
        return False
    for group in _opened(host, scope.slice_name, scope.name):
        return group.populated()
    return False


def _empty(host: Host, slice_: str, name: str) -> bool:
    for group in _opened(host, slice_, name):
        group.kill()
        group.wait_empty()
        group.remove()
        return True
    return False


def _opened(host: Host, slice_: str, name: str) -> Iterator[Cgroup]:
    """The scope, or nothing if it is not there."""
    try:
        group = host.tree.open_scope(slice_, name)
    except GoneError:
        return
    with group:
        yield group
