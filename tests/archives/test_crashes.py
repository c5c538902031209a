"""Exports and imports killed at any moment: the home is the old one or the new one, the archive whole or none."""

from __future__ import annotations

import asyncio
import os
import random
import tarfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from cgroups import find_mount
from pactown_runner import Sandbox
from pactown_runner.archives import end_hold, export_home, import_home, sweep_fresh_homes
from pactown_runner.config import Settings
from pactown_runner.host import Host
from pactown_runner.models import IsolatedUser, State
from pactown_runner.registry import HOLD, Registry
from pactown_runner.supervisor import Supervisor
from tests.archives.trees import Look, as_tenant, differences, looks
from tests.supervising import USER, Start, eventually, leftovers, line_of, processes_of, python, soon, spec

pytestmark = pytest.mark.host

ROUNDS = int(os.environ.get("PACTOWN_ARCHIVE_KILLS", "6"))
"""So many kills at random moments."""

IMPORT = """
from pactown_runner.archives import import_home
async def work(supervisor):
    user = await supervisor.users.get_or_create("auth0|123456")
    await say("ready")
    archive = Path(await told())
    await asyncio.to_thread(import_home, supervisor._host, user, archive)
    await say("done")
    await told()
"""
EXPORT = IMPORT.replace("import_home", "export_home")

TREE = """
import os, sys
number = sys.argv[1]
for folder in range(20):
    os.makedirs("sandboxes/%s/%d" % (number, folder))
    for name in range(20):
        with open("sandboxes/%s/%d/%d" % (number, folder, name), "w") as file:
            file.write(number * 1000)
with open("number", "w") as file:
    file.write(number)
"""


def fresh(settings: Settings) -> list[Path]:
    return [path for path in settings.users_base.iterdir() if path.name.startswith(".fresh")]


async def nothing_claimed(host: Host) -> None:
    """Wait until all of a killed process is taken over: what it was just about to start may hold its lock on."""
    await eventually(lambda: not host.registry.sandboxes.rows())


async def two_homes(settings: Settings) -> tuple[IsolatedUser, dict[str, Path], dict[str, dict[bytes, Look]]]:
    """A tenant, two archives of what its home may be, and how it looks then."""
    archives, homes = {}, {}
    async with Supervisor(settings=settings) as supervisor:
        user = await supervisor.users.get_or_create(USER)
        empty = settings.users_base / "empty.tar.gz"
        assert supervisor._host is not None
        await asyncio.to_thread(export_home, supervisor._host, user, empty)
        for number in "12":
            await asyncio.to_thread(import_home, supervisor._host, user, empty)
            as_tenant(user, TREE, number)
            archives[number] = settings.users_base / f"{number}.tar.gz"
            await asyncio.to_thread(export_home, supervisor._host, user, archives[number])
            homes[number] = looks(user.home_dir)
    return user, archives, homes


def moments(settings: Settings, user: IsolatedUser) -> dict[str, Callable[[], bool]]:
    """When to kill, other than at random: as soon as one of these is so."""
    inode = user.home_dir.stat().st_ino

    def filled() -> int:
        return sum(
            len(names) for path in fresh(settings) for _, folders, files in os.walk(path) for names in (folders, files)
        )

    return {
        "made": lambda: bool(fresh(settings)),
        "begun": lambda: filled() > 0,
        "half": lambda: filled() > 200,
        "swapped": lambda: user.home_dir.stat().st_ino != inode,
        "emptied": lambda: user.home_dir.stat().st_ino != inode and filled() < 300,
        "removed": lambda: user.home_dir.stat().st_ino != inode and not fresh(settings),
    }


@pytest.mark.deadline(120 + 10 * ROUNDS)
async def test_a_killed_import_is_one_or_none(settings: Settings, child: Start) -> None:
    user, archives, homes = await two_homes(settings)
    found = []
    names = list(moments(settings, user))
    for name in [*names, *["at random"] * ROUNDS]:
        before = (user.home_dir / "number").read_text()
        process = child(IMPORT, role="one-shot")
        assert await process.line() == "ready"
        watched = moments(settings, user)
        process.tell(str(archives["2" if before == "1" else "1"]))
        if name in watched:
            while not watched[name]():
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(random.uniform(0, 0.6))
        await process.killed()
        async with Supervisor(settings=settings, role="one-shot") as successor:
            host, removals = successor._host, successor._removals
            assert host is not None
            assert removals is not None
            await nothing_claimed(host)
            # It has looked for that itself, too early perhaps.
            await asyncio.to_thread(removals.join)
            await asyncio.to_thread(sweep_fresh_homes, host)
            number = (user.home_dir / "number").read_text()
            assert differences(homes[number], looks(user.home_dir)) == [], name
            assert fresh(settings) == []
            assert host.registry.sandboxes.rows() == []
        assert processes_of(user.linux_uid) == {}
        found.append((name, number != before))
    assert not leftovers(settings)
    assert {new for _, new in found} == {True, False}


@pytest.mark.deadline(120 + 10 * ROUNDS)
async def test_a_killed_export_leaves_nothing(settings: Settings, child: Start, users_base: Path) -> None:
    user, archives, _ = await two_homes(settings)
    out = users_base / "out"
    out.mkdir()
    for older in (False, True) * ROUNDS:
        target = out / "archive.tar.gz"
        target.unlink(missing_ok=True)
        if older:
            target.write_bytes(archives["1"].read_bytes())
        process = child(EXPORT, role="one-shot")
        assert await process.line() == "ready"
        process.tell(str(target))
        await asyncio.sleep(random.uniform(0, 0.3))
        await process.killed()
        names = os.listdir(out)
        if names == ["archive.tar.gz"]:
            with tarfile.open(target) as tar:
                assert tar.getnames()[-1] == "pactown-manifest.jsonl"
        else:
            assert not older
            assert names == []
        async with Supervisor(settings=settings, role="one-shot") as successor:
            host = successor._host
            assert host is not None
            await nothing_claimed(host)
        assert processes_of(user.linux_uid) == {}


