"""Files of other versions."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner.database import Database, private_dir
from pactown_runner.errors import RegistryError
from pactown_runner.registry import ClaimedError, Quota, Quotas, Registry
from tests.registry.rows import finished, sandbox_row, started, user_row


def test_newer_schema_is_refused_and_not_touched(path: Path, registry: Registry) -> None:
    registry.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(RegistryError, match="schema version 99") as caught:
        Registry(path)
    assert caught.value.remedy is not None
    assert path.read_bytes() == before


V1 = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
    "INSERT INTO meta VALUES ('state_id', '0123456789abcdef0123456789abcdef')",
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
    "INSERT INTO users VALUES (X'617574683a31', 'aaaaaaaa', 'pactown_aaaaaaaa', 64100, 64100, "
    "X'2f7372762f686f6d65732f706163746f776e5f6161616161616161', 1700000000.25, 'ready', 0)",
    "INSERT INTO users VALUES (X'676f6e65', 'bbbbbbbb', 'pactown_bbbbbbbb', 64101, 64101, X'2f78', 1.5, 'deleted', 0)",
    "INSERT INTO sandboxes VALUES ('aaaaaaaa', 'api', 'r1', 'o1', 'service', '{\"command\": [\"true\"]}', "
    "'/pactown.slice/pactown-aaaaaaaa.slice/api.scope', 1700000001.5)",
    f"PRAGMA application_id = {0x50414354}",
    "PRAGMA user_version = 1",
)
"""A file as version 0.1 wrote it; these statements never change."""


@pytest.fixture
def old(path: Path) -> Path:
    private_dir(path.parent)
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    for statement in V1:
        db.execute(statement)
    db.close()
    path.chmod(0o600)
    return path


def test_what_an_earlier_version_wrote_is_kept_and_can_do_more(old: Path) -> None:
    with Registry(old) as registry:
        assert registry.state_id == "0123456789abcdef0123456789abcdef"
        user, gone = registry.users.rows()
        assert user == replace(user_row("auth:1"), status="ready")
        assert (gone.saas_id, gone.status, gone.home) == ("gone", "deleted", Path("/x"))
        assert registry.sandboxes.rows() == [sandbox_row()]
        assert registry.services.absent() == []
        with pytest.raises(ClaimedError, match="o1"):
            registry.sandboxes.claim(sandbox_row())
        registry.services.register(sandbox_row("web"), Quotas(Quota(5, 5, 5)))
        assert registry.sandboxes.release(user.key, "api", "r1")
    with Registry(old) as again:
        assert [row.service_id for row in again.sandboxes.rows()] == ["web"]


def test_many_processes_migrate_one_file_once(old: Path) -> None:
    script = """
import sys
from pathlib import Path
from pactown_runner.registry import Registry
print("ready", flush=True)
sys.stdin.readline()
with Registry(Path(sys.argv[1])) as registry:
    print(len(registry.users.rows()), len(registry.services.absent()))
"""
    children = [started(script, str(old)) for _ in range(4)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    assert set(map(finished, children)) == {"2 0\n"}


def test_an_earlier_version_refuses_the_file_afterwards(old: Path) -> None:
    with Registry(old):
        pass
    before = old.read_bytes()
    with pytest.raises(RegistryError, match="schema version 2, and this version knows 1") as caught:
        Database(old, 0x50414354, [V1])
    assert caught.value.remedy is not None
    assert old.read_bytes() == before


def test_a_migration_that_fails_changes_nothing(old: Path) -> None:
    with pytest.raises(RegistryError, match="no such table"):
        Database(old, 0x50414354, [V1, ("CREATE TABLE more (x)", "DROP TABLE never_there")])
    with Registry(old) as registry:
        assert registry.sandboxes.rows() == [sandbox_row()]
        with registry._database as db:
            assert db.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'more'").fetchone() == (0,)
