"""Jobs: helpers with a tenant's uid, in a leaf of the tenant's slice, that end in every case."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pactown_runner import jobs, tenant_threads
from pactown_runner.config import Settings
from pactown_runner.errors import FilesError, StartError, StateError
from pactown_runner.homes import SandboxFiles
from pactown_runner.homes.get import Get
from pactown_runner.host import Host
from pactown_runner.jobs import Stop, job
from pactown_runner.launcher import Directory
from pactown_runner.models import IsolatedUser
from pactown_runner.supervisor import Supervisor
from tests.files.helpers import OTHER, SERVICE, USER, job_scopes, start_as_tenant, until
from tests.supervising import eventually, processes_of, soon

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[2]


@pytest.fixture
def host(supervisor: Supervisor) -> Host:
    assert supervisor._host is not None
    return supervisor._host


@pytest.fixture
async def user(supervisor: Supervisor) -> IsolatedUser:
    return await supervisor.users.get_or_create(USER)


async def in_thread(call: Callable[[], object]) -> object:
    return await asyncio.to_thread(call)


async def test_a_job_is_the_tenant_in_a_leaf_of_its_own(host: Host, user: IsolatedUser) -> None:
    def look() -> None:
        script = "id -u; id -G; grep ^0 /proc/self/cgroup; pwd; env | sort; grep -c .; echo oops >&2; exit 7"
        argv, home = ("/bin/sh", "-c", script), [Directory(user.home_dir)]
        with job(host, user, argv, directories=home, stdin=True, stdout=True) as child:
            (row,) = host.registry.sandboxes.rows()
            assert (row.kind, row.service_id[:5], row.owner) == ("run", "_job-", host.owner.owner_id)
            child.write(b"1\n2\n")
            assert child.wait() == 7
            said = child.output.read().decode().splitlines()
            assert said[:2] == [str(user.linux_uid), str(user.linux_gid)]
            assert said[2].endswith(f"/pactown-{user.key}.slice/{row.service_id}.scope")
            assert said[3] == str(user.home_dir)
            assert {line.partition("=")[0] for line in said[4:-1]} <= {"HOME", "LC_ALL", "PATH", "PWD"}
            assert said[-1] == "2"
            assert child.message() == "oops"

    await in_thread(look)


async def test_what_a_job_forked_ends_with_it(host: Host, user: IsolatedUser) -> None:
    def leave_children() -> None:
        script = "setsid sleep 1000 & setsid sh -c 'sleep 1000 & sleep 1000' & echo done"
        with job(host, user, ("/bin/sh", "-c", script), directories=[], stdout=True) as child:
            assert child.output.readline() == b"done\n"
            assert child.wait() == 0
        with job(host, user, ("/bin/sleep", "1000"), directories=[]) as child, pytest.raises(ZeroDivisionError):
            raise ZeroDivisionError

    await in_thread(leave_children)
    assert processes_of(user.linux_uid) == {}


async def test_a_job_that_cannot_start_leaves_nothing(host: Host, user: IsolatedUser) -> None:
    def fail() -> None:
        with pytest.raises(StartError), job(host, user, ("/nonexistent",), directories=[]):
            pass
        with pytest.raises(StartError), job(host, user, ("/bin/true",), directories=[Directory("/root")]):
            pass

    await in_thread(fail)


async def test_a_flood_of_complaints_neither_blocks_nor_grows(host: Host, user: IsolatedUser) -> None:
    def flood() -> None:
        with job(host, user, ("/bin/sh", "-c", "yes $(printf 'a\\033b') >&2; exit 3"), directories=[]) as child:
            assert child.wait() == 3
            assert child.message().startswith("a?b; a?b; a?b; and ")
            size = os.fstat(child._pipes.stderr).st_size
            assert size == jobs.STDERR_BYTES

    await in_thread(flood)


@pytest.mark.parametrize("direction", ["write", "read", "wait"])
async def test_a_stopped_job_hits_its_time_limit(host: Host, user: IsolatedUser, direction: str) -> None:
    def hang() -> None:
        argv = ("/bin/sh", "-c", "kill -STOP $$")
        with job(host, user, argv, directories=[], stdin=True, stdout=True, timeout=0.2) as child:
            if direction == "write":
                child.write(bytes(8 << 20))
            elif direction == "read":
                child.output.read()
            else:
                child.wait()

    with pytest.raises(FilesError, match=r"longer than 0\.2 s"):
        await in_thread(hang)


HOLDER = """\
import ctypes, os, sys
pidfd = os.pidfd_open(int(sys.argv[1]))
fds = [ctypes.CDLL(None).syscall(438, pidfd, fd, 0) for fd in (0, 1)]  # pidfd_getfd(2)
with open("holder", "w") as file:
    file.write(f"{os.getpid()} {min(fds)}")
    file.flush()
    os.rename("holder", "held")
    os.read(os.pipe()[0], 1)
"""


async def test_somebody_else_who_holds_the_pipes_keeps_nobody(host: Host, user: IsolatedUser) -> None:
    """The tenant's other processes can get hold of them, and end when they like."""
    held = user.home_dir / "held"
    holding: list[subprocess.Popen[bytes]] = []

    def hold() -> None:
        argv = ("/bin/sh", "-c", "read x; kill -9 $$")
        with job(host, user, argv, directories=[], stdin=True, stdout=True) as child:
            holding.append(start_as_tenant(user, ["/usr/bin/python3", "-c", HOLDER, str(child._popen.pid)]))
            until(held.exists)
            assert int(held.read_text().split()[1]) > 2
            child.write(b"go\n")
            assert child.output.read() == b""
            with pytest.raises(BrokenPipeError):
                child.write(bytes(8 << 20))
            assert child.wait() == -signal.SIGKILL

    try:
        await asyncio.wait_for(in_thread(hold), 10)
    finally:
        for holder in holding:
            holder.kill()
            holder.wait()


