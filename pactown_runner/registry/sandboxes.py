"""What is meant to be alive now: claimed before anything of it is made, released when all of it is gone.

Claims and releases survive the death of any process, but the last of them may be lost with the power, when nothing
that they name is alive either.
"""

from __future__ import annotations

import operator
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from ..database import Database, transaction
from ..errors import AlreadyRunningError, BlockedError, NotFoundError
from .holds import check_not_held
from .quota import BOUNDLESS, Quotas, check_quota, quota_of
from .standings import standing_of
from .users import called

__all__ = ["ClaimedError", "Kind", "SandboxRow", "SandboxTable"]

Kind = Literal["service", "run"]

_ALL = "SELECT key, service_id, run_id, owner, kind, spec, cgroup, created_at FROM sandboxes "
_ONE = _ALL + "WHERE key = ? AND service_id = ?"
# Only a ready user can have something alive: a start and a removal exclude each other, in one statement each. Names
# that begin with `_` are the runner's own, which an operator needs for a tenant that is blocked as well.
_CLAIM = (
    "INSERT INTO sandboxes SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8 "
    "WHERE EXISTS (SELECT 1 FROM users WHERE key = ?1 AND status = 'ready') "
    "AND (substr(?2, 1, 1) = '_' OR NOT EXISTS (SELECT 1 FROM standings WHERE key = ?1 AND blocked)) "
    # While a user is held nothing starts for it but the hold's own job.
    "AND NOT EXISTS (SELECT 1 FROM sandboxes WHERE key = ?1 AND service_id = '_hold' AND '_job-' || run_id <> ?2)"
)
_CLAIM_WITHOUT_TIER = _CLAIM.replace("AND blocked)", "AND (blocked OR tier IS NOT NULL))")
# Only one at a time removes a user, and nothing else is alive of it then.
_CLAIM_REMOVAL = _CLAIM.replace("'ready'", "'deleting'")
_RESTART = (
    "UPDATE sandboxes SET run_id = ?, created_at = ? WHERE key = ? AND service_id = ? AND run_id = ? AND owner = ? "
    "AND NOT EXISTS (SELECT 1 FROM standings WHERE standings.key = sandboxes.key AND blocked) "
    "AND NOT EXISTS (SELECT 1 FROM sandboxes AS held WHERE held.key = sandboxes.key AND held.service_id = '_hold')"
)
_RELEASE = "DELETE FROM sandboxes WHERE key = ? AND service_id = ? AND run_id = ?"
_TAKE_OVER = "UPDATE sandboxes SET owner = ? WHERE key = ? AND service_id = ? AND run_id = ? AND owner = ?"
_UPDATE_SPEC = "UPDATE sandboxes SET spec = ? WHERE key = ? AND service_id = ? AND run_id = ?"
_UPDATE_REGISTERED = "UPDATE services SET spec = ? WHERE key = ? AND service_id = ?"
# Rows hold specs, and a count that had to read them would take 0.2 ms for a thousand.
_INDEX_NAMES = "CREATE INDEX IF NOT EXISTS sandboxes_names ON sandboxes (service_id)"


@dataclass(frozen=True, slots=True)
class SandboxRow:
    """One service or run that is meant to be alive.

    Attributes:
        key: the user's key.
        service_id: unique within the user.
        run_id: tells this run from earlier and later ones of the same name.
        owner: the supervisor that answers for it, see `owners`.
        kind: whether a new owner keeps it (`service`) or ends it (`run`).
        spec: what was asked for, as JSON.
        cgroup: its path in the cgroup v2 tree.
        created_at: seconds since the epoch.
    """

    key: str
    service_id: str
    run_id: str
    owner: str
    kind: Kind
    spec: str
    cgroup: str
    created_at: float


_values_of = operator.attrgetter(*(column.name for column in fields(SandboxRow)))
"""A row as the tuple of its columns; their order is that of the table."""


class ClaimedError(AlreadyRunningError):
    """Somebody claimed this user's service before.

    Attributes:
        owner: the owner id of whoever answers for it; empty if it ended in this very moment.
        run_id: the run that is there; empty as well then.

    Args:
        row: what was claimed.
        holder: what is there.
        user: whose they are, for people.
    """

    def __init__(self, row: SandboxRow, holder: SandboxRow | None, user: str) -> None:
        self.owner = holder.owner if holder else ""
        self.run_id = holder.run_id if holder else ""
        where = f" (run {self.run_id}, owner {self.owner})" if holder else ""
        super().__init__(
            f"service {row.service_id!r} of user {user} is running already{where}",
            remedy="stop it first, or choose another service id",
        )


