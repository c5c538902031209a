"""The registry: who has an account, and what is meant to be alive; one SQLite file that processes share.

Two tables carry it. `users` is never emptied: a deleted user stays as a tombstone, so that no key and no uid
goes to somebody else. `sandboxes` holds one row for each service or run that is meant to be alive *now*; with
the live cgroups it is all that recovery needs. `services` are those that are meant to come back, `starts` is how fast
each user may start what it wants, and `standings` what the operator lets it have: one for all processes that share the
state.

Changes to users and services are on the disk when the call returns. Claims and releases survive the death of any
process, but the last of them may be lost with the power, when nothing that they name is alive either.
"""

from __future__ import annotations

import json
import operator
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from .database import Database, transaction
from .errors import AdmissionError, AlreadyRunningError, BlockedError, NotFoundError, RegistryError, StateError
from .models import IsolatedUser

__all__ = [
    "HOLD",
    "ClaimedError",
    "HeldError",
    "Kind",
    "Quota",
    "Quotas",
    "Registry",
    "Removal",
    "SandboxRow",
    "ServiceRow",
    "Standing",
    "UserRow",
    "UserStatus",
]

UserStatus = Literal["creating", "ready", "deleting", "deleted"]
"""`creating` and `deleting`: the account may or may not exist, and whoever comes next finishes the job."""

Kind = Literal["service", "run"]

HOLD = "_hold"
"""What a hold is called where services have their ids, see `archives.holding`: while it is claimed nothing of its user
starts, and its spec names what it has frozen."""

_APPLICATION_ID = 0x50414354

_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
        "INSERT INTO meta VALUES ('state_id', lower(hex(randomblob(16))))",
        """CREATE TABLE users (
            saas_id BLOB NOT NULL UNIQUE,
            key TEXT NOT NULL UNIQUE,
            username TEXT NOT NULL UNIQUE,
            uid INTEGER NOT NULL,
            gid INTEGER NOT NULL,
            home BLOB NOT NULL,
            created_at REAL NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('creating', 'ready', 'deleting', 'deleted')),
            virtual INTEGER NOT NULL
        ) STRICT""",
        "CREATE UNIQUE INDEX users_uid ON users (uid) WHERE NOT virtual",
        """CREATE TABLE sandboxes (
            key TEXT NOT NULL,
            service_id TEXT NOT NULL,
            run_id TEXT NOT NULL,
            owner TEXT NOT NULL,
            kind TEXT NOT NULL CHECK (kind IN ('service', 'run')),
            spec TEXT NOT NULL,
            cgroup TEXT NOT NULL,
            created_at REAL NOT NULL,
            PRIMARY KEY (key, service_id)
        ) STRICT, WITHOUT ROWID""",
    ),
    (
        """CREATE TABLE services (
            key TEXT NOT NULL,
            service_id TEXT NOT NULL,
            spec TEXT NOT NULL,
            created_at REAL NOT NULL,
            PRIMARY KEY (key, service_id)
        ) STRICT, WITHOUT ROWID""",
        # When the user's bucket for so many seconds is full again, in microseconds since the epoch: as many starts are
        # missing from it as are due until then. One number that only whole numbers are added to stays exact.
        """CREATE TABLE starts (
            key TEXT NOT NULL,
            seconds INTEGER NOT NULL,
            full_at INTEGER NOT NULL,
            PRIMARY KEY (key, seconds)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE standings (
            key TEXT NOT NULL PRIMARY KEY,
            tier TEXT,
            blocked INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID""",
    ),
)
"""See `Database`: steps are only ever added."""

