"""One sandbox at a time, with real accounts, real cgroups and programs that do not want to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import resource
import shlex
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cgroups import FormatError, Limits, find_mount
from pactown_runner import Sandbox, SandboxSpec, Settings, Supervisor, admission
from pactown_runner.errors import LimitsError, NotFoundError, RunnerError, SpecError, StartError, StateError
from tests.supervising import (
    USER,
    eventually,
    leaves_nothing,
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

SEEDS = range(100)


# ---- What a program is given


@each_loop
async def test_a_program_has_its_own_identity_and_nothing_else(supervisor: Supervisor, settings: Settings) -> None:
    probe = "id; cat /proc/self/status /proc/self/cgroup; ls -l /proc/self/fd"
    outcome = await soon(supervisor.run(spec(probe, service="probe")))
    assert outcome.ok
    user = await supervisor.users.get(USER)
    assert user is not None
    text = [record.line async for record in supervisor.logs(USER, "probe")]
    uid, gid, name = user.linux_uid, user.linux_gid, user.linux_username
    assert text[0] == f"uid={uid}({name}) gid={gid}({name}) groups={gid}({name})"
    status = dict(line.split(":", 1) for line in text if re.match(r"[A-Za-z_]+:\t", line))
    assert status["Uid"].split() == [str(uid)] * 4
    assert status["Gid"].split() == [str(gid)] * 4
    assert status["Groups"].split() == []
    for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[capabilities], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    assert [status[name].strip() for name in ("SigBlk", "SigIgn")] == ["0" * 16] * 2
    cgroup = next(line for line in text if line.startswith("0::"))
    assert cgroup == f"0::/{settings.cgroup_slice}/pactown-{user.key}.slice/probe.scope"
    descriptors = {line.split()[8]: line.split()[10] for line in text if " -> " in line}
    # 3 is the one through which ls reads the directory.
    assert set(descriptors) == {"0", "1", "2", "3"}
    assert descriptors["0"] == "/dev/null"


async def test_the_report_says_what_the_kernel_says(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(["sleep", "1000"]))
    report, user = sandbox.isolation, sandbox.user
    assert (report.mode, report.uid, report.gid) == ("root", (user.linux_uid,) * 3, (user.linux_gid,) * 3)
    assert set(report.capabilities.values()) == {0}
    assert (report.no_new_privs, report.root_regainable, report.placement) == (True, False, "born")
    assert f"0::{report.cgroup}" in Path(f"/proc/{sandbox.pid}/cgroup").read_text().splitlines()
    assert os.stat(f"/proc/{sandbox.pid}").st_uid == user.linux_uid


async def test_the_environment_is_what_was_given(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_OPERATOR", "hunter2")
    sandbox = await supervisor.start_run(spec(["/usr/bin/env"], env={"PORT": "8001", "LANG": "C", "ODD": "a=b\nc"}))
    await soon(sandbox.wait())
    user = sandbox.user
    assert sorted("\n".join(await lines(sandbox)).replace("a=b\nc", "a=b|c").splitlines()) == [
        f"HOME={user.home_dir}",
        "LANG=C",
        f"LOGNAME={user.linux_username}",
        "ODD=a=b|c",
        "PATH=/usr/local/bin:/usr/bin:/bin",
        "PORT=8001",
        "SHELL=/bin/sh",
        f"USER={user.linux_username}",
    ]


async def test_it_runs_in_a_directory_of_its_own(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start_run(spec("pwd; mkdir -p sub; stat -c %a:%U .", service="one"))
    assert (await soon(sandbox.wait())).ok
    home, name = sandbox.user.home_dir, sandbox.user.linux_username
    assert await lines(sandbox) == [f"{home}/sandboxes/one", f"700:{name}"]
    sandbox = await supervisor.start_run(spec(["pwd"], service="one", cwd="sub"))
    await soon(sandbox.wait())
    assert await lines(sandbox) == [f"{home}/sandboxes/one/sub"]


@each_loop
async def test_standard_input_is_a_pipe_if_asked_for(supervisor: Supervisor) -> None:
    # `/dev/stdin` is opened anew, which takes the right to do so.
    sandbox = await supervisor.start_run(spec("wc -c </dev/stdin", stdin=True))
    data = os.urandom(1 << 20)
    await soon(sandbox.send(data))
    sandbox.close_stdin()
    sandbox.close_stdin()
    with pytest.raises(StateError, match="no open standard input"):
        await sandbox.send(b"more")
    assert (await soon(sandbox.wait())).ok
    assert await lines(sandbox) == [str(1 << 20)]


@each_loop
async def test_sending_to_one_that_does_not_read_ends_with_it(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(["sleep", "1000"], stdin=True))
    sending = asyncio.create_task(sandbox.send(b"x" * (1 << 20)))
    await asyncio.sleep(0)
    await soon(sandbox.kill())
    with pytest.raises(StateError):
        await soon(asyncio.wait_for(sending, 10))
    closed = await supervisor.start(spec("exec <&-; echo ready; sleep 1000", stdin=True))
    await line_of(closed)
    with pytest.raises(StateError, match="closed its standard input"):
        await soon(closed.send(b"x"))
    without = await supervisor.start(spec(["sleep", "1000"], service="without"))
    with pytest.raises(StateError, match="stdin=True"):
        await without.send(b"x")


async def test_without_it_standard_input_is_empty(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start_run(spec("cat; echo end"))
    await soon(sandbox.wait())
    assert await lines(sandbox) == ["end"]


# ---- Outcomes


@each_loop
@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("exit 0", {}, ("exited", 0, None)),
        ("exit 42", {}, ("exited", 42, None)),
        ("kill -SEGV $$", {}, ("signaled", None, 11)),
        (["sleep", "1000"], {"timeout": 0.05}, ("timed-out", None, 9)),
        (["sleep", "1000"], {"timeout": 0}, ("timed-out", None, 9)),
        (["no-such-program"], {}, ("failed-to-start", None, None)),
    ],
)
async def test_outcome(
    supervisor: Supervisor,
    settings: Settings,
    command: str | list[str],
    options: dict[str, Any],
    expected: tuple[str, int | None, int | None],
) -> None:
    with leaves_nothing(settings):
        outcome = await soon(supervisor.run(spec(command, **options)))
    assert (outcome.reason, outcome.exit_code, outcome.signal) == expected
    assert outcome.ok == (expected == ("exited", 0, None))
    if outcome.reason == "failed-to-start":
        assert (outcome.failed_step, outcome.failed_errno) == ("execve", 2)
    else:
        assert outcome.stats is not None
        assert 0 < outcome.wall_seconds < 10
        assert (outcome.stats.cpu_usage_usec or 0) > 0


async def test_the_time_that_it_takes_to_make_a_user_is_not_the_programs(
    supervisor: Supervisor, settings: Settings
) -> None:
    timeout = 0.3
    with contextlib.closing(sqlite3.connect(settings.state_dir / "registry.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        running = asyncio.create_task(supervisor.run(spec("true", user="new", timeout=timeout)))
        await asyncio.sleep(timeout)
        other.execute("ROLLBACK")
        outcome = await soon(running)
    assert (outcome.reason, outcome.exit_code) == ("exited", 0)


async def test_a_child_that_outlives_the_program_is_killed_and_counted(supervisor: Supervisor) -> None:
    outcome = await soon(supervisor.run(spec("sleep 1000 & sleep 1000 & setsid sleep 1000 & exit 3")))
    assert (outcome.reason, outcome.exit_code, outcome.survivors_killed) == ("exited", 3, 3)


async def test_lost_is_what_nobody_can_know(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody in this process reaps all children, and the kernel does not keep what it knew."""
    monkeypatch.setattr("pactown_runner.exits._from_pidfd", lambda pidfd: None)
    sandbox = await supervisor.start(spec(["sleep", "1000"]))
    # As soon as it has ended; before the loop can turn.
    os.kill(sandbox.pid, 9)
    os.waitpid(sandbox.pid, 0)
    outcome = await soon(sandbox.wait())
    assert (outcome.reason, outcome.exit_code, outcome.signal) == ("lost", None, None)


