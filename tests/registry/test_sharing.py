"""Threads and processes on one file, and one connection that does not wait."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from pactown_runner.database import BusyError
from pactown_runner.errors import AdmissionError, RegistryError
from pactown_runner.registry import ClaimedError, Quota, Quotas, Registry, UserRow
from tests.registry.rows import ROOT, Clock, finished, sandbox_row, start, started


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
from pactown_runner.registry import Quota, Registry
from tests.registry.rows import Clock
from tests.registry.test_sharing import claim_all
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