async def test_a_stop_before_the_start(host: Host, user: IsolatedUser) -> None:
    def stopped() -> None:
        stop = Stop()
        stop.now("nobody wants it")
        with (
            pytest.raises(FilesError, match="nobody wants it"),
            job(host, user, ("/bin/true",), directories=[], stop=stop),
        ):
            pass

    await in_thread(stopped)


async def test_a_tenant_who_stops_its_transfers_keeps_no_other_waiting(
    supervisor: Supervisor, files: SandboxFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (USER, OTHER):
        await files.put(name, SERVICE, b"x", "x")
    honest = Get.argv
    monkeypatch.setattr(
        Get, "argv", lambda self, word: ("/bin/sh", "-c", "kill -STOP $$") if word == "./stop" else honest(self, word)
    )
    hanging = [asyncio.create_task(files.read(USER, SERVICE, "stop")) for _ in range(40)]
    key = (await supervisor.users.get_or_create(USER)).key
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, until, lambda: len(_job_scopes(supervisor, key)) == tenant_threads.A_TENANT)
    assert await asyncio.wait_for(files.read(OTHER, SERVICE, "x"), 5) == b"x"
    assert len(_job_scopes(supervisor, key)) == tenant_threads.A_TENANT
    for task in hanging:
        task.cancel()
    assert {type(end) for end in await asyncio.gather(*hanging, return_exceptions=True)} == {asyncio.CancelledError}
    assert await files.read(USER, SERVICE, "x") == b"x"


async def test_imports_that_go_slowly_keep_no_other_work_waiting(
    settings: Settings, supervisor: Supervisor, files: SandboxFiles
) -> None:
    await files.put(USER, SERVICE, b"x", "x")
    users = [f"slow-{number}" for number in range(tenant_threads.AT_A_TIME)]
    reading, writing = os.pipe()  # for all of them: nothing ever comes
    try:
        slow = [asyncio.create_task(supervisor.users.import_stream(user, reading)) for user in users]
        await eventually(lambda: len(job_scopes(settings)) == len(users))
        assert await soon(files.read(USER, SERVICE, "x")) == b"x"
        await soon(files.put(OTHER, SERVICE, b"x", "x"))
        assert (await soon(supervisor.users.stats(USER))).usage.sandboxes == 1
        await soon(supervisor.users.delete(OTHER))
        for task in slow:
            task.cancel()
        assert {type(end) for end in await asyncio.gather(*slow, return_exceptions=True)} == {asyncio.CancelledError}
    finally:
        os.close(reading)
        os.close(writing)


async def test_the_end_of_the_supervisor_ends_transfers(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Get, "argv", lambda self, word: ("/bin/sh", "-c", "kill -STOP $$"))
    async with Supervisor(settings=settings) as supervisor:
        files = supervisor.files
        await files.put(USER, SERVICE, b"x", "x")
        # More than there are turns, so that some have not begun.
        hanging = [asyncio.create_task(files.read(USER, SERVICE, "x")) for _ in range(5)]
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, until, lambda: job_scopes(settings))
    ends = await asyncio.gather(*hanging, return_exceptions=True)
    assert {str(end) for end in ends} == {"given up: the supervisor ends"}
    with pytest.raises(StateError):
        _ = supervisor.files
    assert [thread for thread in threading.enumerate() if thread.name.startswith("pactown")] == []


async def test_after_a_crash_the_next_owner_ends_what_is_left(settings: Settings, tmp_path: Path) -> None:
    source = tmp_path / "big"
    with source.open("wb") as file:
        file.truncate(64 << 30)
    values = {
        "users_base": str(settings.users_base),
        "state_dir": str(settings.state_dir),
        "log_dir": str(settings.log_dir),
        "run_dir": str(settings.run_dir),
        "uid_ranges": settings.uid_ranges,
        "cgroup_slice": settings.cgroup_slice,
    }
    async with Supervisor(settings=settings) as supervisor:
        user = await supervisor.users.get_or_create(USER)
    putting = subprocess.Popen(
        [sys.executable, "-m", "tests.files.put_and_die", json.dumps(values), str(source)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        assert putting.stdout is not None
        assert putting.stdout.readline() == b"moving\n"
        (scope,) = job_scopes(settings)
        # So that the end of the stream does not end it by itself.
        for pid in (scope / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGSTOP)
    finally:
        putting.kill()
        putting.communicate()
    assert (scope / "cgroup.procs").read_text().split()
    async with Supervisor(settings=settings, role="one-shot") as supervisor:
        assert not scope.exists()
        assert supervisor._host is not None
        assert supervisor._host.registry.sandboxes.rows() == []
        inside = user.home_dir / "sandboxes" / SERVICE
        assert not (inside / "f").exists()
        await supervisor.files.put(USER, SERVICE, b"x", "f")
    assert processes_of(user.linux_uid) == {}


def _job_scopes(supervisor: Supervisor, key: str) -> list[str]:
    assert supervisor._host is not None
    slice_ = supervisor._host.tree.root.path / f"pactown-{key}.slice"
    return [path.name for path in slice_.glob("_job-*.scope")]