async def test_a_status_that_another_took_is_asked_of_the_kernel(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec("read x; exit 7", stdin=True))
    sandbox.close_stdin()
    os.waitpid(sandbox.pid, 0)
    outcome = await soon(sandbox.wait())
    # Linux 6.15 and later know.
    assert (outcome.reason, outcome.exit_code) in [("exited", 7), ("lost", None)]


# ---- Stopping

STUBBORN = python("""
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    print("ready", flush=True)
    while True:
        signal.pause()
os.setsid()
if os.fork():
    os._exit(0)
os.kill(os.getpid(), signal.SIGSTOP)
while True:
    signal.pause()
""")

MARKER = """
import os, signal
def marked(number, frame):
    os.write(1, b"asked to end\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, marked)
print("ready", flush=True)
while True:
    signal.pause()
"""


@each_loop
async def test_a_program_that_hides_and_stops_itself_is_gone(supervisor: Supervisor, settings: Settings) -> None:
    with leaves_nothing(settings):
        sandbox = await supervisor.start(spec(STUBBORN, stop_grace=1000.0))
        await line_of(sandbox)
        uid = sandbox.user.linux_uid
        await eventually(lambda: any("T (stopped)" in Path(f"/proc/{p}/status").read_text() for p in processes_of(uid)))
        begin = time.monotonic()
        outcome = await soon(sandbox.stop(grace=0.2))
        assert time.monotonic() - begin >= 0.2
        assert processes_of(uid) == {}
        assert outcome.reason == "stopped"
        assert outcome.survivors_killed == 2


