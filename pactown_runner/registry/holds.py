"""Holds: while the home of a user is exported or imported nothing of it starts.

A hold is a row of `sandboxes` like any other, claimed and released as such, of a service that nobody can name.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable

from ..database import Database
from ..errors import StateError

__all__ = ["HOLD", "HeldError", "Holds", "check_not_held"]

HOLD = "_hold"
"""What a hold is called where services have their ids, see `archives.holding`: while it is claimed nothing of its user
starts, and its spec names what it has frozen."""

_SPEC = "SELECT spec FROM sandboxes WHERE key = ? AND service_id = '_hold'"
_SET_SPEC = "UPDATE sandboxes SET spec = ? WHERE key = ? AND service_id = '_hold' AND run_id = ?"


class HeldError(StateError):
    """Nothing starts for this user while its home is exported or imported."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the home of user {key} is being exported or imported", remedy="try again when that is done")


class Holds:
    """What the holds of a state have frozen, so that it goes on when they end, whoever ends them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def set_frozen(self, key: str, run_id: str, services: Iterable[str]) -> None:
        """Write down what the hold with this run id freezes, before it does."""
        with self._database as db:
            db.execute(_SET_SPEC, (json.dumps({"thaw": sorted(services)}), key, run_id))

    def frozen(self, key: str) -> frozenset[str]:
        """The services of this user that stand still because of a hold."""
        with self._database as db:
            found = db.execute(_SPEC, (key,)).fetchone()
        return frozenset(json.loads(found[0]).get("thaw", ()) if found else ())


def check_not_held(db: sqlite3.Connection, key: str) -> None:
    """Raises `HeldError` while this user is held."""
    if db.execute(_SPEC, (key,)).fetchone() is not None:
        raise HeldError(key)
