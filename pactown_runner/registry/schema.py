"""The schema of the file, and how it came about."""

from __future__ import annotations

__all__ = ["APPLICATION_ID", "MIGRATIONS"]

APPLICATION_ID = 0x50414354

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
        "INSERT INTO meta VALUES ('state_id', lower(hex(randomblob(16))))",
        """CREATE TABLE users (
            saas_id BLOB NOT NULL UNIQUE,
            key TEXT NOT NULL UNIQUE,
            username TEXT NOT NULL UNIQUE,
            uid INTEGER NOT NULL,
            gid INTEGER NOT NULL,
            home BLOB NOT NULL,
            created_at REAL NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('creating', 'ready', 'deleting', 'deleted')),
            virtual INTEGER NOT NULL
        ) STRICT""",
        "CREATE UNIQUE INDEX users_uid ON users (uid) WHERE NOT virtual",
        """CREATE TABLE sandboxes (
            key TEXT NOT NULL,
            service_id TEXT NOT NULL,
            run_id TEXT NOT NULL,
            owner TEXT NOT NULL,
            kind TEXT NOT NULL CHECK (kind IN ('service', 'run')),
            spec TEXT NOT NULL,
            cgroup TEXT NOT NULL,
            created_at REAL NOT NULL,
            PRIMARY KEY (key, service_id)
        ) STRICT, WITHOUT ROWID""",
    ),
    (
        """CREATE TABLE services (
            key TEXT NOT NULL,
            service_id TEXT NOT NULL,
            spec TEXT NOT NULL,
            created_at REAL NOT NULL,
            PRIMARY KEY (key, service_id)
        ) STRICT, WITHOUT ROWID""",
        # When the user's bucket for so many seconds is full again, in microseconds since the epoch: as many starts are
        # missing from it as are due until then. One number that only whole numbers are added to stays exact.
        """CREATE TABLE starts (
            key TEXT NOT NULL,
            seconds INTEGER NOT NULL,
            full_at INTEGER NOT NULL,
            PRIMARY KEY (key, seconds)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE standings (
            key TEXT NOT NULL PRIMARY KEY,
            tier TEXT,
            blocked INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID""",
    ),
)
"""See `Database`: steps are only ever added."""