@each_loop
async def test_a_program_behind_a_shell_gets_its_sigterm(supervisor: Supervisor) -> None:
    command = f"cd / && python3 -SEc {shlex.quote(MARKER)}; echo never"
    sandbox = await supervisor.start(spec(command))
    await line_of(sandbox)
    outcome = await soon(sandbox.stop(grace=10))
    assert (outcome.reason, outcome.survivors_killed) == ("stopped", 0)
    assert await lines(sandbox) == ["ready", "asked to end"]
    assert outcome.wall_seconds < 9


@each_loop
@pytest.mark.parametrize("how", ["frozen", "stopped"])
async def test_one_that_stands_still_gets_its_sigterm(supervisor: Supervisor, how: str) -> None:
    sandbox = await supervisor.start(spec(python(MARKER)))
    await line_of(sandbox)
    if how == "frozen":
        await sandbox.freeze()
        assert sandbox.state == "frozen"
    else:
        os.kill(sandbox.pid, 19)
    outcome = await soon(sandbox.stop(grace=10))
    assert (outcome.reason, outcome.exit_code, outcome.survivors_killed) == ("stopped", 0, 0)
    assert await lines(sandbox) == ["ready", "asked to end"]


async def test_a_frozen_one_can_be_killed(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(["sleep", "1000"]))
    await sandbox.freeze()
    outcome = await soon(sandbox.kill())
    assert (outcome.reason, outcome.signal) == ("stopped", 9)


@each_loop
async def test_many_may_stop_it_at_once(supervisor: Supervisor, settings: Settings) -> None:
    with leaves_nothing(settings):
        sandbox = await supervisor.start(spec(STUBBORN, stop_grace=1000.0))
        await line_of(sandbox)
        graces = [2000, 0.2, 500, None]
        # The least patient one decides.
        outcomes = await soon(asyncio.gather(*(sandbox.stop(grace=grace) for grace in graces)))
        assert all(outcome is outcomes[0] for outcome in outcomes)
        assert await sandbox.stop() is outcomes[0]
        assert await sandbox.kill() is outcomes[0]
        assert await sandbox.wait() is outcomes[0]


@each_loop
async def test_a_stop_goes_on_without_its_caller(supervisor: Supervisor, settings: Settings) -> None:
    with leaves_nothing(settings):
        sandbox = await supervisor.start(spec(STUBBORN, stop_grace=1000.0))
        await line_of(sandbox)
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sandbox.stop(grace=0.3), 0.05)
        assert sandbox.outcome is None
        outcome = await soon(sandbox.wait())
        assert time.monotonic() - begin >= 0.3
        assert outcome.reason == "stopped"


async def test_a_patient_stop_returns_as_soon_as_all_is_over(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(["sleep", "1000"]))
    outcome = await soon(sandbox.stop(grace=1000))
    assert (outcome.reason, outcome.signal, outcome.survivors_killed) == ("stopped", 15, 0)
    assert outcome.wall_seconds < 9


@pytest.mark.parametrize("grace", [-1, float("nan"), float("inf")])
async def test_no_grace_time_is_taken_that_is_none(supervisor: Supervisor, grace: float) -> None:
    sandbox = await supervisor.start(spec(["sleep", "1000"]))
    with pytest.raises(SpecError):
        await sandbox.stop(grace=grace)
    assert sandbox.state == "running"


