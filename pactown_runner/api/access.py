"""Who calls, and what they may do.

On the Unix socket the kernel says whose process it is: root, whoever runs the server, and members of the configured
group may do everything; a tenant may do nothing, whatever its groups. By TCP nothing is known of a caller but the token
that it has. Nothing that a caller says of itself counts in any other way.
"""

from __future__ import annotations

import grp
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..config import Settings
from ..errors import ConfigError
from ..tokens import Role, token_of
from .problems import ProblemError

__all__ = ["Access", "Caller", "Callers", "Peer", "group_id", "peer_of"]

_SO_PEERGROUPS = 59
"""Not in `socket`; asm-generic/socket.h."""
_CRED = struct.Struct("3i")
_GROUPS_BYTES = 1024
"""The most that Python asks an option for: 256 groups."""


class Peer(NamedTuple):
    """Whose process is at the other end of a Unix socket, as it was when it connected.

    Attributes:
        uid: its user.
        gids: its group, and its supplementary ones.
    """

    uid: int
    gids: frozenset[int]


def peer_of(sock: socket.socket) -> Peer:
    """Whose process is at the other end of a connected Unix socket; unix(7), SO_PEERCRED.

    Raises:
        OSError: it is none.
    """
    _, uid, gid = _CRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CRED.size))
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError:
        # More groups than that: then only its own counts.
        raw = b""
    return Peer(uid, frozenset({gid, *struct.unpack(f"{len(raw) // 4}I", raw)}))


@dataclass(frozen=True, slots=True)
class Access:
    """What a route needs.

    Attributes:
        role: of the caller.
        whole_host: whether it is about more than one tenant, so that who has to do with one only may not.
    """

    role: Role
    whole_host: bool = False


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        name: the token's, or the uid.
        role: `read` changes nothing.
        tenant: the only SaaS user that the caller has to do with; None for all.
        expires: when it is nobody any more, in seconds since the epoch; None for never.
    """

    name: str
    role: Role
    tenant: str | None = None
    expires: float | None = None

    @property
    def changes(self) -> bool:
        """Whether the caller may change things."""
        return self.role == "admin"

    def reaches(self, user_id: str) -> bool:
        """Whether the caller has to do with this user."""
        return self.tenant is None or self.tenant == user_id

    def must_reach(self, user_id: str) -> None:
        """Refuse what is about another user, whether there is one or not.

        Raises:
            ProblemError: the caller is bound to another one.
        """
        if not self.reaches(user_id):
            raise ProblemError(403, "forbidden", "this token is for another tenant")

    def must(self, access: Access) -> None:
        """Refuse what the caller may not do.

        Raises:
            ProblemError: that is so.
        """
        if access.role == "admin" and not self.changes:
            raise ProblemError(403, "forbidden", "this changes something, and the caller may only read")
        if access.whole_host and self.tenant is not None:
            raise ProblemError(403, "forbidden", "this is about all tenants, and the caller is bound to one")


class Callers:
    """All who may call.

    Raises:
        ConfigError: the configured group is not there.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.time) -> None:
        self._tokens = settings.tokens
        self._tenants = settings.uid_ranges
        self._own = os.geteuid()
        self._group = None if settings.api_group is None else group_id(settings.api_group)
        self._clock = clock

    def by_peer(self, peer: Peer) -> Caller | None:
        """Who is at the other end of the Unix socket, if that is one who may call."""
        if peer.uid in (0, self._own):
            return Caller(f"uid {peer.uid}", "admin")
        if self._group not in peer.gids or any(first <= peer.uid <= last for first, last in self._tenants):
            return None
        return Caller(f"uid {peer.uid}", "admin")

    def by_header(self, authorization: str | None) -> Caller | None:
        """Who has the token of this header, if it is a good one."""
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        token = token_of(given.strip(), self._tokens, self._clock())
        return None if token is None else Caller(token.name, token.role, token.tenant, token.expires)


def group_id(name: str) -> int:
    """The number of a group.

    Raises:
        ConfigError: there is none of this name.
    """
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"api_group: there is no group {name!r}", remedy=f"make it: groupadd -r {name}") from None
