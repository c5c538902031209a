"""Services that are meant to run whenever a supervisor does, after a reboot too; changes are on the disk at once."""

from __future__ import annotations

from typing import NamedTuple

from ..database import Database, transaction
from .quota import Quotas
from .sandboxes import SandboxRow, SandboxTable

__all__ = ["ServiceRow", "ServiceTable"]

_REGISTER = "INSERT OR REPLACE INTO services VALUES (?, ?, ?, ?)"
_FORGET = "DELETE FROM services WHERE key = ? AND service_id = ?"
_ABSENT = (
    "SELECT key, service_id, spec, created_at FROM services WHERE NOT EXISTS (SELECT 1 FROM sandboxes "
    "WHERE sandboxes.key = services.key AND sandboxes.service_id = services.service_id) "
    "AND NOT EXISTS (SELECT 1 FROM standings WHERE standings.key = services.key AND blocked) "
    "AND NOT EXISTS (SELECT 1 FROM sandboxes WHERE sandboxes.key = services.key AND service_id = '_hold') "
    "ORDER BY created_at"
)


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


class ServiceTable:
    """The registered services of a state."""

    def __init__(self, database: Database, sandboxes: SandboxTable) -> None:
        self._database = database
        self._sandboxes = sandboxes

    def register(self, row: SandboxRow, quotas: Quotas | None = None) -> None:
        """Claim a service, and write down that it is to come back until it is stopped, in one; durable.

        Raises: as `SandboxTable.claim`; then neither is written down.
        """
        with self._database.durable() as db, transaction(db):
            self._sandboxes.claim_within(db, row, quotas)
            db.execute(_REGISTER, (row.key, row.service_id, row.spec, row.created_at))

    def forget(self, key: str, service_id: str) -> bool:
        """A registered service is not to come back; durable. False if it was not registered."""
        with self._database.durable() as db:
            return db.execute(_FORGET, (key, service_id)).rowcount == 1

    def absent(self) -> list[ServiceRow]:
        """Registered services that nobody has claimed, oldest first; not those of users who are blocked or held."""
        with self._database as db:
            return [ServiceRow(*values) for values in db.execute(_ABSENT).fetchall()]
