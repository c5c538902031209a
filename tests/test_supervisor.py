"""Supervisors: admission, two on one state, and an end that takes everything along."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from cgroups import find_mount
from pactown_runner import Settings, Supervisor
from pactown_runner.errors import (
    AlreadyRunningError,
    ConfigError,
    NotFoundError,
    SpecError,
    StartError,
    StateError,
)
from pactown_runner.host import LoopHost
from pactown_runner.logs import LogHub
from tests import hostsweep
from tests.supervising import (
    ROOT,
    USER,
    Start,
    eventually,
    leaves_nothing,
    leftovers,
    line_of,
    lines,
    processes_of,
    soon,
    spec,
)

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.host
each_loop = pytest.mark.each_loop

SLEEP = ["sleep", "1000"]


# ---- Admission


@each_loop
async def test_a_service_runs_once(supervisor: Supervisor, settings: Settings) -> None:
    first = await supervisor.start(spec(SLEEP))
    with leaves_nothing(settings), pytest.raises(AlreadyRunningError) as caught:
        await supervisor.start(spec(SLEEP))
    assert caught.value.code == "already-running"
    with pytest.raises(AlreadyRunningError):
        await supervisor.run(spec(SLEEP))
    assert supervisor.get(USER, "api") is first
    assert (await soon(supervisor.stop(USER, "api", grace=1))).reason == "stopped"
    again = await supervisor.start(spec(SLEEP))
    assert again.run_id != first.run_id


async def test_of_many_who_start_it_at_once_one_does(supervisor: Supervisor) -> None:
    answers = await soon(asyncio.gather(*(supervisor.start(spec(SLEEP)) for _ in range(10)), return_exceptions=True))
    assert sum(isinstance(answer, AlreadyRunningError) for answer in answers) == 9
    assert len(supervisor.list()) == 1


@each_loop
async def test_users_have_services_of_their_own(supervisor: Supervisor) -> None:
    one, two = await soon(
        asyncio.gather(supervisor.start(spec(SLEEP, user="one")), supervisor.start(spec(SLEEP, user="two")))
    )
    assert one.user.linux_uid != two.user.linux_uid
    assert {sandbox.user_id for sandbox in supervisor.list()} == {"one", "two"}
    assert supervisor.list("one") == [one]
    assert supervisor.list("three") == []
    assert supervisor.get("two", "api") is two
    with pytest.raises(NotFoundError, match="no sandbox"):
        supervisor.get("three", "api")
    with pytest.raises(NotFoundError):
        await supervisor.stop("one", "other")
    assert [user.saas_user_id for user in await supervisor.users.list()] in (["one", "two"], ["two", "one"])
    assert await supervisor.users.get("three") is None


@pytest.mark.parametrize(
    "options",
    [
        {"service": "../escape"},
        {"service": "_job"},
        {"service": ""},
        {"service": "x" * 64},
        {"user": ""},
        {"user": "a\0b"},
        {"user": "x" * 1025},
        {"user": "\ud800"},
        {"command": ["a\0b"]},
        {"command": []},
        {"command": ""},
        {"env": {"A": "b\0c"}},
        {"env": {"A=B": "c"}},
        {"env": {"": "c"}},
        {"cwd": "a\0b"},
    ],
    ids=repr,
)
async def test_what_can_never_be_right_is_refused_before_anything_is_made(
    supervisor: Supervisor, settings: Settings, options: dict[str, Any]
) -> None:
    with leaves_nothing(settings), pytest.raises(SpecError):
        await supervisor.start(spec(**{"command": SLEEP, **options}))
    assert await supervisor.users.list() == []


async def test_a_name_that_is_left_in_the_tree_does_not_stop_a_start(
    supervisor: Supervisor, settings: Settings
) -> None:
    """Nobody claims it, so it is nobody's; what runs in it is ended."""
    sandbox = await supervisor.start(spec(SLEEP, service="other"))
    mount = find_mount().path
    stale = mount / settings.cgroup_slice / f"pactown-{sandbox.user.key}.slice" / "api.scope"
    stale.mkdir()
    stray = subprocess.Popen(SLEEP)
    (stale / "cgroup.procs").write_text(str(stray.pid))
    started = await soon(supervisor.start(spec(SLEEP)))
    assert stray.wait(10) == -signal.SIGKILL
    assert (stale / "cgroup.procs").read_text().split() == [str(started.pid)]


