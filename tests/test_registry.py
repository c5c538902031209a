"""The registry against real SQLite files, threads and processes."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pactown_runner.database import BusyError, private_dir
from pactown_runner.errors import AlreadyRunningError, NotFoundError, RegistryError, StateError
from pactown_runner.registry import ClaimedError, Registry, SandboxRow, UserRow

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
    assert registry.add_user(user_row())
    return registry.mark_ready(user_row())


def run_python(source: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout


# Opening ---


def test_directory_and_files_are_private_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        with Registry(path) as registry:
            registry.add_user(user_row())
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
        registry.add_user(user_row(f"id{number}", f"{number:08x}", 64100 + number))
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
        registry.users()


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
        registry.users()
    except RegistryError as error:
        os._exit(7 if "parent process" in str(error) else 8)
    os._exit(9)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(registry.users()))
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
        assert registry.add_user(user_row(saas_id, f"{number:08x}", 64100 + number))
    registry.close()
    with Registry(path) as again:
        assert [row.saas_id for row in again.users()] == IDS
        for number, saas_id in enumerate(IDS):
            assert again.user(saas_id) == user_row(saas_id, f"{number:08x}", 64100 + number)
        assert again.user("E") is None


@pytest.mark.parametrize(
    "taken", [{"saas_id": "auth0|1"}, {"key": "aaaaaaaa"}, {"uid": 64100}], ids=["id", "key", "uid"]
)
def test_nothing_is_given_twice(registry: Registry, taken: dict[str, str | int]) -> None:
    free = user_row("auth0|2", "bbbbbbbb", 64101)
    first = user_row()
    assert registry.add_user(first)
    clash = replace(free, **{name: getattr(first, name) for name in taken})
    assert not registry.add_user(clash)
    assert registry.users() == [first]
    assert registry.add_user(free)


def test_virtual_users_share_a_uid(registry: Registry) -> None:
    assert registry.add_user(user_row("a", "aaaaaaaa", 1000, virtual=True))
    assert registry.add_user(user_row("b", "bbbbbbbb", 1000, virtual=True))
    assert registry.used_uids() == set()


def test_tombstones_keep_key_and_uid(registry: Registry, ready: UserRow) -> None:
    with pytest.raises(StateError):
        registry.tombstone(ready)  # only after begin_removal
    registry.tombstone(registry.begin_removal(ready))
    assert registry.users("ready", "creating", "deleting") == []
    assert registry.key_holder(ready.key) == ready.saas_id
    assert registry.used_uids() == {ready.uid}
    assert not registry.add_user(user_row("other", ready.key, 64101))
    assert not registry.add_user(user_row("other", "bbbbbbbb", ready.uid))
    with pytest.raises(StateError):
        registry.mark_ready(ready)
    with pytest.raises(StateError):
        registry.begin_removal(ready)


def test_revived_user_has_its_own_key_and_uid(registry: Registry, ready: UserRow) -> None:
    gone = registry.tombstone(registry.begin_removal(ready))
    revived = registry.revive(gone, 1800000000.0)
    assert revived == replace(gone, status="creating", created_at=1800000000.0)
    assert registry.user(ready.saas_id) == revived


def test_users_are_durable_and_claims_are_not_slowed(registry: Registry, path: Path) -> None:
    seen: list[str] = []
    with registry._database as db:
        db.set_trace_callback(seen.append)
    registry.add_user(user_row())
    registry.mark_ready(user_row())
    registry.claim(sandbox_row())
    words = [statement.split()[0] + statement[-6:] for statement in seen]
    full, normal = "PRAGMA= FULL", "PRAGMANORMAL"
    assert words[0] == full
    assert words[2:4] == [normal, full]
    assert words[5] == normal
    assert len(words) == 7


# Sandboxes ---


def test_claim_and_release(registry: Registry, ready: UserRow) -> None:
    row = sandbox_row()
    registry.claim(row)
    assert registry.row(ready.key, "api") == row
    assert registry.rows() == registry.rows("o1") == registry.rows(key=ready.key) == [row]
    assert registry.rows("o2") == registry.rows(key="bbbbbbbb") == []
    with pytest.raises(ClaimedError, match="o1") as caught:
        registry.claim(sandbox_row(run_id="r2", owner="o2"))
    assert isinstance(caught.value, AlreadyRunningError)
    assert (caught.value.owner, caught.value.run_id) == ("o1", "r1")
    registry.claim(sandbox_row("web", run_id="r3"))
    assert not registry.release(ready.key, "api", "r2")
    assert registry.release(ready.key, "api", "r1")
    assert not registry.release(ready.key, "api", "r1")
    assert [row.service_id for row in registry.rows()] == ["web"]


def test_claim_needs_a_ready_user(registry: Registry) -> None:
    with pytest.raises(NotFoundError):
        registry.claim(sandbox_row())
    registry.add_user(user_row())
    with pytest.raises(NotFoundError):
        registry.claim(sandbox_row())
    ready = registry.mark_ready(user_row())
    registry.begin_removal(ready)
    with pytest.raises(NotFoundError):
        registry.claim(sandbox_row())
    assert registry.rows() == []


def test_removal_waits_for_the_last_sandbox(registry: Registry, ready: UserRow) -> None:
    registry.claim(sandbox_row())
    with pytest.raises(StateError, match="something runs"):
        registry.begin_removal(ready)
    assert registry.user(ready.saas_id) == ready
    registry.release(ready.key, "api", "r1")
    registry.begin_removal(ready)


def test_take_over_is_compare_and_swap(registry: Registry, ready: UserRow) -> None:
    registry.claim(sandbox_row())
    assert not registry.take_over(ready.key, "api", "r1", "o9", "o2")
    assert not registry.take_over(ready.key, "api", "r9", "o1", "o2")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: registry.take_over(ready.key, "api", "r1", "o1", f"new{n}"), range(8)))
    assert sum(won) == 1
    assert registry.rows()[0].owner == f"new{won.index(True)}"


def test_update_spec_is_this_runs_only(registry: Registry, ready: UserRow) -> None:
    registry.claim(sandbox_row())
    assert not registry.update_spec(ready.key, "api", "r2", "{}")
    assert registry.update_spec(ready.key, "api", "r1", "{}")
    assert registry.rows() == [replace(sandbox_row(), spec="{}")]


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
            registry.claim(SandboxRow(key=sys.argv[2], service_id=f"s{n}", run_id="r", owner="process",
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
                registry.claim(sandbox_row(f"s{number}", owner=owner))
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
    assert len(registry.rows("process")) == won_outside
    assert len(registry.rows()) == 200


def test_locked_by_another_process_is_a_typed_error(registry: Registry, path: Path, ready: UserRow) -> None:
    with registry._database as db:
        db.execute("PRAGMA busy_timeout = 1")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(RegistryError, match="locked") as caught:
            registry.claim(sandbox_row())
        assert caught.value.remedy is not None
        assert registry.rows() == []  # reading goes on
    finally:
        other.execute("ROLLBACK")
        other.close()
    registry.claim(sandbox_row())


# ---- Without waiting


def test_one_that_does_not_wait_says_that_others_write(path: Path, registry: Registry, ready: UserRow) -> None:
    with Registry(path, waits=False) as quick:
        with sqlite3.connect(path) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(BusyError):
                quick.claim(sandbox_row(key=ready.key))
            other.rollback()
        other.close()
        quick.claim(sandbox_row(key=ready.key))
        assert registry.row(ready.key, "api") == sandbox_row(key=ready.key)
        assert quick.release(ready.key, "api", "r1")


def test_checkpoints_keep_the_log_of_one_that_does_not_wait_short(
    path: Path, registry: Registry, ready: UserRow
) -> None:
    log = path.with_name("registry.db-wal")
    sizes = []
    with Registry(path, waits=False) as quick:
        for _ in range(3):
            for _ in range(100):
                quick.claim(sandbox_row(key=ready.key))
                quick.release(ready.key, "api", "r1")
            sizes.append(log.stat().st_size)
            registry.checkpoint()
    # As large as one round makes it, however many there are.
    assert sizes[0] > 100_000
    assert sizes[2] <= sizes[0] * 1.1
