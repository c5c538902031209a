"""Holds: while the home of a user is exported or imported nothing of it starts.

A hold is a row of `sandboxes` like any other, claimed and released as such, of a service that nobody can name.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager

from ..database import Database, exclusive
from ..errors import StateError
from .users import called

__all__ = ["HOLD", "HeldError", "Holds", "check_not_held"]

HOLD = "_hold"
"""What a hold is called where services have their ids, see `archives.holding`: while it is claimed nothing of its user
starts, and its spec names what it has frozen."""

_RUN = "SELECT run_id FROM sandboxes WHERE key = ? AND service_id = '_hold'"
_SPEC = "SELECT spec FROM sandboxes WHERE key = ? AND service_id = '_hold'"
_SET_SPEC = "UPDATE sandboxes SET spec = ? WHERE key = ? AND service_id = '_hold' AND run_id = ?"


class HeldError(StateError):
    """Nothing starts for this user while its home is exported or imported."""

    def __init__(self, user: str) -> None:
        super().__init__(f"the home of user {user} is being exported or imported", remedy="try again when that is done")


class Holds:
    """What the holds of a state have frozen, so that it goes on when they end, whoever ends them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def changing(self) -> AbstractContextManager[None]:
        """Freeze or thaw what a hold may let go on when it ends, while nobody else does, in any process; blocking."""
        return exclusive(self._database.path.parent)

    def set_frozen(self, key: str, run_id: str, services: Iterable[str]) -> None:
        """Write down what the hold with this run id freezes, before it does."""
        with self._database as db:
            db.execute(_SET_SPEC, (json.dumps({"thaw": sorted(services)}), key, run_id))

    def change(self, key: str, services: Collection[str], *, goes_on: bool) -> bool:
        """Write down whether these services go on when the hold on their user ends; False if there is none."""
        with self._database as db:
            found = db.execute(_RUN, (key,)).fetchone()
        if found is None:
            return False
        frozen = self.frozen(key)
        self.set_frozen(key, found[0], frozen.union(services) if goes_on else frozen.difference(services))
        return True

    def frozen(self, key: str) -> frozenset[str]:
        """The services of this user that stand still because of a hold."""
        with self._database as db:
            found = db.execute(_SPEC, (key,)).fetchone()
        return frozenset(json.loads(found[0]).get("thaw", ()) if found else ())


def check_not_held(db: sqlite3.Connection, key: str) -> None:
    """Raises `HeldError` while this user is held."""
    if db.execute(_SPEC, (key,)).fetchone() is not None:
        raise HeldError(called(db, key))