_USERS = "SELECT saas_id, key, username, uid, gid, home, created_at, status, virtual FROM users "
_ADD_USER = "INSERT OR IGNORE INTO users VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_BEGIN_REMOVAL = (
    "UPDATE users SET status = 'deleting' WHERE key = ? AND status <> 'deleted' "
    "AND NOT EXISTS (SELECT 1 FROM sandboxes WHERE sandboxes.key = users.key)"
)
_SANDBOXES = "SELECT key, service_id, run_id, owner, kind, spec, cgroup, created_at FROM sandboxes "
_ONE_SANDBOX = _SANDBOXES + "WHERE key = ? AND service_id = ?"
# Only a ready user can have something alive: a start and a removal exclude each other, in one statement each. Names
# that begin with `_` are the runner's own, which an operator needs for a tenant that is blocked as well.
_CLAIM = (
    "INSERT INTO sandboxes SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8 "
    "WHERE EXISTS (SELECT 1 FROM users WHERE key = ?1 AND status = 'ready') "
    "AND (substr(?2, 1, 1) = '_' OR NOT EXISTS (SELECT 1 FROM standings WHERE key = ?1 AND blocked)) "
    # While a user is held nothing starts for it but the hold's own job.
    "AND NOT EXISTS (SELECT 1 FROM sandboxes WHERE key = ?1 AND service_id = '_hold' AND '_job-' || run_id <> ?2)"
)
_HELD = "SELECT 1 FROM sandboxes WHERE key = ? AND service_id = '_hold'"
_CLAIM_WITHOUT_TIER = _CLAIM.replace("AND blocked)", "AND (blocked OR tier IS NOT NULL))")
_REGISTER = "INSERT OR REPLACE INTO services VALUES (?, ?, ?, ?)"
# Only one at a time removes a user, and nothing else is alive of it then.
_CLAIM_REMOVAL = _CLAIM.replace("'ready'", "'deleting'")
_PLAN = "removal."
"""Begins the name in `meta` of what is to become of a removed user's data; the key follows."""
_FORGET = "DELETE FROM services WHERE key = ? AND service_id = ?"
_ABSENT = (
    "SELECT key, service_id, spec, created_at FROM services WHERE NOT EXISTS (SELECT 1 FROM sandboxes "
    "WHERE sandboxes.key = services.key AND sandboxes.service_id = services.service_id) "
    "AND NOT EXISTS (SELECT 1 FROM standings WHERE standings.key = services.key AND blocked) "
    "AND NOT EXISTS (SELECT 1 FROM sandboxes WHERE sandboxes.key = services.key AND service_id = '_hold') "
    "ORDER BY created_at"
)
_RESTART = (
    "UPDATE sandboxes SET run_id = ?, created_at = ? WHERE key = ? AND service_id = ? AND run_id = ? AND owner = ? "
    "AND NOT EXISTS (SELECT 1 FROM standings WHERE standings.key = sandboxes.key AND blocked) "
    "AND NOT EXISTS (SELECT 1 FROM sandboxes AS held WHERE held.key = sandboxes.key AND held.service_id = '_hold')"
)
_RELEASE = "DELETE FROM sandboxes WHERE key = ? AND service_id = ? AND run_id = ?"
_TAKE_OVER = "UPDATE sandboxes SET owner = ? WHERE key = ? AND service_id = ? AND run_id = ? AND owner = ?"
_COUNT = "SELECT count(*) FROM sandboxes"
# Names that begin with `_` are the runner's own: its jobs count against nobody.
_COUNT_NAMED = _COUNT + " WHERE substr(service_id, 1, 1) <> '_'"
_COUNT_OF_USER = _COUNT_NAMED + " AND key = ?"
# Rows hold specs, and a count that had to read them would take 0.2 ms for a thousand.
_INDEX_NAMES = "CREATE INDEX IF NOT EXISTS sandboxes_names ON sandboxes (service_id)"
_FULL_AT = "SELECT full_at FROM starts WHERE key = ? AND seconds = ?"
_SET_FULL_AT = "INSERT OR REPLACE INTO starts VALUES (?, ?, ?)"
_STANDING = "SELECT tier, blocked FROM standings WHERE key = ?"
_SET_STANDING = "INSERT OR REPLACE INTO standings VALUES (?, ?, ?)"
_HIGHEST_UID = "SELECT max(uid) FROM users WHERE NOT virtual AND uid BETWEEN ? AND ?"
_UID_GAPS = (
    "SELECT uid + 1, next FROM (SELECT uid, lead(uid) OVER (ORDER BY uid) AS next FROM "
    "(SELECT ? - 1 AS uid UNION ALL SELECT uid FROM users WHERE NOT virtual AND uid BETWEEN ? AND ?)) "
    "WHERE next > uid + 1"
)
_UPDATE_REGISTERED = "UPDATE services SET spec = ? WHERE key = ? AND service_id = ?"
_UPDATE_SPEC = "UPDATE sandboxes SET spec = ? WHERE key = ? AND service_id = ? AND run_id = ?"


