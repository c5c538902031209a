"""One SQLite file, shared by threads and processes: opening it, its schema version, its errors.

The file is in WAL mode. A commit survives the death of any process at once; the last commits may be lost with
the power, unless they were made under `Database.durable`: https://www.sqlite.org/pragma.html#pragma_synchronous
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from .errors import RegistryError
from .passage import exposed

__all__ = ["BUSY_TIMEOUT", "BusyError", "Database", "exclusive", "make_dirs", "private_dir", "transaction"]

BUSY_TIMEOUT = 10.0
"""Seconds to wait for another process's write. The longest are the durable ones: some milliseconds each."""

_RESTORE = "restore it from a backup; without it nobody knows which login is whose"

Migrations = Sequence[Sequence[str]]
"""Step n, a list of statements, leads from schema version n to n + 1. Steps are only ever added."""


class BusyError(RegistryError):
    """Another thread or process writes just now, and this connection does not wait."""


class Database:
    """A connection that all threads of a process share; `with database as db:` lends it to one at a time.

    It is the one place where errors of SQLite and of the file system become `RegistryError`. It is of no use
    in a child made by `fork`, as SQLite connections do not survive one, and says so.

    Args:
        path: the file, made with mode 0600, in a directory made with mode 0700.
        application_id: written into the file's header; another program's database is not taken for ours.
        migrations: the schema's history.
        waits: whether to wait for others that write. Else it raises `BusyError` at once, and never waits for the
            disk either: it leaves it to others to move the log into the file, see `checkpoint`.

    Raises:
        RegistryError: the file cannot be opened, is corrupt or foreign, or has a newer schema.
    """

    def __init__(self, path: Path, application_id: int, migrations: Migrations, *, waits: bool = True) -> None:
        self.path = path
        self._waits = waits
        self._pid = os.getpid()
        self._lock = threading.Lock()
        private_dir(path.parent)
        # Two processes that make one file: the switch to WAL does not wait for a lock, it fails.
        with _errors(path), exclusive(path.parent):
            _make_private_file(path)
            self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
            try:
                _prepare(self._db, path, application_id, migrations)
                if not waits:
                    self._db.execute("PRAGMA busy_timeout = 0")
                    self._db.execute("PRAGMA wal_autocheckpoint = 0")
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Close the file. Closing twice is harmless; any other use after it raises `RegistryError`."""
        with self as db:
            db.close()

    def __enter__(self) -> sqlite3.Connection:
        if os.getpid() != self._pid:
            raise RegistryError(f"{self.path} was opened by a parent process", remedy="open it anew")
        if not self._lock.acquire(blocking=self._waits):
            raise BusyError(f"{self.path} is in use by another thread")
        return self._db

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        if isinstance(error, sqlite3.Error):
            if not self._waits and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                raise BusyError(f"{self.path} is being written by another process") from error
            raise _ours(self.path, error) from error

    def checkpoint(self) -> None:
        """Move what can be moved from the log into the file (https://www.sqlite.org/wal.html); waits for the disk."""
        with self as db:
            db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    @contextlib.contextmanager
    def durable(self) -> Iterator[sqlite3.Connection]:
        """As `with database`, and what is committed within is on the disk."""
        with self as db:
            db.execute("PRAGMA synchronous = FULL")
            try:
                yield db
            finally:
                db.execute("PRAGMA synchronous = NORMAL")


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All that is executed within is committed at its end, or nothing of it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # A full disk has ended it already (https://www.sqlite.org/lang_transaction.html, section 3.1).
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def private_dir(path: Path) -> Path:
    """Make a directory that only this process's user can enter, or see that it is one. Returns `path`.

    Missing parents are made with mode 0711. The mode of what exists is left alone: it may be somebody's.

    Raises:
        RegistryError: it cannot be made, is a symbolic link, is somebody else's, or lets others in; or, as root, others
            could put another in its place.
    """
    try:
        make_dirs(path, 0o700)
        found = path.lstat()
        reason = exposed(path)
    except OSError as error:
        raise RegistryError(f"cannot make the directory {path}: {error}") from error
    if reason is not None:
        raise RegistryError(
            f"{path} is not safe: {reason}", remedy="name a directory whose parents are root's alone to change"
        )
    if not stat.S_ISDIR(found.st_mode):
        raise RegistryError(f"{path} is not a directory", remedy="name a directory, not a link to one")
    if found.st_uid != os.geteuid():
        raise RegistryError(
            f"{path} belongs to uid {found.st_uid}, not to uid {os.geteuid()} that runs this",
            remedy="run as its owner, or name another directory",
        )
    if found.st_mode & 0o077:
        raise RegistryError(
            f"{path} lets others in (mode {stat.S_IMODE(found.st_mode):04o})",
            remedy=f"chmod 700 {path}, or name a directory of its own",
        )
    return path


def make_dirs(path: Path, mode: int) -> None:
    """Make a directory of this mode, whatever the umask, and its missing parents with mode 0711.

    What exists is left as it is. Raises `OSError`.
    """
    for directory in (*reversed(path.parents), path):
        with contextlib.suppress(FileExistsError):
            directory.mkdir(0o700)
            directory.chmod(mode if directory == path else 0o711)


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold a lock on a directory, flock(2), against other threads and processes that ask for it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _ours(path: Path, error: sqlite3.Error | OSError) -> RegistryError:
    return RegistryError(f"cannot use the registry {path}: {error}", remedy=_remedy(error))


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise _ours(path, error) from error


def _remedy(error: sqlite3.Error | OSError) -> str | None:
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return None
    match code & 0xFF:  # the low byte is the kind, see https://www.sqlite.org/rescode.html
        case sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_CORRUPT:
            return _RESTORE
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return f"another process held it for {BUSY_TIMEOUT:g} seconds; find it with fuser(1)"
        case sqlite3.SQLITE_FULL:
            return "free some space on its file system"
    return None


def _make_private_file(path: Path) -> None:
    # An existing file must not be opened here: closing it would drop the POSIX locks of every connection that
    # this process has to it (https://www.sqlite.org/howtocorrupt.html, section 2.2).
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise RegistryError(f"cannot use the registry {path}: it is not a plain file") from None


def _prepare(db: sqlite3.Connection, path: Path, application_id: int, migrations: Migrations) -> None:
    (found_id,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables and found_id != application_id:
        raise RegistryError(f"{path} is a database of another program", remedy="name another state directory")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise RegistryError(
            f"{path} has schema version {version}, and this version knows {len(migrations)}",
            remedy="use the newer version of pactown-runner that wrote it",
        )
    (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise RegistryError(f"the registry {path} is corrupt: {verdict}", remedy=_RESTORE)
    db.execute("PRAGMA journal_mode = WAL")
    if version < len(migrations):
        _migrate(db, application_id, migrations, version)
    db.execute("PRAGMA synchronous = NORMAL")


def _migrate(db: sqlite3.Connection, application_id: int, migrations: Migrations, version: int) -> None:
    db.execute("PRAGMA synchronous = FULL")
    with transaction(db):
        for step in migrations[version:]:
            for statement in step:
                db.execute(statement)
        db.execute(f"PRAGMA application_id = {application_id}")
        db.execute(f"PRAGMA user_version = {len(migrations)}")
