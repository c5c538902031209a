"""The registry against real SQLite files, threads and processes."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner.database import BusyError, Database, private_dir
from pactown_runner.errors import AdmissionError, AlreadyRunningError, NotFoundError, RegistryError, StateError
from pactown_runner.registry import (
    HOLD,
    ClaimedError,
    HeldError,
    Quota,
    Quotas,
    Registry,
    SandboxRow,
    ServiceRow,
    UserRow,
)

ROOT = Path(__file__).resolve().parent.parent


def user_row(saas_id: str = "auth0|1", key: str = "aaaaaaaa", uid: int = 64100, virtual: bool = False) -> UserRow:
    return UserRow(
        saas_id=saas_id,
        key=key,
        username=f"pactown_{key}",
        uid=uid,
        gid=uid,
        home=Path("/srv/homes") / f"pactown_{key}",
        created_at=1700000000.25,
        virtual=virtual,
    )


def sandbox_row(service_id: str = "api", key: str = "aaaaaaaa", run_id: str = "r1", owner: str = "o1") -> SandboxRow:
    return SandboxRow(
        key=key,
        service_id=service_id,
        run_id=run_id,
        owner=owner,
        kind="service",
        spec='{"command": ["true"]}',
        cgroup=f"/pactown.slice/pactown-{key}.slice/{service_id}.scope",
        created_at=1700000001.5,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "state" / "registry.db"


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    with Registry(path) as registry:
        yield registry


@pytest.fixture
def ready(registry: Registry) -> UserRow:
    assert registry.users.add(user_row())
    return registry.users.mark_ready(user_row())


def service_row(service_id: str = "api", created_at: float = 1700000001.5) -> ServiceRow:
    row = sandbox_row(service_id)
    return ServiceRow(row.key, service_id, row.spec, created_at)


class Clock:
    """A clock that stands still until it is set."""

    now = 1700000000.0

    def __call__(self) -> float:
        return self.now


def statements(registry: Registry) -> list[str]:
    """What is executed from now on."""
    seen: list[str] = []
    with registry._database as db:
        db.set_trace_callback(seen.append)
    return seen


def run_python(source: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout


def started(source: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that is yet to be told to go on."""
    return subprocess.Popen(
        [sys.executable, "-c", source, *arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finished(child: subprocess.Popen[str]) -> str:
    """Tell it to go on; returns what it printed until its end."""
    output, _ = child.communicate("\n", timeout=60)
    assert child.returncode == 0
    return output


# Opening ---


def test_directory_and_files_are_private_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        with Registry(path) as registry:
            registry.users.add(user_row())
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("registry.db", "registry.db-wal", "registry.db-shm"), 0o600)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o711


def test_directory_that_lets_others_in_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.parent.chmod(0o755)
    with pytest.raises(RegistryError, match="lets others in") as caught:
        Registry(path)
    assert caught.value.remedy is not None
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755


def test_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(RegistryError, match="not a directory"):
        private_dir(tmp_path / "link")
    (tmp_path / "real" / "registry.db").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match="not a plain file"):
        Registry(tmp_path / "real" / "registry.db")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a directory away")
def test_directory_of_somebody_else_is_refused(path: Path) -> None:
    path.parent.mkdir(parents=True, mode=0o700)
    os.chown(path.parent, 64999, 64999)
    with pytest.raises(RegistryError, match="belongs to uid 64999"):
        Registry(path)


def test_state_id_is_made_once(path: Path, registry: Registry, tmp_path: Path) -> None:
    assert len(registry.state_id) == 32
    with Registry(path) as again:
        assert again.state_id == registry.state_id
    with Registry(tmp_path / "other" / "registry.db") as other:
        assert other.state_id != registry.state_id


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


def test_database_of_another_program_is_refused(path: Path) -> None:
    private_dir(path.parent)
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE users (id)")
    db.close()
    with pytest.raises(RegistryError, match="another program"):
        Registry(path)


def test_file_that_is_no_database_is_refused(path: Path) -> None:
    private_dir(path.parent)
    path.write_bytes(b"not a database, and long enough to have a header" * 100)
    with pytest.raises(RegistryError, match="not a database") as caught:
        Registry(path)
    assert caught.value.remedy is not None
    assert "backup" in caught.value.remedy


def test_corrupt_pages_are_refused(path: Path, registry: Registry) -> None:
    for number in range(200):
        registry.users.add(user_row(f"id{number}", f"{number:08x}", 64100 + number))
    registry.close()
    with path.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(b"\xff" * 4096)
    with pytest.raises(RegistryError, match=r"corrupt|malformed"):
        Registry(path)


def test_close_is_final_and_harmless_twice(registry: Registry) -> None:
    registry.close()
    registry.close()
    with pytest.raises(RegistryError, match="closed database"):
        registry.users.rows()


