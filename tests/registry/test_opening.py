"""Opening the file: whose it is, and what it is."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pactown_runner.database import private_dir
from pactown_runner.errors import RegistryError
from pactown_runner.registry import Registry
from tests.registry.rows import run_python, user_row


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
