"""What dead owners left: the registry's rows joined with the live cgroups.

A row is written before anything of a sandbox is made and deleted after all of it is gone. So whatever bears this
state's mark without a row is nobody's, and whatever has a row whose owner is dead waits for a new owner. Several
processes may come for it at once; the registry's compare-and-swap gives it to one.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from cgroups import CgroupError, GoneError

from .archives import end_hold
from .errors import AlreadyRunningError, BlockedError, NotFoundError, RunnerError
from .host import Claim, LoopHost
from .logs import LogError, LogPaths, LogPump, fifo_runs
from .registry import HOLD, HeldError, SandboxRow
from .trees import Scope, slice_name

__all__ = [
    "Found",
    "claim_left_behind",
    "end_left_behind",
    "end_unfinished",
    "forget_dead_owners",
    "sweep",
]

_log = logging.getLogger(__name__)

END_PATIENCE = 2.0
"""Seconds for one to be gone that was killed. Others wait meanwhile; its own turn comes again."""

WRITE_PAUSE = 10.0
"""Seconds between two tries to write down what a run had printed: each takes the service's name for a moment."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a dead owner answered for and we answer for now.

    Attributes:
        row: its row in the registry.
        scope: its cgroup, if there is one.
        populated: whether anything runs in it.
    """

    row: SandboxRow
    scope: Scope | None
    populated: bool

    @property
    def claim(self) -> Claim:
        """What names it in the registry."""
        return self.row.key, self.row.service_id, self.row.run_id


def claim_left_behind(host: LoopHost, *, services: bool) -> list[Found]:
    """Become the owner of what dead owners left; blocking. Holds come first: what they had frozen is to go on.

    Args:
        services: take services too, not only one-shot runs. Who will not stay to look after them leaves them alone.
    """
    rows = [
        row
        for row in host.registry.sandboxes.rows()
        if row.owner != host.owner.owner_id and (services or row.kind == "run")
    ]
    alive = {owner: host.owner.alive(owner) for owner in {row.owner for row in rows}}
    left = [row for row in rows if not alive[row.owner]]
    if not left:
        return []
    scopes = {(scope.slice_name, scope.name): scope for scope in host.tree.scopes()}
    found = []
    for row in left:
        scope = scopes.get((slice_name(row.key), f"{row.service_id}.scope"))
        if scope is not None and scope.run_id != row.run_id:
            scope = None
        try:
            # In this order: what is ours and not told of here nobody would look after.
            one = Found(row, scope, scope is not None and _populated(host, scope))
            if host.registry.sandboxes.take_over(row.key, row.service_id, row.run_id, row.owner, host.owner.owner_id):
                found.append(one)
        except (RunnerError, CgroupError, OSError) as error:
            _log.error("cannot take over %s of %s yet: %s", row.service_id, row.key, error)
    return sorted(found, key=lambda one: one.row.service_id != HOLD)


async def end_left_behind(host: LoopHost, claim: Claim, *, keep: bool = False) -> bool:
    """Kill what still runs of it, write down what it had printed, and give its name free, or `keep` it.

    False if that cannot be done now; it is then left to `end_unfinished`.
    """
    try:
        await _end(host, *claim, keep=keep)
    except (RunnerError, CgroupError, OSError) as error:
        _log.error("cannot end run %s of %s yet: %s", claim[2], claim[1], error)
        # Behind the others: each of them gets its turn.
        host.unfinished.pop(claim, None)
        host.unfinished[claim] = None
        return False
    host.unfinished.pop(claim, None)
    return True


async def end_unfinished(host: LoopHost) -> None:
    """Try once more to end what could not be ended before, up to the first that still cannot be; and logs likewise."""
    for claim in list(host.unfinished):
        if not await end_left_behind(host, claim):
            break
    due = time.monotonic() - WRITE_PAUSE
    for claim in [claim for claim, since in host.unwritten.items() if since <= due]:
        await write_down(host, claim)


async def _end(host: LoopHost, key: str, service_id: str, run_id: str, *, keep: bool) -> None:
    if not await host.in_thread(_is_ours, host, key, service_id, run_id):
        return
    # Its output first: what waits in a FIFO is gone with the last process that holds it open.
    pump = await host.in_thread(_open_log, host, key, service_id, run_id)
    try:
        where = (slice_name(key), f"{service_id}.scope")
        await host.in_thread(lambda: host.tree.end_scope(*where, timeout=END_PATIENCE))
    finally:
        if await _finish_log(pump):
            host.store.drop(run_id)
        else:
            host.unwritten[key, service_id, run_id] = time.monotonic()
    await host.in_thread(host.tree.remove_if_unused, key)
    if service_id == HOLD:
        await host.in_thread(end_hold, host, (key, service_id, run_id))
    elif not keep:
        await host.in_thread(host.registry.sandboxes.release, key, service_id, run_id)


async def sweep(host: LoopHost) -> None:
    """Remove what bears our state's mark and no record names, and forget owners that are dead."""
    for claim in await host.in_thread(_sweep, host):
        await write_down(host, claim)


