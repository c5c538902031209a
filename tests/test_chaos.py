"""Supervisors that are killed at random, again and again, on one state: nothing is lost, doubled or left behind.

`PACTOWN_CHAOS_CYCLES=200 pytest tests/test_chaos.py` takes some minutes; the suite itself has time for a few.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from cgroups import find_mount
from pactown_runner import Sandbox, Settings, Supervisor
from pactown_runner.models import State
from pactown_runner.registry import Registry
from tests.chaos import SERVICES, USERS
from tests.supervising import ROOT, eventually, leftovers

pytestmark = [pytest.mark.host, pytest.mark.deadline(3600)]

CYCLES = int(os.environ.get("PACTOWN_CHAOS_CYCLES", "12"))
MOST_STEPS = 20_000
MOST_SECONDS = 0.6

Name = tuple[str, str]


class Wreck:
    """What must be there after a crash: what was begun and done last for each service."""

    def __init__(self, base: Path) -> None:
        self.up: set[Name] = set()
        self.down: set[Name] = set()
        self.failures: list[str] = []
        self.lines: list[str] = []
        self._diary = base / "diary"

    def read(self) -> None:
        lines = self._diary.read_text().splitlines() if self._diary.exists() else []
        for line in lines[len(self.lines) :]:
            kind, what, user, service, *_ = line.split()
            name = (user, service)
            self.up.discard(name)
            self.down.discard(name)
            if kind == "done":
                (self.down if what == "stop" else self.up).add(name)
            elif kind == "failed":
                self.failures.append(line)
        self.lines = lines


async def test_nothing_is_lost_doubled_or_left_however_often_it_is_killed(settings: Settings, tmp_path: Path) -> None:
    seed = int(os.environ.get("PACTOWN_CHAOS_SEED", "1"))
    chance = random.Random(seed)
    settings = replace(settings, log_rotate_bytes=64 << 10, log_keep=1000, log_cap_bytes=1 << 30, on_exit="leave")
    wreck = Wreck(tmp_path)
    for cycle in range(CYCLES):
        steps = chance.randrange(1, MOST_STEPS) if cycle % 3 else 0
        await asyncio.to_thread(_crash, settings, tmp_path, chance.randrange(1 << 30), steps, chance)
        wreck.read()
        await _look(settings, wreck, cycle)
    async with Supervisor(settings=replace(settings, on_exit="stop")) as supervisor:
        for sandbox in supervisor.list():
            await sandbox.stop(grace=0)
        await _check_logs(supervisor)
    assert leftovers(settings) == []
    _reap_those_left()
    points = (tmp_path / "points").read_text().splitlines() if (tmp_path / "points").exists() else []
    print(f"{CYCLES} crashes, {len(set(points))} distinct lines, refused: {wreck.failures}")
    assert len(set(points)) >= min(50, len(points) * 3 // 4)


def _reap_those_left() -> None:
    """What this process started and left to others ended as our child all the same."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _crash(settings: Settings, base: Path, seed: int, steps: int, chance: random.Random) -> None:
    given = {
        name: str(value) if isinstance(value := getattr(settings, name), Path) else value
        for name in (
            "users_base",
            "state_dir",
            "log_dir",
            "run_dir",
            "cgroup_slice",
            "uid_ranges",
            "takeover_interval",
            "log_rotate_bytes",
            "log_keep",
            "log_cap_bytes",
        )
    }
    command = [sys.executable, "-m", "tests.chaos", json.dumps(given), str(base), str(seed), str(steps)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() == "ready\n" and not steps:
                process.wait(chance.uniform(0, MOST_SECONDS))
            process.wait(20 if steps else 0)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()


async def _look(settings: Settings, wreck: Wreck, cycle: int) -> None:
    """What a successor finds is what must be there, and nothing else."""
    async with Supervisor(settings=settings) as supervisor:
        there = {(one.user_id, one.service_id): one for one in supervisor.list()}
        assert wreck.up <= set(there), f"lost in cycle {cycle}: {wreck.lines[-20:]}"
        assert not wreck.down & set(there), f"came back in cycle {cycle}: {wreck.lines[-20:]}"
        for sandbox in there.values():
            await eventually(partial(_runs, sandbox))
        _check_tree(settings, there)


def _runs(sandbox: Sandbox) -> bool:
    return sandbox.state is State.RUNNING


def _check_tree(settings: Settings, there: Collection[Name]) -> None:
    with Registry(settings.state_dir / "registry.db") as registry:
        keys = {row.key: row.saas_id for row in registry.users()}
        rows = registry.rows()
    assert {(keys[row.key], row.service_id) for row in rows} == set(there)
    scopes = list((find_mount().path / settings.cgroup_slice).glob("*/*.scope"))
    for path in scopes:
        name = (
            keys[path.parent.name.removeprefix("pactown-").removesuffix(".slice")],
            path.name.removesuffix(".scope"),
        )
        assert name in there, f"a stray cgroup {path}"
        assert len((path / "cgroup.procs").read_text().split()) <= 1, f"{name} was started twice"
    runs = {(row.key, row.service_id, row.run_id) for row in rows}
    for fifo in (settings.run_dir / "fifo").iterdir():
        key, rest = fifo.name.split(".", 1)
        assert (key, *rest.rsplit(".", 2)[:2]) in runs, f"a stray FIFO {fifo}"


async def _check_logs(supervisor: Supervisor) -> None:
    """Of each process's lines all are there, once and in order, up to the last that is."""
    for user in USERS:
        if (known := await supervisor.users.get(user)) is None:
            continue
        for service in SERVICES:
            numbers: dict[str, list[int]] = defaultdict(list)
            async for record in supervisor.logs(user, service):
                process, number = record.line.split()
                numbers[process].append(int(number))
            for process, found in numbers.items():
                assert found == list(range(1, len(found) + 1)), f"{user}/{service}: {process}"
                counted = known.home_dir / f"sandboxes/{service}/count.{process}"
                # The line is printed before the count, which is empty if the process was killed while writing it.
                if counted.exists() and (text := counted.read_text()):
                    assert len(found) <= int(text) + 1
