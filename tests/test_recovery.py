"""Supervisors that are killed outright, and what their successors make of what they left."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cgroups import find_mount
from pactown_runner import Sandbox, Settings, Supervisor, recovery
from pactown_runner.errors import AlreadyRunningError
from pactown_runner.exits import reap, reap_foreign
from pactown_runner.host import LoopHost
from pactown_runner.models import IsolatedUser
from pactown_runner.outcomes import ExitStatus
from pactown_runner.owners import Owners
from pactown_runner.registry import Registry
from pactown_runner.trees import Scope
from pactown_runner.users import Users
from tests.supervising import (
    PATIENCE,
    USER,
    Child,
    Start,
    eventually,
    leftovers,
    line_of,
    lines,
    processes_of,
    python,
    soon,
    spec,
    tree,
)

pytestmark = pytest.mark.host
each_loop = pytest.mark.each_loop

SLEEP = ["sleep", "1000"]

COUNT = """
import os, sys, time
print("ready", flush=True)
n = 0
while not os.path.exists("stop"):
    n += 1
    os.write(1, b"%d\\n" % n)
    if n % 50 == 0:
        time.sleep(0.001)
os.write(1, b"end %d\\n" % n)
"""

SERVICE = """
async def work(supervisor):
    sandbox = await supervisor.start(spec(COMMAND, **OPTIONS))
    await say(f"{sandbox.pid} {sandbox.run_id} {sandbox.run.started_at}")
    await asyncio.sleep(1000)
"""
SEVERAL = """
async def work(supervisor):
    for name in "abc":
        await supervisor.start(spec(["sleep", "1000"], name))
    await say("ready")
    await asyncio.sleep(1000)
"""
ADOPTER = """
async def work(supervisor):
    await say(" ".join(["ready", *sorted(sandbox.service_id for sandbox in supervisor.list())]))
    await asyncio.sleep(1000)
"""
LISTER = """
async def work(supervisor):
    await say("up")
    while await told():
        await say(" ".join(["has", *(sandbox.service_id for sandbox in supervisor.list())]))
"""


def service(command: object, **options: object) -> str:
    return SERVICE.replace("COMMAND", repr(command)).replace("OPTIONS", repr(options))


async def adopted(supervisor: Supervisor, service_id: str = "api") -> Sandbox:
    def here() -> Sandbox | None:
        return next((one for one in supervisor.list() if one.service_id == service_id), None)

    await eventually(here)
    sandbox = here()
    assert sandbox is not None
    await soon(sandbox.started())
    await last_step(supervisor)
    return sandbox


async def last_step(supervisor: Supervisor) -> None:
    """Of a takeover: without it the dead owner's file would be left to yet another supervisor."""
    await eventually(lambda: not Owners(supervisor.settings.state_dir).dead_owners())


# ---- A service whose supervisor died


