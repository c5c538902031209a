"""Owners: which of the processes that share one state are alive.

Each supervisor is an owner, and holds a lock, flock(2), on a file of its own for as long as it lives. The kernel drops
the lock with the process, however it ends, so "is it alive?" is "is it locked?": pids are reused and differ from
one pid namespace to the next, locks on a shared file do not.

An owner's file is removed by the owner at its end, or by whoever buries a dead one. Both, and the owner's birth, look
after locking whether the file they locked is still the one with that name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import weakref
from pathlib import Path
from typing import Self

from .database import private_dir
from .errors import RegistryError, StateError

__all__ = ["Owner", "Owners"]

_OWNER_ID = re.compile(r"[0-9a-f]{16}")


class Owners:
    """The owners of one state.

    Args:
        state_dir: the state's directory; the files are in `owners` below it.

    Raises:
        RegistryError: the directory cannot be made, or lets others in.
    """

    def __init__(self, state_dir: Path) -> None:
        self.directory = private_dir(private_dir(state_dir) / "owners")

    def alive(self, owner_id: str) -> bool:
        """Whether this owner holds its lock. One that was removed, or never was, is not alive."""
        fd = self._open(owner_id)
        if fd is None:
            return False
        try:
            # Shared: two that look at once must not take each other for the owner.
            return not _lock(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)

    def dead_owners(self) -> list[str]:
        """Owners that ended without saying so, in no order."""
        names = [name for name in os.listdir(self.directory) if _OWNER_ID.fullmatch(name)]
        return [name for name in names if not self.alive(name) and (self.directory / name).exists()]

    def remove(self, owner_id: str) -> bool:
        """Forget a dead owner, once nothing that it left names it any more. False if it is alive or unknown."""
        fd = self._open(owner_id)
        if fd is None:
            return False
        try:
            if not _lock(fd, fcntl.LOCK_EX) or not self._is_current(owner_id, fd):
                return False
            self._path(owner_id).unlink()
            return True
        finally:
            os.close(fd)

    def _open(self, owner_id: str) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return os.open(self._path(owner_id), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return None

    def _path(self, owner_id: str) -> Path:
        if not _OWNER_ID.fullmatch(owner_id):
            raise RegistryError(f"not an owner id: {owner_id!r}")
        return self.directory / owner_id

    def _is_current(self, owner_id: str, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self._path(owner_id).lstat())
        except FileNotFoundError:
            return False


class Owner(Owners):
    """One live owner; the process that makes it is alive for the others until it closes it or ends.

    Children do not keep it alive: the descriptor is closed by `execve`, and in those made by `os.fork` at once.

    Attributes:
        owner_id: 16 hex digits, never used twice.
    """

    def __init__(self, state_dir: Path) -> None:
        super().__init__(state_dir)
        self.owner_id, self._fd = self._be_born()
        # A worker of multiprocessing that outlives us would keep the lock, and nobody would take over what we left.
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(this()))

    def _be_born(self) -> tuple[str, int]:
        while True:
            owner_id = secrets.token_hex(8)
            path = self._path(owner_id)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                # Whoever looks at it in this moment holds the lock for some microseconds, and may even remove the
                # file: nothing is lost, since nothing bears this id yet.
                fcntl.flock(fd, fcntl.LOCK_EX)
                if self._is_current(owner_id, fd):
                    return owner_id, fd
            except BaseException:
                os.close(fd)
                path.unlink(missing_ok=True)
                raise
            os.close(fd)

    def check(self) -> None:
        """Raise `StateError` if this owner is closed, or its file was removed: others would take over what is its."""
        if self._fd < 0 or not self._is_current(self.owner_id, self._fd):
            raise StateError(f"owner {self.owner_id} of {self.directory} has ended or lost its file")

    def close(self) -> None:
        """End it, and remove its file. Closing twice is harmless."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            # In this order: a file that is there and not locked would be a dead owner's.
            self._path(self.owner_id).unlink(missing_ok=True)
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _forget(owner: Owner | None) -> None:
    if owner is not None and owner._fd >= 0:
        fd, owner._fd = owner._fd, -1
        os.close(fd)  # without LOCK_UN: it is the parent's lock as well


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