async def test_a_slice_that_somebody_removed_is_made_anew(supervisor: Supervisor, settings: Settings) -> None:
    assert (await soon(supervisor.run(spec("exit 0")))).ok
    user = await supervisor.users.get_or_create(USER)
    os.rmdir(find_mount().path / settings.cgroup_slice / f"pactown-{user.key}.slice")
    assert (await soon(supervisor.run(spec("exit 0")))).ok


async def test_no_descriptor_is_kept_for_a_tenant_who_runs_nothing(supervisor: Supervisor, settings: Settings) -> None:
    for number in range(5):
        await supervisor.users.get_or_create(f"user {number}")
    assert (await soon(supervisor.run(spec("echo x", user="user 0")))).ok
    with leaves_nothing(settings):
        for number in range(5):
            assert (await soon(supervisor.run(spec("echo x", user=f"user {number}")))).ok


# ---- Its life


async def test_it_is_used_within_async_with_only(settings: Settings) -> None:
    supervisor = Supervisor(settings=settings)
    for act in (supervisor.start, supervisor.run, supervisor.start_run):
        with pytest.raises(StateError, match="not running"):
            await act(spec(SLEEP))
    async with supervisor:
        assert (await soon(supervisor.run(spec("exit 0")))).ok
        with pytest.raises(StateError, match="already"):
            await supervisor.__aenter__()
    with pytest.raises(StateError, match="not running"):
        await supervisor.start(spec(SLEEP))
    async with supervisor:
        assert (await soon(supervisor.run(spec("exit 0")))).ok
    assert leftovers(settings) == []


@each_loop
async def test_who_is_cancelled_while_it_opens_leaves_nothing_open(settings: Settings) -> None:
    opening, go_on = threading.Event(), threading.Event()

    class Slow(Supervisor):
        def _open(self, hub: LogHub) -> LoopHost | None:
            opening.set()
            assert go_on.wait(30)
            return super()._open(hub)

    async with Supervisor(settings=settings):
        pass  # what is made once is there
    with leaves_nothing(settings):
        entering = asyncio.create_task(Slow(settings=settings).__aenter__())
        assert await asyncio.to_thread(opening.wait, 30)
        for _ in range(2):
            entering.cancel()
            await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await soon(entering)
    assert leftovers(settings) == []


def test_users_base_and_settings_exclude_each_other(settings: Settings, users_base: Path) -> None:
    with pytest.raises(SpecError):
        Supervisor(users_base, settings=settings)
    supervisor = Supervisor(users_base)
    assert supervisor.settings.state_dir == users_base / ".state"
    with pytest.raises(ConfigError):
        Supervisor(Path("relative"))


@each_loop
@pytest.mark.parametrize("how", ["return", "exception", "cancel", "anyio"])
async def test_its_end_takes_everything_along(settings: Settings, how: str) -> None:
    pids: list[int] = []
    ready = asyncio.Event()

    async def work() -> None:
        async with Supervisor(settings=settings) as supervisor:
            running = asyncio.create_task(supervisor.run(spec("trap '' TERM; sleep 1000", service="run")))
            for number in range(3):
                service = spec("trap '' TERM; echo ready; sleep 1000 & wait", service=f"s{number}", stop_grace=0.1)
                sandbox = await supervisor.start(service)
                await line_of(sandbox)
                pids.append(sandbox.pid)
            user = await supervisor.users.get_or_create(USER)
            pids.append(user.linux_uid)
            ready.set()
            try:
                if how == "exception":
                    raise LookupError("of the caller's own")
                if how != "return":
                    await asyncio.sleep(1000)
            finally:
                running.cancel()

    settings = replace(settings, stop_grace=0.1)
    task = asyncio.create_task(work())
    if how == "exception":
        with pytest.raises(LookupError):
            await soon(task)
    elif how == "return":
        await soon(task)
    elif how == "cancel":
        await soon(ready.wait())
        task.cancel()
        await asyncio.sleep(0.02)
        # Whoever loses patience does not get less done.
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(task)
    else:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        ready.clear()
        pids.clear()
        with anyio.move_on_after(30) as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(work)
                await ready.wait()
                scope.cancel()
    assert len(pids) == 4
    assert processes_of(pids[-1]) == {}
    assert leftovers(settings) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_process_leaves_nothing(settings: Settings, child: Start, number: int) -> None:
    process = child(
        """
import signal, warnings
warnings.simplefilter("always")
async def work(supervisor):
    for number in range(3):
        await supervisor.start(spec(["sleep", "1000"], service=f"s{number}"))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    await say("ready")
    await asyncio.sleep(1000)
"""
    )
    assert await process.line() == "ready"
    process.popen.send_signal(number)
    assert await process.ended() in (1, -signal.SIGINT)
    assert process.errors().splitlines()[-1] in ("KeyboardInterrupt", "asyncio.exceptions.CancelledError")
    assert "Warning" not in process.errors()
    assert leftovers(settings) == []


