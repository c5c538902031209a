"""Holding a tenant: for as long as its home is exported or imported nothing of it starts, and what runs stands still.

A hold is a row of the registry like any other, of a service that nobody can name. So there is one at a time for each
tenant, over all processes; the tenant cannot be removed meanwhile; and what a dead owner held is let go by whoever
takes its rows over. The row's spec names the scopes that have to be thawed then: those that the hold has frozen,
without what somebody freezes meanwhile, and with what somebody thaws.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from cgroups import Cgroup, CgroupError, GoneError

from ..errors import AlreadyRunningError, RunnerError, StateError
from ..host import Claim, Host
from ..jobs import job_name
from ..models import IsolatedUser
from ..registry import HOLD, SandboxRow
from ..trees import slice_name

__all__ = ["Hold", "end_hold", "held"]

_log = logging.getLogger(__name__)

FREEZE_TIMEOUT = 5.0
"""Seconds in which a scope must stand still. It waits for running system calls only."""


class Hold:
    """A tenant that is held.

    Attributes:
        run_id: the hold's own; its jobs have to go by this id.
    """

    def __init__(self, host: Host, user: IsolatedUser) -> None:
        self.run_id = secrets.token_hex(8)
        self._host = host
        self._key = user.key
        self._user = user.saas_user_id
        self._frozen: dict[str, Cgroup] = {}
        self._found: set[tuple[str, str]] = set()
        self._kept = ExitStack()

    def must_be_idle(self) -> None:
        """Raise `StateError` if anything of the tenant is meant to be alive."""
        if names := sorted(name for name, _ in self._others()):
            raise StateError(
                f"the home is in use: {', '.join(names[:5])}{' and others' * (len(names) > 5)} of user {self._user!r}",
                remedy="stop its sandboxes first, and wait for what puts or gets files",
            )

    def freeze(self) -> None:
        """Let everything of the tenant stand still, the hold's own job aside, and return when it does.

        Raises:
            StateError: something does not stand still in time.
        """
        self._found = self._others()
        scopes = {}
        for name, _ in self._found:
            # Gone: it has a name and no processes, such as one that waits to be started again.
            with suppress(GoneError):
                scopes[name] = self._kept.enter_context(self._open(name))
        holds = self._host.registry.holds
        with self._host.registry.holds.changing():
            thawed = {name: scope for name, scope in scopes.items() if not _freeze_requested(scope)}
            # First: whoever comes after us has to know of it.
            holds.set_frozen(self._key, self.run_id, holds.frozen(self._key) | thawed.keys())
            for scope in thawed.values():
                with suppress(GoneError):
                    scope.request_freeze(True)
        self._frozen = dict(scopes)
        for name, scope in scopes.items():
            try:
                scope.freeze(FREEZE_TIMEOUT)
            except GoneError:
                del self._frozen[name]  # it ended before anything was copied
            except CgroupError as error:
                raise StateError(f"{name} of user {self._user!r} does not stand still: {error.message}") from error

    def check_still(self) -> None:
        """Raise `StateError` if anything of the tenant has run since `freeze`, or ended."""
        moved = {name for name, scope in self._frozen.items() if not _frozen(scope)}
        moved |= {name for name, _ in self._others() - self._found}
        for name in {name for name, _ in self._found} - self._frozen.keys():
            with suppress(GoneError), self._open(name):
                moved.add(name)
        if moved:
            raise StateError(
                f"{', '.join(sorted(moved))} of user {self._user!r} ran or ended meanwhile, so that the copy is none",
                remedy="try again, and leave the user's sandboxes alone",
            )

    def close(self) -> None:
        """Forget what was frozen, which stays so until `end_hold`."""
        self._kept.close()

    def _open(self, name: str) -> Cgroup:
        return self._host.tree.open_scope(slice_name(self._key), f"{name}.scope")

    def _others(self) -> set[tuple[str, str]]:
        ours = {HOLD, job_name(self.run_id)}
        rows = self._host.registry.sandboxes.rows(key=self._key)
        return {(row.service_id, row.run_id) for row in rows if row.service_id not in ours}


@contextmanager
def held(host: Host, user: IsolatedUser) -> Iterator[Hold]:
    """Hold a tenant.

    Raises:
        StateError: it is held already.
        NotFoundError: there is no such user any more.
    """
    hold = Hold(host, user)
    claim = (user.key, HOLD, hold.run_id)
    try:
        host.registry.sandboxes.claim(
            SandboxRow(
                key=user.key,
                service_id=HOLD,
                run_id=hold.run_id,
                owner=host.owner.owner_id,
                kind="run",
                spec="{}",
                cgroup=f"{host.tree.path}/{slice_name(user.key)}/{HOLD}.scope",
                created_at=time.time(),
            )
        )
    except AlreadyRunningError as error:
        raise StateError(
            f"the home of user {user.saas_user_id!r} is being exported or imported already", remedy="wait for that"
        ) from error
    try:
        yield hold
    finally:
        hold.close()
        try:
            end_hold(host, claim)
        except (RunnerError, CgroupError, OSError) as error:
            _log.error("cannot let go on yet what runs of user %s: %s", user.key, error)
            host.unfinished[claim] = None


def end_hold(host: Host, claim: Claim) -> None:
    """Let go on what a hold had frozen, ours or a dead owner's, and give its name free.

    What belongs to a tenant who was blocked meanwhile stays frozen.

    Raises:
        RunnerError, CgroupError, OSError: that cannot be done now, and the hold stays.
    """
    key = claim[0]
    # Its record is to go with what it says: who says that something stays frozen, or goes on, finds both or neither.
    with host.registry.holds.changing(), ExitStack() as stack:
        scopes = []
        for name in host.registry.holds.frozen(key):
            with suppress(GoneError):
                scopes.append(stack.enter_context(host.tree.open_scope(slice_name(key), f"{name}.scope")))
        # Whoever blocks a tenant writes that down first, and then freezes what runs: perhaps while this is under way.
        for frozen in (False, True):
            if host.standings.of(key).blocked is frozen:
                for scope in scopes:
                    with suppress(GoneError):
                        scope.request_freeze(frozen)
        host.registry.sandboxes.release(*claim)


def _freeze_requested(scope: Cgroup) -> bool:
    try:
        return scope.freeze_requested()
    except GoneError:
        return False


def _frozen(scope: Cgroup) -> bool:
    try:
        return scope.frozen()
    except GoneError:
        return False
