"""The registry: who has an account, and what is meant to be alive; one SQLite file that processes share.

Two tables carry it. `users` is never emptied: a deleted user stays as a tombstone, so that no key and no uid
goes to somebody else. `sandboxes` holds one row for each service or run that is meant to be alive *now*; with
the live cgroups it is all that recovery needs. `services` are those that are meant to come back, `starts` is how fast
each user may start what it wants, and `standings` what the operator lets it have: one for all processes that share the
state.

Each has a module here, and all stand behind the one connection of a `Registry`. What one statement or transaction
decides, such as whether a user may claim anything at all, reads the tables that it needs, whosever they are.
"""

from __future__ import annotations

from .holds import HOLD, HeldError
from .quota import Quota, Quotas
from .registry import Registry
from .sandboxes import ClaimedError, Kind, SandboxRow
from .services import ServiceRow
from .standings import Standing
from .users import Removal, UserRow, UserStatus

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
