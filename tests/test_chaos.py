"""Supervisors that are killed at random, again and again, on one state: nothing is lost, doubled or left behind.

`PACTOWN_CHAOS_CYCLES=200 pytest -s tests/test_chaos.py` takes some minutes, and says at its end where it killed them;
the suite itself has time for a few.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from cgroups import find_mount
from pactown_runner import Sandbox, Settings, Supervisor
from pactown_runner.models import State
from pactown_runner.registry import Registry, UserRow
from tests.chaos import MORE, PARTS, SERVICES, USERS
from tests.supervising import ROOT, eventually, leftovers, processes_of, tree

pytestmark = [pytest.mark.host, pytest.mark.deadline(3600)]

CYCLES = int(os.environ.get("PACTOWN_CHAOS_CYCLES", "12"))
MOST_STEPS = {"any": 20_000, "create": 300, "start": 2000, "stop": 1500, "rotate": 1500, "delete": 500}
"""Lines of each part of the code after which a supervisor dies at the latest; some seconds."""
MOST_SECONDS = 0.6

Name = tuple[str, str]
REFUSALS = {
    "restart": "StateError",  # it is just being started again
    "create": "StateError",  # its removal was cut short, and goes on
    "start": "StateError",
    "delete": "StateError",
}
"""What may be refused, and how."""


class Wreck:
    """What must be there after a crash, by what was begun and done last.

    Attributes:
        up: services that run.
        down: services that do not.
        known: users that are there.
        gone: users that are not, and which of home and logs are not either.
        seen: processes of services that have ended while a supervisor looked on: all that they printed is in the log.
        cleared: users whose logs may have been removed since the last look.
        erased: those whose logs were, for sure.
        failures: what was refused.
    """

    def __init__(self, base: Path) -> None:
        self.up: set[Name] = set()
        self.down: set[Name] = set()
        self.known: set[str] = set()
        self.gone: dict[str, set[str]] = {}
        self.seen: set[tuple[Name, str]] = set()
        self.cleared: set[str] = set()
        self.erased: set[str] = set()
        self.failures: list[str] = []
        self.deeds: Counter[str] = Counter()
        self.lines: list[str] = []
        self._running: dict[Name, str] = {}
        self._diary = base / "diary"

    def read(self) -> None:
        lines = self._diary.read_text().splitlines() if self._diary.exists() else []
        for line in lines[len(self.lines) :]:
            kind, what, user, *rest = line.split()
            if kind == "event":
                self._heard(what, (user, rest[0]), rest[1])
            elif kind == "failed":
                self.failures.append(line)
            elif what in ("create", "delete"):
                self._user(kind, what, user, set(rest))
            else:
                self._service(kind, what, (user, rest[0]))
            if kind == "done":
                self.deeds[what] += 1
        self.lines = lines

    def _heard(self, what: str, name: Name, pid: str) -> None:
        if what == "begun":
            self._running.clear()
        elif (before := self._running.pop(name, None)) is not None and name[0] not in self.cleared:
            self.seen.add((name, before))
        if pid != "-":
            self._running[name] = pid

    def _service(self, kind: str, what: str, name: Name) -> None:
        self.up.discard(name)
        self.down.discard(name)
        if kind == "done":
            (self.down if what == "stop" else self.up).add(name)
        if what == "start":
            self._user(kind, "create", name[0], set())

    def _user(self, kind: str, what: str, user: str, rest: set[str]) -> None:
        self.gone.pop(user, None)
        if kind == "done" and what == "create":
            self.known.add(user)
        if what == "delete":
            names = {(user, service) for service in SERVICES}
            self.known.discard(user)
            self.up -= names
            self.down -= names
            self.seen = {(name, pid) for name, pid in self.seen if name[0] != user}
            self.cleared.add(user)
            if kind == "done":
                self.gone[user] = rest
                self.erased |= {user} if "logs" in rest else set()
                self.down |= names


class Output:
    """What the processes of one service have printed, as far as it has been read. Read on from where it ended."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {}
        self.erased: set[str] = set()
        self._seq = 0

    async def read_on(self, supervisor: Supervisor, user: str, service: str) -> None:
        """Of each process's lines all are there, once and in order, up to the last that is."""
        async for record in supervisor.logs(user, service, since=self._seq):
            # Nothing else can be missing: numbers count what was dropped too.
            assert record.seq == self._seq + 1, f"{user}/{service}: {record} behind {self._seq}"
            self._seq = record.seq
            process, number = record.line.split()
            assert process not in self.erased, f"{user}/{service}: {record} of a log that was removed"
            assert int(number) == self.count.get(process, 0) + 1, f"{user}/{service}: {record}"
            self.count[process] = int(number)

    def read_anew(self, *, erased: bool) -> None:
        """The log may be another one, or surely is: its reading begins again."""
        if erased:
            self.erased |= set(self.count)
        self.count.clear()
        self._seq = 0