async def test_a_start_that_is_cancelled_leaves_nothing(supervisor: Supervisor, settings: Settings) -> None:
    """At whatever point it is."""
    await supervisor.users.get_or_create(USER)
    with leaves_nothing(settings):
        for turns in range(40):
            starting = asyncio.create_task(supervisor.start(spec(SLEEP, stop_grace=0)))
            for _ in range(turns):
                await asyncio.sleep(0)
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await soon(starting)
                await soon(supervisor.stop(USER, "api", grace=0))
        for turns in (1, 5, 20):
            running = asyncio.create_task(supervisor.run(spec(SLEEP, stop_grace=0)))
            for _ in range(turns):
                await asyncio.sleep(0)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await soon(running)
            assert supervisor.list() == []


async def test_a_start_that_is_cancelled_twice_leaves_nothing(supervisor: Supervisor, settings: Settings) -> None:
    await supervisor.users.get_or_create(USER)
    with leaves_nothing(settings):
        for turns in range(0, 30, 3):
            starting = asyncio.create_task(supervisor.start(spec(SLEEP, stop_grace=0)))
            for _ in range(turns):
                await asyncio.sleep(0)
            for _ in range(3):
                starting.cancel()
                await asyncio.sleep(0)
            with contextlib.suppress(asyncio.CancelledError):
                await soon(starting)
                await soon(supervisor.stop(USER, "api", grace=0))
            await eventually(lambda: not supervisor.list())


async def test_nothing_starts_while_it_ends(settings: Settings) -> None:
    async with Supervisor(settings=settings) as supervisor:
        sandbox = await supervisor.start(spec("trap '' TERM; echo ready; while :; do sleep 1000; done", stop_grace=0.2))
        await line_of(sandbox)

        async def late() -> None:
            while sandbox.state != "stopping":
                await asyncio.sleep(0)
            await supervisor.start(spec(SLEEP, service="late"))

        starting = asyncio.create_task(late())
    with pytest.raises(StateError):
        await soon(starting)
    assert leftovers(settings) == []