@each_loop
async def test_a_live_server_takes_a_service_over(supervisor: Supervisor, child: Start) -> None:
    process = child(service(python(COUNT)))
    pid, run_id, started_at = (await process.line()).split()
    assert supervisor.list() == []
    with pytest.raises(AlreadyRunningError):
        await supervisor.start(spec(SLEEP))
    begin = time.monotonic()
    await process.killed()
    sandbox = await adopted(supervisor)
    assert time.monotonic() - begin < PATIENCE / 2
    assert (str(sandbox.pid), sandbox.run_id, str(sandbox.run.started_at)) == (pid, run_id, started_at)
    assert sandbox.state == "running"
    assert sandbox.isolation.placement == "born"
    assert sandbox.isolation.uid == (sandbox.user.linux_uid,) * 3
    await line_of(sandbox, "50")
    os.kill(sandbox.pid, 0)
    # It can be used like any other.
    await sandbox.freeze()
    await sandbox.thaw()
    assert ((await sandbox.stats()).cpu_usage_usec or 0) > 0
    outcome = await soon(sandbox.stop(grace=5))
    assert outcome.reason == "stopped"
    assert outcome.wall_seconds >= time.time() - float(started_at) - 5
    assert processes_of(sandbox.user.linux_uid) == {}
    numbers = [int(line) for line in await lines(sandbox) if line.isdecimal()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers


async def test_a_start_that_came_too_early_does_not_hide_what_is_taken_over(
    supervisor: Supervisor, child: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = child(service(SLEEP))
    await process.line()
    arrived, go_on = threading.Event(), threading.Event()
    get_or_create = Users.get_or_create

    def slowly(users: Users, user_id: str) -> IsolatedUser:
        arrived.set()
        assert go_on.wait(PATIENCE)
        return get_or_create(users, user_id)

    monkeypatch.setattr(Users, "get_or_create", slowly)
    starting = asyncio.create_task(supervisor.start(spec(SLEEP)))
    await asyncio.to_thread(arrived.wait, PATIENCE)
    with Registry(supervisor.settings.state_dir / "registry.db") as registry:
        (before,) = registry.sandboxes.rows()
        await process.killed()
        await eventually(lambda: registry.sandboxes.rows()[0].owner != before.owner)
    go_on.set()
    with pytest.raises(AlreadyRunningError):
        await soon(starting)
    sandbox = await adopted(supervisor)
    assert supervisor.get(sandbox.user_id, sandbox.service_id) is sandbox
    assert (await soon(supervisor.stop(sandbox.user_id, sandbox.service_id, grace=0))).reason == "stopped"


async def test_a_new_server_takes_a_service_over_before_it_is_entered(settings: Settings, child: Start) -> None:
    process = child(service(SLEEP))
    pid = (await process.line()).split()[0]
    await process.killed()
    async with Supervisor(settings=settings) as supervisor:
        (sandbox,) = supervisor.list()
        assert (sandbox.state, str(sandbox.pid)) == ("running", pid)
        assert sandbox.spec.argv == tuple(SLEEP)
    assert leftovers(settings) == []


@pytest.mark.parametrize("ends", ["exit 7", "kill -9 $$"])
async def test_how_an_adopted_one_ended_is_said_if_the_kernel_knows(
    supervisor: Supervisor, child: Start, ends: str
) -> None:
    process = child(service(f"until [ -e go ]; do sleep 0.01; done; {ends}"))
    await process.line()
    await process.killed()
    sandbox = await adopted(supervisor)
    (sandbox.user.home_dir / "sandboxes/api/go").touch()
    outcome = await soon(sandbox.wait())
    known = ("exited", 7, None) if ends == "exit 7" else ("signaled", None, 9)
    assert (outcome.reason, outcome.exit_code, outcome.signal) in [known, ("lost", None, None)]
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 15):
        assert outcome.reason == known[0]


async def test_one_that_ended_while_nobody_looked_is_put_away(settings: Settings, child: Start) -> None:
    process = child(service("echo before; until [ -e go ]; do sleep 0.01; done; echo after; exit 7"))
    await process.line()
    async with Supervisor(settings=settings, role="one-shot") as other:
        user = await other.users.get_or_create(USER)
    # What it has printed and nobody has taken would go with it.
    log = settings.log_dir / user.linux_username / "api.jsonl"
    await eventually(lambda: log.exists() and "before" in log.read_text())
    await process.killed()
    (user.home_dir / "sandboxes/api/go").touch()
    await eventually(lambda: processes_of(user.linux_uid) == {})
    async with Supervisor(settings=settings) as supervisor:
        # Taken over, though nothing of it runs: what the kernel still tells of its end is heard.
        await eventually(lambda: supervisor.list() == [])
        assert [record.line async for record in supervisor.logs(USER, "api")][:1] == ["before"]
        assert (await soon(supervisor.run(spec("exit 0")))).ok
    assert leftovers(settings) == []


async def test_an_adopted_one_keeps_its_time_limit(supervisor: Supervisor, child: Start) -> None:
    process = child(service(SLEEP, timeout=3.0))
    started_at = float((await process.line()).split()[2])
    await process.killed()
    sandbox = await adopted(supervisor)
    outcome = await soon(sandbox.wait())
    assert outcome.reason == "timed-out"
    assert 2.9 < time.time() - started_at < PATIENCE
    assert 2.9 < outcome.wall_seconds < PATIENCE


async def test_a_frozen_service_is_found_frozen(supervisor: Supervisor, child: Start) -> None:
    process = child(service(SLEEP).replace("    await say", "    await sandbox.freeze()\n    await say"))
    await process.line()
    await process.killed()
    sandbox = await adopted(supervisor)
    assert sandbox.state == "frozen"
    await sandbox.thaw()
    assert (await soon(sandbox.stop(grace=5))).signal == signal.SIGTERM


async def test_a_clean_end_leaves_nothing_to_take_over(supervisor: Supervisor, child: Start) -> None:
    process = child(service(SLEEP).replace("asyncio.sleep(1000)", "told()"))
    await process.line()
    process.tell("end")
    assert await process.ended() == 0
    await asyncio.sleep(2 * supervisor.settings.takeover_interval)
    assert supervisor.list() == []


async def test_on_crash_kill_ends_services_too(settings: Settings, child: Start) -> None:
    printed = "    async for _ in sandbox.logs(follow=True):\n        break\n    await say"
    process = child(service("echo x; exec sleep 1000").replace("    await say", printed))
    pid = int((await process.line()).split()[0])
    await process.killed()
    async with Supervisor(settings=replace(settings, on_crash="kill")) as supervisor:
        assert supervisor.list() == []
        assert not _runs(pid)
        assert [record.line async for record in supervisor.logs(USER, "api")] == ["x"]
    assert leftovers(settings) == []


async def test_who_does_not_stay_leaves_services_alone_and_ends_runs(settings: Settings, child: Start) -> None:
    process = child(
        """
async def work(supervisor):
    await supervisor.start(spec(["sleep", "1000"]))
    run = await supervisor.start_run(spec("echo begun; trap '' TERM; sleep 1000 & wait", service="run"))
    async for record in run.logs(follow=True):
        await say("ready")
        break
    await asyncio.sleep(1000)
"""
    )
    await process.line()
    await process.killed()
    async with Supervisor(settings=settings, role="one-shot") as supervisor:
        user = await supervisor.users.get_or_create(USER)
        assert supervisor.list() == []
        assert {cgroup.rpartition("/")[2] for cgroup in processes_of(user.linux_uid).values()} == {"api.scope"}
        assert [record.line async for record in supervisor.logs(USER, "run")] == ["begun"]
        with pytest.raises(AlreadyRunningError):
            await supervisor.start(spec(SLEEP))
    async with Supervisor(settings=settings) as supervisor:
        assert [sandbox.service_id for sandbox in supervisor.list()] == ["api"]
    assert leftovers(settings) == []


async def test_a_run_ends_with_its_supervisor(supervisor: Supervisor, child: Start) -> None:
    process = child(
        """
async def work(supervisor):
    run = await supervisor.start_run(spec("echo begun; setsid sleep 1000 & sleep 1000"))
    async for record in run.logs(follow=True):
        await say("ready")
        break
    await asyncio.sleep(1000)
"""
    )
    await process.line()
    user = await supervisor.users.get_or_create(USER)
    await eventually(lambda: len(processes_of(user.linux_uid)) > 1)
    await process.killed()
    await eventually(lambda: processes_of(user.linux_uid) == {})
    await eventually(lambda: not [path for path in tree(supervisor.settings) if path.name == "api.scope"])
    assert supervisor.list() == []
    await eventually(lambda: len(leftovers(supervisor.settings)) == 1)  # our owner
    assert [record.line async for record in supervisor.logs(USER, "api")] == ["begun"]


async def test_a_service_that_cannot_be_adopted_is_ended(
    settings: Settings, child: Start, caplog: pytest.LogCaptureFixture
) -> None:
    process = child(
        """
async def work(supervisor):
    for name in ("bad", "good"):
        await supervisor.start(spec(["sleep", "1000"], service=name))
    await say("ready")
    await asyncio.sleep(1000)
"""
    )
    await process.line()
    await process.killed()
    with Registry(settings.state_dir / "registry.db") as registry:
        (row,) = [row for row in registry.sandboxes.rows() if row.service_id == "bad"]
        registry.sandboxes.update_spec(row.key, row.service_id, row.run_id, '{"of": "another version"}')
    with caplog.at_level(logging.ERROR):
        async with Supervisor(settings=settings) as supervisor:
            assert [sandbox.service_id for sandbox in supervisor.list()] == ["good"]
            assert {cgroup.rpartition("/")[2] for cgroup in processes_of(_uid(supervisor)).values()} == {"good.scope"}
            assert "cannot go on" in caplog.text
    assert leftovers(settings) == []


async def test_a_service_whose_output_is_gone_is_ended(settings: Settings, child: Start) -> None:
    process = child(service(SLEEP))
    pid = int((await process.line()).split()[0])
    await process.killed()
    for path in (settings.run_dir / "fifo").iterdir():
        path.unlink()
    async with Supervisor(settings=settings) as supervisor:
        assert supervisor.list() == []
        assert not _runs(pid)
    assert leftovers(settings) == []


async def test_of_several_servers_one_takes_it(settings: Settings, child: Start) -> None:
    process = child(service(SLEEP))
    pid = (await process.line()).split()[0]
    async with Supervisor(settings=settings) as one, Supervisor(settings=settings) as two:
        third = child(LISTER)
        assert await third.line() == "up"

        def owner() -> str:
            with Registry(settings.state_dir / "registry.db") as registry:
                return registry.sandboxes.rows()[0].owner

        async def owned() -> list[str]:
            third.tell("list")
            return [sandbox.service_id for sandbox in one.list() + two.list()] + (await third.line()).split()[1:]

        first = owner()
        await process.killed()
        await eventually(lambda: owner() != first)
        async with asyncio.timeout(PATIENCE):
            while not await owned():
                await asyncio.sleep(0.005)
        await asyncio.sleep(4 * settings.takeover_interval)
        assert await owned() == ["api"]
        assert _runs(int(pid))
        await third.killed()


# ---- Many deaths in a row


async def test_twenty_deaths_in_a_row_lose_and_double_no_line(settings: Settings, child: Start) -> None:
    chance = random.Random(20)
    process = child(service(python(COUNT)))
    pid = (await process.line()).split()[0]
    for _ in range(20):
        await asyncio.sleep(chance.uniform(0, 0.05))
        await process.killed()
        process = child(ADOPTER)
        if chance.random() < 0.7:
            assert await process.line() == "ready api"
        else:
            # In the middle of its coming up.
            await asyncio.sleep(chance.uniform(0.1, 0.5))
    await process.killed()
    async with Supervisor(settings=settings) as supervisor:
        (sandbox,) = supervisor.list()
        assert str(sandbox.pid) == pid
        (sandbox.user.home_dir / "sandboxes/api/stop").touch()
        await soon(sandbox.wait())
        records = [record async for record in sandbox.logs()]
        assert [record.seq for record in records] == list(range(1, len(records) + 1))
        first, *numbers, last = [record.line for record in records]
        assert (first, last) == ("ready", f"end {len(numbers)}")
        assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
        assert len(numbers) > 1000
    assert leftovers(settings) == []


# ---- Deaths in the middle of a start

DIE = """
import signal
import cgroups
from pactown_runner import main_process, program, registry, trees
from pactown_runner.logs import pump

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before(target, name, argument=None):
    whole = getattr(target, name)
    def wrapped(*args, **kwargs):
        if argument is None or argument in args:
            die()
        return whole(*args, **kwargs)
    setattr(target, name, wrapped)

def after(target, name):
    whole = getattr(target, name)
    def wrapped(*args, **kwargs):
        answer = whole(*args, **kwargs)
        die()
    setattr(target, name, wrapped)

async def work(supervisor):
    await supervisor.users.get_or_create("auth0|123456")
    WHERE
    await supervisor.KIND(spec(["sleep", "1000"]))
    await say("survived")
"""

POINTS = {
    "before the claim": "before(registry.sandboxes.SandboxTable, 'claim')",
    "after the claim": "after(registry.sandboxes.SandboxTable, 'claim')",
    "after the slice": "after(trees.Tree, '_make_slice')",
    "before the slice is marked": "before(cgroups.Cgroup, 'mark')",
    "before the cgroup is marked": "before(cgroups.Cgroup, 'mark', 'pactown.run')",
    "after the cgroup": "after(trees.Tree, 'scope')",
    "after the limits": "after(trees.Tree, 'limit')",
    "after one FIFO": "after(pump.Fifo, 'create')",
    "after the FIFOs": "after(pump.LogPump, 'create')",
    "before the launch": "before(program, 'launch_async')",
    "before it is written down": "before(main_process.Main, 'mark')",
    "after it is written down": "after(main_process.Main, 'mark')",
    "before its output is taken": "before(pump.LogPump, 'start')",
}


# Nothing is written down for those who come after a one-shot run.
PLACES = [
    (kind, point)
    for kind in ("start", "start_run")
    for point in POINTS
    if kind == "start" or "written down" not in point
]


@pytest.mark.parametrize(("kind", "point"), PLACES)
async def test_nothing_half_made_is_left_of_a_start(settings: Settings, child: Start, point: str, kind: str) -> None:
    process = child(DIE.replace("WHERE", POINTS[point]).replace("KIND", kind))
    assert await process.ended() == -signal.SIGKILL, process.errors()
    whole = kind == "start" and point in ("after it is written down", "before its output is taken")
    async with Supervisor(settings=settings) as supervisor:
        uid = _uid(supervisor)
        if whole:
            # Whoever asked for it never heard of it; but it is all there, so it is as good as any.
            (sandbox,) = supervisor.list()
            assert (await soon(sandbox.stop(grace=5))).signal == signal.SIGTERM
        await eventually(lambda: not supervisor.list())
        assert processes_of(uid) == {}
        assert [what for what in leftovers(settings) if "/owners/" not in what and not what.endswith(".slice")] == []
        assert (await soon(supervisor.run(spec("exit 0")))).ok
    assert leftovers(settings) == []


@pytest.mark.parametrize("seed", range(12))
async def test_death_at_any_moment_of_a_start_leaves_nothing(settings: Settings, child: Start, seed: int) -> None:
    """From outside, at random: also inside system calls."""
    source = """
async def work(supervisor):
    await supervisor.users.get_or_create("auth0|123456")
    await say("ready")
    while True:
        runs = [supervisor.run(spec("echo x; setsid sleep 1000 & echo y", service=f"s{n}")) for n in range(3)]
        await asyncio.gather(*runs)
"""
    process = child(source)
    assert await process.line() == "ready"
    await asyncio.sleep(random.Random(seed).uniform(0, 0.05))
    await process.killed()
    async with Supervisor(settings=settings, role="one-shot") as supervisor:
        await eventually(lambda: processes_of(_uid(supervisor)) == {})
        # A launcher that was just being started may keep its dead owner's lock for a moment.
        await eventually(lambda: not [what for what in leftovers(settings) if "/owners/" not in what])
        for number in range(3):
            texts = [record.line async for record in supervisor.logs(USER, f"s{number}")]
            assert set(texts) <= {"x", "y"}
            assert texts[::2].count("y") == 0
    assert leftovers(settings) == []


async def test_the_files_of_dead_owners_go(supervisor: Supervisor, child: Start) -> None:
    owners = Owners(supervisor.settings.state_dir)
    processes: list[Child] = [child(ADOPTER) for _ in range(3)]
    for process in processes:
        assert await process.line() == "ready"
    assert len(list(owners.directory.iterdir())) == 4
    for process in processes:
        await process.killed()
    await eventually(lambda: len(list(owners.directory.iterdir())) == 1)


async def test_a_look_that_fails_is_not_the_last(
    supervisor: Supervisor, child: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("a disk that is full")

    process = child(service(SLEEP))
    await process.line()
    with monkeypatch.context() as patch:
        patch.setattr("pactown_runner.succession.claim_left_behind", fail)
        await eventually(lambda: "a disk that is full" in caplog.text)
    await process.killed()
    assert (await adopted(supervisor)).state == "running"


async def test_what_cannot_be_looked_at_is_taken_over_later(
    supervisor: Supervisor, child: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And no other is lost for its sake."""
    looked: list[str] = []

    def populated(host: LoopHost, scope: Scope) -> bool:
        looked.append(scope.name)
        if len(looked) == 2:
            raise OSError(errno.EMFILE, "too many open files")
        return True

    monkeypatch.setattr(recovery, "_populated", populated)
    process = child(SEVERAL)
    await process.line()
    await process.killed()
    await eventually(lambda: {sandbox.service_id for sandbox in supervisor.list()} == {"a", "b", "c"})
    for sandbox in supervisor.list():
        await soon(sandbox.started())
        assert sandbox.state == "running"
    assert "cannot take over" in caplog.text
    assert len(looked) == 4
    await last_step(supervisor)


async def test_cgroups_that_no_record_names_are_swept(settings: Settings) -> None:
    """And those of others, or of a live supervisor, are not."""
    async with Supervisor(settings=settings) as supervisor:
        sandbox = await supervisor.start(spec(SLEEP))
        top = find_mount().path / settings.cgroup_slice
        slice_ = top / f"pactown-{sandbox.user.key}.slice"
        foreign = top / "pactown-ffffffff.slice"
        state = os.getxattr(slice_, "trusted.pactown.state")
        for path, mark in ((slice_ / "orphan.scope", state), (foreign, b"other"), (foreign / "x.scope", b"other")):
            path.mkdir()
            os.setxattr(path, "trusted.pactown.state", mark)
        stray = await asyncio.create_subprocess_exec(*SLEEP)
        (slice_ / "orphan.scope" / "cgroup.procs").write_text(str(stray.pid))
        async with Supervisor(settings=settings):
            assert await soon(stray.wait()) == -signal.SIGKILL
            assert not (slice_ / "orphan.scope").exists()
            assert (foreign / "x.scope").exists()
        assert sandbox.state == "running"
        assert _runs(sandbox.pid)


async def test_output_that_no_record_names_is_written_down(settings: Settings) -> None:
    async with Supervisor(settings=settings) as supervisor:
        assert (await soon(supervisor.run(spec("echo first")))).ok
        user = await supervisor.users.get_or_create(USER)
    spool = settings.log_dir / f"pactown_{user.key}" / ".spool" / "api.0123456789abcdef.out"
    spool.write_bytes(b"left behind\n")
    async with Supervisor(settings=settings) as supervisor:
        assert [record.line async for record in supervisor.logs(USER, "api")] == ["first", "left behind"]
    assert leftovers(settings) == []


async def test_a_status_is_told_of_no_child_of_ours() -> None:
    """Of a grandchild that its own parent has not reaped, and after it has."""
    read, write = os.pipe()
    # No shell: one may reap whenever it likes.
    source = "import os; pid = os.fork() or os._exit(9); os.write(1, b'%d' % pid); os.read(0, 1); os.waitpid(pid, 0)"
    parent = await asyncio.create_subprocess_exec(*python(source), stdin=asyncio.subprocess.PIPE, stdout=write)
    os.close(write)
    pid = int(os.read(read, 64))
    os.close(read)
    await eventually(lambda: ") Z " in Path(f"/proc/{pid}/stat").read_text())
    pidfd = os.pidfd_open(pid)
    try:
        with pytest.raises(ChildProcessError):
            reap(pidfd)
        assert reap_foreign(pidfd, pid) == ExitStatus(exit_code=9)
        await parent.communicate(b"\n")
        assert reap_foreign(pidfd, pid) in (ExitStatus(exit_code=9), ExitStatus())
    finally:
        os.close(pidfd)


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # before it was opened, or after
        return False


def _uid(supervisor: Supervisor) -> int:
    return supervisor.settings.uid_ranges[0][0]
