"""What the operator lets each user have. It outlives the user, and is the same id's if that comes back."""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from ..database import Database

__all__ = ["Standing", "StandingTable", "standing_of"]

_STANDING = "SELECT tier, blocked FROM standings WHERE key = ?"
_SET = "INSERT OR REPLACE INTO standings VALUES (?, ?, ?)"


class Standing(NamedTuple):
    """What the operator lets a user have.

    Attributes:
        tier: a tier's name, or None.
        blocked: nothing is started for it.
    """

    tier: str | None = None
    blocked: bool = False


class StandingTable:
    """The standings of a state's users."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, key: str) -> Standing:
        """What the user with this key may have."""
        with self._database as db:
            return standing_of(db, key)

    def set(self, key: str, standing: Standing) -> None:
        """Let the user with this key have this; durable."""
        with self._database.durable() as db:
            db.execute(_SET, (key, standing.tier, int(standing.blocked)))


def standing_of(db: sqlite3.Connection, key: str) -> Standing:
    """As `StandingTable.get`, for whoever has the connection."""
    found = db.execute(_STANDING, (key,)).fetchone()
    return Standing(found[0], bool(found[1])) if found else Standing()