async def test_a_log_that_cannot_be_written_does_not_keep_a_sandbox(
    supervisor: Supervisor, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox = await supervisor.start(spec("read x; echo lost; exit 5", stdin=True))
    log = settings.log_dir / f"pactown_{sandbox.user.key}"
    log.parent.mkdir(exist_ok=True)
    log.write_text("not a directory")
    sandbox.close_stdin()
    with caplog.at_level(logging.ERROR):
        outcome = await soon(sandbox.wait())
    assert (outcome.reason, outcome.exit_code) == ("exited", 5)
    assert "not complete" in caplog.text
    assert supervisor.list() == []
    log.unlink()
    assert (await soon(supervisor.run(spec("exit 0")))).ok
    # What could not be written is there still, and the next supervisor writes it down.
    for path in (settings.run_dir / "fifo").iterdir():
        path.unlink()


# ---- Two on one state


@each_loop
async def test_two_in_one_process_share_a_state(settings: Settings) -> None:
    async with Supervisor(settings=settings) as one, Supervisor(settings=settings) as two:
        first = await one.start(spec(SLEEP))
        with pytest.raises(AlreadyRunningError) as caught:
            await two.start(spec(SLEEP))
        assert first.run_id in str(caught.value)
        second = await two.start(spec(SLEEP, service="other"))
        assert (one.list(), two.list()) == ([first], [second])
        with pytest.raises(NotFoundError):
            two.get(USER, "api")
        await soon(first.stop(grace=1))
        assert (await soon(two.run(spec("exit 0")))).ok
        # The one that ends leaves the other's alone.
        keeps = await one.start(spec(SLEEP))
        await soon(two.__aexit__(None, None, None))
        assert (keeps.state, second.state) == ("running", "ended")
        await two.__aenter__()
        assert keeps.state == "running"
    assert leftovers(settings) == []


async def test_two_processes_share_a_state(supervisor: Supervisor, child: Start) -> None:
    other = child(
        """
from pactown_runner.errors import AlreadyRunningError
async def work(supervisor):
    await supervisor.start(spec(["sleep", "1000"], service="theirs"))
    await say("ready")
    assert await told() == "try"
    try:
        await supervisor.start(spec(["sleep", "1000"], service="ours"))
    except AlreadyRunningError as error:
        await say(f"refused {[s.service_id for s in supervisor.list()]}")
    assert await told() == "end"
"""
    )
    assert await other.line() == "ready"
    ours = await supervisor.start(spec(SLEEP, service="ours"))
    with pytest.raises(AlreadyRunningError):
        await supervisor.start(spec(SLEEP, service="theirs"))
    other.tell("try")
    assert await other.line() == "refused ['theirs']"
    assert supervisor.list() == [ours]
    other.tell("end")
    assert await other.ended() == 0
    assert ours.state == "running"
    theirs = await supervisor.start(spec(SLEEP, service="theirs"))
    assert theirs.state == "running"


async def test_of_many_processes_that_start_a_service_one_does(settings: Settings, child: Start) -> None:
    async with Supervisor(settings=settings) as supervisor:
        await supervisor.users.get_or_create(USER)
    source = """
from pactown_runner.errors import AlreadyRunningError
async def work(supervisor):
    await say("ready")
    await told()
    try:
        await supervisor.start(spec(["sleep", "1000"]))
    except AlreadyRunningError:
        await say("no")
    else:
        await say("yes")
    await told()
"""
    processes = [child(source) for _ in range(4)]
    for process in processes:
        assert await process.line() == "ready"
    for process in processes:
        process.tell("go")
    assert sorted([await process.line() for process in processes]) == ["no", "no", "no", "yes"]
    for process in processes:
        process.tell("end")
        assert await process.ended() == 0
    assert leftovers(settings) == []


# ---- Without root

_PLAIN_UID = 65000

_PLAIN = """
import asyncio, os, sys
os.setgroups([]); os.setresgid(*[UID] * 3); os.setresuid(*[UID] * 3)
os.environ["HOME"] = os.environ["XDG_RUNTIME_DIR"] = sys.argv[1]
from pathlib import Path
from pactown_runner import SandboxSpec, Supervisor, RunnerError

async def main():
    async with Supervisor(Path(sys.argv[1], "users")) as supervisor:
        user = await supervisor.users.get_or_create("auth0|1")
        assert (user.linux_uid, os.getuid()) == (UID, UID)
        try:
            sandbox = await supervisor.start(SandboxSpec(
                user_id="auth0|1", service_id="api", command="id -u; cat /proc/self/cgroup; exec sleep 1000"))
        except RunnerError as error:
            print("refused", error.code, error.remedy)
            return
        report = sandbox.isolation
        print("started", report.mode, report.root_regainable, report.placement, report.no_new_privs)
        texts = []
        async for record in sandbox.logs(follow=True):
            texts.append(record.line)
            if record.line.startswith("0::"):
                break
        print(texts[0], texts[-1])
        await sandbox.freeze(); await sandbox.thaw()
        print((await sandbox.stop(grace=5)).reason)

asyncio.run(main())
""".replace("UID", str(_PLAIN_UID))


@pytest.fixture
def plain_home(test_run: Run) -> Iterator[Path]:
    """A directory of a plain user's, with a copy of the package that it can read."""
    home = test_run.directory / "plain"
    home.mkdir(mode=0o755)
    for name in ("pactown_runner", "cgroups"):
        shutil.copytree(ROOT / name, home / "lib" / name, ignore=shutil.ignore_patterns("__pycache__"))
    os.chown(home, _PLAIN_UID, _PLAIN_UID)
    yield home
    hostsweep.remove_file(home)


async def _plain(home: Path, cgroup: Path | None = None) -> list[str]:
    # The interpreter is started as root and becomes the user: its own files may lie where a user cannot go.
    site = sysconfig.get_path("purelib")
    source = f"import sys; sys.path[:0] = [{str(home / 'lib')!r}, {site!r}]\n{_PRELOAD}{_PLAIN}"
    join = ["sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(cgroup)] if cgroup else []
    process = await asyncio.create_subprocess_exec(
        *join, sys.executable, "-c", source, str(home), stdout=asyncio.subprocess.PIPE, env={"PATH": os.environ["PATH"]}
    )
    out, _ = await soon(process.communicate())
    assert process.returncode == 0
    return out.decode().splitlines()


_PRELOAD = """
import asyncio, anyio, aiofiles, anyio._backends._asyncio, structlog, sqlite3, tomllib, pactown_runner, encodings.idna
import concurrent.futures.thread, pactown_runner.supervisor, ctypes, base64, json, pwd, grp
"""


async def test_without_root_and_delegation_a_start_is_refused(plain_home: Path) -> None:
    (line,) = await _plain(plain_home)
    assert line.startswith("refused no-cgroup-tree")
    assert "systemd-run --user --scope -p Delegate=yes" in line


async def test_without_root_a_delegated_cgroup_is_used(plain_home: Path, slice_name: str) -> None:
    delegated = find_mount().path / slice_name
    delegated.mkdir()
    for path in (
        delegated,
        *(delegated / name for name in ("cgroup.procs", "cgroup.subtree_control", "cgroup.threads")),
    ):
        os.chown(path, _PLAIN_UID, _PLAIN_UID)
    started, identity, stopped = await _plain(plain_home, delegated)
    assert started == "started user None born True"
    uid, cgroup = identity.split()
    assert uid == str(_PLAIN_UID)
    assert cgroup.startswith(f"0::/{slice_name}/pactown.slice/pactown-")
    assert cgroup.endswith("/api.scope")
    assert stopped == "stopped"


async def test_a_start_error_is_raised_whole(supervisor: Supervisor) -> None:
    with pytest.raises(StartError) as caught:
        await soon(supervisor.start(spec(["no-such-program"])))
    assert caught.value.code == "failed-to-start"
    assert "no-such-program" in str(caught.value)


async def test_logs_go_on_over_supervisors(settings: Settings) -> None:
    for number in range(2):
        async with Supervisor(settings=settings) as supervisor:
            sandbox = await supervisor.start_run(spec(f"echo {number}"))
            await soon(sandbox.wait())
            assert await lines(sandbox) == [str(number)]
            assert [record.line async for record in supervisor.logs(USER, "api")] == [str(n) for n in range(number + 1)]


async def test_a_user_id_writes_no_lines_of_its_own_into_the_operators_log(supervisor: Supervisor) -> None:
    user = "eve\n2026-01-01 root logged in\x1b[2J\u202e"
    sandbox = await soon(supervisor.start(spec(["sleep", "1000"], user=user)))
    await soon(sandbox.kill())
    with pytest.raises(StateError) as caught:
        await sandbox.freeze()
    for text in (repr(sandbox), str(caught.value)):
        assert "eve" in text
        assert text.isprintable()


async def test_where_nobody_has_had_a_home_there_is_nothing_to_tell(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    async with Supervisor(settings=replace(settings, users_base=settings.users_base / "none")) as supervisor:
        removals = supervisor._removals
        assert removals is not None
        await asyncio.to_thread(removals.join)
    assert caplog.records == []
