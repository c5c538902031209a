"""Owners: real locks, real processes, really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pactown_runner.errors import RegistryError, StateError
from pactown_runner.owners import Owner, Owners

ROOT = Path(__file__).resolve().parent.parent

LIVE = """
import sys
from pathlib import Path
from pactown_runner.owners import Owner
owner = Owner(Path(sys.argv[1]))
print(owner.owner_id, flush=True)
sys.stdin.read()
owner.close()
"""


class Process:
    """An owner in a process of its own."""

    def __init__(self, state_dir: Path, source: str = LIVE) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-c", source, str(state_dir)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.popen.stdout is not None
        self.owner_id = self.popen.stdout.readline().strip()

    def end(self, *, kill: bool) -> None:
        if kill:
            self.popen.kill()
        self.popen.communicate("", timeout=30)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def process(state_dir: Path) -> Iterator[Process]:
    process = Process(state_dir)
    yield process
    process.end(kill=True)


def test_owner_is_alive_until_it_is_closed(state_dir: Path) -> None:
    owners = Owners(state_dir)
    with Owner(state_dir) as owner:
        owner.check()
        assert owners.alive(owner.owner_id)
        assert owner.alive(owner.owner_id)
        assert owners.dead_owners() == []
        assert not owners.remove(owner.owner_id)
        owner.check()
    assert not owners.alive(owner.owner_id)
    assert list(owners.directory.iterdir()) == []
    owner.close()
    with pytest.raises(StateError):
        owner.check()


def test_killed_owner_is_dead_at_once(state_dir: Path, process: Process) -> None:
    owners = Owners(state_dir)
    assert owners.alive(process.owner_id)
    process.end(kill=True)
    assert not owners.alive(process.owner_id)
    assert owners.dead_owners() == [process.owner_id]
    assert owners.remove(process.owner_id)
    assert not owners.remove(process.owner_id)
    assert owners.dead_owners() == []


def test_owner_that_ends_by_itself_leaves_nothing(state_dir: Path, process: Process) -> None:
    process.end(kill=False)
    assert process.popen.returncode == 0
    owners = Owners(state_dir)
    assert not owners.alive(process.owner_id)
    assert list(owners.directory.iterdir()) == []


def test_programs_that_it_started_do_not_keep_it_alive(state_dir: Path) -> None:
    source = LIVE.replace(
        "sys.stdin.read()",
        "import subprocess\nchild = subprocess.Popen(['cat'], close_fds=False)\n"
        "print(child.pid, flush=True)\nimport signal; signal.pause()",
    )
    process = Process(state_dir, source)
    assert process.popen.stdout is not None
    child = os.pidfd_open(int(process.popen.stdout.readline()))
    try:
        assert Owners(state_dir).alive(process.owner_id)
        process.popen.kill()
        process.popen.wait(timeout=30)
        signal.pidfd_send_signal(child, 0)  # it still runs
        assert not Owners(state_dir).alive(process.owner_id)
    finally:
        process.end(kill=True)
        os.close(child)


def test_forked_children_do_not_keep_it_alive(state_dir: Path) -> None:
    source = LIVE.replace(
        "sys.stdin.read()",
        "import os, signal\nready, go = os.pipe()\nchild = os.fork()\n"
        "if child == 0:\n    os.write(go, b'x'); sys.stdin.read(); os._exit(0)\n"
        "os.read(ready, 1)\nprint(child, flush=True)\nsignal.pause()",
    )
    process = Process(state_dir, source)
    assert process.popen.stdout is not None
    child = os.pidfd_open(int(process.popen.stdout.readline()))
    try:
        assert Owners(state_dir).alive(process.owner_id)  # the child that closed its copy did not unlock it
        process.popen.kill()
        process.popen.wait(timeout=30)
        signal.pidfd_send_signal(child, 0)  # it still runs
        assert not Owners(state_dir).alive(process.owner_id)
    finally:
        process.end(kill=True)
        os.close(child)


def test_unknown_and_malformed_ids(state_dir: Path) -> None:
    owners = Owners(state_dir)
    assert not owners.alive("0" * 16)
    assert not owners.remove("0" * 16)
    for bad in ("", "../registry", "0" * 15, "0" * 16 + "\n"):
        with pytest.raises(RegistryError):
            owners.alive(bad)


def test_other_files_are_no_owners(state_dir: Path) -> None:
    owners = Owners(state_dir)
    (owners.directory / "README").touch()
    (owners.directory / ("a" * 16)).touch()
    assert owners.dead_owners() == ["a" * 16]


def test_owner_whose_file_was_removed_finds_out(state_dir: Path) -> None:
    with Owner(state_dir) as owner:
        (owner.directory / owner.owner_id).unlink()
        with pytest.raises(StateError, match="lost its file"):
            owner.check()
        (owner.directory / owner.owner_id).touch()
        with pytest.raises(StateError, match="lost its file"):
            owner.check()


def test_one_of_many_buries_a_dead_owner(state_dir: Path) -> None:
    owners = Owners(state_dir)
    (owners.directory / ("b" * 16)).touch()
    assert owners.dead_owners() == ["b" * 16]
    start = threading.Barrier(8, timeout=20)

    def bury(_: int) -> bool:
        start.wait()
        return owners.remove("b" * 16)

    with ThreadPoolExecutor(8) as pool:
        buried = sum(pool.map(bury, range(8)))
    # A lock that is held for the look of another says nothing: then nobody removes it, and the next look does.
    assert buried <= 1
    assert buried == 1 or owners.remove("b" * 16)
    assert owners.dead_owners() == []


def test_lookers_do_not_take_each_other_for_the_owner(state_dir: Path) -> None:
    owners = Owners(state_dir)
    (owners.directory / ("c" * 16)).touch()

    def look(_: int) -> bool:
        return any(owners.alive("c" * 16) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(look, range(4)))


def test_births_beside_eager_buriers(state_dir: Path) -> None:
    """Whoever sweeps while an owner is born may take its file for a dead one's: the owner then begins anew."""
    owners = Owners(state_dir)
    stop = threading.Event()

    def sweep() -> int:
        removed = 0
        while not stop.is_set():
            for name in os.listdir(owners.directory):
                removed += owners.remove(name)
        return removed

    with ThreadPoolExecutor(2) as pool:
        sweepers = [pool.submit(sweep) for _ in range(2)]
        try:
            for _ in range(300):
                with Owner(state_dir) as owner:
                    owner.check()
                    assert owners.alive(owner.owner_id)
        finally:
            stop.set()
        for sweeper in sweepers:
            sweeper.result()
    assert list(owners.directory.iterdir()) == []