@dataclass(frozen=True, slots=True, kw_only=True)
class UserRow:
    """One user as registered; `virtual` users have no account of their own, but the caller's uid and gid."""

    saas_id: str
    key: str
    username: str
    uid: int
    gid: int
    home: Path
    created_at: float
    status: UserStatus = "creating"
    virtual: bool = False

    def user(self) -> IsolatedUser:
        """The public face of this row."""
        return IsolatedUser(self.saas_id, self.username, self.uid, self.gid, self.home, self.created_at)


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


class ServiceRow(NamedTuple):
    """A service that is meant to run whenever a supervisor does, until somebody stops it.

    Attributes:
        key: the user's key.
        service_id: unique within the user.
        spec: what to run, as JSON.
        created_at: when it was started first, in seconds since the epoch.
    """

    key: str
    service_id: str
    spec: str
    created_at: float


class Quota(NamedTuple):
    """How much may be claimed; None for no end. What the runner itself claims, by names that begin with `_`, is free.

    Attributes:
        max_sandboxes: rows of all users.
        max_per_user: rows of one user.
        starts_per_minute: how many claims a user may make in a minute; also how many at once, if it made none before.
        starts_per_hour: the same for an hour.
    """

    max_sandboxes: int | None = None
    max_per_user: int | None = None
    starts_per_minute: float | None = None
    starts_per_hour: float | None = None


@dataclass(frozen=True, slots=True)
class Quotas:
    """How much may be claimed, by the user's tier.

    Attributes:
        general: by users without a tier.
        of_tiers: by those that have one. Who has one that is not here may claim nothing.
    """

    general: Quota
    of_tiers: Mapping[str, Quota] = field(default_factory=dict)


class Standing(NamedTuple):
    """What the operator lets a user have.

    Attributes:
        tier: a tier's name, or None.
        blocked: nothing is started for it.
    """

    tier: str | None = None
    blocked: bool = False


_BOUNDLESS = Quota()
_MINUTE, _HOUR = 60, 3600


class Removal(NamedTuple):
    """What becomes of the data of a user who is removed.

    Attributes:
        delete_home: or the home is kept for the case that the user comes back.
        delete_logs: or they stay.
    """

    delete_home: bool = True
    delete_logs: bool = True


_values_of = operator.attrgetter(*(column.name for column in fields(SandboxRow)))
"""A row as the tuple of its columns; their order is that of the table."""


class ClaimedError(AlreadyRunningError):
    """Somebody claimed this user's service before.

    Attributes:
        owner: the owner id of whoever answers for it; empty if it ended in this very moment.
        run_id: the run that is there; empty as well then.
    """

    def __init__(self, row: SandboxRow, holder: SandboxRow | None) -> None:
        self.owner = holder.owner if holder else ""
        self.run_id = holder.run_id if holder else ""
        where = f" (run {self.run_id}, owner {self.owner})" if holder else ""
        super().__init__(
            f"service {row.service_id!r} of user {row.key} is running already{where}",
            remedy="stop it first, or choose another service id",
        )


