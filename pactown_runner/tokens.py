"""Bearer tokens: who may call the API over TCP, what for, and until when. Their hashes are known here, never they."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Self, get_args

from .errors import ConfigError, SpecError
from .specs import check_user_id

__all__ = ["Role", "Token", "parse_tokens", "token_of"]

Role = Literal["read", "admin"]
"""`read` changes nothing; `admin` does."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_KEYS = frozenset({"sha256", "role", "expires", "tenant"})


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token as the configuration has it.

    Attributes:
        name: what it is called where somebody has to be told of it.
        sha256: of the token's bytes, 64 hex digits. A token is random, 128 bits or more, so that its hash tells nothing
            of it: `openssl rand -hex 32`, hashed by `printf %s TOKEN | sha256sum`.
        role: what its bearer may do.
        expires: when it ends, in seconds since the epoch; infinite for never.
        tenant: the id of the only SaaS user that it is good for; None for all.

    Raises:
        ConfigError: one of them cannot be.
    """

    name: str
    sha256: str
    role: Role
    expires: float
    tenant: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"a token's name is 1 to 63 of A-Z a-z 0-9 . _ -, not {self.name!r}")
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            # Perhaps it is the token itself: it is not to be shown.
            raise ConfigError(
                f"sha256 of token {self.name} is not 64 hex digits in small letters",
                remedy="give what `printf %s TOKEN | sha256sum` prints",
            )
        if self.role not in get_args(Role):
            raise ConfigError(f"role of token {self.name} must be read or admin, not {self.role!r}")
        if self.tenant is not None:
            try:
                check_user_id(self.tenant)
            except SpecError as error:
                raise ConfigError(f"tenant of token {self.name}: {error}") from error

    @classmethod
    def from_table(cls, name: str, table: Mapping[str, Any]) -> Self:
        """Read a table of the configuration: `sha256`, `role`, `expires` (a time with its zone, or "never"), `tenant`.

        Raises:
            ConfigError: it is not so.
        """
        if not isinstance(table, Mapping):
            # Perhaps the token itself, which is not to stand in a log.
            raise ConfigError(f"token {name} must be a table", remedy=f"with the keys {', '.join(sorted(_KEYS))}")
        if unknown := table.keys() - _KEYS:
            known = f"known are {', '.join(sorted(_KEYS))}"
            raise ConfigError(f"token {name} cannot have {', '.join(sorted(unknown))}", remedy=known)
        if missing := {"sha256", "role", "expires"} - table.keys():
            raise ConfigError(f"token {name} has no {', '.join(sorted(missing))}")
        expires = _time(name, table["expires"])
        return cls(name=name, sha256=table["sha256"], role=table["role"], expires=expires, tenant=table.get("tenant"))


def parse_tokens(tables: Mapping[str, Mapping[str, Any]]) -> tuple[Token, ...]:
    """Read all tokens of a configuration, by name.

    Raises:
        ConfigError: one of them is no token.
    """
    if not isinstance(tables, Mapping):
        raise ConfigError("tokens must be tables, by name", remedy="write [tokens.NAME]")
    return tuple(Token.from_table(name, table) for name, table in tables.items())


def token_of(given: str, tokens: Sequence[Token], now: float) -> Token | None:
    """The token that is given; None if there is none, or it has expired. It takes as long whichever it is.

    Args:
        given: the token itself.
        now: seconds since the epoch.
    """
    sha256 = hashlib.sha256(given.encode("utf-8", "surrogateescape")).hexdigest()
    found = None
    for token in tokens:
        if hmac.compare_digest(token.sha256, sha256) and now < token.expires:
            found = token
    return found


def _time(name: str, value: Any) -> float:
    if value == "never":
        return math.inf
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        time = None
    if not isinstance(time, datetime) or time.tzinfo is None:
        raise ConfigError(
            f"expires of token {name} must be a time with its zone, not {value!r}",
            remedy='write 2027-01-31T00:00:00Z, or "never"',
        )
    return time.timestamp()