def test_a_forked_child_is_told(path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from pactown_runner.registry import Registry
from pactown_runner.errors import RegistryError
registry = Registry(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    try:
        registry.users.rows()
    except RegistryError as error:
        os._exit(7 if "parent process" in str(error) else 8)
    os._exit(9)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(registry.users.rows()))
registry.close()
"""
    assert run_python(script, str(path)).split() == ["7", "0"]


def test_many_threads_make_one_registry(tmp_path: Path) -> None:
    start = threading.Barrier(8, timeout=20)

    def open_it(number: int) -> list[str]:
        state_ids = []
        for attempt in range(10):
            start.wait()
            with Registry(tmp_path / str(attempt) / "registry.db") as registry:
                state_ids.append(registry.state_id)
        return state_ids

    with ThreadPoolExecutor(8) as pool:
        answers = {tuple(state_ids) for state_ids in pool.map(open_it, range(8))}
    assert len(answers) == 1
    assert len(set(answers.pop())) == 10


def test_many_processes_make_one_registry(path: Path) -> None:
    script = """
import sys
from pathlib import Path
from pactown_runner.registry import Registry
print("ready", flush=True)
sys.stdin.readline()
with Registry(Path(sys.argv[1])) as registry:
    print(registry.state_id)
"""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    state_ids = {child.communicate(timeout=60)[0] for child in children}
    assert [child.returncode for child in children] == [0] * 6
    assert len(state_ids) == 1


# Users ---

IDS = [
    "auth0|123456",
    "a/b",
    "🦀 emoji",
    "e\N{COMBINING ACUTE ACCENT}",  # looks like the next one, and is another id
    "\N{LATIN SMALL LETTER E WITH ACUTE}",
    "A",
    "a",
    "a ",
    "%61",
    "'; DROP TABLE users; --",
    "user@example.com",
]


def test_ids_come_back_byte_for_byte_after_reopening(path: Path, registry: Registry) -> None:
    for number, saas_id in enumerate(IDS):
        assert registry.users.add(user_row(saas_id, f"{number:08x}", 64100 + number))
    registry.close()
    with Registry(path) as again:
        assert [row.saas_id for row in again.users.rows()] == IDS
        for number, saas_id in enumerate(IDS):
            assert again.users.row(saas_id) == user_row(saas_id, f"{number:08x}", 64100 + number)
        assert again.users.row("E") is None


@pytest.mark.parametrize(
    "taken", [{"saas_id": "auth0|1"}, {"key": "aaaaaaaa"}, {"uid": 64100}], ids=["id", "key", "uid"]
)
def test_nothing_is_given_twice(registry: Registry, taken: dict[str, str | int]) -> None:
    free = user_row("auth0|2", "bbbbbbbb", 64101)
    first = user_row()
    assert registry.users.add(first)
    clash = replace(free, **{name: getattr(first, name) for name in taken})
    assert not registry.users.add(clash)
    assert registry.users.rows() == [first]
    assert registry.users.add(free)


def test_virtual_users_share_a_uid(registry: Registry) -> None:
    assert registry.users.add(user_row("a", "aaaaaaaa", 1000, virtual=True))
    assert registry.users.add(user_row("b", "bbbbbbbb", 1000, virtual=True))
    assert registry.users.used_uids() == set()


def test_tombstones_keep_key_and_uid(registry: Registry, ready: UserRow) -> None:
    with pytest.raises(StateError):
        registry.users.tombstone(ready)  # only after begin_removal
    registry.users.tombstone(registry.users.begin_removal(ready))
    assert registry.users.rows("ready", "creating", "deleting") == []
    assert registry.users.key_holder(ready.key) == ready.saas_id
    assert registry.users.used_uids() == {ready.uid}
    assert not registry.users.add(user_row("other", ready.key, 64101))
    assert not registry.users.add(user_row("other", "bbbbbbbb", ready.uid))
    with pytest.raises(StateError):
        registry.users.mark_ready(ready)
    with pytest.raises(StateError):
        registry.users.begin_removal(ready)


def test_revived_user_has_its_own_key_and_uid(registry: Registry, ready: UserRow) -> None:
    gone = registry.users.tombstone(registry.users.begin_removal(ready))
    revived = registry.users.revive(gone, 1800000000.0)
    assert revived == replace(gone, status="creating", created_at=1800000000.0)
    assert registry.users.row(ready.saas_id) == revived


def test_users_are_durable_and_claims_are_not_slowed(registry: Registry, path: Path) -> None:
    seen = statements(registry)
    registry.users.add(user_row())
    registry.users.mark_ready(user_row())
    registry.sandboxes.claim(sandbox_row())
    words = [statement.split()[0] + statement[-6:] for statement in seen]
    full, normal = "PRAGMA= FULL", "PRAGMANORMAL"
    assert words[0] == full
    assert words[2:4] == [normal, full]
    assert words[5] == normal
    assert len(words) == 7


# Uids ---


def unused(registry: Registry, first: int, last: int) -> list[int]:
    return [uid for uids in registry.users.unused_uids(first, last) for uid in uids]


def test_unused_uids_are_those_above_and_then_the_gaps(registry: Registry) -> None:
    assert unused(registry, 5, 8) == [5, 6, 7, 8]
    for number, uid in enumerate((7, 10, 11, 14, 100)):
        assert registry.users.add(user_row(f"id{number}", f"{number:08x}", uid))
    registry.users.add(user_row("virtual", "ffffffff", 15, virtual=True))
    assert unused(registry, 5, 16) == [15, 16, 5, 6, 8, 9, 12, 13]
    assert unused(registry, 7, 14) == [8, 9, 12, 13]
    assert unused(registry, 10, 11) == unused(registry, 100, 100) == []
    assert unused(registry, 101, 102) == [101, 102]
    assert next(registry.users.unused_uids(10, 11)) == range(12, 12)


def steps(registry: Registry, action: Callable[[], object]) -> int:
    """How many instructions of its virtual machine SQLite needs."""
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return 0

    with registry._database as db:
        db.set_progress_handler(step, 1)
    action()
    with registry._database as db:
        db.set_progress_handler(None, 1)
    return count


def test_the_next_uid_costs_the_same_however_many_there_are(registry: Registry) -> None:
    registry.users.add(user_row("first", "ffffffff", 1000))
    before = steps(registry, lambda: next(registry.users.unused_uids(1000, 9000)))
    for number in range(300):
        registry.users.add(user_row(f"id{number}", f"{number:08x}", 1001 + number))
    after = steps(registry, lambda: next(registry.users.unused_uids(1000, 9000)))
    assert before == after
    assert steps(registry, registry.users.used_uids) > 300  # such a look is seen


# Sandboxes ---


def test_claim_and_release(registry: Registry, ready: UserRow) -> None:
    row = sandbox_row()
    registry.sandboxes.claim(row)
    assert registry.sandboxes.row(ready.key, "api") == row
    assert registry.sandboxes.rows() == registry.sandboxes.rows("o1") == registry.sandboxes.rows(key=ready.key) == [row]
    assert registry.sandboxes.rows("o2") == registry.sandboxes.rows(key="bbbbbbbb") == []
    with pytest.raises(ClaimedError, match="o1") as caught:
        registry.sandboxes.claim(sandbox_row(run_id="r2", owner="o2"))
    assert isinstance(caught.value, AlreadyRunningError)
    assert (caught.value.owner, caught.value.run_id) == ("o1", "r1")
    registry.sandboxes.claim(sandbox_row("web", run_id="r3"))
    assert not registry.sandboxes.release(ready.key, "api", "r2")
    assert registry.sandboxes.release(ready.key, "api", "r1")
    assert not registry.sandboxes.release(ready.key, "api", "r1")
    assert [row.service_id for row in registry.sandboxes.rows()] == ["web"]


def test_claim_needs_a_ready_user(registry: Registry) -> None:
    with pytest.raises(NotFoundError):
        registry.sandboxes.claim(sandbox_row())
    registry.users.add(user_row())
    with pytest.raises(NotFoundError):
        registry.sandboxes.claim(sandbox_row())
    ready = registry.users.mark_ready(user_row())
    registry.users.begin_removal(ready)
    with pytest.raises(NotFoundError):
        registry.sandboxes.claim(sandbox_row())
    assert registry.sandboxes.rows() == []


def test_removal_waits_for_the_last_sandbox(registry: Registry, ready: UserRow) -> None:
    registry.sandboxes.claim(sandbox_row())
    with pytest.raises(StateError, match="something runs"):
        registry.users.begin_removal(ready)
    assert registry.users.row(ready.saas_id) == ready
    registry.sandboxes.release(ready.key, "api", "r1")
    registry.users.begin_removal(ready)


def test_take_over_is_compare_and_swap(registry: Registry, ready: UserRow) -> None:
    registry.sandboxes.claim(sandbox_row())
    assert not registry.sandboxes.take_over(ready.key, "api", "r1", "o9", "o2")
    assert not registry.sandboxes.take_over(ready.key, "api", "r9", "o1", "o2")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: registry.sandboxes.take_over(ready.key, "api", "r1", "o1", f"new{n}"), range(8)))
    assert sum(won) == 1
    assert registry.sandboxes.rows()[0].owner == f"new{won.index(True)}"


def test_update_spec_is_this_runs_only(registry: Registry, ready: UserRow) -> None:
    registry.sandboxes.claim(sandbox_row())
    assert not registry.sandboxes.update_spec(ready.key, "api", "r2", "{}")
    assert registry.sandboxes.update_spec(ready.key, "api", "r1", "{}")
    assert registry.sandboxes.rows() == [replace(sandbox_row(), spec="{}")]


def test_restart_is_another_run_of_the_same_claim(registry: Registry, ready: UserRow) -> None:
    registry.sandboxes.claim(sandbox_row())
    claim = (ready.key, "api", "r1")
    assert not registry.sandboxes.restart(claim, "o2", "r2", 1800000000.0)
    assert not registry.sandboxes.restart((ready.key, "api", "r0"), "o1", "r2", 1800000000.0)
    assert not registry.sandboxes.restart((ready.key, "web", "r1"), "o1", "r2", 1800000000.0)
    assert registry.sandboxes.rows() == [sandbox_row()]
    assert registry.sandboxes.restart(claim, "o1", "r2", 1800000000.0)
    assert registry.sandboxes.rows() == [replace(sandbox_row(run_id="r2"), created_at=1800000000.0)]
    assert not registry.sandboxes.restart(claim, "o1", "r3", 1800000000.0)
    assert not registry.sandboxes.release(*claim)


def test_while_a_user_is_held_nothing_starts_but_the_holds_own_job(registry: Registry, ready: UserRow) -> None:
    other = user_row("auth0|2", "bbbbbbbb", 64101)
    assert registry.users.add(other)
    registry.users.mark_ready(other)
    registry.services.register(sandbox_row("absent"))
    registry.sandboxes.release(ready.key, "absent", "r1")
    registry.sandboxes.claim(sandbox_row())
    registry.sandboxes.claim(sandbox_row(HOLD, run_id="h1"))
    for claim in (registry.sandboxes.claim, registry.services.register):
        for quota in (None, Quotas(Quota(starts_per_hour=1))):
            for name in ("new", "_job-h2", "_removal"):
                with pytest.raises(HeldError, match="exported or imported"):
                    claim(sandbox_row(name), quota)
    with pytest.raises(HeldError):
        registry.sandboxes.restart((ready.key, "api", "r1"), "o1", "r2", 1.0)
    with pytest.raises(AlreadyRunningError):
        registry.sandboxes.claim(sandbox_row(HOLD, run_id="h2"))
    assert registry.services.absent() == []
    registry.sandboxes.claim(sandbox_row("_job-h1"))
    registry.sandboxes.claim(sandbox_row(key=other.key))
    # What the hold has frozen is for its successor to know, and nobody else's business.
    assert registry.holds.frozen(ready.key) == frozenset()
    registry.holds.set_frozen(ready.key, "h0", ["web"])
    registry.holds.set_frozen(ready.key, "h1", ["web", "api"])
    assert registry.holds.frozen(ready.key) == {"api", "web"}
    assert registry.holds.frozen(other.key) == frozenset()
    registry.sandboxes.release(ready.key, HOLD, "h1")
    assert registry.holds.frozen(ready.key) == frozenset()
    assert registry.services.absent() == [service_row("absent")]
    assert registry.sandboxes.restart((ready.key, "api", "r1"), "o1", "r2", 1.0)
    # And none of the refused ones was counted.
    registry.sandboxes.claim(sandbox_row("new"), Quotas(Quota(starts_per_hour=1)))


# Services ---


def test_a_registered_service_is_absent_when_nobody_has_claimed_it(
    registry: Registry, path: Path, ready: UserRow
) -> None:
    registry.services.register(sandbox_row())
    registry.sandboxes.claim(sandbox_row("once"))
    assert registry.services.absent() == []
    registry.sandboxes.release(ready.key, "api", "r1")
    registry.sandboxes.release(ready.key, "once", "r1")
    assert registry.services.absent() == [service_row()]
    with Registry(path) as again:
        assert again.services.absent() == [service_row()]
    registry.sandboxes.claim(sandbox_row(run_id="r2"))
    assert registry.services.absent() == []


def test_absent_services_come_oldest_first(registry: Registry, ready: UserRow) -> None:
    for service_id, created_at in (("b", 3.0), ("c", 1.0), ("a", 2.0)):
        registry.services.register(replace(sandbox_row(service_id), created_at=created_at))
        registry.sandboxes.release(ready.key, service_id, "r1")
    assert registry.services.absent() == [service_row("c", 1.0), service_row("a", 2.0), service_row("b", 3.0)]


def test_a_service_that_is_registered_again_is_as_it_was_asked_for_last(registry: Registry, ready: UserRow) -> None:
    registry.services.register(sandbox_row())
    registry.sandboxes.release(ready.key, "api", "r1")
    registry.services.register(replace(sandbox_row(run_id="r2"), spec="{}", created_at=1800000000.0))
    registry.sandboxes.release(ready.key, "api", "r2")
    assert registry.services.absent() == [ServiceRow(ready.key, "api", "{}", 1800000000.0)]


def test_forgotten_services_do_not_come_back(registry: Registry, ready: UserRow) -> None:
    registry.services.register(sandbox_row())
    assert not registry.services.forget(ready.key, "web")
    assert registry.services.forget(ready.key, "api")
    assert not registry.services.forget(ready.key, "api")
    assert registry.sandboxes.rows() == [sandbox_row()]  # it is not to come back, and is still there
    registry.sandboxes.release(ready.key, "api", "r1")
    assert registry.services.absent() == []


def test_a_removed_users_services_do_not_come_back(registry: Registry, ready: UserRow) -> None:
    registry.users.add(user_row("other", "bbbbbbbb", 64101))
    registry.users.mark_ready(user_row("other", "bbbbbbbb", 64101))
    for key in (ready.key, "bbbbbbbb"):
        registry.services.register(sandbox_row(key=key))
    with pytest.raises(StateError):
        registry.users.begin_removal(ready)
    for key in (ready.key, "bbbbbbbb"):
        registry.sandboxes.release(key, "api", "r1")
    registry.users.begin_removal(ready)
    assert [row.key for row in registry.services.absent()] == ["bbbbbbbb"]


def test_what_cannot_be_claimed_is_not_registered(registry: Registry) -> None:
    with pytest.raises(NotFoundError):
        registry.services.register(sandbox_row())
    registry.users.add(user_row())
    ready = registry.users.mark_ready(user_row())
    registry.sandboxes.claim(sandbox_row())
    with pytest.raises(ClaimedError, match="o1"):
        registry.services.register(replace(sandbox_row(run_id="r2"), spec="{}"))
    registry.sandboxes.release(ready.key, "api", "r1")
    assert registry.services.absent() == []


def test_what_is_to_come_back_is_durable(registry: Registry, ready: UserRow) -> None:
    seen = statements(registry)
    registry.services.register(sandbox_row())
    registry.services.forget(ready.key, "api")
    words = [statement.split()[0] + statement[-6:] for statement in seen]
    full, normal = "PRAGMA= FULL", "PRAGMANORMAL"
    assert words.index(full) < words.index("COMMITCOMMIT") < words.index(normal)
    assert [word for word in words if word.startswith("PRAGMA")] == [full, normal] * 2


@pytest.mark.parametrize("room", [0, 30], ids=["not the claim", "the claim alone"])
def test_a_full_disk_is_a_typed_error_and_takes_nothing_by_halves(
    registry: Registry, ready: UserRow, room: int
) -> None:
    with registry._database as db:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages + room}")
    with pytest.raises(RegistryError, match="full") as caught:
        registry.services.register(replace(sandbox_row(), spec="x" * 100_000))
    assert caught.value.remedy == "free some space on its file system"
    assert registry.sandboxes.rows() == []
    assert registry.services.absent() == []
    registry.services.register(sandbox_row())


# Quotas ---


@pytest.fixture
def other(registry: Registry, ready: UserRow) -> UserRow:
    row = user_row("other", "bbbbbbbb", 64101)
    assert registry.users.add(row)
    return registry.users.mark_ready(row)


def test_a_cap_on_the_host_counts_all_users_sandboxes(registry: Registry, ready: UserRow, other: UserRow) -> None:
    quota = Quotas(Quota(max_sandboxes=3))
    registry.sandboxes.claim(sandbox_row(), quota)
    registry.sandboxes.claim(sandbox_row(key=other.key, owner="o2"), quota)
    registry.services.register(sandbox_row("web"), quota)
    for action in (registry.sandboxes.claim, registry.services.register):
        with pytest.raises(AdmissionError, match=r"3 sandboxes run on this host, and 3 may") as caught:
            action(sandbox_row("more"), quota)
        assert (caught.value.code, caught.value.limit, caught.value.retry_after) == ("refused", "max_sandboxes", None)
        assert caught.value.remedy is not None
    assert len(registry.sandboxes.rows()) == 3
    registry.sandboxes.claim(sandbox_row("free"))  # without a quota there is none
    registry.sandboxes.release(other.key, "api", "r1")
    registry.sandboxes.release(ready.key, "free", "r1")
    registry.sandboxes.claim(sandbox_row("more"), quota)
    registry.sandboxes.release(ready.key, "web", "r1")
    registry.sandboxes.release(ready.key, "more", "r1")
    assert registry.services.absent() == [service_row("web")]  # and not the one that was refused


def test_a_cap_on_a_user_counts_its_own(registry: Registry, ready: UserRow, other: UserRow) -> None:
    quota = Quotas(Quota(max_per_user=2))
    for key in (ready.key, other.key):
        for service_id in ("a", "b"):
            registry.sandboxes.claim(sandbox_row(service_id, key=key), quota)
        with pytest.raises(AdmissionError, match=f"2 sandboxes of user {key} run, and 2 may") as caught:
            registry.sandboxes.claim(sandbox_row("c", key=key), quota)
        assert caught.value.limit == "max_sandboxes_per_user"
    registry.sandboxes.release(ready.key, "a", "r1")
    registry.sandboxes.claim(sandbox_row("c"), quota)


def test_a_cap_of_none_at_all_lets_nothing_in(registry: Registry, ready: UserRow) -> None:
    for quota in (Quotas(Quota(max_sandboxes=0)), Quotas(Quota(max_per_user=0))):
        with pytest.raises(AdmissionError, match="0 sandboxes"):
            registry.sandboxes.claim(sandbox_row(), quota)
    assert registry.sandboxes.rows() == []


def test_the_runners_own_jobs_count_against_nobody(registry: Registry, ready: UserRow) -> None:
    for number in range(5):
        registry.sandboxes.claim(sandbox_row(f"_job-{number}"))
    quota = Quotas(Quota(max_sandboxes=2, max_per_user=2))
    registry.sandboxes.claim(sandbox_row("a"), quota)
    registry.sandboxes.claim(sandbox_row("Z_"), quota)
    with pytest.raises(AdmissionError):
        registry.sandboxes.claim(sandbox_row("c"), quota)


def test_what_runs_already_says_so_and_costs_no_start(registry: Registry, ready: UserRow) -> None:
    quota = Quotas(Quota(max_sandboxes=1, max_per_user=1, starts_per_minute=1))
    registry.sandboxes.claim(sandbox_row(), quota)
    with pytest.raises(ClaimedError, match="o1"):
        registry.sandboxes.claim(sandbox_row(run_id="r2"), quota)
    with pytest.raises(NotFoundError):
        registry.sandboxes.claim(sandbox_row(key="cccccccc"), quota)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(path: Path, ready: UserRow, clock: Clock) -> Iterator[Registry]:
    """The same registry under a clock of the test's."""
    with Registry(path, clock=clock) as registry:
        yield registry


def start(registry: Registry, per_minute: float, key: str = "aaaaaaaa") -> float:
    """Start and end something; returns for how many seconds that is refused, or 0."""
    try:
        registry.sandboxes.claim(sandbox_row(key=key), Quotas(Quota(starts_per_minute=per_minute)))
    except AdmissionError as error:
        refused = error
    else:
        assert registry.sandboxes.release(key, "api", "r1")
        return 0.0
    assert refused.limit == "starts_per_minute"
    assert refused.retry_after is not None
    assert refused.retry_after > 0
    return refused.retry_after


@pytest.mark.parametrize(
    ("per_minute", "at_once", "interval"),
    [(1, 1, 60.0), (60, 60, 1.0), (7, 7, 8.571428), (2.5, 2, 24.0), (0.25, 1, 240.0), (120, 120, 0.5)],
)
def test_a_minutes_starts_may_come_at_once_and_then_one_by_one(
    timed: Registry, clock: Clock, per_minute: float, at_once: int, interval: float
) -> None:
    assert [start(timed, per_minute) for _ in range(at_once)] == [0.0] * at_once
    # What is left of a bucket that does not hold a whole number of starts comes back the sooner.
    rest = interval * (1 - max(1, per_minute) % 1)
    for wait in [rest, *[interval] * (2 * at_once)]:
        assert start(timed, per_minute) == pytest.approx(wait, abs=1e-6)
        before = clock.now
        clock.now = before + wait - 2e-6
        assert 0 < start(timed, per_minute) < 1e-5
        clock.now = before + wait
        assert start(timed, per_minute) == 0.0
    clock.now += 86400
    assert [start(timed, per_minute) for _ in range(at_once)] == [0.0] * at_once
    assert start(timed, per_minute) > 0


def test_so_many_starts_as_are_due_and_no_more(timed: Registry, clock: Clock) -> None:
    chance = random.Random(1)
    begun, done = clock.now, 0
    while clock.now < begun + 3600:
        clock.now += chance.choice((0.0, 0.1, 0.7, 3.0))
        done += start(timed, 30) == 0.0
    # 30 at first, and one every 2 seconds: it asks far more often than that.
    assert done == 30 + (clock.now - begun) // 2


def test_users_have_starts_of_their_own(timed: Registry, other: UserRow) -> None:
    assert [start(timed, 2), start(timed, 2)] == [0.0, 0.0]
    assert start(timed, 2) > 0
    assert start(timed, 2, other.key) == 0.0


def test_a_refused_start_costs_none(timed: Registry, registry: Registry, clock: Clock) -> None:
    registry.sandboxes.claim(sandbox_row("held"))
    for _ in range(5):
        with pytest.raises(AdmissionError, match="sandboxes"):
            timed.sandboxes.claim(sandbox_row(), Quotas(Quota(max_per_user=1, starts_per_minute=2)))
    assert [start(timed, 2), start(timed, 2)] == [0.0, 0.0]
    assert {start(timed, 2) for _ in range(5)} == {30.0}
    clock.now += 30
    assert start(timed, 2) == 0.0


def test_what_starts_by_itself_costs_none(timed: Registry, ready: UserRow) -> None:
    timed.sandboxes.claim(sandbox_row(), Quotas(Quota(starts_per_minute=1)))
    for number in range(5):
        assert timed.sandboxes.restart((ready.key, "api", f"r{number + 1}"), "o1", f"r{number + 2}", 1.0)
    timed.sandboxes.release(ready.key, "api", "r6")
    timed.sandboxes.claim(sandbox_row(), Quotas(Quota(max_per_user=5)))
    timed.sandboxes.release(ready.key, "api", "r1")
    assert start(timed, 1) == 60.0


@pytest.mark.parametrize("back", [90.0, 86400.0, 1699999999.0])
def test_a_clock_that_is_put_back_keeps_nobody_out(timed: Registry, clock: Clock, back: float) -> None:
    assert [start(timed, 2), start(timed, 2)] == [0.0, 0.0]
    clock.now -= back
    assert [start(timed, 2), start(timed, 2)] == [0.0, 0.0]
    assert start(timed, 2) == 30.0


def test_a_clock_that_is_put_back_a_little_costs_what_it_was_put_back(timed: Registry, clock: Clock) -> None:
    assert [start(timed, 6) for _ in range(3)] == [0.0] * 3
    clock.now -= 20
    assert [start(timed, 6), start(timed, 6)] == [0.0, 10.0]
    clock.now += 3600
    assert [start(timed, 6) for _ in range(7)] == [0.0] * 6 + [10.0]


def test_another_rate_holds_at_once(timed: Registry) -> None:
    assert start(timed, 0.1) == 0.0
    assert start(timed, 0.1) == 600.0
    assert start(timed, 10) == 0.0
    assert [start(timed, 3) for _ in range(3)] == [0.0, 0.0, 6.0]


def test_starts_are_remembered_by_the_file(timed: Registry, path: Path, clock: Clock) -> None:
    assert start(timed, 1) == 0.0
    timed.close()
    with Registry(path, clock=clock) as again:
        assert start(again, 1) == 60.0


def test_a_claim_without_quota_is_one_statement(registry: Registry, ready: UserRow) -> None:
    seen = statements(registry)
    registry.sandboxes.claim(sandbox_row())
    assert len(seen) == 1
    registry.sandboxes.claim(sandbox_row("web"), Quotas(Quota(5, 5, 5.0)))
    assert not any("_'" in statement and "key" not in statement for statement in seen)  # nor is every row looked at


def test_the_count_of_a_host_that_is_capped_reads_names_alone(registry: Registry, ready: UserRow) -> None:
    def plan() -> str:
        with registry._database as db:
            return str(db.execute("EXPLAIN QUERY PLAN SELECT count(*) FROM sandboxes").fetchone()[3])

    registry.sandboxes.index_for(Quotas(Quota(max_per_user=5, starts_per_minute=5)))
    assert "sandboxes_names" not in plan()
    for _ in range(2):
        registry.sandboxes.index_for(Quotas(Quota(max_sandboxes=5)))
    assert plan() == "SCAN sandboxes USING COVERING INDEX sandboxes_names"
    registry.sandboxes.claim(sandbox_row(), Quotas(Quota(max_sandboxes=5)))
    assert registry.sandboxes.rows() == [sandbox_row()]


def claim_all(registry: Registry, owner: str, quota: Quota, *, keep: bool) -> list[str]:
    """Claim 100 names for two users; returns the key of each that was to be had. Also run in another process."""
    won = []
    for number in range(100):
        row = sandbox_row(f"{owner}-{number}", key="ab"[number % 2] * 8, owner=owner)
        try:
            registry.sandboxes.claim(row, Quotas(quota))
        except AdmissionError:
            continue
        won.append(row.key)
        rows = registry.sandboxes.rows()
        assert len(rows) <= (quota.max_sandboxes or 1000)
        assert sum(other.key == row.key for other in rows) <= (quota.max_per_user or 1000)
        if not keep:
            assert registry.sandboxes.release(row.key, row.service_id, row.run_id)
    return won


@pytest.mark.parametrize(
    ("quota", "keep"),
    [
        (Quota(max_sandboxes=37), True),
        (Quota(max_per_user=23), True),
        (Quota(max_sandboxes=5, max_per_user=3), False),
        (Quota(starts_per_minute=41), False),
        (Quota(31, 20, 50), True),
    ],
    ids=str,
)
def test_threads_and_processes_together_keep_to_a_quota(
    path: Path, timed: Registry, other: UserRow, quota: Quota, keep: bool
) -> None:
    script = """
import json, sys
from pathlib import Path
from tests.test_registry import Clock, Quota, Registry, claim_all
with Registry(Path(sys.argv[1]), clock=Clock()) as registry:
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(claim_all(registry, "process", Quota(*json.loads(sys.argv[2])), keep=sys.argv[3] == "True")))
"""
    child = started(script, str(path), json.dumps(quota), str(keep))
    together = threading.Barrier(7, timeout=20)
    with ExitStack() as stack:
        # Some threads with a connection of their own, as the event loop has, some with one that they share.
        own = [stack.enter_context(Registry(path, clock=Clock())) for _ in range(3)]

        def work(registry: Registry, owner: str) -> list[str]:
            together.wait()
            return claim_all(registry, owner, quota, keep=keep)

        pool = stack.enter_context(ThreadPoolExecutor(6))
        threads = [pool.submit(work, one, f"thread{n}") for n, one in enumerate([*own, timed, timed, timed])]
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        together.wait()
        keys = json.loads(finished(child)) + [key for thread in threads for key in thread.result()]
    won = {key: keys.count(key) for key in ("aaaaaaaa", "bbbbbbbb")}
    if quota.starts_per_minute is not None:
        assert all(count <= quota.starts_per_minute for count in won.values())
    if not keep:
        assert timed.sandboxes.rows() == []
        if quota.starts_per_minute is not None:
            assert won == dict.fromkeys(won, quota.starts_per_minute)
        return
    assert won == {key: len(timed.sandboxes.rows(key=key)) for key in won}
    if quota.max_sandboxes is not None:
        assert sum(won.values()) == quota.max_sandboxes
    else:
        assert won == dict.fromkeys(won, quota.max_per_user)


def test_threads_and_processes_claim_a_service_once(path: Path, registry: Registry, ready: UserRow) -> None:
    script = """
import sys
from pathlib import Path
from pactown_runner.registry import Registry, SandboxRow, ClaimedError
sys.stdin.readline()
won = 0
with Registry(Path(sys.argv[1])) as registry:
    for n in range(200):
        try:
            registry.sandboxes.claim(SandboxRow(key=sys.argv[2], service_id=f"s{n}", run_id="r", owner="process",
                kind="run", spec="{}", cgroup="/", created_at=0.0))
            won += 1
        except ClaimedError:
            pass
print(won)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(path), ready.key],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    started = threading.Barrier(5, timeout=20)

    def claim_all(owner: str) -> int:
        started.wait()
        won = 0
        for number in range(200):
            try:
                registry.sandboxes.claim(sandbox_row(f"s{number}", owner=owner))
            except ClaimedError:
                continue
            won += 1
        return won

    with ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(claim_all, f"thread{n}") for n in range(4)]
        started.wait()
        won_outside = int(child.communicate("\n", timeout=60)[0])
        won_here = sum(thread.result() for thread in threads)
    assert won_here + won_outside == 200
    assert len(registry.sandboxes.rows("process")) == won_outside
    assert len(registry.sandboxes.rows()) == 200


def test_locked_by_another_process_is_a_typed_error(registry: Registry, path: Path, ready: UserRow) -> None:
    with registry._database as db:
        db.execute("PRAGMA busy_timeout = 1")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(RegistryError, match="locked") as caught:
            registry.sandboxes.claim(sandbox_row())
        assert caught.value.remedy is not None
        assert registry.sandboxes.rows() == []  # reading goes on
    finally:
        other.execute("ROLLBACK")
        other.close()
    registry.sandboxes.claim(sandbox_row())


# ---- Without waiting


def test_one_that_does_not_wait_says_that_others_write(path: Path, registry: Registry, ready: UserRow) -> None:
    with Registry(path, waits=False) as quick:
        with sqlite3.connect(path) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(BusyError):
                quick.sandboxes.claim(sandbox_row(key=ready.key))
            other.rollback()
        other.close()
        quick.sandboxes.claim(sandbox_row(key=ready.key))
        assert registry.sandboxes.row(ready.key, "api") == sandbox_row(key=ready.key)
        assert quick.sandboxes.release(ready.key, "api", "r1")


def test_one_that_does_not_wait_keeps_to_quotas_too(path: Path, registry: Registry, ready: UserRow) -> None:
    quota = Quotas(Quota(5, 5, 2))
    with Registry(path, waits=False, clock=Clock()) as quick:
        with sqlite3.connect(path) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(BusyError):
                quick.sandboxes.claim(sandbox_row(), quota)
            other.rollback()
        other.close()
        assert [start(quick, 2), start(quick, 2), start(quick, 2)] == [0.0, 0.0, 30.0]


def test_checkpoints_keep_the_log_of_one_that_does_not_wait_short(
    path: Path, registry: Registry, ready: UserRow
) -> None:
    log = path.with_name("registry.db-wal")
    sizes = []
    with Registry(path, waits=False) as quick:
        for _ in range(3):
            for _ in range(100):
                quick.sandboxes.claim(sandbox_row(key=ready.key))
                quick.sandboxes.release(ready.key, "api", "r1")
            sizes.append(log.stat().st_size)
            registry.checkpoint()
    # As large as one round makes it, however many there are.
    assert sizes[0] > 100_000
    assert sizes[2] <= sizes[0] * 1.1