class Outputs(defaultdict[Name, Output]):
    """Of all services.

    Attributes:
        lines: how many there were in all, those of logs that were removed too.
        ends: processes whose lines were all there, and had to be.
    """

    lines = 0
    ends = 0

    def __init__(self) -> None:
        super().__init__(Output)


async def test_nothing_is_lost_doubled_or_left_however_often_it_is_killed(settings: Settings, tmp_path: Path) -> None:
    seed = int(os.environ.get("PACTOWN_CHAOS_SEED", "1"))
    chance = random.Random(seed)
    settings = replace(settings, log_rotate_bytes=16 << 10, log_keep=100_000, log_cap_bytes=1 << 30, on_exit="leave")
    wreck, outputs = Wreck(tmp_path), Outputs()
    for cycle in range(CYCLES):
        aim = chance.choice(list(MOST_STEPS)) if cycle % 3 else ""
        await asyncio.to_thread(_crash, settings, tmp_path, chance, aim)
        wreck.read()
        await _look(settings, wreck, outputs, cycle)
    async with Supervisor(settings=replace(settings, on_exit="stop")) as supervisor:
        for sandbox in supervisor.list():
            await sandbox.stop(grace=0)
        await _check_logs(supervisor, wreck, outputs)
    assert leftovers(settings) == []
    _reap_those_left()
    _check_points(tmp_path / "points", wreck, outputs)
    assert [line for line in wreck.failures if REFUSALS.get(line.split()[1], "") not in line.split()] == []


