"""Who has which key, login, uid and home, and had it: a deleted user stays as a tombstone.

All changes are on the disk when the call returns.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..database import Database, transaction
from ..errors import StateError
from ..models import IsolatedUser

__all__ = ["Removal", "UserRow", "UserStatus", "UserTable", "called"]

UserStatus = Literal["creating", "ready", "deleting", "deleted"]
"""`creating` and `deleting`: the account may or may not exist, and whoever comes next finishes the job."""

_ALL = "SELECT saas_id, key, username, uid, gid, home, created_at, status, virtual FROM users "
_ADD = "INSERT OR IGNORE INTO users VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_BEGIN_REMOVAL = (
    "UPDATE users SET status = 'deleting' WHERE key = ? AND status <> 'deleted' "
    "AND NOT EXISTS (SELECT 1 FROM sandboxes WHERE sandboxes.key = users.key)"
)
_HIGHEST_UID = "SELECT max(uid) FROM users WHERE NOT virtual AND uid BETWEEN ? AND ?"
_UID_GAPS = (
    "SELECT uid + 1, next FROM (SELECT uid, lead(uid) OVER (ORDER BY uid) AS next FROM "
    "(SELECT ? - 1 AS uid UNION ALL SELECT uid FROM users WHERE NOT virtual AND uid BETWEEN ? AND ?)) "
    "WHERE next > uid + 1"
)
_PLAN = "removal."
"""Begins the name in `meta` of what is to become of a removed user's data; the key follows."""


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


class Removal(NamedTuple):
    """What becomes of the data of a user who is removed.

    Attributes:
        delete_home: or the home is kept for the case that the user comes back.
        delete_logs: or they stay.
    """

    delete_home: bool = True
    delete_logs: bool = True


class UserTable:
    """The users of a state."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def row(self, saas_id: str) -> UserRow | None:
        """The row of this id, compared byte for byte, whatever its status."""
        with self._database as db:
            found = db.execute(_ALL + "WHERE saas_id = ?", (saas_id.encode(),)).fetchone()
        return _user_row(found) if found else None

    def rows(self, *statuses: UserStatus) -> list[UserRow]:
        """All rows of these statuses, or all rows, in the order in which their uids were given out."""
        with self._database as db:
            found = db.execute(_ALL + "ORDER BY rowid").fetchall()
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

    def add(self, row: UserRow) -> bool:
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
            return db.execute(_ADD, values).rowcount == 1

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


def called(db: sqlite3.Connection, key: str) -> str:
    """Whose key it is, for people, who do not know keys; the key itself where it is nobody's."""
    found = db.execute("SELECT saas_id FROM users WHERE key = ?", (key,)).fetchone()
    return repr(found[0].decode()) if found else f"with key {key}"


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