async def test_what_a_killed_export_had_frozen_is_thawed(settings: Settings, child: Start, users_base: Path) -> None:
    # So that nobody else comes first.
    settings = replace(settings, takeover_interval=3600.0)
    async with Supervisor(settings=settings) as supervisor:
        host = supervisor._host
        assert host is not None
        await line_of(await supervisor.start(spec("echo ready; while :; do :; done")))
        user = await supervisor.users.get_or_create(USER)
        as_tenant(user, 'import os; open("big", "wb").write(os.urandom(64 << 20))')
        process = child(EXPORT, role="one-shot")
        assert await process.line() == "ready"
        process.tell(str(users_base / "archive.tar.gz"))
        with host.tree.open_scope(f"pactown-{user.key}.slice", "api.scope") as scope:
            await eventually(scope.frozen)
            await process.killed()
            assert scope.frozen()
            row = host.registry.sandboxes.row(user.key, HOLD)
            assert row is not None
            await asyncio.to_thread(end_hold, host, (user.key, HOLD, row.run_id))
            await eventually(lambda: not scope.frozen())
        # Its job is ended by whoever takes it over.
        async with Supervisor(settings=settings, role="one-shot"):
            pass
        assert [row.service_id for row in host.registry.sandboxes.rows()] == ["api"]


# ---- What a killed export had frozen, and runs on under another supervisor

COUNT = """
import time
number = 0
print("ready", flush=True)
while True:
    number += 1
    with open("number", "w") as file:
        file.write(str(number))
    time.sleep(0.01)
"""
SERVER = """
from pactown_runner.archives import export_home
async def work(supervisor):
    await supervisor.start(spec(COMMAND, service="Api"))
    await say("started")
    if archive := await told():
        user = await supervisor.users.get_or_create("auth0|123456")
        await asyncio.to_thread(export_home, supervisor._host, user, Path(archive))
    await told()
""".replace("COMMAND", repr(python(COUNT)))
STUCK = """
from pactown_runner.archives import export_home
async def work(supervisor):
    user = await supervisor.users.get_or_create("auth0|123456")
    def on_progress(done, total):
        if not said:
            said.append(done)
            print("half", flush=True)
            sys.stdin.readline()
    said = []
    archive = settings.users_base / "archive.tar.gz"
    await asyncio.to_thread(export_home, supervisor._host, user, archive, progress=on_progress)
    await say("done")
    await told()
"""


def counted(sandbox: Sandbox) -> int:
    file = sandbox.user.home_dir / "sandboxes/Api/number"
    # It may have been frozen before it counted at all.
    return int(file.read_text() or 0) if file.exists() else 0


async def runs_on(sandbox: Sandbox) -> None:
    before = counted(sandbox)
    await eventually(lambda: counted(sandbox) > before)


async def big_home(settings: Settings) -> IsolatedUser:
    """A tenant whose home takes a while to be packed."""
    async with Supervisor(settings=settings) as supervisor:
        user = await supervisor.users.get_or_create(USER)
    as_tenant(user, 'import os; open("big", "wb").write(os.urandom(64 << 20))')
    return user


@pytest.mark.parametrize("exporter", ["the server", "another process"])
async def test_what_a_killed_export_had_frozen_runs_on(settings: Settings, child: Start, exporter: str) -> None:
    user = await big_home(settings)
    server = child(SERVER)
    assert await server.line() == "started"
    processes = [server]
    if exporter == "another process":
        processes.append(child(STUCK, role="one-shot"))
    else:
        server.tell(str(settings.users_base / "archive.tar.gz"))
    with closing(Registry(settings.state_dir / "registry.db")) as registry:
        await eventually(lambda: registry.holds.frozen(user.key) == {"Api"})
    frozen = find_mount().path / settings.cgroup_slice / f"pactown-{user.key}.slice/Api.scope/cgroup.events"
    await eventually(lambda: "frozen 1" in frozen.read_text())
    for process in processes:
        await process.killed()
    async with Supervisor(settings=settings) as supervisor:
        await eventually(supervisor.list)
        sandbox = supervisor.get(USER, "Api")
        await soon(sandbox.started())
        await runs_on(sandbox)
        assert sandbox.state is State.RUNNING
        assert sandbox.restarts == 0
        host = supervisor._host
        assert host is not None
        await eventually(lambda: [row.service_id for row in host.registry.sandboxes.rows()] == ["Api"])
        # And nobody is held any more.
        assert (await soon(supervisor.run(spec("true", service="another")))).ok
        await soon(sandbox.stop(0))


async def test_what_is_taken_over_while_another_process_exports_runs_on_afterwards(
    settings: Settings, child: Start
) -> None:
    await big_home(settings)
    server = child(SERVER)
    assert await server.line() == "started"  # which would wait for the export's end
    exporter = child(STUCK, role="one-shot")
    assert await exporter.line() == "half"
    await server.killed()
    async with Supervisor(settings=settings) as supervisor:
        await eventually(supervisor.list)
        sandbox = supervisor.get(USER, "Api")
        await soon(sandbox.started())
        # It stands still, but nobody who looks after it has to do anything about that.
        assert sandbox.state is State.RUNNING
        exporter.tell("")
        assert await exporter.line() == "done"
        await runs_on(sandbox)
        await soon(sandbox.stop(0))
        exporter.tell("")
        assert await exporter.ended() == 0
    assert leftovers(settings) == []