def _check_points(file: Path, wreck: Wreck, outputs: Outputs) -> None:
    points = file.read_text().splitlines() if file.exists() else []
    parts = Counter(point.split()[0] for point in set(points))
    print(
        f"{CYCLES} crashes, {len(points)} of them at {len(set(points))} distinct lines: {dict(parts)}",
        f"done: {dict(wreck.deeds)}; refused: {len(wreck.failures)}",
        f"{outputs.lines} lines were in the logs, each once; {outputs.ends} processes ended under a supervisor's eyes",
        *sorted(set(points)),
        sep="\n",
    )
    assert len(set(points)) >= min(50, len(points) * 3 // 4)
    assert CYCLES < 100 or set(parts) >= set(PARTS)


def _reap_those_left() -> None:
    """What this process started and left to others ended as our child all the same."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _crash(settings: Settings, base: Path, chance: random.Random, aim: str) -> None:
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
    # More of them early, where it takes over what the one before has left.
    steps = int(MOST_STEPS[aim] ** chance.random() ** 0.5) if aim else 0
    words = [str(base), str(chance.randrange(1 << 30)), str(steps), aim]
    command = [sys.executable, "-m", "tests.chaos", json.dumps(given), *words]
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


async def _look(settings: Settings, wreck: Wreck, outputs: Outputs, cycle: int) -> None:
    """What a successor finds is what must be there, and nothing else."""
    async with Supervisor(settings=settings) as supervisor:
        # A child that was just being born when its parent was killed keeps that one's lock for a moment.
        await eventually(lambda: len(os.listdir(settings.state_dir / "owners")) == 1)
        there = {(one.user_id, one.service_id): one for one in supervisor.list()}
        assert wreck.up <= set(there), f"lost in cycle {cycle}: {wreck.lines[-20:]}"
        assert not wreck.down & set(there), f"came back in cycle {cycle}: {wreck.lines[-20:]}"
        for sandbox in there.values():
            await eventually(partial(_runs, sandbox))
        with Registry(settings.state_dir / "registry.db") as registry:
            # A removal that was cut short goes on in a thread; the last that goes is the slice.
            await eventually(lambda: not registry.users.rows("deleting"))
            users = registry.users.rows()
            slices = {f"pactown-{row.key}.slice" for row in users if row.status == "deleted"}
            await eventually(lambda: not slices & {path.name for path in tree(settings)})
        _check_users(settings, wreck, users)
        _check_tree(settings, there, users)
        await _check_logs(supervisor, wreck, outputs)


def _runs(sandbox: Sandbox) -> bool:
    return sandbox.state is State.RUNNING


def _check_users(settings: Settings, wreck: Wreck, users: Collection[UserRow]) -> None:
    ready = {row.saas_id for row in users if row.status == "ready"}
    assert wreck.known <= ready
    assert not set(wreck.gone) & ready
    assert len({row.uid for row in users}) == len({row.key for row in users}) == len({row.saas_id for row in users})
    for row in users:
        if row.status != "deleted":
            continue
        assert processes_of(row.uid) == {}
        with pytest.raises(KeyError):
            pwd.getpwnam(row.username)
        without = wreck.gone.get(row.saas_id, set())
        assert not ("home" in without and row.home.exists())
        assert not ("logs" in without and (settings.log_dir / row.username).exists())


def _check_tree(settings: Settings, there: Collection[Name], users: Collection[UserRow]) -> None:
    keys = {row.key: row.saas_id for row in users}
    with Registry(settings.state_dir / "registry.db") as registry:
        rows = registry.sandboxes.rows()
    assert {(keys[row.key], row.service_id) for row in rows} == set(there)
    scopes = list((find_mount().path / settings.cgroup_slice).glob("*/*.scope"))
    for path in scopes:
        name = (
            keys[path.parent.name.removeprefix("pactown-").removesuffix(".slice")],
            path.name.removesuffix(".scope"),
        )
        assert name in there, f"a stray cgroup {path}"
        assert len((path / "cgroup.procs").read_text().split()) <= 1, f"{name} was started twice"
    for row in users:
        for cgroup in processes_of(row.uid).values():
            assert cgroup.endswith(tuple(f"pactown-{row.key}.slice/{service}.scope" for service in SERVICES)), cgroup
    runs = {(row.key, row.service_id, row.run_id) for row in rows}
    for fifo in (settings.run_dir / "fifo").iterdir():
        key, rest = fifo.name.split(".", 1)
        assert (key, *rest.rsplit(".", 2)[:2]) in runs, f"a stray FIFO {fifo}"


async def _check_logs(supervisor: Supervisor, wreck: Wreck, outputs: Outputs) -> None:
    for user in [f"{name}@{supervisor.settings.cgroup_slice}" for name in USERS + MORE]:
        known = await supervisor.users.get(user)
        for service in SERVICES:
            output = outputs[user, service]
            before = sum(output.count.values())
            if user in wreck.cleared:
                output.read_anew(erased=user in wreck.erased)
            if known is None:
                continue
            await output.read_on(supervisor, user, service)
            outputs.lines += max(sum(output.count.values()) - before, 0)
            folder = known.home_dir / "sandboxes" / service
            for process, found in output.count.items():
                # The line is printed before the count, which is empty if the process was killed while writing it.
                if counted := _read(folder / f"count.{process}"):
                    assert found <= int(counted) + 1, f"{folder} has never printed what is in its log"
            for pid in [pid for name, pid in wreck.seen if name == (user, service)]:
                outputs.ends += _check_whole(folder, pid, output)
    wreck.cleared.clear()
    wreck.erased.clear()
    wreck.seen.clear()


def _check_whole(folder: Path, pid: str, output: Output) -> bool:
    """The last process of this number has ended while a supervisor looked on: not one of its lines is missing."""
    born = [int(path.name.rpartition("-")[2]) for path in folder.glob(f"count.{pid}-*")]
    if not born or not (counted := _read(folder / f"count.{pid}-{max(born)}")):
        return False
    found = output.count.get(f"{pid}-{max(born)}", 0)
    assert int(counted) <= found, f"{folder}: of {counted} lines of {pid} {found} are in the log"
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""