async def write_down(host: LoopHost, claim: Claim) -> None:
    """Write down what a run had printed that has ended, unless its service runs: a log has one writer at a time.

    For as long as it takes the service's name is claimed, so that nothing starts under it. Where that cannot be had,
    because the tenant is held for instance, it is done later.
    """
    key, service_id, run_id = claim
    row = SandboxRow(
        key=key,
        service_id=service_id,
        run_id=run_id,
        owner=host.owner.owner_id,
        kind="run",
        spec="{}",
        cgroup=f"{host.tree.path}/{slice_name(key)}/{service_id}.scope",
        created_at=time.time(),
    )
    try:
        await host.in_thread(host.registry.sandboxes.claim, row)
    except (AlreadyRunningError, BlockedError, HeldError, NotFoundError):
        host.unwritten[claim] = time.monotonic()
        return
    host.unwritten.pop(claim, None)
    _log.warning("the output of run %s of %s was left behind, and is written down now", run_id, service_id)
    await end_left_behind(host, claim)


def forget_dead_owners(host: LoopHost) -> None:
    """Remove the files of dead owners who left nothing, and what is kept of runs that are over; blocking."""
    # In this order: an owner that is dead has made all the records that it ever will.
    dead = host.owner.dead_owners()
    if dead:
        named = {row.owner for row in host.registry.sandboxes.rows()}
        for owner_id in set(dead) - named:
            host.owner.remove(owner_id)
    # By their FIFOs, not by their rows: a run without a row may wait for its output to be written down. Another
    # supervisor may have done that. In this order: a FIFO is there before it is kept.
    if kept := host.store.names():
        for run_id in kept - fifo_runs(host.settings.run_dir):
            host.store.drop(run_id)


def _is_ours(host: LoopHost, key: str, service_id: str, run_id: str) -> bool:
    """Whether we still answer for it. If not, its name may be another run's by now."""
    claimed = host.registry.sandboxes.row(key, service_id)
    return claimed is not None and (claimed.run_id, claimed.owner) == (run_id, host.owner.owner_id)


def _open_log(host: LoopHost, key: str, service_id: str, run_id: str) -> LogPump | None:
    """Open what a run has printed and nobody has written down, if there is anything."""
    paths = LogPaths(host.settings.log_dir, host.settings.run_dir, key)
    if (service_id, run_id) not in paths.leftovers():
        return None
    user_id = host.registry.users.key_holder(key) or ""
    pump = LogPump(
        paths=paths,
        user_id=user_id,
        service_id=service_id,
        run_id=run_id,
        uid=-1,
        gid=-1,
        hub=host.hub,
        tenant=host.log_tenants.of(key),
    )
    try:
        pump.adopt(alive=False)
    except (LogError, OSError) as error:
        _incomplete(pump, error)
        return None
    return pump


async def _finish_log(pump: LogPump | None) -> bool:
    """Write it down; False if that cannot be done now. No process of the run may live."""
    try:
        if pump is not None:
            await pump.finish()
    except (LogError, OSError) as error:
        assert pump is not None
        _incomplete(pump, error)
        pump.detach()
        return False
    return True


def _incomplete(pump: LogPump, error: Exception) -> None:
    # It stays where it is.
    _log.error("the log of run %s of %s is not complete: %s", pump.run_id, pump.service_id, error)


def _sweep(host: LoopHost) -> list[Claim]:
    # In this order: a row is there before what it names, so what has none by now is not about to get one.
    scopes = list(host.tree.scopes())
    keys = [user.key for user in host.users.list()]
    outputs = {
        (key, *left) for key in keys for left in LogPaths(host.settings.log_dir, host.settings.run_dir, key).leftovers()
    }
    rows = host.registry.sandboxes.rows()
    known = {(slice_name(row.key), f"{row.service_id}.scope") for row in rows}
    for scope in scopes:
        here = (scope.slice_name, scope.name)
        if here not in known and host.tree.end_scope(*here, run_id=scope.run_id):
            _log.warning("removed the cgroup %s/%s, which no record names", *here)
    host.tree.remove_unused_slices()
    forget_dead_owners(host)
    return sorted(outputs - {(row.key, row.service_id, row.run_id) for row in rows})


def _populated(host: LoopHost, scope: Scope) -> bool:
    try:
        with host.tree.open_scope(scope.slice_name, scope.name) as group:
            return group.populated()
    except GoneError:
        return False
