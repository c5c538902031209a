"""Users: which id has which key, login, uid and home. The registry remembers, `accounts` makes them real.

A user is made in steps, each of which can be repeated: a row that reserves key and uid (`creating`), the account, the
home, the row's `ready`. Whoever asks for the user next finishes what a crash left. Removal goes the other way:
`deleting`, the account, a tombstone.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from .accounts import MAX_NAME, PREFIX, Accounts
from .config import Settings
from .database import exclusive
from .errors import AccountError, NotFoundError, StateError
from .home_dirs import make_home
from .models import IsolatedUser
from .quotas import TenantQuotas
from .registry import Registry, Removal, UserRow
from .specs import check_user_id

__all__ = ["Users", "keys_of"]

FIRST_KEY_DIGITS = 8


def keys_of(saas_user_id: str) -> Iterator[str]:
    """The keys that this id may have, in order: the first 8 to 24 hex digits of the sha256 of its UTF-8 bytes.

    A login has at most 32 bytes, 8 of which are `pactown_`.
    """
    digits = hashlib.sha256(saas_user_id.encode()).hexdigest()
    for length in range(FIRST_KEY_DIGITS, MAX_NAME - len(PREFIX) + 1):
        yield digits[:length]


class Users:
    """All users of one state. Usable from several threads, beside other processes of the same state.

    Attributes:
        root_mode: whether each user has a Linux account of its own. Else users are names, kept apart by nothing but
            their directories, and all files and processes are the caller's.
    """

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self.root_mode = os.geteuid() == 0
        self._users_base = Path(os.path.abspath(settings.users_base))
        self._registry = registry
        self._accounts = Accounts(self._users_base, settings.uid_ranges, registry.state_id)
        self._quotas = TenantQuotas(settings, registry)

    def get(self, saas_user_id: str) -> IsolatedUser | None:
        """The user of this id, or None if there is none, or none that is whole.

        Raises:
            SpecError: the id is malformed.
            RegistryError: see `Registry`.
        """
        row = self._registry.users.row(check_user_id(saas_user_id))
        return row.user() if row and row.status == "ready" else None

    def get_or_create(self, saas_user_id: str) -> IsolatedUser:
        """The user of this id, made if there is none; its account is what the registry says.

        An id whose user was removed gets its former key and uid, which nobody else ever had.

        Raises:
            SpecError: the id is malformed.
            AccountError: the account cannot be made, or is not what it was.
            LimitsError: the user's disk is to be limited, and that cannot be enforced; no user was made.
            StateError: the user is being removed.
            RegistryError: see `Registry`.
        """
        row = self._registry.users.row(check_user_id(saas_user_id))
        if row is None or row.status != "ready":
            self._quotas.check([None if row is None else row.key])
            row = self._make(saas_user_id)
        user = row.user()
        self.verify(user)
        self.hold_to_quotas(user)
        return user

    def verify(self, user: IsolatedUser) -> None:
        """See that the account is what the registry says; some microseconds. Raises `AccountError`."""
        if self.root_mode:
            self._accounts.verify(user)
        elif (user.linux_uid, user.linux_gid) != (os.geteuid(), os.getegid()):
            raise AccountError(
                f"user {user.linux_username} was made by uid {user.linux_uid}, gid {user.linux_gid}",
                remedy="run as that user, or name another state directory",
            )

    def hold_to_quotas(self, user: IsolatedUser) -> None:
        """Have the limits on this user's disk hold, the settings' or its tier's; only once in the life of this object.

        Raises:
            LimitsError: they cannot be enforced.
        """
        self._quotas.hold(user)

    def check_quotas(self) -> None:
        """See that limits on disk can be enforced: the settings', and those of tiers of users for whom something runs.

        For whoever takes over what runs: what is not held to its limits would have to be ended.

        Raises:
            LimitsError: they cannot be.
        """
        self._quotas.check([None, *{row.key for row in self._registry.sandboxes.rows()}])

    def check_ours(self, saas_user_id: str) -> None:
        """See that whatever carries the user's uid is the user's: what was made is as it was made, or gone.

        Raises:
            NotFoundError: there is no such user.
            AccountError: it is not so.
        """
        row = self._present(saas_user_id)
        self._check_mode(row)
        if self.root_mode:
            self._accounts.check_ours(row)
        else:
            self.verify(row.user())

    def begin_removal(self, saas_user_id: str, removal: Removal | None = None) -> IsolatedUser:
        """Let nothing more start for this user. To be followed by `remove_account`, and to be repeated after a crash.

        Args:
            removal: what is to become of its data, by default all is deleted; noted for whoever repeats it.

        Raises:
            NotFoundError: there is no such user.
            StateError: something of this user's is meant to be alive.
        """
        return self._registry.users.begin_removal(self._present(saas_user_id), removal).user()

    def removal(self, user: IsolatedUser) -> Removal:
        """What is to become of the data of a user whose removal has begun."""
        return self._registry.users.removal(user.key) or Removal()

    def _present(self, saas_user_id: str) -> UserRow:
        row = self._registry.users.row(check_user_id(saas_user_id))
        if row is None or row.status == "deleted":
            raise NotFoundError(f"there is no user {saas_user_id!r}")
        return row

    def _check_mode(self, row: UserRow) -> None:
        if row.virtual == self.root_mode:
            made = "without root" if row.virtual else "by root"
            raise AccountError(f"user {row.username} was made {made}", remedy="name another state directory")

    def remove_account(self, user: IsolatedUser) -> None:
        """Delete the account of a user whose removal has begun, and leave a tombstone. The home is not touched.

        Raises:
            AccountError: a process still runs under the uid, the login is not ours, or it cannot be deleted.
            StateError: its removal has not begun, or somebody else ended it.
        """
        with self._lock():
            row = self._registry.users.row(user.saas_user_id)
            if row is None or row.status != "deleting":
                raise StateError(
                    f"cannot delete the account {user.linux_username}: its removal has not begun",
                    remedy="call begin_removal first",
                )
            if not row.virtual:
                self._quotas.lift(row.uid)
                self._accounts.delete(row)
            self._registry.users.tombstone(row)

    def unfinished_removals(self) -> builtins.list[IsolatedUser]:
        """Users whose removal has begun and not ended: another process is at it, or one was, and died."""
        return [row.user() for row in self._registry.users.rows("deleting")]

    def list(self) -> builtins.list[IsolatedUser]:
        """All users, in the order in which they were first made."""
        return [row.user() for row in self._registry.users.rows("ready")]

    def _make(self, saas_user_id: str) -> UserRow:
        with self._lock():
            row = self._registry.users.row(saas_user_id) or self._reserve(saas_user_id)
            self._check_mode(row)
            if row.status == "deleting":
                raise StateError(
                    f"user {row.username} is being removed",
                    remedy="wait for it; if that was interrupted, remove the user again",
                )
            if row.status == "deleted":
                row = self._registry.users.revive(row, time.time())
            if row.status == "creating":
                removal = self._registry.users.removal(row.key)
                kept = removal is not None and not removal.delete_home
                if self.root_mode:
                    if self._accounts.clashes(row):
                        if kept:
                            self._accounts.check_ours(row)
                        # Since the row was written, before a crash perhaps, somebody else took the login or the uid.
                        row = self._registry.users.reassign(row, self._choose(saas_user_id))
                    self._accounts.create(row)
                make_home(self._users_base, row.username, row.uid, row.gid, kept=kept)
                self._quotas.hold(row.user(), anew=True)
                row = self._registry.users.mark_ready(row)
            return row

    def _reserve(self, saas_user_id: str) -> UserRow:
        row = self._choose(saas_user_id)
        if not self._registry.users.add(row):
            raise StateError(f"cannot make user {row.username}: somebody changes the registry without the lock")
        return row

    def _choose(self, saas_user_id: str) -> UserRow:
        for key in keys_of(saas_user_id):
            name = PREFIX + key
            if self._registry.users.key_holder(key) not in (None, saas_user_id):
                continue
            if self.root_mode and self._accounts.knows(name):
                continue
            uid = self._accounts.free_uid(self._registry.users.unused_uids) if self.root_mode else os.geteuid()
            return UserRow(
                saas_id=saas_user_id,
                key=key,
                username=name,
                uid=uid,
                gid=uid if self.root_mode else os.getegid(),
                home=self._users_base / name,
                created_at=time.time(),
                virtual=not self.root_mode,
            )
        raise AccountError(
            f"cannot make a user for {saas_user_id!r}: every login that it could have is taken",
            remedy=f"remove logins that begin with {PREFIX} and are nobody's",
        )

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One user is made or removed at a time: on this host as root, else in this state."""
        with self._accounts.lock() if self.root_mode else exclusive(self._registry.path.parent):
            yield