class HeldError(StateError):
    """Nothing starts for this user while its home is exported or imported."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the home of user {key} is being exported or imported", remedy="try again when that is done")


class Registry:
    """The registry of one state directory.

    Any number of threads and processes may use the same file. One connection serves all threads of this
    object, one statement at a time, and `close` closes it there and then.

    Args:
        path: the file.
        waits: see `Database`.
        clock: seconds since the epoch. Starts are counted by it, since all processes know it, also after a reboot.

    Attributes:
        path: the file, mode 0600 in a directory of mode 0700.
        state_id: made once with the file, 32 hex digits; marks what belongs to this state on the host.

    Raises:
        RegistryError: from the constructor and every method, if the file cannot be opened, read or written,
            is corrupt, belongs to another program, or has a newer schema than this version knows.
    """

    def __init__(self, path: Path, *, waits: bool = True, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._database = Database(path, _APPLICATION_ID, _MIGRATIONS, waits=waits)
        try:
            self.state_id = self._read_state_id()
        except BaseException:
            self._database.close()
            raise

    def checkpoint(self) -> None:
        """Keep the log short for those that do not wait; see `Database.checkpoint`."""
        self._database.checkpoint()

    def close(self) -> None:
        """Close the file. Closing twice is harmless; any other use after it raises `RegistryError`."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read_state_id(self) -> str:
        with self._database as db:
            found = db.execute("SELECT value FROM meta WHERE name = 'state_id'").fetchone()
        if found is None:
            raise RegistryError(f"the registry {self.path} has lost its state id", remedy="restore a backup")
        return str(found[0])

    # Users ---

    def user(self, saas_id: str) -> UserRow | None:
        """The row of this id, compared byte for byte, whatever its status."""
        with self._database as db:
            found = db.execute(_USERS + "WHERE saas_id = ?", (saas_id.encode(),)).fetchone()
        return _user_row(found) if found else None

    def users(self, *statuses: UserStatus) -> list[UserRow]:
        """All rows of these statuses, or all rows, in the order in which their uids were given out."""
        with self._database as db:
            found = db.execute(_USERS + "ORDER BY rowid").fetchall()
        rows = map(_user_row, found)
        return [row for row in rows if not statuses or row.status in statuses]

    def key_holder(self, key: str) -> str | None:
        """The id that has, or ever had, this key."""
        with self._database as db:
            found = db.execute("SELECT saas_id FROM users WHERE key = ?", (key,)).fetchone()
        return found[0].decode() if found else None

    def used_uids(self) -> set[int]:
        """Every uid and gid that a user of this state has or ever had, those of virtual users aside."""
        with self._database as db:
            found = db.execute("SELECT uid, gid FROM users WHERE NOT virtual").fetchall()
        return {number for pair in found for number in pair}

    def unused_uids(self, first: int, last: int) -> Iterator[range]:
        """The uids from `first` to `last` that no user of this state has or ever had, those of virtual users aside.

        First come those above all that were given out, which costs the same however many there are. What was left out
        below or reaped comes after them, found by going through all.
        """
        with self._database as db:
            (highest,) = db.execute(_HIGHEST_UID, (first, last)).fetchone()
        above = first if highest is None else highest + 1
        yield range(above, last + 1)
        with self._database as db:
            gaps = db.execute(_UID_GAPS, (first, first, above - 1)).fetchall()
        yield from (range(*gap) for gap in gaps)

    def add_user(self, row: UserRow) -> bool:
        """Reserve this row's id, key, login and uid; durable. False, and no change, if one is taken."""
        values = (
            row.saas_id.encode(),
            row.key,
            row.username,
            row.uid,
            row.gid,
            os.fsencode(row.home),
            row.created_at,
            row.status,
            int(row.virtual),
        )
        with self._database.durable() as db:
            return db.execute(_ADD_USER, values).rowcount == 1

    def reassign(self, row: UserRow, to: UserRow) -> UserRow:
        """Give the id of `row`, which is `creating`, the key, login and uid of `to`; durable. Returns `to`."""
        with self._database.durable() as db:
            done = db.execute(
                "UPDATE users SET key = ?, username = ?, uid = ?, gid = ?, home = ?, created_at = ? "
                "WHERE saas_id = ? AND status = 'creating'",
                (to.key, to.username, to.uid, to.gid, os.fsencode(to.home), to.created_at, row.saas_id.encode()),
            ).rowcount
        if done != 1:
            raise StateError(f"user {row.username} cannot become {to.username}: it is not being made any more")
        return to

    def mark_ready(self, row: UserRow) -> UserRow:
        """The account is there: `creating` becomes `ready`; durable. Returns the new row."""
        return self._move(row, "ready", "creating")

    def begin_removal(self, row: UserRow, removal: Removal | None = None) -> UserRow:
        """Let nothing more start for this user; durable. Returns the new row.

        Args:
            removal: what is to become of its data, by default all is deleted. Of several calls the last one's holds.

        Raises:
            StateError: something is claimed for this user, or the user is deleted.
        """
        with self._database.durable() as db, transaction(db):
            done = db.execute(_BEGIN_REMOVAL, (row.key,)).rowcount == 1
            if done:
                db.execute("DELETE FROM services WHERE key = ?", (row.key,))
                plan = json.dumps((removal or Removal())._asdict())
                db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_PLAN + row.key, plan))
        if not done:
            raise StateError(
                f"cannot remove user {row.username}: something runs for it, or it is removed already",
                remedy="stop its sandboxes first",
            )
        return replace(row, status="deleting")

    def tombstone(self, row: UserRow) -> UserRow:
        """The account is gone: `deleting` becomes `deleted`; durable. Its key and uid stay taken."""
        return self._move(row, "deleted", "deleting")

    def removal(self, key: str) -> Removal | None:
        """What is to become, or became, of the data of the user with this key, as its last removal said."""
        with self._database as db:
            found = db.execute("SELECT value FROM meta WHERE name = ?", (_PLAN + key,)).fetchone()
        return Removal(**json.loads(found[0])) if found else None

    def revive(self, row: UserRow, created_at: float) -> UserRow:
        """Give a deleted user's key and uid back to the same id, which is `creating` again; durable."""
        return self._move(replace(row, created_at=created_at), "creating", "deleted")

    def _move(self, row: UserRow, to: UserStatus, before: UserStatus) -> UserRow:
        """From `before` to `to`; being there already is as good, since two may finish the same work."""
        with self._database.durable() as db:
            done = db.execute(
                "UPDATE users SET status = ?, created_at = ? WHERE key = ? AND status IN (?, ?)",
                (to, row.created_at, row.key, before, to),
            ).rowcount
        if done != 1:
            raise StateError(f"user {row.username} cannot become {to}: it is not {before} any more")
        return replace(row, status=to)

    # Sandboxes ---

    def index_for(self, quota: Quota | Quotas | None) -> None:
        """Make counting cheap where there is something to count; once, before the first claim.

        The index that a cap on the whole host wants costs each claim and release 3 microseconds, and nothing is wrong
        without it. So it is not there before somebody sets such a cap.
        """
        quota = quota.general if isinstance(quota, Quotas) else quota
        if quota is not None and quota.max_sandboxes is not None:
            with self._database as db:
                db.execute(_INDEX_NAMES)

    def claim(self, row: SandboxRow, quota: Quota | Quotas | None = None) -> None:
        """Write down that this is meant to be alive, before anything of it is made.

        Args:
            quota: what may be claimed; checked together with the claim, whoever else claims meanwhile. A claim that
                is refused for whatever reason does not count as a start.

        Raises:
            ClaimedError: this user's service is there already, whoever owns it.
            NotFoundError: there is no such user, or it is being made or removed.
            BlockedError: the user is blocked.
            HeldError: its home is being exported or imported.
            AdmissionError: that would be more than `quota` allows.
        """
        with self._database as db:
            if quota is None:
                self._insert(db, row)
                return
            # As a rule nothing is capped, and one statement sees to it that it is so for this user, too.
            general = quota.general if isinstance(quota, Quotas) else quota
            if general == _BOUNDLESS and self._try_insert(db, row, _CLAIM_WITHOUT_TIER):
                return
            with transaction(db):
                self._claim(db, row, _quota_of(db, row, quota))

    def register(self, row: SandboxRow, quota: Quota | Quotas | None = None) -> None:
        """Claim a service, and write down that it is to come back until it is stopped, in one; durable.

        Raises: as `claim`; then neither is written down.
        """
        with self._database.durable() as db, transaction(db):
            self._claim(db, row, _quota_of(db, row, quota))
            db.execute(_REGISTER, (row.key, row.service_id, row.spec, row.created_at))

    def _claim(self, db: sqlite3.Connection, row: SandboxRow, quota: Quota | None) -> None:
        """To be called in a transaction, which ends with what is raised here."""
        # First, as it says better than any quota why a service cannot be started twice. So the counts include it.
        self._insert(db, row)
        if quota is None:
            return
        if quota.max_sandboxes is not None:
            _check_host(db, row, quota.max_sandboxes)
        if quota.max_per_user is not None:
            _check_user(db, row, quota.max_per_user)
        for limit, seconds in (("starts_per_minute", _MINUTE), ("starts_per_hour", _HOUR)):
            if (rate := getattr(quota, limit)) is not None:
                _count_start(db, row, _Rate(limit, rate, seconds), int(self._clock() * 1e6))

    def _insert(self, db: sqlite3.Connection, row: SandboxRow, statement: str = _CLAIM) -> None:
        if not self._try_insert(db, row, statement):
            if (found := db.execute(_STANDING, (row.key,)).fetchone()) and found[1]:
                raise BlockedError(f"cannot start {row.service_id!r}: user {row.key} is blocked")
            # Whose name is taken need not wait for the end of a hold.
            if there := db.execute(_ONE_SANDBOX, (row.key, row.service_id)).fetchone():
                raise ClaimedError(row, SandboxRow(*there))
            _check_not_held(db, row.key)
            raise NotFoundError(f"cannot start {row.service_id!r}: no user with key {row.key} is ready")

    def _try_insert(self, db: sqlite3.Connection, row: SandboxRow, statement: str) -> bool:
        try:
            return db.execute(statement, _values_of(row)).rowcount == 1
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
                raise
            found = db.execute(_ONE_SANDBOX, (row.key, row.service_id)).fetchone()
            # Another process may have released it just now; it was claimed when we asked.
            raise ClaimedError(row, SandboxRow(*found) if found else None) from None

    def claim_removal(self, row: SandboxRow) -> None:
        """Write down who removes a user whose removal has begun, before anything of it is done.

        Raises:
            ClaimedError: somebody does already.
            NotFoundError: there is no such user, or its removal has not begun.
        """
        with self._database as db:
            self._insert(db, row, _CLAIM_REMOVAL)

    def forget(self, key: str, service_id: str) -> bool:
        """A registered service is not to come back; durable. False if it was not registered."""
        with self._database.durable() as db:
            return db.execute(_FORGET, (key, service_id)).rowcount == 1

    def absent_services(self) -> list[ServiceRow]:
        """Registered services that nobody has claimed, oldest first; not those of users who are blocked or held."""
        with self._database as db:
            return [ServiceRow(*values) for values in db.execute(_ABSENT).fetchall()]

    def restart(self, claim: tuple[str, str, str], owner: str, run_id: str, created_at: float) -> bool:
        """Begin another run under the same name, which stays claimed. False if it is not `owner`'s any more.

        Raises:
            BlockedError: the user is blocked.
            HeldError: its home is being exported or imported.
        """
        with self._database as db:
            if db.execute(_RESTART, (run_id, created_at, *claim, owner)).rowcount == 1:
                return True
            if (found := db.execute(_STANDING, claim[:1]).fetchone()) and found[1]:
                raise BlockedError(f"cannot start {claim[1]!r} again: user {claim[0]} is blocked")
            _check_not_held(db, claim[0])
        return False

    def hold_still(self, key: str, run_id: str, services: Iterable[str]) -> None:
        """Write down what the hold with this run id freezes, before it does: it goes on when the hold ends."""
        self.update_spec(key, HOLD, run_id, json.dumps({"thaw": sorted(services)}))

    def held_still(self, key: str) -> frozenset[str]:
        """The services of this user that stand still because of a hold, and go on when that ends."""
        row = self.row(key, HOLD)
        return frozenset(json.loads(row.spec).get("thaw", ()) if row else ())

    # Standings ---

    def standing(self, key: str) -> Standing:
        """What the user with this key may have."""
        with self._database as db:
            found = db.execute(_STANDING, (key,)).fetchone()
        return Standing(found[0], bool(found[1])) if found else Standing()

    def set_standing(self, key: str, standing: Standing) -> None:
        """Let the user with this key have this; durable. It outlives the user, and is the same id's if it returns."""
        with self._database.durable() as db:
            db.execute(_SET_STANDING, (key, standing.tier, int(standing.blocked)))

    def release(self, key: str, service_id: str, run_id: str) -> bool:
        """Nothing of this run is left. False if the service is not there, or is another run's by now."""
        with self._database as db:
            return db.execute(_RELEASE, (key, service_id, run_id)).rowcount == 1

    def row(self, key: str, service_id: str) -> SandboxRow | None:
        """What is claimed under this name."""
        with self._database as db:
            found = db.execute(_ONE_SANDBOX, (key, service_id)).fetchone()
        return SandboxRow(*found) if found else None

    def rows(self, owner: str | None = None, *, key: str | None = None) -> list[SandboxRow]:
        """All that is meant to be alive, of this owner, of this user, or of all."""
        with self._database as db:
            found = db.execute(
                _SANDBOXES + "WHERE owner = coalesce(?, owner) AND key = coalesce(?, key)", (owner, key)
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


def _quota_of(db: sqlite3.Connection, row: SandboxRow, quota: Quota | Quotas | None) -> Quota | None:
    """What holds for this user; None where nothing is capped."""
    if isinstance(quota, Quotas):
        found = db.execute(_STANDING, (row.key,)).fetchone()
        tier = found[0] if found else None
        if tier is not None and tier not in quota.of_tiers:
            raise AdmissionError(
                f"cannot start {row.service_id!r}: user {row.key} has the tier {tier!r}, which is not known",
                limit="tiers",
                remedy="give the user another tier, or add it to the settings",
            )
        quota = quota.general if tier is None else quota.of_tiers[tier]
    return None if quota is None or quota == _BOUNDLESS else quota


def _check_not_held(db: sqlite3.Connection, key: str) -> None:
    if db.execute(_HELD, (key,)).fetchone() is not None:
        raise HeldError(key)


def _check_host(db: sqlite3.Connection, row: SandboxRow, most: int) -> None:
    # The plain count looks at no row, and is enough unless it is close.
    if db.execute(_COUNT).fetchone()[0] <= most:
        return
    if (count := db.execute(_COUNT_NAMED).fetchone()[0]) > most:
        raise AdmissionError(
            f"cannot start {row.service_id!r}: {count - 1} sandboxes run on this host, and {most} may",
            limit="max_sandboxes",
            remedy="stop others, or raise max_sandboxes in the settings",
        )


def _check_user(db: sqlite3.Connection, row: SandboxRow, most: int) -> None:
    if (count := db.execute(_COUNT_OF_USER, (row.key,)).fetchone()[0]) > most:
        raise AdmissionError(
            f"cannot start {row.service_id!r}: {count - 1} sandboxes of user {row.key} run, and {most} may",
            limit="max_sandboxes_per_user",
            remedy="stop others of this user, or raise max_sandboxes_per_user in the settings",
        )


class _Rate(NamedTuple):
    limit: str
    starts: float
    seconds: int


def _count_start(db: sqlite3.Connection, row: SandboxRow, rate: _Rate, now: int) -> None:
    """Take one of the starts that a user has: a bucket that holds a minute's, or an hour's, or one if that is less.

    What is written down is when the bucket is full again. Each start puts that off by what one takes to come back.
    """
    each = int(rate.seconds * 1e6 / rate.starts)
    whole = int(each * max(1, rate.starts))
    found = db.execute(_FULL_AT, (row.key, rate.seconds)).fetchone()
    full_at = found[0] if found else now
    # No bucket is emptier than empty: the clock was put back, or the rate was lower. Nobody is to wait for that.
    if not now < full_at <= now + whole:
        full_at = now
    full_at += each
    if (early := full_at - whole - now) > 0:
        raise AdmissionError(
            f"cannot start {row.service_id!r}: user {row.key} has had its {rate.starts:g} "
            f"{rate.limit.replace('_', ' ')}",
            limit=rate.limit,
            retry_after=early / 1e6,
            remedy=f"try again in {early / 1e6:.3g} seconds",
        )
    db.execute(_SET_FULL_AT, (row.key, rate.seconds, full_at))


def _user_row(values: tuple[Any, ...]) -> UserRow:
    saas_id, key, username, uid, gid, home, created_at, status, virtual = values
    return UserRow(
        saas_id=saas_id.decode(),
        key=key,
        username=username,
        uid=uid,
        gid=gid,
        home=Path(os.fsdecode(home)),
        created_at=created_at,
        status=status,
        virtual=bool(virtual),
    )