async def test_a_spec_may_bring_its_own_grace_time(settings: Settings) -> None:
    async with Supervisor(settings=replace(settings, stop_grace=1000.0)) as supervisor:
        sandbox = await supervisor.start(spec(STUBBORN, stop_grace=0.05))
        await line_of(sandbox)
        assert (await soon(sandbox.stop())).reason == "stopped"


# ---- Processes that run away


async def test_instant_double_forkers_never_leave_their_slice(supervisor: Supervisor, settings: Settings) -> None:
    """500 starts of a shell that is gone at once, with a grandchild in a session of its own."""
    user = await supervisor.users.get_or_create(USER)
    uid, slice_ = user.linux_uid, f"/{settings.cgroup_slice}/pactown-{user.key}.slice/"
    strays: set[str] = set()
    seen = 0

    async def one(number: int) -> int:
        nonlocal seen
        # Every other one stands still to be looked at; the others are over before anybody can look.
        stands = number % 2 == 0
        command = "(setsid sleep 1000 &) & (setsid sleep 1000 &) & " + ("echo ready; read x" if stands else "exit 0")
        sandbox = await supervisor.start_run(spec(command, service=f"s{number % 8}", stdin=stands))
        if stands:
            await line_of(sandbox)
        found = processes_of(uid)
        seen += len(found)
        strays.update(f"{pid} in {cgroup}" for pid, cgroup in found.items() if not cgroup.startswith(slice_))
        sandbox.close_stdin()
        outcome = await sandbox.wait()
        assert outcome.reason == "exited"
        return outcome.survivors_killed

    async def worker(first: int) -> int:
        return sum([await one(number) for number in range(first, 500, 8)])

    killed = await soon(asyncio.gather(*(worker(first) for first in range(8))), 120)
    assert strays == set()
    # The look was not at an empty host, nor were there no survivors to kill.
    assert seen > 500
    assert sum(killed) > 250
    assert processes_of(uid) == {}


def wild(seed: int) -> list[str]:
    """A program that grows a random tree: forks, new sessions, new groups, ignored signals, stops, threads."""
    source = """
import os, random, signal, sys, threading, time
random = random.Random(SEED)
def grow(depth):
    for _ in range(random.randint(0, 3)):
        if depth < 4 and os.fork() == 0:
            random.seed(os.getpid() ^ SEED)
            act()
            grow(depth + 1)
            end()
def act():
    choice = random.randint(0, 6)
    if choice == 0: os.setsid() if os.getpid() != os.getsid(0) else None
    if choice == 1 and os.getpid() != os.getsid(0): os.setpgid(0, 0)
    if choice == 2: signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if choice == 3: signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
    if choice == 4: threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    if choice == 5: [os.close(fd) for fd in (0, 1, 2)]
def end():
    choice = random.randint(0, 3)
    if choice == 0: os._exit(random.randint(0, 255))
    if choice == 1: os.kill(os.getpid(), signal.SIGSTOP)
    if choice == 2: os.execvp("sleep", ["sleep", "1000"])
    signal.pause()
grow(0)
print("ready", flush=True)
while True: signal.pause()
""".replace("SEED", str(seed))
    return python(source)


async def test_nothing_of_a_random_tree_survives_its_stop(supervisor: Supervisor, settings: Settings) -> None:
    user = await supervisor.users.get_or_create(USER)
    grown = 0

    async def one(seed: int) -> None:
        nonlocal grown
        chance = random.Random(seed)
        with_ready = chance.random() < 0.7
        sandbox = await supervisor.start(spec(wild(seed), service=f"t{seed}"))
        if with_ready:
            await line_of(sandbox)
        scope = next(path for path in tree(settings) if path.name == f"t{seed}.scope")
        pids = (scope / "cgroup.procs").read_text().split()
        grown += len(pids)
        await sandbox.stop(grace=chance.choice([0, 0, 0.02]))
        left = [pid for pid, cgroup in processes_of(user.linux_uid).items() if cgroup.endswith(f"/t{seed}.scope")]
        assert (seed, left) == (seed, [])
        assert not scope.exists()

    for batch in range(0, len(SEEDS), 4):
        await soon(asyncio.gather(*(one(seed) for seed in SEEDS[batch : batch + 4])), 60)
    assert grown > 2 * len(SEEDS)
    assert processes_of(user.linux_uid) == {}


