"""How many may be connected: callers are counted, and strangers only let in as long as there is room for them."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from .access import Caller

__all__ = ["STRANGERS", "Connection", "Crowd"]

STRANGERS = 256
"""Connections on which nobody has shown yet who calls. As many as are accepted in two turns of the loop (`backlog`), so
that who comes with a head that is there already is heard before others can take its place."""

_SHARES = 4
"""One tenant's callers have one of so many equal parts."""


class Connection(Protocol):
    """What a crowd needs to know of a connection."""

    @property
    def busy(self) -> bool:
        """Whether a request of it is being answered, and nothing but us keeps the answer waiting."""

    def hang_up(self) -> None:
        """Close it at once."""


class Crowd:
    """All connections of one kind.

    Whoever can reach a port can connect to it; so strangers count for nothing: one too many takes the place of the one
    that has been there longest.

    Args:
        most: callers that may be connected at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._share = max(1, most // _SHARES)
        self._strangers: dict[Connection, None] = {}  # the oldest first
        self._callers: dict[Connection, str | None] = {}  # the tenant that each is bound to
        self._tenants: Counter[str | None] = Counter()

    def enter(self, connection: Connection) -> None:
        """Somebody has connected."""
        self._strangers[connection] = None
        if len(self._strangers) > STRANGERS:
            # Of whom a request is being looked at it will be known in a moment who that is.
            oldest = next(it for it in self._strangers if not it.busy)
            del self._strangers[oldest]
            oldest.hang_up()

    def admit(self, connection: Connection, caller: Caller) -> bool:
        """Whether there is room for the caller that this connection turned out to be."""
        tenant = caller.tenant
        known = connection in self._callers
        if known and self._callers[connection] == tenant:
            return True
        others = len(self._callers) - known
        if others >= self._most or (tenant is not None and self._tenants[tenant] >= self._share):
            return False
        self.leave(connection)
        self._callers[connection] = tenant
        self._tenants[tenant] += 1
        return True

    def leave(self, connection: Connection) -> None:
        """It is closed."""
        self._strangers.pop(connection, None)
        if connection in self._callers:
            tenant = self._callers.pop(connection)
            self._tenants[tenant] -= 1
            if not self._tenants[tenant]:
                del self._tenants[tenant]
