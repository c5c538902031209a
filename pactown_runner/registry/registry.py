"""One state's registry: the file, and what is in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from ..database import Database
from ..errors import RegistryError
from .holds import Holds
from .sandboxes import SandboxTable
from .schema import APPLICATION_ID, MIGRATIONS
from .services import ServiceTable
from .standings import StandingTable
from .users import UserTable

__all__ = ["Registry"]


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
        users: who has which key, login, uid and home.
        sandboxes: what is meant to be alive now.
        services: what is meant to come back.
        standings: what the operator lets each user have.
        holds: what stands still while a home is exported or imported.

    Raises:
        RegistryError: from the constructor and every method, its parts' too, if the file cannot be opened, read or
            written, is corrupt, belongs to another program, or has a newer schema than this version knows.
    """

    def __init__(self, path: Path, *, waits: bool = True, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._database = Database(path, APPLICATION_ID, MIGRATIONS, waits=waits)
        self.users = UserTable(self._database)
        self.sandboxes = SandboxTable(self._database, clock)
        self.services = ServiceTable(self._database, self.sandboxes)
        self.standings = StandingTable(self._database)
        self.holds = Holds(self._database)
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