@pytest.mark.parametrize("grace", [0, 0.05])
async def test_a_fork_bomb_ends(supervisor: Supervisor, grace: float) -> None:
    bomb = """
import os, resource, signal
resource.setrlimit(resource.RLIMIT_NPROC, (24, 24))  # what init has yet to reap counts, too
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
while True:
    try:
        if os.fork() and os.getpid() != os.getsid(0):
            os._exit(0)
    except OSError:
        pass
"""
    sandbox = await supervisor.start(spec(python(bomb)))
    await line_of(sandbox)
    await eventually(lambda: len(processes_of(sandbox.user.linux_uid)) > 3)
    outcome = await soon(sandbox.stop(grace=grace))
    assert (outcome.reason, outcome.signal) == ("stopped", 9)
    assert outcome.survivors_killed > 1
    assert processes_of(sandbox.user.linux_uid) == {}


# ---- What cannot be started


@pytest.fixture
def closed_directory(users_base: Path) -> Path:
    directory = users_base / "closed"
    directory.mkdir(mode=0o700)
    return directory


@each_loop
@pytest.mark.parametrize(
    ("options", "step", "number", "says"),
    [
        ({"command": ["/no/such/file"]}, "execve", 2, "no such file"),
        ({"command": ["/etc/passwd"]}, "execve", 13, "permission denied"),
        ({"command": ["/etc"]}, "execve", 13, "permission denied"),
        ({"command": ["true"], "env": {"BIG": "x" * (3 << 20)}}, "execve", 7, "too large"),
        ({"command": ["true"], "cwd": "CLOSED"}, "directories", 13, "CLOSED"),
        ({"command": ["true"], "cwd": "/root"}, "directories", 13, "/root"),
        ({"command": ["true"], "cwd": "not/there"}, "directories", 2, "not/there"),
        ({"command": ["true"], "cwd": "/etc/passwd"}, "directories", 20, "/etc/passwd"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
async def test_what_cannot_be_started_says_why_and_leaves_nothing(
    supervisor: Supervisor,
    settings: Settings,
    closed_directory: Path,
    options: dict[str, Any],
    step: str,
    number: int,
    says: str,
) -> None:
    await supervisor.users.get_or_create(USER)
    given: dict[str, Any] = {"service_id": "api", "user_id": USER, **options}
    if given.get("cwd") == "CLOSED":
        given["cwd"], says = str(closed_directory), str(closed_directory)
    wanted = SandboxSpec(**given)
    with leaves_nothing(settings):
        with pytest.raises(StartError, match=re.escape(says)) as caught:
            await soon(supervisor.start(wanted))
        assert (caught.value.step, caught.value.errno) == (step, number)
        assert supervisor.list() == []
        outcome = await soon(supervisor.run(wanted))
        assert (outcome.reason, outcome.failed_step, outcome.failed_errno) == ("failed-to-start", step, number)
        # The honest case beside it.
        assert (await soon(supervisor.run(spec("exit 0")))).ok


@pytest.mark.parametrize("limits", [Limits(memory_max="64M"), Limits(pids_max=5), Limits(cpu_max=0.5)])
async def test_limits_that_cannot_be_enforced_are_an_error(
    supervisor: Supervisor, settings: Settings, limits: Limits
) -> None:
    offered = (find_mount().path / "cgroup.controllers").read_text().split()
    missing = sorted(limits.controllers() - set(offered))
    if not missing:
        pytest.skip("this host offers every controller")
    await supervisor.users.get_or_create(USER)
    with leaves_nothing(settings):
        with pytest.raises(LimitsError, match=missing[0]) as caught:
            await soon(supervisor.start(spec(["sleep", "1000"], limits=limits)))
        assert caught.value.remedy
        with pytest.raises(LimitsError):
            await soon(supervisor.run(spec(["true"], limits=limits)))
    sandbox = await supervisor.start(spec(["sleep", "1000"]))
    with pytest.raises(LimitsError, match=missing[0]):
        await soon(sandbox.set_limits(limits))
    assert sandbox.state == "running"
    await sandbox.set_limits(Limits())
    assert dict(sandbox.isolation.limits) == {}


def test_a_limit_that_can_never_be_right_is_no_limit() -> None:
    with pytest.raises(FormatError):
        Limits(memory_max="lots")


async def test_too_few_descriptors_are_a_failed_start_and_leave_nothing(
    supervisor: Supervisor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is refused beforehand, as it should be, never gets so far.
    monkeypatch.setattr(admission, "DESCRIPTORS_EACH", 0)
    monkeypatch.setattr(admission, "DESCRIPTORS_SPARE", 0)
    await supervisor.run(spec(["true"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    with leaves_nothing(settings):
        for spare in range(16):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
            try:
                outcome = await soon(supervisor.run(spec("echo x", timeout=5)))
            except RunnerError:
                pass
            else:
                assert outcome.reason in ("failed-to-start", "exited")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (await soon(supervisor.run(spec(["true"])))).ok


async def test_one_that_cannot_be_ended_for_want_of_descriptors_is_not_forgotten(
    supervisor: Supervisor, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with leaves_nothing(settings):
        sandbox = await supervisor.start(spec("setsid sleep 1000 & sleep 1000 & echo ready; wait"))
        await line_of(sandbox)
        # What is open stays open.
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            os.kill(sandbox.pid, 9)
            await eventually(lambda: "cannot end" in caplog.text)
            assert sandbox.outcome is None
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        outcome = await soon(sandbox.wait())
        assert (outcome.reason, outcome.signal, outcome.survivors_killed) == ("signaled", 9, 2)
    assert processes_of(sandbox.user.linux_uid) == {}


# ---- Freezing, counters, wrong states


@each_loop
async def test_a_frozen_sandbox_does_nothing_and_goes_on(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec("echo ready; while :; do :; done"))
    await line_of(sandbox)
    await sandbox.freeze()
    assert sandbox.state == "frozen"

    async def used() -> int:
        return (await sandbox.stats()).cpu_usage_usec or 0

    async def stands_still() -> bool:
        before = await used()
        await asyncio.sleep(0.05)
        return await used() == before

    # The few microseconds in which it fell asleep may be charged when it is frozen already, but once only.
    assert await stands_still() or await stands_still()
    first = await used()
    await sandbox.thaw()
    assert sandbox.state == "running"
    while await used() <= first:
        await asyncio.sleep(0.01)


def _kernel_says(sandbox: Sandbox) -> str:
    assert sandbox.cgroup is not None
    return "frozen" if sandbox.cgroup.frozen() else "running"


@each_loop
async def test_who_is_cancelled_while_it_freezes_leaves_it_as_its_state_says(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(["sleep", "1000"]))
    assert supervisor._host is not None
    for act, state in ((sandbox.freeze, "frozen"), (sandbox.thaw, "running")):
        # Whoever freezes waits for this, in a thread.
        with supervisor._host.registry.holds.changing():
            task = asyncio.create_task(act())
            for _ in range(20):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await soon(task)
        assert (str(sandbox.state), _kernel_says(sandbox)) == (state, state)


@each_loop
async def test_of_many_who_freeze_and_thaw_it_the_last_has_its_way(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(["sleep", "1000"]))
    for state in ("frozen", "running") * 10:
        acts = [sandbox.thaw, sandbox.freeze] * 2 if state == "frozen" else [sandbox.freeze, sandbox.thaw] * 2
        await soon(asyncio.gather(*(act() for act in acts)))
        assert (str(sandbox.state), _kernel_says(sandbox)) == (state, state)


@each_loop
async def test_what_has_ended_refuses_all_but_questions(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec("echo x"))
    outcome = await soon(sandbox.wait())
    assert sandbox.state == "ended"
    for act in (sandbox.freeze, sandbox.thaw, lambda: sandbox.set_limits(Limits(pids_max=5))):
        with pytest.raises(StateError, match="ended"):
            await act()
    assert await sandbox.stats() == outcome.stats
    assert await lines(sandbox) == ["x"]
    with pytest.raises(StateError):
        await sandbox.send(b"")
    with pytest.raises(NotFoundError):
        supervisor.get(USER, "api")


async def test_what_is_not_started_yet_can_be_waited_for(supervisor: Supervisor) -> None:
    await supervisor.users.get_or_create(USER)
    starting = asyncio.create_task(supervisor.start(spec("echo x; exec sleep 1000")))
    await asyncio.sleep(0)
    sandbox = supervisor.get(USER, "api")
    assert sandbox.state == "starting"
    for act in (sandbox.freeze, sandbox.thaw, sandbox.stats, lambda: sandbox.set_limits(Limits(pids_max=5))):
        with pytest.raises(StateError, match="starting"):
            await act()
    with pytest.raises(StateError):
        _ = sandbox.isolation
    assert await line_of(sandbox, "x") == "x"
    assert await starting is sandbox
    stopping = asyncio.create_task(sandbox.stop(grace=5))
    assert (await soon(stopping)).reason == "stopped"


async def test_a_frozen_one_that_is_used_while_it_ends_harms_no_other(supervisor: Supervisor) -> None:
    """Descriptors' numbers are used again at once: what meant one cgroup must never reach another."""
    stays = await supervisor.start(spec(["sleep", "1000"], service="stays"))

    async def tease(sandbox: Sandbox) -> None:
        for act in (sandbox.freeze, sandbox.thaw, sandbox.stats):
            with contextlib.suppress(StateError):
                await act()

    for number in range(20):
        sandbox = await supervisor.start(spec(["sleep", "1000"], service=f"s{number}"))
        await soon(asyncio.gather(sandbox.kill(), *(tease(sandbox) for _ in range(4))))
    assert stays.state == "running"
    assert "frozen 0" in next(
        (path / "cgroup.events").read_text() for path in tree(supervisor.settings) if path.name == "stays.scope"
    )


# ---- Logs


@each_loop
async def test_streams_are_told_apart_and_readers_do_not_wait_for_each_other(supervisor: Supervisor) -> None:
    command = "for i in $(seq 3000); do echo out $i; echo err $i >&2; done"
    sandbox = await supervisor.start(spec(command))
    go_on = asyncio.Event()

    async def read(slow: bool) -> list[tuple[int, str, str]]:
        found: list[tuple[int, str, str]] = []
        async for record in sandbox.logs(follow=True):
            if slow and not found:
                await go_on.wait()
            found.append((record.seq, str(record.stream), record.line))
        return found

    slow = asyncio.create_task(read(True))
    fast = await soon(asyncio.gather(*(read(False) for _ in range(3))))
    assert (await soon(sandbox.wait())).ok
    go_on.set()
    slow_found = await soon(asyncio.wait_for(slow, 20))
    assert all(found == slow_found for found in fast)
    assert [seq for seq, _, _ in slow_found] == list(range(1, 6001))
    for stream, word in (("stdout", "out"), ("stderr", "err")):
        assert [line for _, of, line in slow_found if of == stream] == [f"{word} {i}" for i in range(1, 3001)]


@each_loop
async def test_a_sandbox_shows_its_own_run_and_the_supervisor_all(supervisor: Supervisor) -> None:
    runs = []
    for number in range(3):
        sandbox = await supervisor.start_run(spec(f"echo first {number}; echo second {number}"))
        await soon(sandbox.wait())
        runs.append(sandbox)
    for number, sandbox in enumerate(runs):
        assert await lines(sandbox) == [f"first {number}", f"second {number}"]
        assert [record.line async for record in sandbox.logs(tail=1)] == ([f"second {number}"] if number == 2 else [])
    whole = [record async for record in supervisor.logs(USER, "api")]
    assert [record.seq for record in whole] == list(range(1, 7))
    assert [record.line for record in whole][::2] == ["first 0", "first 1", "first 2"]
    assert [record.seq async for record in supervisor.logs(USER, "api", tail=2)] == [5, 6]
    assert [record.seq async for record in supervisor.logs(USER, "api", since=4)] == [5, 6]
    assert [record.seq async for record in runs[1].logs(since=3)] == [4]
    # A live one of the same name, followed from before it has printed anything.
    sandbox = await supervisor.start(spec("read x; echo live", stdin=True))
    following = asyncio.create_task(line_of(sandbox, ""))
    await asyncio.sleep(0.01)
    await sandbox.send(b"\n")
    assert await soon(asyncio.wait_for(following, 10)) == "live"
    await soon(sandbox.wait())


async def test_programs_may_open_their_output_again(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start_run(spec("echo one >/dev/stdout; echo two >/proc/self/fd/2; head -c 3 /dev/zero"))
    assert (await soon(sandbox.wait())).ok
    records = [record async for record in sandbox.logs()]
    assert sorted((record.stream, record.raw) for record in records) == [
        ("stderr", b"two"),
        ("stdout", b"\0\0\0"),
        ("stdout", b"one"),
    ]


async def test_logs_of_nobody(supervisor: Supervisor) -> None:
    with pytest.raises(NotFoundError):
        [record async for record in supervisor.logs("nobody", "api")]
    await supervisor.users.get_or_create(USER)
    assert [record async for record in supervisor.logs(USER, "never-ran")] == []
    with pytest.raises(SpecError):
        [record async for record in supervisor.logs(USER, "../../etc/passwd")]