class SandboxTable:
    """The sandboxes and jobs of a state.

    Args:
        database: the file.
        clock: seconds since the epoch; starts are counted by it.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def index_for(self, quotas: Quotas) -> None:
        """Make counting cheap where there is something to count; once, before the first claim.

        The index that a cap on the whole host wants costs each claim and release 3 microseconds, and nothing is wrong
        without it. So it is not there before somebody sets such a cap.
        """
        if quotas.general.max_sandboxes is not None:
            with self._database as db:
                db.execute(_INDEX_NAMES)

    def claim(self, row: SandboxRow, quotas: Quotas | None = None) -> None:
        """Write down that this is meant to be alive, before anything of it is made.

        Args:
            quotas: what may be claimed; checked together with the claim, whoever else claims meanwhile. A claim that
                is refused for whatever reason does not count as a start.

        Raises:
            ClaimedError: this user's service is there already, whoever owns it.
            NotFoundError: there is no such user, or it is being made or removed.
            BlockedError: the user is blocked.
            HeldError: its home is being exported or imported.
            AdmissionError: that would be more than `quotas` allow.
        """
        with self._database as db:
            if quotas is None:
                _insert(db, row)
                return
            # As a rule nothing is capped, and one statement sees to it that it is so for this user, too.
            if quotas.general == BOUNDLESS and _try_insert(db, row, _CLAIM_WITHOUT_TIER):
                return
            with transaction(db):
                self.claim_within(db, row, quotas)

    def claim_within(self, db: sqlite3.Connection, row: SandboxRow, quotas: Quotas | None) -> None:
        """As `claim`, in a transaction of the caller's, which has to end with what is raised here."""
        quota = BOUNDLESS if quotas is None else quota_of(db, row.key, row.service_id, quotas)
        # First, as it says better than any quota why a service cannot be started twice. So the counts include it.
        _insert(db, row)
        check_quota(db, row.key, row.service_id, quota, self._clock)

    def claim_removal(self, row: SandboxRow) -> None:
        """Write down who removes a user whose removal has begun, before anything of it is done.

        Raises:
            ClaimedError: somebody does already.
            NotFoundError: there is no such user, or its removal has not begun.
        """
        with self._database as db:
            _insert(db, row, _CLAIM_REMOVAL)

    def restart(self, claim: tuple[str, str, str], owner: str, run_id: str, created_at: float) -> bool:
        """Begin another run under the same name, which stays claimed. False if it is not `owner`'s any more.

        Raises:
            BlockedError: the user is blocked.
            HeldError: its home is being exported or imported.
        """
        with self._database as db:
            if db.execute(_RESTART, (run_id, created_at, *claim, owner)).rowcount == 1:
                return True
            if standing_of(db, claim[0]).blocked:
                raise BlockedError(f"cannot start {claim[1]!r} again: user {called(db, claim[0])} is blocked")
            check_not_held(db, claim[0])
        return False

    def release(self, key: str, service_id: str, run_id: str) -> bool:
        """Nothing of this run is left. False if the service is not there, or is another run's by now."""
        with self._database as db:
            return db.execute(_RELEASE, (key, service_id, run_id)).rowcount == 1

    def row(self, key: str, service_id: str) -> SandboxRow | None:
        """What is claimed under this name."""
        with self._database as db:
            found = db.execute(_ONE, (key, service_id)).fetchone()
        return SandboxRow(*found) if found else None

    def rows(self, owner: str | None = None, *, key: str | None = None) -> list[SandboxRow]:
        """All that is meant to be alive, of this owner, of this user, or of all."""
        with self._database as db:
            found = db.execute(
                _ALL + "WHERE owner = coalesce(?, owner) AND key = coalesce(?, key)", (owner, key)
            ).fetchall()
        return [SandboxRow(*values) for values in found]

    def take_over(self, key: str, service_id: str, run_id: str, from_owner: str, to_owner: str) -> bool:
        """Make `to_owner` answer for this run, if it still is `from_owner`'s. One caller gets True."""
        with self._database as db:
            return db.execute(_TAKE_OVER, (to_owner, key, service_id, run_id, from_owner)).rowcount == 1

    def update_spec(self, key: str, service_id: str, run_id: str, spec: str) -> bool:
        """Write down a changed spec, such as new limits, also of a service that is registered.

        False if this run is not there any more.
        """
        with self._database as db, transaction(db):
            there = db.execute(_UPDATE_SPEC, (spec, key, service_id, run_id)).rowcount == 1
            if there:
                db.execute(_UPDATE_REGISTERED, (spec, key, service_id))
            return there


def _insert(db: sqlite3.Connection, row: SandboxRow, statement: str = _CLAIM) -> None:
    if not _try_insert(db, row, statement):
        if standing_of(db, row.key).blocked:
            raise BlockedError(f"cannot start {row.service_id!r}: user {called(db, row.key)} is blocked")
        # Whose name is taken need not wait for the end of a hold.
        if there := db.execute(_ONE, (row.key, row.service_id)).fetchone():
            raise ClaimedError(row, SandboxRow(*there), called(db, row.key))
        check_not_held(db, row.key)
        raise NotFoundError(f"cannot start {row.service_id!r}: user {called(db, row.key)} is not ready")


def _try_insert(db: sqlite3.Connection, row: SandboxRow, statement: str) -> bool:
    try:
        return db.execute(statement, _values_of(row)).rowcount == 1
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
            raise
        found = db.execute(_ONE, (row.key, row.service_id)).fetchone()
        # Another process may have released it just now; it was claimed when we asked.
        raise ClaimedError(row, SandboxRow(*found) if found else None, called(db, row.key)) from None
